//! Checkpoints of any shape with random weights, for measuring and for tests of the machinery.
//!
//! A folder that [`write()`] makes is an ordinary Hugging Face Mixtral checkpoint in bf16 with a
//! tokenizer and a chat template; nothing that reads it can tell that nobody trained it, except by
//! what it says. Weights are drawn so that activations stay sane: each matrix with a standard
//! deviation of `1 / sqrt(fan-in)`, smaller with depth where a matrix writes to the residual
//! stream.
//!
//! Invariant: the bytes depend on the shape and the seed alone, not on threads or on the order in
//! which parts are written. Each value is a function of the seed, its tensor's name and its place
//! (a counter-based generator), so any part can be made by itself.

mod draw;
mod text;

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};

use serde_json::{Map, Value, json};

use self::draw::Values;

/// Most bytes of one safetensors file.
const SHARD_BYTES_MAX: u64 = 2_000_000_000;

/// Values that are drawn and written at a time.
const CHUNK_VALUES: usize = 1 << 20;

/// Positions that the model says it can tell apart.
const POSITIONS_MAX: usize = 4_096;

/// Why no checkpoint was written.
#[derive(Debug, thiserror::Error)]
pub enum SynthError {
    /// The numbers do not make a model.
    #[error("shape: {0}")]
    Shape(String),
    /// A file cannot be written.
    #[error("cannot write {}: {source}", file.display())]
    Write {
        /// The file.
        file: PathBuf,
        /// What the system said.
        source: io::Error,
    },
}

/// The numbers of a Mixtral model.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Shape {
    /// Values of a row.
    pub hidden: usize,
    /// Values between the two halves of an expert.
    pub inner: usize,
    /// Decoder layers.
    pub layers: usize,
    /// Query heads; divides `hidden`.
    pub heads: usize,
    /// Key and value heads; divides `heads`.
    pub kv_heads: usize,
    /// Experts of a layer.
    pub experts: usize,
    /// Experts that a row goes through.
    pub top_k: usize,
    /// Tokens.
    pub vocab: usize,
}

impl Shape {
    /// For tests: 0.5 M parameters.
    pub const TINY: Self = Self {
        hidden: 64,
        inner: 128,
        layers: 2,
        heads: 4,
        kv_heads: 2,
        experts: 8,
        top_k: 2,
        vocab: 1_024,
    };
    /// 0.79 B parameters, 0.23 B of them active.
    pub const MID: Self = Self {
        hidden: 1_024,
        inner: 3_584,
        layers: 8,
        heads: 16,
        kv_heads: 4,
        experts: 8,
        top_k: 2,
        vocab: 32_000,
    };
    /// 3.0 B parameters, 0.85 B of them active.
    pub const LARGE: Self =
        Self { hidden: 2_048, inner: 7_168, heads: 32, kv_heads: 8, ..Self::MID };

    fn check(&self) -> Result<(), SynthError> {
        let refuse = |reason: String| Err(SynthError::Shape(reason));
        let Self { hidden, inner, layers, heads, kv_heads, experts, top_k, vocab } = *self;
        if [hidden, inner, layers, heads, kv_heads, experts, top_k].contains(&0) {
            return refuse("every number must be at least 1".to_owned());
        }
        if hidden % heads != 0 || (hidden / heads) % 2 != 0 {
            return refuse(format!("{hidden} hidden values are not {heads} heads of even length"));
        }
        if heads % kv_heads != 0 {
            return refuse(format!("{heads} heads do not share {kv_heads} key and value heads"));
        }
        if top_k > experts {
            return refuse(format!("{top_k} experts a row, but a layer has {experts}"));
        }
        if !(text::VOCAB_MIN..=text::VOCAB_MAX).contains(&vocab) {
            let (min, max) = (text::VOCAB_MIN, text::VOCAB_MAX);
            return refuse(format!("{vocab} tokens, allowed is {min} to {max}"));
        }
        Ok(())
    }

    fn config(&self) -> Value {
        json!({
            "architectures": ["MixtralForCausalLM"],
            "model_type": "mixtral",
            "attention_dropout": 0.0,
            "bos_token_id": text::BOS,
            "eos_token_id": text::EOS,
            "dtype": "bfloat16",
            "hidden_act": "silu",
            "hidden_size": self.hidden,
            "initializer_range": 0.02,
            "intermediate_size": self.inner,
            "max_position_embeddings": POSITIONS_MAX,
            "num_attention_heads": self.heads,
            "num_experts_per_tok": self.top_k,
            "num_hidden_layers": self.layers,
            "num_key_value_heads": self.kv_heads,
            "num_local_experts": self.experts,
            "rms_norm_eps": 1e-5,
            "rope_theta": 1e6,
            "sliding_window": null,
            "tie_word_embeddings": false,
            "vocab_size": self.vocab,
        })
    }

