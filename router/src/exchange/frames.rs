//! From missing slots to frames: who gets which slot, and how the rows are packed.

use std::collections::{BTreeMap, BTreeSet};

use bytes::Bytes;
use entente_proto::frame::{ASSIGNMENTS_MAX, Assignment, Dispatch, ROWS_BYTES_MAX, ROWS_MAX};
use entente_proto::ids::{ExchangeId, ExpertId, Fence, NodeId, RequestId};

use super::{Command, Exchange, InFlight, Job, Slot};
use crate::pace::Pace;
use crate::view::ClusterView;

/// Missing slots in ascending order, by the node that gets them and the policy of their rows: a
/// frame carries one policy, and rows of different policies must not share one.
pub(super) type Groups = BTreeMap<(NodeId, u16), Vec<u32>>;

/// The replicas that may compute a row of a policy through an expert, looked up once.
type Known = BTreeMap<(u16, ExpertId), Replicas>;

struct Replicas {
    /// Those that may be asked now, with the ranks of their kernel classes.
    usable: Vec<(u16, NodeId)>,
    /// The rank of the class that the expert's rows belong to.
    first: u16,
    /// The first rank of a replica that will be usable in a moment.
    returning: Option<u16>,
}

impl Exchange {
    /// Gives each missing slot to a replica that is not suspect, of those to one of the first kernel
    /// class, of those to the one with the fewest slots, of equals to the lowest node. Slots that
    /// nobody may compute now stay missing, and so do those for which a replica of an earlier class
    /// is back in a moment; they are the second value.
    pub(super) fn assign(
        &mut self,
        view: &ClusterView,
        pace: &mut Pace,
        now_us: u64,
    ) -> (Groups, Vec<u32>) {
        let mut known = Known::new();
        let (mut groups, mut left) = (Groups::new(), Vec::new());
        for i in 0..self.slots.len() {
            if self.slots[i] != Slot::Missing {
                continue;
            }
            let policy = self.job.policy_of(i);
            let Replicas { usable, first, returning } =
                self.replicas(view, pace, &mut known, i, now_us);
            let key = |(rank, node): &(u16, NodeId)| {
                (pace.is_suspect(*node, now_us), *rank, self.standing.assigned(*node), *node)
            };
            let in_time = |(rank, _): &(u16, NodeId)| returning.is_none_or(|r| *rank <= r);
            match usable.iter().copied().min_by_key(key).filter(in_time) {
                Some((rank, node)) => {
                    pace.count_crossed(rank > *first);
                    self.standing.assign(node);
                    groups.entry((node, policy)).or_default().push(i as u32);
                }
                None => left.push(i as u32),
            }
        }
        (groups, left)
    }

    /// Whether no replica may compute the slot, now or once it has rested.
    pub(super) fn is_stranded(&self, view: &ClusterView, slot: u32) -> bool {
        let slot = slot as usize;
        let expert = (self.job.layer, self.job.choices[slot].expert);
        let excluded = |node: NodeId| {
            view.fence(node).is_none_or(|fence| self.standing.is_excluded(node, &fence))
        };
        let regions = self.job.regions(self.job.policy_of(slot));
        view.replicas(expert, regions).all(excluded)
    }

    /// Gives slots that are late in every frame that carries them to one more replica: one that
    /// does not have them yet and is not suspect itself. While they are not overdue it is one of the
    /// same kernel class: to be early is not worth another result. Nothing, when the budget is short
    /// of it.
    pub(super) fn hedge(&mut self, view: &ClusterView, pace: &mut Pace, now_us: u64) -> Groups {
        let late = |sent: &&InFlight| now_us >= sent.patience.hedge_at_us;
        let mut asked: BTreeMap<u32, (BTreeSet<NodeId>, bool)> = BTreeMap::new();
        for sent in self.in_flight.values().filter(late) {
            let overdue = now_us >= sent.patience.overdue_at_us;
            for slot in &sent.slots {
                let (nodes, all_overdue) = asked.entry(*slot).or_insert((BTreeSet::new(), true));
                nodes.insert(sent.node);
                *all_overdue &= overdue;
            }
        }
        let mut known = Known::new();
        let mut groups = [Groups::new(), Groups::new()];
        for (slot, (nodes, overdue)) in asked {
            let i = slot as usize;
            if self.slots[i] != Slot::InFlight(nodes.len() as u8) {
                continue;
            }
            let policy = self.job.policy_of(i);
            let Replicas { usable, first, .. } = self.replicas(view, pace, &mut known, i, now_us);
            let fits = |rank| overdue || nodes.iter().any(|asked| view.rank(*asked) == rank);
            let other = |(rank, node): &&(u16, NodeId)| {
                fits(*rank) && !nodes.contains(node) && !pace.is_suspect(*node, now_us)
            };
            let key = |(rank, node): &&(u16, NodeId)| (*rank, self.standing.assigned(*node), *node);
            if let Some((rank, node)) = usable.iter().filter(other).min_by_key(key).copied() {
                pace.count_crossed(rank > *first);
                self.standing.assign(node);
                groups[usize::from(overdue)].entry((node, policy)).or_default().push(slot);
            }
        }
        let [late, mut paid] = groups;
        let rows = |groups: &Groups| groups.values().map(Vec::len).sum::<usize>();
        pace.pay(rows(&paid), true);
        if !late.is_empty() && pace.pay(rows(&late), false) {
            for (to, slots) in late {
                let group = paid.entry(to).or_default();
                group.extend(slots);
                group.sort_unstable();
            }
        }
        for slot in paid.values().flatten() {
            pace.count_hedged(self.job.owner_of(*slot as usize));
        }
        paid
    }

