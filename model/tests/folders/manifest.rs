//! A manifest names all weights of a model in one format, and nothing else passes for them.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use entente_model::kernels::{self, FfnGroup, GatedFfn, Kernels, WeightFormat};
use entente_model::packed::{self, Manifest};
use entente_model::{
    Checkpoint, CoordinatorWeights, ModelError, expert_bytes, load_expert, load_experts,
};
use entente_proto::ids::{ExpertId, LayerId};
use entente_proto::placement::ExpertKey;
use tempfile::TempDir;

use crate::folder::{Folder, golden};

const FORMAT: WeightFormat = WeightFormat::Q8;
const MANIFEST: &str = packed::MANIFEST_FILE;
const KEY: ExpertKey = (LayerId(1), ExpertId(6));

fn kernels(format: WeightFormat) -> Arc<dyn Kernels> {
    kernels::select(format, 2).unwrap()
}

fn import(format: WeightFormat) -> (TempDir, PathBuf) {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("packed");
    let checkpoint = Checkpoint::open(&golden("mixtral")).unwrap();
    packed::import(&checkpoint, &*kernels(format), &out, &()).unwrap();
    (dir, out)
}

/// A copy of the checkpoint with its manifest.
fn named() -> Folder {
    let folder = Folder::copy_of("mixtral");
    let checkpoint = Checkpoint::open(folder.path()).unwrap();
    packed::manifest(&checkpoint, &*kernels(FORMAT), &()).unwrap().write().unwrap();
    folder
}

fn load(dir: &Path, key: ExpertKey) -> Result<GatedFfn, ModelError> {
    load_expert(&Checkpoint::open(dir).unwrap(), &*kernels(FORMAT), key.0, key.1)
}

fn manifest(dir: &Path) -> Arc<Manifest> {
    Checkpoint::open(dir).unwrap().manifest(FORMAT).unwrap().clone()
}

fn output(ffn: &GatedFfn) -> Vec<u32> {
    let row: Vec<f32> = (0..ffn.gate.in_features()).map(|i| (i as f32 * 0.7).sin()).collect();
    let mut y = vec![0.0; ffn.down.out_features()];
    kernels(FORMAT).gated_ffn(&row, &[FfnGroup { ffn, rows: &[(0, 0)] }], &mut y);
    y.into_iter().map(f32::to_bits).collect()
}

/// Flips a bit of a tensor in the file, where the model digest does not look.
fn flip(folder: &Folder, tensor: &str) {
    folder.edit_tensors(|tensors| *tensors.get_mut(tensor).unwrap().data.last_mut().unwrap() ^= 1);
}

fn told<T>(result: Result<T, ModelError>) -> String {
    result.map(drop).unwrap_err().to_string()
}

#[test]
fn the_manifest_is_the_same_from_the_checkpoint_and_from_its_packed_form() {
    for format in WeightFormat::ALL {
        let (_dir, packed) = import(format);
        let written = fs::read(packed.join(MANIFEST)).unwrap();
        let folder = Folder::copy_of("mixtral");
        for dir in [folder.path(), &packed] {
            let checkpoint = Checkpoint::open(dir).unwrap();
            let manifest = packed::manifest(&checkpoint, &*kernels(format), &()).unwrap();
            manifest.write().unwrap();
            let again = fs::read(dir.join(MANIFEST)).unwrap();
            assert!(again == written, "{format:?} in {}", dir.display());
            let opened = Checkpoint::open(dir).unwrap();
            assert_eq!(opened.manifest(format).unwrap().sha256(), manifest.sha256());
            assert_eq!(packed::verify(&opened, &*kernels(format), &()).unwrap(), 2 + 3 + 24);
        }
        assert_eq!(
            fs::read_dir(&packed).unwrap().count(),
            fs::read_dir(folder.path()).unwrap().count()
        );
    }
}

