//! A packed folder is the checkpoint that it was made from, or it is refused.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};

use entente_model::kernels::{self, FfnGroup, GatedFfn, Kernels, Matrix, WeightFormat};
use entente_model::{
    Architecture, Checkpoint, CoordinatorWeights, FfnWeights, ModelError, expert_bytes,
    load_expert, load_experts, packed,
};
use entente_proto::ids::{ExpertId, LayerId};
use entente_proto::placement::ExpertKey;
use entente_proto::wire::{PackedEncoding, PackedPart, PackedTable};
use prost::Message;
use serde_json::json;
use tempfile::TempDir;

use crate::folder::{Folder, golden, widen_to_f32};

const WEIGHTS: &str = "weights.entente";

fn kernels(format: WeightFormat) -> std::sync::Arc<dyn Kernels> {
    kernels::select(format, 2).unwrap()
}

/// A packed folder in a temporary place, which a test may spoil.
struct Packed(TempDir);

impl Packed {
    fn import(from: &Path, format: WeightFormat) -> Self {
        let packed = Self(tempfile::tempdir().unwrap());
        let checkpoint = Checkpoint::open(from).unwrap();
        packed::import(&checkpoint, &*kernels(format), &packed.dir(), &()).unwrap();
        packed
    }

    fn dir(&self) -> PathBuf {
        self.0.path().join("packed")
    }

    fn file(&self) -> PathBuf {
        self.dir().join(WEIGHTS)
    }

    fn open(&self) -> Result<Checkpoint, ModelError> {
        Checkpoint::open(&self.dir())
    }

    fn edit(&self, edit: impl FnOnce(&mut Vec<u8>)) {
        let mut bytes = fs::read(self.file()).unwrap();
        edit(&mut bytes);
        fs::write(self.file(), bytes).unwrap();
    }

    fn table(&self) -> PackedTable {
        let bytes = fs::read(self.file()).unwrap();
        PackedTable::decode(&bytes[table_offset(&bytes)..]).unwrap()
    }

    /// Changes the table and gives it right checksums, as a program would that writes such files.
    fn edit_table(&self, edit: impl FnOnce(&mut PackedTable)) {
        let mut table = self.table();
        edit(&mut table);
        self.edit(|bytes| {
            let offset = table_offset(bytes);
            bytes.truncate(offset);
            bytes.extend(table.encode_to_vec());
            let len = (bytes.len() - offset) as u64;
            bytes[24..32].copy_from_slice(&len.to_le_bytes());
            let checksum = blake3::hash(&bytes[offset..]);
            bytes[32..64].copy_from_slice(checksum.as_bytes());
            seal(bytes);
        });
    }

    /// Flips a bit in the middle of parts, counted in the order of the file.
    fn flip(&self, parts: impl IntoIterator<Item = usize>) {
        let table = self.table();
        self.edit(|bytes| {
            for part in parts {
                let PackedPart { offset, length_bytes, .. } = table.parts[part];
                bytes[usize::try_from(offset + length_bytes / 2).unwrap()] ^= 1;
            }
        });
    }
}

fn table_offset(file: &[u8]) -> usize {
    u64::from_le_bytes(file[16..24].try_into().unwrap()) as usize
}

/// Gives the first page its checksum.
fn seal(file: &mut [u8]) {
    let checksum = blake3::hash(&file[..64]);
    file[64..96].copy_from_slice(checksum.as_bytes());
}

fn row(len: usize) -> Vec<f32> {
    (0..len).map(|i| (i as f32 * 0.7).sin()).collect()
}

fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|value| value.to_bits()).collect()
}

fn product(kernels: &dyn Kernels, matrix: &Matrix) -> Vec<u32> {
    let mut y = vec![0.0; matrix.out_features()];
    kernels.matmul(&row(matrix.in_features()), matrix, &mut y);
    bits(&y)
}

fn output(kernels: &dyn Kernels, ffn: &GatedFfn) -> Vec<u32> {
    let mut y = vec![0.0; ffn.down.out_features()];
    kernels.gated_ffn(&row(ffn.gate.in_features()), &[FfnGroup { ffn, rows: &[(0, 0)] }], &mut y);
    bits(&y)
}

fn every_expert(arch: &Architecture) -> BTreeSet<ExpertKey> {
    let of_layer = |(layer, experts)| (0..experts).map(move |e| (layer, ExpertId(e)));
    arch.moe_layers().flat_map(of_layer).collect()
}

