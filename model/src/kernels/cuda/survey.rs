//! What a machine has of CUDA, found without opening a device.

use super::device::{self, DeviceReport};
use super::{cublas, driver, nvrtc};
use crate::kernels::DeviceError;

/// A version, `(major, minor)`.
pub type Version = (u32, u32);

/// What was found, or for each part why not.
#[derive(Debug, Clone)]
pub struct Survey {
    /// The version of CUDA that the driver speaks.
    pub driver: Result<Version, DeviceError>,
    /// The compiler; needed unless compiled kernels are in the cache.
    pub nvrtc: Result<Version, DeviceError>,
    /// The library for exchanges between devices of a site.
    pub nccl: Result<Version, DeviceError>,
    /// What `entente bench kernels` measures the kernels against.
    pub cublas: Result<Version, DeviceError>,
    /// Every device that the driver shows, or why that one tells nothing.
    pub devices: Vec<Result<DeviceReport, DeviceError>>,
}

/// Looks for drivers, libraries and devices.
pub fn survey() -> Survey {
    let count = device::count().unwrap_or(0);
    Survey {
        driver: driver::version(),
        nvrtc: nvrtc::version(),
        nccl: nccl_version(),
        cublas: cublas::version(),
        devices: (0..count).map(device::report).collect(),
    }
}

/// Names under which NCCL is installed, with its own packages and with those for building.
const NCCL: [&str; 2] = ["libnccl.so.2", "libnccl.so"];

fn nccl_version() -> Result<Version, DeviceError> {
    /// `ncclResult_t ncclGetVersion(int*)`; zero is success.
    type GetVersion = unsafe extern "C" fn(*mut i32) -> u32;

    // SAFETY: loading runs the library's own initialisation; NCCL reads its settings there.
    let library = NCCL.iter().find_map(|name| unsafe { libloading::Library::new(*name) }.ok());
    let Some(library) = library else {
        let text = "NCCL is not installed (libnccl.so.2 is not found)";
        return Err(DeviceError::Unavailable(text.to_owned()));
    };
    let mut version = 0;
    // SAFETY: the function has this type in every version, and writes one integer.
    let code =
        unsafe { library.get::<GetVersion>(b"ncclGetVersion").map(|get| get(&raw mut version)) };
    match code {
        // The form of versions since 2.9; older ones are years out of use.
        Ok(0) => Ok(driver::major_minor(version, 10_000, 100)),
        _ => Err(DeviceError::Unavailable("NCCL does not tell its version".to_owned())),
    }
}
