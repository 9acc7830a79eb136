//! What two processes have in common once each has joined by the same id.

use std::ffi::{c_char, c_int, c_uint};
use std::ptr::null_mut;
use std::sync::Arc;

use super::library::{self, BYTES, Functions, Handle, SUCCESS};
use super::{NcclError, Patience};
use crate::kernels::cuda::{Device, Event, Stream, View, ViewMut};

/// `NCCL_CONFIG_UNDEF_INT`: NCCL decides.
const UNDEFINED: c_int = c_int::MIN;

/// How the members of a communicator find each other: `ncclUniqueId`. Whoever makes one listens for
/// the others until they have come.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct UniqueId([u8; Self::BYTES]);

impl UniqueId {
    /// Its length.
    pub const BYTES: usize = 128;

    /// A new one.
    ///
    /// # Errors
    /// There is no NCCL, or it has no network to listen on.
    pub fn new() -> Result<Self, NcclError> {
        let nccl = library::load()?;
        let mut id = Self([0; Self::BYTES]);
        // SAFETY: the pointer is to a local of its type.
        nccl.check("ncclGetUniqueId", unsafe { (nccl.get_unique_id)(&raw mut id) })?;
        Ok(id)
    }

    /// One that another process has made.
    pub fn from_bytes(bytes: [u8; Self::BYTES]) -> Self {
        Self(bytes)
    }

    /// What another process needs.
    pub fn as_bytes(&self) -> &[u8; Self::BYTES] {
        &self.0
    }
}

/// `ncclConfig_t` as of NCCL 2.18. Later versions take what they append as undefined when they see
/// this version in it.
#[repr(C)]
pub(super) struct Config {
    size: usize,
    magic: c_uint,
    version: c_uint,
    blocking: c_int,
    cga_cluster_size: c_int,
    ctas_min: c_int,
    ctas_max: c_int,
    net_name: *const c_char,
    split_share: c_int,
}

impl Config {
    /// Calls that return at once; one block of threads, as a kernel that waits for its peer keeps
    /// others from its SM.
    fn new() -> Self {
        Self {
            size: size_of::<Self>(),
            magic: 0xcafe_beef,
            version: 21_800,
            blocking: 0,
            cga_cluster_size: UNDEFINED,
            ctas_min: 1,
            ctas_max: 1,
            net_name: std::ptr::null(),
            split_share: UNDEFINED,
        }
    }
}

/// Which of its members this process is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Rank {
    /// The only one: it sends to itself.
    Alone,
    /// The one of two that has made the id.
    First,
    /// The other one.
    Second,
}

impl Rank {
    /// How many there are, which one this is, and whom it sends to.
    fn numbers(self) -> [c_int; 3] {
        match self {
            Self::Alone => [1, 0, 0],
            Self::First => [2, 0, 1],
            Self::Second => [2, 1, 0],
        }
    }
}

/// See the module. Calls come from one thread at a time. One that fails aborts it: whatever waits for
/// the whole device must not wait for a peer that is gone.
pub struct Communicator {
    nccl: &'static Functions,
    device: Arc<Device>,
    handle: Handle,
    peer: c_int,
}

// SAFETY: NCCL takes calls for a communicator from any thread, one at a time, as `&mut` makes sure.
unsafe impl Send for Communicator {}

impl Communicator {
    /// Joins with the other one, which does the same in these moments.
    ///
    /// # Errors
    /// There is no NCCL, it refuses, or the other one does not come.
    pub fn join(
        device: &Arc<Device>,
        id: UniqueId,
        rank: Rank,
        patience: &Patience<'_>,
    ) -> Result<Self, NcclError> {
        let nccl = library::load()?;
        device.bind()?;
        let ([ranks, own, peer], config) = (rank.numbers(), Config::new());
        let (mut handle, device) = (null_mut(), Arc::clone(device));
        // SAFETY: pointers are to locals of their types, which NCCL copies.
        let code = unsafe { (nccl.init)(&raw mut handle, ranks, id, own, &raw const config) };
        // From here on it is aborted if nothing comes of it.
        let joining = Self { nccl, device, handle, peer };
        nccl.check("ncclCommInitRankConfig", code)?;
        patience.wait(|| joining.is_idle("ncclCommInitRankConfig"))?;
        Ok(joining)
    }

