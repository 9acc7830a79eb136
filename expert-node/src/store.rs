//! The experts that this node holds, loaded and packed, and not a byte of any other.
//!
//! They come and go while frames are computed. Readers take a layer as it is at that moment and
//! keep it for as long as their frame lives: what is released meanwhile stays in memory until the
//! last frame that was admitted with it is answered. A change copies the pointers of one layer and
//! swaps one pointer; readers never wait for it.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};

use arc_swap::ArcSwap;
use entente_model::kernels::{DeviceError, GatedFfn};
use entente_model::packed::{self, Manifest};
use entente_proto::ids::{ExpertId, LayerId};
use entente_proto::placement::ExpertKey;

/// An expert in memory.
pub(crate) struct Expert {
    /// Its weights.
    pub(crate) ffn: GatedFfn,
    /// What they are; where no manifest says it, what they were when they were first looked at.
    sha256: OnceLock<[u8; 32]>,
    /// Rows that went through it since they were last taken.
    rows: AtomicU64,
}

impl Expert {
    /// Counts rows that went through it.
    pub(crate) fn count(&self, rows: usize) {
        self.rows.fetch_add(rows as u64, Ordering::Relaxed);
    }

    /// Whether its weights are still what they should be; `rest` and errors as for
    /// [`packed::sha256`].
    pub(crate) fn is_sound(&self, rest: impl FnMut(usize)) -> Result<bool, DeviceError> {
        let now = packed::sha256(&self.ffn, rest)?;
        Ok(*self.sha256.get_or_init(|| now) == now)
    }
}

/// What is held of one layer.
pub(crate) type Layer = BTreeMap<ExpertId, Arc<Expert>>;

type Layers = BTreeMap<LayerId, Arc<Layer>>;

/// The experts that are held now.
#[derive(Default)]
pub(crate) struct ExpertStore(ArcSwap<Layers>);

impl ExpertStore {
    /// What is held of a layer, which may be nothing.
    pub(crate) fn layer(&self, layer: LayerId) -> Arc<Layer> {
        self.0.load().get(&layer).cloned().unwrap_or_default()
    }

    /// Takes further experts in, which are what the manifest says, if there is one.
    pub(crate) fn hold(&self, experts: BTreeMap<ExpertKey, GatedFfn>, manifest: Option<&Manifest>) {
        let in_memory = |key, ffn| {
            let named = manifest.and_then(|manifest| manifest.expert(key));
            let sha256 = named.map(OnceLock::from).unwrap_or_default();
            Arc::new(Expert { ffn, sha256, rows: AtomicU64::new(0) })
        };
        let experts = experts.into_iter().map(|(key, ffn)| (key, in_memory(key, ffn)));
        let experts: Vec<_> = experts.collect();
        self.change(|layers| {
            for ((layer, id), expert) in &experts {
                Arc::make_mut(layers.entry(*layer).or_default()).insert(*id, expert.clone());
            }
        });
    }

    /// Lets experts go; those that are not held are no matter.
    pub(crate) fn release(&self, experts: &BTreeSet<ExpertKey>) {
        self.change(|layers| {
            for (layer, id) in experts {
                if let Some(held) = layers.get_mut(layer) {
                    Arc::make_mut(held).remove(id);
                }
            }
        });
    }

    fn change(&self, change: impl Fn(&mut Layers)) {
        self.0.rcu(|layers| {
            let mut changed = Layers::clone(layers);
            change(&mut changed);
            changed
        });
    }

    /// The experts held.
    pub(crate) fn keys(&self) -> BTreeSet<ExpertKey> {
        let layers = self.0.load();
        layers.iter().flat_map(|(layer, held)| held.keys().map(|id| (*layer, *id))).collect()
    }

    /// Bytes of memory that they take.
    pub(crate) fn bytes(&self) -> u64 {
        let layers = self.0.load();
        layers.values().flat_map(|held| held.values()).map(|e| e.ffn.bytes() as u64).sum()
    }

    /// Rows that went through each held expert since the last call, where there were any.
    pub(crate) fn take_rows(&self) -> Vec<(ExpertKey, u64)> {
        let layers = self.0.load();
        let all = layers.iter().flat_map(|(layer, held)| {
            held.iter().map(|(id, expert)| ((*layer, *id), expert.rows.swap(0, Ordering::Relaxed)))
        });
        all.filter(|(_, rows)| *rows > 0).collect()
    }
}
