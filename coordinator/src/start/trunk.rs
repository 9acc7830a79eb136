//! Puts the coordinator's part of the model where it is computed, and finds out how long the KV cache
//! is that fits there.

use std::sync::Arc;

use entente_model::kernels::cuda::Device;
use entente_model::kernels::{
    BLOCK_LEN, DeviceError, DeviceId, Kernels, KvDtype, KvLayer, WeightFormat,
};
use entente_model::{Architecture, CoordinatorWeights};

use super::Error;
use crate::Config;
use crate::config::EngineConfig;
use crate::engine::trunk::{CacheShape, CpuTrunk, CudaTrunk, StepBounds, Trunk};

/// Memory of the KV cache on a processor, unless the configuration says otherwise.
const KV_CACHE_MIB: usize = 256;

/// Opens the device of the configuration, if it is one, before anything large is read.
///
/// # Errors
/// The device cannot be used, or not with the rest of the configuration.
pub(super) fn open_device(config: &Config) -> Result<Option<Arc<Device>>, Error> {
    let DeviceId::Cuda(ordinal) = config.device else { return Ok(None) };
    let (key, value, takes) = match (config.weights, kv_dtype(config)) {
        (WeightFormat::Bf16 | WeightFormat::Fp8, KvDtype::Bf16) => {
            let device = Device::open(ordinal);
            return device.map(Some).map_err(|source| device_error(config, source));
        }
        (WeightFormat::Bf16 | WeightFormat::Fp8, kv_dtype) => {
            ("engine.kv_dtype", kv_dtype.name(), "bf16")
        }
        (weights, _) => ("weights", weights.name(), "bf16 or fp8"),
    };
    Err(Error::Config(format!("{key} is {value}, device = \"{}\" takes {takes}", config.device)))
}

/// How the cache keeps keys and values.
pub(super) fn kv_dtype(config: &Config) -> KvDtype {
    config.engine.kv_dtype.unwrap_or(KvDtype::of(config.weights))
}

/// The trunk, on the device if there is one, and the blocks of its cache.
///
/// # Errors
/// Not one block fits, or the device cannot take the rest.
pub(super) fn trunk(
    config: &Config,
    architecture: &Architecture,
    weights: CoordinatorWeights,
    kernels: Arc<dyn Kernels>,
    device: Option<Arc<Device>>,
) -> Result<(Box<dyn Trunk>, usize), Error> {
    let EngineConfig { step_rows_max, running_max, kv_cache_mib, .. } = config.engine;
    let Architecture { kv_heads, head_dim, ref layers, .. } = *architecture;
    let Some(device) = device else {
        let dtype = kv_dtype(config);
        let block_bytes = layers.len() * KvLayer::block_bytes(kv_heads, head_dim, dtype);
        let blocks = kv_blocks(kv_cache_mib.unwrap_or(KV_CACHE_MIB), block_bytes)?;
        let cache = CacheShape { blocks, dtype };
        let trunk = CpuTrunk::new(architecture.clone(), weights, kernels, cache);
        return Ok((Box::new(trunk), blocks));
    };
    let block_bytes = CudaTrunk::block_bytes(architecture);
    let blocks = kv_cache_mib.map(|mib| kv_blocks(mib, block_bytes)).transpose()?;
    let sequences_max = running_max.min(step_rows_max);
    let bounds = StepBounds { rows_max: step_rows_max, sequences_max };
    let trunk =
        CudaTrunk::new(&device, architecture.clone(), config.weights, weights, bounds, blocks)
            .map_err(|source| device_error(config, source))?;
    let blocks = trunk.blocks();
    tracing::info!(device = %config.device, name = device.facts().name, blocks, "uses a device");
    Ok((Box::new(trunk), blocks))
}

pub(super) fn device_error(config: &Config, source: DeviceError) -> Error {
    Error::Device { device: config.device, source }
}

/// Blocks of so many bytes that fit the configured memory.
fn kv_blocks(kv_cache_mib: usize, block_bytes: usize) -> Result<usize, Error> {
    match (kv_cache_mib << 20) / block_bytes {
        0 => Err(Error::Config(format!(
            "engine.kv_cache_mib is {kv_cache_mib}, one block of {BLOCK_LEN} positions takes \
             {block_bytes} bytes"
        ))),
        blocks => Ok(blocks),
    }
}