/// The bits of every weight that a process may hold, seen through the kernels.
fn everything(dir: &Path, format: WeightFormat) -> Vec<Vec<u32>> {
    let checkpoint = Checkpoint::open(dir).unwrap();
    let kernels = kernels(format);
    let kernels = kernels.as_ref();
    let weights = CoordinatorWeights::load(&checkpoint, kernels, &()).unwrap();
    let mut seen = vec![bits(&weights.norm), product(kernels, &weights.head)];
    for token in 0..checkpoint.architecture().vocab as u32 {
        let mut row = vec![0.0; checkpoint.architecture().hidden];
        weights.embed.lookup(token, &mut row);
        seen.push(bits(&row));
    }
    for layer in &weights.layers {
        seen.extend([bits(&layer.input_norm), bits(&layer.post_norm)]);
        seen.extend([&layer.q, &layer.k, &layer.v, &layer.o].map(|m| product(kernels, m)));
        seen.push(match &layer.ffn {
            FfnWeights::Dense(ffn) => output(kernels, ffn),
            FfnWeights::Moe { gate } => product(kernels, gate),
        });
    }
    let all = every_expert(checkpoint.architecture());
    let experts = load_experts(&checkpoint, kernels, &all, &()).unwrap();
    seen.extend(experts.values().map(|ffn| output(kernels, ffn)));
    seen.push(vec![weights.bytes() as u32]);
    seen
}

#[test]
fn packed_weights_are_those_of_the_checkpoint_bit_by_bit() {
    for name in ["mixtral", "mistral-swa"] {
        let folder = Folder::copy_of(name);
        for wide in [false, true] {
            if wide {
                folder.edit_tensors(|tensors| tensors.values_mut().for_each(widen_to_f32));
            }
            for format in WeightFormat::ALL {
                let packed = Packed::import(folder.path(), format);
                let same = everything(&packed.dir(), format) == everything(folder.path(), format);
                assert!(same, "{name} {format:?}, f32 tensors: {wide}");
                let (ours, theirs) =
                    (packed.open().unwrap(), Checkpoint::open(folder.path()).unwrap());
                assert_eq!(ours.digest(), theirs.digest());
                assert_eq!(ours.architecture(), theirs.architecture());
                let estimates = [&ours, &theirs].map(|c| expert_bytes(c, format).unwrap());
                assert_eq!(estimates[0], estimates[1]);
            }
        }
    }
}

#[test]
fn an_import_gives_the_same_bytes_again_and_replaces_an_earlier_one() {
    let packed = Packed::import(&golden("mixtral"), WeightFormat::Q8);
    let first = fs::read(packed.file()).unwrap();
    let checkpoint = Checkpoint::open(&golden("mixtral")).unwrap();
    let earlier = packed.open().unwrap();
    packed::import(&checkpoint, &*kernels(WeightFormat::Q8), &packed.dir(), &()).unwrap();
    assert!(fs::read(packed.file()).unwrap() == first, "other bytes");
    // Nothing is left beside it, and whoever had opened the earlier one can go on.
    assert_eq!(fs::read_dir(packed.0.path()).unwrap().count(), 1);
    assert_eq!(packed::verify(&earlier, &*kernels(WeightFormat::Q8), &()).unwrap(), 2 + 3 + 24);
}

#[test]
fn what_no_import_wrote_is_never_replaced() {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("out");
    let checkpoint = Checkpoint::open(&golden("mixtral")).unwrap();
    let import = || packed::import(&checkpoint, &*kernels(WeightFormat::Q4), &out, &());
    for file in ["precious.txt", WEIGHTS] {
        fs::create_dir(&out).unwrap();
        fs::write(out.join(file), "mine").unwrap();
        let refusal = import().unwrap_err().to_string();
        assert!(refusal.contains("no import wrote"), "{refusal}");
        assert_eq!(fs::read_to_string(out.join(file)).unwrap(), "mine");
        fs::remove_dir_all(&out).unwrap();
    }
    fs::create_dir(&out).unwrap();
    import().unwrap();
    let packed = Checkpoint::open(&out).unwrap();
    let again = packed::import(&packed, &*kernels(WeightFormat::Q4), &dir.path().join("2"), &());
    assert!(again.unwrap_err().to_string().contains("packed already"));
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
}

