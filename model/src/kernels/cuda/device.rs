//! A CUDA device: what it is, the context of this process on it, and the kernels loaded there.
//!
//! Invariant: whatever fails in a way that leaves the context unusable (an address that is none, a
//! launch that failed, memory that cannot be corrected) marks the [`Device`] as lost, and from then
//! on every call says so with the first reason. CUDA keeps such errors too, but reports them under
//! the name of whichever call comes next.

use std::ffi::CStr;
use std::ptr::null_mut;
use std::sync::atomic::AtomicUsize;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};

use cudarc::driver::sys::{self, CUdevice_attribute, CUfunction_attribute, CUresult};

use super::compile;
use super::driver;
use super::graph;
use super::kernel::Kernel;
use crate::kernels::{DeviceError, DeviceFacts};

/// The first architecture with tensor cores for bf16 and with asynchronous copies.
const ARCHITECTURE_MIN: Architecture = Architecture { major: 8, minor: 0 };

/// Memory that is not offered for weights: rows, intermediate values, staging and what the driver
/// takes for launches. On small devices it is a share of what is free.
const RESERVE_BYTES: u64 = 768 << 20;
const RESERVE_SHARE: u64 = 8;

/// How much dynamic shared memory blocks of a function may have.
const SHARED_BYTES: CUfunction_attribute =
    CUfunction_attribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
/// How many per cent of an SM's memory are shared memory while it runs.
const CARVEOUT: CUfunction_attribute =
    CUfunction_attribute::CU_FUNC_ATTRIBUTE_PREFERRED_SHARED_MEMORY_CARVEOUT;

/// Dynamic shared memory that a block may have without asking.
const SHARED_BYTES_USUAL: usize = 48 << 10;

const SHARED_BYTES_MAX: CUdevice_attribute =
    CUdevice_attribute::CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN;

/// A generation of devices: their compute capability.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Architecture {
    /// Before the dot.
    pub major: u32,
    /// After it.
    pub minor: u32,
}

impl std::fmt::Display for Architecture {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "sm_{}{}", self.major, self.minor)
    }
}

/// What the driver tells of a device that nobody has opened.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DeviceReport {
    /// Its number, as the driver counts.
    pub ordinal: u32,
    /// Its name, such as `NVIDIA H100 80GB HBM3`.
    pub name: String,
    /// Its UUID as the driver's tools write it.
    pub uuid: String,
    /// Its generation.
    pub architecture: Architecture,
    /// Bytes of memory that it has.
    pub memory_bytes: u64,
    /// Bytes a second between its memory and itself, by clock and bus width; 0 if it does not tell.
    pub bandwidth_bytes_s: u64,
}

/// Number of devices that the driver shows.
///
/// # Errors
/// There is no driver.
pub fn count() -> Result<u32, DeviceError> {
    driver::load()?;
    let mut count = 0;
    // SAFETY: the driver is loaded; the pointer is to a local integer.
    driver::check("cuDeviceGetCount", unsafe { sys::cuDeviceGetCount(&raw mut count) })?;
    Ok(count.unsigned_abs())
}

/// What device `ordinal` is.
///
/// # Errors
/// There is no driver or no such device.
pub fn report(ordinal: u32) -> Result<DeviceReport, DeviceError> {
    let handle = find(ordinal)?;
    let attribute = |which| attribute(handle, which);
    use CUdevice_attribute as A;
    let clock_khz = attribute(A::CU_DEVICE_ATTRIBUTE_MEMORY_CLOCK_RATE)?;
    let bus_bits = attribute(A::CU_DEVICE_ATTRIBUTE_GLOBAL_MEMORY_BUS_WIDTH)?;
    let mut memory_bytes = 0_usize;
    // SAFETY: the driver gave this handle; the pointer is to a local integer.
    let code = unsafe { sys::cuDeviceTotalMem_v2(&raw mut memory_bytes, handle) };
    driver::check("cuDeviceTotalMem", code)?;
    Ok(DeviceReport {
        ordinal,
        name: name(handle)?,
        uuid: uuid(handle)?,
        architecture: Architecture {
            major: attribute(A::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)?,
            minor: attribute(A::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)?,
        },
        memory_bytes: memory_bytes as u64,
        // Two transfers a clock; the clock is in kHz, the width in bits.
        bandwidth_bytes_s: 2 * 1_000 * u64::from(clock_khz) * u64::from(bus_bits) / 8,
    })
}

