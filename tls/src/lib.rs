//! TLS 1.3 between the processes of a cluster, and who may speak to whom.
//!
//! - [`Files`], [`Credentials`]: a process's certificate and key, and the CA bundle of its cluster;
//! - `verify`: the peer's certificate is of our cluster's CA and names exactly the process that it
//!   should be ([`entente_proto::identity`]);
//! - [`Channel`]: the records of one connection, without its socket;
//! - [`Authority`] (feature `mint`): makes CAs and certificates.
//!
//! Invariants:
//! - TLS 1.3 only, both ends authenticated, always; there is no option for less;
//! - sessions are never resumed: a resumed one would carry an old answer to the question of who the
//!   peer is past the end of its certificate. Links live long, so a full handshake costs nothing;
//! - the host name that was dialled decides nothing, and is not sent.
//!
//! What it does not know: sockets, threads, tokio, frames, and where members are listed.

mod channel;
mod credentials;
#[cfg(feature = "mint")]
mod mint;
mod records;
#[cfg(test)]
mod tests;
mod verify;

use std::io;
use std::path::PathBuf;

use entente_proto::identity::{Identity, InvalidIdentity, Stranger};

pub use channel::{Channel, Incoming, PIECE_BYTES};
pub use credentials::{Credentials, Files};
#[cfg(feature = "mint")]
pub use mint::{Authority, Issued};
use rustls::pki_types::CertificateDer;

/// The ALPN name of exchange frames on a byte stream.
pub const ALPN_STREAM: &[u8] = b"entente/1";
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
    /// A certificate that does not say who its holder is.
    #[error(transparent)]
    Unidentified(#[from] Unidentified),
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
    let own = certificates.and_then(<[_]>::first);
    verify::identity_in(own.ok_or(rustls::Error::NoCertificatesPresented)?)
}

/// A certificate without exactly one identity.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Unidentified {
    /// None or several.
    #[error("the certificate has {0} URI names, one identity is needed")]
    Count(usize),
    /// One that is no identity of ours.
    #[error("the certificate's URI name {0}")]
    Invalid(#[from] InvalidIdentity),
}
