//! An exchange in a storm: a seed decides what becomes of each frame, and no seed may change a bit of
//! the sum.

use super::*;

/// One exchange among nodes that misbehave as a seed says, for some time; then they are healthy.
pub(super) struct Storm {
    pub(super) random: Random,
    pub(super) view: ClusterView,
    pub(super) exchange: Exchange,
    pub(super) pace: Pace,
    /// Frames on their way to nodes or back.
    travelling: Vec<(NodeId, Dispatch)>,
    pub(super) now_us: u64,
}

impl Storm {
    fn start(seed: u64) -> Self {
        let mut random = Random(seed);
        let experts = 2 + random.place(9);
        let nodes = 1 + random.place(5) as u32;
        let replicas = 1 + random.place(nodes.min(3) as usize) as u16;
        let view = view(nodes, nodes, experts as u16, replicas);
        let rows = 1 + random.place(40);
        let top_k = 1 + random.place(experts.min(4));
        let dtype = if random.one_in(2) { Dtype::F32 } else { Dtype::Bf16 };
        let job = job(&mut random, rows, experts, top_k, dtype);
        let mut pace = Pace::new();
        // Nodes were fast until now, and hedges are paid for: late frames are asked for again.
        warm(&mut pace, &view, 1_000 + random.place(4_000) as u64);
        pace.earn(random.place(2_000));
        let mut ids = ExchangeIds { blocks: 1 };
        let (exchange, commands) = Exchange::start(job, &view, &mut pace, &mut ids, 0);
        Self { random, view, exchange, pace, travelling: sends(commands), now_us: 0 }
    }

    pub(super) fn send(&mut self, commands: Vec<Command>) {
        self.travelling.extend(sends(commands));
    }

    /// One event of a stormy day.
    fn misbehave(&mut self) {
        if self.travelling.is_empty() || self.random.one_in(4) {
            return self.pass_time();
        }
        let at = self.random.place(self.travelling.len());
        let (node, frame) = self.travelling.swap_remove(at);
        if !self.leads_to(node, &frame.fence) {
            return; // The link that carried it is gone.
        }
        let kind = self.random.place(15);
        let commands = match kind {
            0 => return self.restart(node),
            1 => self.exchange.on_not_sent(&self.view, &mut self.pace, frame.exchange, self.now_us),
            2..7 => {
                let refusal = match kind {
                    2 => Refusal::Busy,
                    3 => Refusal::Expired,
                    4 => Refusal::Draining,
                    5 => Refusal::StaleFence(Box::new(frame.fence)),
                    _ => Refusal::Invalid("no".to_owned()),
                };
                self.answer(node, refuse(&frame, refusal))
            }
            7 => {
                let mut answer = compute(&frame);
                answer.result = answer.result.map(|rows| rows.slice(1..));
                self.answer(node, answer)
            }
            8 => {
                self.lie(node, &frame);
                self.travelling.push((node, frame));
                return;
            }
            9 => {
                self.travelling.push((node, frame));
                return self.commit();
            }
            10 => self.answer(node, refuse(&frame, Refusal::NotHeld("1 of 1".to_owned()))),
            11 => {
                let mut answer = compute(&frame);
                answer.fence = Some(epochs::ahead(frame.fence, 1 + self.random.place(3) as u64));
                self.answer(node, answer)
            }
            _ => self.answer(node, compute(&frame)),
        };
        self.send(commands);
    }

    /// Whether a frame with this fence can still reach the node.
    fn leads_to(&self, node: NodeId, fence: &Fence) -> bool {
        self.view.nodes[&node].linked == Some(fence.incarnation)
    }

    fn answer(&mut self, node: NodeId, answer: Answer) -> Vec<Command> {
        self.exchange.on_answer(&self.view, &mut self.pace, node, answer, self.now_us)
    }

    /// Answers that must not count: right in form, wrong in name, node or fence.
    fn lie(&mut self, node: NodeId, frame: &Dispatch) {
        let before = format!("{:?}", self.exchange);
        let lie =
            Answer { result: Ok(Bytes::from(vec![0x40; frame.answer_len()])), ..compute(frame) };
        let mut older = frame.fence;
        older.incarnation.0 -= 1;
        let mut other = frame.fence;
        other.model_digest = ModelDigest([9; 32]);
        let lies = [
            (NodeId(node.0 + 1), lie.clone()),
            (node, Answer { exchange: ExchangeId(lie.exchange.0 - FRAMES_MAX), ..lie.clone() }),
            (node, Answer { exchange: ExchangeId(lie.exchange.0 + 1000), ..lie.clone() }),
            (node, Answer { fence: Some(older), ..lie.clone() }),
            (node, Answer { fence: Some(older), ..refuse(frame, Refusal::Busy) }),
            (node, Answer { fence: Some(other), ..lie.clone() }),
            (node, Answer { fence: None, ..lie }),
        ];
        for (node, lie) in lies {
            assert_eq!(self.answer(node, lie), []);
        }
        assert_eq!(format!("{:?}", self.exchange), before, "a lie left a trace");
    }

