//! `config.json` as Hugging Face writes it, in the style of transformers 4 and of transformers 5.
//!
//! What cannot be computed is refused here, by field: a model that is loaded with one of its
//! features left out answers nonsense without complaint, which is the worst thing it could do.

use std::path::Path;

use serde_json::Value;

use super::{
    Architecture, HEAD_DIM_MAX, HEADS_MAX, HIDDEN_MAX, LAYERS_MAX, LayerSpec, POSITIONS_MAX,
    RopeSpec, VOCAB_MAX,
};
use crate::ModelError;
use crate::family::{self, Family};
use crate::json::{Fields, excerpt, read_bounded};
use crate::kernels::Activation;

/// Longest configuration file that is read, in bytes. Real ones have a few thousand.
pub(crate) const CONFIG_BYTES_MAX: u64 = 4 << 20;

/// Reads `config.json` of a checkpoint folder.
pub(crate) fn read(dir: &Path) -> Result<(Architecture, &'static Family), ModelError> {
    let file = dir.join("config.json");
    let fields = Fields::parse(&file, &read_bounded(&file, CONFIG_BYTES_MAX)?)?;
    let family = family(&fields)?;
    refuse_unsupported(&fields)?;
    Ok((architecture(&fields, family)?, family))
}

fn family(fields: &Fields) -> Result<&'static Family, ModelError> {
    let names = fields.require("architectures", fields.list("architectures")?)?;
    let [Value::String(name)] = names.as_slice() else {
        return Err(fields.error("architectures", "expected a list with one name"));
    };
    family::find(name).ok_or_else(|| ModelError::UnsupportedArchitecture {
        file: fields.file().to_owned(),
        have: name.chars().take(80).collect(),
        supported: family::supported(),
    })
}

/// Features that change the arithmetic and that no kernel here computes.
fn refuse_unsupported(fields: &Fields) -> Result<(), ModelError> {
    for name in ["attention_bias", "mlp_bias"] {
        if fields.flag(name)? == Some(true) {
            return Err(fields.error(name, "biases are not supported"));
        }
    }
    if let Some(scheme) = fields.object("quantization_config")? {
        require_fp8(&scheme)?;
    }
    if fields.number("partial_rotary_factor", 0.0..=1.0)?.is_some_and(|factor| factor != 1.0) {
        let reason = "only whole heads can rotate, expected 1";
        return Err(fields.error("partial_rotary_factor", reason));
    }
    match fields.text("hidden_act")?.unwrap_or("silu") {
        "silu" | "swish" => Ok(()),
        other => {
            let reason = format!("unsupported activation {other:?}; supported: silu");
            Err(fields.error("hidden_act", reason))
        }
    }
}

/// The one quantisation that is read: e4m3 whose scales are for blocks of 128 by 128 or for whole
/// matrices. Which of the two, and which tensors, is seen from the tensors themselves. Activations are
/// not quantised here; a checkpoint with scales for them means something else.
fn require_fp8(scheme: &Fields) -> Result<(), ModelError> {
    let only = |field: &str, default: Option<&'static str>, wanted: &str| match scheme
        .text(field)?
        .or(default)
    {
        Some(have) if have == wanted => Ok(()),
        have => {
            let have: String = have.unwrap_or("nothing").chars().take(40).collect();
            let reason = format!("{have}, which is not supported; supported: {wanted}");
            Err(scheme.error(field, reason))
        }
    };
    only("quant_method", None, "fp8")?;
    only("fmt", Some("e4m3"), "e4m3")?;
    only("activation_scheme", Some("dynamic"), "dynamic")?;
    let Some(block) = scheme.list("weight_block_size")? else { return Ok(()) };
    if *block != [Value::from(128), Value::from(128)] {
        let have = excerpt(&Value::from(block.clone()));
        let reason = format!("{have}, which is not supported; supported: [128,128]");
        return Err(scheme.error("weight_block_size", reason));
    }
    Ok(())
}