#[test]
fn a_flipped_bit_of_a_checkpoint_is_found_when_its_part_is_loaded_and_by_verify() {
    let folder = named();
    flip(&folder, "model.layers.1.block_sparse_moe.experts.6.w3.weight");
    let error = told(load(folder.path(), KEY));
    assert!(
        error.contains("manifest.json: expert 6 of layer 1: the weights are others"),
        "{error}"
    );
    assert!(load(folder.path(), (LayerId(1), ExpertId(5))).is_ok());
    let checkpoint = Checkpoint::open(folder.path()).unwrap();
    let error = told(packed::verify(&checkpoint, &*kernels(FORMAT), &()));
    assert!(error.contains("expert 6 of layer 1"), "{error}");
    // In another format nothing is known of it.
    let other = kernels(WeightFormat::F32);
    assert!(load_expert(&checkpoint, &*other, KEY.0, KEY.1).is_ok());

    flip(&folder, "model.layers.2.self_attn.v_proj.weight");
    let checkpoint = Checkpoint::open(folder.path());
    let error = told(CoordinatorWeights::load(&checkpoint.unwrap(), &*kernels(FORMAT), &()));
    assert!(error.contains("manifest.json: layer 2: the weights are others"), "{error}");
}

#[test]
fn a_folder_without_weights_is_the_model_that_its_manifest_names() {
    let whole = named();
    let thin = named();
    thin.remove("model.safetensors");
    let [ours, theirs] = [&thin, &whole].map(|f| Checkpoint::open(f.path()).unwrap());
    assert_eq!(ours.digest(), theirs.digest());
    let sizes = [&ours, &theirs].map(|c| expert_bytes(c, FORMAT).unwrap());
    assert_eq!(sizes[0], sizes[1]);
    let error = told(load(thin.path(), KEY));
    assert!(error.contains("experts.6.w1.weight: missing"), "{error}");
    let error = told(CoordinatorWeights::load(&ours, &*kernels(FORMAT), &()));
    assert!(error.contains("missing"), "{error}");
    // Without a manifest it is no model at all.
    thin.remove(MANIFEST);
    let error = told(Checkpoint::open(thin.path()));
    assert!(error.contains("holds neither model.safetensors"), "{error}");
}

#[test]
fn what_a_partial_folder_has_is_loaded_and_what_it_lacks_is_named() {
    let folder = named();
    let digest = Checkpoint::open(folder.path()).unwrap().digest();
    folder.edit_tensors(|tensors| {
        tensors.retain(|name, _| !name.contains("layers.1.block_sparse_moe.experts.6."));
    });
    assert_eq!(Checkpoint::open(folder.path()).unwrap().digest(), digest);
    assert!(load(folder.path(), (LayerId(1), ExpertId(5))).is_ok());
    assert!(told(load(folder.path(), KEY)).contains("experts.6.w1.weight: missing"));

    // Of several files one is missing.
    let folder = named();
    folder.shard(3);
    folder.remove("model-00002.safetensors");
    let checkpoint = Checkpoint::open(folder.path()).unwrap();
    assert_eq!(checkpoint.digest(), digest);
    let loads = |e| load(folder.path(), (LayerId(0), ExpertId(e))).is_ok();
    let loaded = (0..8).filter(|e| loads(*e)).count();
    assert!(loaded < 8, "every expert of layer 0 is in the other two files");
    // A tensor that is there and of another shape is refused nevertheless.
    let folder = named();
    folder.edit_tensors(|tensors| {
        tensors.retain(|name, _| !name.contains("layers.1.block_sparse_moe"));
        let norm = tensors.get_mut("model.norm.weight").unwrap();
        norm.data.truncate(2);
        norm.shape = vec![1];
    });
    let error = told(Checkpoint::open(folder.path()));
    assert!(error.contains("model.norm.weight: shape [1]"), "{error}");
}

fn bytes_of(ffn: &GatedFfn) -> Vec<u8> {
    ffn.pieces(1 << 20).map(Result::unwrap).collect::<Vec<_>>().concat()
}

