//! What a machine has of CUDA, found without opening a device.

use super::device::{self, DeviceReport};
use super::{cublas, driver, nccl, nvrtc};
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
        nccl: nccl::version(),
        cublas: cublas::version(),
        devices: (0..count).map(device::report).collect(),
    }
}