    /// Every tensor, in the order in which they lie in the files.
    fn tensors(&self) -> Vec<Tensor> {
        let head_dim = self.hidden / self.heads;
        let (q, kv) = (self.heads * head_dim, self.kv_heads * head_dim);
        let fan_in = |len: usize| (len as f32).powf(-0.5);
        // What is added to the residual stream, twice a layer, must not make it grow with depth.
        let residual = 2.0 / (2.0 * self.layers as f32).sqrt();
        let mut list =
            vec![Tensor::matrix("model.embed_tokens.weight", self.vocab, self.hidden, 1.0)];
        for layer in 0..self.layers {
            let name = |rest: &str| format!("model.layers.{layer}.{rest}.weight");
            let mut matrix = |rest: &str, rows, columns, scale: f32| {
                let deviation = scale * fan_in(columns);
                list.push(Tensor::matrix(&name(rest), rows, columns, deviation));
            };
            matrix("self_attn.q_proj", q, self.hidden, 1.0);
            matrix("self_attn.k_proj", kv, self.hidden, 1.0);
            matrix("self_attn.v_proj", kv, self.hidden, 1.0);
            matrix("self_attn.o_proj", self.hidden, q, residual);
            matrix("block_sparse_moe.gate", self.experts, self.hidden, 1.5);
            for expert in 0..self.experts {
                let part = |which: &str| format!("block_sparse_moe.experts.{expert}.{which}");
                matrix(&part("w1"), self.inner, self.hidden, 1.0);
                matrix(&part("w2"), self.hidden, self.inner, residual);
                matrix(&part("w3"), self.inner, self.hidden, 1.0);
            }
            list.push(Tensor::ones(name("input_layernorm"), self.hidden));
            list.push(Tensor::ones(name("post_attention_layernorm"), self.hidden));
        }
        list.push(Tensor::ones("model.norm.weight".to_owned(), self.hidden));
        let head = 2.5 * fan_in(self.hidden);
        list.push(Tensor::matrix("lm_head.weight", self.vocab, self.hidden, head));
        list
    }
}

/// One tensor of bf16 values.
struct Tensor {
    name: String,
    shape: Vec<usize>,
    /// Standard deviation of the values around 0; all values are 1 when absent.
    deviation: Option<f32>,
}

impl Tensor {
    fn matrix(name: &str, rows: usize, columns: usize, deviation: f32) -> Self {
        Self { name: name.to_owned(), shape: vec![rows, columns], deviation: Some(deviation) }
    }

    fn ones(name: String, len: usize) -> Self {
        Self { name, shape: vec![len], deviation: None }
    }

    fn values(&self) -> usize {
        self.shape.iter().product()
    }

    fn bytes(&self) -> u64 {
        2 * self.values() as u64
    }
}

/// Writes a checkpoint folder. `progress` is called from several threads with bytes written and
/// bytes to write. Files that are there already are replaced.
///
/// # Errors
/// When the shape is none, or a file cannot be written.
pub fn write(
    dir: &Path,
    shape: &Shape,
    seed: u64,
    progress: &(dyn Fn(u64, u64) + Sync),
) -> Result<(), SynthError> {
    shape.check()?;
    let failed = |file: &Path, source| SynthError::Write { file: file.to_owned(), source };
    fs::create_dir_all(dir).map_err(|source| failed(dir, source))?;
    let documents = [
        ("config.json", shape.config()),
        ("generation_config.json", text::generation_config()),
        ("tokenizer.json", text::tokenizer(shape.vocab)),
        ("tokenizer_config.json", text::tokenizer_config(POSITIONS_MAX)),
    ];
    for (name, document) in documents {
        let file = dir.join(name);
        fs::write(&file, format!("{document:#}\n")).map_err(|source| failed(&file, source))?;
    }
    let shards = shards(shape.tensors(), SHARD_BYTES_MAX);
    let count = shards.len();
    let name = |at: usize| match count {
        1 => "model.safetensors".to_owned(),
        _ => format!("model-{:05}-of-{count:05}.safetensors", at + 1),
    };
    if count > 1 {
        let file = dir.join("model.safetensors.index.json");
        let index = index(&shards, name);
        fs::write(&file, format!("{index:#}\n")).map_err(|source| failed(&file, source))?;
    }
    let total = shards.iter().flatten().map(Tensor::bytes).sum();
    let done = AtomicU64::new(0);
    let advance = |bytes| progress(done.fetch_add(bytes, Ordering::Relaxed) + bytes, total);
    for (at, tensors) in shards.iter().enumerate() {
        let file = dir.join(name(at));
        write_shard(&file, tensors, seed, &advance).map_err(|source| failed(&file, source))?;
    }
    Ok(())
}