fn find(ordinal: u32) -> Result<sys::CUdevice, DeviceError> {
    let count = count()?;
    if ordinal >= count {
        let text =
            format!("there is no cuda:{ordinal}; devices that the CUDA driver shows: {count}");
        return Err(DeviceError::Unavailable(text));
    }
    let mut handle = 0;
    // SAFETY: the driver is loaded; the number is less than the count of devices, which is an i32.
    let code = unsafe { sys::cuDeviceGet(&raw mut handle, ordinal as i32) };
    driver::check("cuDeviceGet", code)?;
    Ok(handle)
}

fn attribute(handle: sys::CUdevice, which: CUdevice_attribute) -> Result<u32, DeviceError> {
    let mut value = 0;
    // SAFETY: the driver gave this handle; the pointer is to a local integer.
    let code = unsafe { sys::cuDeviceGetAttribute(&raw mut value, which, handle) };
    driver::check("cuDeviceGetAttribute", code)?;
    Ok(value.unsigned_abs())
}

fn name(handle: sys::CUdevice) -> Result<String, DeviceError> {
    let mut text = [0_u8; 256];
    let len = text.len() as i32;
    // SAFETY: the driver writes at most `len` bytes, the last of them zero.
    let code = unsafe { sys::cuDeviceGetName(text.as_mut_ptr().cast(), len, handle) };
    driver::check("cuDeviceGetName", code)?;
    let name = CStr::from_bytes_until_nul(&text).map(CStr::to_string_lossy);
    Ok(name.map(|name| name.into_owned()).unwrap_or_default())
}

/// As `nvidia-smi` writes it.
fn uuid(handle: sys::CUdevice) -> Result<String, DeviceError> {
    let mut uuid = sys::CUuuid { bytes: [0; 16] };
    // SAFETY: the driver gave this handle; the pointer is to a local of its type.
    let code = unsafe { sys::cuDeviceGetUuid_v2(&raw mut uuid, handle) };
    driver::check("cuDeviceGetUuid", code)?;
    let hex = |range: std::ops::Range<usize>| -> String {
        uuid.bytes[range].iter().map(|&byte| format!("{:02x}", byte as u8)).collect()
    };
    Ok(format!("GPU-{}-{}-{}-{}-{}", hex(0..4), hex(4..6), hex(6..8), hex(8..10), hex(10..16)))
}

/// A device that this process computes on. Calls may come from any thread.
pub struct Device {
    handle: sys::CUdevice,
    context: sys::CUcontext,
    /// Why nothing works any more, once that is so.
    lost: OnceLock<String>,
    architecture: Architecture,
    /// Filled by [`Device::open`] before anybody else has it.
    facts: DeviceFacts,
    /// Shared memory that a block can have when it asks for it.
    shared_bytes_max: usize,
    module: sys::CUmodule,
    functions: [sys::CUfunction; Kernel::ALL.len()],
    /// Held by whoever captures a stream or waits for the whole device, which must not happen at
    /// the same time.
    quiet: Mutex<()>,
    /// How many lanes it has ([`super::nccl`]).
    lanes: AtomicUsize,
}

// SAFETY: the driver takes calls from any thread, each of which makes the context its own first
// (`Device::call`); the handles never change after `open`.
unsafe impl Send for Device {}
// SAFETY: the same.
unsafe impl Sync for Device {}

impl Device {
    /// Opens device `ordinal` and loads the kernels, which are compiled for it unless that has been
    /// done before (`compile`).
    ///
    /// # Errors
    /// There is no driver, no such device, no room, or no way to compile; or it is too old.
    pub fn open(ordinal: u32) -> Result<Arc<Self>, DeviceError> {
        Self::open_cached(ordinal, compile::Cache::of_user().as_ref())
    }

