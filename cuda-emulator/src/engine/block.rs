//! A block: its warps take turns, and the lanes of a warp go from meeting to meeting together.
//!
//! A warp runs until all of its lanes wait or have ended. If they wait for something of their own,
//! it is done and the warp may run again; if for the block, the warp rests until all others do.

use std::cell::{Cell, RefCell};
use std::ffi::c_void;
use std::ptr::{null, null_mut};
use std::sync::atomic::Ordering;

use corosensei::Coroutine;
use corosensei::stack::{DefaultStack, Stack};

use super::lane::{Arrival, Kind, Lane, RUNNING, Running};
use super::order::Order;
use super::warp::{self, LANES};
use super::{Fault, Kernel, Launch};

type Fiber = Coroutine<(), (), (), DefaultStack>;

unsafe extern "C" {
    fn entente_emulator_set_thread(x: u32, y: u32, z: u32);
    fn entente_emulator_set_block(x: u32, y: u32, z: u32);
    fn entente_emulator_set_shape(grid: *const u32, block: *const u32);
    fn entente_emulator_poison_shared();
}

/// How far a warp has come.
enum Progress {
    /// It may go on.
    Runs,
    /// It waits for the block's other warps.
    Rests,
    /// All of its lanes have ended.
    Ended,
}

/// A block, used again for each place of the grid.
pub struct Block<'a> {
    kernel: &'static Kernel,
    arguments: &'a [*mut c_void],
    lanes: Vec<Lane>,
    running: Running,
}

impl<'a> Block<'a> {
    /// The threads of a launch's blocks; `dynamic_shared` is what they all see.
    pub fn new(launch: &Launch<'a>, dynamic_shared: *mut u8) -> Self {
        // SAFETY: it reads three numbers of each.
        unsafe { entente_emulator_set_shape(launch.grid.as_ptr(), launch.block.as_ptr()) };
        let running = Running {
            lane: Cell::new(null()),
            mistake: RefCell::default(),
            trapped: Cell::default(),
            dynamic_shared,
        };
        let lanes = super::blocks(launch.block).into_iter().map(Lane::new).collect();
        Self { kernel: launch.kernel, arguments: launch.arguments, lanes, running }
    }

    /// Runs the block of one place.
    ///
    /// # Safety
    /// As for [`super::run`]; no other block may run.
    pub unsafe fn run(
        &mut self,
        place: [u32; 3],
        stacks: &mut Vec<DefaultStack>,
        order: &mut Order,
    ) -> Result<(), Fault> {
        // SAFETY: they write what only kernels of the block that runs read.
        unsafe {
            entente_emulator_set_block(place[0], place[1], place[2]);
            entente_emulator_poison_shared();
        }
        RUNNING.store((&raw const self.running).cast_mut(), Ordering::Relaxed);
        let mut fibers: Vec<Fiber> =
            self.lanes.iter().map(|lane| self.start(lane, stacks.pop())).collect();
        let outcome = self.run_warps(&mut fibers, order);
        for mut fiber in fibers {
            // SAFETY: of a kernel that has failed, only its own numbers are left on the stack.
            unsafe { fiber.force_reset() };
            stacks.push(fiber.into_stack());
        }
        RUNNING.store(null_mut(), Ordering::Relaxed);
        let trapped = self.running.trapped.take();
        let kernel = self.kernel.name().to_string_lossy();
        outcome.map_err(|what| Fault { kernel: kernel.into_owned(), block: place, what, trapped })
    }

    /// A fiber that will run one thread.
    fn start(&self, lane: &Lane, stack: Option<DefaultStack>) -> Fiber {
        lane.arrival.set(None);
        lane.copies.borrow_mut().clear();
        let stack = stack.expect("there are as many stacks as threads of a block");
        lane.stack.set((stack.limit().get(), stack.base().get()));
        let (kernel, lane) = (self.kernel, &raw const *lane);
        let arguments = self.arguments.as_ptr();
        Coroutine::with_stack(stack, move |yielder, ()| {
            // SAFETY: the lane outlives its fiber; the arguments are as the launch promises.
            unsafe {
                (*lane).yielder.set(yielder);
                kernel.call(arguments);
            }
        })
    }

