//! Voters with real sockets, real TLS and real disks, several in one process.

#![allow(clippy::unwrap_used, clippy::print_stdout)]

mod authority;
mod cosigning;
mod enrolment;
mod faults;
mod group;
mod heartbeat;
mod linearizable;
mod proposals;
mod relay;
mod resets;
mod table;
mod world;
