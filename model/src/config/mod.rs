//! The architecture of a model, as data.
//!
//! Everything after loading works from [`Architecture`] alone: it says what each layer is made of,
//! never which family it came from. A new family is a new way of filling this in (the private
//! module `family`) and, where it does something that no family did before, a new field or variant
//! that the compiler then asks every user about.
//!
//! Invariants of an [`Architecture`] that exists: `heads` is a multiple of `kv_heads`, `head_dim`
//! is even, `1 <= top_k <= experts`, every token id is below `vocab`, and every size is small
//! enough that the product of any two fits `usize`.

mod hf;

pub(crate) use hf::{CONFIG_BYTES_MAX, read};

use entente_proto::ids::{ExpertId, LayerId};

use crate::kernels::Activation;

/// Most decoder layers.
pub const LAYERS_MAX: usize = 1_024;
/// Most experts in one layer.
pub const EXPERTS_MAX: usize = 4_096;
/// Widest hidden state, in values; what a frame may carry.
pub const HIDDEN_MAX: usize = entente_proto::frame::HIDDEN_MAX;
/// Widest inner state of a feed-forward, in values.
pub const INNER_MAX: usize = 1 << 20;
/// Most attention heads.
pub const HEADS_MAX: usize = 1_024;
/// Widest head, in values.
pub const HEAD_DIM_MAX: usize = 1_024;
/// Most token ids.
pub const VOCAB_MAX: usize = 1 << 22;
/// Longest context, in tokens.
pub const POSITIONS_MAX: usize = 1 << 24;

/// What a decoder-only transformer is made of.
#[derive(Debug, Clone, PartialEq)]
pub struct Architecture {
    /// The family's name in `config.json`, such as `MixtralForCausalLM`.
    pub family: &'static str,
    /// Rows of the embedding and of the head: token ids are below this.
    pub vocab: usize,
    /// Values of one hidden row.
    pub hidden: usize,
    /// Query heads.
    pub heads: usize,
    /// Key and value heads; divides `heads`.
    pub kv_heads: usize,
    /// Values of one head; not always `hidden / heads`.
    pub head_dim: usize,
    /// The decoder layers, in order.
    pub layers: Vec<LayerSpec>,
    /// Joins gate and up in every feed-forward.
    pub activation: Activation,
    /// Added to the mean square in every RMSNorm.
    pub rms_eps: f32,
    /// How positions enter queries and keys.
    pub rope: RopeSpec,
    /// Longest context that the model was made for, in tokens.
    pub max_positions: usize,
    /// Whether the head is the embedding.
    pub tied_embeddings: bool,
    /// Starts a text, where the model has such a token.
    pub bos: Option<u32>,
    /// Each of these ends a text, unless `generation_config.json` says otherwise.
    pub eos: Vec<u32>,
}

/// One decoder layer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LayerSpec {
    /// Key `j` is visible to query `i` iff `0 <= i - j < window`; all earlier keys when absent.
    pub window: Option<usize>,
    /// What follows the attention.
    pub ffn: FfnSpec,
}

/// The feed-forward of a layer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FfnSpec {
    /// One gated feed-forward for every row; stays on the coordinator.
    Dense {
        /// Values of the inner state.
        inner: usize,
    },
    /// A mixture of experts; the experts live on expert nodes.
    Moe {
        /// Experts of the layer.
        experts: usize,
        /// Experts that each row goes through.
        top_k: usize,
        /// Values of the inner state of one expert.
        inner: usize,
        /// How gate logits become weights.
        scoring: Scoring,
    },
}

/// How gate logits become the weights of the chosen experts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Scoring {
    /// Softmax in f32 over all experts, then the `top_k` largest.
    Softmax {
        /// Whether the chosen weights are divided by their sum.
        renormalise: bool,
    },
}

/// Rotary position embedding with half-split pairing.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct RopeSpec {
    /// Base of the frequencies.
    pub theta: f64,
    /// Values of a head that rotate; even.
    pub dim: usize,
}

impl Architecture {
    /// The MoE layers and how many experts each has, in order of layer.
    pub fn moe_layers(&self) -> impl Iterator<Item = (LayerId, u16)> + '_ {
        // The limits above make both conversions exact.
        self.layers.iter().enumerate().filter_map(|(layer, spec)| match spec.ffn {
            FfnSpec::Moe { experts, .. } => Some((LayerId(layer as u16), experts as u16)),
            FfnSpec::Dense { .. } => None,
        })
    }

    /// Experts of a layer and values of the inner state of each; absent for a dense layer and for
    /// one that the model does not have.
    pub(crate) fn mixture(&self, layer: LayerId) -> Option<(usize, usize)> {
        match self.layers.get(usize::from(layer.0))?.ffn {
            FfnSpec::Moe { experts, inner, .. } => Some((experts, inner)),
            FfnSpec::Dense { .. } => None,
        }
    }

    /// Whether the model has this expert.
    pub fn has_expert(&self, layer: LayerId, expert: ExpertId) -> bool {
        self.mixture(layer).is_some_and(|(experts, _)| usize::from(expert.0) < experts)
    }
}