    /// Lets warps run until all have ended.
    fn run_warps(&self, fibers: &mut [Fiber], order: &mut Order) -> Result<(), String> {
        let warps = self.lanes.len().div_ceil(LANES);
        let mut may_run: Vec<usize> = (0..warps).collect();
        let mut rests: Vec<usize> = Vec::new();
        let mut lanes: Vec<usize> = order.all((0..LANES).collect());
        loop {
            while !may_run.is_empty() {
                let at = order.pick(may_run.len());
                let warp = may_run[at];
                order.rearrange(&mut lanes);
                match self.run_warp(warp, fibers, &lanes)? {
                    Progress::Runs => {}
                    Progress::Rests => rests.push(may_run.remove(at)),
                    Progress::Ended => drop(may_run.remove(at)),
                }
            }
            if rests.is_empty() {
                return Ok(());
            }
            if rests.len() < warps {
                return Err(self.left_behind(rests[0]));
            }
            rests.sort_unstable();
            std::mem::swap(&mut rests, &mut may_run);
        }
    }

    /// Lets each lane of a warp run to its next meeting, and does what they meet for.
    fn run_warp(
        &self,
        warp: usize,
        fibers: &mut [Fiber],
        order: &[usize],
    ) -> Result<Progress, String> {
        let first = warp * LANES;
        let lanes = &self.lanes[first..self.lanes.len().min(first + LANES)];
        let fibers = &mut fibers[first..first + lanes.len()];
        for &at in order.iter().filter(|at| **at < lanes.len()) {
            self.resume(&lanes[at], &mut fibers[at])?;
        }
        let Some(arrival) = lanes[0].arrival.get() else {
            return match lanes.iter().find(|lane| lane.arrival.get().is_some()) {
                Some(waits) => Err(parted(waits, &lanes[0])),
                None => Ok(Progress::Ended),
            };
        };
        let same = |lane: &Lane| lane.arrival.get().is_some_and(|other| other.is_at(&arrival));
        if let Some(elsewhere) = lanes.iter().find(|lane| !same(lane)) {
            return Err(parted(&lanes[0], elsewhere));
        }
        // SAFETY: all lanes were just found to wait at the same primitive of the same line.
        unsafe { warp::meet(lanes, &arrival) }.map_err(|what| {
            format!("thread {:?}: {what}, in line {}", lanes[0].place, arrival.line)
        })?;
        Ok(if arrival.kind == Kind::Block { Progress::Rests } else { Progress::Runs })
    }

    /// Lets a lane run to its next meeting or its end.
    fn resume(&self, lane: &Lane, fiber: &mut Fiber) -> Result<(), String> {
        lane.arrival.set(None);
        if fiber.done() {
            return Ok(());
        }
        let [x, y, z] = lane.place;
        // SAFETY: it writes what only the fiber reads that runs next.
        unsafe { entente_emulator_set_thread(x, y, z) };
        self.running.lane.set(lane);
        fiber.resume(());
        match self.running.mistake.take() {
            Some(what) => Err(format!("thread {:?} {what}", lane.place)),
            None => Ok(()),
        }
    }

    /// Why a warp rests at a barrier for ever: some warp has ended.
    fn left_behind(&self, warp: usize) -> String {
        let waits = &self.lanes[warp * LANES];
        let firsts = self.lanes.iter().step_by(LANES);
        let ended = firsts.into_iter().find(|lane| lane.arrival.get().is_none());
        parted(waits, ended.unwrap_or(waits))
    }
}

/// Two lanes that should have met, the first of which waits.
fn parted(waits: &Lane, other: &Lane) -> String {
    let told = |arrival: Option<Arrival>| match arrival {
        Some(arrival) => format!("waits at {arrival}"),
        None => "has ended".to_owned(),
    };
    let (here, there) = (told(waits.arrival.get()), told(other.arrival.get()));
    format!("thread {:?} {here}, but thread {:?} {there}", waits.place, other.place)
}
