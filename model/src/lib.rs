//! Models: everything between a folder of files and numbers that can be multiplied.
//!
//! # From folder to model
//!
//! A Hugging Face checkpoint folder is opened with [`Checkpoint::open`]. That reads `config.json`
//! into an [`Architecture`], which describes each layer as data, and the headers of the
//! safetensors files, and checks one against the other: every tensor that the architecture calls
//! for is there, has its shape and can be computed with, and no other tensor is. The weights stay
//! on disk, mapped. A coordinator then loads [`CoordinatorWeights`], which is everything but the
//! experts; an expert node loads the experts that are placed on it ([`load_experts`]). Neither reads
//! the other's bytes. A folder that [`packed::import`] wrote is opened the same way. Both compute the same [`Checkpoint::digest`], so that they can
//! tell whether they mean the same model.
//!
//! # Families
//!
//! Mixtral and Mistral differ in a few lines of data (the private module `family`): what the
//! configuration calls the feed-forward and what the tensors are called. After loading, nobody asks
//! for a family. What a configuration or a checkpoint holds and nothing here computes (biases,
//! other rope types, quantised weights, a tensor too many) is refused by name, never left out: a
//! model with a part missing answers nonsense without complaint.
//!
//! # Text
//!
//! [`Tokenizer`] turns text into token ids and [`Detokenizer`] turns a stream of ids into text that
//! never breaks a character. [`ChatTemplate`] turns a conversation into a prompt. Between them they
//! keep one rule: control tokens come from the template, never from what a user wrote.
//!
//! # Arithmetic
//!
//! [`kernels`] multiplies; [`Rope`] provides the angles.
//!
//! Invariants:
//! - every file is untrusted: sizes are bounded, sums are checked, and an error names the file, the
//!   field or the tensor, and the reason ([`ModelError`]);
//! - an [`Architecture`] that exists is consistent, a [`Checkpoint`] that exists is complete;
//! - after loading, nothing here changes: all types can be shared between threads.
//!
//! What this crate does not know: networks, nodes, requests, clocks, which expert is placed where.

mod chat;
mod checkpoint;
pub mod config;
mod error;
mod family;
mod generation_config;
mod json;
pub mod kernels;
pub mod packed;
mod rope;
pub mod synth;
mod tokenizer;
mod weights;

pub use chat::{Chat, ChatMessage, ChatPrompt, ChatTemplate, TemplateError};
pub use checkpoint::Checkpoint;
pub use config::Architecture;
pub use error::ModelError;
pub use generation_config::GenerationConfig;
pub use rope::Rope;
pub use tokenizer::{Detokenizer, Tokenizer, TokenizerError};
pub use weights::{
    CoordinatorWeights, Embedding, FfnWeights, LayerWeights, Progress, expert_bytes, load_expert,
    load_experts,
};
