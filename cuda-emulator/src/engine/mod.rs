//! Runs kernels: block after block, each thread of a block a fiber.
//!
//! A launch is deterministic: the [`Order`] decides who runs when, and nothing else does. It either
//! ends, or says which thread did what at which line that it must not do.

mod block;
mod copies;
mod kernel;
mod lane;
mod order;
mod trap;
mod warp;

use std::ffi::c_void;
use std::sync::{Mutex, PoisonError};

use corosensei::stack::DefaultStack;

use crate::memory::Region;
use block::Block;

pub use kernel::Kernel;
pub use order::Order;

/// The most threads of a block, of any device.
pub const BLOCK_THREADS_MAX: u32 = 1024;

/// The most blocks of a grid in y and z, of any device.
pub const GRID_SIDE_MAX: u32 = 65_535;

/// Bytes of dynamic shared memory that a block may have, and such as it may have if it is told so
/// first: compute capability 9.0, CUDA programming guide, technical specifications.
pub const SHARED_BYTES_USUAL: usize = 48 << 10;
/// See [`SHARED_BYTES_USUAL`].
pub const SHARED_BYTES_MAX: usize = 227 << 10;

/// Bytes of a fiber's stack. Kernels keep a few numbers each; below it lies a page that traps.
const STACK_BYTES: usize = 64 * 1024;

/// What to run, and how often.
#[derive(Clone, Copy, Debug)]
pub struct Launch<'a> {
    /// The kernel.
    pub kernel: &'static Kernel,
    /// Blocks in x, y and z.
    pub grid: [u32; 3],
    /// Threads of a block in x, y and z.
    pub block: [u32; 3],
    /// Bytes of shared memory beyond what the kernel itself declares.
    pub shared_bytes: usize,
    /// Where each argument lies.
    pub arguments: &'a [*mut c_void],
}

/// A mistake of a kernel: which one, where, and what.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("kernel {kernel}, block {block:?}: {what}")]
pub struct Fault {
    /// The kernel's name.
    pub kernel: String,
    /// The block's place in the grid.
    pub block: [u32; 3],
    /// The thread and what it did.
    pub what: String,
    /// Whether a trap told of it: memory that is not its own, an array's end, an address.
    pub trapped: bool,
}

/// Stacks that wait for the next launch. The lock is also the engine's turn: shared memory of all
/// blocks is one place, so only one block may run in a process.
static STACKS: Mutex<Vec<DefaultStack>> = Mutex::new(Vec::new());

/// Runs all blocks of a grid.
///
/// # Safety
/// `arguments` must point to as many arguments as the kernel has, of its types; and what the kernel
/// reads and writes through them must be there and nobody else's until this returns.
///
/// # Errors
/// The first mistake of the kernel; blocks that came before have run.
pub unsafe fn run(launch: &Launch<'_>, order: &mut Order) -> Result<(), Fault> {
    let mut stacks = STACKS.lock().unwrap_or_else(PoisonError::into_inner);
    let threads = launch.block.iter().product::<u32>() as usize;
    while stacks.len() < threads {
        stacks.push(DefaultStack::new(STACK_BYTES).expect("memory for one more stack"));
    }
    trap::find();
    let shared = Region::new(launch.shared_bytes).expect("memory for one block's shared memory");
    let mut block = Block::new(launch, shared.address() as *mut u8);
    for at in order.all(blocks(launch.grid)) {
        shared.poison();
        // SAFETY: the arguments are as the caller promises; the turn is ours.
        unsafe { block.run(at, &mut stacks, order) }?;
    }
    Ok(())
}

/// The places of a grid, x fastest.
fn blocks(grid: [u32; 3]) -> Vec<[u32; 3]> {
    let [width, height, depth] = grid;
    let plane = move |z| (0..height).flat_map(move |y| (0..width).map(move |x| [x, y, z]));
    (0..depth).flat_map(plane).collect()
}
