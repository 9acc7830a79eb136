//! Kernels for processors: one source, compiled for every instruction set of [`isa`].

mod attention;
#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;
mod elementwise;
mod ffn;
pub(super) mod isa;
pub(super) mod limits;
mod matmul;
mod microkernel;
pub(super) mod portable;
mod prefetch;
mod rows;
mod scratch;
pub(super) mod tile;

use std::ops::Range;
use std::sync::Arc;

use entente_proto::frame::Dtype;
use entente_proto::ids::KernelClass;

use self::isa::{Isa, LANES};
use self::scratch::Scratch;
use super::matrix::Layout;
use super::memory::Line;
use super::pool::{Pool, Scatter};
use super::{
    AttentionRow, AttentionShape, DeviceError, ExpertKernels, FfnGroup, Kernels, KvLayer, Matrix,
    MatrixSource, UnsupportedCpu, WeightFormat,
};

/// Raised whenever a change gives other bits.
const VERSION: u32 = 3;
/// The same of fp8, which is younger.
const VERSION_FP8: u32 = 1;

/// Values below which waking a thread costs more than it brings, in kernels that do little with
/// each value.
const PARALLEL_MIN: usize = 1 << 15;

/// The same for rows on their way to experts and back. Nodes may share the cores, and a worker that
/// looks for more work once it has none keeps them from theirs.
const TRAVEL_PARALLEL_MIN: usize = 1 << 18;

/// Values of one task of [`Kernels::add`].
const ADD_CHUNK_LEN: usize = PARALLEL_MIN / 2;
/// Rows of one task where a row is little work.
const TASK_ROWS: usize = 4;
/// Values that are rounded as one task.
const ENCODE_LEN: usize = 1 << 13;

/// Kernels of one instruction set and weight format.
pub(super) struct Cpu<I> {
    isa: I,
    format: WeightFormat,
    class: KernelClass,
    pool: Pool,
    /// Packed activations.
    words: Scratch<u32>,
    /// Panels of 4 bits, expanded to 8.
    lines: Scratch<Line>,
    /// Products that go no further as they are.
    products: Scratch<f32>,
    /// Attention's queries and states.
    vectors: Scratch<[f32; LANES]>,
}

/// Cuts light tasks into shares that become smaller towards the end: neighbours stay together, and
/// yet all threads are done at nearly the same time (guided self-scheduling, Polychronopoulos and
/// Kuck 1987, its shares halved, so that a thread which is held up holds up less).
fn shares(tasks: usize, threads: usize) -> Vec<Range<usize>> {
    let (mut shares, mut start) = (Vec::new(), 0);
    while start < tasks {
        let end = start + (tasks - start).div_ceil(2 * threads);
        shares.push(start..end);
        start = end;
    }
    shares
}

/// The parts of several wholes that have so many each, one whole after the other: pairs of a whole
/// and a part of it.
fn parts_of(counts: impl Iterator<Item = usize>) -> Vec<(usize, usize)> {
    let parts = |(whole, count)| (0..count).map(move |part| (whole, part));
    counts.enumerate().flat_map(parts).collect()
}

impl<I: Isa> Cpu<I> {
    fn new(isa: I, format: WeightFormat, threads: usize) -> Self {
        let class = class::<I>(format);
        let (words, lines) = (Scratch::new(), Scratch::new());
        let (products, vectors) = (Scratch::new(), Scratch::new());
        Self { isa, format, class, pool: Pool::new(threads), words, lines, products, vectors }
    }

    /// A parallel loop, on this thread alone unless `parallel`.
    fn run(&self, parallel: bool, tasks: usize, task: impl Fn(usize) + Sync) {
        if parallel { self.pool.run(tasks, task) } else { (0..tasks).for_each(task) }
    }

