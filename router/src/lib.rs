//! What happens between the gate and the sum: which experts a row goes through, which nodes compute
//! them, what is done when a node does not answer, and in which order the results are added.
//!
//! The path of a layer's rows:
//!
//! ```text
//!   gate logits ── gate::choose ──► choices (row, expert, weight)
//!                                      │
//!   placement::plan ──► ClusterView ── Exchange::start ──► Command::Send { node, frame } …
//!     (which node        (who is up,     │    ▲
//!      holds what)        under which    │    └── on_answer, on_link_down, on_not_sent, on_tick
//!                         fence)         ▼
//!                                     Exchange::combine ──► sums, in ascending expert order
//! ```
//!
//! Several exchanges may be in flight at once; [`exchanges`] gives each its events.
//!
//! Invariants:
//! - **The result does not depend on who computed it.** Placement, choice of replica, order of
//!   answers, failures and retries change no bit as long as a replica of the first kernel class is
//!   left: each (row, expert) is added once, in ascending order of experts, from the first valid
//!   answer. Rows that another class had to compute are counted.
//! - **A row is offered only to nodes that may see it**: in the home region, in a region that the
//!   row's policy allows, also while failing over.
//! - **An answer counts only if it was asked for**: by this exchange, of that node, under that
//!   fence, with exactly the length that the frame calls for.
//! - The same events give the same commands: no clock, no randomness, no hash order.
//!
//! What this crate does not know: tokio, sockets, clocks (time comes in as microseconds of any
//! origin), weights, tokens, requests. Expert choices reveal text, so no error names an expert.

pub mod exchange;
pub mod exchanges;
pub mod gate;
pub mod moves;
pub mod pace;
pub mod placement;
pub mod view;
