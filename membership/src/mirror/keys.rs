//! A state as keys and values, and what changes between two of them. Pure.

use std::collections::BTreeMap;

use entente_proto::ids::{LayerId, NodeId};
use serde_json::json;

use crate::state::{Node, State};

/// What must be done to one key.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Change {
    Put(String, String),
    Delete(String),
}

impl Change {
    pub(super) fn key(&self) -> &str {
        match self {
            Self::Put(key, _) | Self::Delete(key) => key,
        }
    }
}

/// Everything that is shown of a state, under `root`, which ends with a slash.
pub fn keys(root: &str, state: &State) -> BTreeMap<String, String> {
    let epochs = json!({
        "index": state.applied_index(),
        "membership": state.membership_epoch().0,
        "placement": state.placement_epoch().0,
    });
    let nodes = state.nodes().map(|node| {
        let key = format!("{root}nodes/{}", node.spec.name);
        (key, node_value(node))
    });
    let layers = layers(state).into_iter().map(|(layer, experts)| {
        let key = format!("{root}placement/{}", layer.0);
        (key, json!(experts).to_string())
    });
    nodes.chain(layers).chain([(format!("{root}epochs"), epochs.to_string())]).collect()
}

fn node_value(node: &Node) -> String {
    json!({
        "address": node.spec.address,
        "cordoned": node.cordoned,
        "incarnation": node.incarnation.map(|incarnation| incarnation.0),
        "region": node.spec.region.to_string(),
        "role": node.spec.role.name(),
        "site": node.spec.site,
        "state": node.state.name(),
    })
    .to_string()
}

/// The names of the nodes that hold each expert, by layer.
fn layers(state: &State) -> BTreeMap<LayerId, BTreeMap<u16, Vec<String>>> {
    let name = |id: &NodeId| {
        state.node_by_id(*id).map_or_else(|| id.to_string(), |node| node.spec.name.to_string())
    };
    let mut layers: BTreeMap<LayerId, BTreeMap<u16, Vec<String>>> = BTreeMap::new();
    for ((layer, expert), nodes) in state.placement().iter() {
        let names = nodes.iter().map(name).collect();
        layers.entry(layer).or_default().insert(expert.0, names);
    }
    layers
}

/// What leads from one set of keys to another.
pub(super) fn changes(
    from: &BTreeMap<String, String>,
    to: &BTreeMap<String, String>,
) -> Vec<Change> {
    let puts = to.iter().filter(|(key, value)| from.get(*key) != Some(value));
    let deletes = from.keys().filter(|key| !to.contains_key(*key));
    let puts = puts.map(|(key, value)| Change::Put(key.clone(), value.clone()));
    puts.chain(deletes.map(|key| Change::Delete(key.clone()))).collect()
}

/// The index in a value of `epochs`; none in what is no such value.
pub(super) fn index_in(epochs: &str) -> Option<u64> {
    let value: serde_json::Value = serde_json::from_str(epochs).ok()?;
    value.get("index")?.as_u64()
}
