//! Looks at the weights in memory again and again, one expert at a time.
//!
//! Memory forgets, rarely and without a word. What a node multiplies with is therefore compared with
//! its SHA-256 (that of the manifest, or where there is none the one that it had when it was first
//! looked at) once in each interval. What has changed is told, with the reason, and whoever hears of
//! it takes the expert out.
//!
//! Invariants: one thread, which hashes at most [`SCRUB_BYTES_PER_S`], an eighth of what a core can,
//! and holds on to one expert at most; it ends when the [`Scrubber`] is dropped.

use std::convert::Infallible;
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, sync_channel};
use std::thread;
use std::time::Duration;

use entente_proto::placement::ExpertKey;

use crate::Error;
use crate::limits::{SCRUB_BYTES_PER_S, SCRUB_PAUSE_MAX};
use crate::node::NodeHandle;

/// What is told of an expert that has changed in memory.
pub(crate) const SPOILT: &str = "its weights have changed in memory: their SHA-256 differs";

/// A scrub under way, until it is dropped.
pub(crate) struct Scrubber {
    _stop: SyncSender<Infallible>,
}

/// Looks at each expert of the node once in each interval, and calls `spoilt` with those that have
/// changed.
///
/// # Errors
/// There is no thread to be had.
pub(crate) fn start(
    node: NodeHandle,
    interval: Duration,
    spoilt: impl Fn(ExpertKey) + Send + 'static,
) -> Result<Scrubber, Error> {
    let (stop, stopped) = sync_channel(0);
    thread::Builder::new()
        .name("entente-scrub".to_owned())
        .spawn(move || while pass(&node, interval, &stopped, &spoilt) {})
        .map_err(Error::Thread)?;
    Ok(Scrubber { _stop: stop })
}

/// Looks at everything that is held now. Returns whether to go on.
fn pass(
    node: &NodeHandle,
    interval: Duration,
    stopped: &Receiver<Infallible>,
    spoilt: &impl Fn(ExpertKey),
) -> bool {
    let goes_on = |pause| stopped.recv_timeout(pause) == Err(RecvTimeoutError::Timeout);
    let held = node.held();
    let Ok(count @ 1..) = u32::try_from(held.len()) else {
        // Something may be loaded any moment.
        return goes_on(interval.min(SCRUB_PAUSE_MAX));
    };
    for key in held {
        if !goes_on(interval / count) {
            return false;
        }
        let (layer, expert) = key;
        match node.is_sound(key, rest) {
            Ok(true) => {}
            Ok(false) => {
                tracing::error!(target: "audit", %layer, %expert, "{SPOILT}");
                spoilt(key);
            }
            Err(error) => node.health().fail(error),
        }
    }
    true
}

/// Makes room for others after so many bytes.
fn rest(bytes: usize) {
    thread::sleep(Duration::from_secs_f64(bytes as f64 / SCRUB_BYTES_PER_S));
}
