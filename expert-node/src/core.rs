//! Whether a frame may be computed: a pure function of the frame and of what the node is.
//!
//! The order matters. The region comes first: a frame that may not be here is refused before
//! anything else about it is looked at. The fence comes second: what was sent on the grounds of
//! another membership, placement, start or model means something else than it seems to. Refusals
//! never say which experts were chosen, since choices reveal text.

use std::collections::BTreeMap;

use entente_proto::frame::{Dispatch, Dtype, Refusal};
use entente_proto::ids::{ExpertId, Fence, LayerId, Region};

/// How many commits a frame may be behind. Commits reach processes at different moments, so one
/// that its sender has not heard of yet is no fault; and a row computed under the placement before
/// the last is the same row.
const EPOCHS_BEHIND_MAX: u64 = 1;

/// What a frame is held against and never changes while the process lives.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NodeFacts {
    /// The country that the node stands in.
    pub region: Region,
    /// Values of a row of the model.
    pub hidden: usize,
    /// How rows of the node's kernel class are written.
    pub dtype: Dtype,
    /// The model's MoE layers and how many experts each has.
    pub layers: BTreeMap<LayerId, u16>,
}

/// What a frame is held against and changes: as it is at the moment when the frame comes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Standing {
    /// The node's start, its model, and the highest epochs that it has seen.
    pub fence: Fence,
    /// The node is about to end.
    pub draining: bool,
}

impl Standing {
    /// A frame for another start or another model is always stale; one that was sent on older
    /// epochs is, if they are more than [`EPOCHS_BEHIND_MAX`] behind. One that is ahead shows that
    /// the cluster has moved on, and is taken.
    fn is_stale(&self, sent: &Fence) -> bool {
        let own = &self.fence;
        let behind = |own: u64, sent: u64| own.saturating_sub(sent) > EPOCHS_BEHIND_MAX;
        sent.incarnation != own.incarnation
            || sent.model_digest != own.model_digest
            || behind(own.membership_epoch.0, sent.membership_epoch.0)
            || behind(own.placement_epoch.0, sent.placement_epoch.0)
    }
}

/// Decides whether the frame may be computed, and says why not. `holds` says which experts of the
/// frame's layer are loaded.
pub fn admit(
    frame: &Dispatch,
    facts: &NodeFacts,
    standing: &Standing,
    holds: impl Fn(ExpertId) -> bool,
) -> Result<(), Refusal> {
    if !frame.allowed_regions.contains(&facts.region) {
        return Err(Refusal::RegionRefused(format!("this node is in {}", facts.region)));
    }
    if standing.is_stale(&frame.fence) {
        return Err(Refusal::StaleFence(Box::new(standing.fence)));
    }
    if standing.draining {
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
    let lacking = frame.assignments.iter().filter(|a| !holds(a.expert)).count();
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
        ExchangeId, ExpertId, Incarnation, MembershipEpoch, ModelDigest, PlacementEpoch, RequestId,
    };

    fn facts() -> NodeFacts {
        NodeFacts {
            region: "fr".parse().unwrap(),
            hidden: 2,
            dtype: Dtype::F32,
            layers: [(LayerId(1), 4)].into(),
        }
    }

    fn standing() -> Standing {
        let fence = Fence {
            membership_epoch: MembershipEpoch(5),
            placement_epoch: PlacementEpoch(5),
            incarnation: Incarnation(5),
            model_digest: ModelDigest([5; 32]),
        };
        Standing { fence, draining: false }
    }

    fn frame() -> Dispatch {
        Dispatch {
            exchange: ExchangeId(1),
            fence: standing().fence,
            layer: LayerId(1),
            allowed_regions: ["fr".parse().unwrap(), "se".parse().unwrap()].into(),
            deadline_ms: 1,
            dtype: Dtype::F32,
            hidden: 2,
            assignments: vec![Assignment { row: 0, expert: ExpertId(3) }],
            requests: vec![(RequestId(1), 1)],
            rows: vec![0; 8].into(),
        }
    }

    /// A node that holds expert 3 alone.
    fn admitted(frame: &Dispatch, standing: &Standing) -> Result<(), Refusal> {
        admit(frame, &facts(), standing, |expert| expert == ExpertId(3))
    }

    type Spoil = fn(&mut Fence);

    #[test]
    fn a_frame_of_these_epochs_the_ones_before_or_any_later_is_admitted() {
        let cases: [Spoil; 6] = [
            |_| {},
            |f| f.membership_epoch.0 -= 1,
            |f| f.placement_epoch.0 -= 1,
            |f| (f.membership_epoch.0, f.placement_epoch.0) = (4, 4),
            |f| f.membership_epoch.0 = u64::MAX,
            |f| (f.membership_epoch.0, f.placement_epoch.0) = (6, 100),
        ];
        for (case, change) in cases.iter().enumerate() {
            let mut frame = frame();
            change(&mut frame.fence);
            assert_eq!(admitted(&frame, &standing()), Ok(()), "case {case}");
        }
    }

    #[test]
    fn a_fence_of_another_start_another_model_or_older_epochs_is_refused_with_the_nodes_own() {
        let cases: [Spoil; 7] = [
            |f| f.membership_epoch.0 -= 2,
            |f| f.placement_epoch.0 -= 2,
            |f| (f.membership_epoch.0, f.placement_epoch.0) = (0, 9),
            |f| (f.membership_epoch.0, f.placement_epoch.0) = (9, 0),
            |f| f.incarnation.0 -= 1,
            |f| f.incarnation.0 += 1,
            |f| f.model_digest.0[31] ^= 1,
        ];
        for (case, spoil) in cases.iter().enumerate() {
            let mut frame = frame();
            spoil(&mut frame.fence);
            let refusal = admitted(&frame, &standing());
            let own = Refusal::StaleFence(Box::new(standing().fence));
            assert_eq!(refusal, Err(own), "case {case}");
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
            let refusal = admitted(&frame, &standing()).unwrap_err().to_string();
            assert!(refusal.starts_with(reason), "{refusal} does not say {reason}");
        }
        let draining = Standing { draining: true, ..standing() };
        assert_eq!(admitted(&frame(), &draining), Err(Refusal::Draining));
    }

    #[test]
    fn a_forbidden_row_is_refused_for_its_region_whatever_else_is_wrong() {
        let mut frame = frame();
        frame.allowed_regions.clear();
        frame.fence.incarnation.0 = 0;
        frame.hidden = 9;
        let draining = Standing { draining: true, ..standing() };
        assert!(matches!(admitted(&frame, &draining), Err(Refusal::RegionRefused(_))));
    }
}
