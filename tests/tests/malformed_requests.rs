//! Goal: a bad request is the client's error, told so that the client can mend it, and never the
//! process's.
//! Method: send each to a running cluster, check status, shape and the parameter that is blamed,
//! and see that the server still answers as before.

use entente_tests::http::{self, Reply};
use entente_tests::{Cluster, Golden};
use serde_json::{Value, json};

const COMPLETIONS: &str = "/v1/completions";
const CHAT: &str = "/v1/chat/completions";

/// What is sent, and the answer that it deserves.
struct Bad {
    what: &'static str,
    path: &'static str,
    body: String,
    status: u16,
    /// The blamed parameter; none when the fault is not in one.
    param: Option<&'static str>,
}

fn bad(what: &'static str, path: &'static str, param: &'static str, body: Value) -> Bad {
    Bad { what, path, body: body.to_string(), status: 400, param: Some(param) }
}

fn completion(what: &'static str, param: &'static str, value: Value) -> Bad {
    let mut body = json!({"prompt": "a", "max_tokens": 2});
    body[param] = value;
    bad(what, COMPLETIONS, param, body)
}

fn chat(what: &'static str, param: &'static str, value: Value) -> Bad {
    let mut body = json!({"messages": [{"role": "user", "content": "a"}], "max_tokens": 2});
    body[param] = value;
    bad(what, CHAT, param, body)
}

fn text(what: &'static str, path: &'static str, status: u16, body: impl Into<String>) -> Bad {
    Bad { what, path, body: body.into(), status, param: None }
}

fn bodies() -> Vec<Bad> {
    vec![
        text("no body", COMPLETIONS, 400, ""),
        text("not JSON", COMPLETIONS, 400, "{\"prompt\": \"a\""),
        text("not an object", COMPLETIONS, 400, "[]"),
        text("not UTF-8 escapes", CHAT, 400, "{\"messages\": \"\\ud800\"}"),
        text("nested too deep", CHAT, 400, "[".repeat(100_000)),
        text("too large", COMPLETIONS, 413, format!("{{\"prompt\": \"{}\"}}", "a".repeat(1 << 20))),
        text("no such path", "/v1/embeddings", 404, "{}"),
    ]
}

fn completions() -> Vec<Bad> {
    let unknown = completion("an unknown model", "model", json!("gpt-17"));
    vec![
        Bad { status: 404, ..unknown },
        completion("a prompt that is a number", "prompt", json!(7)),
        completion("a prompt without tokens", "prompt", json!([])),
        completion("a token beyond the vocabulary", "prompt", json!([1, 1024])),
        completion("a token far beyond it", "prompt", json!([4_294_967_295u32])),
        completion("a negative token", "prompt", json!([-1])),
        completion("a token that is a fraction", "prompt", json!([1.5])),
        completion("a prompt longer than the context", "prompt", json!(vec![1; 5_000])),
        completion("too many prompts", "prompt", json!(vec!["a"; 1_000])),
        completion("more tokens than fit", "max_tokens", json!(4_000_000_000u32)),
        completion("negative tokens", "max_tokens", json!(-1)),
        completion("no tokens and no echo", "max_tokens", json!(0)),
        completion("a temperature below zero", "temperature", json!(-0.1)),
        completion("a temperature too high", "temperature", json!(1e9)),
        completion("a temperature that is text", "temperature", json!("hot")),
        completion("top_p of zero", "top_p", json!(0)),
        completion("top_p above one", "top_p", json!(1.01)),
        completion("top_k below -1", "top_k", json!(-2)),
        completion("min_p above one", "min_p", json!(2)),
        completion("a seed that is text", "seed", json!("x")),
        completion("no answers", "n", json!(0)),
        completion("too many answers", "n", json!(1_000)),
        completion("too many logprobs", "logprobs", json!(1_000)),
        completion("an empty stop string", "stop", json!([""])),
        completion("too many stop strings", "stop", json!(vec!["x"; 100])),
        completion("stream that is text", "stream", json!("yes")),
        completion("what is not implemented", "logit_bias", json!({"1": 5})),
        completion("a penalty", "presence_penalty", json!(1.0)),
        completion("a suffix", "suffix", json!("end")),
        bad("no prompt", COMPLETIONS, "prompt", json!({"max_tokens": 2})),
    ]
}

fn chats() -> Vec<Bad> {
    let user = json!({"role": "user", "content": "a"});
    vec![
        bad("no messages", CHAT, "messages", json!({"max_tokens": 2})),
        chat("an empty conversation", "messages", json!([])),
        chat("messages that are text", "messages", json!("hello")),
        chat(
            "a role that the template refuses",
            "messages",
            json!([{"role": "x", "content": "a"}]),
        ),
        chat("a message without content", "messages", json!([{"role": "user"}])),
        chat(
            "a picture",
            "messages",
            json!([{"role": "user", "content": [{"type": "image_url"}]}]),
        ),
        chat("too many messages", "messages", json!(vec![&user; 5_000])),
        chat("top_logprobs without logprobs", "top_logprobs", json!(3)),
        chat("zero tokens", "max_tokens", json!(0)),
        chat("zero completion tokens", "max_completion_tokens", json!(0)),
        chat("tools", "tools", json!([{"type": "function", "function": {"name": "f"}}])),
        chat("a response format", "response_format", json!({"type": "json_object"})),
    ]
}

/// What is wrong with the server's answer, if anything.
fn fault(bad: &Bad, reply: &Reply) -> Option<String> {
    let error = &reply.json()["error"];
    let param = bad.param.map_or(Value::Null, Value::from);
    let told = error["message"].as_str().is_some_and(|message| message.len() > 5)
        && error["type"].is_string()
        && error["code"] == reply.status
        && error["param"] == param;
    if reply.status == bad.status && told {
        return None;
    }
    Some(format!(
        "{}: expected {} {param}, got {} {}",
        bad.what, bad.status, reply.status, reply.text
    ))
}

#[test]
fn bad_requests_are_refused_by_name_and_the_server_lives() {
    let golden = Golden::load("mixtral");
    let cluster = Cluster::start(&["--model", golden.path(), "--regions", "fr=1"]);
    let good = json!({"prompt": "a", "max_tokens": 8, "temperature": 0, "logprobs": 1});
    let url = format!("{}{COMPLETIONS}", cluster.http());
    let before = http::post(&url, &good).choices();

    let all: Vec<Bad> = [bodies(), completions(), chats()].into_iter().flatten().collect();
    assert!(all.len() >= 25, "{} cases", all.len());
    let faults: Vec<String> = all
        .iter()
        .filter_map(|bad| {
            let reply = http::post_text(&format!("{}{}", cluster.http(), bad.path), &bad.body);
            fault(bad, &reply)
        })
        .collect();
    assert!(faults.is_empty(), "{} of {}:\n{}", faults.len(), all.len(), faults.join("\n"));

    assert_eq!(http::get(&url).status, 405);
    assert_eq!(http::post(&url, &good).choices(), before);
    assert!(cluster.processes().iter().all(|process| process.is_alive()), "a process has ended");
}
