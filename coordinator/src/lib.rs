//! The coordinator: everything that needs a sequence.
//!
//! It keeps the KV cache, runs embeddings, attention, gate, head and sampler, and answers clients.
//! It holds no expert: each MoE layer of a step is one exchange with the expert nodes of its own
//! country. What it promises to its users is built from these parts:
//!
//! - [`engine`]: one thread that owns the scheduler, the cache and the links, and runs step after
//!   step. Requests join and leave between steps; a long prompt is split into chunks.
//! - [`api`]: HTTP in OpenAI's shape. It checks, translates and waits; it decides nothing.
//! - [`residency`]: where the rows of a request may go, decided at the door.
//! - [`statements`]: what expert nodes say themselves that they computed.
//! - [`ledger`]: what was done with each request, in a log that anybody can check.
//! - [`link`]: the network side of `proto::link::Link`.
//! - [`config`], [`metrics`]: the file it starts from, and the numbers it shows.
//!
//! Invariants:
//! - the tokens of a request depend on its prompt, its parameters and its seed only; never on what
//!   else runs, how prompts were chunked, which replica answered, or what failed meanwhile;
//! - a token joins its sequence before the client hears of it, and is never taken back;
//! - a request that ends, however it ends, gives its blocks back before the next step;
//! - a request fails for want of experts only after it has waited for them as long as it may;
//! - nothing a client or a node sends ends the process.
//!
//! What this crate does not know: where weights of experts come from, how a placement is chosen, how
//! members agree (it hosts who does, and follows), how processes are started.

pub mod api;
pub mod config;
pub mod engine;
mod host;
pub mod ledger;
pub mod link;
pub mod metrics;
pub mod residency;
mod run;
mod start;
pub mod statements;

pub use config::Config;
pub use run::{Ready, run};
pub use start::{Error, Started, Wiring, follow, start, start_wired};
