//! What the machine can do at best, measured: how fast memory is read and numbers are multiplied.
//!
//! A kernel's speed means little by itself; beside these two numbers, taken in the same minutes on
//! as many threads, it says how much is left to win. Both are measured the way that kernels work:
//! on the same pool of threads, from memory of the same kind.

use std::hint::black_box;
use std::time::{Duration, Instant};

pub use super::cpu::limits::Multiply;
use super::cpu::limits::multiply;
use super::memory::{LINE_WORDS, Line, Lines};
use super::pool::Pool;

/// Far more than the caches hold.
const READ_BYTES: usize = 512 << 20;
/// What one task reads: large against the cost of handing it out.
const TASK_LINES: usize = (1 << 20) / size_of::<Line>();
/// How long the multipliers are measured.
const MULTIPLY_MIN: Duration = Duration::from_millis(30);

/// Measures limits; holds the memory that is read.
pub struct Limits {
    pool: Pool,
    threads: usize,
    lines: Lines,
}

impl Limits {
    /// Limits of `threads` threads together.
    pub fn new(threads: usize) -> Self {
        let pool = Pool::new(threads);
        let mut lines = Lines::zeroed(READ_BYTES / size_of::<Line>());
        // Pages that nobody has written all show the same zeros, from cache.
        pool.for_chunks(&mut lines, TASK_LINES, |task, lines| lines.fill(Line([task as u32; 16])));
        Self { pool, threads, lines }
    }

    /// Bytes read from memory, in 10^9 a second, by one pass over a large buffer.
    pub fn read_bandwidth_gb_s(&self) -> f64 {
        let tasks: Vec<&[Line]> = self.lines.chunks(TASK_LINES).collect();
        let start = Instant::now();
        self.pool.run(tasks.len(), |task| {
            let mut sums = [[0_u32; LINE_WORDS]; 4];
            for lines in tasks[task].chunks_exact(sums.len()) {
                for (sum, line) in sums.iter_mut().zip(lines) {
                    for (sum, word) in sum.iter_mut().zip(line.0) {
                        *sum = sum.wrapping_add(word);
                    }
                }
            }
            black_box(sums);
        });
        self.lines.bytes() as f64 / start.elapsed().as_secs_f64() / 1e9
    }

    /// Operations, in 10^9 a second, of a loop that only multiplies and adds in registers; one of
    /// each counts as two.
    pub fn multiply_peak_gflop_s(&self, what: Multiply) -> f64 {
        let mut rounds = 1 << 14;
        loop {
            let start = Instant::now();
            // Several tasks a thread, so that one that loses its core does not hold the others up.
            let tasks = self.threads * 8;
            self.pool.run(tasks, |_| {
                black_box(multiply(what, rounds));
            });
            let elapsed = start.elapsed();
            if elapsed >= MULTIPLY_MIN {
                // The count is the same for each task.
                let each = multiply(what, 1) * rounds as u64;
                return (each * tasks as u64) as f64 / elapsed.as_secs_f64() / 1e9;
            }
            rounds *= 2;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_limits_are_those_of_some_real_machine() {
        let limits = Limits::new(2);
        let read = limits.read_bandwidth_gb_s();
        assert!((0.1..5_000.0).contains(&read), "{read} GB/s");
        for what in [Multiply::F32, Multiply::Bf16, Multiply::Int8] {
            let peak = limits.multiply_peak_gflop_s(what);
            assert!((0.1..200_000.0).contains(&peak), "{what:?}: {peak} GFLOP/s");
        }
    }
}
