//! Threads for work that takes microseconds.
//!
//! One parallel loop at a time: the caller posts it, takes part in it, and returns when every task
//! is done. Tasks are handed out one by one from a counter, so a thread that the system takes away
//! delays one task and not a fixed share; which thread does a task never matters to its result.
//!
//! A worker that has run out of work looks for more during [`SPIN`] and then parks. Within a
//! decoding step the next loop comes within that time; between steps, and in a process that waits
//! for others on the same cores, the thread sleeps. A loop that finds the pool occupied (another
//! caller, or a task that starts a loop of its own) runs on its own thread: no waiting, no
//! deadlock.
//!
//! What it does not know: priorities, pinning, more than one loop, results.

use std::marker::PhantomData;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// How long a thread looks for work before it parks: longer than the gap between two kernels of a
/// step, shorter than what a process that shares the core would notice.
const SPIN: Duration = Duration::from_micros(20);

/// A fixed set of threads, of which the caller of [`Pool::run`] is one.
pub(super) struct Pool {
    shared: Arc<Shared>,
    /// Held while a loop runs.
    turn: Mutex<()>,
    workers: Vec<JoinHandle<()>>,
}

struct Shared {
    slot: Mutex<Slot>,
    /// Counts posted loops; changes are seen by spinning workers without the lock.
    posted: AtomicU64,
    /// Workers inside the loop. They enter under the lock, and leave without.
    inside: AtomicUsize,
    /// Wakes workers: a loop was posted or the pool closes.
    work: Condvar,
    /// Wakes the caller: the last worker left its loop.
    left: Condvar,
}

#[derive(Default)]
struct Slot {
    /// The loop that may be joined. Lives on the stack of `Pool::run`, which takes it out of here
    /// and waits for `inside` to reach zero before it returns.
    job: Option<JobRef>,
    /// Workers asleep.
    parked: usize,
    /// Whether the caller sleeps until the last worker has left.
    waiting: bool,
    closed: bool,
}

struct Job<'a> {
    task: &'a (dyn Fn(usize) + Sync),
    tasks: usize,
    next: AtomicUsize,
    panicked: AtomicBool,
}

