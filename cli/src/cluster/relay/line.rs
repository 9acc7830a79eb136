//! One connection through the relay: two directions, each a line on which bytes wait their turn.
//!
//! ```text
//!   socket ──► read, stamp when it is due ──► bounded line ──► wait: due, not stalled, throttle ──► socket
//! ```
//!
//! A line that is full is not read from, so the sender waits as it would for a slow network.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::net::tcp::{OwnedReadHalf, OwnedWriteHalf};
use tokio::sync::{mpsc, watch};
use tokio::time::{Instant, sleep_until};

use super::rule::Rule;
use super::traffic::Counters;

/// Bytes of one read.
const CHUNK_BYTES: usize = 16 << 10;
/// Chunks that may be on their way in one direction: 4 MiB, which fills 30 ms at 1 Gbit/s.
const LINE_LEN_MAX: usize = 256;
/// The longest that a slow node's answer is held back.
const SLOW_MAX: Duration = Duration::from_secs(5);

/// Bytes and when they are due.
type Chunk = (Instant, Vec<u8>);

/// When the dialler last said something that is not answered yet.
#[derive(Debug, Default)]
struct Asked(Mutex<Option<Instant>>);

impl Asked {
    fn now(&self) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = Some(Instant::now());
    }

    /// How long the answer took that begins now; nothing for the rest of it.
    fn answered(&self) -> Option<Duration> {
        let asked = self.0.lock().unwrap_or_else(PoisonError::into_inner).take();
        asked.map(|asked| asked.elapsed())
    }
}

/// Carries bytes both ways until both have ended, or until the link is cut.
pub async fn carry(
    dialler: TcpStream,
    target: TcpStream,
    [there, back]: [watch::Receiver<Rule>; 2],
    counters: &Counters,
) {
    // Small frames must not wait for each other here. A socket that refuses is merely slower.
    let _ = (dialler.set_nodelay(true), target.set_nodelay(true));
    let cut = until_cut(there.clone(), back.clone());
    let asked = Asked::default();
    let (from_dialler, to_dialler) = dialler.into_split();
    let (from_target, to_target) = target.into_split();
    let [passed_there, passed_back] = counters.directions();
    let there = Way { rule: there, side: Side::Asks(&asked), passed: passed_there };
    let back = Way { rule: back, side: Side::Answers(&asked), passed: passed_back };
    let both = async {
        tokio::join!(
            direction(from_dialler, to_target, there),
            direction(from_target, to_dialler, back)
        )
    };
    tokio::select! {
        _ = both => {}
        () = cut => {}
    }
}

/// Completes when one of the directions is cut.
async fn until_cut(mut there: watch::Receiver<Rule>, mut back: watch::Receiver<Rule>) {
    tokio::select! {
        _ = there.wait_for(|rule| rule.is_cut) => {}
        _ = back.wait_for(|rule| rule.is_cut) => {}
    }
}

/// Which way bytes go, for nodes that are to answer slowly.
enum Side<'a> {
    Asks(&'a Asked),
    Answers(&'a Asked),
}

/// One direction of a connection.
struct Way<'a> {
    rule: watch::Receiver<Rule>,
    side: Side<'a>,
    /// Counts the bytes that it lets through.
    passed: &'a AtomicU64,
}

async fn direction(from: OwnedReadHalf, to: OwnedWriteHalf, way: Way<'_>) {
    let (line, waiting) = mpsc::channel(LINE_LEN_MAX);
    let answers = match way.side {
        Side::Asks(_) => None,
        Side::Answers(asked) => Some(asked),
    };
    tokio::join!(read(from, line, way.rule.clone(), answers), write(to, waiting, way));
}

/// Puts what is read on the line, until there is no more or nobody takes it.
async fn read(
    mut from: OwnedReadHalf,
    line: mpsc::Sender<Chunk>,
    rule: watch::Receiver<Rule>,
    answers: Option<&Asked>,
) {
    let mut buffer = vec![0; CHUNK_BYTES];
    loop {
        // An end and an error are the same to the other side.
        let Ok(len @ 1..) = from.read(&mut buffer).await else { return };
        let now = *rule.borrow();
        let held_back = answers.and_then(Asked::answered).map(|took| slower(took, now.slow));
        let due = Instant::now() + now.delay + held_back.unwrap_or_default();
        if line.send((due, buffer[..len].to_vec())).await.is_err() {
            return;
        }
    }
}

/// How much longer an answer takes that took so long, from a node that is so many times slower.
fn slower(took: Duration, factor: u32) -> Duration {
    took.saturating_mul(factor.saturating_sub(1)).min(SLOW_MAX)
}

/// Writes what is on the line when it is due, then says that there is no more.
async fn write(
    mut to: OwnedWriteHalf,
    mut line: mpsc::Receiver<Chunk>,
    Way { mut rule, side, passed }: Way<'_>,
) {
    let mut free_at = Instant::now();
    while let Some((due, bytes)) = line.recv().await {
        sleep_until(due.max(free_at)).await;
        // The rules end with the relay, and this connection with both.
        let Ok(now) = rule.wait_for(|rule| !rule.is_stalled).await.map(|rule| {
            // Nobody can change the rule while it is looked at: whoever has cut the link finds in
            // the counter all that was let through.
            if !rule.is_cut {
                passed.fetch_add(bytes.len() as u64, Ordering::Relaxed);
            }
            *rule
        }) else {
            return;
        };
        if now.is_cut {
            return;
        }
        if let Some(bits_per_s) = now.bits_per_s {
            let seconds = bytes.len() as f64 * 8.0 / bits_per_s as f64;
            free_at = Instant::now() + Duration::from_secs_f64(seconds);
        }
        if to.write_all(&bytes).await.is_err() {
            return;
        }
        if let Side::Asks(asked) = side {
            asked.now();
        }
    }
    let _ = to.shutdown().await;
}
