//! Requests that may go to different regions run side by side and nobody can tell; one that may not
//! be here is refused, by the door and again by the engine.

use entente_coordinator::config::EngineConfig;
use serde_json::{Value, json};

use crate::setup::*;

/// An engine in fr whose expert nodes are in its process; se can be asked too, and de cannot.
fn engine() -> Engine {
    let roster = roster(&[listener(), listener()], 1);
    let mut config = config(&roster, Transport::Inproc, EngineConfig::default());
    let url = |code: &str| (code.parse().unwrap(), format!("https://{code}.example"));
    config.api.endpoints = ["fr", "se"].map(url).into();
    Engine::start(&config)
}

#[test]
fn rows_of_different_policies_share_steps_and_one_that_may_not_be_here_is_refused_alone() {
    let engine = engine();
    let policies: [&[&str]; 3] = [&["fr"], &["fr", "se"], &["de", "fr"]];
    let origin_of = |number: u32| origin(policies[number as usize % policies.len()]);
    let mut all: Vec<_> =
        (0..REQUESTS).map(|number| engine.submit_as(number, origin_of(number))).collect();
    let refused = rest(&mut engine.submit_as(0, origin(&["se", "de"])));
    assert!(refused.contains("Failed(NotPermitted(fr))"), "{refused}");
    let answers: Vec<String> = all.iter_mut().map(rest).collect();
    assert!(answers == reference());
}

#[test]
fn the_door_serves_refuses_or_names_the_right_entry() {
    let engine = engine();
    let ask = |residency: Value, header: Option<&str>| {
        let body = json!({ "prompt": "a", "max_tokens": 1, "residency": residency });
        let header = header.map(|value| ("x-entente-residency", value));
        let (status, headers, body) = engine.post(&body.to_string(), header.as_slice());
        let body: Value = serde_json::from_str(&body).unwrap();
        (status, headers, body["error"].clone())
    };
    for (residency, header) in [
        (json!(null), None),
        (json!(["fr"]), None),
        (json!(["fr", "de"]), None),
        (json!(null), Some("se, fr")),
    ] {
        assert_eq!(ask(residency.clone(), header).0, 200, "{residency} {header:?}");
    }
    for (residency, header) in [
        (json!(["de"]), None),
        (json!([]), None),
        (json!(["fr"]), Some("se")),
        (json!(null), Some("de")),
    ] {
        let (status, _, error) = ask(residency.clone(), header);
        assert_eq!(status, 403, "{residency} {header:?}");
        assert_eq!(error["code"], "residency_unsatisfiable");
        assert!(error["message"].as_str().unwrap().contains("the policy allows fr, se"), "{error}");
    }
    let (status, headers, error) = ask(json!(["se", "de"]), None);
    assert_eq!((status, &headers["location"]), (421, &"https://se.example".parse().unwrap()));
    assert_eq!(error["code"], "wrong_entry_region");
    assert!(error["message"].as_str().unwrap().contains("https://se.example"), "{error}");
    let (status, _, error) = ask(json!(["FR"]), None);
    assert_eq!((status, &error["param"]), (400, &json!("residency")));
    // Nothing of what was refused has come to the engine.
    let answered = [0; 4].map(|_| engine.next_closed().origin.id);
    assert_eq!(engine.closed.try_iter().count(), 0, "besides {answered:?}");
}
