//! What every verb of an operator needs: a way to the control plane, and one way to print.
//!
//! Operators are clients of the voters' services Membership and Admin, with a certificate of their
//! own. What a call may do is decided by the voters; here is only how to ask, how to say what went
//! wrong ([`failure`]), how to wait ([`wait`]), how to change a tenant ([`tenants`]) and how to show
//! the answer ([`output`]).

mod failure;
pub mod lifetime;
mod output;
pub mod tenants;
pub mod wait;

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use anyhow::Context;
use clap::Args;
use entente_membership::client::Client;
use entente_membership::enrolment::renew_on_use;
use entente_membership::net::Dialler;
use entente_membership::state::codec::STATE_LEN_MAX;
use entente_membership::state::{Applied, Command, Expect, Node, State};
use entente_proto::ids::{NodeName, Region};
use entente_proto::wire::admin_client::AdminClient;
use entente_tls::{Credentials, Files};
use rustls::pki_types::CertificateDer;
use rustls::pki_types::pem::PemObject;
use tokio::sync::watch;
use tonic::transport::Channel;
use tonic::{Response, Status};

use crate::cluster::data_dir::{ClusterFile, tls_in};
use crate::cluster::pki;
use crate::exit::{Failure, Misuse};
pub use output::{Output, confirm, or_dash};

/// The flags by which a cluster's control plane is found.
#[derive(Debug, Args)]
#[command(next_help_heading = "Control plane")]
pub struct OperatorArgs {
    /// Folder of the `entente up` to talk to: addresses and the operator's certificate are there.
    #[arg(long, env = "ENTENTE_DATA_DIR", value_name = "DIR", default_value = ".entente")]
    data_dir: PathBuf,

    /// Control planes of some voters, instead of those of --data-dir; others are learnt from them.
    #[arg(long, env = "ENTENTE_COORDINATOR", value_name = "ADDR,…", value_delimiter = ',')]
    #[arg(requires_all = ["ca", "certificate", "key"])]
    coordinator: Vec<String>,

    /// The CAs of the cluster, PEM; with --coordinator.
    #[arg(long, env = "ENTENTE_CA", value_name = "FILE")]
    ca: Option<PathBuf>,

    /// An operator's certificate, PEM; with --coordinator.
    #[arg(long, env = "ENTENTE_CERTIFICATE", value_name = "FILE")]
    certificate: Option<PathBuf>,

    /// The certificate's private key, PEM; with --coordinator.
    #[arg(long, env = "ENTENTE_KEY", value_name = "FILE")]
    key: Option<PathBuf>,

    /// Seconds that one call may take, elections included.
    #[arg(long, env = "ENTENTE_CALL_TIMEOUT_S", value_name = "S", default_value_t = 10)]
    #[arg(value_parser = clap::value_parser!(u64).range(1..=600))]
    call_timeout_s: u64,

    /// How the answer is written to standard output.
    #[arg(short, long, env = "ENTENTE_OUTPUT", value_enum, default_value = "table")]
    output: Output,
}

impl OperatorArgs {
    /// Runs what a verb does against the control plane.
    pub fn run<T>(
        &self,
        verb: impl AsyncFnOnce(Operator) -> anyhow::Result<T>,
    ) -> anyhow::Result<T> {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        let result = runtime.block_on(async {
            let (operator, own) = self.connect()?;
            let client = operator.client.clone();
            let answer = verb(operator).await?;
            own.keep_fresh(&client).await;
            Ok(answer)
        });
        runtime.shutdown_background();
        result
    }

    /// Where clients reach each region, as far as an `entente up` says it.
    pub fn endpoints(&self) -> anyhow::Result<BTreeMap<Region, String>> {
        if self.coordinator.is_empty() {
            return Ok(ClusterFile::read(&self.data_dir)?.endpoints);
        }
        Ok(BTreeMap::new())
    }

    fn connect(&self) -> anyhow::Result<(Operator, Own)> {
        let (addresses, files) = self.find()?;
        let credentials = Credentials::load(&files)?;
        let client = Client::new(&credentials, addresses)?;
        let operator = Operator {
            client,
            ca: files.ca.clone(),
            dialler: Dialler::new(&credentials, None)?,
            call_max: Duration::from_secs(self.call_timeout_s),
            output: self.output,
        };
        Ok((operator, Own { credentials, files }))
    }

    /// Where voters are, and who we are to them.
    fn find(&self) -> anyhow::Result<(Vec<String>, Files)> {
        if let (false, Some(ca), Some(certificate), Some(key)) =
            (self.coordinator.is_empty(), &self.ca, &self.certificate, &self.key)
        {
            let (ca, certificate, key) = (ca.clone(), certificate.clone(), key.clone());
            return Ok((self.coordinator.clone(), Files { ca, certificate, key }));
        }
        let control = ClusterFile::read(&self.data_dir)?.control;
        if control.is_empty() {
            let folder = self.data_dir.display();
            let text = format!(
                "the cluster in {folder} has no control plane: its members are fixed, as with \
                 --transport inproc"
            );
            return Err(Misuse(text).into());
        }
        let addresses = control.into_values().collect();
        Ok((addresses, pki::files(&tls_in(&self.data_dir), &pki::operator())))
    }
}

/// Who the operator is.
struct Own {
    credentials: Credentials,
    files: Files,
}

