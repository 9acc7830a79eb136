//! One device: its memory, and what it says of itself.

use std::collections::BTreeMap;

use super::Code;
use crate::engine::{BLOCK_THREADS_MAX, GRID_SIDE_MAX, SHARED_BYTES_MAX, SHARED_BYTES_USUAL};
use crate::memory::Region;

/// Compute capability, major and minor.
pub const CAPABILITY: (i32, i32) = (9, 0);

/// A device.
#[derive(Debug)]
pub struct Device {
    memory_bytes: usize,
    used_bytes: usize,
    /// Allocations by their addresses.
    regions: BTreeMap<usize, Region>,
    lost: Option<Code>,
}

impl Device {
    /// A device with so much memory.
    pub fn new(memory_bytes: usize) -> Self {
        Self { memory_bytes, used_bytes: 0, regions: BTreeMap::new(), lost: None }
    }

    /// What every call says from now on; the first reason stays.
    pub fn lose(&mut self, code: Code) {
        self.lost.get_or_insert(code);
    }

    /// The reason why no call on the device succeeds any more.
    pub fn alive(&self) -> Result<(), Code> {
        self.lost.map_or(Ok(()), Err)
    }

    /// Takes memory, which is poisoned.
    pub fn allocate(&mut self, bytes: usize) -> Result<usize, Code> {
        if bytes == 0 {
            return Err(Code::ERROR_INVALID_VALUE);
        }
        if bytes > self.memory_bytes - self.used_bytes {
            return Err(Code::ERROR_OUT_OF_MEMORY);
        }
        let region = Region::new(bytes).map_err(|_| Code::ERROR_OUT_OF_MEMORY)?;
        let address = region.address();
        self.used_bytes += bytes;
        self.regions.insert(address, region);
        Ok(address)
    }

    /// Gives memory back.
    pub fn free(&mut self, address: usize) -> Result<(), Code> {
        let region = self.regions.remove(&address).ok_or(Code::ERROR_INVALID_VALUE)?;
        self.used_bytes -= region.bytes();
        Ok(())
    }

    /// Bytes that are free, and all.
    pub fn memory(&self) -> (usize, usize) {
        (self.memory_bytes - self.used_bytes, self.memory_bytes)
    }

    /// Whether a range lies within one allocation.
    pub fn has(&self, address: usize, bytes: usize) -> bool {
        covers(&self.regions, address, bytes)
    }
}

/// Whether one of the regions holds a whole range.
pub fn covers(regions: &BTreeMap<usize, Region>, address: usize, bytes: usize) -> bool {
    let before = regions.range(..=address).next_back();
    before.is_some_and(|(start, region)| {
        let skipped = address - start;
        skipped <= region.bytes() && bytes <= region.bytes() - skipped
    })
}

/// The value of a `CUdevice_attribute`, of those that anybody has asked for so far.
pub fn attribute(number: i32) -> Option<i32> {
    Some(match number {
        // MAX_THREADS_PER_BLOCK, and a block in x and y
        1..=3 => BLOCK_THREADS_MAX as i32,
        // MAX_BLOCK_DIM_Z
        4 => 64,
        // MAX_GRID_DIM_X
        5 => i32::MAX,
        // MAX_GRID_DIM_Y and Z
        6 | 7 => GRID_SIDE_MAX as i32,
        // MAX_SHARED_MEMORY_PER_BLOCK
        8 => SHARED_BYTES_USUAL as i32,
        // WARP_SIZE
        10 => 32,
        // CLOCK_RATE and MEMORY_CLOCK_RATE in kHz
        13 | 36 => 1_000_000,
        // MULTIPROCESSOR_COUNT, CONCURRENT_KERNELS, ASYNC_ENGINE_COUNT, UNIFIED_ADDRESSING
        16 | 31 | 40 | 41 => 1,
        // PCI_BUS_ID, PCI_DEVICE_ID, PCI_DOMAIN_ID, COMPUTE_MODE, INTEGRATED, ECC_ENABLED
        33 | 34 | 50 | 20 | 18 | 32 => 0,
        // GLOBAL_MEMORY_BUS_WIDTH in bits
        37 => 512,
        // L2_CACHE_SIZE
        38 => 1 << 20,
        75 => CAPABILITY.0,
        76 => CAPABILITY.1,
        // MAX_SHARED_MEMORY_PER_MULTIPROCESSOR
        81 => 228 << 10,
        // MAX_SHARED_MEMORY_PER_BLOCK_OPTIN
        97 => SHARED_BYTES_MAX as i32,
        // MEMORY_POOLS_SUPPORTED, CLUSTER_LAUNCH
        115 | 120 => 0,
        _ => return None,
    })
}