    /// The replicas that may compute a slot.
    fn replicas<'a>(
        &self,
        view: &ClusterView,
        pace: &Pace,
        known: &'a mut Known,
        slot: usize,
        now_us: u64,
    ) -> &'a Replicas {
        let policy = self.job.policy_of(slot);
        let expert = self.job.choices[slot].expert;
        known.entry((policy, expert)).or_insert_with(|| {
            let (regions, key) = (self.job.regions(policy), (self.job.layer, expert));
            let (mut usable, mut returning) = (Vec::new(), None::<u16>);
            for node in view.replicas(key, regions) {
                let Some(fence) = view.fence(node) else { continue };
                let rank = view.rank(node);
                if self.standing.in_favour(node, &fence, now_us) {
                    usable.push((rank, node));
                } else if !self.standing.is_excluded(node, &fence)
                    && self.standing.returns_soon(node, now_us)
                    && !pace.is_suspect(node, now_us)
                {
                    returning = Some(returning.map_or(rank, |earlier| earlier.min(rank)));
                }
            }
            Replicas { usable, first: view.first_rank(key, regions), returning }
        })
    }

    /// Turns groups into frames within the bounds of the wire, and takes note of them.
    pub(super) fn frames(
        &mut self,
        view: &ClusterView,
        pace: &mut Pace,
        groups: Groups,
        now_us: u64,
    ) -> Vec<Command> {
        let mut commands = Vec::with_capacity(groups.len());
        for ((node, policy), slots) in groups {
            let Some(fence) = view.fence(node) else { continue };
            for slots in split(&self.job, slots) {
                let shares = self.shares(&slots);
                let frame = self.frame(fence, policy, &slots, &shares, now_us);
                for slot in &slots {
                    let slot = &mut self.slots[*slot as usize];
                    *slot = match *slot {
                        Slot::InFlight(frames) => Slot::InFlight(frames + 1),
                        _ => Slot::InFlight(1),
                    };
                }
                let patience =
                    pace.on_sent(frame.exchange, (node, view.rank(node)), slots.len(), now_us);
                let answer_len = frame.answer_len();
                let sent = InFlight { node, fence, answer_len, patience, slots };
                self.in_flight.insert(frame.exchange, sent);
                commands.push(Command::Send { node, frame, shares });
            }
        }
        commands
    }

    /// How many of ascending slots each owner has, in the order of the slots.
    fn shares(&self, slots: &[u32]) -> Vec<(u16, u32)> {
        let mut shares: Vec<(u16, u32)> = Vec::new();
        for slot in slots {
            let owner = self.job.owner_of(*slot as usize);
            match shares.last_mut().filter(|(last, _)| *last == owner) {
                Some((_, count)) => *count += 1,
                None => shares.push((owner, 1)),
            }
        }
        shares
    }

    fn frame(
        &mut self,
        fence: Fence,
        policy: u16,
        slots: &[u32],
        shares: &[(u16, u32)],
        now_us: u64,
    ) -> Dispatch {
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
            allowed_regions: self.job.regions(policy).clone(),
            deadline_ms: u32::try_from(left_ms).unwrap_or(u32::MAX),
            dtype: self.job.dtype,
            hidden: self.job.hidden,
            assignments,
            requests: self.requests(shares),
            rows: gather(&self.job, &rows),
        }
    }

    /// The same for the node, which knows requests and no owners.
    fn requests(&self, shares: &[(u16, u32)]) -> Vec<(RequestId, u32)> {
        let request = |owner: u16| self.job.owners.owners[usize::from(owner)].0;
        shares.iter().map(|(owner, count)| (request(*owner), *count)).collect()
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
