//! One file a verb. A verb holds its flags and what it does with them, and nothing that another
//! verb needs too.

pub mod audit;
pub mod bench;
pub mod ca;
pub mod chat;
pub mod coordinator;
pub mod doctor;
pub mod drill;
pub mod eval;
pub mod expert_node;
pub mod experts;
pub mod init;
pub mod join;
pub mod key;
pub mod link;
pub mod model;
pub mod node;
pub mod raft;
pub mod residency;
pub mod tenant;
pub mod token;
pub mod up;
pub mod witness;
