//! A certificate that is half over becomes another one, while everything goes on.

use std::convert::Infallible;
use std::fs;
use std::time::{Duration, SystemTime};

use entente_proto::wire;
use entente_proto::wire::enrolment_client::EnrolmentClient;
use entente_tls::{Credentials, Files, SigningRequest};
use tokio::task::spawn_blocking;
use tokio::time::sleep;

use super::files::{take_turn, write_pair};
use crate::client::{Client, ClientError};
use crate::state::codec::sha256;

/// How long one attempt may take; it asks several voters.
const ATTEMPT_MAX: Duration = Duration::from_secs(5);
/// How long one may take where somebody waits for something else, and the next use is another.
const ON_USE_MAX: Duration = Duration::from_secs(2);
/// How often the files are looked at: somebody else may renew, or have put another CA in.
const LOOK: Duration = Duration::from_secs(30);
/// Shortest and longest pause after an attempt that failed. In between it is a tenth of the time that
/// is left, so that there are always further ones before the end.
const RETRY_MIN: Duration = Duration::from_millis(100);
const RETRY_MAX: Duration = Duration::from_secs(60);

/// Why a certificate was not renewed.
#[derive(Debug, thiserror::Error)]
pub enum RenewError {
    /// Nobody who could be asked could do it.
    #[error(transparent)]
    Client(#[from] ClientError),
    /// The certificate that came is not good, or no key can be made.
    #[error(transparent)]
    Tls(#[from] entente_tls::Error),
    /// The files cannot be written.
    #[error("{}: {reason}", files.certificate.display())]
    Files {
        /// The files.
        files: Files,
        /// Why.
        reason: std::io::Error,
    },
}

/// Renews the certificate of a process when half of its life is over, for as long as it is polled,
/// and takes up what others put into the files. Connections that are there go on; those that are
/// made afterwards show the new one.
pub async fn keep_fresh(client: Client, credentials: Credentials, files: Files) -> Infallible {
    let mut seen = digests(&files);
    loop {
        sleep(until(credentials.half_life()).min(LOOK)).await;
        let now = digests(&files);
        if now != seen {
            seen = now;
            match credentials.reload(&files) {
                Ok(()) => tracing::info!("certificate, key and CAs were read again"),
                Err(error) => tracing::error!(%error, "the files are not used, the old ones are"),
            }
        }
        if !until(credentials.half_life()).is_zero() {
            continue;
        }
        match renew(&client, &credentials, &files).await {
            Ok(()) => {
                seen = digests(&files);
                let life_s = until(credentials.expires()).as_secs();
                tracing::info!(life_s, "the certificate was renewed");
            }
            Err(error) => {
                let left_s = until(credentials.expires()).as_secs();
                tracing::error!(%error, left_s, "the certificate was not renewed");
            }
        }
        // One that is new may be past its half, too: where its CA ends soon, so does it.
        if until(credentials.half_life()).is_zero() {
            let left = until(credentials.expires());
            sleep((left / 10).clamp(RETRY_MIN, RETRY_MAX)).await;
        }
    }
}

/// Renews once: makes a key, has it certified, writes both, and shows them from now on.
///
/// # Errors
/// See [`RenewError`]; the old certificate is used on.
pub async fn renew(
    client: &Client,
    credentials: &Credentials,
    files: &Files,
) -> Result<(), RenewError> {
    renew_within(ATTEMPT_MAX, client, credentials, files).await
}

/// Renews the certificate of somebody who is there now and then, such as an operator's verb, if half
/// of its life is over. Of several that use it at once one renews it. Whether this one did.
///
/// # Errors
/// See [`RenewError`]; the old certificate is used on, and the next use tries again.
pub async fn renew_on_use(
    client: &Client,
    credentials: &Credentials,
    files: &Files,
) -> Result<bool, RenewError> {
    if !until(credentials.half_life()).is_zero() {
        return Ok(false);
    }
    let turn = take_turn(&files.key);
    let turn = turn.map_err(|reason| RenewError::Files { files: files.clone(), reason })?;
    let Some(_turn) = turn else { return Ok(false) };
    // Whoever had the turn before may have put another one there.
    let there = Credentials::load(files)?;
    if there.certificate_sha256() != credentials.certificate_sha256() {
        return Ok(false);
    }
    renew_within(ON_USE_MAX, client, credentials, files).await?;
    Ok(true)
}

async fn renew_within(
    max: Duration,
    client: &Client,
    credentials: &Credentials,
    files: &Files,
) -> Result<(), RenewError> {
    let own = SigningRequest::new()?;
    let csr = bytes::Bytes::from(own.csr_der);
    let call = |channel| {
        let request = wire::RenewRequest { csr: csr.clone() };
        async move { EnrolmentClient::new(channel).renew(request).await }
    };
    let chain_pem = client.any(max, call).await?.into_inner().chain_pem;
    // What is no good is found before it is written.
    credentials.replace(&chain_pem, &own.key_pem)?;
    let to = files.clone();
    let write = move || write_pair(&to, &chain_pem, &own.key_pem);
    let written = spawn_blocking(write).await.unwrap_or_else(|error| Err(error.into()));
    written.map_err(|reason| RenewError::Files { files: files.clone(), reason })
}

fn until(time: SystemTime) -> Duration {
    time.duration_since(SystemTime::now()).unwrap_or_default()
}

/// What the files hold; one that cannot be read is none.
fn digests(files: &Files) -> [Option<[u8; 32]>; 3] {
    [&files.ca, &files.certificate, &files.key].map(|file| Some(sha256(&fs::read(file).ok()?)))
}