    /// The node dies and comes back as another incarnation.
    fn restart(&mut self, node: NodeId) {
        let was = self.view.nodes[&node].linked.unwrap();
        self.view.node_down(node);
        let commands = self.exchange.on_link_down(&self.view, &mut self.pace, node, self.now_us);
        self.send(commands);
        self.view.nodes.get_mut(&node).unwrap().linked = Some(Incarnation(was.0 + 1));
        let commands = self.exchange.on_view_changed(&self.view, &mut self.pace, self.now_us);
        self.send(commands);
    }

    fn pass_time(&mut self) {
        self.now_us += 500;
        let commands = self.exchange.on_tick(&self.view, &mut self.pace, self.now_us);
        self.send(commands);
    }

    /// Everybody restarts, serves and is healthy from here on.
    fn calm(&mut self) {
        self.serve_all();
        let nodes: Vec<NodeId> = self.view.nodes.keys().copied().collect();
        nodes.into_iter().for_each(|node| self.restart(node));
        for _ in 0..1_000 {
            let Status::Waiting { until_us } = self.exchange.status() else { return };
            let frames = std::mem::take(&mut self.travelling);
            if frames.is_empty() {
                self.now_us = self.now_us.max(until_us);
                let commands = self.exchange.on_tick(&self.view, &mut self.pace, self.now_us);
                self.send(commands);
            }
            for (node, frame) in frames {
                if self.leads_to(node, &frame.fence) {
                    let commands = self.answer(node, compute(&frame));
                    self.send(commands);
                }
            }
        }
    }

    /// What must hold at every moment.
    fn check(&self, seed: u64) {
        let mut in_flight = vec![0; self.exchange.slots.len()];
        for sent in self.exchange.in_flight.values() {
            sent.slots.iter().for_each(|slot| in_flight[*slot as usize] += 1);
            let now = self.view.fence(sent.node).map(|fence| fence.incarnation);
            assert_eq!(now, Some(sent.fence.incarnation), "seed {seed}: owed by nobody");
        }
        for (slot, frames) in self.exchange.slots.iter().zip(&in_flight) {
            let carried = match slot {
                Slot::Missing => 0,
                Slot::InFlight(frames) => usize::from(*frames),
                Slot::Answered { .. } => continue,
            };
            assert_eq!(*frames, carried, "seed {seed}: {slot:?}");
            assert!(*slot == Slot::Missing || carried > 0, "seed {seed}: in flight in no frame");
        }
        for (node, frame) in &self.travelling {
            let here = self.view.nodes[node].member.region;
            assert_eq!(here, self.view.home, "seed {seed}: rows left the home region");
            assert!(frame.allowed_regions.contains(&here), "seed {seed}: forbidden rows");
            let wire = entente_proto::wire::Dispatch::from(frame.clone());
            assert_eq!(Dispatch::try_from(wire).as_ref(), Ok(frame), "seed {seed}");
        }
    }
}

#[test]
fn the_bits_of_the_sum_do_not_depend_on_placement_order_failures_or_retries() {
    for seed in 0..3_000 {
        let mut storm = Storm::start(seed);
        let expected = expected(&storm.exchange.job);
        for _ in 0..storm.random.place(120) {
            storm.misbehave();
            storm.check(seed);
        }
        storm.calm();
        assert_eq!(storm.exchange.status(), Status::Done, "seed {seed}");
        assert_eq!(combined(&storm.exchange), expected, "seed {seed}");
    }
}

#[test]
fn the_same_seed_gives_the_same_frames() {
    let trace = |seed| {
        let mut storm = Storm::start(seed);
        (0..60).for_each(|_| storm.misbehave());
        format!("{:?} {:?}", storm.travelling, storm.exchange)
    };
    for seed in 0..20 {
        assert_eq!(trace(seed), trace(seed), "seed {seed}");
    }
}
