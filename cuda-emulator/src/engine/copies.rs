//! Asynchronous copies of one thread into shared memory.
//!
//! A device may do such a copy at any time between its issue and the wait for it. Here it is done
//! at the wait, from memory as it is then; until then its destination is poisoned. So whoever reads
//! before the wait, or lets a copy begin where others still read, reads NaNs.

use std::collections::VecDeque;

/// Bytes of one copy.
const COPY_BYTES: usize = 16;

#[derive(Debug)]
struct Copy {
    to: *mut u8,
    /// Null where zeros are to be written.
    from: *const u8,
    group: u32,
}

/// The copies of a thread that were issued and not yet waited for.
#[derive(Debug, Default)]
pub struct Copies {
    pending: VecDeque<Copy>,
    /// Groups that were committed so far; the copies issued next belong to this one.
    group: u32,
}

impl Copies {
    /// Begins a copy.
    ///
    /// # Safety
    /// `to` must be memory that can be written, and `from`, unless it is null, such that can be
    /// read, until the copy is waited for.
    pub unsafe fn issue(&mut self, to: *mut u8, from: *const u8) -> Result<(), String> {
        for (what, address) in [("to", to as usize), ("from", from as usize)] {
            if !address.is_multiple_of(COPY_BYTES) {
                return Err(format!("copies {what} {address:#x}, no multiple of {COPY_BYTES}"));
            }
        }
        // SAFETY: as the caller promises.
        unsafe { to.write_bytes(0xff, COPY_BYTES) };
        self.pending.push_back(Copy { to, from, group: self.group });
        Ok(())
    }

    /// Ends the group of copies that were issued since the last one.
    pub fn commit(&mut self) {
        self.group += 1;
    }

    /// Does what was committed, but for the last so many groups.
    ///
    /// # Safety
    /// As for [`Self::issue`].
    pub unsafe fn wait(&mut self, groups_left: u32) {
        let done = self.group.saturating_sub(groups_left);
        while let Some(copy) = self.pending.pop_front_if(|copy| copy.group < done) {
            // SAFETY: as the caller promises.
            unsafe {
                if copy.from.is_null() {
                    copy.to.write_bytes(0, COPY_BYTES);
                } else {
                    copy.to.copy_from(copy.from, COPY_BYTES);
                }
            }
        }
    }

    /// Forgets everything, for the next thread.
    pub fn clear(&mut self) {
        self.pending.clear();
        self.group = 0;
    }
}
