//! What is loaded is what the files say, however they say it.

use std::cell::RefCell;

use entente_model::config::{FfnSpec, LayerSpec, Scoring};
use entente_model::kernels::{self, FfnGroup, GatedFfn, Kernels, WeightFormat};
use entente_model::{
    Architecture, Checkpoint, CoordinatorWeights, FfnWeights, GenerationConfig, Progress,
    expert_bytes, load_expert,
};
use entente_proto::ids::{ExpertId, LayerId};
use serde_json::{Value, json};

use crate::folder::{Folder, golden, widen_to_f32};

const LAYERS: u16 = 3;
const EXPERTS: u16 = 8;

fn f32_kernels() -> std::sync::Arc<dyn Kernels> {
    kernels::select(WeightFormat::F32, 1).unwrap()
}

/// A row without any structure, the same in every run.
fn row(len: usize) -> Vec<f32> {
    (0..len).map(|i| (i as f32 * 0.7).sin()).collect()
}

/// What an expert makes of [`row`], bit by bit.
fn output(kernels: &dyn Kernels, ffn: &GatedFfn) -> Vec<u32> {
    let mut y = vec![0.0; ffn.down.out_features()];
    let group = FfnGroup { ffn, rows: &[(0, 0)] };
    kernels.gated_ffn(&row(ffn.gate.in_features()), &[group], &mut y);
    y.into_iter().map(f32::to_bits).collect()
}

/// What all experts and all gates of a Mixtral folder make of [`row`].
fn mixtures(checkpoint: &Checkpoint) -> Vec<Vec<u32>> {
    let kernels = f32_kernels();
    let weights = CoordinatorWeights::load(checkpoint, &*kernels, &()).unwrap();
    let mut outputs = Vec::new();
    for (layer, experts) in checkpoint.architecture().moe_layers() {
        for expert in 0..experts {
            let ffn = load_expert(checkpoint, &*kernels, layer, ExpertId(expert)).unwrap();
            outputs.push(output(&*kernels, &ffn));
        }
        let FfnWeights::Moe { gate } = &weights.layers[usize::from(layer.0)].ffn else {
            panic!("layer {layer} is dense");
        };
        let mut logits = vec![0.0; gate.out_features()];
        kernels.matmul(&row(gate.in_features()), gate, &mut logits);
        outputs.push(logits.into_iter().map(f32::to_bits).collect());
    }
    outputs
}

fn architecture(folder: &Folder) -> Architecture {
    Checkpoint::open(folder.path()).unwrap().architecture().clone()
}

#[test]
fn the_golden_configurations_say_what_their_makers_set() {
    let mixtral = Checkpoint::open(&golden("mixtral")).unwrap();
    let arch = mixtral.architecture();
    let ffn = FfnSpec::Moe {
        experts: 8,
        top_k: 2,
        inner: 112,
        scoring: Scoring::Softmax { renormalise: true },
    };
    assert_eq!(arch.layers, [LayerSpec { window: None, ffn }; 3]);
    assert_eq!((arch.vocab, arch.hidden, arch.max_positions), (1024, 64, 4096));
    assert_eq!((arch.heads, arch.kv_heads, arch.head_dim), (4, 2, 16));
    assert_eq!((arch.rope.theta, arch.rope.dim, arch.rms_eps), (1e6, 16, 1e-5));
    assert_eq!((arch.bos, arch.eos.as_slice()), (Some(1), [2].as_slice()));
    assert!(arch.has_expert(LayerId(2), ExpertId(7)));
    assert!(!arch.has_expert(LayerId(2), ExpertId(8)) && !arch.has_expert(LayerId(3), ExpertId(0)));

    let mistral = Checkpoint::open(&golden("mistral-swa")).unwrap();
    let arch = mistral.architecture();
    let layer = LayerSpec { window: Some(16), ffn: FfnSpec::Dense { inner: 160 } };
    assert_eq!(arch.layers, [layer; 2]);
    assert_eq!((arch.head_dim, arch.rope.dim), (32, 32), "head_dim is not hidden / heads here");
    assert_eq!(arch.moe_layers().count(), 0);
}

#[test]
fn the_old_style_of_configuration_means_the_same() {
    let folder = Folder::copy_of("mixtral");
    let new = Checkpoint::open(folder.path()).unwrap();
    folder.edit("config.json", |config| {
        config.remove("rope_parameters");
        config.remove("dtype");
        config.remove("head_dim");
        config.insert("torch_dtype".to_owned(), json!("bfloat16"));
        config.insert("rope_theta".to_owned(), json!(1e6));
        config.insert("rope_scaling".to_owned(), Value::Null);
    });
    let old = Checkpoint::open(folder.path()).unwrap();
    assert_eq!(old.architecture(), new.architecture());
    assert_eq!(old.digest(), new.digest());
}

