//! Goal: what is wrong with a checkpoint, a configuration or a command line is told by name, with a
//! stable exit code, and before anything is served.
//! Method: spoil one thing at a time and run the real binary.

use std::fs;
use std::net::TcpListener;
use std::path::{Path, PathBuf};

use entente_tests::cluster::{Finished, run};
use entente_tests::{Cluster, Golden};
use serde_json::{Value, json};
use tempfile::TempDir;

/// The command line or a configuration file is wrong.
const MISUSE: i32 = 2;
/// Something failed while running.
const FAILED: i32 = 1;

/// Checks that a run failed with this code and named all of these.
fn assert_refused(what: &str, end: &Finished, code: i32, named: &[&str]) {
    assert_eq!(end.code(), Some(code), "{what}: {end:#?}");
    for name in named {
        assert!(end.stderr.contains(name), "{what}: nothing about {name:?} in\n{}", end.stderr);
    }
    assert!(!end.stderr.contains("panicked"), "{what}: {}", end.stderr);
    assert_eq!(end.stdout, "", "{what}");
}

fn up_fails(args: &[&str]) -> Finished {
    Cluster::try_start(args).expect_err("the cluster started")
}

/// A copy of a golden checkpoint that can be spoiled.
struct Copy {
    dir: TempDir,
}

impl Copy {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        for entry in fs::read_dir(Golden::load("mixtral").dir).unwrap() {
            let entry = entry.unwrap();
            fs::copy(entry.path(), dir.path().join(entry.file_name())).unwrap();
        }
        Self { dir }
    }

    fn path(&self, file: &str) -> PathBuf {
        self.dir.path().join(file)
    }

    fn edit_json(&self, file: &str, edit: impl FnOnce(&mut Value)) {
        let mut value = serde_json::from_slice(&fs::read(self.path(file)).unwrap()).unwrap();
        edit(&mut value);
        fs::write(self.path(file), value.to_string()).unwrap();
    }

    /// Rewrites the safetensors header, leaving the data where it is.
    fn edit_header(&self, edit: impl FnOnce(&mut Value)) {
        let bytes = fs::read(self.path("model.safetensors")).unwrap();
        let len = usize::try_from(u64::from_le_bytes(bytes[..8].try_into().unwrap())).unwrap();
        let mut header = serde_json::from_slice(&bytes[8..8 + len]).unwrap();
        edit(&mut header);
        let header = header.to_string().into_bytes();
        let parts = [&(header.len() as u64).to_le_bytes()[..], &header, &bytes[8 + len..]];
        fs::write(self.path("model.safetensors"), parts.concat()).unwrap();
    }

    fn truncate(&self, file: &str, cut: u64) {
        let file = fs::File::options().write(true).open(self.path(file)).unwrap();
        let len = file.metadata().unwrap().len();
        file.set_len(len - cut).unwrap();
    }
}

const GATE: &str = "model.layers.1.block_sparse_moe.gate.weight";
const EXPERT: &str = "model.layers.2.block_sparse_moe.experts.7.w2.weight";

