//! Model families, as data: what a family's `config.json` calls its feed-forward, and what its
//! tensors are called.
//!
//! A family is one entry of [`FAMILIES`]. It turns configuration fields into
//! [`FfnSpec`](crate::config::FfnSpec)s and lists tensor names; it has no code on the path of a
//! token. Everything it shares with its relatives (attention, norms, embeddings) is read in one
//! place, `config::hf`.
//!
//! The same model is found under different names: Mixtral's experts as released are one tensor
//! each, transformers 5 fuses those of a layer into two. Hence [`Layout`]: the names that one
//! checkpoint uses, found by looking at which gate it has.

use crate::ModelError;
use crate::config::{Architecture, EXPERTS_MAX, FfnSpec, INNER_MAX, Scoring};
use crate::json::Fields;

/// One model family.
pub(crate) struct Family {
    /// Its name in `architectures` of `config.json`.
    pub name: &'static str,
    /// The window of a configuration that does not mention `sliding_window`, as in transformers.
    pub window_default: Option<usize>,
    /// Reads the feed-forward of the layers.
    pub ffn: fn(&Fields) -> Result<FfnSpec, ModelError>,
    /// Tensor names.
    pub names: Names,
}

/// The families that are built.
pub(crate) static FAMILIES: [Family; 2] = [
    Family {
        name: "MixtralForCausalLM",
        window_default: None,
        ffn: mixtral_ffn,
        names: Names { moe: &[MIXTRAL_RELEASED, MIXTRAL_FUSED], ..MISTRAL },
    },
    Family {
        name: "MistralForCausalLM",
        window_default: Some(4_096),
        ffn: mistral_ffn,
        names: MISTRAL,
    },
];

/// The family of this name.
pub(crate) fn find(name: &str) -> Option<&'static Family> {
    FAMILIES.iter().find(|family| family.name == name)
}

/// The names of all families, for an error message.
pub(crate) fn supported() -> String {
    FAMILIES.each_ref().map(|family| family.name).join(", ")
}

fn mistral_ffn(fields: &Fields) -> Result<FfnSpec, ModelError> {
    let inner = fields.whole("intermediate_size", 1..=INNER_MAX)?;
    Ok(FfnSpec::Dense { inner: fields.require("intermediate_size", inner)? })
}

/// Every layer is a mixture; the chosen weights are always renormalised.
fn mixtral_ffn(fields: &Fields) -> Result<FfnSpec, ModelError> {
    let inner = fields.whole("intermediate_size", 1..=INNER_MAX)?;
    let experts = fields.whole("num_local_experts", 1..=EXPERTS_MAX)?;
    let experts = fields.require("num_local_experts", experts)?;
    let top_k = fields.whole("num_experts_per_tok", 1..=experts)?;
    Ok(FfnSpec::Moe {
        experts,
        top_k: fields.require("num_experts_per_tok", top_k)?,
        inner: fields.require("intermediate_size", inner)?,
        scoring: Scoring::Softmax { renormalise: true },
    })
}

/// Tensor names. `{L}` stands for the layer and `{E}` for the expert.
#[derive(Clone, Copy)]
pub(crate) struct Names {
    pub embed: &'static str,
    pub norm: &'static str,
    pub head: &'static str,
    pub input_norm: &'static str,
    pub q: &'static str,
    pub k: &'static str,
    pub v: &'static str,
    pub o: &'static str,
    pub post_norm: &'static str,
    pub dense: GatedNames,
    /// The ways in which checkpoints of the family name a mixture.
    pub moe: &'static [MoeNames],
    /// Endings of tensors that some checkpoints carry and nobody needs.
    pub ignored: &'static [&'static str],
}

/// The three matrices of a gated feed-forward.
#[derive(Clone, Copy)]
pub(crate) struct GatedNames {
    pub gate: &'static str,
    pub up: &'static str,
    pub down: &'static str,
}

/// The tensors of a mixture of experts.
#[derive(Clone, Copy)]
pub(crate) struct MoeNames {
    /// The gate, `[experts, hidden]`.
    pub router: &'static str,
    pub experts: ExpertNames,
}

/// How the experts of a layer are stored.
#[derive(Clone, Copy)]
pub(crate) enum ExpertNames {
    /// Three matrices for each expert.
    Separate(GatedNames),
    /// Two tensors for all experts: `[experts, 2 inner, hidden]`, gate rows first, and
    /// `[experts, hidden, inner]`.
    Fused { gate_up: &'static str, down: &'static str },
}

const MISTRAL: Names = Names {
    embed: "model.embed_tokens.weight",
    norm: "model.norm.weight",
    head: "lm_head.weight",
    input_norm: "model.layers.{L}.input_layernorm.weight",
    q: "model.layers.{L}.self_attn.q_proj.weight",
    k: "model.layers.{L}.self_attn.k_proj.weight",
    v: "model.layers.{L}.self_attn.v_proj.weight",
    o: "model.layers.{L}.self_attn.o_proj.weight",
    post_norm: "model.layers.{L}.post_attention_layernorm.weight",
    dense: GatedNames {
        gate: "model.layers.{L}.mlp.gate_proj.weight",
        up: "model.layers.{L}.mlp.up_proj.weight",
        down: "model.layers.{L}.mlp.down_proj.weight",
    },
    moe: &[],
    ignored: &[".rotary_emb.inv_freq"],
};

const MIXTRAL_RELEASED: MoeNames = MoeNames {
    router: "model.layers.{L}.block_sparse_moe.gate.weight",
    experts: ExpertNames::Separate(GatedNames {
        gate: "model.layers.{L}.block_sparse_moe.experts.{E}.w1.weight",
        up: "model.layers.{L}.block_sparse_moe.experts.{E}.w3.weight",
        down: "model.layers.{L}.block_sparse_moe.experts.{E}.w2.weight",
    }),
};