#[test]
fn only_what_is_held_is_read() {
    let packed = Packed::import(&golden("mixtral"), WeightFormat::Bf16);
    let kernels = kernels(WeightFormat::Bf16);
    let half: BTreeSet<ExpertKey> = every_expert(packed.open().unwrap().architecture())
        .into_iter()
        .filter(|(_, expert)| expert.0 < 4)
        .collect();
    let outputs = |held: BTreeMap<ExpertKey, GatedFfn>| -> Vec<_> {
        held.values().map(|ffn| output(&*kernels, ffn)).collect()
    };
    let load = |placed| load_experts(&packed.open().unwrap(), &*kernels, placed, &());
    let before = outputs(load(&half).unwrap());
    // Embedding, head, 3 layers, then 8 experts for each layer: everything but that half is spoilt,
    // which would be an error if it were read.
    let others = (0..5 + 24).filter(|part| *part < 5 || (part - 5) % 8 >= 4);
    packed.flip(others);
    assert_eq!(outputs(load(&half).unwrap()), before);

    let other = (LayerId(2), ExpertId(4));
    let error = load(&BTreeSet::from([other])).map(drop).unwrap_err().to_string();
    assert!(error.contains("weights.entente: expert 4 of layer 2: bytes"), "{error}");
    let error = CoordinatorWeights::load(&packed.open().unwrap(), &*kernels, &()).map(drop);
    let error = error.unwrap_err().to_string();
    assert!(error.contains("differ from their checksum"), "{error}");
}

#[test]
fn a_flipped_bit_in_any_part_is_found_by_verify_and_named() {
    let packed = Packed::import(&golden("mistral-swa"), WeightFormat::Q4);
    let kernels = kernels(WeightFormat::Q4);
    for (part, name) in [(0, "embedding"), (1, "head"), (2, "layer 0"), (3, "layer 1")] {
        packed.flip([part]);
        let error =
            packed::verify(&packed.open().unwrap(), &*kernels, &()).unwrap_err().to_string();
        assert!(error.contains(&format!("weights.entente: {name}: bytes")), "{error}");
        packed.flip([part]);
    }
    packed::verify(&packed.open().unwrap(), &*kernels, &()).unwrap();
    let plain = Checkpoint::open(&golden("mixtral")).unwrap();
    let error = packed::verify(&plain, &*kernels, &()).unwrap_err().to_string();
    assert!(error.contains("nothing is known of it"), "{error}");
}

#[test]
fn every_bit_of_header_and_table_counts() {
    let packed = Packed::import(&golden("mistral-swa"), WeightFormat::Q4);
    let original = fs::read(packed.file()).unwrap();
    let table = table_offset(&original);
    for at in (0..96).chain(table..original.len()) {
        packed.edit(|bytes| bytes[at] ^= 0x10);
        assert!(packed.open().is_err(), "byte {at} may be anything");
        packed.edit(|bytes| bytes[at] ^= 0x10);
    }
    // Cut anywhere, even between the parts, and longer than it was.
    for len in [0, 50, 96, 4_096, table, original.len() - 1, original.len() + 1] {
        packed.edit(|bytes| bytes.resize(len, 0));
        let error = packed.open().map(drop).unwrap_err().to_string();
        assert!(error.contains(WEIGHTS), "{error}");
        packed.edit(|bytes| bytes.clone_from(&original));
    }
}

