//! One record for a request, whatever became of its answers.

use std::time::Duration;

use entente_proto::ids::{Incarnation, KernelClass, MembershipEpoch, PlacementEpoch, Region};

use super::*;
use crate::engine::tally::{Epochs, Tally};

fn origin() -> Arc<Origin> {
    Arc::new(Origin::anonymous("fr".parse().unwrap()))
}

fn opened(origin: &Arc<Origin>, generations: usize) -> Opened {
    let coordinator = record::Coordinator {
        node: "fr-coordinator".parse().unwrap(),
        region: "fr".parse().unwrap(),
        certificate: None,
    };
    let (model, kernel_class) = (Digest([1; 32]), "f32".to_owned());
    let facts = Arc::new(Facts { coordinator, model, kernel_class });
    let origin = origin.clone();
    Opened { origin, policy: None, body: [2; 32], begun_ms: 5, generations, facts }
}

fn closed(origin: &Arc<Origin>, nodes: &[(&str, u8, u64)], epoch: u64, how: How) -> Closed {
    let touched = |(name, certificate, rows): &(&str, u8, u64)| {
        let touched = Touched {
            node: name.parse().unwrap(),
            region: name[..2].parse::<Region>().unwrap(),
            incarnation: Incarnation(1),
            certificate_sha256: [*certificate; 32],
            kernel_class: KernelClass(
                if *name == "fr-b" { "bf16/cuda-sm90/1" } else { "f32" }.to_owned(),
            ),
        };
        (touched, *rows)
    };
    let at = |n| Epochs { membership: MembershipEpoch(n), placement: PlacementEpoch(n + 10) };
    let tally = Tally {
        touched: nodes.iter().map(touched).collect(),
        retried_rows: 1,
        hedged_rows: 2,
        first_epochs: at(epoch),
        last_epochs: at(epoch + 1),
        prompt_tokens: 7,
        completion_tokens: 3,
    };
    Closed { origin: origin.clone(), tally, how, took: Duration::from_millis(4) }
}

fn served() -> How {
    How::Finished(Finish::Length)
}

#[test]
fn a_record_is_made_once_all_generations_are_closed_whoever_comes_first() {
    let (origin, other) = (origin(), origin());
    let mut requests = Requests::default();
    assert!(requests.closed(closed(&origin, &[("fr-a", 1, 10)], 4, served())).is_none());
    assert!(requests.opened(opened(&origin, 2)).is_none());
    assert!(requests.closed(closed(&other, &[], 9, served())).is_none());
    assert!(requests.is_open(origin.id));
    let stop = How::Finished(Finish::StopString("secret".to_owned()));
    let last = closed(&origin, &[("fr-a", 1, 5), ("fr-a", 2, 1), ("fr-b", 0, 6)], 3, stop);
    let record = requests.closed(last).unwrap().record(Digest([9; 32]), 8);
    assert!(!requests.is_open(origin.id) && requests.is_open(other.id));
    let nodes: Vec<(&str, bool, u64)> = record
        .nodes
        .iter()
        .map(|node| (node.node.as_str(), node.certificate.is_some(), node.rows))
        .collect();
    assert_eq!(nodes, [("fr-a", true, 15), ("fr-a", true, 1), ("fr-b", false, 6)]);
    let classes = record.nodes.iter().map(|node| node.kernel_class.as_deref());
    assert_eq!(classes.collect::<Vec<_>>(), [None, None, Some("bf16/cuda-sm90/1")]);
    assert_eq!((record.membership_epochs, record.placement_epochs), ([3, 5], [13, 15]));
    assert_eq!((record.prompt_tokens, record.completion_tokens), (14, 6));
    assert_eq!((record.retried_rows, record.hedged_rows), (2, 4));
    assert_eq!(
        (record.answers, record.decision),
        (vec!["length".into(), "stop".into()], "served".into())
    );
}

#[test]
fn how_a_request_ended_is_the_worst_that_happened_to_its_answers() {
    let decided = |hows: &[How], generations| {
        let origin = origin();
        let mut requests = Requests::default();
        let mut complete = requests.opened(opened(&origin, generations));
        for how in hows {
            complete = complete.or(requests.closed(closed(&origin, &[], 1, how.clone())));
        }
        let complete = complete.or_else(|| requests.give_up().pop()).unwrap();
        complete.record(Digest([0; 32]), 1).decision
    };
    let failed = How::Failed("no replica of some expert".to_owned());
    assert_eq!(decided(&[served(), How::Disconnected], 2), "disconnected");
    assert_eq!(decided(&[failed, How::Disconnected, served()], 3), "failed");
    assert_eq!(decided(&[served()], 2), "cut off");
    assert_eq!(decided(&[], 0), "served", "nothing was asked of the engine");
}

#[test]
fn nodes_beyond_those_that_a_record_has_room_for_are_counted() {
    let origin = origin();
    let names: Vec<String> = (0..NODES_MAX + 3).map(|n| format!("fr-{n:04}")).collect();
    let nodes: Vec<(&str, u8, u64)> = names.iter().map(|name| (name.as_str(), 1, 1)).collect();
    let mut requests = Requests::default();
    requests.opened(opened(&origin, 1));
    let complete = requests.closed(closed(&origin, &nodes, 1, served())).unwrap();
    let record = complete.record(Digest([0; 32]), 1);
    assert_eq!((record.nodes.len(), record.nodes_omitted), (NODES_MAX, 3));
}
