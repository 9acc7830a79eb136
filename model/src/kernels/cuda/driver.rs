//! The CUDA driver as a library that may be missing, and its errors as ours.
//!
//! The bindings load the library when its first function is called, and panic if it or the function
//! is not there. So [`load`] looks for both before anything else is called. Nothing is called that
//! CUDA 12.0 does not have.

use std::sync::OnceLock;

use cudarc::driver::sys::{self, CUresult};

use crate::kernels::DeviceError;

/// Every function of the driver that this program calls.
const SYMBOLS: &[&str] = &[
    "cuCtxSetCurrent",
    "cuCtxSynchronize",
    "cuDeviceGet",
    "cuDeviceGetAttribute",
    "cuDeviceGetCount",
    "cuDeviceGetName",
    "cuDeviceGetUuid_v2",
    "cuDevicePrimaryCtxRelease_v2",
    "cuDevicePrimaryCtxRetain",
    "cuDeviceTotalMem_v2",
    "cuDriverGetVersion",
    "cuEventCreate",
    "cuEventDestroy_v2",
    "cuEventElapsedTime",
    "cuEventQuery",
    "cuEventRecord",
    "cuEventSynchronize",
    "cuFuncSetAttribute",
    "cuGraphDestroy",
    "cuGraphExecDestroy",
    "cuGraphInstantiateWithFlags",
    "cuGraphLaunch",
    "cuInit",
    "cuLaunchKernel",
    "cuMemAlloc_v2",
    "cuMemFreeHost",
    "cuMemFree_v2",
    "cuMemGetInfo_v2",
    "cuMemHostAlloc",
    "cuMemcpyDtoDAsync_v2",
    "cuMemcpyDtoHAsync_v2",
    "cuMemcpyHtoDAsync_v2",
    "cuMemsetD8Async",
    "cuModuleGetFunction",
    "cuModuleLoadData",
    "cuModuleUnload",
    "cuStreamBeginCapture_v2",
    "cuStreamCreate",
    "cuStreamDestroy_v2",
    "cuStreamEndCapture",
    "cuStreamSynchronize",
    "cuStreamWaitEvent",
];

/// Loads and initialises the driver, once in the life of the process.
///
/// # Errors
/// There is no driver, it is older than CUDA 12.0, or it finds no device. Always the same answer.
pub(super) fn load() -> Result<(), DeviceError> {
    static LOADED: OnceLock<Result<(), DeviceError>> = OnceLock::new();
    LOADED.get_or_init(find).clone()
}

fn find() -> Result<(), DeviceError> {
    let unavailable = |text: String| Err(DeviceError::Unavailable(text));
    // SAFETY: loading runs the library's own initialisation; a driver that cannot be loaded into a
    // process is not one.
    if !unsafe { sys::is_culib_present() } {
        return unavailable("no CUDA driver is installed (libcuda.so.1 is not found)".to_owned());
    }
    // SAFETY: the same library, which was found above.
    let library = unsafe { sys::culib() };
    for symbol in SYMBOLS {
        // SAFETY: the address is only looked for; the bindings know its type.
        if unsafe { library.get::<*const ()>(symbol.as_bytes()) }.is_err() {
            let text = format!("the CUDA driver is older than CUDA 12.0: it has no {symbol}");
            return unavailable(text);
        }
    }
    // SAFETY: the first call, with the only flags there are.
    check("cuInit", unsafe { sys::cuInit(0) })
}

/// The version of CUDA that the driver speaks, `(major, minor)`.
pub(super) fn version() -> Result<(u32, u32), DeviceError> {
    load()?;
    let mut version = 0;
    // SAFETY: the pointer is to a local integer.
    check("cuDriverGetVersion", unsafe { sys::cuDriverGetVersion(&raw mut version) })?;
    Ok(major_minor(version, 1_000, 10))
}

