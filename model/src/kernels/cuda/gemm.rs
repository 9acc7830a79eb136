//! Which kernels multiply with which form of weights on tensor cores, and how many rows a tile of
//! theirs has.
//!
//! Each form has two kernels for each product, one for few rows and one for many. Both give the same
//! bits, so which of them computes a row is decided by what is faster, here.

use super::device::Device;
use super::geometry;
use super::kernel::Kernel;
use crate::kernels::matrix::Layout;

/// The kernels for tiles of one size.
#[derive(Debug, Clone, Copy)]
pub(super) struct Gemm {
    /// The most rows of a tile.
    pub rows: usize,
    pub gate_up: Kernel,
    pub down: Kernel,
    pub matmul: Kernel,
}

/// The kernels for one form of weights.
#[derive(Debug, Clone, Copy)]
pub(super) struct Gemms {
    pub layout: Layout,
    pub few: Gemm,
    /// Where blocks of a device have too little memory for these, those for few rows.
    pub many: Gemm,
}

impl Gemms {
    /// Those for weights in `layout` on a device; absent if there are none.
    pub fn of(device: &Device, layout: Layout) -> Option<Self> {
        let (few, many) = match layout {
            Layout::Bf16 => (BF16_FEW, BF16_MANY),
            Layout::Fp8 => (FP8_FEW, FP8_MANY),
            Layout::F32 | Layout::Bf16Widened | Layout::Q8 | Layout::Q4 => return None,
        };
        // All of one size want as much memory.
        let many = if device.fits(many.matmul) { many } else { few };
        Some(Self { layout, few, many })
    }

    /// The kernels for so many rows that go through the same weights.
    pub fn for_rows(&self, rows: usize) -> &Gemm {
        if self.are_few(rows) { &self.few } else { &self.many }
    }

    /// Whether a tile for few rows holds them.
    pub fn are_few(&self, rows: usize) -> bool {
        rows <= self.few.rows
    }
}

const BF16_FEW: Gemm = Gemm {
    rows: geometry::DECODE_ROWS,
    gate_up: Kernel::FfnGateUp16,
    down: Kernel::FfnDown16,
    matmul: Kernel::Matmul16,
};

const BF16_MANY: Gemm = Gemm {
    rows: geometry::PREFILL_ROWS,
    gate_up: Kernel::FfnGateUp128,
    down: Kernel::FfnDown128,
    matmul: Kernel::Matmul128,
};

const FP8_FEW: Gemm = Gemm {
    rows: geometry::DECODE_ROWS,
    gate_up: Kernel::Fp8FfnGateUp16,
    down: Kernel::Fp8FfnDown16,
    matmul: Kernel::Fp8Matmul16,
};

const FP8_MANY: Gemm = Gemm {
    rows: geometry::FP8_PREFILL_ROWS,
    gate_up: Kernel::Fp8FfnGateUp64,
    down: Kernel::Fp8FfnDown64,
    matmul: Kernel::Fp8Matmul64,
};
