//! What makes a node live, in whichever order links and commits tell of it.

use super::*;

const EXPERT: ExpertKey = (LayerId(0), ExpertId(0));
const HERE: NodeId = NodeId(0);
const ABROAD: NodeId = NodeId(1);

fn region(code: &str) -> Region {
    code.parse().unwrap()
}

fn both() -> RegionSet {
    [region("fr"), region("se")].into()
}

/// One expert with a replica on node 0 in fr and one on node 1 in se, at epochs 1.
fn committed(incarnation: Option<u64>) -> Committed {
    let mut placement = Placement::new();
    let mut members = BTreeMap::new();
    for (id, code) in [(HERE, "fr"), (ABROAD, "se")] {
        placement.add(EXPERT, id);
        let name = format!("{code}-expert-1").parse().unwrap();
        let incarnation = incarnation.map(Incarnation);
        let kernel_class = KernelClass::default();
        let region = region(code);
        members.insert(id, Member { name, region, serves: true, incarnation, kernel_class });
    }
    Committed {
        membership_epoch: MembershipEpoch(1),
        placement_epoch: PlacementEpoch(1),
        members,
        placement: Arc::new(placement),
    }
}

/// The state after some more changes of the members.
fn later(by: u64, change: impl FnOnce(&mut Member)) -> Committed {
    let mut later = committed(Some(5));
    later.membership_epoch.0 += by;
    change(later.members.get_mut(&HERE).unwrap());
    later
}

fn view(incarnation: Option<u64>) -> ClusterView {
    let model = Model {
        digest: ModelDigest([1; 32]),
        kernel_class: KernelClass("f32/test/1".to_owned()),
        layers: [(EXPERT.0, 1)].into(),
    };
    ClusterView::new(region("fr"), model, committed(incarnation))
}

/// What the node says of itself when it is as the view expects, started for the `incarnation`th
/// time.
fn info(view: &ClusterView, id: NodeId, incarnation: u64) -> NodeInfo {
    let member = &view.nodes[&id].member;
    NodeInfo {
        name: member.name.clone(),
        region: member.region,
        fence: Fence {
            membership_epoch: view.membership_epoch,
            placement_epoch: view.placement_epoch,
            incarnation: Incarnation(incarnation),
            model_digest: view.model.digest,
        },
        kernel_class: view.model.kernel_class.clone(),
        experts: view.placement.experts_of(id),
        weights_bytes: 0,
    }
}

fn is_live(view: &ClusterView) -> bool {
    let live = view.fence(HERE).is_some();
    assert_eq!(view.replicas(EXPERT, &both()).next().is_some(), live);
    assert_eq!(view.missing(&both()).is_none(), live);
    live
}

#[test]
fn a_node_is_taken_up_only_if_it_is_what_the_view_expects() {
    type Spoil = fn(&mut NodeInfo);
    let cases: [(&str, Spoil); 5] = [
        ("name", |i| i.name = "se-expert-1".parse().unwrap()),
        ("region", |i| i.region = "se".parse().unwrap()),
        ("model digest", |i| i.fence.model_digest = ModelDigest([2; 32])),
        ("weight format", |i| i.kernel_class = KernelClass("bf16/test/1".to_owned())),
        ("lacks", |i| i.experts.clear()),
    ];
    for (what, spoil) in cases {
        let mut view = view(None);
        let mut info = info(&view, HERE, 5);
        spoil(&mut info);
        let error = view.node_up(HERE, &info).unwrap_err().to_string();
        assert!(error.contains(what), "{error} does not name {what}");
        assert!(!is_live(&view));
    }
}

#[test]
fn epochs_of_the_greeting_and_experts_still_to_be_loaded_do_not_keep_a_minted_start_out() {
    let mut view = view(Some(5));
    let mut info = info(&view, HERE, 5);
    info.fence.membership_epoch.0 += 7;
    info.fence.placement_epoch.0 = 0;
    info.experts.clear();
    view.node_up(HERE, &info).unwrap();
    let fence = view.fence(HERE).unwrap();
    let epochs = (fence.membership_epoch, fence.placement_epoch);
    assert_eq!(epochs, (MembershipEpoch(1), PlacementEpoch(1)), "frames carry the view's own");
}

#[test]
fn without_minted_starts_any_start_is_live_as_soon_as_its_link_is_up() {
    let mut view = view(None);
    let info = info(&view, HERE, 1_234);
    view.node_up(HERE, &info).unwrap();
    assert_eq!(view.fence(HERE), Some(info.fence));
    view.node_down(HERE);
    assert!(!is_live(&view));
}

#[test]
fn link_and_commit_make_a_node_live_in_either_order() {
    let restarted = || later(1, |member| member.incarnation = Some(Incarnation(6)));
    let mut link_first = view(Some(5));
    link_first.node_up(HERE, &info(&link_first, HERE, 6)).unwrap();
    assert!(!is_live(&link_first), "nobody has agreed on this start yet");
    assert!(link_first.follow(restarted()));
    assert!(is_live(&link_first), "no further greeting is needed");

    let mut commit_first = view(Some(5));
    commit_first.node_up(HERE, &info(&commit_first, HERE, 5)).unwrap();
    assert!(commit_first.follow(restarted()));
    assert!(!is_live(&commit_first), "the link leads to a start that is over");
    commit_first.node_up(HERE, &info(&commit_first, HERE, 6)).unwrap();
    assert!(is_live(&commit_first));
    assert_eq!(commit_first, link_first);
}

