//! Exchanges one after the other, with nodes that are slow or silent: who is asked again, and when.

use super::*;

/// One exchange after the other against nodes whose answers take as long as `delay_us` says.
/// Gives the total work, and the time that each exchange took.
fn serve(
    seed: u64,
    exchanges: usize,
    view: &ClusterView,
    delay_us: &mut dyn FnMut(&mut Random, NodeId) -> Option<u64>,
) -> (crate::pace::Work, Vec<u64>) {
    let (mut random, mut pace, mut ids) = (Random(seed), Pace::new(), ExchangeIds::new());
    let (mut now_us, mut took) = (0, Vec::new());
    // Answers on their way, by arrival; those of earlier exchanges arrive as well.
    let mut arriving: BTreeMap<(u64, ExchangeId), (NodeId, Dispatch)> = BTreeMap::new();
    for _ in 0..exchanges {
        let rows = 1 + random.place(16);
        let mut job = job(&mut random, rows, 8, 2, Dtype::Bf16);
        job.deadline_us = now_us + DEADLINE_US;
        let (expected, started_us) = (expected(&job), now_us);
        let (mut exchange, mut commands) = Exchange::start(job, view, &mut pace, &mut ids, now_us);
        loop {
            for (node, frame) in sends(std::mem::take(&mut commands)) {
                if let Some(delay_us) = delay_us(&mut random, node) {
                    arriving.insert((now_us + delay_us, frame.exchange), (node, frame));
                }
            }
            let until_us = match exchange.status() {
                Status::Done => break,
                Status::Failed(failure) => panic!("seed {seed}: {failure}"),
                Status::Waiting { until_us } => until_us,
            };
            match arriving.first_entry().filter(|entry| entry.key().0 <= until_us) {
                Some(entry) => {
                    now_us = now_us.max(entry.key().0);
                    let (node, frame) = entry.remove();
                    commands = exchange.on_answer(view, &mut pace, node, compute(&frame), now_us);
                }
                None => {
                    now_us = until_us;
                    commands = exchange.on_tick(view, &mut pace, now_us);
                    let again = Status::Waiting { until_us: now_us };
                    assert_ne!(exchange.status(), again, "seed {seed}: woken for nothing");
                }
            }
        }
        assert_eq!(combined(&exchange), expected, "seed {seed}");
        took.push(now_us - started_us);
    }
    let work = pace.take_work();
    let hedged: u64 = pace.take_repeats().values().map(|repeats| repeats.hedged).sum();
    assert_eq!(hedged, work.hedged, "what was hedged is somebody's");
    (work, took)
}

/// Two milliseconds, give or take; now and then much more.
fn healthy(random: &mut Random) -> u64 {
    let usual = 1_500 + random.place(1_000) as u64;
    if random.one_in(10) { usual + random.place(20_000) as u64 } else { usual }
}

#[test]
fn healthy_nodes_are_hedged_for_at_most_5_percent_of_the_rows() {
    for seed in 0..20 {
        let view = view(3, 0, 8, 2);
        let (work, _) = serve(seed, 500, &view, &mut |random, _| Some(healthy(random)));
        assert!(work.hedged > 0, "seed {seed}: nothing was hedged");
        assert!(work.hedged * 20 <= work.sent, "seed {seed}: {work:?}");
    }
}

#[test]
fn a_node_that_hangs_delays_no_exchange_until_its_deadline() {
    for seed in 0..20 {
        let view = view(3, 0, 8, 2);
        let mut asked = 0;
        let mut delay = |random: &mut Random, node: NodeId| {
            asked += 1;
            // Node 1 answers for a while, and never again.
            (asked < 300 || node != NodeId(1)).then(|| healthy(random))
        };
        let (_, took) = serve(seed, 500, &view, &mut delay);
        let slowest = took.iter().max().copied().unwrap_or_default();
        assert!(slowest < DEADLINE_US / 5, "seed {seed}: an exchange took {slowest} us");
        let late = took[150..].iter().filter(|took| **took > 50_000).count();
        assert!(late <= 3, "seed {seed}: {late} exchanges waited for the node that hangs");
    }
}

#[test]
fn a_slow_node_is_asked_last_and_again_once_it_is_fast() {
    let view = view(2, 0, 8, 2);
    let (mut asked, mut to_slow) = (0, [0; 3]);
    let mut delay = |random: &mut Random, node: NodeId| {
        asked += 1;
        let phase = (asked / 1_000).min(2);
        to_slow[phase] += usize::from(node == NodeId(1));
        let factor = if phase == 1 && node == NodeId(1) { 40 } else { 1 };
        Some(factor * (1_500 + random.place(1_000) as u64))
    };
    serve(7, 2_600, &view, &mut delay);
    let [before, slow, after] = to_slow;
    assert!(before > 400, "both are asked alike: {before} of 1000");
    assert!(slow < 100, "the slow one is left alone: {slow} of 1000");
    assert!(after > 400, "it is asked again: {after}");
}

#[test]
fn a_hedge_that_is_lost_as_well_is_asked_of_a_third() {
    let mut random = Random(11);
    let mut view = view(3, 0, 4, 3);
    let mut pace = Pace::new();
    warm(&mut pace, &view, 2_000);
    let mut job = job(&mut random, 1, 4, 1, Dtype::F32);
    job.owner_of_row.fill(0);
    let expected = expected(&job);
    let mut ids = ExchangeIds { blocks: 1 };
    let (mut exchange, commands) = Exchange::start(job, &view, &mut pace, &mut ids, 0);
    let first = sends(commands).remove(0).0;
    let second = sends(exchange.on_tick(&view, &mut pace, 30_000)).remove(0).0;
    view.node_down(second);
    assert_eq!(exchange.on_link_down(&view, &mut pace, second, 30_001).len(), 1, "at once");
    let third = exchange.in_flight.values().next_back().map(|sent| sent.node).unwrap();
    assert_eq!(BTreeSet::from([first, second, third]).len(), 3);
    let frame = exchange.in_flight.iter().next_back().map(|(id, sent)| (*id, sent.fence)).unwrap();
    let rows = {
        let mut rows = Vec::new();
        let mut row = vec![0.0; exchange.job.hidden];
        exchange.job.dtype.decode(&exchange.job.rows, &mut row);
        exchange.job.dtype.encode(&expert(exchange.job.choices[0].expert, &row), &mut rows);
        rows
    };
    let answer = Answer { exchange: frame.0, fence: Some(frame.1), result: Ok(rows.into()) };
    exchange.on_answer(&view, &mut pace, third, answer, 30_002);
    assert_eq!(combined(&exchange), expected);
}
