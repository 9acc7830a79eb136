//! What is true of any device that is not the processor: which one is meant, what it says of itself,
//! how its memory is reached, and what can go wrong with it.
//!
//! A processor cannot fail in these ways without the process failing too. A device can: its memory
//! is used up long before the machine's, it falls off the bus, its driver is missing or too old. So
//! whatever touches one gives a [`DeviceError`], and whoever gets one decides what it costs.
//!
//! What this module does not know: CUDA, or any other way of speaking to a device.

use std::fmt;
use std::str::FromStr;

/// Where kernels run.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(try_from = "String", into = "String")]
pub enum DeviceId {
    /// On the processor.
    #[default]
    Cpu,
    /// On the CUDA device with this ordinal, as the driver counts them.
    Cuda(u32),
}

impl fmt::Display for DeviceId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Cpu => write!(f, "cpu"),
            Self::Cuda(ordinal) => write!(f, "cuda:{ordinal}"),
        }
    }
}

/// What names no device.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0:.40} is no device: cpu, or cuda:N with the number of the device")]
pub struct NoDevice(String);

impl FromStr for DeviceId {
    type Err = NoDevice;

    fn from_str(text: &str) -> Result<Self, NoDevice> {
        let ordinal = || text.strip_prefix("cuda:")?.parse().ok().map(Self::Cuda);
        let device = if text == "cpu" { Some(Self::Cpu) } else { ordinal() };
        // One spelling for each, so `cuda:+1` and `cuda:01` are none.
        let device = device.filter(|device| device.to_string() == text);
        device.ok_or_else(|| NoDevice(text.to_owned()))
    }
}

impl TryFrom<String> for DeviceId {
    type Error = NoDevice;

    fn try_from(text: String) -> Result<Self, NoDevice> {
        text.parse()
    }
}

impl From<DeviceId> for String {
    fn from(device: DeviceId) -> Self {
        device.to_string()
    }
}

/// What a device says of itself, and what is left of it for weights.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DeviceFacts {
    /// Its name in the driver, such as `NVIDIA H100 80GB HBM3`.
    pub name: String,
    /// Its UUID as the driver's tools write it, `GPU-` and 36 characters.
    pub uuid: String,
    /// Bytes of memory that it has.
    pub memory_bytes: u64,
    /// Bytes of it that weights may take: what was free when it was opened, less what the kernels
    /// take for rows, intermediate values and staging.
    pub weights_bytes_max: u64,
    /// Bytes a second that its memory can deliver, by clock and bus width; 0 if it does not tell.
    pub bandwidth_bytes_s: u64,
}

/// Why a device cannot do what is asked of it.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum DeviceError {
    /// There is no driver, no library or no such device.
    #[error("the device is not available: {0}")]
    Unavailable(String),
    /// Its memory is used up. What it holds is as it was.
    #[error("out of device memory: {wanted_bytes} bytes wanted, {free_bytes} free")]
    OutOfMemory {
        /// Bytes that were asked for.
        wanted_bytes: u64,
        /// Bytes that are free.
        free_bytes: u64,
    },
    /// It does not answer any more, or a kernel failed on it. Nothing that it holds can be used, and
    /// nothing but another process brings it back.
    #[error("the device is lost: {0}")]
    Lost(String),
    /// It is of a generation that the kernels are not written for.
    #[error("the device's architecture {have} is none that the kernels run on: {wanted}")]
    WrongArchitecture {
        /// Its architecture, such as `sm_70`.
        have: String,
        /// Those that would do.
        wanted: String,
    },
    /// The kernels do not compile for it, with what the compiler said.
    #[error("the kernels do not compile for the device: {0}")]
    Compile(String),
    /// It has no kernels for this.
    #[error("not supported on the device: {0}")]
    Unsupported(String),
}

/// Memory of a device that holds one matrix, given back when it is dropped.
pub trait DeviceMemory: Send + Sync {
    /// Its length in bytes.
    fn bytes(&self) -> usize;

    /// Where it begins in the address space of the device.
    fn address(&self) -> u64;

    /// Copies `to.len()` bytes from offset `at` back to the process. Waits for the copy, and for
    /// nothing else that the device has to do.
    ///
    /// # Errors
    /// The device is lost.
    fn read(&self, at: usize, to: &mut [u8]) -> Result<(), DeviceError>;
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_device_has_one_spelling() {
        for (text, device) in
            [("cpu", DeviceId::Cpu), ("cuda:0", DeviceId::Cuda(0)), ("cuda:12", DeviceId::Cuda(12))]
        {
            assert_eq!((text.parse(), device.to_string()), (Ok(device), text.to_owned()));
        }
        for text in ["", "CPU", "cuda", "cuda:", "cuda:+1", "cuda:01", "cuda:-1", "cuda:4294967296"]
        {
            assert_eq!(text.parse::<DeviceId>(), Err(NoDevice(text.to_owned())), "{text}");
        }
    }
}
