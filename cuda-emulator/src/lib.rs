//! A stand-in for NVIDIA's driver that runs this project's kernels on the processor, for tests.
//!
//! It is built as a shared library that exports what `cudarc` calls of the driver's API. The
//! kernels of `model/src/kernels/cuda` are compiled into it as C++, with primitives of its own in
//! place of `device.cuh`; each thread of a block is a fiber, and memory of the device is memory of
//! the host. A program finds it where it looks for `libcuda.so` and needs no line about it.
//!
//! - [`engine`] runs a kernel, and finds what a device would let pass: barriers that not all reach,
//!   warps that diverge, copies that were not waited for.
//!
//! - `driver` is the machine behind the calls, `api` the calls themselves.
//! - [`settings`] is what a test can choose, and the faults that it can plant.
//! - [`stand_in`] is how a test has a program find it.
//!
//! What it cannot show: how fast anything is, the rounding inside of a tensor core, races that no
//! order of whole warps between barriers brings out, and what only NVIDIA's compiler refuses.
//!
//! The product never depends on it.

mod api;
mod driver;
pub mod engine;
mod memory;
pub mod settings;
pub mod stand_in;