/// `major * m + minor * n + …` taken apart, as CUDA and NCCL write versions.
pub(super) fn major_minor(version: i32, m: u32, n: u32) -> (u32, u32) {
    let version = version.unsigned_abs();
    (version / m, version % m / n)
}

/// What a code means for whoever called `function`. Codes of which nothing is said here are taken
/// as a lost device: what does not behave as written is not trusted with another row.
pub(super) fn check(function: &str, code: CUresult) -> Result<(), DeviceError> {
    use CUresult as R;

    let unavailable = |text: &str| Err(DeviceError::Unavailable(text.to_owned()));
    match code {
        R::CUDA_SUCCESS => Ok(()),
        R::CUDA_ERROR_NO_DEVICE => unavailable("the CUDA driver finds no device"),
        R::CUDA_ERROR_INVALID_DEVICE => unavailable("the CUDA driver has no device of that number"),
        R::CUDA_ERROR_STUB_LIBRARY => {
            unavailable("the CUDA driver that is found is a stub for building programs")
        }
        R::CUDA_ERROR_DEVICE_UNAVAILABLE | R::CUDA_ERROR_DEVICE_NOT_LICENSED => {
            unavailable("the device is in exclusive use or not licensed")
        }
        R::CUDA_ERROR_SYSTEM_DRIVER_MISMATCH | R::CUDA_ERROR_COMPAT_NOT_SUPPORTED_ON_DEVICE => {
            unavailable("libcuda and the driver in the kernel are of different versions")
        }
        R::CUDA_ERROR_SYSTEM_NOT_READY | R::CUDA_ERROR_MPS_SERVER_NOT_READY => {
            unavailable("the machine's CUDA services have not started yet")
        }
        R::CUDA_ERROR_OPERATING_SYSTEM | R::CUDA_ERROR_NOT_PERMITTED if function == "cuInit" => {
            unavailable("the CUDA driver may not open its device files")
        }
        R::CUDA_ERROR_UNKNOWN if function == "cuInit" => {
            unavailable("the CUDA driver cannot be initialised")
        }
        // What cannot be captured, or not by this driver: it is not done, and nothing else suffers.
        R::CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED
        | R::CUDA_ERROR_STREAM_CAPTURE_INVALIDATED
        | R::CUDA_ERROR_STREAM_CAPTURE_ISOLATION
        | R::CUDA_ERROR_STREAM_CAPTURE_IMPLICIT
        | R::CUDA_ERROR_CAPTURED_EVENT
        | R::CUDA_ERROR_NOT_SUPPORTED => {
            Err(DeviceError::Unsupported(format!("{function} says {code:?}")))
        }
        // Whoever asks for memory knows how much; this is for calls that need some by the way.
        R::CUDA_ERROR_OUT_OF_MEMORY => {
            Err(DeviceError::OutOfMemory { wanted_bytes: 0, free_bytes: 0 })
        }
        code => Err(DeviceError::Lost(format!("{function} says {code:?}"))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_are_taken_apart_as_cuda_and_nccl_write_them() {
        assert_eq!(major_minor(12_040, 1_000, 10), (12, 4));
        assert_eq!(major_minor(13_000, 1_000, 10), (13, 0));
        assert_eq!(major_minor(22_704, 10_000, 100), (2, 27));
    }

    #[test]
    fn a_code_without_a_meaning_of_its_own_loses_the_device() {
        for code in [CUresult::CUDA_ERROR_ILLEGAL_ADDRESS, CUresult::CUDA_ERROR_INVALID_VALUE] {
            let error = check("cuStreamSynchronize", code).unwrap_err();
            assert!(
                matches!(&error, DeviceError::Lost(text) if text.contains("cuStream")),
                "{error}"
            );
        }
        let error = check("cuInit", CUresult::CUDA_ERROR_NO_DEVICE).unwrap_err();
        assert!(matches!(error, DeviceError::Unavailable(_)), "{error}");
    }
}
