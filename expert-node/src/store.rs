//! The experts that are placed on this node, loaded and packed, and not a byte of any other.

use std::collections::{BTreeMap, BTreeSet};

use entente_model::kernels::{GatedFfn, Kernels};
use entente_model::{Checkpoint, ModelError, Progress, load_experts};
use entente_proto::placement::ExpertKey;

/// The loaded experts. Does not change once loaded.
pub(crate) struct ExpertStore {
    experts: BTreeMap<ExpertKey, GatedFfn>,
}

impl ExpertStore {
    /// Loads the placed experts, telling `progress` after each.
    pub(crate) fn load(
        checkpoint: &Checkpoint,
        kernels: &dyn Kernels,
        placed: &BTreeSet<ExpertKey>,
        progress: &dyn Progress,
    ) -> Result<Self, ModelError> {
        Ok(Self { experts: load_experts(checkpoint, kernels, placed, progress)? })
    }

    /// A store of experts that come from no checkpoint.
    #[cfg(test)]
    pub(crate) fn of(experts: BTreeMap<ExpertKey, GatedFfn>) -> Self {
        Self { experts }
    }

    /// The expert, if it is held.
    pub(crate) fn get(&self, expert: ExpertKey) -> Option<&GatedFfn> {
        self.experts.get(&expert)
    }

    /// The experts held.
    pub(crate) fn keys(&self) -> BTreeSet<ExpertKey> {
        self.experts.keys().copied().collect()
    }

    /// Bytes of memory that they take.
    pub(crate) fn bytes(&self) -> u64 {
        self.experts.values().map(|ffn| ffn.bytes() as u64).sum()
    }
}
