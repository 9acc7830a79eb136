//! The expert node: holds some experts of a model and runs rows through them, nothing else.
//!
//! It is stateless. It knows no request, no token and no order of layers; a frame in, a frame out.
//! So it can be killed at any moment and whatever it owed can be asked of another replica.
//!
//! ```text
//!   coordinators ══ streams ══► service ── core::admit ──► worker's queue ──► one compute thread
//!                                  ▲                                            │ all waiting frames
//!                                  └──────── answers, in the order computed ◄───┘ of a layer at once
//! ```
//!
//! - [`Config`]: the TOML file; [`found`]: the cluster and the placement that follow from it where
//!   there are no voters;
//! - `member`: the node's life in a cluster with voters: registered, told what to hold, let go;
//! - `store`: the experts held now, and no other byte of the checkpoint; `scrub`: whether they are
//!   still what they were; `lend`: to peers that have them not; [`Counters`] of all that;
//! - [`core`]: whether a frame may be computed, a pure function;
//! - `worker`: the queue and the thread that computes; `health`: whether the device still does;
//! - [`serve`] (gRPC and byte streams on one port, over TLS) and [`inproc`]: the doors to one
//!   [`NodeHandle`]; `lanes`: rows that come to it by NCCL, where [`Nccl`] lets them.
//!
//! Invariants:
//! - nothing is computed that was not admitted: region, fence, shape and experts are checked first;
//! - every frame gets exactly one answer, and nobody is made to wait by a coordinator that does not
//!   read its answers;
//! - queues are bounded in frames and in bytes; past the bound the answer is BUSY;
//! - the value of a row does not depend on the frames that it is computed with, nor on what is loaded
//!   or released meanwhile;
//! - a frame that makes the kernels panic costs that frame, not the node; a device that fails costs
//!   the node, and no frame an answer that it could not stand by.
//!
//! What this crate does not know: attention, tokens, requests, other nodes, why it is to hold what it
//! holds.

mod account;
mod cluster;
mod config;
pub mod core;
mod counters;
mod door;
mod health;
mod http;
pub mod inproc;
mod lanes;
mod lend;
mod limits;
mod member;
mod nccl;
mod node;
mod run;
mod scrub;
mod service;
mod store;
mod stream;
mod worker;

use std::io;
use std::net::SocketAddr;
use std::path::PathBuf;

use entente_membership::client::ClientError;
use entente_membership::state::Refused;
use entente_model::ModelError;
use entente_model::kernels::{DeviceError, DeviceId, UnsupportedCpu};
use entente_proto::ids::NodeName;
use entente_router::placement::PlacementRefused;

pub use cluster::found;
pub use config::{Config, ConfigError, MembershipConfig};
pub use counters::{Counters, Counts};
pub use nccl::{Nccl, NcclConfig};
pub use node::{ExpertNode, NodeHandle, Reply};
pub use run::{Listeners, Ready, run};
pub use service::{Secured, serve};

/// Why an expert node cannot start or go on.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The configuration is not usable.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// The model folder is not usable.
    #[error(transparent)]
    Model(#[from] ModelError),
    /// The processor lacks what the weight format's kernels need.
    #[error(transparent)]
    Cpu(#[from] UnsupportedCpu),
    /// The device that the node is to compute on cannot be used, or has failed.
    #[error("{device}: {source}")]
    Device {
        /// The device.
        device: DeviceId,
        /// What is the matter with it.
        source: DeviceError,
    },
    /// The roster does not make a cluster.
    #[error("cluster: {0}")]
    Cluster(#[from] Refused),
    /// The model's experts cannot be placed on the nodes.
    #[error("placement: {0}")]
    Placement(#[from] PlacementRefused),
    /// The node is not one of the cluster's.
    #[error("node {0} is not in the cluster")]
    NotAMember(NodeName),
    /// The node cannot listen.
    #[error("cannot listen on {address}: {source}")]
    Listen {
        /// The address.
        address: String,
        /// What the operating system said.
        source: io::Error,
    },
    /// The compute thread cannot be started.
    #[error("cannot start a thread: {0}")]
    Thread(io::Error),
    /// The network service broke.
    #[error("exchange service: {0}")]
    Service(#[from] tonic::transport::Error),
    /// Certificate, key or CA are not usable.
    #[error("tls: {0}")]
    Tls(#[from] entente_tls::Error),
    /// Rows would travel where anybody can read them.
    #[error("listen: {0} is not a loopback address, so the section [tls] is needed")]
    PlainText(SocketAddr),
    /// The cluster does not take the node in.
    #[error("the cluster does not take this node in: {0}")]
    Membership(#[from] ClientError),
    /// Loading was cut short.
    #[error("loading {} stopped: {reason}", model.display())]
    Loading {
        /// The model folder.
        model: PathBuf,
        /// What happened.
        reason: String,
    },
}

impl Error {
    /// Whether the node cannot start or go on because of its device, and of nothing else.
    pub fn is_of_device(&self) -> bool {
        matches!(self, Self::Device { .. } | Self::Model(ModelError::Device(_)))
    }
}