#[test]
fn a_table_that_contradicts_the_model_is_refused_by_field() {
    type Spoil = fn(&mut PackedTable);
    let cases: [(&str, Spoil); 17] = [
        ("panels_version: is 7, this program reads 1", |t| t.panels_version = 7),
        ("weights: unknown format \"q2\"", |t| t.weights = "q2".to_owned()),
        ("embedding: tensor 0: encoding", |t| t.parts[0].tensors[0].encoding = 0),
        ("head: tensor 1: encoding 7", |t| t.weights = "bf16".to_owned()),
        ("model_digest: 31 bytes", |t| t.model_digest.truncate(31)),
        ("architecture_digest: 0 bytes", |t| t.architecture_digest.clear()),
        ("architecture_digest: config.json", |t| t.architecture_digest = vec![1; 32].into()),
        ("parts: 28, but the model has 29", |t| drop(t.parts.pop())),
        ("head: offset: begins at byte 4096", |t| t.parts[1].offset = 4_096),
        ("layer 0: offset", |t| t.parts[2].offset += 4_096),
        ("layer 0: offset", |t| t.parts.swap(2, 3)),
        ("layer 0: length_bytes: is 18446744073709551615", |t| t.parts[2].length_bytes = u64::MAX),
        ("layer 0: tensor 2: shape [33, 64]", |t| t.parts[2].tensors[2].rows += 1),
        ("expert 0 of layer 0: tensors: 2", |t| t.parts[5].tensors.truncate(2)),
        ("expert 7 of layer 2: checksum: 0 bytes", |t| t.parts[28].checksum.clear()),
        ("layer 0: tensor 6: encoding", |t| {
            t.parts[2].tensors[6].encoding = PackedEncoding::PanelsQ8.into();
        }),
        ("layer 0: tensor 0: encoding", |t| {
            t.parts[2].tensors[0].encoding = PackedEncoding::RowsBf16.into();
        }),
    ];
    let packed = Packed::import(&golden("mixtral"), WeightFormat::Q8);
    let original = fs::read(packed.file()).unwrap();
    for (reason, spoil) in cases {
        packed.edit_table(spoil);
        let error = packed.open().map(drop).unwrap_err().to_string();
        assert!(error.contains(&format!("{WEIGHTS}: {reason}")), "{error} does not say {reason}");
        packed.edit(|bytes| bytes.clone_from(&original));
    }
}

#[test]
fn a_header_of_another_time_is_refused_by_field() {
    type Spoil = fn(&mut Vec<u8>);
    let cases: [(&str, Spoil); 6] = [
        ("magic", |file| file[0] = b'X'),
        ("version: is 2, this program reads 1", |file| file[8] = 2),
        ("header: differs", |file| file[64] ^= 1),
        ("table: 18446744073709551615 bytes, at most", |file| file[24..32].fill(0xff)),
        ("table: 18446744073709551615 + ", |file| file[16..24].fill(0xff)),
        ("is not the file's end", |file| file[17] -= 0x10),
    ];
    let packed = Packed::import(&golden("mistral-swa"), WeightFormat::F32);
    let original = fs::read(packed.file()).unwrap();
    for (reason, spoil) in cases {
        packed.edit(|file| {
            spoil(file);
            if !reason.starts_with("header") {
                seal(file);
            }
        });
        let error = packed.open().map(drop).unwrap_err().to_string();
        assert!(error.contains(reason), "{error} does not say {reason}");
        packed.edit(|bytes| bytes.clone_from(&original));
    }
}

#[test]
fn a_file_whose_parts_do_not_reach_its_table_is_refused() {
    let packed = Packed::import(&golden("mistral-swa"), WeightFormat::Q8);
    // A page of something between the last part and the table.
    packed.edit(|bytes| {
        let offset = table_offset(bytes);
        bytes.splice(offset..offset, [7; 4_096]);
        bytes[16..24].copy_from_slice(&(offset as u64 + 4_096).to_le_bytes());
        seal(bytes);
    });
    let error = packed.open().map(drop).unwrap_err().to_string();
    assert!(error.contains("table: begins at byte"), "{error}");
}

#[test]
fn another_format_than_the_packed_one_is_refused_with_both_names() {
    let packed = Packed::import(&golden("mixtral"), WeightFormat::Q8);
    let checkpoint = packed.open().unwrap();
    let kernels = kernels(WeightFormat::Bf16);
    let errors = [
        CoordinatorWeights::load(&checkpoint, &*kernels, &()).map(drop).unwrap_err(),
        load_expert(&checkpoint, &*kernels, LayerId(0), ExpertId(0)).map(drop).unwrap_err(),
        expert_bytes(&checkpoint, WeightFormat::Bf16).map(drop).unwrap_err(),
    ];
    for error in errors {
        let error = error.to_string();
        assert!(error.contains("weights: is q8, but bf16 is asked for"), "{error}");
    }
}

#[test]
fn a_configuration_that_was_changed_after_the_import_is_refused() {
    let folder = Folder::copy_of("mixtral");
    folder.configure("rms_norm_eps", json!(1e-4));
    let packed = Packed::import(&golden("mixtral"), WeightFormat::Q8);
    fs::copy(folder.file("config.json"), packed.dir().join("config.json")).unwrap();
    let error = packed.open().map(drop).unwrap_err().to_string();
    assert!(error.contains("architecture_digest: config.json beside it"), "{error}");
}
