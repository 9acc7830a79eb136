//! Brings experts into memory while others are computed with: from the checkpoint folder, or from a
//! peer where the folder lacks them or has others than the manifest says.

use std::collections::{BTreeMap, BTreeSet};
use std::future::Future;
use std::sync::Arc;

use entente_model::kernels::{self, GatedFfn, Kernels, UnsupportedCpu, WeightFormat};
use entente_model::{Checkpoint, load_experts};
use entente_proto::placement::ExpertKey;

use super::restore::Restorer;

/// Longest reason that is kept and told.
const REASON_LEN_MAX: usize = 256;

/// Loads experts on threads on which nothing is computed.
pub(crate) struct Loader {
    checkpoint: Checkpoint,
    /// Those that frames are computed with; they use all threads that the node may use.
    kernels: Arc<dyn Kernels>,
    /// The same on one thread of their own: packing must not take its turn between frames.
    beside: Arc<dyn Kernels>,
    /// Absent without a manifest: nothing that a peer sends could be believed.
    restorer: Option<Restorer>,
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
        restorer: Option<Restorer>,
    ) -> Result<Self, UnsupportedCpu> {
        Ok(Self { checkpoint, kernels, beside: kernels::select(format, 1)?, restorer })
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

    /// The same, and what cannot be loaded is asked of peers.
    pub(crate) async fn load_or_restore(
        self: Arc<Self>,
        experts: BTreeSet<ExpertKey>,
        beside_serving: bool,
    ) -> Outcome {
        let Outcome { mut loaded, mut failed } = self.clone().load(experts, beside_serving).await;
        let Some(restorer) = &self.restorer else { return Outcome { loaded, failed } };
        for (key, reason) in std::mem::take(&mut failed) {
            match restorer.restore(key).await {
                Ok(ffn) => drop(loaded.insert(key, ffn)),
                Err(theirs) => drop(failed.insert(key, short(&format!("{reason}; {theirs}")))),
            }
        }
        Outcome { loaded, failed }
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
                Err(error) => drop(outcome.failed.insert(*key, short(&error.to_string()))),
            }
        }
        outcome
    }
}

fn short(reason: &str) -> String {
    reason.chars().take(REASON_LEN_MAX).collect()
}
