//! The least that a transport could cost: blocking sockets, one thread an end, nothing but bytes.
//! TLS is rustls' ordinary connection with the provider, the cipher and the certificates of a link.

use std::io::{Read, Write};
use std::net::{Ipv4Addr, TcpListener, TcpStream};
use std::thread;

use anyhow::Context;
use rustls::pki_types::ServerName;
use rustls::{ClientConnection, ServerConnection, StreamOwned};

use super::Tls;

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
            let far = StreamOwned::new(ServerConnection::new(tls.server()?)?, far);
            thread::Builder::new().name("echo".into()).spawn(move || echo(far, bytes))?;
            let host = ServerName::try_from("localhost")?;
            let near = ClientConnection::new(tls.client(&[])?, host)
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
