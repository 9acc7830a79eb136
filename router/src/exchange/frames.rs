//! From missing slots to frames: who gets which slot, and how the rows are packed.

use std::collections::BTreeMap;

use bytes::Bytes;
use entente_proto::frame::{ASSIGNMENTS_MAX, Assignment, Dispatch, ROWS_BYTES_MAX, ROWS_MAX};
use entente_proto::ids::{ExchangeId, ExpertId, Fence, NodeId};

use super::{Command, Exchange, InFlight, Job, Slot};
use crate::view::ClusterView;

/// Missing slots in ascending order, by the node that gets them and the policy of their rows: a
/// frame carries one policy, and rows of different policies must not share one.
pub(super) type Groups = BTreeMap<(NodeId, u16), Vec<u32>>;

impl Exchange {
    /// Gives each missing slot to the replica with the fewest slots, of equals the lowest node.
    /// Slots that nobody may compute now stay missing.
    pub(super) fn assign(&mut self, view: &ClusterView, now_us: u64) -> Groups {
        let mut replicas: BTreeMap<(u16, ExpertId), Vec<NodeId>> = BTreeMap::new();
        let mut groups = Groups::new();
        for (i, slot) in self.slots.iter().enumerate() {
            if *slot != Slot::Missing {
                continue;
            }
            let policy = self.job.policy_of_row[i / self.job.top_k];
            let expert = self.job.choices[i].expert;
            let usable = |node: &NodeId| {
                view.fence(*node)
                    .is_some_and(|fence| self.standing.in_favour(*node, &fence, now_us))
            };
            let replicas = replicas.entry((policy, expert)).or_insert_with(|| {
                let regions = &self.job.policies[usize::from(policy)];
                view.replicas((self.job.layer, expert), regions).filter(usable).collect()
            });
            let least = replicas.iter().min_by_key(|node| (self.standing.assigned(**node), **node));
            if let Some(node) = least.copied() {
                self.standing.assign(node);
                groups.entry((node, policy)).or_default().push(i as u32);
            }
        }
        groups
    }

    /// Turns groups into frames within the bounds of the wire, and takes note of them.
    pub(super) fn frames(
        &mut self,
        view: &ClusterView,
        groups: Groups,
        now_us: u64,
    ) -> Vec<Command> {
        let mut commands = Vec::with_capacity(groups.len());
        for ((node, policy), slots) in groups {
            let Some(fence) = view.fence(node) else { continue };
            for slots in split(&self.job, slots) {
                let frame = self.frame(fence, policy, &slots, now_us);
                for slot in &slots {
                    self.slots[*slot as usize] = Slot::InFlight;
                }
                let sent = InFlight { node, fence, answer_len: frame.answer_len(), slots };
                self.in_flight.insert(frame.exchange, sent);
                commands.push(Command::Send { node, frame });
            }
        }
        commands
    }

    fn frame(&mut self, fence: Fence, policy: u16, slots: &[u32], now_us: u64) -> Dispatch {
        let mut rows: Vec<usize> = Vec::new();
        let mut assignments = Vec::with_capacity(slots.len());
        for slot in slots {
            let slot = *slot as usize;
            let row = slot / self.job.top_k;
            // Slots ascend, so that those of one row are neighbours and the row goes in once.
            if rows.last() != Some(&row) {
                rows.push(row);
            }
            let row = (rows.len() - 1) as u16;
            assignments.push(Assignment { row, expert: self.job.choices[slot].expert });
        }
        let exchange = ExchangeId(self.block + self.frames_sent);
        self.frames_sent += 1;
        let left_ms = self.job.deadline_us.saturating_sub(now_us).div_ceil(1_000);
        Dispatch {
            exchange,
            fence,
            layer: self.job.layer,
            allowed_regions: self.job.policies[usize::from(policy)].clone(),
            deadline_ms: u32::try_from(left_ms).unwrap_or(u32::MAX),
            dtype: self.job.dtype,
            hidden: self.job.hidden,
            assignments,
            rows: gather(&self.job, &rows),
        }
    }
}

/// Cuts ascending slots into pieces that each fit into a frame.
fn split(job: &Job, slots: Vec<u32>) -> Vec<Vec<u32>> {
    let rows_by_bytes = (ROWS_BYTES_MAX / job.row_bytes()).max(1);
    let rows_max = ROWS_MAX.min(rows_by_bytes);
    let slots_max = ASSIGNMENTS_MAX.min(rows_by_bytes);
    let mut pieces: Vec<Vec<u32>> = Vec::new();
    let (mut rows, mut last_row) = (0, None);
    for slot in slots {
        let row = slot as usize / job.top_k;
        let new_row = last_row != Some(row);
        let room = |piece: &Vec<u32>| piece.len() < slots_max && (!new_row || rows < rows_max);
        match pieces.last_mut().filter(|piece| room(piece)) {
            Some(piece) => {
                piece.push(slot);
                rows += usize::from(new_row);
            }
            None => {
                pieces.push(vec![slot]);
                rows = 1;
            }
        }
        last_row = Some(row);
    }
    pieces
}

/// The bytes of some rows of the job, in ascending order. Neighbours are not copied.
fn gather(job: &Job, rows: &[usize]) -> Bytes {
    let size = job.row_bytes();
    let (Some(first), Some(last)) = (rows.first(), rows.last()) else { return Bytes::new() };
    if last - first + 1 == rows.len() {
        return job.rows.slice(first * size..(last + 1) * size);
    }
    let mut bytes = Vec::with_capacity(rows.len() * size);
    for row in rows {
        bytes.extend_from_slice(&job.rows[row * size..(row + 1) * size]);
    }
    bytes.into()
}
