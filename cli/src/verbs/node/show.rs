//! `entente node show`.

use std::collections::BTreeMap;

use clap::Args;
use entente_membership::state::{Node, State};
use entente_proto::ids::NodeName;
use serde::Serialize;

use super::row::NodeRow;
use crate::cluster::columns;
use crate::operator::{OperatorArgs, find, or_dash};

/// The flags of `entente node show`.
#[derive(Debug, Args)]
pub struct ShowArgs {
    #[command(flatten)]
    operator: OperatorArgs,

    /// The member.
    name: NodeName,
}

/// The answer as JSON has it.
#[derive(Debug, Serialize)]
struct Shown {
    #[serde(flatten)]
    node: NodeRow,
    /// The experts that are placed on it, by layer.
    experts: BTreeMap<u16, Vec<u16>>,
}

/// Shows what is committed about one member, which any voter knows.
pub fn run(args: ShowArgs) -> anyhow::Result<()> {
    args.operator.run(async |operator| {
        let state = operator.state().await?;
        operator.print(&shown(&state, find(&state, &args.name)?), table)
    })
}

fn shown(state: &State, node: &Node) -> Shown {
    let mut experts: BTreeMap<u16, Vec<u16>> = BTreeMap::new();
    for (layer, expert) in state.placement().experts_of(node.id) {
        experts.entry(layer.0).or_default().push(expert.0);
    }
    Shown { node: NodeRow::committed(state, node), experts }
}

fn table(shown: &Shown) -> String {
    let node = &shown.node;
    let mut table = columns(["FIELD", "VALUE"]);
    let mut row = |field: &str, value: String| {
        table.add_row([field.to_owned(), value]);
    };
    row("name", node.name.clone());
    row("id", node.id.to_string());
    row("region", node.region.clone());
    row("site", or_dash((!node.site.is_empty()).then_some(&node.site)));
    row("role", node.role.to_owned());
    row("state", node.state.to_owned());
    row("cordoned", node.cordoned.to_string());
    row("incarnation", or_dash(node.incarnation));
    row("address", node.address.clone());
    row("memory_bytes", or_dash(node.memory_bytes));
    row("kernel_class", or_dash((!node.kernel_class.is_empty()).then_some(&node.kernel_class)));
    if let Some(device) = &node.device {
        row("device", device.name.clone());
        row("device_uuid", device.uuid.clone());
        row("device_memory_bytes", device.memory_bytes.to_string());
        row("device_bandwidth_bytes_s", or_dash(device.bandwidth_bytes_s));
    }
    row("placed", node.placed.to_string());
    for (layer, experts) in &shown.experts {
        let experts: Vec<String> = experts.iter().map(ToString::to_string).collect();
        row(&format!("layer {layer}"), experts.join(" "));
    }
    table.trim_fmt()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::verbs::node::testing;

    #[test]
    fn the_experts_of_a_node_are_shown_by_layer() {
        let state = testing::state();
        let node = state.node(&"fr-expert-1".parse().unwrap()).unwrap();
        let shown = shown(&state, node);
        assert_eq!(shown.experts, BTreeMap::from([(3, vec![0, 1])]));
        let text = table(&shown);
        assert!(text.lines().last().unwrap().contains("layer 3"), "{text}");
        assert_eq!(serde_json::to_value(&shown).unwrap()["experts"]["3"][1], 1);
    }
}
