//! A token becomes a certificate.

use std::time::Duration;

use entente_proto::identity::Identity;
use entente_proto::ids::NodeName;
use entente_proto::wire;
use entente_proto::wire::enrolment_client::EnrolmentClient;
use entente_tls::{Credentials, Roots, SigningRequest};
use rustls::pki_types::CertificateDer;
use tokio::time::timeout;
use tonic::{Code, Status};

use crate::net::{Unreachable, dial_to_join};
use crate::roster::{InvalidRoster, Roster};
use crate::state::codec::{Malformed, spec_in};
use crate::token::Text;

/// How long one coordinator may take.
const ATTEMPT_MAX: Duration = Duration::from_secs(10);

/// What a process begins with.
#[derive(Debug)]
pub struct Joined {
    /// Who it is from now on.
    pub identity: Identity,
    /// Its certificate and what is between it and a CA, PEM.
    pub chain_pem: String,
    /// Its key, PEM.
    pub key_pem: String,
    /// The CAs of all regions, PEM.
    pub ca_pem: String,
    /// What the cluster was founded with.
    pub roster: Roster,
    /// Where control ports are besides those of the founders.
    pub contacts: Vec<String>,
}

/// Why a process cannot join.
#[derive(Debug, thiserror::Error)]
pub enum JoinError {
    /// The cluster does not want it, or not by this token.
    #[error("refused: {0}")]
    Refused(String),
    /// Nobody could be asked, or nobody who was asked could do it. The token is as it was, unless a
    /// reason says otherwise.
    #[error("no coordinator could do it: {}", .0.join("; "))]
    Nobody(Vec<String>),
    /// The answer is not one.
    #[error("the answer: {0}")]
    Malformed(#[from] Malformed),
    /// The cluster that was told of is none.
    #[error("the answer: {0}")]
    Roster(#[from] InvalidRoster),
    /// The certificate is not good, or no key can be made.
    #[error(transparent)]
    Tls(#[from] entente_tls::Error),
}

/// Joins the cluster of a token under a name. A new key is made for it.
///
/// # Errors
/// See [`JoinError`].
pub async fn join(token: &Text, name: &NodeName) -> Result<Joined, JoinError> {
    let own = SigningRequest::new()?;
    let request = wire::JoinRequest {
        token_id: token.id.clone(),
        secret: token.secret.to_vec().into(),
        name: name.to_string(),
        csr: own.csr_der.into(),
    };
    let mut reasons = Vec::new();
    for address in &token.addresses {
        let asked = timeout(ATTEMPT_MAX, ask(token, address, request.clone())).await;
        let reason = match asked {
            Ok(Ok(reply)) => return joined(reply, own.key_pem),
            Ok(Err(Answer::Refused(status))) => {
                // What an earlier one may have done explains what this one says.
                reasons.push(status.message().to_owned());
                return Err(JoinError::Refused(reasons.join("; ")));
            }
            Ok(Err(Answer::Other(reason))) => reason,
            Err(_) => format!("{address} did not answer; the token may be used up"),
        };
        reasons.push(reason);
    }
    Err(JoinError::Nobody(reasons))
}

enum Answer {
    Refused(Status),
    /// The next one may know more.
    Other(String),
}

impl From<Unreachable> for Answer {
    fn from(error: Unreachable) -> Self {
        Self::Other(error.to_string())
    }
}

async fn ask(
    token: &Text,
    address: &str,
    request: wire::JoinRequest,
) -> Result<wire::JoinReply, Answer> {
    let channel = dial_to_join(&token.ca_sha256, address).await?;
    let answer = EnrolmentClient::new(channel).join(request).await;
    match answer {
        Ok(reply) => Ok(reply.into_inner()),
        Err(status) => Err(match status.code() {
            Code::PermissionDenied | Code::InvalidArgument => Answer::Refused(status),
            _ => Answer::Other(format!("{address}: {}", status.message())),
        }),
    }
}

fn joined(reply: wire::JoinReply, key_pem: String) -> Result<Joined, JoinError> {
    let missing = |what| move || JoinError::from(Malformed::Unknown(what));
    let chain_pem = reply.certificate.ok_or_else(missing("the certificate"))?.chain_pem;
    let founding = reply.founding.ok_or_else(missing("the founding"))?;
    let cas = reply.cas.iter().map(|ca| CertificateDer::from(ca.to_vec())).collect();
    let roots = Roots::new(cas)?;
    let ca_pem = roots.to_pem();
    // Finds now what would otherwise be found at the first start.
    let identity = Credentials::new(roots, &chain_pem, &key_pem)?.identity().clone();
    let specs = founding.members.into_iter().map(spec_in).collect::<Result<_, _>>()?;
    let replicas = u16::try_from(founding.replicas).map_err(|_| Malformed::Unknown("replicas"))?;
    let roster = Roster::of_specs(founding.cluster, replicas, specs)?;
    let is_founder = |address: &String| roster.voters().iter().any(|v| v.address == *address);
    let contacts = reply.voters.into_iter().filter(|address| !is_founder(address)).collect();
    Ok(Joined { identity, chain_pem, key_pem, ca_pem, roster, contacts })
}
