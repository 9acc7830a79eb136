//! One thread of a block, and the calls by which a kernel reaches the engine.
//!
//! Everything that a fiber and the scheduler both touch is a cell behind a shared reference: one
//! host thread runs both, never at once.

use std::cell::{Cell, RefCell};
use std::ffi::c_void;
use std::ptr::null;
use std::sync::atomic::{AtomicPtr, Ordering};

use corosensei::Yielder;

use super::copies::Copies;

/// What lanes meet for. As the constants in `device/prelude.h`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// All threads of the block.
    Block,
    /// All lanes of the warp.
    Warp,
    /// The value of a lane that each lane names.
    Shuffle,
    /// The value of the lane whose number differs in some bits.
    ShuffleXor,
    /// A product of small matrices that are spread over the warp.
    Mma,
}

impl Kind {
    fn new(number: i32) -> Option<Self> {
        [Self::Block, Self::Warp, Self::Shuffle, Self::ShuffleXor, Self::Mma]
            .into_iter()
            .find(|kind| *kind as i32 == number)
    }
}

impl std::fmt::Display for Kind {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Block => "a barrier of the block",
            Self::Warp => "a barrier of the warp",
            Self::Shuffle | Self::ShuffleXor => "a shuffle",
            Self::Mma => "a matrix product",
        })
    }
}

/// Where a lane waits.
#[derive(Clone, Copy, Debug)]
pub struct Arrival {
    /// What for.
    pub kind: Kind,
    /// The line of the kernel's source.
    pub line: i32,
    /// What it brings and where it wants its result, on its own stack.
    pub deposit: *mut c_void,
}

impl Arrival {
    /// Whether two lanes wait in the same place.
    pub fn is_at(&self, other: &Self) -> bool {
        self.kind == other.kind && self.line == other.line
    }
}

impl std::fmt::Display for Arrival {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} in line {}", self.kind, self.line)
    }
}

/// A thread of a block.
#[derive(Debug)]
pub struct Lane {
    /// Its place in the block.
    pub place: [u32; 3],
    /// How it gives way; set by its fiber when that starts.
    pub yielder: Cell<*const Yielder<(), ()>>,
    /// Where it waits; none while it runs and when it has ended.
    pub arrival: Cell<Option<Arrival>>,
    /// Copies that it has begun.
    pub copies: RefCell<Copies>,
    /// Addresses of its fiber's stack.
    pub stack: Cell<(usize, usize)>,
}

impl Lane {
    /// A thread that has not started.
    pub fn new(place: [u32; 3]) -> Self {
        Self {
            place,
            yielder: Cell::new(null()),
            arrival: Cell::new(None),
            copies: RefCell::default(),
            stack: Cell::default(),
        }
    }

    /// Gives way until the engine lets it go on.
    fn suspend(&self) {
        // SAFETY: this runs on the lane's fiber, so that its yielder is set and alive.
        unsafe { &*self.yielder.get() }.suspend(());
    }
}

/// What kernels can reach of the block that runs.
#[derive(Debug)]
pub struct Running {
    /// The lane whose fiber runs.
    pub lane: Cell<*const Lane>,
    /// The first mistake that a lane made by itself.
    pub mistake: RefCell<Option<String>>,
    /// Whether a trap has told of it.
    pub trapped: Cell<bool>,
    /// Where the block's dynamic shared memory begins.
    pub dynamic_shared: *mut u8,
}

/// The block that runs. The engine's turn is the lock of it.
pub static RUNNING: AtomicPtr<Running> = AtomicPtr::new(std::ptr::null_mut());

fn running() -> &'static Running {
    // SAFETY: kernels call this only while their block runs, which sets it before and keeps it.
    unsafe { &*RUNNING.load(Ordering::Relaxed) }
}

fn lane() -> &'static Lane {
    // SAFETY: set by the scheduler whenever it resumes a fiber, and alive as long as that.
    unsafe { &*running().lane.get() }
}

/// Notes a mistake; the thread that made it never goes on.
fn fail(what: String) {
    running().mistake.replace(Some(what));
    loop {
        lane().suspend();
    }
}

/// Whether an address lies on the stack of the fiber that runs, if any.
pub fn is_on_fiber(address: usize) -> bool {
    // SAFETY: null, or a block that has not been left.
    let running = unsafe { RUNNING.load(Ordering::Relaxed).as_ref() };
    // SAFETY: as in `lane`; null before the first one.
    let lane = running.and_then(|running| unsafe { running.lane.get().as_ref() });
    lane.is_some_and(|lane| {
        let (start, end) = lane.stack.get();
        (start..end).contains(&address)
    })
}

/// Notes a mistake of the running thread that a trap has told of.
pub fn fail_by_trap(what: String) {
    running().trapped.set(true);
    fail(what);
}

#[unsafe(no_mangle)]
extern "C" fn entente_emulator_meet(kind: i32, line: i32, deposit: *mut c_void) {
    let Some(kind) = Kind::new(kind) else {
        return fail(format!("calls a primitive {kind} that is none"));
    };
    lane().arrival.set(Some(Arrival { kind, line, deposit }));
    lane().suspend();
}

#[unsafe(no_mangle)]
unsafe extern "C" fn entente_emulator_copy(to: *mut u8, from: *const u8, valid: i32, line: i32) {
    let from = if valid == 0 { null() } else { from };
    // SAFETY: both are what the kernel says; where it is wrong, a guard page ends the process.
    let issued = unsafe { lane().copies.borrow_mut().issue(to, from) };
    if let Err(what) = issued {
        fail(format!("{what}, in line {line}"));
    }
}

#[unsafe(no_mangle)]
extern "C" fn entente_emulator_copy_commit() {
    lane().copies.borrow_mut().commit();
}

#[unsafe(no_mangle)]
unsafe extern "C" fn entente_emulator_copy_wait(groups_left: i32) {
    // SAFETY: as for the issue.
    unsafe { lane().copies.borrow_mut().wait(groups_left.max(0) as u32) };
}

#[unsafe(no_mangle)]
extern "C" fn entente_emulator_dynamic_shared() -> *mut u8 {
    running().dynamic_shared
}
