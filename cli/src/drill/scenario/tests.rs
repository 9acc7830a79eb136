//! What a file may say, and how it is refused.

use super::*;

const FILE: &str = "
name: two faults
proves: Something.
cluster: --regions fr=3 --replicas 2
load:
  streams: 4
  requests: 100
  max_tokens: 64
  prompts: {phrases: 1-4}
  seed: 7
  regions: [fr]
faults:
  - at: 400 tokens
    action: kill
    target: fr-expert-1
  - at: 2.5s
    action: [drain, {pause: {for: 300ms}}]
    target: {role: expert-node, region: fr, pick: each}
    repeat: 2
    every: 5
expect:
  identical: true
  added_stall_ms: {p50: 50, p99: 300}
short:
  load: {rate: 2.5, duration: 1m, max_tokens: 8}
";

fn refusal(from: &str, to: &str) -> String {
    assert!(FILE.contains(from), "{from:?}");
    Scenario::parse(&FILE.replace(from, to), false).unwrap_err().to_string()
}

#[test]
fn a_scenario_says_what_runs_and_what_breaks() {
    let scenario = Scenario::parse(FILE, false).unwrap();
    assert_eq!(scenario.load.pace().unwrap(), Pace::Closed { streams: 4 });
    assert_eq!((scenario.load.distinct(), scenario.load.least().0), (100, 100));
    let [kill, drain] = &scenario.faults[..] else { panic!("two faults") };
    assert_eq!((kill.at, &kill.actions.0[..]), (Moment::Tokens(400), &[Action::Kill {}][..]));
    assert_eq!(kill.target.as_ref().unwrap().name.as_ref().unwrap().to_string(), "fr-expert-1");
    assert_eq!(drain.at, Moment::After(Duration::from_millis(2_500)));
    assert_eq!(drain.every, Some(Moment::After(Duration::from_secs(5))));
    let pause = Action::Pause { lasts: Some(Span(Duration::from_millis(300))) };
    assert_eq!(drain.actions.0, [Action::Drain {}, pause]);
    assert_eq!(drain.target.as_ref().unwrap().pick, Pick::Each);
    assert_eq!(scenario.expect.added_stall_ms, Some(Limits { p50: Some(50.0), p99: Some(300.0) }));
}

#[test]
fn a_section_of_the_short_form_stands_for_the_one_of_the_same_name() {
    let scenario = Scenario::parse(FILE, true).unwrap();
    assert_eq!(scenario.load.pace().unwrap(), Pace::Open { rate: 2.5 });
    assert_eq!(scenario.load.least().1, Duration::from_secs(60));
    assert_eq!(scenario.faults.len(), 2);
    assert!(scenario.expect.identical);
}

#[test]
fn an_unknown_key_is_named_with_its_line() {
    for (from, to, key, line) in [
        ("proves: Something.", "prove: Something.", "prove", 3),
        ("  seed: 7", "  seeds: 7", "seeds", 10),
        ("pick: each", "picks: each", "picks", 18),
        ("{for: 300ms}", "{long: 300ms}", "long", 17),
        ("p99: 300", "p95: 300", "p95", 23),
    ] {
        let text = refusal(from, to);
        assert!(text.contains(&format!("`{key}`")), "{text}");
        assert!(text.contains(&format!("line {line}")), "{to:?} at line {line}: {text}");
    }
}

#[test]
fn what_makes_no_sense_is_refused_before_anything_runs() {
    for (from, to, part) in [
        ("  streams: 4\n", "", "either `streams`"),
        ("  streams: 4\n", "  streams: 4\n  rate: 1\n", "either `streams`"),
        ("  requests: 100\n", "", "`requests`, `duration`"),
        ("max_tokens: 64", "max_tokens: 0", "at least 1"),
        ("    every: 5\n", "", "needs `every`"),
        ("    target: fr-expert-1\n", "", "`kill` needs a `target`"),
        ("action: kill\n", "action: kill-leader\n", "takes no `target`"),
        ("action: kill\n", "action: explode\n", "explode"),
        ("at: 400 tokens", "at: 400 coins", "no time"),
        ("at: 400 tokens", "at: -1", "expected a time"),
        ("regions: [fr]", "regions: []", "`regions` is empty"),
        ("{phrases: 1-4}", "{phrases: 4-1}", "range of lengths"),
    ] {
        let text = refusal(from, to);
        assert!(text.contains(part), "{to:?}: {text}");
    }
}

#[test]
fn actions_on_links_speak_the_words_of_the_relay() {
    let names = ["fr-expert-1".parse().unwrap()];
    for (action, expected) in [
        ("slow: {factor: 20, delay: 5ms}", "fr-expert-1=5ms+slow:20"),
        ("slow: {delay: 1.5s, link: fr-se}", "fr-se=1500ms"),
        ("cut: {link: se-fr, for: 3s}", "se-fr=cut"),
        ("cut", "fr-expert-1=cut"),
        ("cut-one-way: {link: se->fr}", "se->fr=cut"),
        ("disconnect", "fr-expert-1=cut"),
        ("heal: {link: fr-se}", "fr-se=clear"),
        ("kill", ""),
    ] {
        let action: Action = serde_saphyr::from_str(action).unwrap();
        assert_eq!(action.changes(&names).concat(), expected);
    }
}

#[test]
fn a_way_on_which_nothing_may_pass_leads_from_some_processes_to_others() {
    let text = "
no_bytes:
  - {from: {role: coordinator, region: fr}, to: {role: expert-node, region: se}}
  - {from: fr-expert-1, to: {}}
";
    let expect: Expect = serde_saphyr::from_str(text).unwrap();
    let ways: Vec<String> = expect.no_bytes.iter().map(Way::to_string).collect();
    assert_eq!(ways, ["fr coordinator -> se expert-node", "fr-expert-1 -> anybody"]);
}

#[test]
fn a_link_is_of_the_kind_that_the_action_is_about() {
    for (action, part) in [
        ("{cut: {link: fr-se}}", "takes no `target`"),
        ("cut-one-way", "wants a link"),
        ("slow", "is not 30ms"),
    ] {
        let text = refusal("action: kill\n", &format!("action: {action}\n"));
        assert!(text.contains(part), "{action}: {text}");
    }
    let one_way = "action: {cut: {link: fr->se}}\n    repeat: 1 #";
    let text = refusal("action: kill\n    target:", one_way);
    assert!(text.contains("no other wants a link"), "{text}");
}
