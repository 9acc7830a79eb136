//! Kernels of nodes whose experts give back what they get: what is left is the way there and back.

use std::sync::Arc;

use entente_model::kernels::{
    DeviceError, ExpertKernels, FfnGroup, Kernels, Matrix, MatrixSource, WeightFormat,
};
use entente_proto::frame::Dtype;
use entente_proto::ids::KernelClass;

use super::cluster::HIDDEN;

/// Kernels whose experts give back what they get.
pub struct Copying(pub Arc<dyn Kernels>);

impl ExpertKernels for Copying {
    fn class(&self) -> &KernelClass {
        self.0.class()
    }

    fn format(&self) -> WeightFormat {
        self.0.format()
    }

    fn row_dtype(&self) -> Dtype {
        self.0.row_dtype()
    }

    fn pack(&self, source: MatrixSource<'_>) -> Result<Matrix, DeviceError> {
        self.0.pack(source)
    }

    fn place(&self, matrix: Matrix) -> Result<Matrix, DeviceError> {
        self.0.place(matrix)
    }

    fn gated_ffn_encoded(
        &self,
        x: &[&[u8]],
        groups: &[FfnGroup<'_>],
        y: &mut [u8],
    ) -> Result<(), DeviceError> {
        let len = HIDDEN * self.row_dtype().size();
        for (from, to) in groups.iter().flat_map(|group| group.rows) {
            y[*to as usize * len..][..len].copy_from_slice(x[*from as usize]);
        }
        Ok(())
    }
}
