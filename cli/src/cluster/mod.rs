//! A whole cluster on one machine, made of child processes that are ordinary roles.
//!
//! [`plan`] and [`voters`] say which processes there are and write their configurations;
//! [`supervisor`] owns the children; [`local`] brings them up together and starts those again that
//! end by themselves ([`restart`]); [`data_dir`] is the folder that one `entente up` owns at a time,
//! with the file by which others find the cluster; [`report`] is what a person sees.
//!
//! Invariants: every port is bound before the first child starts, so no child can meet a port in
//! use; no child outlives this process, whatever ends it.
//!
//! What this module does not know: models, placement, exchanges, who leads. The roles find all of
//! that out among themselves, exactly as they would on separate machines.

pub mod data_dir;
pub mod local;
pub mod pki;
pub mod plan;
pub mod relay;
pub mod report;
pub mod restart;
pub mod supervisor;
pub mod voters;

use std::path::PathBuf;

use clap::Args;

pub use report::columns;

/// How `chat` and `eval` find a cluster.
#[derive(Debug, Args)]
pub struct Endpoint {
    /// Address of a coordinator's public API; by default that of the cluster in --data-dir.
    #[arg(long, env = "ENTENTE_URL", value_name = "URL")]
    url: Option<String>,

    /// Folder of the `entente up` to talk to.
    #[arg(long, env = "ENTENTE_DATA_DIR", value_name = "DIR", default_value = ".entente")]
    data_dir: PathBuf,
}

impl Endpoint {
    /// The address to ask, without a trailing slash.
    pub fn url(&self) -> anyhow::Result<String> {
        match &self.url {
            Some(url) => Ok(url.trim_end_matches('/').to_owned()),
            None => Ok(data_dir::ClusterFile::read(&self.data_dir)?.http),
        }
    }
}
