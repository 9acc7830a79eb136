//! NVIDIA's matrix product as a library that may be missing: what ours are measured against.
//!
//! Nothing that serves calls it. It chooses a kernel by the number of rows, so that a row's bits
//! depend on its company.

use std::ptr::null_mut;
use std::sync::{Arc, OnceLock};

use cudarc::cublas::sys::{
    self, cublasComputeType_t, cublasGemmAlgo_t, cublasHandle_t, cublasOperation_t, cublasStatus_t,
    cudaDataType_t, libraryPropertyType_t,
};
use cudarc::driver::sys::CUresult;

use super::buffer::{View, ViewMut};
use super::stream::Stream;
use super::survey::Version;
use crate::kernels::DeviceError;

/// Every function of cuBLAS that this program calls.
const SYMBOLS: &[&str] = &[
    "cublasCreate_v2",
    "cublasDestroy_v2",
    "cublasGemmEx",
    "cublasGetProperty",
    "cublasSetStream_v2",
];

/// Loads the library, once in the life of the process, and gives its version.
///
/// # Errors
/// It is not there, or is too old. Always the same answer.
pub(super) fn version() -> Result<Version, DeviceError> {
    static VERSION: OnceLock<Result<Version, DeviceError>> = OnceLock::new();
    VERSION.get_or_init(find).clone()
}

fn find() -> Result<Version, DeviceError> {
    let unavailable = |text: String| Err(DeviceError::Unavailable(text));
    // SAFETY: loading runs the library's own initialisation; cuBLAS has none that matters.
    if !unsafe { sys::is_culib_present() } {
        return unavailable("cuBLAS is not installed (libcublas.so is not found)".to_owned());
    }
    // SAFETY: the same library, which was found above.
    let library = unsafe { sys::culib() };
    for symbol in SYMBOLS {
        // SAFETY: the address is only looked for; the bindings know its type.
        if unsafe { library.get::<*const ()>(symbol.as_bytes()) }.is_err() {
            return unavailable(format!("cuBLAS is too old: it has no {symbol}"));
        }
    }
    use libraryPropertyType_t::{MAJOR_VERSION, MINOR_VERSION};
    Ok((property(MAJOR_VERSION)?, property(MINOR_VERSION)?))
}

fn property(which: libraryPropertyType_t) -> Result<u32, DeviceError> {
    let mut value = 0;
    // SAFETY: the pointer is to a local integer.
    check("cublasGetProperty", unsafe { sys::cublasGetProperty(which, &raw mut value) })?;
    Ok(value.unsigned_abs())
}

/// A failure of this library is no verdict on the device: if it is one, the driver says so too.
fn check(function: &str, status: cublasStatus_t) -> Result<(), DeviceError> {
    match status {
        cublasStatus_t::CUBLAS_STATUS_SUCCESS => Ok(()),
        status => Err(DeviceError::Unavailable(format!("{function} says {status:?}"))),
    }
}

/// The library with work for one stream.
pub struct Cublas {
    stream: Arc<Stream>,
    handle: cublasHandle_t,
}

impl Cublas {
    /// Products that are put into `stream`.
    ///
    /// # Errors
    /// The library is not there, or the device has no room for its own memory or is lost.
    pub fn new(stream: &Arc<Stream>) -> Result<Self, DeviceError> {
        version()?;
        let mut cublas = Self { stream: Arc::clone(stream), handle: null_mut() };
        let mut handle = null_mut();
        // SAFETY: the pointer is to a local of its type. It is destroyed when this is dropped.
        cublas.call("cublasCreate", || unsafe { sys::cublasCreate_v2(&raw mut handle) })?;
        cublas.handle = handle;
        // SAFETY: the handle was just made; the stream lives as long as it, and is of the same type
        // under the name that the bindings of each library have for it.
        cublas.call("cublasSetStream", || unsafe {
            sys::cublasSetStream_v2(handle, stream.handle().cast())
        })?;
        Ok(cublas)
    }

    /// The version of the library, `(major, minor)`.
    ///
    /// # Errors
    /// The library is not there.
    pub fn version() -> Result<Version, DeviceError> {
        version()
    }

    /// Puts `y = x * w^T` into the stream, all in bf16, added up in f32: `w` is
    /// `[outputs, inputs]`, `x` is `[rows, inputs]`, `y` is `[rows, outputs]`.
    ///
    /// # Errors
    /// The library refuses, or the device is lost.
    ///
    /// # Panics
    /// Lengths contradict each other, or are more than the library counts.
    pub fn product(
        &self,
        w: View<'_, u16>,
        x: View<'_, u16>,
        y: ViewMut<'_, u16>,
        [rows, inputs, outputs]: [usize; 3],
    ) -> Result<(), DeviceError> {
        let lengths = [outputs * inputs, rows * inputs, rows * outputs];
        assert_eq!([w.len(), x.len(), y.len()], lengths, "matrices of these shapes");
        let int = |n: usize| i32::try_from(n).expect("a side of a matrix fits an int");
        let (m, n, k) = (int(outputs), int(rows), int(inputs));
        let (one, zero) = (1_f32, 0_f32);
        let bf16 = cudaDataType_t::CUDA_R_16BF;
        // The library's matrices are stored by columns: ours are their own transposes there, and
        // `y^T = w * x^T` is what it is asked for.
        self.call("cublasGemmEx", || {
            // SAFETY: the handle lives; the matrices lie on the device with these sides, which was
            // compared above; both factors are read before the call returns.
            unsafe {
                sys::cublasGemmEx(
                    self.handle,
                    cublasOperation_t::CUBLAS_OP_T,
                    cublasOperation_t::CUBLAS_OP_N,
                    m,
                    n,
                    k,
                    (&raw const one).cast(),
                    w.address() as *const _,
                    bf16,
                    k,
                    x.address() as *const _,
                    bf16,
                    k,
                    (&raw const zero).cast(),
                    y.address() as *mut _,
                    bf16,
                    m,
                    cublasComputeType_t::CUBLAS_COMPUTE_32F,
                    cublasGemmAlgo_t::CUBLAS_GEMM_DEFAULT,
                )
            }
        })
    }

    /// Calls the library with the context of the stream's device.
    fn call(
        &self,
        function: &str,
        call: impl FnOnce() -> cublasStatus_t,
    ) -> Result<(), DeviceError> {
        let mut status = cublasStatus_t::CUBLAS_STATUS_SUCCESS;
        self.stream.device().call(function, || {
            status = call();
            CUresult::CUDA_SUCCESS
        })?;
        check(function, status)
    }
}

impl Drop for Cublas {
    fn drop(&mut self) {
        if !self.handle.is_null() {
            // The library waits for the work that it has put into the stream.
            // SAFETY: made in `new`, and nobody has it any more.
            let _ = self.call("cublasDestroy", || unsafe { sys::cublasDestroy_v2(self.handle) });
        }
    }
}