#[test]
fn an_expert_that_was_sent_is_the_one_or_none() {
    let (_dir, packed) = import(FORMAT);
    let sent = load(&packed, KEY).unwrap();
    let bytes = bytes_of(&sent);
    let thin = named();
    thin.remove("model.safetensors");
    let manifest = manifest(thin.path());
    assert_eq!(manifest.expert(KEY), Some(packed::sha256(&sent, |_| ()).unwrap()));
    let activation = Checkpoint::open(&packed).unwrap().architecture().activation;
    let receive = |bytes: &[u8]| {
        let mut arriving = manifest.receive(activation, KEY).unwrap();
        bytes.chunks(1_000).try_for_each(|piece| arriving.push(piece))?;
        arriving.finish()
    };
    assert_eq!(output(&receive(&bytes).unwrap()), output(&sent));

    let mut flipped = bytes.clone();
    flipped[bytes.len() - 1] ^= 0x80;
    let other = bytes_of(&load(&packed, (LayerId(1), ExpertId(5))).unwrap());
    let longer = [&bytes[..], &[0]].concat();
    let shorter = &bytes[..bytes.len() - 64];
    for (what, bytes) in [
        ("flipped", &flipped[..]),
        ("another", &other),
        ("longer", &longer),
        ("short", shorter),
        ("none", &[]),
    ] {
        let error = told(receive(bytes));
        assert!(error.contains("expert 6 of layer 1: the weights are others"), "{what}: {error}");
    }
    assert!(manifest.receive(activation, (LayerId(1), ExpertId(8))).is_none());
}

#[test]
fn a_manifest_that_does_not_fit_or_is_written_otherwise_is_refused_by_field() {
    let (_dir, packed) = import(FORMAT);
    let text = fs::read_to_string(packed.join(MANIFEST)).unwrap();
    let model = &text[text.find("model_digest").unwrap()..][15..79];
    let table = &text[text.find("table_blake3").unwrap()..][15..79];
    let zeros = "0".repeat(64);
    let cases = [
        ("\"version\":1", "\"version\":2", "version: is 2 with panels 1"),
        ("\"panels_version\":1", "\"panels_version\":9", "version: is 1 with panels 9"),
        ("\"weights\":\"q8\"", "\"weights\":\"q2\"", "weights: unknown: q2"),
        ("\"weights\":\"q8\"", "\"weights\":\"q4\"", "encoding"),
        ("\"weights\"", "\"wights\"", "is no manifest: unknown field `wights`"),
        (model, &zeros, "model_digest: the checkpoint beside it is another model"),
        (table, &zeros, "table_blake3: is not that of the packed file"),
        (table, &zeros[1..], "table_blake3: is not 64"),
        ("\"part\":\"head\"", "\"part\":\"layer 7\"", "head: part: found layer 7"),
        ("\"tensors\":[\"rows_bf16\"]", "\"tensors\":[]", "embedding: tensors: 0, expected 1"),
        ("panels_q8", "panels_q9", "encoding 0 is not"),
        ("\"bytes\":", "\"bytes\":1", "length_bytes: is 1"),
        (",\n", ",\n\n", "is written otherwise"),
        ("a", "A", "is written otherwise"),
    ];
    for (from, to, reason) in cases {
        let spoilt = if from == "a" {
            // Digits in upper case say the same.
            let at = text.rfind("sha256\":\"").unwrap() + 9;
            text[..at].to_owned() + &text[at..].to_uppercase()
        } else {
            text.replacen(from, to, 1)
        };
        assert_ne!(spoilt, text, "{from} is not in the manifest");
        fs::write(packed.join(MANIFEST), spoilt).unwrap();
        let error = told(Checkpoint::open(&packed));
        assert!(
            error.contains(reason) && error.contains(MANIFEST),
            "{error} does not say {reason}"
        );
    }
    fs::write(packed.join(MANIFEST), &text[..text.len() / 2]).unwrap();
    assert!(told(Checkpoint::open(&packed)).contains("is no manifest"));
    // An import of before manifests is as good as it was.
    fs::remove_file(packed.join(MANIFEST)).unwrap();
    let checkpoint = Checkpoint::open(&packed).unwrap();
    let all = BTreeSet::from([KEY]);
    assert!(load_experts(&checkpoint, &*kernels(FORMAT), &all, &()).is_ok());
    assert!(packed::verify(&checkpoint, &*kernels(FORMAT), &()).is_ok());
}
