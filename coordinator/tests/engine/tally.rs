//! Every generation that the engine is given is closed once, and its record names every node that
//! rows of it were sent to, whatever happened meanwhile.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use entente_coordinator::engine::Request;
use entente_coordinator::engine::origin::Origin;
use entente_coordinator::engine::output::{Finish, StopConditions};
use entente_coordinator::engine::tally::{Closed, Epochs, How, Touched};
use entente_proto::ids::RequestId;

use crate::committed::{Live, finish};
use crate::setup::*;

crate::over_networks! {
    every_generation_is_closed_once_however_it_ends,
    a_record_names_every_start_that_rows_went_to_and_rows_add_up_to_what_was_sent,
}

/// By request, how each of its generations ended.
fn ends(closed: impl Iterator<Item = Closed>) -> BTreeMap<RequestId, Vec<How>> {
    let mut ends = BTreeMap::<_, Vec<How>>::new();
    for Closed { origin, how, .. } in closed {
        ends.entry(origin.id).or_default().push(how);
    }
    ends
}

fn every_generation_is_closed_once_however_it_ends(transport: Transport) {
    let mut live = Live::start(transport, 2, 1, Duration::from_millis(300));
    let engine = &live.engine;
    let origins = [0; 5].map(|_| origin(&["fr"]));
    let [complete, gone, large, late, twice] = &origins;
    let short = |origin: &Arc<Origin>, max_tokens| Request {
        origin: origin.clone(),
        stop: StopConditions { max_tokens, ..StopConditions::default() },
        ..request(0)
    };
    let submit = |request| engine.started.api.engine.submit(request).unwrap();
    rest(&mut submit(short(complete, 3)));
    for mut events in [submit(short(twice, 2)), submit(short(twice, 2))] {
        rest(&mut events);
    }
    let too_large = rest(&mut submit(short(large, 1 << 40)));
    assert!(too_large.contains("TooLong"), "{too_large}");
    let mut leaving = engine.submit_as(1, gone.clone());
    leaving.blocking_recv().unwrap();
    drop(leaving);
    // Told by the record itself, since nobody else hears of it.
    let mut closed: Vec<Closed> = (0..5).map(|_| engine.next_closed()).collect();
    let mut waiting = engine.submit_as(2, late.clone());
    waiting.blocking_recv().unwrap();
    live.lose(1);
    let told = rest(&mut waiting);
    assert!(told.contains("Unavailable"), "{told}");
    closed.push(live.engine.next_closed());
    let ends = ends(closed.into_iter().chain(live.engine.closed.try_iter()));
    let length = How::Finished(Finish::Length);
    assert_eq!(ends.len(), origins.len());
    assert_eq!(ends[&complete.id], std::slice::from_ref(&length));
    assert_eq!(ends[&twice.id], [length.clone(), length]);
    assert_eq!(ends[&gone.id], [How::Disconnected]);
    for (failed, why) in [(large, "do not fit"), (late, "waited 300 ms for experts")] {
        let [How::Failed(text)] = &ends[&failed.id][..] else { panic!("{:?}", ends[&failed.id]) };
        assert!(text.contains(why), "{text}");
    }
}

fn a_record_names_every_start_that_rows_went_to_and_rows_add_up_to_what_was_sent(
    transport: Transport,
) {
    let mut live = Live::start(transport, 3, 2, PATIENCE);
    let running = live.engine.begin_all();
    let before = live.state.node(&name(1)).unwrap().incarnation.unwrap();
    live.lose(1);
    // Placed on it alone are none, so everything goes on, and the second loss holds it up.
    live.lose(2);
    live.wait_until_held();
    live.bring_back(1);
    assert!(finish(running) == reference());
    let closed: Vec<Closed> = (0..REQUESTS).map(|_| live.engine.next_closed()).collect();
    let after = live.state.node(&name(1)).unwrap().incarnation.unwrap();
    for Closed { tally, .. } in &closed {
        let touched: BTreeSet<_> =
            tally.touched.keys().map(|t: &Touched| (t.node.clone(), t.incarnation)).collect();
        assert!(touched.contains(&(name(1), before)) && touched.contains(&(name(1), after)));
        assert!(touched.iter().any(|(node, _)| *node == name(2)), "{touched:?}");
        assert!(tally.touched.keys().all(|t| t.region.as_str() == "fr"));
        assert_eq!(tally.completion_tokens, TOKENS as u64);
        let Epochs { membership, placement } = tally.first_epochs;
        assert!(membership < tally.last_epochs.membership && placement.0 > 0);
    }
    let sum = |of: fn(&Closed) -> u64| closed.iter().map(of).sum::<u64>();
    let metrics = &live.engine.started.api.metrics;
    let sent = metrics.expert_rows.with_label_values(&["fr"]).get();
    assert_eq!(sum(|c| c.tally.touched.values().sum()), sent);
    assert_eq!(sum(|c| c.tally.retried_rows), metrics.retried_rows.get());
    assert_eq!(sum(|c| c.tally.hedged_rows), metrics.hedged_rows.get());
}
