//! Voters with real sockets, real TLS and real disks, several in one process.

mod authority;
mod faults;
mod group;
mod heartbeat;
mod proposals;
mod table;
mod world;
