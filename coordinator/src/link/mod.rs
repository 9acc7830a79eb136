//! Links to expert nodes over a network. The seam is [`entente_proto::link`]; the link within one
//! process lives with the node that it leads to.

pub mod grpc;
