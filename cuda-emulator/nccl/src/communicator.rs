//! Communicators: how two processes find each other, and the sockets between them.

use std::collections::BTreeMap;
use std::ffi::{c_char, c_int, c_uint};
use std::io;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::{SocketAddr, UnixListener, UnixStream};
use std::sync::atomic::{AtomicBool, AtomicI32, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::Duration;

use crate::{Code, IN_PROGRESS, SUCCESS, SYSTEM_ERROR};

/// `ncclUniqueId`: a name of a socket.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct UniqueId([u8; 128]);

/// Ids that were made here and whose other rank nobody waits for yet. Whoever makes one listens.
static LISTENERS: Mutex<BTreeMap<UniqueId, UnixListener>> = Mutex::new(BTreeMap::new());

impl UniqueId {
    /// One that nobody else has.
    pub fn new() -> io::Result<Self> {
        let mut id = [0; 128];
        // SAFETY: so many bytes are there.
        let random = unsafe { libc::getrandom(id.as_mut_ptr().cast(), 16, 0) };
        if random != 16 {
            return Err(io::Error::last_os_error());
        }
        let id = Self(id);
        let listener = UnixListener::bind_addr(&id.address()?)?;
        listener.set_nonblocking(true)?;
        LISTENERS.lock().unwrap_or_else(PoisonError::into_inner).insert(id, listener);
        Ok(id)
    }

    fn address(&self) -> io::Result<SocketAddr> {
        let name: String = self.0[..16].iter().map(|byte| format!("{byte:02x}")).collect();
        SocketAddr::from_abstract_name(format!("entente-nccl-emulator-{name}"))
    }
}

/// `ncclConfig_t` as of NCCL 2.18; later versions only append to it.
#[repr(C)]
pub struct Config {
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
    pub fn is_usable(&self) -> bool {
        self.magic == 0xcafe_beef
            && self.size >= size_of::<Self>()
            && self.version >= 21_800
            && self.blocking == 0
            && (self.ctas_min, self.ctas_max) == (1, 1)
    }
}

/// `ncclComm`.
pub struct Communicator(pub Arc<Shared>);

/// What is left of a communicator that was aborted for as long as work of it is in a stream.
pub struct Shared {
    pub ranks: c_int,
    pub rank: c_int,
    /// What `ncclCommGetAsyncError` tells.
    pub state: AtomicI32,
    pub aborted: AtomicBool,
    /// To the peer and from it; none until it is there.
    pub wires: Mutex<Option<[UnixStream; 2]>>,
}

impl Communicator {
    /// Begins to join the others.
    pub fn join(id: UniqueId, ranks: c_int, rank: c_int) -> Self {
        let shared = Arc::new(Shared {
            ranks,
            rank,
            state: AtomicI32::new(IN_PROGRESS),
            aborted: AtomicBool::new(false),
            wires: Mutex::new(None),
        });
        let joining = Arc::clone(&shared);
        thread::spawn(move || joining.connect(id));
        Self(shared)
    }
}

impl Shared {
    pub fn abort(&self) {
        self.aborted.store(true, Ordering::Release);
        *self.wires() = None;
    }

    /// Leaves it in an error; the first one counts.
    pub fn fail(&self, code: Code) {
        let _ = self.state.compare_exchange(SUCCESS, code, Ordering::AcqRel, Ordering::Acquire);
    }

    pub fn wires(&self) -> std::sync::MutexGuard<'_, Option<[UnixStream; 2]>> {
        self.wires.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn connect(&self, id: UniqueId) {
        let listener = LISTENERS.lock().unwrap_or_else(PoisonError::into_inner).remove(&id);
        let state = match self.peer(&id, listener) {
            Ok(wires) => {
                *self.wires() = Some(wires);
                SUCCESS
            }
            Err(_) => SYSTEM_ERROR,
        };
        self.state.store(state, Ordering::Release);
    }

    /// Waits for the other rank, for as long as nobody aborts.
    fn peer(&self, id: &UniqueId, listener: Option<UnixListener>) -> io::Result<[UnixStream; 2]> {
        let [to, from] = if self.ranks == 1 {
            UnixStream::pair()?.into()
        } else {
            let socket = loop {
                let met = match &listener {
                    Some(listener) => listener.accept().map(|(socket, _)| socket),
                    None => UnixStream::connect_addr(&id.address()?),
                };
                match met {
                    Ok(socket) => break socket,
                    Err(error) if self.aborted.load(Ordering::Acquire) => return Err(error),
                    Err(_) => thread::sleep(Duration::from_millis(1)),
                }
            };
            [socket.try_clone()?, socket]
        };
        to.set_nonblocking(true)?;
        from.set_nonblocking(true)?;
        Ok([to, from])
    }
}
