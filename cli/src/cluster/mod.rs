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
pub mod tenant;
pub mod voters;

use std::path::PathBuf;

use clap::Args;

use crate::api_key::ApiKey;
use crate::client::Client;
pub use report::columns;

/// How verbs that ask a cluster's public API find it, and who they are to it.
#[derive(Debug, Args)]
pub struct Endpoint {
    /// Address of a coordinator's public API; by default that of the cluster in --data-dir.
    #[arg(long, env = "ENTENTE_URL", value_name = "URL")]
    url: Option<String>,

    /// Folder of the `entente up` to talk to.
    #[arg(long, env = "ENTENTE_DATA_DIR", value_name = "DIR", default_value = ".entente")]
    data_dir: PathBuf,

    /// Key of a tenant; by default, without --url, the one in --data-dir.
    #[arg(long, env = "ENTENTE_API_KEY", value_name = "KEY", hide_env_values = true)]
    api_key: Option<ApiKey>,
}

impl Endpoint {
    /// Asks the cluster for its model.
    pub fn connect(&self) -> anyhow::Result<Client> {
        if let Some(url) = &self.url {
            return Client::connect(url, self.api_key.as_ref());
        }
        let file = data_dir::ClusterFile::read(&self.data_dir)?;
        Client::connect(&file.http, self.api_key.as_ref().or(file.api_key.as_ref()))
    }
}
