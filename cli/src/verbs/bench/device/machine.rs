//! The device that is measured, with fresh inputs on it, and what it can do at best.
//!
//! Its limits are the rate at which it copies its own memory, and that of a large product by cuBLAS,
//! both of the same minutes as all else.

use std::cell::RefCell;
use std::sync::Arc;
use std::time::Duration;

use entente_model::kernels::DeviceError;
use entente_model::kernels::cuda::{
    Buffer, Cublas, Device, Probe, Staging, Stream, Value, ViewMut,
};
use half::bf16;

use crate::random::Random;
use crate::stats::median;
use crate::verbs::doctor::sentence;

/// Bytes that are copied within the device, or less where it has not so much memory.
const COPY_BYTES: u64 = 1 << 30;
/// Weights that are multiplied one after the other are together more than a device's caches hold.
const COLD_BYTES: usize = 256 << 20;
/// Fresh inputs for each figure; the median counts.
pub const SEEDS: u64 = 5;
/// Launches of each in a row.
pub const REPEATS: u32 = 20;
/// Random values are as many; longer inputs repeat them.
const PATTERN_LEN: usize = 1 << 20;

/// A device and its limits.
pub struct Machine {
    pub device: Arc<Device>,
    pub stream: Arc<Stream>,
    staging: RefCell<Staging>,
    cublas: Result<Cublas, DeviceError>,
    /// Bytes copied a second, read and written ones together.
    pub copy_bytes_s: f64,
    /// Operations a second of the large product, if there is cuBLAS.
    pub product_flop_s: Option<f64>,
}

impl Machine {
    /// Opens a device and measures its limits: cuBLAS's product has sides of `product_len`.
    pub fn open(ordinal: u32, product_len: usize) -> anyhow::Result<Self> {
        let device = Device::open(ordinal)?;
        let bytes = COPY_BYTES.min(device.memory_free_bytes()? / 4) as usize;
        let copy_bytes_s = Probe::new(&device)?.copy_bandwidth_bytes_s(bytes, REPEATS)?;
        let stream = Arc::new(Stream::new(&device)?);
        let staging = RefCell::new(Staging::new(&device)?);
        let cublas = Cublas::new(&stream);
        let mut machine =
            Self { device, stream, staging, cublas, copy_bytes_s, product_flop_s: None };
        machine.product_flop_s = machine.cublas_flop_s(product_len, product_len, product_len)?;
        Ok(machine)
    }

    /// Why there is no cuBLAS, or its version.
    pub fn cublas(&self) -> Result<String, String> {
        let version = self.cublas.as_ref().map_err(Clone::clone).and_then(|_| Cublas::version());
        version.map(|(major, minor)| format!("{major}.{minor}")).map_err(sentence)
    }

    /// Operations a second of cuBLAS, which multiplies `rows` rows with matrices `[outputs, inputs]`
    /// from memory; none without cuBLAS.
    pub fn cublas_flop_s(
        &self,
        rows: usize,
        inputs: usize,
        outputs: usize,
    ) -> anyhow::Result<Option<f64>> {
        let Ok(cublas) = &self.cublas else { return Ok(None) };
        let len = outputs * inputs;
        let copies = copies(2 * len);
        let value = |v: f64| bf16::from_f64(v).to_bits();
        let w = self.random(copies * len, u64::MAX, value)?;
        let mut y = Buffer::<u16>::new(&self.device, rows * outputs)?;
        let us = median_us(|seed| {
            let x = self.random(rows * inputs, seed, value)?;
            self.stream.time(REPEATS, |number| {
                let first = number % copies * len;
                let w = w.slice(first..first + len);
                cublas.product(w, x.view(), y.view_mut(), [rows, inputs, outputs])
            })
        })?;
        Ok(Some(2e6 * (rows * len) as f64 / us))
    }

    /// `len` values on the device, each made of a number in `[-1, 1)`.
    pub fn random<T: Value>(
        &self,
        len: usize,
        seed: u64,
        value: impl Fn(f64) -> T,
    ) -> Result<Buffer<T>, DeviceError> {
        let mut buffer = Buffer::new(&self.device, len)?;
        self.fill(buffer.view_mut(), seed, value)?;
        Ok(buffer)
    }

    fn fill<T: Value>(
        &self,
        mut to: ViewMut<'_, T>,
        seed: u64,
        value: impl Fn(f64) -> T,
    ) -> Result<(), DeviceError> {
        let (mut random, len) = (Random::new(seed), to.len());
        let mut next = || value(random.uniform() * 2.0 - 1.0);
        let pattern: Vec<T> = (0..len.min(PATTERN_LEN)).map(|_| next()).collect();
        for first in (0..len).step_by(PATTERN_LEN) {
            let piece = to.reborrow().slice(first..len.min(first + PATTERN_LEN));
            let copy = |to: &mut [T]| to.copy_from_slice(&pattern[..to.len()]);
            self.staging.borrow_mut().upload(&self.stream, piece, copy)?;
        }
        Ok(())
    }

    /// These values on the device.
    pub fn put<T: Value>(&self, values: &[T]) -> Result<Buffer<T>, DeviceError> {
        let mut buffer = Buffer::new(&self.device, values.len())?;
        let copy = |to: &mut [T]| to.copy_from_slice(values);
        self.staging.borrow_mut().upload(&self.stream, buffer.view_mut(), copy)?;
        Ok(buffer)
    }
}

/// How many matrices of so many bytes caches do not hold.
pub fn copies(bytes: usize) -> usize {
    COLD_BYTES.div_ceil(bytes.max(1)).min(REPEATS as usize + 1)
}

/// The median of what is measured with fresh inputs, in microseconds.
pub fn median_us(
    measure: impl FnMut(u64) -> Result<Duration, DeviceError>,
) -> Result<f64, DeviceError> {
    let times: Result<Vec<Duration>, DeviceError> = (0..SEEDS).map(measure).collect();
    let times: Vec<f64> = times?.iter().map(|time| time.as_secs_f64() * 1e6).collect();
    Ok(median(&times))
}
