//! What the model's makers recommend for sampling, and which tokens end a text.

use std::path::Path;

use crate::ModelError;
use crate::config::{Architecture, CONFIG_BYTES_MAX, POSITIONS_MAX};
use crate::json::{Fields, read_optional};

/// `generation_config.json`. Every value is a default that a request may override.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct GenerationConfig {
    /// Starts a text.
    pub bos: Option<u32>,
    /// Each of these ends a text.
    pub eos: Vec<u32>,
    /// Whether to sample at all; greedy when `false`.
    pub do_sample: Option<bool>,
    /// Divides the logits.
    pub temperature: Option<f32>,
    /// Smallest set of tokens with at least this probability.
    pub top_p: Option<f32>,
    /// This many most probable tokens; 0 for all.
    pub top_k: Option<u32>,
    /// Tokens with at least this share of the largest probability.
    pub min_p: Option<f32>,
    /// Divides or multiplies the logits of tokens that occurred before.
    pub repetition_penalty: Option<f32>,
    /// Most tokens of an answer.
    pub max_new_tokens: Option<u32>,
}

impl GenerationConfig {
    /// Reads the file of a checkpoint folder. Where the file is absent, or silent about the tokens
    /// that start and end a text, `config.json` counts.
    pub fn open(dir: &Path, arch: &Architecture) -> Result<Self, ModelError> {
        let file = dir.join("generation_config.json");
        let mut config = match read_optional(&file, CONFIG_BYTES_MAX)? {
            Some(bytes) => Self::read(&Fields::parse(&file, &bytes)?, arch.vocab)?,
            None => Self::default(),
        };
        config.bos = config.bos.or(arch.bos);
        if config.eos.is_empty() {
            config.eos.clone_from(&arch.eos);
        }
        Ok(config)
    }

    fn read(fields: &Fields, vocab: usize) -> Result<Self, ModelError> {
        let single =
            |name, max| Ok::<_, ModelError>(fields.number(name, 0.0..=max)?.map(|v| v as f32));
        // Both limits are far below 2^32.
        let count =
            |name, min, max| Ok::<_, ModelError>(fields.whole(name, min..=max)?.map(|v| v as u32));
        Ok(Self {
            bos: fields.token_ids("bos_token_id", vocab)?.and_then(|ids| ids.first().copied()),
            eos: fields.token_ids("eos_token_id", vocab)?.unwrap_or_default(),
            do_sample: fields.flag("do_sample")?,
            temperature: single("temperature", 100.0)?,
            top_p: single("top_p", 1.0)?,
            top_k: count("top_k", 0, 1 << 30)?,
            min_p: single("min_p", 1.0)?,
            repetition_penalty: single("repetition_penalty", 100.0)?,
            max_new_tokens: count("max_new_tokens", 1, POSITIONS_MAX)?,
        })
    }
}
