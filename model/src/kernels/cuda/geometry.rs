//! Sizes by which the host launches a kernel: the same constants as in `geometry.cuh`, under the
//! same names. A test compares the two files, so that neither can change alone.

/// Outputs of a panel of weights.
pub const PANEL: usize = 32;
/// Parts of the inner dimension that are summed by themselves, then joined in ascending order.
pub const SEGMENTS: usize = 4;
/// Inputs of which each output has one scale, where weights are fp8.
pub const FP8_BLOCK: usize = 128;

/// Rows of a tile of the `_16` kernels.
pub const DECODE_ROWS: usize = 16;
/// Threads of a block of theirs.
pub const DECODE_THREADS: usize = 128;
/// Panels that a block multiplies. `ffn_gate_up_16` takes gate and up of the same outputs, and so
/// writes half as many outputs.
pub const DECODE_PANELS: usize = 2;
/// Chunks of 32 inputs that have a place in shared memory.
pub const DECODE_STAGES: usize = 4;
/// Dynamic shared memory of a block.
pub const DECODE_SHARED_BYTES: usize = 81_920;
/// The same with weights in fp8.
pub const FP8_DECODE_STAGES: usize = 6;
/// The same with weights in fp8.
pub const FP8_DECODE_SHARED_BYTES: usize = 73_728;

/// Rows of a tile of the `_128` kernels.
pub const PREFILL_ROWS: usize = 128;
/// Threads of a block of theirs.
pub const PREFILL_THREADS: usize = 256;
/// Panels that a block multiplies; half as many outputs for `ffn_gate_up_128`.
pub const PREFILL_PANELS: usize = 8;
/// Chunks of 32 inputs of the rows that have a place in shared memory.
pub const PREFILL_STAGES: usize = 4;
/// Dynamic shared memory of a block. More than a block may have on consumer cards of compute
/// capability 8.6 and 8.9 (99 KB); there the `_16` kernels give the same bits.
pub const PREFILL_SHARED_BYTES: usize = 163_840;
/// Rows of a tile of the `_64` kernels, whose weights are fp8.
pub const FP8_PREFILL_ROWS: usize = 64;
/// Dynamic shared memory of a block of theirs.
pub const FP8_PREFILL_SHARED_BYTES: usize = 81_920;

/// Rows of a block of the `matmul_exact` kernels, which takes one panel.
pub const EXACT_ROWS: usize = 4;
/// Threads of a block of theirs.
pub const EXACT_THREADS: usize = 1024;

/// Threads of a block of `rms_norm`, which is one row.
pub const NORM_THREADS: usize = 256;
/// Threads of a block of `rope`, `write_kv`, `add` and `round_rows`: one for each pair of values, and
/// of `add` one for each value.
pub const FLAT_THREADS: usize = 256;

/// Positions that share a block of the key-value cache.
pub const KV_BLOCK: usize = 16;
/// Positions of a split of attention.
pub const SPLIT_POSITIONS: usize = 256;
/// Threads of a block of `attention_split`.
pub const ATTENTION_THREADS: usize = 128;
/// Queries, that is heads of rows, that a block multiplies at once.
pub const ATTENTION_QUERIES: usize = 16;
/// The most values of a head.
pub const HEAD_DIM_MAX: usize = 256;
/// Threads of a block of `attention_join`, which is one row and one head.
pub const JOIN_THREADS: usize = 128;

/// Threads of a block of `draw`, which is one row.
pub const DRAW_THREADS: usize = 1024;
/// Tokens of a vocabulary from which `draw` can choose.
pub const VOCAB_MAX: usize = 524_288;

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    /// Name and value of every line that begins with `prefix`, whose type comes before `=`.
    fn constants(source: &'static str, prefix: &str) -> BTreeMap<&'static str, usize> {
        let lines = source.lines().filter_map(|line| line.strip_prefix(prefix));
        let constants = lines.map(|line| {
            let (name, value) = line.split_once('=').expect("a name and a value");
            let name = name.split(':').next().unwrap_or_default().trim();
            let value = value.trim().trim_end_matches(';').replace('_', "");
            (name, value.parse().expect("a number"))
        });
        constants.collect()
    }

    #[test]
    fn host_and_device_know_the_same_sizes() {
        let device = constants(include_str!("geometry.cuh"), "constexpr int ");
        let host = constants(include_str!("geometry.rs"), "pub const ");
        assert!(device.contains_key("PANEL"), "the file was read");
        assert_eq!(device, host);
    }
}