fn architecture(fields: &Fields, family: &Family) -> Result<Architecture, ModelError> {
    let size = |name: &str, max: usize| fields.require(name, fields.whole(name, 1..=max)?);
    let vocab = size("vocab_size", VOCAB_MAX)?;
    let (hidden, heads) =
        (size("hidden_size", HIDDEN_MAX)?, size("num_attention_heads", HEADS_MAX)?);
    let kv_heads = size("num_key_value_heads", HEADS_MAX)?;
    if !heads.is_multiple_of(kv_heads) {
        let reason = format!("{kv_heads} does not divide num_attention_heads, {heads}");
        return Err(fields.error("num_key_value_heads", reason));
    }
    let head_dim = head_dim(fields, hidden, heads)?;
    // f32 cannot hold an epsilon below its smallest normal number; such a value is a mistake.
    let rms_eps = fields.number("rms_norm_eps", 1e-30..=1.0)?;
    Ok(Architecture {
        family: family.name,
        vocab,
        hidden,
        heads,
        kv_heads,
        head_dim,
        layers: layers(fields, family)?,
        activation: Activation::SwiGlu,
        rms_eps: fields.require("rms_norm_eps", rms_eps)? as f32,
        rope: rope(fields, head_dim)?,
        max_positions: size("max_position_embeddings", POSITIONS_MAX)?,
        tied_embeddings: fields.flag("tie_word_embeddings")?.unwrap_or(false),
        bos: fields.token_ids("bos_token_id", vocab)?.and_then(|ids| ids.first().copied()),
        eos: fields.token_ids("eos_token_id", vocab)?.unwrap_or_default(),
    })
}

/// `head_dim`, or `hidden_size / num_attention_heads` where it is absent.
fn head_dim(fields: &Fields, hidden: usize, heads: usize) -> Result<usize, ModelError> {
    let given = fields.whole("head_dim", 2..=HEAD_DIM_MAX)?;
    if given.is_none() && !hidden.is_multiple_of(heads) {
        let reason = format!("missing, and hidden_size {hidden} is no multiple of {heads} heads");
        return Err(fields.error("head_dim", reason));
    }
    let head_dim = given.unwrap_or(hidden / heads);
    if !head_dim.is_multiple_of(2) || !(2..=HEAD_DIM_MAX).contains(&head_dim) {
        let reason = format!("{head_dim}, expected an even number from 2 to {HEAD_DIM_MAX}");
        return Err(fields.error("head_dim", reason));
    }
    Ok(head_dim)
}

fn layers(fields: &Fields, family: &Family) -> Result<Vec<LayerSpec>, ModelError> {
    let count = fields.whole("num_hidden_layers", 1..=LAYERS_MAX)?;
    let count = fields.require("num_hidden_layers", count)?;
    let window = window(fields, family)?;
    let ffn = (family.ffn)(fields)?;
    let Some(kinds) = fields.list("layer_types")? else {
        return Ok(vec![LayerSpec { window, ffn }; count]);
    };
    if kinds.len() != count {
        let reason = format!("{} entries for {count} layers", kinds.len());
        return Err(fields.error("layer_types", reason));
    }
    let layer = |kind: &Value| match kind.as_str() {
        Some("full_attention") => Ok(LayerSpec { window: None, ffn }),
        Some("sliding_attention") if window.is_some() => Ok(LayerSpec { window, ffn }),
        _ => Err(fields.error("layer_types", format!("unsupported layer type {}", excerpt(kind)))),
    };
    kinds.iter().map(layer).collect()
}

/// `sliding_window`: a number, `null` for none, or absent for the family's default.
fn window(fields: &Fields, family: &Family) -> Result<Option<usize>, ModelError> {
    if fields.is_absent("sliding_window") {
        return Ok(family.window_default);
    }
    fields.whole("sliding_window", 1..=POSITIONS_MAX)
}

/// Old style: `rope_theta` and `rope_scaling`. New style: both within `rope_parameters`.
fn rope(fields: &Fields, dim: usize) -> Result<RopeSpec, ModelError> {
    const THETA: std::ops::RangeInclusive<f64> = 1.0..=1e30;
    let mut theta = fields.number("rope_theta", THETA)?;
    for name in ["rope_parameters", "rope_scaling"] {
        let Some(nested) = fields.object(name)? else { continue };
        for key in ["rope_type", "type"] {
            if let Some(kind) = nested.text(key)?.filter(|kind| *kind != "default") {
                let kind: String = kind.chars().take(40).collect();
                let reason = format!("unsupported rope type {kind:?}; supported: default");
                return Err(nested.error(key, reason));
            }
        }
        if nested.number("partial_rotary_factor", 0.0..=1.0)?.is_some_and(|factor| factor != 1.0) {
            let reason = "only whole heads can rotate, expected 1";
            return Err(nested.error("partial_rotary_factor", reason));
        }
        if let Some(inner) = nested.number("rope_theta", THETA)? {
            if theta.is_some_and(|outer| outer != inner) {
                return Err(nested.error("rope_theta", "contradicts the rope_theta outside"));
            }
            theta = Some(inner);
        }
    }
    Ok(RopeSpec { theta: fields.require("rope_theta", theta)?, dim })
}