#[test]
fn a_node_that_is_committed_to_take_no_traffic_is_not_used_although_its_link_is_up() {
    let mut view = view(Some(5));
    view.node_up(HERE, &info(&view, HERE, 5)).unwrap();
    assert!(is_live(&view));
    view.follow(later(1, |member| member.serves = false));
    assert!(!is_live(&view));
    view.follow(later(2, |_| ()));
    assert!(is_live(&view));
}

#[test]
fn a_node_that_is_no_member_any_more_is_forgotten_with_its_link() {
    let mut view = view(Some(5));
    let info = info(&view, HERE, 5);
    view.node_up(HERE, &info).unwrap();
    let mut without = later(1, |_| ());
    without.members.remove(&HERE);
    view.follow(without);
    assert!(!is_live(&view));
    assert_eq!(view.node_up(HERE, &info), Err(Mismatch::NotAMember(HERE)));
    view.follow(later(2, |_| ()));
    assert!(!is_live(&view), "who comes back has to say who it is again");
}

#[test]
fn what_is_older_or_the_same_changes_nothing() {
    let mut view = view(Some(5));
    let mut newer = later(3, |_| ());
    newer.placement_epoch.0 += 1;
    assert!(view.follow(newer.clone()));
    let before = view.clone();
    assert!(!view.follow(newer));
    assert!(!view.follow(later(2, |member| member.serves = false)));
    assert!(!view.follow(later(9, |member| member.serves = false)), "an older placement");
    assert_eq!(view, before);
}

#[test]
fn an_expert_that_is_not_placed_is_missing() {
    let mut view = view(Some(5));
    view.node_up(HERE, &info(&view, HERE, 5)).unwrap();
    assert_eq!(view.missing(&both()), None);
    view.model.layers.insert(EXPERT.0, 2);
    assert_eq!(view.missing(&both()), Some((EXPERT.0, ExpertId(1))));
}

#[test]
fn only_live_nodes_of_the_home_region_serve_and_only_where_the_policy_allows_it() {
    let mut view = view(None);
    let abroad: RegionSet = [region("se")].into();
    for id in [HERE, ABROAD] {
        let info = info(&view, id, 5);
        view.node_up(id, &info).unwrap();
    }
    assert_eq!(view.replicas(EXPERT, &both()).collect::<Vec<_>>(), [HERE]);
    assert_eq!((view.missing(&both()), view.missing(&abroad)), (None, Some(EXPERT)));
    view.node_down(HERE);
    assert_eq!(view.missing(&both()), Some(EXPERT));
}

#[test]
fn kernel_classes_stand_in_one_order_whoever_is_up() {
    let classes = ["bf16/avx2/3", "bf16/cuda-sm90/1", "bf16/avx512bf16/3", "bf16/cuda-sm90/1"];
    let mut members = BTreeMap::new();
    let mut placement = Placement::new();
    for (id, class) in (0..).map(NodeId).zip(classes) {
        let (name, region) = (format!("fr-expert-{id}").parse().unwrap(), region("fr"));
        let kernel_class = KernelClass(class.to_owned());
        members.insert(id, Member { name, region, serves: true, incarnation: None, kernel_class });
        placement.add((LayerId(0), ExpertId(u16::from(id.0 == 1))), id);
    }
    let (membership_epoch, placement_epoch) = (MembershipEpoch(1), PlacementEpoch(1));
    let placement = Arc::new(placement);
    let committed = Committed { membership_epoch, placement_epoch, members, placement };
    let model = Model {
        digest: ModelDigest([1; 32]),
        kernel_class: KernelClass("bf16/avx512bf16/3".to_owned()),
        layers: [(LayerId(0), 2)].into(),
    };
    let mut view = ClusterView::new(region("fr"), model, committed.clone());
    let ranks = |view: &ClusterView| (0..4).map(|id| view.rank(NodeId(id))).collect::<Vec<_>>();
    // Devices, then the coordinator's own, then the others.
    assert_eq!(ranks(&view), [2, 0, 1, 0]);
    assert_eq!(view.first_rank((LayerId(0), ExpertId(0)), &both()), 0);
    assert_eq!(view.first_rank((LayerId(0), ExpertId(0)), &[region("se")].into()), u16::MAX);

    let info = info(&view, NodeId(0), 5);
    let info = NodeInfo { kernel_class: KernelClass("bf16/avx2/3".to_owned()), ..info };
    view.node_up(NodeId(0), &info).unwrap();
    assert_eq!(ranks(&view), [2, 0, 1, 0], "a link that comes up changes nothing");
    let now = NodeInfo { kernel_class: KernelClass("bf16/avx512bf16/3".to_owned()), ..info };
    view.node_up(NodeId(0), &now).unwrap();
    assert_eq!(ranks(&view), [1, 0, 1, 0], "a node says best what it computes with");

    let mut later = committed;
    later.membership_epoch.0 += 1;
    later.members.get_mut(&NodeId(0)).unwrap().kernel_class = KernelClass::default();
    view.follow(later);
    assert_eq!(ranks(&view), [1, 0, 1, 0], "and what nobody has committed is not forgotten");
}