    /// Sends and receives as work of `stream`, either or both. The other one does the opposite. It has
    /// begun when this returns; [`Communicator::wait`] says when it is done.
    ///
    /// # Errors
    /// NCCL refuses or has failed.
    pub fn exchange(
        &mut self,
        stream: &Stream,
        send: Option<View<'_, u8>>,
        receive: Option<ViewMut<'_, u8>>,
        patience: &Patience<'_>,
    ) -> Result<(), NcclError> {
        let begun = self.begin(stream, send, receive);
        begun
            .and_then(|()| patience.wait(|| self.is_idle("ncclGroupEnd")))
            .inspect_err(|_| self.abort())
    }

    fn begin(
        &self,
        stream: &Stream,
        send: Option<View<'_, u8>>,
        receive: Option<ViewMut<'_, u8>>,
    ) -> Result<(), NcclError> {
        let &Self { nccl, handle, peer, .. } = self;
        if handle.is_null() {
            return Err(NcclError::GivenUp);
        }
        let queue = stream.handle().cast();
        self.device.bind()?;
        // SAFETY: there is nothing to get wrong.
        nccl.check("ncclGroupStart", unsafe { (nccl.group_start)() })?;
        let sent = send.map_or(SUCCESS, |from| {
            let address = from.address() as *const _;
            // SAFETY: so many bytes are there; buffers are freed only when the device is done.
            unsafe { (nccl.send)(address, from.len(), BYTES, peer, handle, queue) }
        });
        let received = receive.map_or(SUCCESS, |to| {
            let address = to.address() as *mut _;
            // SAFETY: the same, lent to be written.
            unsafe { (nccl.receive)(address, to.len(), BYTES, peer, handle, queue) }
        });
        // SAFETY: closes the group that was opened above, whatever was refused in it.
        let ended = unsafe { (nccl.group_end)() };
        nccl.check("ncclSend", sent)?;
        nccl.check("ncclRecv", received)?;
        nccl.check("ncclGroupEnd", ended)
    }

    /// Waits until `stream` has come to `event`, and for no peer that is gone.
    ///
    /// # Errors
    /// NCCL or the device has failed, or the patience is over.
    pub fn wait(&mut self, event: &Event, patience: &Patience<'_>) -> Result<(), NcclError> {
        let waited = patience.wait(|| {
            let has_come = event.has_come()?;
            if !has_come {
                // A kernel whose peer is gone waits for ever; only NCCL knows.
                self.is_idle("ncclCommGetAsyncError")?;
            }
            Ok(has_come)
        });
        waited.inspect_err(|_| self.abort())
    }

    /// Whether NCCL has begun all that it was asked for, unless it has failed since.
    fn is_idle(&self, function: &'static str) -> Result<bool, NcclError> {
        if self.handle.is_null() {
            return Err(NcclError::GivenUp);
        }
        let mut state = SUCCESS;
        // SAFETY: the communicator lives; the pointer is to a local integer.
        let code = unsafe { (self.nccl.async_error)(self.handle, &raw mut state) };
        self.nccl.check("ncclCommGetAsyncError", code)?;
        self.nccl.check(function, state)?;
        Ok(state == SUCCESS)
    }
}

impl Communicator {
    /// There is one way out, which also serves where the other one is gone. What it was asked for ends.
    fn abort(&mut self) {
        let handle = std::mem::replace(&mut self.handle, null_mut());
        if !handle.is_null() && self.device.bind().is_ok() {
            // SAFETY: made in `join`, and used no more.
            let _ = unsafe { (self.nccl.abort)(handle) };
        }
    }
}

impl Drop for Communicator {
    fn drop(&mut self) {
        self.abort();
    }
}