/// What is spoilt, how, and what the refusal must name.
type Spoilt = (&'static str, Box<dyn FnOnce(&Copy)>, &'static [&'static str]);

fn spoilt_config() -> Vec<Spoilt> {
    let set = |key: &'static str, value: Value| {
        Box::new(move |copy: &Copy| copy.edit_json("config.json", |config| config[key] = value))
    };
    let rope = |copy: &Copy| {
        let rope = json!({"rope_theta": 1e6, "rope_type": "longrope"});
        copy.edit_json("config.json", |config| config["rope_parameters"] = rope);
    };
    vec![
        (
            "no config.json",
            Box::new(|copy| fs::remove_file(copy.path("config.json")).unwrap()),
            &["config.json"],
        ),
        (
            "config.json is not JSON",
            Box::new(|copy| fs::write(copy.path("config.json"), "{").unwrap()),
            &["config.json"],
        ),
        (
            "an architecture that is not supported",
            set("architectures", json!(["MambaForCausalLM"])),
            &["config.json", "MambaForCausalLM"],
        ),
        ("a rope type that is not supported", Box::new(rope), &["config.json", "longrope"]),
        (
            "more experts a token than there are",
            set("num_experts_per_tok", json!(9)),
            &["config.json", "num_experts_per_tok"],
        ),
        (
            "heads that do not divide",
            set("num_key_value_heads", json!(3)),
            &["config.json", "num_key_value_heads"],
        ),
        ("a size that overflows", set("hidden_size", json!(u64::MAX)), &["config.json"]),
    ]
}

fn spoilt_tensors() -> Vec<Spoilt> {
    const FILE: &str = "model.safetensors";
    let truncate = |copy: &Copy| copy.truncate(FILE, 1_000);
    let endless = |copy: &Copy| fs::write(copy.path(FILE), u64::MAX.to_le_bytes()).unwrap();
    let rename = |header: &mut Value| {
        let gate = header.as_object_mut().unwrap().remove(GATE).unwrap();
        header["model.layers.1.unused"] = gate;
    };
    let transpose = |header: &mut Value| header[EXPERT]["shape"].as_array_mut().unwrap().reverse();
    let overlap = |header: &mut Value| {
        let offsets = header["lm_head.weight"]["data_offsets"].clone();
        header["model.embed_tokens.weight"]["data_offsets"] = offsets;
    };
    vec![
        (
            "no safetensors",
            Box::new(|copy| fs::remove_file(copy.path(FILE)).unwrap()),
            &["safetensors"],
        ),
        ("truncated safetensors", Box::new(truncate), &[FILE]),
        ("a header that is longer than the file", Box::new(endless), &[FILE]),
        ("a missing gate", Box::new(move |copy| copy.edit_header(rename)), &[GATE]),
        ("a misshapen expert", Box::new(move |copy| copy.edit_header(transpose)), &[EXPERT, "112"]),
        ("overlapping tensors", Box::new(move |copy| copy.edit_header(overlap)), &[FILE]),
    ]
}

fn spoilt_tokenizer() -> Vec<Spoilt> {
    const FILE: &str = "tokenizer.json";
    let add_token = |tokenizer: &mut Value| {
        let added = tokenizer["added_tokens"].as_array_mut().unwrap();
        let mut token = added[0].clone();
        token["id"] = json!(2_000);
        token["content"] = json!("<one too many>");
        added.push(token);
    };
    vec![
        ("no tokenizer", Box::new(|copy| fs::remove_file(copy.path(FILE)).unwrap()), &[FILE]),
        (
            "a tokenizer with more ids than the embedding",
            Box::new(move |copy| copy.edit_json(FILE, add_token)),
            &["tokenizer"],
        ),
    ]
}

#[test]
fn a_bad_checkpoint_is_refused_with_file_tensor_and_reason() {
    for (what, spoil, named) in
        [spoilt_config(), spoilt_tensors(), spoilt_tokenizer()].into_iter().flatten()
    {
        let copy = Copy::new();
        spoil(&copy);
        let model = copy.dir.path().to_str().unwrap();
        let end = up_fails(&["--model", model, "--regions", "fr=1"]);
        assert_refused(what, &end, FAILED, named);
    }
}

#[test]
fn a_packed_model_is_refused_by_the_part_that_is_damaged_and_for_another_format() {
    let dir = tempfile::tempdir().unwrap();
    let packed = dir.path().join("packed");
    let (model, out) = (Golden::load("mixtral").path().to_owned(), packed.to_str().unwrap());
    let end = run(&["model", "import", &model, "--weights", "q8", "--out", out]);
    assert_eq!(end.code(), Some(0), "{end:#?}");
    let end = up_fails(&["--model", out, "--weights", "bf16"]);
    assert_refused("another format", &end, FAILED, &["weights.entente", "is q8, but bf16"]);
    let end = run(&["model", "import", &model, "--out", dir.path().to_str().unwrap()]);
    assert_refused("a folder of others", &end, FAILED, &["no import wrote"]);
    let end = run(&["model", "verify", &model]);
    assert_refused("nothing to verify", &end, FAILED, &["nothing is known of it"]);

    // The first byte of the first part.
    let file = packed.join("weights.entente");
    let mut bytes = fs::read(&file).unwrap();
    bytes[4_096] ^= 1;
    fs::write(&file, bytes).unwrap();
    let named = ["weights.entente", "embedding", "checksum"];
    let end = up_fails(&["--model", out, "--weights", "q8"]);
    assert_refused("a flipped bit", &end, FAILED, &named);
    assert_refused("a flipped bit, verify", &run(&["model", "verify", out]), FAILED, &named);
}

#[test]
fn a_bad_command_line_is_refused_with_the_reason() {
    let taken = TcpListener::bind("127.0.0.1:0").unwrap();
    let taken = taken.local_addr().unwrap().to_string();
    let cases: &[(&str, &[&str], i32, &[&str])] = &[
        ("no such model", &["--model", "/no/such/model"], MISUSE, &["/no/such/model"]),
        ("a region of three letters", &["--regions", "fra=2"], MISUSE, &["fra"]),
        ("a region in capitals", &["--regions", "FR=2"], MISUSE, &["FR"]),
        ("a region twice", &["--regions", "fr=2,fr=1"], MISUSE, &["fr", "twice"]),
        ("a region without nodes", &["--regions", "fr=0"], MISUSE, &["fr"]),
        ("too many nodes", &["--regions", "fr=100000"], MISUSE, &["100000"]),
        (
            "more replicas than nodes",
            &["--regions", "fr=3,se=2", "--replicas", "3"],
            MISUSE,
            &["takes 3 nodes", "se has 2"],
        ),
        ("no replicas", &["--replicas", "0"], MISUSE, &["replicas"]),
        ("an unknown weight format", &["--weights", "int3"], MISUSE, &["int3", "bf16"]),
        ("an unknown transport", &["--transport", "smoke"], MISUSE, &["smoke"]),
        ("an unknown flag", &["--turbo"], MISUSE, &["--turbo"]),
        ("an address that is none", &["--http", "somewhere"], MISUSE, &["somewhere"]),
        ("a port in use", &["--http", &taken], FAILED, &[&taken, "fr-coordinator"]),
        ("a wrong log filter", &["--log", "a=b=c"], MISUSE, &["a=b=c"]),
    ];
    for (what, args, code, named) in cases {
        let data = tempfile::tempdir().unwrap();
        let base = ["up", "--data-dir", data.path().to_str().unwrap(), "--once", "x"];
        assert_refused(what, &run(&[&base, *args].concat()), *code, named);
    }
}

/// A valid configuration of an expert node that serves the golden checkpoint alone.
fn expert_node_toml() -> String {
    let model = Golden::load("mixtral").path().to_owned();
    format!(
        "name = \"fr-expert-1\"\nregion = \"fr\"\nlisten = \"127.0.0.1:0\"\nmodel = \"{model}\"\n\
         weights = \"f32\"\n\n[cluster]\nname = \"test\"\nreplicas = 1\n\n[[cluster.nodes]]\n\
         name = \"fr-expert-1\"\nregion = \"fr\"\naddress = \"127.0.0.1:4001\"\n"
    )
}

fn coordinator_toml() -> String {
    expert_node_toml().replace(
        "name = \"fr-expert-1\"\nregion = \"fr\"\nlisten",
        "name = \"c\"\nregion = \"fr\"\nhttp",
    )
}

#[test]
fn a_bad_configuration_file_is_refused_with_the_key() {
    let (node, coordinator) = (expert_node_toml(), coordinator_toml());
    let cases: Vec<(&str, &str, String, i32, &[&str])> = vec![
        ("an unknown key", "expert-node", format!("turbo = 1\n{node}"), MISUSE, &["turbo"]),
        ("an unknown key", "coordinator", format!("turbo = 1\n{coordinator}"), MISUSE, &["turbo"]),
        (
            "an unknown key of a node",
            "expert-node",
            format!("{node}colour = \"red\"\n"),
            MISUSE,
            &["colour"],
        ),
        ("a missing key", "expert-node", node.replace("weights", "#"), MISUSE, &["weights"]),
        ("not TOML", "expert-node", "name = ".into(), MISUSE, &["config.toml"]),
        (
            "a region that is none",
            "coordinator",
            coordinator.replace("\"fr\"", "\"france\""),
            MISUSE,
            &["france", "region"],
        ),
        (
            "a name that is none",
            "expert-node",
            node.replace("\"fr-expert-1\"", "\"Fr_1\""),
            MISUSE,
            &["Fr_1"],
        ),
        (
            "a node that is not in the roster",
            "expert-node",
            node.replacen("fr-expert-1", "fr-expert-9", 1),
            FAILED,
            &["fr-expert-9"],
        ),
        (
            "more replicas than nodes",
            "expert-node",
            node.replace("replicas = 1", "replicas = 2"),
            MISUSE,
            &["region fr needs 2 nodes; it has 1"],
        ),
        (
            "a bound that makes no sense",
            "coordinator",
            format!("{coordinator}\n[engine]\nstep_rows_max = 0\n"),
            FAILED,
            &["step_rows_max"],
        ),
        (
            "an unknown weight format",
            "coordinator",
            coordinator.replace("f32", "int3"),
            MISUSE,
            &["int3"],
        ),
    ];
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("config.toml");
    for (what, role, toml, code, named) in cases {
        fs::write(&path, toml).unwrap();
        let end = run(&[role, "--config", path.to_str().unwrap()]);
        assert_refused(&format!("{what}, {role}"), &end, code, named);
    }
    let absent = Path::new("/no/such/file.toml").to_str().unwrap();
    let end = run(&["coordinator", "--config", absent]);
    assert_refused("no such file", &end, MISUSE, &[absent]);
}
