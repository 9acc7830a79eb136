//! Brings experts into memory while others are computed with: from the checkpoint folder, or from a
//! peer where the folder lacks them or has others than the manifest says.

use std::collections::{BTreeMap, BTreeSet};
use std::future::Future;
use std::sync::Arc;

use entente_model::kernels::{self, ExpertKernels, GatedFfn, UnsupportedCpu, WeightFormat};
use entente_model::{Checkpoint, load_experts};
use entente_proto::placement::ExpertKey;

use super::restore::Restorer;

/// Longest reason that is kept and told.
const REASON_LEN_MAX: usize = 256;

/// Loads experts on threads on which nothing is computed.
pub(crate) struct Loader {
    checkpoint: Checkpoint,
    /// Those that frames are computed with; they use all threads that the node may use.
    kernels: Arc<dyn ExpertKernels>,
    /// The same on one thread of their own: packing must not take its turn between frames.
    beside: Arc<dyn ExpertKernels>,
    /// Kernels of the processor: what is lent need not be where this node multiplies.
    lending: Arc<dyn ExpertKernels>,
    /// Absent without a manifest: nothing that a peer sends could be believed.
    restorer: Option<Restorer>,
}

/// What experts are loaded for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Purpose {
    /// To be held, before any frame is computed.
    Starting,
    /// To be held, while frames are computed: takes longer, and less from them.
    Serving,
    /// To be given to a peer.
    Lending,
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
        kernels: Arc<dyn ExpertKernels>,
        restorer: Option<Restorer>,
    ) -> Result<Self, UnsupportedCpu> {
        let lending: Arc<dyn ExpertKernels> = kernels::select(format, 1)?;
        // A device computes frames with other threads than those that pack.
        let beside = match kernels.device() {
            Some(_) => kernels.clone(),
            None => lending.clone(),
        };
        Ok(Self { checkpoint, kernels, beside, lending, restorer })
    }

    /// Loads the experts.
    pub(crate) fn load(
        self: Arc<Self>,
        experts: BTreeSet<ExpertKey>,
        purpose: Purpose,
    ) -> impl Future<Output = Outcome> + Send {
        let wanted = experts.clone();
        let loading = tokio::task::spawn_blocking(move || {
            let kernels = match purpose {
                Purpose::Starting => &self.kernels,
                Purpose::Serving => &self.beside,
                Purpose::Lending => &self.lending,
            };
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
        purpose: Purpose,
    ) -> Outcome {
        let Outcome { mut loaded, mut failed } = self.clone().load(experts, purpose).await;
        let Some(restorer) = &self.restorer else { return Outcome { loaded, failed } };
        for (key, reason) in std::mem::take(&mut failed) {
            let restored = restorer.restore(key).await;
            match self.place(restored).await {
                Ok(ffn) => drop(loaded.insert(key, ffn)),
                Err(theirs) => drop(failed.insert(key, short(&format!("{reason}; {theirs}")))),
            }
        }
        Outcome { loaded, failed }
    }

    /// Takes what a peer has sent to where it is multiplied.
    async fn place(&self, restored: Result<GatedFfn, String>) -> Result<GatedFfn, String> {
        let (ffn, kernels) = (restored?, self.kernels.clone());
        let placed = tokio::task::spawn_blocking(move || ffn.place(kernels.as_ref())).await;
        let stopped = |error| format!("loading it stopped: {error}");
        placed.map_err(stopped)?.map_err(|error| error.to_string())
    }

    /// All at once, and if that fails one by one, to know which is to blame.
    fn load_now(&self, experts: &BTreeSet<ExpertKey>, kernels: &dyn ExpertKernels) -> Outcome {
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
