//! Goal: what a client says, and the key that it shows, stay between the client and the coordinator
//! that computes the answer.
//! Method: words and keys that occur nowhere else go through a run in which every process logs all
//! that it can, with good requests and bad ones, whole and streamed answers, and a node that dies
//! meanwhile. Then nothing that the cluster has written or shows holds any of them, in any of the
//! forms in which programs like to write bytes.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use data_encoding::{BASE64_NOPAD, BASE64URL_NOPAD};
use entente_tests::process::{Signal, wait_for};
use entente_tests::{Cluster, http};
use serde_json::{Value, json};

/// What nobody else says.
const PROMPT: &str = "Kvastfening quetzalcoatlus 7719";
const SYSTEM: &str = "Brontofobi xylophage 4463";
const STOP: &str = "Zwitterjon 9127";
/// A key that is none, but looks like one.
const WRONG_KEY: &str = "mk_5d3f00c0ffee5d3f_PyJvZ2FuYXJ5LWtleS10aGF0LWlzLW5vbmUtYXQtYWxsISE";

/// Files that hold the cluster's own key, so that clients find it there.
const KEY_FILES: [&str; 2] = ["cluster.json", "authorization"];

/// The process that dies in the middle of it.
const KILLED: &str = "fr-expert-1";

/// Ids in a row that are no coincidence.
const IDS_MIN: usize = 6;

/// The forms in which programs write the bytes of a text.
fn forms(text: &str) -> Vec<String> {
    let hex: String = text.bytes().map(|byte| format!("{byte:02x}")).collect();
    // What base64 makes of bytes depends on where they begin; the first and last characters also on
    // what is beside them.
    let base64 = (0..3).flat_map(|before| {
        let bytes = [&b"\0\0\0"[..before], text.as_bytes()].concat();
        [BASE64_NOPAD.encode(&bytes), BASE64URL_NOPAD.encode(&bytes)]
            .map(|encoded| encoded[4..encoded.len() - 2].to_owned())
    });
    let mut forms = vec![text.to_owned(), hex.to_uppercase(), hex];
    forms.extend(base64);
    forms
}

/// Tokens as programs print lists of them.
fn lists(ids: &[Value]) -> Vec<String> {
    assert!(ids.len() >= IDS_MIN, "{ids:?}");
    let ids: Vec<String> = ids.iter().map(Value::to_string).collect();
    [", ", ",", " "].map(|between| ids.join(between)).into()
}

fn contains(bytes: &[u8], word: &str) -> bool {
    bytes.windows(word.len()).any(|window| window == word.as_bytes())
}

fn files(folder: &Path) -> Vec<PathBuf> {
    let mut files = Vec::new();
    for entry in fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        match path.symlink_metadata().unwrap().file_type() {
            kind if kind.is_dir() => files.extend(self::files(&path)),
            kind if kind.is_file() => files.push(path),
            _ => {}
        }
    }
    files
}

fn chat(cluster: &Cluster, body: &Value) -> http::Reply {
    http::post(&format!("{}/v1/chat/completions", cluster.http()), body)
}

