//! Reference outputs of the tiny checkpoints, computed by transformers in f32 on a CPU.

use std::fs;
use std::path::PathBuf;

use safetensors::SafeTensors;
use serde::Deserialize;

/// One checkpoint with what it should answer.
#[derive(Debug)]
pub struct Golden {
    /// Folder of the checkpoint.
    pub dir: PathBuf,
    /// Its cases.
    pub cases: Vec<Case>,
}

/// One prompt and its reference.
#[derive(Debug, Deserialize)]
pub struct Case {
    /// The prompt as text.
    pub prompt: String,
    /// The prompt as tokens.
    pub prompt_ids: Vec<u32>,
    /// The likeliest continuation.
    pub greedy_ids: Vec<u32>,
    /// Logits of each position of the prompt, `[prompt_len][vocab]`.
    #[serde(skip)]
    pub logits: Vec<Vec<f32>>,
}

#[derive(Deserialize)]
struct Expected {
    cases: Vec<Case>,
}

impl Golden {
    /// Loads `tests/golden/<name>`.
    pub fn load(name: &str) -> Self {
        let dir = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("golden").join(name);
        let text = fs::read_to_string(dir.join("expected.json")).unwrap();
        let Expected { mut cases } = serde_json::from_str(&text).unwrap();
        let bytes = fs::read(dir.join("expected.safetensors")).unwrap();
        let tensors = SafeTensors::deserialize(&bytes).unwrap();
        for (number, case) in cases.iter_mut().enumerate() {
            let tensor = tensors.tensor(&format!("logits.{number}")).unwrap();
            let &[rows, vocab] = tensor.shape() else { panic!("logits have two dimensions") };
            assert_eq!(rows, case.prompt_ids.len());
            let floats = tensor.data().chunks_exact(4);
            let floats: Vec<f32> =
                floats.map(|bytes| f32::from_le_bytes(bytes.try_into().unwrap())).collect();
            case.logits = floats.chunks_exact(vocab).map(<[f32]>::to_vec).collect();
        }
        Self { dir, cases }
    }

    /// The folder as a command line argument.
    pub fn path(&self) -> &str {
        self.dir.to_str().unwrap()
    }
}

impl Case {
    /// Log-probability of each prompt token but the first, given those before it.
    pub fn prompt_logprobs(&self) -> Vec<f64> {
        let next = &self.prompt_ids[1..];
        self.logits.iter().zip(next).map(|(row, id)| log_softmax(row, *id as usize)).collect()
    }
}

fn log_softmax(row: &[f32], at: usize) -> f64 {
    let max = row.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let sum: f64 = row.iter().map(|logit| f64::from(logit - max).exp()).sum();
    f64::from(row[at] - max) - sum.ln()
}
