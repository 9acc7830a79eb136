//! The model digest; what it proves is told at [`super::Checkpoint::digest`].
//!
//! The text that is hashed is versioned and canonical: one line for each fact, in a fixed order,
//! with the numbers that the architecture holds rather than the bytes of `config.json`, so that a
//! configuration written by another version of transformers gives the same digest.

use entente_proto::ids::ModelDigest;
use sha2::{Digest, Sha256};

use super::Tensors;
use crate::ModelError;
use crate::config::{Architecture, FfnSpec, Scoring};
use crate::family::Role;

/// Changes whenever the hashed text does.
const VERSION: &str = "entente model digest 1";

pub(super) fn of(arch: &Architecture, tensors: &Tensors) -> Result<ModelDigest, ModelError> {
    let mut hash = Sha256::new();
    hash.update(describe(arch));
    for (name, entry) in tensors.entries() {
        hash.update(format!("tensor {name} {} {:?}\n", entry.dtype, entry.shape));
    }
    for want in tensors.expected(arch) {
        let view = tensors.tensor(&want.name, &want.shape)?;
        let bytes = match want.role {
            Role::Small => view.bytes,
            Role::Matrix => view.rows(0, 1).bytes,
            Role::Expert => continue,
        };
        // Name and length before the bytes, so that no two lists of values are written alike.
        hash.update(format!("values {} {}\n", want.name, bytes.len()));
        hash.update(bytes);
    }
    Ok(ModelDigest(hash.finalize().into()))
}

/// SHA-256 of the architecture alone.
pub(crate) fn of_architecture(arch: &Architecture) -> [u8; 32] {
    Sha256::digest(describe(arch)).into()
}

fn describe(arch: &Architecture) -> String {
    // Taken apart by name: a new field cannot be forgotten here.
    let Architecture {
        family,
        vocab,
        hidden,
        heads,
        kv_heads,
        head_dim,
        layers,
        activation,
        rms_eps,
        rope,
        max_positions,
        tied_embeddings,
        bos: _,
        eos: _,
    } = arch;
    let mut text = format!(
        "{VERSION}\nfamily {family}\nvocab {vocab}\nhidden {hidden}\n\
         heads {heads} {kv_heads} {head_dim}\nactivation {activation:?}\nrms_eps {:08x}\n\
         rope {:016x} {}\nmax_positions {max_positions}\ntied {tied_embeddings}\n",
        rms_eps.to_bits(),
        rope.theta.to_bits(),
        rope.dim,
    );
    for spec in layers {
        let window = spec.window.unwrap_or(0);
        let ffn = match spec.ffn {
            FfnSpec::Dense { inner } => format!("dense {inner}"),
            FfnSpec::Moe { experts, top_k, inner, scoring: Scoring::Softmax { renormalise } } => {
                format!("moe {experts} {top_k} {inner} softmax {renormalise}")
            }
        };
        text.push_str(&format!("layer window {window} {ffn}\n"));
    }
    text
}
