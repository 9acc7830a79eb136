//! What the cluster tests share: a real cluster of the real binary, and a plain HTTP client.
//!
//! Every test here goes through the public door: `entente up` with flags, its files, and the HTTP
//! API. Nothing links against the crates under test, so what passes here is what a user gets.
//!
//! - [`cluster`] starts the binary, waits for `cluster.json`, and sees to it that no process is
//!   left, also when a test fails.
//! - [`http`] asks and streams, and keeps JSON text as it came, so that "bit-equal" can mean equal
//!   bytes.
//! - [`machines`] does what an operator does with several machines.
//! - [`config`] writes the configuration of a process that a test starts by itself.
//! - [`gpu`] lets processes find emulated GPUs.
//! - [`golden`] reads the reference outputs of the tiny checkpoints in `tests/golden/`.
//!
//! Starting a cluster costs more than asking it, so a test asks one cluster many questions and
//! reports everything that was wrong with it.

pub mod cluster;
pub mod config;
pub mod golden;
pub mod gpu;
pub mod http;
pub mod machines;
pub mod process;

pub use cluster::Cluster;
pub use golden::Golden;
pub use gpu::Gpus;