    /// [`Device::open`] with another folder for compiled kernels, or none.
    ///
    /// # Errors
    /// The same.
    pub fn open_cached(
        ordinal: u32,
        cache: Option<&compile::Cache>,
    ) -> Result<Arc<Self>, DeviceError> {
        let report = report(ordinal)?;
        if report.architecture < ARCHITECTURE_MIN {
            return Err(DeviceError::WrongArchitecture {
                have: report.architecture.to_string(),
                wanted: format!("{ARCHITECTURE_MIN} or later"),
            });
        }
        let mut device = Self::context(&report)?;
        let image = compile::kernels(report.architecture, cache)?;
        device.load(&image)?;
        let free_bytes = device.memory_free_bytes()?;
        let reserve = RESERVE_BYTES.min(free_bytes / RESERVE_SHARE);
        device.facts.weights_bytes_max = free_bytes - reserve;
        Ok(Arc::new(device))
    }

    /// The device without kernels.
    fn context(report: &DeviceReport) -> Result<Self, DeviceError> {
        let handle = find(report.ordinal)?;
        let shared_bytes_max = attribute(handle, SHARED_BYTES_MAX)? as usize;
        let mut context = null_mut();
        // SAFETY: the driver gave this handle; the pointer is to a local of its type. The context
        // is released when the device is dropped.
        let code = unsafe { sys::cuDevicePrimaryCtxRetain(&raw mut context, handle) };
        driver::check("cuDevicePrimaryCtxRetain", code)?;
        Ok(Self {
            handle,
            context,
            lost: OnceLock::new(),
            architecture: report.architecture,
            facts: DeviceFacts {
                name: report.name.clone(),
                uuid: report.uuid.clone(),
                memory_bytes: report.memory_bytes,
                weights_bytes_max: 0,
                bandwidth_bytes_s: report.bandwidth_bytes_s,
            },
            shared_bytes_max,
            module: null_mut(),
            functions: [null_mut(); _],
            quiet: Mutex::new(()),
            lanes: AtomicUsize::new(0),
        })
    }

    fn load(&mut self, image: &compile::Image) -> Result<(), DeviceError> {
        let mut module = null_mut();
        self.bind()?;
        // SAFETY: the image was made by the compiler or was found unchanged since; the driver reads
        // its length from its header.
        let code = unsafe { sys::cuModuleLoadData(&raw mut module, image.bytes().as_ptr().cast()) };
        if code != CUresult::CUDA_SUCCESS {
            return Err(self.refused_image(code, image));
        }
        self.module = module;
        for kernel in Kernel::ALL {
            let mut function = null_mut();
            // SAFETY: the module is loaded; the name ends with a zero.
            self.call("cuModuleGetFunction", || unsafe {
                sys::cuModuleGetFunction(&raw mut function, module, kernel.name().as_ptr())
            })?;
            self.functions[kernel as usize] = function;
            let shared_bytes = kernel.shared_bytes();
            // What does not fit is not started ([`Device::fits`]).
            if shared_bytes > SHARED_BYTES_USUAL && self.fits(kernel) {
                // An SM divides its memory between blocks and L1. All goes to blocks: these kernels
                // are fast by what is on its way to shared memory.
                for (attribute, value) in [(SHARED_BYTES, shared_bytes as i32), (CARVEOUT, 100)] {
                    // SAFETY: the function was found above.
                    self.call("cuFuncSetAttribute", || unsafe {
                        sys::cuFuncSetAttribute(function, attribute, value)
                    })?;
                }
            }
        }
        Ok(())
    }