#[derive(Clone, Copy)]
struct JobRef(*const Job<'static>);

// SAFETY: a `Job` may be used from any thread (its closure is `Sync`, the rest are atomics); that
// it is still there when used is the protocol of `Slot`.
unsafe impl Send for JobRef {}

impl Pool {
    /// A pool of `threads` threads (at least 1): the caller and `threads - 1` workers.
    pub fn new(threads: usize) -> Self {
        let shared = Arc::new(Shared {
            slot: Mutex::default(),
            posted: AtomicU64::new(0),
            inside: AtomicUsize::new(0),
            work: Condvar::new(),
            left: Condvar::new(),
        });
        let workers = (1..threads).map(|i| {
            let shared = Arc::clone(&shared);
            let thread = std::thread::Builder::new().name(format!("kernel-{i}"));
            thread.spawn(move || shared.work_until_closed()).expect("the system has a thread left")
        });
        let workers = workers.collect();
        Self { shared, turn: Mutex::new(()), workers }
    }

    /// Threads that take part in a loop, the caller's included.
    pub fn threads(&self) -> usize {
        self.workers.len() + 1
    }

    /// Calls `task` once for every number in `0..tasks` and returns when all calls have returned.
    /// A panic in a task reaches the caller once no thread is inside the loop any more; tasks that
    /// had not begun may then be left out.
    pub fn run(&self, tasks: usize, task: impl Fn(usize) + Sync) {
        let shareable = tasks > 1 && !self.workers.is_empty();
        let Some(turn) = shareable.then(|| self.turn.try_lock().ok()).flatten() else {
            return (0..tasks).for_each(task);
        };
        let job =
            Job { task: &task, tasks, next: AtomicUsize::new(0), panicked: AtomicBool::new(false) };
        self.shared.post(&job);
        let outcome = catch_unwind(AssertUnwindSafe(|| job.work()));
        self.shared.withdraw();
        drop(turn);
        if let Err(panic) = outcome {
            resume_unwind(panic);
        }
        assert!(!job.panicked.load(Ordering::Relaxed), "a task of a parallel loop panicked");
    }

    /// Calls `task` with each chunk of `data` of `chunk_len` values (the last may be shorter).
    pub fn for_chunks<T: Send>(
        &self,
        data: &mut [T],
        chunk_len: usize,
        task: impl Fn(usize, &mut [T]) + Sync,
    ) {
        let len = data.len();
        let data = Scatter::new(data);
        self.run(len.div_ceil(chunk_len), |i| {
            let start = i * chunk_len;
            // SAFETY: chunks do not overlap, and each is given to one call.
            task(i, unsafe { data.slice(start, chunk_len.min(len - start)) });
        });
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        self.shared.lock().closed = true;
        self.shared.posted.fetch_add(1, Ordering::Release);
        self.shared.work.notify_all();
        for worker in self.workers.drain(..) {
            // Workers catch the panics of tasks, so there is nothing to pass on.
            let _ = worker.join();
        }
    }
}

impl Job<'_> {
    /// Does tasks until none is left to take.
    fn work(&self) {
        loop {
            let i = self.next.fetch_add(1, Ordering::Relaxed);
            if i >= self.tasks {
                return;
            }
            (self.task)(i);
        }
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, Slot> {
        // No code that holds the lock can panic, so a poisoned slot is still whole.
        self.slot.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn post(&self, job: &Job<'_>) {
        // The lifetime is erased here and kept by `withdraw`, which runs before `job` goes.
        let job = JobRef(std::ptr::from_ref(job).cast());
        let mut slot = self.lock();
        slot.job = Some(job);
        // Under the lock, so that a worker cannot look, see nothing and park in between.
        self.posted.fetch_add(1, Ordering::Release);
        if slot.parked > 0 {
            self.work.notify_all();
        }
    }

    /// Takes the loop away and waits until no worker is inside it. What the workers have written
    /// is visible afterwards, since each wrote `inside` last.
    fn withdraw(&self) {
        self.lock().job = None;
        let is_empty = || self.inside.load(Ordering::Acquire) == 0;
        if spin_until(is_empty) {
            return;
        }
        let mut slot = self.lock();
        slot.waiting = true;
        while !is_empty() {
            slot = self.left.wait(slot).unwrap_or_else(PoisonError::into_inner);
        }
        slot.waiting = false;
    }

    /// Leaves a loop, after which it may be gone. To wake somebody is a call of the system, so it is
    /// done only if somebody sleeps.
    fn leave(&self) {
        if self.inside.fetch_sub(1, Ordering::Release) == 1 && self.lock().waiting {
            self.left.notify_one();
        }
    }

    fn work_until_closed(&self) {
        let mut seen = 0;
        while let Some(job) = self.join_next(&mut seen) {
            // SAFETY: `inside` counts this worker, so `withdraw` waits for it to leave.
            let job = unsafe { &*job.0 };
            if catch_unwind(AssertUnwindSafe(|| job.work())).is_err() {
                job.panicked.store(true, Ordering::Relaxed);
            }
            self.leave();
        }
    }

    /// Waits for a loop that this worker has not seen and enters it; none when the pool closes.
    fn join_next(&self, seen: &mut u64) -> Option<JobRef> {
        loop {
            spin_until(|| self.posted.load(Ordering::Acquire) != *seen);
            let mut slot = self.lock();
            while !slot.closed && self.posted.load(Ordering::Acquire) == *seen {
                slot.parked += 1;
                slot = self.work.wait(slot).unwrap_or_else(PoisonError::into_inner);
                slot.parked -= 1;
            }
            if slot.closed {
                return None;
            }
            *seen = self.posted.load(Ordering::Acquire);
            if let Some(job) = slot.job {
                self.inside.fetch_add(1, Ordering::Relaxed);
                return Some(job);
            }
        }
    }
}

/// Looks at `ready` until it holds, but not longer than [`SPIN`]; says whether it did.
fn spin_until(ready: impl Fn() -> bool) -> bool {
    let start = Instant::now();
    loop {
        // Looking at the clock takes longer than looking at `ready`.
        for _ in 0..8 {
            if ready() {
                return true;
            }
            std::hint::spin_loop();
        }
        if start.elapsed() >= SPIN {
            return false;
        }
    }
}

/// A slice that the tasks of one loop write in places of their own.
pub(super) struct Scatter<'a, T> {
    start: *mut T,
    len: usize,
    borrow: PhantomData<&'a mut [T]>,
}

// SAFETY: it gives out what `&mut [T]` would; that no two threads get the same part is the contract
// of `slice`.
unsafe impl<T: Send> Sync for Scatter<'_, T> {}

impl<'a, T> Scatter<'a, T> {
    pub fn new(data: &'a mut [T]) -> Self {
        Self { start: data.as_mut_ptr(), len: data.len(), borrow: PhantomData }
    }

    pub fn len(&self) -> usize {
        self.len
    }

    /// The part `start..start + len`.
    ///
    /// # Safety
    /// No other part that overlaps it may be in use.
    #[allow(clippy::mut_from_ref)]
    pub unsafe fn slice(&self, start: usize, len: usize) -> &mut [T] {
        assert!(start <= self.len && len <= self.len - start, "outside of the slice");
        // SAFETY: within the slice, which is borrowed mutably; the caller keeps parts apart.
        unsafe { std::slice::from_raw_parts_mut(self.start.add(start), len) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_task_runs_exactly_once() {
        for threads in [1, 2, 5] {
            let pool = Pool::new(threads);
            for tasks in [0, 1, 2, 3, 100, 1000] {
                let counts: Vec<AtomicUsize> = (0..tasks).map(|_| AtomicUsize::new(0)).collect();
                pool.run(tasks, |i| {
                    counts[i].fetch_add(1, Ordering::Relaxed);
                });
                assert!(counts.iter().all(|c| c.load(Ordering::Relaxed) == 1), "{threads} {tasks}");
            }
        }
    }

    #[test]
    fn parked_workers_are_woken_by_the_next_loop() {
        let pool = Pool::new(2);
        let here = std::thread::current().id();
        for _ in 0..20 {
            std::thread::sleep(SPIN * 10);
            // The caller's task can only end when a worker has begun the other one.
            let joined = AtomicBool::new(false);
            pool.run(2, |_| {
                if std::thread::current().id() == here {
                    while !joined.load(Ordering::Acquire) {
                        std::thread::yield_now();
                    }
                } else {
                    joined.store(true, Ordering::Release);
                }
            });
        }
    }

    #[test]
    fn a_loop_within_a_loop_and_one_beside_it_complete() {
        let pool = Pool::new(2);
        let count = AtomicUsize::new(0);
        std::thread::scope(|scope| {
            for _ in 0..3 {
                scope.spawn(|| {
                    for _ in 0..50 {
                        pool.run(4, |_| {
                            pool.run(3, |_| {
                                count.fetch_add(1, Ordering::Relaxed);
                            });
                        });
                    }
                });
            }
        });
        assert_eq!(count.load(Ordering::Relaxed), 3 * 50 * 4 * 3);
    }

    #[test]
    fn a_panic_reaches_the_caller_and_the_pool_survives() {
        let pool = Pool::new(2);
        for bad in 0..16 {
            let outcome = catch_unwind(AssertUnwindSafe(|| pool.run(16, |i| assert_ne!(i, bad))));
            assert!(outcome.is_err());
        }
        let count = AtomicUsize::new(0);
        pool.run(8, |_| {
            count.fetch_add(1, Ordering::Relaxed);
        });
        assert_eq!(count.load(Ordering::Relaxed), 8);
    }

    #[test]
    fn chunks_cover_the_data() {
        let pool = Pool::new(2);
        let mut data = vec![0; 103];
        pool.for_chunks(&mut data, 10, |i, chunk| chunk.fill(i + 1));
        let expected: Vec<usize> = (0..103).map(|i| i / 10 + 1).collect();
        assert_eq!(data, expected);
    }
}
