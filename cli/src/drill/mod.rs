//! Drills: load on a cluster, faults while it runs, and a verdict.
//!
//! [`scenario`] is the file that says what happens and what is required. [`schedule`] says when a
//! fault is due, [`target`] whom it strikes, [`figures`] and [`history`] what was measured and
//! [`verdict`] whether that is enough; these are pure. [`place`] knows the cluster, [`strike`] does
//! to it what the scenario says ([`stale`] plays one that slept), [`watch`] and [`control`] see when it has recovered, [`run`] puts
//! all of it together with [`board`] between its threads, and [`report`] tells what came out.
//!
//! Invariants: what a drill did to a running cluster (paused processes, links that were cut) it
//! undoes before it ends, however it ends; a figure that could not be measured is a miss, never a
//! pass, and so is a strike that could not be made.
//!
//! What it does not know: how the cluster works. It asks over the public API, reads `cluster.json`,
//! and is an operator to the control plane, as a person would be.

pub mod board;
mod control;
mod figures;
mod history;
pub mod place;
pub mod report;
pub mod run;
pub mod scenario;
mod schedule;
mod stale;
mod strike;
mod target;
mod verdict;
mod watch;