/// Cuts the list into files of at most `bytes_max`; a tensor is never cut.
fn shards(tensors: Vec<Tensor>, bytes_max: u64) -> Vec<Vec<Tensor>> {
    let mut shards = vec![Vec::new()];
    let mut bytes = 0;
    for tensor in tensors {
        if bytes > 0 && bytes + tensor.bytes() > bytes_max {
            shards.push(Vec::new());
            bytes = 0;
        }
        bytes += tensor.bytes();
        if let Some(shard) = shards.last_mut() {
            shard.push(tensor);
        }
    }
    shards
}

fn index(shards: &[Vec<Tensor>], name: impl Fn(usize) -> String) -> Value {
    let total: u64 = shards.iter().flatten().map(Tensor::bytes).sum();
    let mut map = Map::new();
    for (at, shard) in shards.iter().enumerate() {
        map.extend(shard.iter().map(|tensor| (tensor.name.clone(), json!(name(at)))));
    }
    json!({"metadata": {"total_size": total}, "weight_map": map})
}

/// The header of a safetensors file: its length, 8 bytes little-endian, and that many bytes of
/// JSON, padded so that the data begins at a multiple of 64.
fn header(tensors: &[Tensor]) -> Vec<u8> {
    let mut map = Map::from_iter([("__metadata__".to_owned(), json!({"format": "pt"}))]);
    let mut offset = 0;
    for tensor in tensors {
        let end = offset + tensor.bytes();
        let entry = json!({"dtype": "BF16", "shape": tensor.shape, "data_offsets": [offset, end]});
        map.insert(tensor.name.clone(), entry);
        offset = end;
    }
    let mut json = Value::Object(map).to_string().into_bytes();
    json.resize((8 + json.len()).next_multiple_of(64) - 8, b' ');
    let mut header = (json.len() as u64).to_le_bytes().to_vec();
    header.append(&mut json);
    header
}

