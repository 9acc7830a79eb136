//! The record of the model that the cluster serves.
//!
//! A coordinator that has the model writes it once. Whoever leads plans by it, also a witness, which
//! has no model; and a node that has loaded another model, or compares its weights with another
//! manifest, is turned away.

use bytes::Bytes;
use entente_proto::ids::{LayerId, ModelDigest};
use entente_proto::placement::ModelShape;
use entente_proto::wire;
use prost::Message;

use crate::state::codec::Malformed;
use crate::state::{RecordKind, State};

/// The key of the one record of [`RecordKind::Model`].
pub const SERVED_MODEL_KEY: &str = "served";
/// Most layers with experts.
const LAYERS_MAX: usize = 1_024;

/// What the cluster agrees on about its model.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ServedModel {
    /// Which model it is.
    pub digest: ModelDigest,
    /// How many experts there are to place, and how large.
    pub shape: ModelShape,
    /// SHA-256 of the manifest that names all its weights, where whoever wrote the record had one.
    pub manifest_sha256: Option<[u8; 32]>,
}

/// What a process has is not what the cluster serves.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Differs {
    /// Another model.
    #[error("the cluster serves another model")]
    Model,
    /// The same model with other weights, or in another weight format.
    #[error("the cluster serves other weights than its manifest names")]
    Weights,
}

impl ServedModel {
    /// Compares what a process has. Where one side has no manifest there is nothing to compare.
    ///
    /// # Errors
    /// What differs.
    pub fn admits(&self, digest: &[u8], manifest_sha256: Option<&[u8]>) -> Result<(), Differs> {
        if self.digest.0 != digest {
            return Err(Differs::Model);
        }
        match (&self.manifest_sha256, manifest_sha256) {
            (Some(agreed), Some(theirs)) if agreed != theirs => Err(Differs::Weights),
            _ => Ok(()),
        }
    }

    /// The record's value.
    pub fn encode(&self) -> Bytes {
        let layer = |(layer, experts): &(LayerId, u16)| wire::MoeLayer {
            layer: layer.0.into(),
            experts: (*experts).into(),
        };
        let message = wire::ServedModel {
            digest: Bytes::copy_from_slice(&self.digest.0),
            layers: self.shape.layers.iter().map(layer).collect(),
            expert_bytes: self.shape.expert_bytes,
            manifest_sha256: self.manifest_sha256.map(|sha256| Bytes::copy_from_slice(&sha256)),
        };
        message.encode_to_vec().into()
    }

    /// Reads the record's value.
    pub fn decode(bytes: &[u8]) -> Result<Self, Malformed> {
        let what = "the served model";
        let message = wire::ServedModel::decode(bytes)
            .map_err(|error| Malformed::Prost { what, reason: error.to_string() })?;
        let digest = message.digest[..].try_into().map_err(|_| Malformed::Unknown("its digest"))?;
        let u16_of = |number| u16::try_from(number).map_err(|_| Malformed::Unknown("a layer"));
        let layer = |l: &wire::MoeLayer| Ok((LayerId(u16_of(l.layer)?), u16_of(l.experts)?));
        let (len, max) = (message.layers.len(), LAYERS_MAX);
        if len > max {
            return Err(Malformed::TooLong { what, len, max });
        }
        let layers = message.layers.iter().map(layer).collect::<Result<_, Malformed>>()?;
        let shape = ModelShape { layers, expert_bytes: message.expert_bytes };
        let sha256 = message.manifest_sha256.as_deref().map(<[u8; 32]>::try_from).transpose();
        let manifest_sha256 = sha256.map_err(|_| Malformed::Unknown("its manifest"))?;
        Ok(Self { digest: ModelDigest(digest), shape, manifest_sha256 })
    }

    /// The model that the cluster has agreed on, if it has.
    pub fn of(state: &State) -> Option<Result<Self, Malformed>> {
        let record = state.record(RecordKind::Model, SERVED_MODEL_KEY)?;
        Some(Self::decode(&record.value))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_served_model_survives_being_written_and_read_and_rubbish_is_refused() {
        let shape = ModelShape { layers: vec![(LayerId(1), 4), (LayerId(3), 8)], expert_bytes: 7 };
        for manifest_sha256 in [None, Some([8; 32])] {
            let digest = ModelDigest([9; 32]);
            let model = ServedModel { digest, shape: shape.clone(), manifest_sha256 };
            let bytes = model.encode();
            assert_eq!(ServedModel::decode(&bytes), Ok(model));
            assert!(ServedModel::decode(&bytes[1..]).is_err());
        }
    }

    #[test]
    fn another_model_and_another_manifest_differ_and_no_manifest_differs_from_none() {
        let shape = ModelShape { layers: vec![], expert_bytes: 7 };
        let named = |manifest_sha256| ServedModel {
            digest: ModelDigest([9; 32]),
            shape: shape.clone(),
            manifest_sha256,
        };
        let (some, none) = (named(Some([1; 32])), named(None));
        assert_eq!(some.admits(&[8; 32], Some(&[1; 32])), Err(Differs::Model));
        assert_eq!(some.admits(&[9; 32], Some(&[2; 32])), Err(Differs::Weights));
        assert_eq!(some.admits(&[9; 32], Some(&[])), Err(Differs::Weights));
        assert_eq!(some.admits(&[9; 32], Some(&[1; 32])), Ok(()));
        assert_eq!(some.admits(&[9; 32], None), Ok(()));
        assert_eq!(none.admits(&[9; 32], Some(&[2; 32])), Ok(()));
    }
}
