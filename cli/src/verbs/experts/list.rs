//! `entente experts ls`: the committed placement.

use std::collections::BTreeMap;

use clap::Args;
use entente_membership::state::State;
use entente_proto::ids::{NodeId, NodeName};
use serde::Serialize;

use crate::cluster::columns;
use crate::operator::{OperatorArgs, find};

/// The flags of `entente experts ls`.
#[derive(Debug, Args)]
pub struct LsArgs {
    #[command(flatten)]
    operator: OperatorArgs,

    /// Only this layer, counted from 0 as in the checkpoint.
    #[arg(long, env = "ENTENTE_LAYER", value_name = "LAYER")]
    layer: Option<u16>,

    /// Only what this node holds.
    #[arg(long, env = "ENTENTE_NODE", value_name = "NAME")]
    node: Option<NodeName>,
}

/// The answer as JSON has it.
#[derive(Debug, PartialEq, Eq, Serialize)]
pub struct Listed {
    placement_epoch: u64,
    /// Replicas of each expert that each region should have.
    replicas: BTreeMap<String, u16>,
    experts: Vec<ExpertRow>,
}

/// One expert and the nodes that hold it.
#[derive(Debug, PartialEq, Eq, Serialize)]
pub struct ExpertRow {
    layer: u16,
    expert: u16,
    nodes: Vec<String>,
}

/// Lists what any voter knows.
pub fn run(args: LsArgs) -> anyhow::Result<()> {
    args.operator.run(async |operator| {
        let state = operator.state().await?;
        let node = match &args.node {
            Some(name) => Some(find(&state, name)?.id),
            None => None,
        };
        operator.print(&listed(&state, args.layer, node), |listed| table(&listed.experts))
    })
}

fn listed(state: &State, layer: Option<u16>, node: Option<NodeId>) -> Listed {
    let rows = state.placement().iter().filter(|((l, _), nodes)| {
        layer.is_none_or(|layer| layer == l.0) && node.is_none_or(|node| nodes.contains(&node))
    });
    let row = |((layer, expert), nodes): ((_, _), &_)| row(state, layer, expert, nodes);
    Listed {
        placement_epoch: state.placement_epoch().0,
        replicas: state.replicas().iter().map(|(region, n)| (region.to_string(), *n)).collect(),
        experts: rows.map(row).collect(),
    }
}

/// One expert with the names of its nodes; a number that is no member stays a number.
pub fn row<'a>(
    state: &State,
    layer: entente_proto::ids::LayerId,
    expert: entente_proto::ids::ExpertId,
    nodes: impl IntoIterator<Item = &'a NodeId>,
) -> ExpertRow {
    let name = |id: &NodeId| match state.node_by_id(*id) {
        Some(node) => node.spec.name.to_string(),
        None => id.to_string(),
    };
    ExpertRow { layer: layer.0, expert: expert.0, nodes: nodes.into_iter().map(name).collect() }
}

/// A line an expert.
pub fn table(rows: &[ExpertRow]) -> String {
    let mut table = columns(["LAYER", "EXPERT", "REPLICAS", "NODES"]);
    for row in rows {
        let count = row.nodes.len().to_string();
        table.add_row([row.layer.to_string(), row.expert.to_string(), count, row.nodes.join(" ")]);
    }
    table.trim_fmt()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::verbs::node::testing;

    #[test]
    fn experts_are_listed_by_layer_and_by_node() {
        let state = testing::state();
        let all = listed(&state, Some(3), None);
        let both = vec!["fr-expert-1".to_owned(), "fr-expert-2".to_owned()];
        assert_eq!(all.experts[0], ExpertRow { layer: 3, expert: 0, nodes: both });
        assert_eq!(all.experts.len(), 2);
        assert_eq!(listed(&state, Some(2), None).experts, []);
        assert_eq!(listed(&state, None, Some(NodeId(2))).experts.len(), 1);
        let text = table(&all.experts);
        assert!(text.lines().nth(1).unwrap().ends_with("fr-expert-1 fr-expert-2"), "{text}");
    }
}