    /// A parallel loop over `tasks`, see [`parts_of`], of which neighbours read neighbouring memory.
    /// Those that are `light`, which wait for memory more than they compute, are taken several
    /// neighbours at a time, so that what a thread has asked for ahead is what it needs next.
    /// `task` gets neighbouring parts, and the number of the task that its thread takes next.
    fn run_neighbours(
        &self,
        parallel: bool,
        light: bool,
        tasks: &[(usize, usize)],
        task: impl Fn(usize, Range<usize>, usize) + Sync,
    ) {
        if !light {
            return self.run(parallel, tasks.len(), |i| {
                let (whole, part) = tasks[i];
                task(whole, part..part + 1, self.next_task(i));
            });
        }
        let shares = shares(tasks.len(), self.pool.threads());
        self.run(parallel, shares.len(), |i| {
            let share = &tasks[shares[i].clone()];
            for parts in share.chunk_by(|one, next| one.0 == next.0) {
                let (whole, part) = parts[0];
                task(whole, part..part + parts.len(), shares[i].end);
            }
        });
    }

    /// The task that a thread takes after task `i` of a loop over single tasks, if all threads go on
    /// as evenly as now: good enough for asking for its weights early.
    fn next_task(&self, i: usize) -> usize {
        i + self.pool.threads()
    }

    /// A parallel loop over chunks, on this thread alone unless `parallel`.
    fn for_chunks(
        &self,
        parallel: bool,
        data: &mut [f32],
        chunk_len: usize,
        task: impl Fn(usize, &mut [f32]) + Sync,
    ) {
        if parallel {
            self.pool.for_chunks(data, chunk_len, task);
        } else {
            data.chunks_mut(chunk_len).enumerate().for_each(|(i, chunk)| task(i, chunk));
        }
    }

    /// A parallel loop over rows, on this thread alone unless `parallel`. A few rows are one task: a
    /// row alone is done in little more time than it takes to get the next.
    fn for_rows(
        &self,
        parallel: bool,
        data: &mut [f32],
        row_len: usize,
        task: impl Fn(usize, &mut [f32]) + Sync,
    ) {
        self.for_chunks(parallel, data, TASK_ROWS * row_len, |i, rows| {
            let rows = rows.chunks_mut(row_len).enumerate();
            rows.for_each(|(r, row)| task(i * TASK_ROWS + r, row));
        });
    }
}

impl<I: Isa> ExpertKernels for Cpu<I> {
    fn class(&self) -> &KernelClass {
        &self.class
    }

    fn format(&self) -> WeightFormat {
        self.format
    }

    fn row_dtype(&self) -> Dtype {
        match self.format {
            WeightFormat::F32 => Dtype::F32,
            // Bytes are made of what arrives, once for each row; f32 would bring them little.
            WeightFormat::Bf16 | WeightFormat::Fp8 | WeightFormat::Q8 | WeightFormat::Q4 => {
                Dtype::Bf16
            }
        }
    }

    fn pack(&self, source: MatrixSource<'_>) -> Result<Matrix, DeviceError> {
        let layout = Layout::of(self.format, source.dtype);
        Ok(Matrix::pack(self.isa, source, layout, &self.pool))
    }

    fn place(&self, matrix: Matrix) -> Result<Matrix, DeviceError> {
        Ok(matrix)
    }

    fn gated_ffn_encoded(
        &self,
        x: &[&[u8]],
        groups: &[FfnGroup<'_>],
        y: &mut [u8],
    ) -> Result<(), DeviceError> {
        let dtype = self.row_dtype();
        let y = ffn::Output::Encoded(dtype, Scatter::new(y));
        ffn::gated_ffn(self, ffn::Input::Encoded(dtype, x), groups, &y);
        Ok(())
    }
}

impl<I: Isa> Kernels for Cpu<I> {
    fn pack_f32(&self, source: MatrixSource<'_>) -> Matrix {
        let layout = Layout::of(WeightFormat::F32, source.dtype);
        Matrix::pack(self.isa, source, layout, &self.pool)
    }

    fn matmul(&self, x: &[f32], w: &Matrix, y: &mut [f32]) {
        matmul::matmul(self, x, &mut [(w, y)]);
    }