#[test]
fn a_window_is_a_number_or_none_or_the_family_s_default() {
    let window = |set: fn(&Folder)| {
        let folder = Folder::copy_of("mistral-swa");
        set(&folder);
        architecture(&folder).layers.iter().map(|layer| layer.window).collect::<Vec<_>>()
    };
    assert_eq!(window(|f| f.configure("sliding_window", json!(7))), [Some(7); 2]);
    assert_eq!(window(|f| f.configure("sliding_window", Value::Null)), [None; 2]);
    let absent: fn(&Folder) = |f| f.edit("config.json", |c| drop(c.remove("sliding_window")));
    assert_eq!(window(absent), [Some(4096); 2]);
    let mixed: fn(&Folder) =
        |f| f.configure("layer_types", json!(["sliding_attention", "full_attention"]));
    assert_eq!(window(mixed), [Some(16), None]);
}

#[test]
fn fused_experts_are_the_same_weights_as_separate_ones() {
    let folder = Folder::copy_of("mixtral");
    let separate = mixtures(&Checkpoint::open(folder.path()).unwrap());
    folder.fuse_experts(LAYERS.into(), EXPERTS.into());
    assert_eq!(mixtures(&Checkpoint::open(folder.path()).unwrap()), separate);
    let distinct: std::collections::BTreeSet<_> = separate.iter().collect();
    assert_eq!(distinct.len(), separate.len(), "two experts gave the same output");
}

#[test]
fn several_files_hold_the_same_model_as_one() {
    let folder = Folder::copy_of("mixtral");
    let one = Checkpoint::open(folder.path()).unwrap();
    let (digest, outputs) = (one.digest(), mixtures(&one));
    folder.shard(5);
    let five = Checkpoint::open(folder.path()).unwrap();
    assert_eq!(five.digest(), digest);
    assert_eq!(mixtures(&five), outputs);
}

#[test]
fn an_expert_is_read_without_the_others() {
    let folder = Folder::copy_of("mixtral");
    let name = "model.layers.1.block_sparse_moe.experts.3.";
    let kernels = f32_kernels();
    let load = || {
        let checkpoint = Checkpoint::open(folder.path()).unwrap();
        let ffn = load_expert(&checkpoint, &*kernels, LayerId(1), ExpertId(3)).unwrap();
        output(&*kernels, &ffn)
    };
    let before = load();
    // Everything but this one expert becomes a NaN, which no arithmetic could hide.
    folder.edit_tensors(|tensors| {
        let others = tensors.iter_mut().filter(|(tensor, _)| !tensor.starts_with(name));
        others.for_each(|(_, tensor)| tensor.data.fill(0xff));
    });
    assert_eq!(load(), before);
}

#[test]
fn an_expert_that_the_model_does_not_have_is_an_error() {
    let kernels = f32_kernels();
    for (name, layer, expert) in [("mixtral", 0, 8), ("mixtral", 3, 0), ("mistral-swa", 0, 0)] {
        let checkpoint = Checkpoint::open(&golden(name)).unwrap();
        let loaded = load_expert(&checkpoint, &*kernels, LayerId(layer), ExpertId(expert));
        let error = loaded.map(drop).unwrap_err().to_string();
        assert!(error.contains(&format!("no expert {expert} in layer {layer}")), "{error}");
    }
}

#[test]
fn the_estimate_for_a_placement_is_what_an_expert_takes() {
    let folder = Folder::copy_of("mixtral");
    for widen in [false, true] {
        if widen {
            folder.edit_tensors(|tensors| tensors.values_mut().for_each(widen_to_f32));
        }
        let checkpoint = Checkpoint::open(folder.path()).unwrap();
        for format in WeightFormat::ALL {
            let kernels = kernels::select(format, 1).unwrap();
            let ffn = load_expert(&checkpoint, &*kernels, LayerId(0), ExpertId(0)).unwrap();
            assert_eq!(expert_bytes(&checkpoint, format).unwrap(), ffn.bytes() as u64);
        }
    }
    let dense = Checkpoint::open(&golden("mistral-swa")).unwrap();
    assert_eq!(expert_bytes(&dense, WeightFormat::F32).unwrap(), 0);
}

