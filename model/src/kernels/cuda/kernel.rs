//! The kernels by name, and how one is started.

use std::ffi::{CStr, c_void};

use cudarc::driver::sys;

use super::buffer::{Value, View, ViewMut};
use super::geometry;
use super::stream::Stream;
use crate::kernels::DeviceError;

/// A function of the sources in this folder.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kernel {
    FfnGateUp16,
    FfnGateUp128,
    FfnDown16,
    FfnDown128,
    Matmul16,
    Matmul128,
    Fp8FfnGateUp16,
    Fp8FfnGateUp64,
    Fp8FfnDown16,
    Fp8FfnDown64,
    Fp8Matmul16,
    Fp8Matmul64,
    MatmulExactBf16,
    MatmulExactF32,
    RmsNorm,
    Rope,
    WriteKv,
    AttentionSplit,
    AttentionJoin,
    Add,
    RoundRows,
    Draw,
}

impl Kernel {
    /// All of them, in the order of their numbers.
    pub const ALL: [Self; 22] = [
        Self::FfnGateUp16,
        Self::FfnGateUp128,
        Self::FfnDown16,
        Self::FfnDown128,
        Self::Matmul16,
        Self::Matmul128,
        Self::Fp8FfnGateUp16,
        Self::Fp8FfnGateUp64,
        Self::Fp8FfnDown16,
        Self::Fp8FfnDown64,
        Self::Fp8Matmul16,
        Self::Fp8Matmul64,
        Self::MatmulExactBf16,
        Self::MatmulExactF32,
        Self::RmsNorm,
        Self::Rope,
        Self::WriteKv,
        Self::AttentionSplit,
        Self::AttentionJoin,
        Self::Add,
        Self::RoundRows,
        Self::Draw,
    ];

    /// Its name in the sources.
    pub fn name(self) -> &'static CStr {
        match self {
            Self::FfnGateUp16 => c"ffn_gate_up_16",
            Self::FfnGateUp128 => c"ffn_gate_up_128",
            Self::FfnDown16 => c"ffn_down_16",
            Self::FfnDown128 => c"ffn_down_128",
            Self::Matmul16 => c"matmul_16",
            Self::Matmul128 => c"matmul_128",
            Self::Fp8FfnGateUp16 => c"fp8_ffn_gate_up_16",
            Self::Fp8FfnGateUp64 => c"fp8_ffn_gate_up_64",
            Self::Fp8FfnDown16 => c"fp8_ffn_down_16",
            Self::Fp8FfnDown64 => c"fp8_ffn_down_64",
            Self::Fp8Matmul16 => c"fp8_matmul_16",
            Self::Fp8Matmul64 => c"fp8_matmul_64",
            Self::MatmulExactBf16 => c"matmul_exact_bf16",
            Self::MatmulExactF32 => c"matmul_exact_f32",
            Self::RmsNorm => c"rms_norm",
            Self::Rope => c"rope",
            Self::WriteKv => c"write_kv",
            Self::AttentionSplit => c"attention_split",
            Self::AttentionJoin => c"attention_join",
            Self::Add => c"add",
            Self::RoundRows => c"round_rows",
            Self::Draw => c"draw",
        }
    }

    /// Threads of a block.
    fn threads(self) -> usize {
        match self {
            Self::FfnGateUp16 | Self::FfnDown16 | Self::Matmul16 => geometry::DECODE_THREADS,
            Self::FfnGateUp128 | Self::FfnDown128 | Self::Matmul128 => geometry::PREFILL_THREADS,
            Self::Fp8FfnGateUp16 | Self::Fp8FfnDown16 | Self::Fp8Matmul16 => {
                geometry::DECODE_THREADS
            }
            Self::Fp8FfnGateUp64 | Self::Fp8FfnDown64 | Self::Fp8Matmul64 => {
                geometry::PREFILL_THREADS
            }
            Self::MatmulExactBf16 | Self::MatmulExactF32 => geometry::EXACT_THREADS,
            Self::RmsNorm => geometry::NORM_THREADS,
            Self::Rope | Self::WriteKv | Self::Add | Self::RoundRows => geometry::FLAT_THREADS,
            Self::AttentionSplit => geometry::ATTENTION_THREADS,
            Self::AttentionJoin => geometry::JOIN_THREADS,
            Self::Draw => geometry::DRAW_THREADS,
        }
    }

    /// Dynamic shared memory of a block.
    pub fn shared_bytes(self) -> usize {
        match self {
            Self::FfnGateUp16 | Self::FfnDown16 | Self::Matmul16 => geometry::DECODE_SHARED_BYTES,
            Self::FfnGateUp128 | Self::FfnDown128 | Self::Matmul128 => {
                geometry::PREFILL_SHARED_BYTES
            }
            Self::Fp8FfnGateUp16 | Self::Fp8FfnDown16 | Self::Fp8Matmul16 => {
                geometry::FP8_DECODE_SHARED_BYTES
            }
            Self::Fp8FfnGateUp64 | Self::Fp8FfnDown64 | Self::Fp8Matmul64 => {
                geometry::FP8_PREFILL_SHARED_BYTES
            }
            _ => 0,
        }
    }

    /// Blocks that it takes for so many outputs of a matrix, for a kernel that multiplies with one.
    pub fn blocks(self, outputs: usize) -> usize {
        let panels = match self {
            // Gate and up of the same outputs.
            Self::FfnGateUp16 | Self::Fp8FfnGateUp16 => geometry::DECODE_PANELS / 2,
            Self::FfnGateUp128 | Self::Fp8FfnGateUp64 => geometry::PREFILL_PANELS / 2,
            Self::FfnDown16 | Self::Matmul16 | Self::Fp8FfnDown16 | Self::Fp8Matmul16 => {
                geometry::DECODE_PANELS
            }
            Self::FfnDown128 | Self::Matmul128 | Self::Fp8FfnDown64 | Self::Fp8Matmul64 => {
                geometry::PREFILL_PANELS
            }
            _ => 1,
        };
        outputs.div_ceil(panels * geometry::PANEL)
    }
}