    /// Why the driver does not load compiled kernels.
    fn refused_image(&self, code: CUresult, image: &compile::Image) -> DeviceError {
        match code {
            CUresult::CUDA_ERROR_NO_BINARY_FOR_GPU => DeviceError::WrongArchitecture {
                have: self.architecture.to_string(),
                wanted: format!("the driver refuses {}", image.origin()),
            },
            CUresult::CUDA_ERROR_INVALID_IMAGE | CUresult::CUDA_ERROR_UNSUPPORTED_PTX_VERSION => {
                let (origin, driver) = (image.origin(), driver::version().unwrap_or_default());
                DeviceError::Compile(format!(
                    "the driver, which speaks CUDA {}.{}, does not load {origin}: the compiler is \
                     newer than the driver",
                    driver.0, driver.1
                ))
            }
            code => match self.judge("cuModuleLoadData", code) {
                Ok(()) => unreachable!("success is no refusal"),
                Err(error) => error,
            },
        }
    }

    /// What it says of itself.
    pub fn facts(&self) -> &DeviceFacts {
        &self.facts
    }

    /// Its generation, for which the kernels are compiled.
    pub fn architecture(&self) -> Architecture {
        self.architecture
    }

    /// Why nothing works any more, if that is so.
    pub fn lost(&self) -> Option<&str> {
        self.lost.get().map(String::as_str)
    }

    /// Bytes of memory that nobody has taken.
    ///
    /// # Errors
    /// The device is lost.
    pub fn memory_free_bytes(&self) -> Result<u64, DeviceError> {
        let (mut free, mut total) = (0, 0);
        // SAFETY: the pointers are to local integers.
        self.call("cuMemGetInfo", || unsafe {
            sys::cuMemGetInfo_v2(&raw mut free, &raw mut total)
        })?;
        Ok(free as u64)
    }

    /// Calls the driver with this device's context, unless the device is lost.
    pub(super) fn call(
        &self,
        function: &str,
        call: impl FnOnce() -> CUresult,
    ) -> Result<(), DeviceError> {
        self.bind()?;
        self.judge(function, call())
    }

    /// Counts its lanes.
    pub(super) fn lanes(&self) -> &AtomicUsize {
        &self.lanes
    }

    /// Makes the device's context that of the calling thread.
    pub(super) fn bind(&self) -> Result<(), DeviceError> {
        if let Some(reason) = self.lost.get() {
            return Err(DeviceError::Lost(reason.clone()));
        }
        // SAFETY: the context is retained until the device is dropped.
        self.judge("cuCtxSetCurrent", unsafe { sys::cuCtxSetCurrent(self.context) })
    }

    /// Keeps the first reason for which the device is lost.
    fn judge(&self, function: &str, code: CUresult) -> Result<(), DeviceError> {
        let judged = driver::check(function, code);
        let Err(DeviceError::Lost(reason)) = judged else { return judged };
        Err(DeviceError::Lost(self.lost.get_or_init(|| reason).clone()))
    }

    /// Keeps other threads from capturing and from waiting for the whole device.
    pub(super) fn quiet(&self) -> MutexGuard<'_, ()> {
        self.quiet.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits until everything that was asked of the device is done.
    pub(super) fn synchronize(&self) -> Result<(), DeviceError> {
        // A thread that captures has the lock, and the driver to tell it of its mistake.
        let _quiet = (!graph::captures()).then(|| self.quiet());
        // SAFETY: there is nothing to get wrong.
        self.call("cuCtxSynchronize", || unsafe { sys::cuCtxSynchronize() })
    }

    /// Whether its blocks have as much shared memory as the kernel wants. The tiles of 128 rows do
    /// not fit consumers' devices; those of 16 give the same bits there.
    pub(super) fn fits(&self, kernel: Kernel) -> bool {
        kernel.shared_bytes() <= self.shared_bytes_max
    }

    /// A kernel as the driver knows it.
    pub(super) fn function(&self, kernel: Kernel) -> sys::CUfunction {
        self.functions[kernel as usize]
    }
}

impl Drop for Device {
    fn drop(&mut self) {
        if !self.module.is_null() {
            // What cannot be unloaded goes with the context.
            // SAFETY: nothing runs any more: streams and buffers hold the device.
            let _ = self.call("cuModuleUnload", || unsafe { sys::cuModuleUnload(self.module) });
        }
        // SAFETY: retained in `context`, once.
        let _ = unsafe { sys::cuDevicePrimaryCtxRelease_v2(self.handle) };
    }
}
