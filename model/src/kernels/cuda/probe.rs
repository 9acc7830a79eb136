//! What a device can do and what kernels make of it, for reports. Times are those of the device's
//! clock around many launches: what a launch costs the host is hidden behind the one before, as long
//! as that takes longer.

use std::sync::Arc;
use std::time::Duration;

use super::buffer::Buffer;
use super::device::Device;
use super::experts::{Work, passes};
use super::gemm::Gemms;
use super::stream::{Event, Stream};
use crate::kernels::{DeviceError, FfnGroup};

/// Measures on one device.
pub struct Probe {
    device: Arc<Device>,
    work: Work,
}

impl Probe {
    /// A probe of `device`.
    ///
    /// # Errors
    /// The device is lost.
    pub fn new(device: &Arc<Device>) -> Result<Self, DeviceError> {
        Ok(Self { device: Arc::clone(device), work: Work::new(device)? })
    }

    /// Bytes a second, read and written ones together, that the device copies within its memory:
    /// `bytes` bytes, `repeats` times.
    ///
    /// # Errors
    /// The device has no room for twice as many bytes, or is lost.
    pub fn copy_bandwidth_bytes_s(&self, bytes: usize, repeats: u32) -> Result<f64, DeviceError> {
        let stream = Stream::new(&self.device)?;
        let from = Buffer::<u8>::zeroed(&stream, bytes)?;
        let mut to = Buffer::<u8>::zeroed(&stream, bytes)?;
        let time = stream.time(repeats, |_| stream.copy(from.view(), to.view_mut()))?;
        Ok(2.0 * bytes as f64 / time.as_secs_f64())
    }

    /// Time of one feed-forward of rows that are on the device, results staying there, of `repeats`
    /// in a row. Arguments are those of [`crate::kernels::ExpertKernels::gated_ffn_encoded`].
    ///
    /// # Errors
    /// The device is out of memory or lost.
    pub fn gated_ffn(
        &mut self,
        x: &[&[u8]],
        groups: &[FfnGroup<'_>],
        repeats: u32,
    ) -> Result<Duration, DeviceError> {
        let Some(group) = groups.first() else { return Ok(Duration::ZERO) };
        let hidden = group.ffn.gate.in_features();
        self.work.upload_rows(x, hidden)?;
        let mut time = Duration::ZERO;
        let layout = group.ffn.gate.layout();
        let gemms = Gemms::of(&self.device, layout).expect("matrices that are on a device");
        for pass in passes(groups, hidden, &gemms) {
            self.work.prepare(&pass, x.len(), hidden)?;
            let stream = Arc::clone(self.work.stream());
            time += stream.time(repeats, |_| self.work.launch(&pass, hidden, &gemms))?;
        }
        Ok(time)
    }
}

impl Stream {
    /// Mean time of `repeats` launches in a row, by the device's clock, after one that is not
    /// counted. `launch` gets the number of each, and puts its work into this stream.
    ///
    /// # Errors
    /// What `launch` gives; the device is lost.
    pub fn time(
        &self,
        repeats: u32,
        mut launch: impl FnMut(usize) -> Result<(), DeviceError>,
    ) -> Result<Duration, DeviceError> {
        let [begin, end] = [Event::timed(self.device())?, Event::timed(self.device())?];
        launch(0)?;
        begin.record(self)?;
        for number in 1..=repeats as usize {
            launch(number)?;
        }
        end.record(self)?;
        end.synchronize()?;
        Ok(begin.until(&end)? / repeats.max(1))
    }
}