/// One file, its parts made and written by as many threads as there are cores.
fn write_shard(
    path: &Path,
    tensors: &[Tensor],
    seed: u64,
    advance: &(dyn Fn(u64) + Sync),
) -> io::Result<()> {
    let file = File::create(path)?;
    let header = header(tensors);
    file.write_all_at(&header, 0)?;
    // Each part: its tensor, its first value there, where it goes.
    let mut parts = Vec::new();
    let mut offset = header.len() as u64;
    for tensor in tensors {
        let chunks = (0..tensor.values()).step_by(CHUNK_VALUES);
        parts.extend(chunks.map(|first| (tensor, first, offset + 2 * first as u64)));
        offset += tensor.bytes();
    }
    let next = AtomicUsize::new(0);
    let work = || -> io::Result<()> {
        let mut bytes = Vec::with_capacity(2 * CHUNK_VALUES);
        let mut values: Option<(*const Tensor, Values)> = None;
        while let Some((tensor, first, offset)) = parts.get(next.fetch_add(1, Ordering::Relaxed)) {
            // Parts come in order, so a thread meets the same tensor several times in a row.
            let values = match &mut values {
                Some((of, values)) if std::ptr::eq(*of, *tensor) => values,
                slot => {
                    let fresh = Values::new(seed, &tensor.name, tensor.deviation);
                    &mut slot.insert((*tensor, fresh)).1
                }
            };
            bytes.clear();
            let len = CHUNK_VALUES.min(tensor.values() - first);
            values.append(*first, len, &mut bytes);
            file.write_all_at(&bytes, *offset)?;
            advance(bytes.len() as u64);
        }
        Ok(())
    };
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    std::thread::scope(|scope| {
        let workers: Vec<_> = (0..threads).map(|_| scope.spawn(work)).collect();
        let joined = workers.into_iter().map(|worker| worker.join().expect("no part panics"));
        joined.collect::<Vec<_>>().into_iter().collect()
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::chat::{Chat, ChatMessage};
    use crate::checkpoint::Storage;
    use crate::{ChatTemplate, Checkpoint, GenerationConfig, Tokenizer};

    #[test]
    fn a_folder_opens_like_any_other_checkpoint() {
        let dir = tempfile::tempdir().unwrap();
        write(dir.path(), &Shape::TINY, 7, &|_, _| {}).unwrap();
        let checkpoint = Checkpoint::open(dir.path()).unwrap();
        let arch = checkpoint.architecture();
        assert_eq!((arch.hidden, arch.layers.len(), arch.vocab), (64, 2, 1_024));
        let tokenizer = Tokenizer::open(dir.path(), arch).unwrap();
        assert_eq!(tokenizer.vocab_len(), 1_024);
        let generation = GenerationConfig::open(dir.path(), arch).unwrap();
        assert_eq!((generation.bos, generation.eos), (Some(1), vec![2]));
        let text = "Où est Åsa? 3 < 4 \u{1f980}\n";
        let ids = tokenizer.encode(text, true).unwrap();
        assert_eq!(ids[0], 1);
        assert_eq!(tokenizer.decode(&ids, true).unwrap(), text);
        let messages = [ChatMessage { role: "user".into(), content: "hi".into() }];
        let template = ChatTemplate::open(dir.path()).unwrap();
        let chat = Chat { messages: &messages, add_generation_prompt: true, now_s: 0 };
        let prompt = template.render(&chat, &tokenizer);
        assert!(prompt.is_ok());
    }

    #[test]
    fn weights_have_the_spread_that_their_scale_says() {
        let dir = tempfile::tempdir().unwrap();
        write(dir.path(), &Shape::TINY, 7, &|_, _| {}).unwrap();
        let checkpoint = Checkpoint::open(dir.path()).unwrap();
        let Storage::Tensors(tensors) = checkpoint.storage() else { panic!("it is packed") };
        let values = |name: &str, shape: &[usize]| tensors.tensor(name, shape).unwrap().to_f32();
        let embed = values("model.embed_tokens.weight", &[1_024, 64]);
        let mean = embed.iter().sum::<f32>() / embed.len() as f32;
        let variance = embed.iter().map(|v| (v - mean).powi(2)).sum::<f32>() / embed.len() as f32;
        assert!(mean.abs() < 0.02 && (variance - 1.0).abs() < 0.02, "{mean} {variance}");
        let down = "model.layers.1.block_sparse_moe.experts.7.w2.weight";
        let down = values(down, &[64, 128]);
        let variance = down.iter().map(|v| v * v).sum::<f32>() / down.len() as f32;
        // (2 / sqrt(2 layers) / sqrt(inner))^2
        assert!((variance * 128.0 - 1.0).abs() < 0.1, "{variance}");
        assert!(values("model.norm.weight", &[64]).iter().all(|v| *v == 1.0));
    }

    #[test]
    fn a_seed_names_the_bytes_and_shards_hold_everything_once() {
        let one = tempfile::tempdir().unwrap();
        let again = tempfile::tempdir().unwrap();
        let other = tempfile::tempdir().unwrap();
        for (dir, seed) in [(&one, 1), (&again, 1), (&other, 2)] {
            write(dir.path(), &Shape::TINY, seed, &|_, _| {}).unwrap();
        }
        let bytes =
            |dir: &tempfile::TempDir| fs::read(dir.path().join("model.safetensors")).unwrap();
        assert!(bytes(&one) == bytes(&again) && bytes(&one) != bytes(&other));
        let shards = shards(Shape::TINY.tensors(), 100_000);
        assert!(shards.len() > 2);
        let names: Vec<String> = shards.iter().flatten().map(|t| t.name.clone()).collect();
        let all: Vec<String> = Shape::TINY.tensors().into_iter().map(|t| t.name).collect();
        assert_eq!(names, all);
    }

    #[test]
    fn numbers_that_make_no_model_are_refused() {
        let dir = tempfile::tempdir().unwrap();
        for (shape, cause) in [
            (Shape { heads: 3, ..Shape::TINY }, "3 heads"),
            (Shape { kv_heads: 3, ..Shape::TINY }, "3 key and value heads"),
            (Shape { top_k: 9, ..Shape::TINY }, "9 experts a row"),
            (Shape { vocab: 10, ..Shape::TINY }, "10 tokens"),
            (Shape { layers: 0, ..Shape::TINY }, "at least 1"),
        ] {
            let error = write(dir.path(), &shape, 1, &|_, _| {}).unwrap_err().to_string();
            assert!(error.contains(cause), "{error}");
        }
    }
}
