//! One member as it is shown, with the names that its JSON has.

use entente_membership::state::{Node, NodeDevice, NodeState, Role, State};
use entente_proto::wire;
use serde::Serialize;

/// One member. What only the leader knows is absent when nobody leads.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct NodeRow {
    /// Its name.
    pub name: String,
    /// Its number.
    pub id: u32,
    /// The country that it stands in.
    pub region: String,
    /// Its data centre; empty when nobody said it.
    pub site: String,
    /// `coordinator`, `expert-node` or `witness`.
    pub role: &'static str,
    /// `joining`, `active`, `draining`, `down` or `removed`.
    pub state: &'static str,
    /// Whether it may get further replicas.
    pub eligible: bool,
    /// Whether an operator keeps further replicas off it.
    pub cordoned: bool,
    /// Its latest start.
    pub incarnation: Option<u64>,
    /// Where it is reached.
    pub address: String,
    /// Bytes that expert weights may take there; null when it is not limited.
    pub memory_bytes: Option<u64>,
    /// Instruction set, weight format and kernel version; empty until it told them.
    pub kernel_class: String,
    /// What it computes on; null for the processor.
    pub device: Option<DeviceRow>,
    /// When its state last changed, milliseconds since 1970.
    pub changed_at_ms: u64,
    /// Replicas that are placed on it.
    pub placed: u32,
    /// Replicas that it has loaded.
    pub held: Option<u32>,
    /// Replicas that it is to load.
    pub wanted: Option<u32>,
    /// Milliseconds since its last heartbeat.
    pub heartbeat_age_ms: Option<u64>,
}

/// A device that a node computes on, as its driver describes it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct DeviceRow {
    /// What it is called.
    pub name: String,
    /// Which one of its kind it is.
    pub uuid: String,
    /// Bytes of memory that it has.
    pub memory_bytes: u64,
    /// Bytes a second that its memory delivers; null when it does not tell.
    pub bandwidth_bytes_s: Option<u64>,
}

impl DeviceRow {
    fn of(device: &NodeDevice) -> Self {
        Self {
            name: device.name.clone(),
            uuid: device.uuid.clone(),
            memory_bytes: device.memory_bytes,
            bandwidth_bytes_s: Some(device.bandwidth_bytes_s).filter(|rate| *rate > 0),
        }
    }
}

impl NodeRow {
    /// As the committed state has it.
    pub fn committed(state: &State, node: &Node) -> Self {
        let spec = &node.spec;
        let placed = state.placement().experts_of(node.id).len();
        Self {
            name: spec.name.to_string(),
            id: node.id.0,
            region: spec.region.to_string(),
            site: spec.site.clone(),
            role: role(spec.role),
            state: life(node.state),
            eligible: node.takes_replicas(),
            cordoned: node.cordoned,
            incarnation: node.incarnation.map(|incarnation| incarnation.0),
            address: spec.address.clone(),
            memory_bytes: spec.memory_bytes,
            kernel_class: spec.kernel_class.clone(),
            device: spec.device.as_ref().map(DeviceRow::of),
            changed_at_ms: node.changed_at_ms,
            placed: u32::try_from(placed).unwrap_or(u32::MAX),
            held: None,
            wanted: None,
            heartbeat_age_ms: None,
        }
    }

    /// What it computes on, once it has told what its kernels are.
    pub fn device_name(&self) -> Option<&str> {
        let on_processor = (!self.kernel_class.is_empty()).then_some("cpu");
        self.device.as_ref().map(|device| &*device.name).or(on_processor)
    }

    /// The same with what the leader knows of it beyond that.
    pub fn reported(self, report: &wire::NodeReport) -> Self {
        // The leader hears heartbeats of expert nodes only.
        if self.role != role(Role::ExpertNode) {
            return self;
        }
        Self {
            placed: report.placed,
            held: Some(report.held),
            wanted: Some(report.wanted),
            heartbeat_age_ms: report.heartbeat_age_ms,
            ..self
        }
    }
}

fn role(role: Role) -> &'static str {
    match role {
        Role::Coordinator => "coordinator",
        Role::ExpertNode => "expert-node",
        Role::Witness => "witness",
    }
}

fn life(state: NodeState) -> &'static str {
    match state {
        NodeState::Joining => "joining",
        NodeState::Active => "active",
        NodeState::Draining => "draining",
        NodeState::Down => "down",
        NodeState::Removed => "removed",
    }
}

/// All members, in order of name.
pub fn rows(state: &State, reports: &[wire::NodeReport]) -> Vec<NodeRow> {
    let report_of = |node: &Node| {
        reports.iter().find(|r| r.node.as_ref().is_some_and(|member| member.id == node.id.0))
    };
    let row = |node: &Node| {
        let row = NodeRow::committed(state, node);
        match report_of(node) {
            Some(report) => row.reported(report),
            None => row,
        }
    };
    let mut rows: Vec<NodeRow> = state.nodes().map(row).collect();
    rows.sort_by(|a, b| a.name.cmp(&b.name));
    rows
}

/// A small cluster for the tests of verbs.
#[cfg(test)]
pub mod testing {
    use entente_membership::state::{Command, NodeSpec, Role, State};
    use entente_proto::ids::{ExpertId, LayerId, NodeId};
    use entente_proto::placement::Placement;

    fn spec(name: &str, role: Role) -> NodeSpec {
        NodeSpec {
            name: name.parse().unwrap(),
            region: name[..2].parse().unwrap(),
            site: String::new(),
            role,
            address: format!("{name}:1"),
            memory_bytes: None,
            kernel_class: String::new(),
            device: None,
        }
    }

    /// A coordinator (node 0) and two expert nodes (1 and 2) in fr, and two experts of layer 3:
    /// expert 0 on both nodes, expert 1 on the first.
    pub fn state() -> State {
        let mut state = State::genesis(vec![
            spec("fr-coordinator", Role::Coordinator),
            spec("fr-expert-1", Role::ExpertNode),
            spec("fr-expert-2", Role::ExpertNode),
        ])
        .unwrap();
        let mut placement = Placement::new();
        placement.add((LayerId(3), ExpertId(0)), NodeId(1));
        placement.add((LayerId(3), ExpertId(0)), NodeId(2));
        placement.add((LayerId(3), ExpertId(1)), NodeId(1));
        state.apply(Command::SetPlacement(placement)).unwrap();
        state
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_the_leader_knows_is_added_to_what_is_committed() {
        let state = testing::state();
        let report = wire::NodeReport {
            node: Some(wire::MemberNode { id: 2, ..Default::default() }),
            heartbeat_age_ms: Some(40),
            placed: 1,
            held: 3,
            wanted: 2,
        };
        let rows = rows(&state, &[report]);
        let shown: Vec<_> = rows.iter().map(|row| (&*row.name, row.placed, row.held)).collect();
        let want =
            [("fr-coordinator", 0, None), ("fr-expert-1", 2, None), ("fr-expert-2", 1, Some(3))];
        assert_eq!(shown, want);
    }
}
