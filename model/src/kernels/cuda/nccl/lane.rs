//! A way for rows in one direction, between the memories of two processes.
//!
//! ```text
//!   rows ── pinned ──► device ── ncclSend ══► ncclRecv ── device ──► pinned ── rows
//! ```
//!
//! Rows go in pieces, through one buffer at each end. Both ends cut them alike, and the first piece
//! begins with the number and the length of what follows: whoever receives knows both beforehand, by
//! another way, and takes nothing else.
//!
//! Each direction has a communicator of its own. Work of one communicator happens in one order, so an
//! end that sends could otherwise wait for an end that sends too.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use super::{Communicator, NcclError, Patience, Rank, UniqueId};
use crate::kernels::cuda::{Buffer, Device, Event, Staging, Stream};

/// Lanes of a device. Each has a queue of work of its own, and a device has 32 at most: kernels that
/// wait in one that is shared would hold up what is behind them.
pub const LANES_MAX: usize = 24;

/// Bytes that travel at once, head included: long enough for full speed, few enough to keep.
const PIECE_BYTES: usize = 4 << 20;

/// Number and length of what follows, little-endian.
const HEAD_BYTES: usize = 16;

/// See the module. After an error it is of no more use.
pub struct Lane {
    communicator: Communicator,
    staging: Staging,
    buffer: Buffer<u8>,
    stream: Stream,
    done: Event,
    /// How many sets of rows went through it.
    count: u64,
    _seat: Seat,
}

impl Lane {
    /// A lane of which this is one end; the other is opened in these moments, with the other rank.
    ///
    /// # Errors
    /// The device has no room or too many lanes, NCCL refuses, or the other end does not come.
    pub fn open(
        device: &Arc<Device>,
        id: UniqueId,
        rank: Rank,
        patience: &Patience<'_>,
    ) -> Result<Self, NcclError> {
        let seat = Seat::take(device)?;
        // All memory at once: to get some later would wait for lanes that wait for their peers.
        let (mut staging, buffer) = (Staging::new(device)?, Buffer::new(device, PIECE_BYTES)?);
        staging.reserve(PIECE_BYTES)?;
        let (stream, done) = (Stream::new(device)?, Event::new(device)?);
        let communicator = Communicator::join(device, id, rank, patience)?;
        Ok(Self { communicator, staging, buffer, stream, done, count: 0, _seat: seat })
    }

    /// Sends rows. When this returns they may be elsewhere, or on their way.
    ///
    /// # Errors
    /// As [`Communicator::wait`].
    pub fn send(&mut self, rows: &[u8], patience: &Patience<'_>) -> Result<(), NcclError> {
        let head = self.head(rows.len());
        let mut parts = (&head[..], rows);
        loop {
            let (head, rows) = parts;
            let (now, later) = rows.split_at(rows.len().min(PIECE_BYTES - head.len()));
            let piece = 0..head.len() + now.len();
            self.staging.upload(&self.stream, self.buffer.slice_mut(piece.clone()), |to| {
                to[..head.len()].copy_from_slice(head);
                to[head.len()..].copy_from_slice(now);
            })?;
            let sent = Some(self.buffer.slice(piece));
            self.communicator.exchange(&self.stream, sent, None, patience)?;
            self.done.record(&self.stream)?;
            self.communicator.wait(&self.done, patience)?;
            if later.is_empty() {
                return Ok(());
            }
            parts = (&[], later);
        }
    }

    /// Receives rows of which so many bytes were sent.
    ///
    /// # Errors
    /// As [`Communicator::wait`], or other rows come.
    pub fn receive(
        &mut self,
        rows_bytes: usize,
        patience: &Patience<'_>,
    ) -> Result<Vec<u8>, NcclError> {
        let want = self.head(rows_bytes);
        let (mut head_bytes, mut rows) = (HEAD_BYTES, Vec::with_capacity(rows_bytes));
        loop {
            let now = (rows_bytes - rows.len()).min(PIECE_BYTES - head_bytes);
            let piece = 0..head_bytes + now;
            let to = Some(self.buffer.slice_mut(piece.clone()));
            self.communicator.exchange(&self.stream, None, to, patience)?;
            self.done.record(&self.stream)?;
            self.communicator.wait(&self.done, patience)?;
            self.staging.download(&self.stream, self.buffer.slice(piece), |bytes| {
                let (head, now) = bytes.split_at(head_bytes);
                rows.extend_from_slice(now);
                check(head, &want[..head_bytes])
            })??;
            if rows.len() == rows_bytes {
                return Ok(rows);
            }
            head_bytes = 0;
        }
    }

    /// Takes the next rows for the ones after them.
    #[cfg(test)]
    pub(crate) fn skip(&mut self) {
        self.count += 1;
    }

    fn head(&mut self, rows_bytes: usize) -> [u8; HEAD_BYTES] {
        let head = u128::from(self.count) | (rows_bytes as u128) << 64;
        self.count += 1;
        head.to_le_bytes()
    }
}

fn check(have: &[u8], want: &[u8]) -> Result<(), NcclError> {
    if have == want {
        return Ok(());
    }
    let text = |head: &[u8]| {
        let head = head.try_into().map_or(0, u128::from_le_bytes);
        format!("number {} of {} bytes", head as u64, head >> 64)
    };
    Err(NcclError::OutOfStep { have: text(have), want: text(want) })
}

/// One of the lanes that a device may have.
struct Seat(Arc<Device>);

impl Seat {
    fn take(device: &Arc<Device>) -> Result<Self, NcclError> {
        // Counted first, so that the drop undoes it either way.
        let seat = Self(Arc::clone(device));
        let taken = seat.lanes().fetch_add(1, Ordering::Relaxed);
        if taken < LANES_MAX { Ok(seat) } else { Err(NcclError::Crowded) }
    }

    fn lanes(&self) -> &AtomicUsize {
        self.0.lanes()
    }
}

impl Drop for Seat {
    fn drop(&mut self) {
        self.lanes().fetch_sub(1, Ordering::Relaxed);
    }
}