/// Everything that a client may do with a prompt, right and wrong; gives what was answered to what
/// was wrong, what is shown of requests, and the prompt's own tokens.
fn run(cluster: &Cluster) -> (Vec<String>, Vec<Value>) {
    let messages = json!([
        {"role": "system", "content": SYSTEM},
        {"role": "user", "content": PROMPT},
    ]);
    let good = json!({"messages": messages, "max_tokens": 24, "stop": [STOP]});
    let with = |field: &str, value: Value| {
        let mut body = good.clone();
        body[field] = value;
        body
    };
    let mut shown = Vec::new();
    let answered = chat(cluster, &good).json();
    let id = answered["id"].as_str().unwrap().rsplit('-').next().unwrap().to_owned();
    cluster.process(KILLED).signal(Signal::KILL);
    assert_eq!(chat(cluster, &good).status, 200);
    let streamed = with("stream", json!(true));
    assert!(
        http::stream(&format!("{}/v1/chat/completions", cluster.http()), &streamed).count() > 1
    );
    let completions = format!("{}/v1/completions", cluster.http());
    let scored = json!({"prompt": PROMPT, "max_tokens": 0, "echo": true, "logprobs": 1,
        "return_token_ids": true});
    let scored = http::post(&completions, &scored).json();
    let ids = scored["choices"][0]["prompt_token_ids"].as_array().unwrap();

    for bad in [
        with("temperature", json!(99)),
        with("n", json!(1_000)),
        with("messages", json!([{"role": PROMPT, "content": PROMPT}])),
        with("messages", json!([{"role": "user", "content": [{"type": "text", "x": PROMPT}]}])),
        with("max_tokens", json!(4_000_000_000_u32)),
        with("seed", json!(PROMPT)),
        with("stop", json!([PROMPT, PROMPT, PROMPT, PROMPT, PROMPT])),
        with("residency", json!(["jp"])),
    ] {
        let reply = chat(cluster, &bad);
        assert!((400..500).contains(&reply.status), "{bad}: {}", reply.text);
        shown.push(reply.text);
    }
    shown.push(http::post_text(&completions, &format!("{{\"prompt\": \"{PROMPT}")).text);
    shown.push(http::get(&format!("{}/v1/receipts/{id}", cluster.http())).text);
    let key = cluster.api_key().unwrap().to_owned();
    http::show_key(cluster.http(), WRONG_KEY);
    let refused = chat(cluster, &good);
    assert_eq!(refused.status, 401, "{}", refused.text);
    shown.push(refused.text);
    http::show_key(cluster.http(), &key);
    // A token of the model's own may come first; the words are in those after it.
    (shown, ids[1..].to_vec())
}

#[test]
fn no_word_of_a_prompt_and_no_key_is_written_or_shown_anywhere() {
    let cluster = Cluster::start(&["--regions", "fr=2", "--replicas", "2", "--log", "trace"]);
    let (mut shown, ids) = run(&cluster);
    // The one that was killed may not be back yet, and has forgotten what it counted.
    let processes = cluster.file()["processes"].as_array().unwrap().iter();
    let others = processes.filter(|process| process["name"] != KILLED);
    shown.extend(others.filter_map(|p| p["metrics"].as_str()).map(|url| http::get(url).text));
    let key = cluster.api_key().unwrap().to_owned();
    // mk, the key's number, and the secret, in which there may be more of what parts them.
    let secret = key.splitn(3, '_').nth(2).unwrap();
    let said: Vec<String> =
        [PROMPT, SYSTEM, STOP].into_iter().flat_map(forms).chain(lists(&ids)).collect();
    let keys: Vec<String> = [secret, WRONG_KEY].into_iter().flat_map(forms).collect();

    // What is written in the background is written by then.
    let logged = || {
        let log = Path::new(cluster.data_dir()).join("logs/fr-coordinator.log");
        fs::metadata(log).is_ok_and(|log| log.len() > 100_000).then_some(())
    };
    assert!(wait_for(Duration::from_secs(10), logged).is_some(), "hardly anything is logged");
    let mut found = Vec::new();
    let mut look = |place: &str, bytes: &[u8], words: &[String]| {
        let hits = words.iter().filter(|word| contains(bytes, word));
        found.extend(hits.map(|word| format!("{place}: {word}")));
    };
    for text in &shown {
        look(text, text.as_bytes(), &said);
        look(text, text.as_bytes(), &keys);
    }
    let written = files(Path::new(cluster.data_dir()));
    assert!(written.len() > 20, "{written:?}");
    for file in written {
        // A file that is gone by now was one for a moment.
        let bytes = fs::read(&file).unwrap_or_default();
        let place = file.display().to_string();
        look(&place, &bytes, &said);
        if !KEY_FILES.iter().any(|name| file.ends_with(name)) {
            look(&place, &bytes, &keys);
        }
    }
    assert!(found.is_empty(), "{} places:\n{}", found.len(), found.join("\n"));
}
