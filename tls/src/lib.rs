//! TLS 1.3 between the processes of a cluster, and who may speak to whom.
//!
//! - [`Files`], [`Credentials`]: a process's certificate and key, and whom it believes; replaceable;
//! - [`Roots`]: the CAs of a cluster, one or more for each region, and whom they speak for;
//! - `verify`: the peer is exactly the process that it should be ([`entente_proto::identity`]);
//! - [`Channel`]: the records of one connection, without its socket;
//! - [`verify_signature`]: what a process has signed, checked by somebody else;
//! - [`Authority`] (feature `mint`): makes CAs and certificates.
//!
//! Invariants:
//! - TLS 1.3 only, both ends authenticated, always; there is no option for less. The one exception is
//!   how a process gets its first certificate, under an ALPN name of its own (`join`);
//! - sessions are never resumed: a resumed one would carry an old answer to the question of who the
//!   peer is past the end of its certificate. Links live long, so a full handshake costs nothing;
//! - a certificate is believed only if a CA of its own cluster and its own region signed it;
//! - the host name that was dialled decides nothing, and is not sent.
//!
//! What it does not know: sockets, threads, tokio, frames, and where members are listed.

mod certificate;
mod channel;
mod credentials;
mod join;
#[cfg(feature = "mint")]
mod mint;
mod records;
mod roots;
mod signature;
#[cfg(test)]
mod tests;
mod verify;

use std::io;
use std::path::PathBuf;

use entente_proto::identity::{Identity, Stranger};

pub use certificate::{Unfit, fingerprint};
pub use channel::{Channel, Incoming, PIECE_BYTES};
pub use credentials::{Credentials, Files};
pub use join::{ALPN_JOIN, join_client};
#[cfg(feature = "mint")]
pub use mint::{Authority, Issued, SigningRequest};
pub use roots::Roots;
use rustls::pki_types::CertificateDer;
pub use signature::{Signed, verify_signature};

/// The ALPN name of exchange frames on a byte stream.
pub const ALPN_STREAM: &[u8] = b"entente/1";
/// The ALPN name of exchange frames whose rows travel by NCCL.
pub const ALPN_NCCL: &[u8] = b"entente-nccl/1";
/// The ALPN name of HTTP/2, which carries gRPC.
pub const ALPN_GRPC: &[u8] = b"h2";

/// Why credentials or a connection are of no use.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A PEM file cannot be read, or does not hold what it should.
    #[error("{}: {reason}", file.display())]
    File {
        /// The file.
        file: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
    /// A certificate that is not of the kind that it should be.
    #[error(transparent)]
    Unfit(#[from] Unfit),
    /// A certificate of no coordinator where one was dialled to join.
    #[error("{0} is no coordinator")]
    NoCoordinator(Box<Identity>),
    /// A certificate of somebody else.
    #[error(transparent)]
    Stranger(#[from] Stranger),
    /// A handshake or a record that is not right.
    #[error("TLS: {}", verify::text(.0))]
    Tls(#[from] rustls::Error),
    /// More was to be sent at once than there is room for.
    #[error("TLS: a record does not fit: {0}")]
    Room(String),
    /// The peer has ended the connection.
    #[error("the peer has closed the connection")]
    Closed,
    /// A certificate cannot be made.
    #[cfg(feature = "mint")]
    #[error("cannot make a certificate: {0}")]
    Mint(#[from] rcgen::Error),
}

impl From<Error> for io::Error {
    fn from(error: Error) -> Self {
        Self::new(io::ErrorKind::InvalidData, error)
    }
}

/// Who the peer of a finished handshake is; rustls gives its certificates, its own one first.
///
/// # Errors
/// There is no certificate, or it does not say. Neither can be where the configuration was one of
/// [`Credentials`].
pub fn peer_identity(certificates: Option<&[CertificateDer<'_>]>) -> Result<Identity, Error> {
    Ok(certificate::identity_in(leaf_of(certificates)?)?)
}

/// The fingerprint of the certificate that the peer of a finished handshake has shown.
///
/// # Errors
/// There is no certificate.
pub fn peer_certificate_sha256(
    certificates: Option<&[CertificateDer<'_>]>,
) -> Result<[u8; 32], Error> {
    Ok(fingerprint(leaf_of(certificates)?))
}

fn leaf_of<'a, 'b>(
    certificates: Option<&'a [CertificateDer<'b>]>,
) -> Result<&'a CertificateDer<'b>, Error> {
    Ok(certificates.and_then(<[_]>::first).ok_or(rustls::Error::NoCertificatesPresented)?)
}