    fn matmul_many(&self, x: &[f32], products: &mut [(&Matrix, &mut [f32])]) {
        matmul::matmul(self, x, products);
    }

    fn for_each(&self, tasks: usize, task: &(dyn Fn(usize) + Sync)) {
        self.pool.run(tasks, task);
    }

    fn gated_ffn(&self, x: &[f32], groups: &[FfnGroup<'_>], y: &mut [f32]) {
        let y = ffn::Output::Values(Scatter::new(y));
        ffn::gated_ffn(self, ffn::Input::Values(x), groups, &y);
    }

    fn encode_rows(&self, x: &[f32], y: &mut [u8]) {
        let dtype = self.row_dtype();
        assert_eq!(y.len(), x.len() * dtype.size(), "{} values", x.len());
        let out = Scatter::new(y);
        self.run(x.len() >= TRAVEL_PARALLEL_MIN, x.len().div_ceil(ENCODE_LEN), |i| {
            let values = &x[i * ENCODE_LEN..x.len().min((i + 1) * ENCODE_LEN)];
            let (at, len) = (i * ENCODE_LEN * dtype.size(), values.len() * dtype.size());
            // SAFETY: no two tasks have a value in common.
            rows::encode(self.isa, dtype, values, unsafe { out.slice(at, len) });
        });
    }

    fn add_weighted(&self, parts: &[(f32, &[u8])], y: &mut [f32]) {
        let Some((_, first)) = parts.first() else { return };
        let dtype = self.row_dtype();
        let len = first.len() / dtype.size();
        let rows = y.len() / len;
        assert_eq!((y.len(), parts.len() % rows), (rows * len, 0), "parts of {rows} rows");
        let parts_of_row = parts.len() / rows;
        self.for_rows(parts.len() * len >= TRAVEL_PARALLEL_MIN, y, len, |r, y| {
            let parts = &parts[r * parts_of_row..][..parts_of_row];
            rows::add_weighted(self.isa, dtype, parts, y);
        });
    }

    fn add(&self, x: &mut [f32], delta: &[f32]) {
        assert_eq!(x.len(), delta.len(), "a value for each value");
        self.for_chunks(x.len() >= PARALLEL_MIN, x, ADD_CHUNK_LEN, |i, x| {
            elementwise::add(self.isa, x, &delta[i * ADD_CHUNK_LEN..][..x.len()]);
        });
    }

    fn rms_norm(&self, x: &[f32], weight: &[f32], eps: f32, y: &mut [f32]) {
        let len = weight.len();
        assert_eq!((x.len() % len, y.len()), (0, x.len()), "rows of {len} values");
        self.for_rows(x.len() >= PARALLEL_MIN, y, len, |r, y| {
            elementwise::rms_norm_row(self.isa, &x[r * len..][..len], weight, eps, y);
        });
    }

    fn rope(&self, x: &mut [f32], heads: usize, head_dim: usize, cos: &[f32], sin: &[f32]) {
        let (row_len, half) = (heads * head_dim, head_dim / 2);
        let rows = x.len() / row_len;
        assert_eq!((x.len() % row_len, head_dim % 2), (0, 0), "rows of heads of pairs");
        assert_eq!((cos.len(), sin.len()), (rows * half, rows * half), "angles of {rows} rows");
        self.for_rows(x.len() >= PARALLEL_MIN, x, row_len, |r, row| {
            let (cos, sin) = (&cos[r * half..][..half], &sin[r * half..][..half]);
            elementwise::rope_row(self.isa, row, head_dim, cos, sin);
        });
    }

    fn write_kv(&self, cache: &mut KvLayer, slots: &[usize], k: &[f32], v: &[f32]) {
        if slots.is_empty() {
            return;
        }
        let len = k.len() / slots.len();
        assert_eq!((k.len(), v.len()), (slots.len() * len, k.len()), "keys and values");
        let cache = cache.writer();
        self.run(k.len() >= PARALLEL_MIN, cache.heads(), |head| {
            self.isa.enter(
                #[inline(always)]
                // SAFETY: each head is given to one task.
                || unsafe { cache.write(head, slots, k, v) },
            );
        });
    }

    fn attention(
        &self,
        shape: &AttentionShape,
        q: &[f32],
        rows: &[AttentionRow<'_>],
        cache: &KvLayer,
        out: &mut [f32],
    ) {
        attention::attention(self, shape, q, rows, cache, out);
    }
}

fn class<I: Isa>(format: WeightFormat) -> KernelClass {
    KernelClass(match format {
        WeightFormat::F32 => format!("f32/{}/{VERSION}", I::NAME),
        WeightFormat::Bf16 => format!("bf16/{}/{VERSION}", I::NAME_BF16),
        WeightFormat::Fp8 => format!("fp8/{}/{VERSION_FP8}", I::NAME_BF16),
        WeightFormat::Q8 => format!("q8/{}/{VERSION}", I::NAME_INT8),
        WeightFormat::Q4 => format!("q4/{}/{VERSION}", I::NAME_INT8),
    })
}

/// Makes the kernels of a class.
type Make = fn(WeightFormat, usize) -> Arc<dyn Kernels>;

/// The classes of a format that this processor can run, best first; never empty.
fn classes(format: WeightFormat) -> Vec<(KernelClass, Make)> {
    let mut classes: Vec<(KernelClass, Make)> = Vec::new();
    #[cfg(target_arch = "x86_64")]
    {
        use self::avx2::Avx2;
        use self::avx512::Avx512;
        if Avx512::detect().is_some() {
            let make: Make = |f, threads| make(Avx512::detect().expect("seen above"), f, threads);
            classes.push((class::<Avx512>(format), make));
        }
        if Avx2::detect().is_some() {
            let make: Make = |f, threads| make(Avx2::detect().expect("seen above"), f, threads);
            classes.push((class::<Avx2>(format), make));
        }
    }
    let portable: Make = |f, threads| make(portable::Portable, f, threads);
    classes.push((class::<portable::Portable>(format), portable));
    classes
}

fn make<I: Isa>(isa: I, format: WeightFormat, threads: usize) -> Arc<dyn Kernels> {
    Arc::new(Cpu::new(isa, format, threads))
}

/// See [`super::select`].
pub(super) fn best(
    format: WeightFormat,
    threads: usize,
) -> Result<Arc<dyn Kernels>, UnsupportedCpu> {
    // Portable kernels run anywhere, so there is a first one.
    Ok(classes(format)[0].1(format, threads))
}

/// See [`super::select_class`].
pub(super) fn of_class(
    wanted: &KernelClass,
    threads: usize,
) -> Result<Arc<dyn Kernels>, UnsupportedCpu> {
    let mut available = Vec::new();
    for format in WeightFormat::ALL {
        for (class, make) in classes(format) {
            if class == *wanted {
                return Ok(make(format, threads));
            }
            available.push(class.0);
        }
    }
    Err(UnsupportedCpu { class: wanted.clone(), available: available.join(", ") })
}

/// All classes of a format that this processor can run, best first.
#[cfg(test)]
pub(super) fn every_class(format: WeightFormat) -> Vec<KernelClass> {
    classes(format).into_iter().map(|(class, _)| class).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shares_are_neighbours_and_end_small() {
        for (tasks, threads) in [(0, 2), (1, 2), (3, 1), (112, 2), (1_000, 16)] {
            let shares = shares(tasks, threads);
            assert_eq!(
                shares.iter().cloned().flatten().collect::<Vec<_>>(),
                Vec::from_iter(0..tasks)
            );
            assert!(shares.iter().map(Range::len).is_sorted_by(|a, b| a >= b), "{shares:?}");
            assert!(shares.iter().rev().take(threads).all(|share| share.len() == 1), "{shares:?}");
        }
        assert!(shares(112, 2).len() < 20);
    }
}
