//! Goal: what the README tells a newcomer to paste works as printed.
//! Method: take every `sh` block that calls curl, run it against a cluster, and if the block is
//! followed by a `json` block, check that the answer has the same shape.

use std::fs;
use std::path::Path;
use std::process::Command;

use entente_tests::Cluster;
use serde_json::Value;

/// The address and the folder in the README; the test's cluster has others.
const ADDRESS: &str = "http://127.0.0.1:8080";
const FOLDER: &str = "@.entente/";

/// One fenced block: its language and its lines.
struct Block {
    language: String,
    text: String,
}

fn blocks(markdown: &str) -> Vec<Block> {
    let mut blocks: Vec<Block> = Vec::new();
    let mut open = false;
    for line in markdown.lines() {
        if let Some(language) = line.strip_prefix("```") {
            open = !open;
            if open {
                blocks.push(Block { language: language.trim().to_owned(), text: String::new() });
            }
        } else if let Some(block) = blocks.last_mut().filter(|_| open) {
            block.text.push_str(line);
            block.text.push('\n');
        }
    }
    blocks
}

fn run(cluster: &Cluster, script: &str) -> String {
    let script = script.replace(ADDRESS, cluster.http());
    let script = script.replace(FOLDER, &format!("@{}/", cluster.data_dir()));
    // A refusal must fail the test although curl itself is content with it.
    let script = script.replace("curl ", "curl --silent --show-error --fail-with-body ");
    let output = Command::new("sh").args(["-e", "-c", &script]).output().unwrap();
    let stdout = String::from_utf8(output.stdout).unwrap();
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{script}\n{stdout}\n{stderr}");
    assert!(!stdout.trim().is_empty(), "no output: {script}");
    stdout
}

/// Same keys, same types and same lengths of lists all the way down; values may differ.
fn assert_same_shape(what: &str, printed: &Value, answered: &Value) {
    match (printed, answered) {
        (Value::Object(printed), Value::Object(answered)) => {
            let keys = |object: &serde_json::Map<String, Value>| {
                object.keys().cloned().collect::<std::collections::BTreeSet<_>>()
            };
            assert_eq!(keys(printed), keys(answered), "{what}");
            for (key, value) in printed {
                assert_same_shape(&format!("{what}.{key}"), value, &answered[key]);
            }
        }
        (Value::Array(printed), Value::Array(answered)) => {
            assert_eq!(printed.len(), answered.len(), "{what}");
            for (at, (printed, answered)) in printed.iter().zip(answered).enumerate() {
                assert_same_shape(&format!("{what}[{at}]"), printed, answered);
            }
        }
        _ => assert_eq!(
            std::mem::discriminant(printed),
            std::mem::discriminant(answered),
            "{what}: {printed} and {answered}"
        ),
    }
}

#[test]
fn every_curl_example_works_as_printed() {
    let readme = Path::new(env!("CARGO_MANIFEST_DIR")).join("../README.md");
    let blocks = blocks(&fs::read_to_string(readme).unwrap());
    let examples: Vec<usize> = (0..blocks.len())
        .filter(|at| blocks[*at].language == "sh" && blocks[*at].text.contains("curl "))
        .collect();
    assert!(!examples.is_empty(), "the README has no curl example");
    let cluster = Cluster::start(&[]);
    for at in examples {
        let answer = run(&cluster, &blocks[at].text);
        let Some(printed) = blocks.get(at + 1).filter(|block| block.language == "json") else {
            continue;
        };
        let printed: Value = serde_json::from_str(&printed.text).unwrap();
        let answered: Value = serde_json::from_str(&answer).unwrap();
        assert_same_shape("answer", &printed, &answered);
        let content = "/choices/0/message/content";
        assert_eq!(printed.pointer(content), answered.pointer(content), "{answer}");
    }
}
