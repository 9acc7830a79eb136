//! The least that a transport could cost: blocking sockets, one thread an end, nothing but bytes.

use std::io::{Read, Write};
use std::net::{Ipv4Addr, TcpListener, TcpStream};
use std::sync::Arc;
use std::thread;

use anyhow::Context;
use rustls::pki_types::{PrivateKeyDer, ServerName};
use rustls::{
    ClientConfig, ClientConnection, RootCertStore, ServerConfig, ServerConnection, StreamOwned,
};

/// The name in the certificate.
const HOST: &str = "localhost";

/// Both ends of TLS with a certificate made for the occasion.
pub struct Tls {
    client: Arc<ClientConfig>,
    server: Arc<ServerConfig>,
}

impl Tls {
    /// TLS 1.3 only, with the provider's first choice of cipher.
    pub fn new() -> anyhow::Result<Self> {
        let own = rcgen::generate_simple_self_signed([HOST.to_owned()])?;
        let certificate = own.cert.der().clone();
        let key = PrivateKeyDer::try_from(own.signing_key.serialize_der())
            .map_err(|reason| anyhow::anyhow!("the key is not valid: {reason}"))?;
        let mut roots = RootCertStore::empty();
        roots.add(certificate.clone())?;
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let versions = &[&rustls::version::TLS13];
        let client = ClientConfig::builder_with_provider(provider.clone())
            .with_protocol_versions(versions)?
            .with_root_certificates(roots)
            .with_no_client_auth();
        let server = ServerConfig::builder_with_provider(provider)
            .with_protocol_versions(versions)?
            .with_no_client_auth()
            .with_single_cert(vec![certificate], key)?;
        Ok(Self { client: Arc::new(client), server: Arc::new(server) })
    }
}

/// This end of a connection.
enum Stream {
    Plain(TcpStream),
    Secure(Box<StreamOwned<ClientConnection, TcpStream>>),
}

/// Connections to peers that send back what they get. Each peer's thread ends with its connection.
pub struct Echo {
    streams: Vec<Stream>,
    message: Vec<u8>,
}

impl Echo {
    /// Over TCP.
    pub fn plain(peers: usize, bytes: usize) -> anyhow::Result<Self> {
        let stream = || {
            let (near, far) = connection()?;
            thread::Builder::new().name("echo".into()).spawn(move || echo(far, bytes))?;
            anyhow::Ok(Stream::Plain(near))
        };
        let streams = (0..peers).map(|_| stream()).collect::<Result<_, _>>()?;
        Ok(Self { streams, message: vec![7; bytes] })
    }

    /// Over TLS 1.3; connections are up when this returns.
    pub fn secure(peers: usize, bytes: usize, tls: &Tls) -> anyhow::Result<Self> {
        let stream = || {
            let (near, far) = connection()?;
            let far = StreamOwned::new(ServerConnection::new(tls.server.clone())?, far);
            thread::Builder::new().name("echo".into()).spawn(move || echo(far, bytes))?;
            let host = ServerName::try_from(HOST)?;
            let near = ClientConnection::new(tls.client.clone(), host)
                .map(|connection| StreamOwned::new(connection, near))?;
            anyhow::Ok(Stream::Secure(Box::new(near)))
        };
        let streams = (0..peers).map(|_| stream()).collect::<Result<_, _>>()?;
        let mut echo = Self { streams, message: vec![7; bytes] };
        echo.exchange().context("the handshake failed")?;
        Ok(echo)
    }

    /// What was agreed on; empty without TLS.
    pub fn cipher(&self) -> String {
        let suite = self.streams.iter().find_map(|stream| match stream {
            Stream::Secure(stream) => stream.conn.negotiated_cipher_suite(),
            Stream::Plain(_) => None,
        });
        suite.map_or(String::new(), |suite| format!("{:?}", suite.suite()))
    }

    /// The message to every peer, then its echo from each.
    pub fn exchange(&mut self) -> anyhow::Result<()> {
        for stream in &mut self.streams {
            match stream {
                Stream::Plain(stream) => stream.write_all(&self.message)?,
                Stream::Secure(stream) => stream.write_all(&self.message)?,
            }
        }
        for stream in &mut self.streams {
            match stream {
                Stream::Plain(stream) => stream.read_exact(&mut self.message)?,
                Stream::Secure(stream) => stream.read_exact(&mut self.message)?,
            }
        }
        Ok(())
    }
}

fn connection() -> std::io::Result<(TcpStream, TcpStream)> {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?;
    let near = TcpStream::connect(listener.local_addr()?)?;
    let (far, _) = listener.accept()?;
    near.set_nodelay(true)?;
    far.set_nodelay(true)?;
    Ok((near, far))
}

/// Sends messages back, whole, until the connection ends.
fn echo(mut stream: impl Read + Write, bytes: usize) {
    let mut message = vec![0; bytes];
    while stream.read_exact(&mut message).is_ok() && stream.write_all(&message).is_ok() {}
}