/// Most arguments that a kernel takes.
const ARGUMENTS_MAX: usize = 16;

/// A kernel with its arguments in the order of its source, not yet started.
///
/// An argument is kept in eight bytes, of which the driver reads as many as the kernel's parameter
/// has: the first, on the little-endian machines that this program runs on.
pub(super) struct Launch {
    kernel: Kernel,
    values: [u64; ARGUMENTS_MAX],
    len: usize,
}

impl Launch {
    pub fn new(kernel: Kernel) -> Self {
        Self { kernel, values: [0; ARGUMENTS_MAX], len: 0 }
    }

    fn argument(mut self, value: u64) -> Self {
        self.values[self.len] = value;
        self.len += 1;
        self
    }

    /// Device memory that the kernel reads.
    pub fn input<T: Value>(self, view: View<'_, T>) -> Self {
        self.argument(view.address())
    }

    /// Device memory that the kernel writes.
    pub fn output<T: Value>(self, view: &ViewMut<'_, T>) -> Self {
        self.argument(view.address())
    }

    /// The same, or a null pointer.
    pub fn output_if<T: Value>(self, view: Option<&ViewMut<'_, T>>) -> Self {
        self.argument(view.map_or(0, ViewMut::address))
    }

    /// A null pointer.
    pub fn null(self) -> Self {
        self.argument(0)
    }

    /// An address within device memory, of a matrix.
    pub fn address(self, address: u64) -> Self {
        self.argument(address)
    }

    /// A count or a length.
    ///
    /// # Panics
    /// It is none that an `int` holds: such a step has been refused long before.
    pub fn int(self, value: usize) -> Self {
        let value = i32::try_from(value).expect("counts of a step fit an int");
        self.argument(u64::from(value.unsigned_abs()))
    }

    pub fn float(self, value: f32) -> Self {
        self.argument(u64::from(value.to_bits()))
    }

    /// Starts it on `stream` with `grid` blocks; no block at all is no launch.
    ///
    /// # Safety
    /// The arguments are those of the kernel's source, and what lies at its pointers is as long as
    /// it takes for its counts and this grid.
    pub unsafe fn start(mut self, stream: &Stream, grid: [usize; 3]) -> Result<(), DeviceError> {
        if grid.contains(&0) {
            return Ok(());
        }
        let grid = grid.map(|n| u32::try_from(n).expect("a grid that fits the device"));
        let block = self.kernel.threads() as u32;
        let shared_bytes = self.kernel.shared_bytes() as u32;
        let function = stream.device().function(self.kernel);
        let mut pointers = [std::ptr::null_mut::<c_void>(); ARGUMENTS_MAX];
        for (pointer, value) in pointers.iter_mut().zip(&mut self.values) {
            *pointer = (&raw mut *value).cast();
        }
        let name = self.kernel.name().to_str().unwrap_or_default();
        stream.device().call(name, || {
            // SAFETY: the function belongs to the device; there are at least as many pointers as
            // parameters, and the driver has read what they point to when it returns; the rest is
            // the caller's promise.
            unsafe {
                sys::cuLaunchKernel(
                    function,
                    grid[0],
                    grid[1],
                    grid[2],
                    block,
                    1,
                    1,
                    shared_bytes,
                    stream.handle(),
                    pointers.as_mut_ptr(),
                    std::ptr::null_mut(),
                )
            }
        })
    }
}
