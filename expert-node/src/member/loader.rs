//! Brings experts into memory while others are computed with: from the checkpoint folder, or from a
//! peer where the folder lacks them or has others than the manifest says.

use std::collections::{BTreeMap, BTreeSet};
use std::future::Future;
use std::sync::Arc;

use entente_model::kernels::{
    self, DeviceError, ExpertKernels, GatedFfn, UnsupportedCpu, WeightFormat,
};
use entente_model::{Checkpoint, ModelError, load_experts};
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
#[derive(Default)]
pub(crate) struct Outcome {
    pub(crate) loaded: BTreeMap<ExpertKey, GatedFfn>,
    pub(crate) failed: BTreeMap<ExpertKey, String>,
    /// Why the device took no more, if it was the device: that it is full concerns what failed
    /// alone, anything else all that the node holds.
    pub(crate) device: Option<DeviceError>,
}

impl Outcome {
    fn fail(&mut self, key: ExpertKey, reason: &str) {
        self.failed.insert(key, reason.chars().take(REASON_LEN_MAX).collect());
    }
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
                Outcome { failed, ..Outcome::default() }
            })
        }
    }

    /// The same, and what cannot be loaded is asked of peers.
    pub(crate) async fn load_or_restore(
        self: Arc<Self>,
        experts: BTreeSet<ExpertKey>,
        purpose: Purpose,
    ) -> Outcome {
        let mut outcome = self.clone().load(experts, purpose).await;
        let Some(restorer) = &self.restorer else { return outcome };
        for (key, reason) in std::mem::take(&mut outcome.failed) {
            // What the device does not take it does not take from a peer either.
            if outcome.device.is_some() {
                outcome.fail(key, &reason);
                continue;
            }
            match restorer.restore(key).await {
                Ok(ffn) => self.place(key, ffn, &mut outcome).await,
                Err(theirs) => outcome.fail(key, &format!("{reason}; {theirs}")),
            }
        }
        outcome
    }

    /// Takes what a peer has sent to where it is multiplied.
    async fn place(&self, key: ExpertKey, ffn: GatedFfn, outcome: &mut Outcome) {
        let kernels = self.kernels.clone();
        match tokio::task::spawn_blocking(move || ffn.place(kernels.as_ref())).await {
            Ok(Ok(ffn)) => drop(outcome.loaded.insert(key, ffn)),
            Ok(Err(error)) => {
                outcome.fail(key, &error.to_string());
                outcome.device = Some(error);
            }
            Err(stopped) => outcome.fail(key, &format!("loading it stopped: {stopped}")),
        }
    }

    /// All at once, and if that fails one by one, to know which is to blame; none any more once the
    /// device takes none.
    fn load_now(&self, experts: &BTreeSet<ExpertKey>, kernels: &dyn ExpertKernels) -> Outcome {
        let load = |experts: &_| load_experts(&self.checkpoint, kernels, experts, &());
        if let Ok(loaded) = load(experts) {
            return Outcome { loaded, ..Outcome::default() };
        }
        let mut outcome = Outcome::default();
        for key in experts {
            let loaded = match &outcome.device {
                Some(error) => Err(ModelError::Device(error.clone())),
                None => load(&BTreeSet::from([*key])),
            };
            match loaded {
                Ok(loaded) => outcome.loaded.extend(loaded),
                Err(error) => {
                    outcome.fail(*key, &error.to_string());
                    if let ModelError::Device(error) = error {
                        outcome.device = Some(error);
                    }
                }
            }
        }
        outcome
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicU64, Ordering};

    use entente_model::kernels::{
        DeviceMemory, FfnGroup, Kernels, Matrix, MatrixSource, WeightFormat, select,
    };
    use entente_proto::frame::Dtype;
    use entente_proto::ids::{ExpertId, KernelClass, LayerId};

    use super::*;

    const FORMAT: WeightFormat = WeightFormat::F32;

    /// Kernels with room for a number of matrices, or on a device that is lost.
    struct Far {
        near: Arc<dyn Kernels>,
        places: Arc<AtomicU64>,
        lost: bool,
    }

    /// One place, given back when it is dropped.
    struct Place(usize, Arc<AtomicU64>);

    impl DeviceMemory for Place {
        fn bytes(&self) -> usize {
            self.0
        }

        fn address(&self) -> u64 {
            0
        }

        fn read(&self, _: usize, _: &mut [u8]) -> Result<(), DeviceError> {
            Ok(())
        }
    }

    impl Drop for Place {
        fn drop(&mut self) {
            self.1.fetch_add(1, Ordering::SeqCst);
        }
    }

    impl ExpertKernels for Far {
        fn class(&self) -> &KernelClass {
            self.near.class()
        }

        fn format(&self) -> WeightFormat {
            self.near.format()
        }

        fn row_dtype(&self) -> Dtype {
            self.near.row_dtype()
        }

        fn pack(&self, source: MatrixSource<'_>) -> Result<Matrix, DeviceError> {
            self.place(self.near.pack(source)?)
        }

        fn place(&self, matrix: Matrix) -> Result<Matrix, DeviceError> {
            if self.lost {
                return Err(DeviceError::Lost("it fell off the bus".to_owned()));
            }
            let less = |places: u64| places.checked_sub(1);
            let full = DeviceError::OutOfMemory { wanted_bytes: 5, free_bytes: 4 };
            self.places.fetch_update(Ordering::SeqCst, Ordering::SeqCst, less).map_err(|_| full)?;
            let memory = Place(matrix.bytes(), self.places.clone());
            Ok(matrix.moved_to(Arc::new(memory)))
        }

        fn gated_ffn_encoded(
            &self,
            _: &[&[u8]],
            _: &[FfnGroup<'_>],
            _: &mut [u8],
        ) -> Result<(), DeviceError> {
            unreachable!("nothing is computed here")
        }
    }

    /// What comes of loading four experts with room for so many matrices.
    async fn load_four(places: u64, lost: bool) -> Outcome {
        let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/../tests/golden/mixtral");
        let places = Arc::new(AtomicU64::new(places));
        let far = Far { near: select(FORMAT, 1).unwrap(), places, lost };
        let checkpoint = Checkpoint::open(folder.as_ref()).unwrap();
        let loader = Arc::new(Loader::new(checkpoint, FORMAT, Arc::new(far), None).unwrap());
        let experts = (0..4).map(|expert| (LayerId(1), ExpertId(expert))).collect();
        loader.load_or_restore(experts, Purpose::Starting).await
    }

    #[tokio::test]
    async fn a_device_that_is_full_holds_what_fits_and_says_of_the_rest_what_was_lacking() {
        let outcome = load_four(7, false).await;
        let numbers = |keys: Vec<&ExpertKey>| keys.iter().map(|k| k.1.0).collect::<Vec<_>>();
        assert_eq!(numbers(outcome.loaded.keys().collect()), [0, 1]);
        assert_eq!(numbers(outcome.failed.keys().collect()), [2, 3]);
        let sentence = "out of device memory: 5 bytes wanted, 4 free";
        assert!(outcome.failed.values().all(|reason| reason == sentence), "{:?}", outcome.failed);
        assert!(matches!(outcome.device, Some(DeviceError::OutOfMemory { .. })));
        assert!(outcome.loaded.values().all(|ffn| ffn.down.device_memory().is_some()));
    }

    #[tokio::test]
    async fn a_device_that_is_lost_while_loading_is_told_from_one_that_is_full() {
        let outcome = load_four(100, true).await;
        assert_eq!((outcome.loaded.len(), outcome.failed.len()), (0, 4));
        assert!(matches!(outcome.device, Some(DeviceError::Lost(_))), "{:?}", outcome.device);
    }
}