impl Own {
    /// Renews the certificate if half of its life is over: no process of an operator's runs for so
    /// long, so its verbs do it by the way. What cannot be done is only told, as the verb is done.
    async fn keep_fresh(&self, client: &Client) {
        let Self { credentials, files } = self;
        match renew_on_use(client, credentials, files).await {
            Ok(false) => {}
            Ok(true) => tracing::info!("the operator's certificate was renewed"),
            Err(error) => {
                let left = credentials.expires().duration_since(SystemTime::now());
                let left_h = left.unwrap_or_default().as_secs() / 3_600;
                tracing::warn!(%error, left_h, "the operator's certificate was not renewed");
            }
        }
    }
}

/// Asks the control plane for one verb.
pub struct Operator {
    client: Client,
    dialler: Dialler,
    ca: PathBuf,
    call_max: Duration,
    output: Output,
}

impl Operator {
    /// Calls the leader's Admin service.
    pub async fn leader<T, F>(&self, call: impl Fn(AdminClient<Channel>) -> F) -> anyhow::Result<T>
    where
        F: Future<Output = Result<Response<T>, Status>>,
    {
        let answer = self.client.leader(self.call_max, |channel| {
            let answer = call(admin(channel));
            async { Ok(answer.await?.into_inner()) }
        });
        match answer.await {
            Ok(answer) => Ok(answer),
            Err(error) => Err(self.failure(error).await.into()),
        }
    }

    /// Calls any voter's Admin service.
    pub async fn any<T, F>(&self, call: impl Fn(AdminClient<Channel>) -> F) -> anyhow::Result<T>
    where
        F: Future<Output = Result<Response<T>, Status>>,
    {
        let answer = self.client.any(self.call_max, |channel| {
            let answer = call(admin(channel));
            async { Ok(answer.await?.into_inner()) }
        });
        match answer.await {
            Ok(answer) => Ok(answer),
            Err(error) => Err(self.failure(error).await.into()),
        }
    }

    /// The Admin service of the voter at `address` and of no other.
    pub async fn at(&self, address: &str) -> anyhow::Result<AdminClient<Channel>> {
        Ok(admin(self.dialler.dial(address).await?))
    }

    /// The CAs that this operator believes, DER.
    pub fn cas(&self) -> anyhow::Result<Vec<CertificateDer<'static>>> {
        let cas = CertificateDer::pem_file_iter(&self.ca).and_then(Iterator::collect);
        cas.with_context(|| format!("cannot read {}", self.ca.display()))
    }

    /// Proposes a change and waits until it is committed.
    pub async fn propose(&self, command: Command) -> anyhow::Result<Applied> {
        match self.client.propose(self.call_max, Expect::default(), command).await {
            Ok(applied) => Ok(applied),
            Err(error) => Err(self.failure(error).await.into()),
        }
    }

    /// The committed state, kept up to date.
    pub async fn watch(&self) -> anyhow::Result<watch::Receiver<Option<Arc<State>>>> {
        let mut states = self.client.watch();
        let told = tokio::time::timeout(self.call_max, states.wait_for(Option::is_some));
        match told.await.map(|state| state.map(drop)) {
            Ok(told) => told.context("the watch of the membership has ended")?,
            Err(_) => {
                let text = "no voter has told the committed state; see whether coordinators and \
                            witnesses run, and whether the addresses are those of their control \
                            planes";
                return Err(Failure::Unreachable(text.to_owned()).into());
            }
        }
        Ok(states)
    }

    /// The committed state as some voter knows it.
    pub async fn state(&self) -> anyhow::Result<Arc<State>> {
        let states = self.watch().await?;
        let state = states.borrow().clone();
        state.context("the watch of the membership has no state")
    }

    /// The member of this name.
    pub async fn node(&self, name: &NodeName) -> anyhow::Result<Node> {
        let state = self.state().await?;
        Ok(find(&state, name)?.clone())
    }
}

/// The member of this name in a state.
///
/// # Errors
/// There is none; the text names those that there are.
pub fn find<'a>(state: &'a State, name: &NodeName) -> Result<&'a Node, Misuse> {
    state.node(name).ok_or_else(|| {
        let names: Vec<&str> = state.nodes().map(|node| node.spec.name.as_str()).collect();
        Misuse(format!("{name} is no member; members are {}", names.join(", ")))
    })
}

/// A plan of a large model is longer than gRPC allows by default.
fn admin(channel: Channel) -> AdminClient<Channel> {
    AdminClient::new(channel).max_decoding_message_size(STATE_LEN_MAX)
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[derive(Debug, Parser)]
    struct Line {
        #[command(flatten)]
        operator: OperatorArgs,
    }

    #[test]
    fn addresses_without_a_certificate_are_refused() {
        let error = Line::try_parse_from(["x", "--coordinator", "127.0.0.1:1"]).unwrap_err();
        assert!(error.to_string().contains("--certificate"), "{error}");
        let all =
            ["x", "--coordinator", "a:1,b:2", "--ca", "c", "--certificate", "d", "--key", "e"];
        let (addresses, files) = Line::try_parse_from(all).unwrap().operator.find().unwrap();
        assert_eq!(addresses, ["a:1", "b:2"]);
        assert_eq!(files.key, PathBuf::from("e"));
    }

    #[test]
    fn a_cluster_whose_members_are_fixed_has_nothing_to_operate() {
        let dir = tempfile::tempdir().unwrap();
        let file = r#"{"http": "http://a", "endpoints": {}, "control": {}, "processes": []}"#;
        std::fs::write(dir.path().join("cluster.json"), file).unwrap();
        let folder = dir.path().to_str().unwrap();
        let line = Line::try_parse_from(["x", "--data-dir", folder]).unwrap();
        let error = line.operator.find().unwrap_err();
        assert!(error.is::<Misuse>() && error.to_string().contains("no control plane"), "{error}");
    }
}