#[test]
fn every_element_type_is_read_as_the_number_it_stands_for() {
    let folder = Folder::copy_of("mistral-swa");
    let numbers = [1.0f32, -0.5, 65504.0, 2f32.powi(-14), 0.0, -3.25];
    for dtype in ["F32", "F16", "BF16"] {
        folder.edit_tensors(|tensors| {
            let norm = tensors.get_mut("model.norm.weight").unwrap();
            let encoded = |x: f32| match dtype {
                "F32" => x.to_le_bytes().to_vec(),
                "F16" => half::f16::from_f32(x).to_le_bytes().to_vec(),
                _ => half::bf16::from_f32(x).to_le_bytes().to_vec(),
            };
            dtype.clone_into(&mut norm.dtype);
            norm.data = (0..64).flat_map(|i| encoded(numbers[i % 6])).collect();
        });
        let checkpoint = Checkpoint::open(folder.path()).unwrap();
        let norm = CoordinatorWeights::load(&checkpoint, &*f32_kernels(), &()).unwrap().norm;
        // 65504 is the largest number of F16 and none of BF16's.
        let largest = if dtype == "BF16" { 65536.0 } else { 65504.0 };
        assert_eq!(norm[..6], [1.0, -0.5, largest, 2f32.powi(-14), 0.0, -3.25], "{dtype}");
    }
}

#[test]
fn tied_embeddings_are_the_head() {
    let folder = Folder::copy_of("mistral-swa");
    folder.configure("tie_word_embeddings", json!(true));
    folder.edit_tensors(|tensors| drop(tensors.remove("lm_head.weight")));
    let kernels = f32_kernels();
    let checkpoint = Checkpoint::open(folder.path()).unwrap();
    let weights = CoordinatorWeights::load(&checkpoint, &*kernels, &()).unwrap();
    // Multiplied with a unit vector, the head gives a column of the embedding.
    let mut unit = vec![0.0; 64];
    unit[5] = 1.0;
    let mut column = vec![0.0; 1024];
    kernels.matmul(&unit, &weights.head, &mut column);
    let mut row = vec![0.0; 64];
    for (token, value) in column.iter().enumerate() {
        weights.embed.lookup(token as u32, &mut row);
        assert_eq!(*value, row[5], "token {token}");
    }
}

#[test]
fn loading_tells_how_far_it_has_come() {
    struct Steps(RefCell<Vec<(u64, u64)>>);
    impl Progress for Steps {
        fn advance(&self, done: u64, total: u64) {
            self.0.borrow_mut().push((done, total));
        }
    }
    let steps = Steps(RefCell::default());
    let checkpoint = Checkpoint::open(&golden("mixtral")).unwrap();
    let weights = CoordinatorWeights::load(&checkpoint, &*f32_kernels(), &steps).unwrap();
    assert_eq!(steps.0.into_inner(), [(0, 4), (1, 4), (2, 4), (3, 4), (4, 4)]);
    // Embedding and head in bf16, and next to nothing else in a model of this size.
    let tables = 2 * 1024 * 64 * 2;
    assert!((tables..2 * tables).contains(&weights.bytes()), "{} bytes", weights.bytes());
}

#[test]
fn another_model_has_another_digest() {
    let folder = Folder::copy_of("mixtral");
    let original = Checkpoint::open(folder.path()).unwrap().digest();
    let mut seen = std::collections::BTreeSet::from([original]);
    let mut is_new =
        |folder: &Folder| seen.insert(Checkpoint::open(folder.path()).unwrap().digest());
    for (field, value) in [
        ("rms_norm_eps", json!(1e-6)),
        ("sliding_window", json!(8)),
        ("num_experts_per_tok", json!(3)),
        ("rope_parameters", json!({"rope_theta": 1e4})),
    ] {
        folder.configure(field, value);
        assert!(is_new(&folder), "{field} does not count");
    }
    for tensor in [
        "model.norm.weight",
        "model.embed_tokens.weight",
        "model.layers.2.block_sparse_moe.gate.weight",
        "model.layers.1.self_attn.v_proj.weight",
    ] {
        folder.edit_tensors(|tensors| tensors.get_mut(tensor).unwrap().data[0] ^= 1);
        assert!(is_new(&folder), "{tensor} does not count");
    }
    folder.edit_tensors(|tensors| tensors.values_mut().for_each(widen_to_f32));
    assert!(is_new(&folder), "the element type does not count");
    assert!(!seen.contains(&Checkpoint::open(&golden("mistral-swa")).unwrap().digest()));
}

#[test]
fn generation_defaults_come_from_their_file_and_then_from_the_configuration() {
    let folder = Folder::copy_of("mixtral");
    let arch = architecture(&folder);
    let open = || GenerationConfig::open(folder.path(), &arch).unwrap();
    folder.write("generation_config.json", r#"{"eos_token_id": [7, 2], "temperature": 0.5}"#);
    assert_eq!((open().eos, open().temperature, open().bos), (vec![7, 2], Some(0.5), Some(1)));
    folder
        .write("generation_config.json", r#"{"eos_token_id": 9, "do_sample": true, "top_k": 40}"#);
    assert_eq!((open().eos, open().do_sample, open().top_k), (vec![9], Some(true), Some(40)));
    folder.remove("generation_config.json");
    assert_eq!((open().eos, open().do_sample), (vec![2], None));
}
