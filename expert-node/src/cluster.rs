//! From a roster and a model to what the cluster has agreed on.
//!
//! Until raft carries the agreement, each process computes it from the same inputs. Both kinds of
//! process call this one function, so that they cannot differ.

use entente_membership::roster::Roster;
use entente_membership::state::{Command, State};
use entente_model::kernels::WeightFormat;
use entente_model::{Checkpoint, expert_bytes};
use entente_router::placement::{self, ModelShape};

use crate::Error;

/// The cluster that the roster founds, with the model's experts placed on its nodes. Membership
/// and placement are at epoch 1.
pub fn found(
    roster: &Roster,
    checkpoint: &Checkpoint,
    format: WeightFormat,
) -> Result<State, Error> {
    let shape = ModelShape {
        layers: checkpoint.architecture().moe_layers().collect(),
        expert_bytes: expert_bytes(checkpoint, format)?,
    };
    let placement = placement::plan(&roster.placement_nodes(), &shape, roster.replicas())?;
    let mut state = State::new();
    state.apply(roster.found())?;
    state.apply(Command::SetPlacement(placement))?;
    Ok(state)
}
