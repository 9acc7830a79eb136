//! Checkpoint folders through the public door: real ones, converted ones and spoiled ones.

// The lint's own exception for tests does not reach their helper functions.
#![allow(clippy::unwrap_used)]

mod device;
mod folder;
mod fp8;
mod loading;
mod manifest;
mod packed;
mod refused;
mod text;