const MIXTRAL_FUSED: MoeNames = MoeNames {
    router: "model.layers.{L}.mlp.gate.weight",
    experts: ExpertNames::Fused {
        gate_up: "model.layers.{L}.mlp.experts.gate_up_proj",
        down: "model.layers.{L}.mlp.experts.down_proj",
    },
};

/// Fills the layer into a name.
pub(crate) fn in_layer(name: &str, layer: usize) -> String {
    name.replace("{L}", &layer.to_string())
}

/// Fills layer and expert into a name.
pub(crate) fn of_expert(name: &str, layer: usize, expert: usize) -> String {
    in_layer(name, layer).replace("{E}", &expert.to_string())
}

/// The names that one checkpoint uses.
pub(crate) struct Layout {
    pub names: &'static Names,
    /// Absent for a family without mixtures.
    pub moe: Option<&'static MoeNames>,
}

/// What a tensor is, as far as its handling differs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Role {
    /// A norm or a gate: small, and different in every fine-tune that trains it.
    Small,
    /// A matrix that the coordinator holds.
    Matrix,
    /// Part of an expert.
    Expert,
}

/// A tensor that the architecture calls for.
pub(crate) struct Expected {
    pub name: String,
    pub shape: Vec<usize>,
    pub role: Role,
}

impl Layout {
    /// Finds out which names the checkpoint uses; `has` tells whether it holds a tensor. Where it
    /// holds no gate at all the first style is assumed, and the gate is then reported as missing.
    pub fn of(family: &'static Family, arch: &Architecture, has: impl Fn(&str) -> bool) -> Self {
        let first = arch.moe_layers().next().map_or(0, |(layer, _)| usize::from(layer.0));
        let styles = family.names.moe;
        let used = styles.iter().find(|style| has(&in_layer(style.router, first)));
        Self { names: &family.names, moe: used.or(styles.first()) }
    }

    /// Every tensor that the architecture calls for, layer by layer: a configuration may promise
    /// far more of them than any file holds, so the whole list is never built.
    pub fn expected<'a>(&'a self, arch: &'a Architecture) -> impl Iterator<Item = Expected> + 'a {
        let mut outer = Inventory::default();
        outer.add(Role::Matrix, self.names.embed, &[arch.vocab, arch.hidden]);
        outer.add(Role::Small, self.names.norm, &[arch.hidden]);
        if !arch.tied_embeddings {
            outer.add(Role::Matrix, self.names.head, &[arch.vocab, arch.hidden]);
        }
        let layers = 0..arch.layers.len();
        outer.tensors.into_iter().chain(layers.flat_map(|layer| self.expected_in(arch, layer)))
    }

    fn expected_in(&self, arch: &Architecture, layer: usize) -> Vec<Expected> {
        let (names, hidden) = (self.names, arch.hidden);
        let (q, kv) = (arch.heads * arch.head_dim, arch.kv_heads * arch.head_dim);
        let mut list = Inventory { layer, tensors: Vec::new() };
        list.add(Role::Small, names.input_norm, &[hidden]);
        list.add(Role::Small, names.post_norm, &[hidden]);
        list.add(Role::Matrix, names.q, &[q, hidden]);
        list.add(Role::Matrix, names.k, &[kv, hidden]);
        list.add(Role::Matrix, names.v, &[kv, hidden]);
        list.add(Role::Matrix, names.o, &[hidden, q]);
        match (arch.layers[layer].ffn, self.moe) {
            (FfnSpec::Moe { experts, inner, .. }, Some(moe)) => {
                list.add(Role::Small, moe.router, &[experts, hidden]);
                list.experts(moe, experts, inner, hidden);
            }
            (FfnSpec::Dense { inner } | FfnSpec::Moe { inner, .. }, _) => {
                list.gated(Role::Matrix, &names.dense, 0, inner, hidden);
            }
        }
        list.tensors
    }

    /// Whether a tensor that nothing calls for may be there all the same.
    pub fn ignores(&self, name: &str) -> bool {
        name == self.names.head || self.names.ignored.iter().any(|end| name.ends_with(end))
    }
}

#[derive(Default)]
struct Inventory {
    layer: usize,
    tensors: Vec<Expected>,
}

impl Inventory {
    fn add(&mut self, role: Role, name: &str, shape: &[usize]) {
        let name = in_layer(name, self.layer);
        self.tensors.push(Expected { name, shape: shape.to_vec(), role });
    }

    fn gated(
        &mut self,
        role: Role,
        names: &GatedNames,
        expert: usize,
        inner: usize,
        hidden: usize,
    ) {
        let of = |name| of_expert(name, self.layer, expert);
        let (gate, up, down) = (of(names.gate), of(names.up), of(names.down));
        self.add(role, &gate, &[inner, hidden]);
        self.add(role, &up, &[inner, hidden]);
        self.add(role, &down, &[hidden, inner]);
    }

    fn experts(&mut self, moe: &MoeNames, experts: usize, inner: usize, hidden: usize) {
        match &moe.experts {
            ExpertNames::Separate(names) => {
                (0..experts).for_each(|e| self.gated(Role::Expert, names, e, inner, hidden));
            }
            ExpertNames::Fused { gate_up, down } => {
                self.add(Role::Expert, gate_up, &[experts, 2 * inner, hidden]);
                self.add(Role::Expert, down, &[experts, hidden, inner]);
            }
        }
    }
}
