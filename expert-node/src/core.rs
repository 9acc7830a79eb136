//! Whether a frame may be computed: a pure function of the frame and of what the node is.
//!
//! The order matters. The region comes first: a frame that may not be here is refused before
//! anything else about it is looked at. The fence comes second: what was sent on the grounds of
//! another membership, placement, start or model means something else than it seems to. Refusals
//! never say which experts were chosen, since choices reveal text.

use std::collections::{BTreeMap, BTreeSet};

use entente_proto::frame::{Dispatch, Dtype, Refusal};
use entente_proto::ids::{Fence, LayerId, Region};
use entente_proto::placement::ExpertKey;

/// What a frame is held against.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NodeFacts {
    /// The country that the node stands in.
    pub region: Region,
    /// The only fence that is accepted. Lower epochs are stale; higher ones mean that the node has
    /// missed a commit, and it must not compute on what it no longer knows.
    pub fence: Fence,
    /// Values of a row of the model.
    pub hidden: usize,
    /// How rows of the node's kernel class are written.
    pub dtype: Dtype,
    /// The model's MoE layers and how many experts each has.
    pub layers: BTreeMap<LayerId, u16>,
    /// The experts that are loaded.
    pub held: BTreeSet<ExpertKey>,
}

/// Decides whether the frame may be computed, and says why not.
pub fn admit(frame: &Dispatch, facts: &NodeFacts, draining: bool) -> Result<(), Refusal> {
    if !frame.allowed_regions.contains(&facts.region) {
        return Err(Refusal::RegionRefused(format!("this node is in {}", facts.region)));
    }
    if frame.fence != facts.fence {
        return Err(Refusal::StaleFence(Box::new(facts.fence)));
    }
    if draining {
        return Err(Refusal::Draining);
    }
    if frame.hidden != facts.hidden {
        let (have, want) = (frame.hidden, facts.hidden);
        return Err(Refusal::Invalid(format!("hidden is {have}, the model's is {want}")));
    }
    if frame.dtype != facts.dtype {
        let (have, want) = (frame.dtype, facts.dtype);
        return Err(Refusal::Invalid(format!("dtype is {have:?}, this node's is {want:?}")));
    }
    let layer = frame.layer;
    let Some(experts) = facts.layers.get(&layer) else {
        return Err(Refusal::Invalid(format!("layer {layer} has no experts in this model")));
    };
    if frame.assignments.iter().any(|a| a.expert.0 >= *experts) {
        return Err(Refusal::Invalid(format!("layer {layer} has only {experts} experts")));
    }
    let lacking =
        frame.assignments.iter().filter(|a| !facts.held.contains(&(layer, a.expert))).count();
    if lacking > 0 {
        let of = frame.assignments.len();
        return Err(Refusal::NotHeld(format!("{lacking} of {of} assignments of layer {layer}")));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use entente_proto::frame::Assignment;
    use entente_proto::ids::{
        ExchangeId, ExpertId, Incarnation, MembershipEpoch, ModelDigest, PlacementEpoch,
    };

    fn facts() -> NodeFacts {
        NodeFacts {
            region: "fr".parse().unwrap(),
            fence: Fence {
                membership_epoch: MembershipEpoch(5),
                placement_epoch: PlacementEpoch(5),
                incarnation: Incarnation(5),
                model_digest: ModelDigest([5; 32]),
            },
            hidden: 2,
            dtype: Dtype::F32,
            layers: [(LayerId(1), 4)].into(),
            held: [(LayerId(1), ExpertId(3))].into(),
        }
    }

    fn frame() -> Dispatch {
        Dispatch {
            exchange: ExchangeId(1),
            fence: facts().fence,
            layer: LayerId(1),
            allowed_regions: ["fr".parse().unwrap(), "se".parse().unwrap()].into(),
            deadline_ms: 1,
            dtype: Dtype::F32,
            hidden: 2,
            assignments: vec![Assignment { row: 0, expert: ExpertId(3) }],
            rows: vec![0; 8].into(),
        }
    }

    #[test]
    fn a_frame_that_fits_is_admitted() {
        assert_eq!(admit(&frame(), &facts(), false), Ok(()));
    }

    #[test]
    fn a_fence_that_differs_in_anything_is_refused_with_the_nodes_own() {
        type Spoil = fn(&mut Fence);
        let cases: [Spoil; 6] = [
            |f| f.membership_epoch.0 -= 1,
            |f| f.membership_epoch.0 += 1,
            |f| f.placement_epoch.0 -= 1,
            |f| f.placement_epoch.0 += 1,
            |f| f.incarnation.0 -= 1,
            |f| f.model_digest.0[31] ^= 1,
        ];
        for spoil in cases {
            let mut frame = frame();
            spoil(&mut frame.fence);
            let refusal = admit(&frame, &facts(), false);
            assert_eq!(refusal, Err(Refusal::StaleFence(Box::new(facts().fence))));
        }
    }

    #[test]
    fn what_does_not_fit_is_refused_with_the_reason() {
        type Spoil = fn(&mut Dispatch);
        let cases: [(&str, Spoil); 6] = [
            ("region refused: this node is in fr", |f| {
                f.allowed_regions = ["se".parse().unwrap()].into();
            }),
            ("invalid frame: hidden is 3, the model's is 2", |f| f.hidden = 3),
            ("invalid frame: dtype is Bf16, this node's is F32", |f| f.dtype = Dtype::Bf16),
            ("invalid frame: layer 0 has no experts", |f| f.layer = LayerId(0)),
            ("invalid frame: layer 1 has only 4 experts", |f| {
                f.assignments[0].expert = ExpertId(4);
            }),
            ("expert not held: 1 of 1 assignments of layer 1", |f| {
                f.assignments[0].expert = ExpertId(0);
            }),
        ];
        for (reason, spoil) in cases {
            let mut frame = frame();
            spoil(&mut frame);
            let refusal = admit(&frame, &facts(), false).unwrap_err().to_string();
            assert!(refusal.starts_with(reason), "{refusal} does not say {reason}");
        }
        assert_eq!(admit(&frame(), &facts(), true), Err(Refusal::Draining));
    }

    #[test]
    fn a_forbidden_row_is_refused_for_its_region_whatever_else_is_wrong() {
        let mut frame = frame();
        frame.allowed_regions.clear();
        frame.fence.incarnation.0 = 0;
        frame.hidden = 9;
        assert!(matches!(admit(&frame, &facts(), true), Err(Refusal::RegionRefused(_))));
    }
}
