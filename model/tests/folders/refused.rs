//! Every way in which a folder can be wrong, and that the message says which: each case starts from
//! a good folder, does one thing to it, and names the words that must be in the error.

use std::fs;

use entente_model::{ChatTemplate, Checkpoint, GenerationConfig, ModelError, Tokenizer};
use serde_json::{Value, json};

use crate::folder::{Folder, join, shard_name};

const MODEL: &str = "model.safetensors";
const INDEX: &str = "model.safetensors.index.json";
const Q: &str = "model.layers.1.self_attn.q_proj.weight";
const W2: &str = "model.layers.2.block_sparse_moe.experts.7.w2.weight";

type Case = (&'static str, fn(&Folder), &'static [&'static str]);

/// Reads everything that a coordinator reads before the weights.
fn open(folder: &Folder) -> Result<(), ModelError> {
    let checkpoint = Checkpoint::open(folder.path())?;
    Tokenizer::open(folder.path(), checkpoint.architecture())?;
    ChatTemplate::open(folder.path())?;
    GenerationConfig::open(folder.path(), checkpoint.architecture())?;
    Ok(())
}

fn check(cases: &[Case]) {
    let mut wrong = Vec::new();
    for (case, spoil, words) in cases {
        let folder = Folder::copy_of("mixtral");
        open(&folder).unwrap();
        spoil(&folder);
        match open(&folder) {
            Ok(()) => wrong.push(format!("{case}: accepted")),
            Err(error) => {
                let text = error.to_string();
                let missing = words.iter().filter(|word| !text.contains(**word));
                wrong.extend(missing.map(|word| format!("{case}: {text:?} lacks {word:?}")));
            }
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

fn set_offsets(folder: &Folder, tensor: &str, begin: i64, end: i64) {
    folder.edit_header(|header| {
        let offsets = &mut header[tensor]["data_offsets"];
        let moved = |i: usize, by: i64| json!(offsets[i].as_i64().unwrap() + by);
        *offsets = json!([moved(0, begin), moved(1, end)]);
    });
}

#[test]
fn a_configuration_that_cannot_be_computed_is_refused_by_field() {
    check(&[
        ("no config", |f| f.remove("config.json"), &["config.json"]),
        ("no JSON", |f| f.write("config.json", "{"), &["config.json", "not valid JSON"]),
        ("a list", |f| f.write("config.json", "[]"), &["config.json", "not a JSON object"]),
        (
            "too long",
            |f| f.write("config.json", vec![b' '; (4 << 20) + 1]),
            &["config.json", "longer than"],
        ),
        (
            "no architecture",
            |f| f.configure("architectures", Value::Null),
            &["config.json: architectures: missing"],
        ),
        (
            "two architectures",
            |f| f.configure("architectures", json!(["MixtralForCausalLM", "Other"])),
            &["config.json: architectures", "one name"],
        ),
        (
            "architecture not built",
            |f| f.configure("architectures", json!(["Qwen3MoeForCausalLM"])),
            &[
                "config.json",
                "unsupported architecture Qwen3MoeForCausalLM",
                "supported: MixtralForCausalLM, MistralForCausalLM",
            ],
        ),
        (
            "new style rope",
            |f| f.configure("rope_parameters", json!({"rope_theta": 1e4, "rope_type": "yarn"})),
            &["config.json: rope_parameters.rope_type: unsupported rope type \"yarn\""],
        ),
        (
            "old style rope",
            |f| f.configure("rope_scaling", json!({"type": "linear", "factor": 2.0})),
            &["config.json: rope_scaling.type: unsupported rope type \"linear\""],
        ),
        (
            "no theta",
            |f| f.configure("rope_parameters", Value::Null),
            &["config.json: rope_theta: missing"],
        ),
        (
            "two thetas",
            |f| f.configure("rope_theta", json!(1e4)),
            &["config.json: rope_parameters.rope_theta: contradicts"],
        ),
        (
            "partial rotation",
            |f| f.configure("partial_rotary_factor", json!(0.5)),
            &["config.json: partial_rotary_factor"],
        ),
        (
            "activation",
            |f| f.configure("hidden_act", json!("gelu")),
            &["config.json: hidden_act", "\"gelu\""],
        ),
        (
            "biases",
            |f| f.configure("attention_bias", json!(true)),
            &["config.json: attention_bias", "not supported"],
        ),
        (
            "quantised in some way",
            |f| f.configure("quantization_config", json!({"bits": 4})),
            &["config.json: quantization_config.quant_method: nothing", "not supported", "fp8"],
        ),
        (
            "quantised in four bits",
            |f| f.configure("quantization_config", json!({"quant_method": "awq"})),
            &["config.json: quantization_config.quant_method: awq", "not supported", "fp8"],
        ),
        (
            "quantised to another format of eight bits",
            |f| f.configure("quantization_config", json!({"quant_method": "fp8", "fmt": "e5m2"})),
            &["config.json: quantization_config.fmt: e5m2", "not supported"],
        ),
        (
            "quantised with its activations",
            |f| {
                let scheme = json!({"quant_method": "fp8", "activation_scheme": "static"});
                f.configure("quantization_config", scheme);
            },
            &["config.json: quantization_config.activation_scheme: static", "not supported"],
        ),
        (
            "quantised in other blocks",
            |f| {
                let scheme = json!({"quant_method": "fp8", "weight_block_size": [64, 64]});
                f.configure("quantization_config", scheme);
            },
            &["config.json: quantization_config.weight_block_size: [64,64]", "[128,128]"],
        ),
        (
            "heads not grouped evenly",
            |f| f.configure("num_key_value_heads", json!(3)),
            &["config.json: num_key_value_heads", "3 does not divide", "4"],
        ),
        (
            "odd head",
            |f| f.configure("head_dim", json!(15)),
            &["config.json: head_dim", "15", "even"],
        ),
        (
            "head not whole",
            |f| f.configure("hidden_size", json!(66)),
            &["config.json: head_dim", "66", "4 heads"],
        ),
        (
            "more chosen than there are",
            |f| f.configure("num_experts_per_tok", json!(9)),
            &["config.json: num_experts_per_tok", "9", "1 to 8"],
        ),
        (
            "no experts",
            |f| f.configure("num_local_experts", json!(0)),
            &["config.json: num_local_experts", "1 to 4096"],
        ),
        (
            "too many layers",
            |f| f.configure("num_hidden_layers", json!(5000)),
            &["config.json: num_hidden_layers", "5000", "1 to 1024"],
        ),
        (
            "too wide",
            |f| f.configure("hidden_size", json!(1u64 << 40)),
            &["config.json: hidden_size", "1 to 65536"],
        ),
        (
            "number as text",
            |f| f.configure("vocab_size", json!("1024")),
            &["config.json: vocab_size", "\"1024\"", "whole number"],
        ),
        (
            "no vocabulary",
            |f| f.configure("vocab_size", Value::Null),
            &["config.json: vocab_size: missing"],
        ),
        ("epsilon 0", |f| f.configure("rms_norm_eps", json!(0)), &["config.json: rms_norm_eps"]),
        (
            "window 0",
            |f| f.configure("sliding_window", json!(0)),
            &["config.json: sliding_window", "from 1"],
        ),
        (
            "layer types",
            |f| f.configure("layer_types", json!(["full_attention"])),
            &["config.json: layer_types", "1 entries for 3 layers"],
        ),
        (
            "linear attention",
            |f| f.configure("layer_types", json!(["full_attention", "linear_attention", ""])),
            &["config.json: layer_types", "linear_attention"],
        ),
        (
            "end of text outside the vocabulary",
            |f| f.configure("eos_token_id", json!([2, 1024])),
            &["config.json: eos_token_id", "below 1024"],
        ),
    ]);
}

#[test]
fn a_safetensors_file_with_bytes_out_of_place_is_refused_by_tensor() {
    check(&[
        ("no file", |f| f.remove(MODEL), &["neither model.safetensors nor"]),
        ("shorter than a length", |f| f.write(MODEL, "abc"), &[MODEL, "truncated: 3 bytes"]),
        (
            "header too large",
            |f| f.write(MODEL, [0xff; 64]),
            &[MODEL, "header of 18446744073709551615 bytes"],
        ),
        (
            "header cut",
            |f| f.write(MODEL, &fs::read(f.file(MODEL)).unwrap()[..500]),
            &[MODEL, "truncated: header of 11144 bytes in a file of 500"],
        ),
        ("header no JSON", |f| f.write(MODEL, join("{\"a\"", &[])), &[MODEL, "not valid JSON"]),
        (
            "entry malformed",
            |f| f.edit_header(|h| drop(h[Q].as_object_mut().unwrap().remove("shape"))),
            &[MODEL, Q, "malformed header entry", "shape"],
        ),
        (
            "one name twice",
            |f| {
                let entry = r#"{"dtype":"F32","shape":[1],"data_offsets":[0,4]}"#;
                f.write(MODEL, join(&format!(r#"{{"a":{entry},"a":{entry}}}"#), &[0; 4]));
            },
            &[MODEL, "duplicate key \"a\""],
        ),
        (
            "data cut",
            |f| f.write(MODEL, &fs::read(f.file(MODEL)).unwrap()[..1_000_000]),
            &[MODEL, "tensor model.layers.", "are outside the file's 988848 data bytes"],
        ),
        (
            "data added",
            |f| f.write(MODEL, [fs::read(f.file(MODEL)).unwrap(), vec![0; 3]].concat()),
            &[MODEL, "3 bytes after the last tensor"],
        ),
        (
            "overlap",
            |f| set_offsets(f, Q, -2, -2),
            &[MODEL, "tensor ", Q, "overlaps the tensor before it by 2 bytes"],
        ),
        ("gap", |f| set_offsets(f, Q, 2, 2), &[MODEL, Q, "a gap of 2 bytes"]),
        (
            "offsets outside",
            |f| set_offsets(f, Q, 1 << 40, 1 << 40),
            &[MODEL, Q, "are outside the file's"],
        ),
        ("offsets backwards", |f| set_offsets(f, Q, 0, -9000), &[MODEL, Q, "outside"]),
        (
            "length and shape differ",
            |f| f.edit_header(|h| h[Q]["shape"] = json!([64, 63])),
            &[MODEL, Q, "8192 bytes, but BF16 of shape [64, 63] has 8064"],
        ),
        (
            "shape overflows",
            |f| f.edit_header(|h| h[Q]["shape"] = json!([1u64 << 40, 1u64 << 40])),
            &[MODEL, Q, "overflows"],
        ),
        (
            "negative extent",
            |f| f.edit_header(|h| h[Q]["shape"] = json!([-64, -64])),
            &[MODEL, Q, "malformed header entry"],
        ),
        (
            "unknown element type",
            |f| f.edit_header(|h| h[Q]["dtype"] = json!("BF17")),
            &[MODEL, Q, "unknown dtype \"BF17\""],
        ),
    ]);
}

#[test]
fn tensors_that_are_not_those_of_the_architecture_are_refused_by_name() {
    check(&[
        (
            "element type that nothing computes",
            |f| f.edit_header(|h| h[Q]["dtype"] = json!("I16")),
            &[MODEL, Q, "unsupported dtype I16; supported: BF16, F16, F32"],
        ),
        ("missing", |f| f.edit_tensors(|t| drop(t.remove(W2))), &[MODEL, W2, "missing"]),
        (
            "no gate in any style",
            |f| f.edit_tensors(|t| t.retain(|name, _| !name.contains("gate"))),
            &[MODEL, "model.layers.0.block_sparse_moe.gate.weight: missing"],
        ),
        (
            "misshapen",
            |f| f.edit_tensors(|t| t.get_mut(W2).unwrap().shape.reverse()),
            &[MODEL, W2, "shape [112, 64], expected [64, 112]"],
        ),
        (
            "one dimension too many",
            |f| f.edit_tensors(|t| t.get_mut("model.norm.weight").unwrap().shape.push(1)),
            &[MODEL, "model.norm.weight", "shape [64, 1], expected [64]"],
        ),
        (
            "a bias",
            |f| {
                f.edit_tensors(|t| {
                    let norm = t["model.norm.weight"].clone();
                    t.insert("model.layers.0.self_attn.q_proj.bias".to_owned(), norm);
                });
            },
            &[MODEL, "q_proj.bias", "not part of MixtralForCausalLM"],
        ),
        (
            "a layer more than configured",
            |f| f.configure("num_hidden_layers", json!(2)),
            &[MODEL, "model.layers.2.", "not part of"],
        ),
        (
            "a layer less than configured",
            |f| f.configure("num_hidden_layers", json!(4)),
            &[MODEL, "model.layers.3.", "missing"],
        ),
        (
            "a configuration that promises a million tensors",
            |f| {
                f.configure("num_hidden_layers", json!(1024));
                f.configure("num_local_experts", json!(4096));
            },
            &[MODEL, "block_sparse_moe.gate.weight", "expected [4096, 64]"],
        ),
    ]);
}

#[test]
fn an_index_that_promises_what_its_files_do_not_hold_is_refused() {
    check(&[
        (
            "no such file",
            |f| {
                f.shard(3);
                f.remove(&shard_name(1));
            },
            &["model-00002.safetensors"],
        ),
        (
            "outside the folder",
            |f| {
                f.shard(2);
                f.edit_index(|map| map[Q] = json!("../model.safetensors"));
            },
            &[INDEX, Q, "\"../model.safetensors\"", "no plain file name"],
        ),
        (
            "absolute",
            |f| {
                f.shard(2);
                f.edit_index(|map| map[Q] = json!("/etc/passwd"));
            },
            &[INDEX, Q, "no plain file name"],
        ),
        (
            "in another file",
            |f| {
                f.shard(2);
                f.edit_index(|map| {
                    let other = map[Q] == json!(shard_name(0));
                    map[Q] = json!(shard_name(usize::from(other)));
                });
            },
            &["model-0000", Q, INDEX],
        ),
        (
            "more in the file",
            |f| {
                f.shard(2);
                f.edit_index(|map| drop(map.remove(W2)));
            },
            &["model-0000", W2, "not in model.safetensors.index.json"],
        ),
        (
            "no map",
            |f| {
                f.shard(2);
                f.write(INDEX, "{}");
            },
            &[INDEX, "weight_map"],
        ),
        (
            "empty map",
            |f| {
                f.shard(2);
                f.write(INDEX, r#"{"weight_map": {}}"#);
            },
            &[INDEX, "names 0 files"],
        ),
        (
            "one tensor twice",
            |f| {
                f.shard(2);
                f.write(INDEX, r#"{"weight_map": {"a": "x.safetensors", "a": "y.safetensors"}}"#);
            },
            &[INDEX, "duplicate key \"a\""],
        ),
    ]);
}

#[test]
fn text_files_that_do_not_fit_the_model_are_refused() {
    check(&[
        ("no tokenizer", |f| f.remove("tokenizer.json"), &["tokenizer.json"]),
        (
            "tokenizer of another format",
            |f| f.write("tokenizer.json", r#"{"version": "1.0"}"#),
            &["tokenizer.json", "not a tokenizer"],
        ),
        (
            "more ids than the embedding has rows",
            |f| {
                f.edit("tokenizer.json", |tokenizer| {
                    tokenizer["added_tokens"].as_array_mut().unwrap().push(json!({
                        "id": 1024, "content": "[NEW]", "single_word": false, "lstrip": false,
                        "rstrip": false, "normalized": false, "special": true,
                    }));
                });
            },
            &["tokenizer.json", "1025 token ids", "1024 rows"],
        ),
        (
            "template does not parse",
            |f| f.write("chat_template.jinja", "{% for m in messages %}"),
            &["chat_template.jinja", "not a valid template"],
        ),
        (
            "template is no text",
            |f| f.write("chat_template.jinja", [0xff, 0xfe]),
            &["chat_template.jinja", "UTF-8"],
        ),
        (
            "tokenizer configuration is no JSON",
            |f| f.write("tokenizer_config.json", "nothing"),
            &["tokenizer_config.json", "not valid JSON"],
        ),
        (
            "named templates without a default",
            |f| {
                f.remove("chat_template.jinja");
                let list = json!({"chat_template": [{"name": "rag", "template": ""}]});
                f.write("tokenizer_config.json", list.to_string());
            },
            &["tokenizer_config.json: chat_template", "default"],
        ),
        (
            "control token is a number",
            |f| f.edit("tokenizer_config.json", |config| config["bos_token"] = json!(1)),
            &["tokenizer_config.json: bos_token", "expected a string"],
        ),
        (
            "end of text outside the vocabulary",
            |f| f.edit("generation_config.json", |config| config["eos_token_id"] = json!(1024)),
            &["generation_config.json: eos_token_id", "below 1024"],
        ),
        (
            "temperature",
            |f| {
                f.edit("generation_config.json", |config| {
                    config.insert("temperature".to_owned(), json!(-1));
                });
            },
            &["generation_config.json: temperature", "-1"],
        ),
    ]);
}

/// The format's own implementation refuses what is refused here, so the cases are what they claim;
/// repeated names are the one thing that it lets pass.
#[test]
fn the_format_s_own_reader_agrees_about_offsets() {
    let spoils: [fn(&Folder); 7] = [
        |_| {},
        |f| set_offsets(f, Q, -2, -2),
        |f| set_offsets(f, Q, 2, 2),
        |f| set_offsets(f, Q, 1 << 40, 1 << 40),
        |f| f.edit_header(|h| h[Q]["shape"] = json!([64, 63])),
        |f| f.edit_header(|h| h[Q]["dtype"] = json!("BF17")),
        |f| f.write(MODEL, &fs::read(f.file(MODEL)).unwrap()[..1_000_000]),
    ];
    for (i, spoil) in spoils.into_iter().enumerate() {
        let folder = Folder::copy_of("mixtral");
        spoil(&folder);
        let bytes = fs::read(folder.file(MODEL)).unwrap();
        let theirs = safetensors::SafeTensors::deserialize(&bytes).is_ok();
        assert_eq!(Checkpoint::open(folder.path()).is_ok(), theirs, "case {i}");
    }
}

/// Goal: no header makes the process panic. Method: one random byte of the header changes in each
/// round; the folder is then either refused or still consistent, and saying which must not fail.
#[test]
fn any_changed_byte_of_a_header_is_survived() {
    let seed = 0x5851_f42d_4c95_7f2d_u64;
    let folder = Folder::copy_of("mistral-swa");
    let original = fs::read(folder.file(MODEL)).unwrap();
    let header_len = 8 + u64::from_le_bytes(original[..8].try_into().unwrap()) as usize;
    let mut state = seed;
    let mut refused = 0;
    for round in 0..400 {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        let mut bytes = original.clone();
        bytes[(state >> 33) as usize % header_len] = (state >> 24) as u8;
        folder.write(MODEL, &bytes);
        match Checkpoint::open(folder.path()) {
            Ok(_) => {}
            Err(error) => {
                let text = error.to_string();
                assert!(text.contains(MODEL), "seed {seed}, round {round}: {text}");
                refused += 1;
            }
        }
    }
    assert!(refused > 200, "seed {seed}: only {refused} of 400 refused");
}
