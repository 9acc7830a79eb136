//! Brings experts from the checkpoint folder into memory while others are computed with.

use std::collections::{BTreeMap, BTreeSet};
use std::future::Future;
use std::sync::Arc;

use entente_model::kernels::{self, GatedFfn, Kernels, UnsupportedCpu, WeightFormat};
use entente_model::{Checkpoint, ModelError, load_experts};
use entente_proto::placement::ExpertKey;

/// Longest reason that is kept and told.
const REASON_LEN_MAX: usize = 256;

/// Loads experts on threads on which nothing is computed.
pub(crate) struct Loader {
    checkpoint: Checkpoint,
    /// Those that frames are computed with; they use all threads that the node may use.
    kernels: Arc<dyn Kernels>,
    /// The same on one thread of their own: packing must not take its turn between frames.
    beside: Arc<dyn Kernels>,
}

/// What came of a load.
pub(crate) struct Outcome {
    pub(crate) loaded: BTreeMap<ExpertKey, GatedFfn>,
    pub(crate) failed: BTreeMap<ExpertKey, String>,
}

impl Loader {
    pub(crate) fn new(
        checkpoint: Checkpoint,
        format: WeightFormat,
        kernels: Arc<dyn Kernels>,
    ) -> Result<Self, UnsupportedCpu> {
        Ok(Self { checkpoint, kernels, beside: kernels::select(format, 1)? })
    }

    /// Loads the experts; `beside_serving` takes longer, and less from the frames that are computed.
    pub(crate) fn load(
        self: Arc<Self>,
        experts: BTreeSet<ExpertKey>,
        beside_serving: bool,
    ) -> impl Future<Output = Outcome> + Send {
        let wanted = experts.clone();
        let loading = tokio::task::spawn_blocking(move || {
            let kernels = if beside_serving { &self.beside } else { &self.kernels };
            self.load_now(&wanted, kernels.as_ref())
        });
        async move {
            loading.await.unwrap_or_else(|error| {
                let reason = format!("loading it stopped: {error}");
                let failed = experts.into_iter().map(|key| (key, reason.clone())).collect();
                Outcome { loaded: BTreeMap::new(), failed }
            })
        }
    }

    /// All at once, and if that fails one by one, to know which is to blame.
    fn load_now(&self, experts: &BTreeSet<ExpertKey>, kernels: &dyn Kernels) -> Outcome {
        let load = |experts: &_| load_experts(&self.checkpoint, kernels, experts, &());
        let together = load(experts);
        if let Ok(loaded) = together {
            return Outcome { loaded, failed: BTreeMap::new() };
        }
        let mut outcome = Outcome { loaded: BTreeMap::new(), failed: BTreeMap::new() };
        for key in experts {
            match load(&BTreeSet::from([*key])) {
                Ok(loaded) => outcome.loaded.extend(loaded),
                Err(error) => drop(outcome.failed.insert(*key, short(&error))),
            }
        }
        outcome
    }
}

fn short(error: &ModelError) -> String {
    error.to_string().chars().take(REASON_LEN_MAX).collect()
}
