//! Kernels on CUDA devices.
//!
//! The driver is a library that is loaded when somebody asks for a device: a program with this
//! module starts, and serves on its processor, where there is none. The kernels are CUDA C++
//! beside this file, compiled when a device is first opened ([`Device::open`]).
//!
//! From the bottom up: `driver` and `nvrtc` are the two libraries, `compile` makes code of the
//! sources and keeps it, [`Device`] is a context with that code, [`Stream`] a queue of work,
//! [`Buffer`] and [`Staging`] memory and the way to it, [`Loader`] brings weights there, `ops` is one
//! method of a stream for each kernel, [`Graph`] many of them as one, and `experts` what an expert
//! node computes with. [`Probe`] measures them and [`Cublas`] is what they are measured against;
//! nothing that serves uses either.
//! [`nccl`] brings rows from one device to another.
//!
//! Invariants: the same as of all kernels, a row's value depends on nothing but the row and the
//! weights; nothing here panics because of a machine (no driver, too little memory, a device that
//! falls off the bus): those are [`DeviceError`](super::DeviceError)s.
//!
//! What this module does not know: experts beside their weights, sequences, and of networks all but
//! what NCCL makes of them.

mod buffer;
mod compile;
mod cublas;
mod dense;
mod device;
mod driver;
mod experts;
mod gemm;
// Some of it is for the comparison with the sources alone.
#[allow(dead_code)]
mod geometry;
mod graph;
mod kernel;
mod loader;
pub mod nccl;
mod nvrtc;
mod ops;
mod probe;
mod staging;
mod stream;
mod survey;

pub use buffer::{Buffer, Value, View, ViewMut};
pub use compile::Cache;
pub use cublas::Cublas;
pub use dense::DenseFfn;
pub use device::{Architecture, Device, DeviceReport};
pub use experts::{experts, select};
pub use geometry::VOCAB_MAX;
pub use graph::Graph;
pub use loader::Loader;
pub use ops::{
    Draw, KvView, attention_partial_len, attention_run_len, attention_splits, check_attention,
    row_pairs,
};
pub use probe::Probe;
pub use staging::Staging;
pub use stream::{Event, Stream};
pub use survey::{Survey, survey};
