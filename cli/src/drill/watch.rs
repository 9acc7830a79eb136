//! Sees how a cluster is: whether it is ready, how much work was asked for twice, and what the
//! control plane says.
//!
//! Nothing reports these things to a client, so they are looked at again and again, often enough
//! that a figure is true to about [`POLL_INTERVAL`].

use std::fs;
use std::time::Duration;

use entente_proto::ids::{Incarnation, NodeName};

use super::board::Board;
use super::control::{Control, Log};
use super::place::{Place, Server, metric};
use super::scenario::Action;

/// How often a cluster that is not ready is looked at.
pub const POLL_INTERVAL: Duration = Duration::from_millis(10);

/// Longest that one look may take.
const LOOK_DEADLINE: Duration = Duration::from_secs(1);

/// (row, expert) pairs that were chosen, and those asked of a second node.
const ROWS: &str = "entente_gate_rows_total";
const HEDGED_ROWS: &str = "entente_hedged_rows_total";

/// How many rows the coordinators have sent out since they started.
#[derive(Debug, Clone, PartialEq)]
pub struct Rows(Vec<Option<(f64, f64)>>);

/// Looks at one cluster.
pub struct Watch {
    servers: Vec<Server>,
    control: Option<Control>,
}

impl Watch {
    /// Of the cluster at `place`.
    pub fn new(place: &Place) -> anyhow::Result<Self> {
        let quick = |server: Server| Server {
            client: server.client.with_deadline(LOOK_DEADLINE),
            ..server
        };
        let control = place.data_dir().map(Control::connect).transpose()?.flatten();
        Ok(Self { servers: place.servers()?.into_iter().map(quick).collect(), control })
    }

    /// The control plane, where there is one to ask.
    pub fn control(&self) -> Option<&Control> {
        self.control.as_ref()
    }

    /// Whether every coordinator says that it can serve.
    pub fn is_ready(&self) -> bool {
        let ready = |server: &Server| matches!(server.client.get("/readyz"), Ok((200, _)));
        self.servers.iter().all(ready)
    }

    /// Whether the cluster is well again after `actions`: changes can be committed after a leader
    /// was lost, requests can be served after anything else.
    pub fn has_recovered(&self, actions: &[Action]) -> bool {
        match &self.control {
            Some(control) if actions.contains(&(Action::KillLeader {})) => control.commits(),
            _ => self.is_ready(),
        }
    }

    /// Whether nothing is missing any more.
    pub fn is_whole(&self) -> bool {
        self.is_ready() && self.control.as_ref().is_none_or(Control::all_active)
    }

    /// Which start of an expert node the cluster knows; none where nobody counts them.
    pub fn incarnation(&self, name: &NodeName) -> Option<Incarnation> {
        self.control.as_ref()?.state()?.node(name)?.incarnation
    }

    /// Who leads the voters.
    pub fn leader(&self) -> Option<NodeName> {
        self.control.as_ref()?.leader()
    }

    /// Listens to the control plane until the run is over; nothing where there is none.
    pub fn log(&self, board: &Board, writers: usize) -> anyhow::Result<Log> {
        self.control.as_ref().map_or(Ok(Log::default()), |control| control.log(board, writers))
    }

    /// What the coordinators have counted; nothing of one that does not answer.
    pub fn rows(&self) -> Rows {
        let of = |server: &Server| {
            let (_, text) = server.client.get("/metrics").ok()?;
            Some((metric(&text, HEDGED_ROWS), metric(&text, ROWS)))
        };
        Rows(self.servers.iter().map(of).collect())
    }
}

impl Rows {
    /// Share of rows that were asked of a second node since `before`; nothing when there were none.
    pub fn hedged_share_since(&self, before: &Self) -> Option<f64> {
        let (mut hedged, mut all) = (0.0, 0.0);
        for (now, before) in self.0.iter().zip(&before.0) {
            let (Some(now), Some(before)) = (now, before) else { continue };
            // A coordinator that was started anew counts from 0 again.
            let before = if now.1 < before.1 { (0.0, 0.0) } else { *before };
            hedged += now.0 - before.0;
            all += now.1 - before.1;
        }
        (all > 0.0).then(|| hedged / all)
    }
}

/// Milliseconds of processor time, over all processors since the system's start, in which the host
/// of this virtual machine ran something else. What was running meanwhile stood still, often for a
/// tenth of a second, and no drill can tell that from a stall of the cluster.
pub fn stolen_ms() -> Option<f64> {
    stolen_in(&fs::read_to_string("/proc/stat").ok()?)
}

/// The eighth figure of the line `cpu`, in hundredths of a second (proc(5)).
fn stolen_in(stat: &str) -> Option<f64> {
    let all = stat.lines().find_map(|line| line.strip_prefix("cpu "))?;
    Some(all.split_whitespace().nth(7)?.parse::<f64>().ok()? * 10.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_the_host_took_is_read_from_the_system() {
        let stat = "cpu  1 2 3 4 5 6 7 80 9 10\ncpu0 1 2 3 4 5 6 7 8 9 10\n";
        assert_eq!(stolen_in(stat), Some(800.0));
        assert_eq!(stolen_in("cpu 1 2"), None);
        assert!(stolen_ms().is_some_and(|stolen_ms| stolen_ms >= 0.0));
    }

    #[test]
    fn the_hedged_share_is_over_all_coordinators_also_over_one_that_was_restarted() {
        let before = Rows(vec![Some((10.0, 1_000.0)), Some((0.0, 500.0)), None]);
        let after = Rows(vec![Some((20.0, 1_100.0)), Some((5.0, 100.0)), Some((7.0, 7.0))]);
        assert_eq!(after.hedged_share_since(&before), Some(15.0 / 200.0));
        assert_eq!(before.hedged_share_since(&before), None);
    }
}
