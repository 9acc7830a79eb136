//! A checkpoint folder that a test may spoil: a copy of a golden one in a temporary place.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use serde_json::{Map, Value, json};
use tempfile::TempDir;

/// A tensor outside any file.
#[derive(Clone)]
pub struct Tensor {
    pub dtype: String,
    pub shape: Vec<usize>,
    pub data: Vec<u8>,
}

pub type Tensors = BTreeMap<String, Tensor>;

/// A golden folder of the repository, which nobody may change.
pub fn golden(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/golden").join(name)
}

pub fn read_json(path: &Path) -> Value {
    serde_json::from_slice(&fs::read(path).unwrap()).unwrap()
}

/// A temporary folder, removed when dropped.
pub struct Folder(TempDir);

impl Folder {
    /// Nothing yet.
    pub fn empty() -> Self {
        Self(tempfile::tempdir().unwrap())
    }

    /// A copy of a golden folder, without the reference outputs.
    pub fn copy_of(name: &str) -> Self {
        let folder = Self::empty();
        for entry in fs::read_dir(golden(name)).unwrap() {
            let path = entry.unwrap().path();
            let name = path.file_name().unwrap().to_str().unwrap();
            if !name.starts_with("expected") {
                fs::copy(&path, folder.file(name)).unwrap();
            }
        }
        folder
    }

    pub fn path(&self) -> &Path {
        self.0.path()
    }

    pub fn file(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    pub fn write(&self, name: &str, bytes: impl AsRef<[u8]>) {
        fs::write(self.file(name), bytes).unwrap();
    }

    pub fn remove(&self, name: &str) {
        fs::remove_file(self.file(name)).unwrap();
    }

    /// Changes the top-level object of a JSON file.
    pub fn edit(&self, name: &str, edit: impl FnOnce(&mut Map<String, Value>)) {
        let mut value = read_json(&self.file(name));
        edit(value.as_object_mut().unwrap());
        self.write(name, value.to_string());
    }

    /// Sets one field of `config.json`.
    pub fn configure(&self, field: &str, value: Value) {
        self.edit("config.json", |config| drop(config.insert(field.to_owned(), value)));
    }

    /// Changes the header of `model.safetensors` and leaves the data.
    pub fn edit_header(&self, edit: impl FnOnce(&mut Map<String, Value>)) {
        let (mut header, data) = split(&fs::read(self.file("model.safetensors")).unwrap());
        edit(&mut header);
        self.write("model.safetensors", join(&Value::Object(header).to_string(), &data));
    }

    /// The tensors of `model.safetensors`.
    pub fn tensors(&self) -> Tensors {
        let (header, data) = split(&fs::read(self.file("model.safetensors")).unwrap());
        let tensor = |entry: &Value| {
            let number = |value: &Value| value.as_u64().unwrap() as usize;
            let offsets = &entry["data_offsets"];
            Tensor {
                dtype: entry["dtype"].as_str().unwrap().to_owned(),
                shape: entry["shape"].as_array().unwrap().iter().map(number).collect(),
                data: data[number(&offsets[0])..number(&offsets[1])].to_vec(),
            }
        };
        let named = header.iter().filter(|(name, _)| *name != "__metadata__");
        named.map(|(name, entry)| (name.clone(), tensor(entry))).collect()
    }

    /// Writes a safetensors file.
    pub fn write_tensors(&self, name: &str, tensors: &Tensors) {
        let mut header = json!({"__metadata__": {"format": "pt"}});
        let mut data = Vec::new();
        for (name, tensor) in tensors {
            let begin = data.len();
            data.extend(&tensor.data);
            header[name] = json!({
                "dtype": tensor.dtype, "shape": tensor.shape, "data_offsets": [begin, data.len()],
            });
        }
        self.write(name, join(&header.to_string(), &data));
    }

    /// Changes the tensors of `model.safetensors`.
    pub fn edit_tensors(&self, edit: impl FnOnce(&mut Tensors)) {
        let mut tensors = self.tensors();
        edit(&mut tensors);
        self.write_tensors("model.safetensors", &tensors);
    }

    /// Splits `model.safetensors` into `shards` files with an index.
    pub fn shard(&self, shards: usize) {
        let mut files = vec![Tensors::new(); shards];
        let mut weight_map = Map::new();
        for (i, (name, tensor)) in self.tensors().into_iter().enumerate() {
            weight_map.insert(name.clone(), shard_name(i % shards).into());
            files[i % shards].insert(name, tensor);
        }
        self.remove("model.safetensors");
        for (i, tensors) in files.iter().enumerate() {
            self.write_tensors(&shard_name(i), tensors);
        }
        let index = json!({"metadata": {"total_size": 1}, "weight_map": weight_map});
        self.write("model.safetensors.index.json", index.to_string());
    }

    /// Changes `weight_map` of the index.
    pub fn edit_index(&self, edit: impl FnOnce(&mut Map<String, Value>)) {
        self.edit("model.safetensors.index.json", |index| {
            edit(index["weight_map"].as_object_mut().unwrap());
        });
    }

    /// Renames Mixtral's experts to what transformers 5 calls them, fusing those of a layer.
    pub fn fuse_experts(&self, layers: usize, experts: usize) {
        self.edit_tensors(|tensors| {
            for layer in 0..layers {
                let old = format!("model.layers.{layer}.block_sparse_moe");
                let new = format!("model.layers.{layer}.mlp");
                let gate = tensors.remove(&format!("{old}.gate.weight")).unwrap();
                tensors.insert(format!("{new}.gate.weight"), gate);
                let mut take = |e: usize, w: &str| {
                    tensors.remove(&format!("{old}.experts.{e}.{w}.weight")).unwrap()
                };
                let (mut gate_up, mut down) = (Vec::new(), Vec::new());
                let mut extents = (0, 0);
                for expert in 0..experts {
                    let w1 = take(expert, "w1");
                    extents = (w1.shape[0], w1.shape[1]);
                    gate_up.extend(w1.data);
                    gate_up.extend(take(expert, "w3").data);
                    down.extend(take(expert, "w2").data);
                }
                let (inner, hidden) = extents;
                let fused = |shape: [usize; 2], data| Tensor {
                    dtype: "BF16".to_owned(),
                    shape: vec![experts, shape[0], shape[1]],
                    data,
                };
                let name = format!("{new}.experts");
                let gate_up = fused([2 * inner, hidden], gate_up);
                tensors.insert(format!("{name}.gate_up_proj"), gate_up);
                tensors.insert(format!("{name}.down_proj"), fused([hidden, inner], down));
            }
        });
    }
}

pub fn shard_name(i: usize) -> String {
    format!("model-{:05}.safetensors", i + 1)
}

/// A safetensors file of this header and data.
pub fn join(header: &str, data: &[u8]) -> Vec<u8> {
    [&(header.len() as u64).to_le_bytes(), header.as_bytes(), data].concat()
}

fn split(file: &[u8]) -> (Map<String, Value>, Vec<u8>) {
    let header_len = u64::from_le_bytes(file[..8].try_into().unwrap()) as usize;
    let header: Value = serde_json::from_slice(&file[8..8 + header_len]).unwrap();
    (header.as_object().unwrap().clone(), file[8 + header_len..].to_vec())
}

/// Stores the same bf16 values as f32.
pub fn widen_to_f32(tensor: &mut Tensor) {
    let bits = tensor.data.chunks_exact(2).map(|b| u32::from(u16::from_le_bytes([b[0], b[1]])));
    tensor.data = bits.flat_map(|bits| (bits << 16).to_le_bytes()).collect();
    tensor.dtype = "F32".to_owned();
}
