//! Makes a link on this machine as long as one wants: every byte arrives so much later.
//!
//! Latency alone: what is sent in a row arrives in a row, with no limit to the bandwidth. It knows
//! nothing of what it carries. Its threads end with the connections, or with the process.

use std::io::{self, Read, Write};
use std::net::{Ipv4Addr, Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::thread;
use std::time::{Duration, Instant};

/// Pieces on their way in one direction; past it the sender is not read from.
const PIECES_MAX: usize = 4_096;
/// Bytes that are read at once.
const PIECE_LEN_MAX: usize = 256 << 10;

type Piece = (Instant, Vec<u8>);

/// Opens an address that leads to `target`, `delay` away in each direction.
///
/// # Errors
/// When the system refuses a port or a thread.
pub fn open(target: SocketAddr, delay: Duration) -> io::Result<SocketAddr> {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?;
    let address = listener.local_addr()?;
    thread::Builder::new().name("relay".to_owned()).spawn(move || {
        for near in listener.incoming().map_while(Result::ok) {
            // A connection that cannot go on is closed, as a distant node's would be.
            let _ = TcpStream::connect(target).and_then(|far| connect(&near, &far, delay));
        }
    })?;
    Ok(address)
}

fn connect(near: &TcpStream, far: &TcpStream, delay: Duration) -> io::Result<()> {
    for (from, to) in [(near, far), (far, near)] {
        to.set_nodelay(true)?;
        let (from, to) = (from.try_clone()?, to.try_clone()?);
        let (sender, receiver) = sync_channel(PIECES_MAX);
        thread::Builder::new().spawn(move || take(from, &sender, delay))?;
        thread::Builder::new().spawn(move || deliver(to, &receiver))?;
    }
    Ok(())
}

/// Reads until the connection ends, and notes when each piece is due.
fn take(mut from: TcpStream, sender: &SyncSender<Piece>, delay: Duration) {
    let mut buffer = vec![0; PIECE_LEN_MAX];
    while let Ok(len) = from.read(&mut buffer) {
        let piece = (Instant::now() + delay, buffer[..len].to_vec());
        if len == 0 || sender.send(piece).is_err() {
            return;
        }
    }
}

fn deliver(mut to: TcpStream, receiver: &Receiver<Piece>) {
    for (due, bytes) in receiver {
        thread::sleep(due.saturating_duration_since(Instant::now()));
        if to.write_all(&bytes).is_err() {
            break;
        }
    }
    let _ = to.shutdown(Shutdown::Both);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_arrive_whole_and_late_in_both_directions() {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
        let delay = Duration::from_millis(20);
        let address = open(listener.local_addr().unwrap(), delay).unwrap();
        let echo = thread::spawn(move || {
            let (mut socket, _) = listener.accept().unwrap();
            let mut bytes = [0; 5];
            socket.read_exact(&mut bytes).unwrap();
            socket.write_all(&bytes).unwrap();
        });
        let mut socket = TcpStream::connect(address).unwrap();
        let start = Instant::now();
        socket.write_all(b"hello").unwrap();
        let mut answer = Vec::new();
        socket.read_to_end(&mut answer).unwrap();
        assert_eq!(answer, b"hello");
        assert!(start.elapsed() >= 2 * delay, "{:?}", start.elapsed());
        echo.join().unwrap();
    }
}
