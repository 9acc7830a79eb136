//! `entente up`: a whole cluster on this machine, in one command.
//!
//! It binds every port, writes a configuration for each role, starts the roles as child processes,
//! waits until every coordinator can serve, shows what is running, asks one question, and serves
//! until a signal. Whatever happens on the way, no child is left behind.

use std::io::{self, Write};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener};
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, anyhow};
use clap::Args;
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::task::spawn_blocking;

use crate::bundled;
use crate::client::{Client, Sampling, Style};
use crate::cluster::data_dir::{ClusterFile, DataDir, ProcessEntry};
use crate::cluster::pki;
use crate::cluster::plan::{self, Common, KvCache, Member, Regions, Role, Transport, Weights};
use crate::cluster::report::{Progress, log_tail, process_table};
use crate::cluster::supervisor::{Event, Launch, Supervisor};
use crate::exit::{Interrupted, Misuse};
use crate::logging::LogArgs;
use crate::status::Status;

/// How long all processes together may be silent while they load and find each other.
const STALL_DEADLINE: Duration = Duration::from_secs(120);

/// What a model that nobody knows is asked to show that it answers.
const NEUTRAL_PROMPT: &str = "Hello";

/// Tokens of the answer that shows that the cluster works.
const DEMO_TOKENS_MAX: u32 = 64;

/// The flags of `entente up`.
#[derive(Debug, Args)]
pub struct UpArgs {
    /// Checkpoint folder in Hugging Face format, or one that `entente model import` wrote; the
    /// bundled phrasebook model if absent.
    #[arg(long, env = "ENTENTE_MODEL", value_name = "DIR")]
    model: Option<PathBuf>,

    /// Regions and how many expert nodes each has; each region holds all experts.
    #[arg(long, env = "ENTENTE_REGIONS", value_name = "REGION=NODES,…")]
    #[arg(default_value = "fr=2,se=2")]
    regions: Regions,

    /// How weights are kept in memory and multiplied.
    #[arg(long, env = "ENTENTE_WEIGHTS", value_enum, default_value = "bf16")]
    weights: Weights,

    /// How keys and values are kept; f32 with f32 weights and bf16 with all others if absent.
    #[arg(long, env = "ENTENTE_KV_DTYPE", value_enum)]
    kv_dtype: Option<KvCache>,

    /// Address of the first region's public API; port 0 picks a free one.
    #[arg(long, env = "ENTENTE_HTTP", value_name = "ADDR", default_value = "127.0.0.1:8080")]
    http: SocketAddr,

    /// Folder for configurations, logs and cluster.json; one `up` owns it at a time.
    #[arg(long, env = "ENTENTE_DATA_DIR", value_name = "DIR", default_value = ".entente")]
    data_dir: PathBuf,

    /// Answer this one prompt on standard output, then stop.
    #[arg(long, env = "ENTENTE_ONCE", value_name = "PROMPT")]
    once: Option<String>,

    /// Generate at most this many tokens for --once.
    #[arg(long, env = "ENTENTE_MAX_TOKENS", value_name = "N", default_value_t = 256)]
    max_tokens: u32,

    /// Copies of each expert in each region, each on a different node.
    #[arg(long, env = "ENTENTE_REPLICAS", value_name = "N", default_value_t = 1)]
    #[arg(value_parser = clap::value_parser!(u16).range(1..))]
    replicas: u16,

    /// Whether expert nodes are processes of their own or live inside their coordinator.
    #[arg(long, env = "ENTENTE_TRANSPORT", value_enum, default_value = "stream")]
    transport: Transport,

    /// Compute threads of each process; all cores if absent.
    #[arg(long, env = "ENTENTE_THREADS", value_name = "N")]
    #[arg(value_parser = clap::value_parser!(u16).range(1..=1024))]
    threads: Option<u16>,
}

/// Starts the cluster and serves until it is told to stop.
pub fn run(args: UpArgs, logging: &LogArgs) -> anyhow::Result<()> {
    args.regions.check_replicas(args.replicas)?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let result = runtime.block_on(up(&args, logging));
    // A request that is still waiting for a cluster that is gone must not hold up the exit.
    runtime.shutdown_background();
    result
}

async fn up(args: &UpArgs, logging: &LogArgs) -> anyhow::Result<()> {
    // From here on a signal is an event like any other and cannot leave anything half done.
    let mut signals = Signals::new()?;
    let data = DataDir::open(&args.data_dir)?;
    let model = match &args.model {
        Some(folder) => folder
            .canonicalize()
            .map_err(|error| Misuse(format!("--model {}: {error}", folder.display())))?,
        None => bundled::unpack(&data.models())?,
    };
    let mut cluster = Cluster::start(args, &model, &data, logging)?;
    let served = tokio::select! {
        result = cluster.serve(args, &model, &data) => result,
        () = signals.next() => Err(Interrupted.into()),
    };
    data.retract()?;
    let was_ready = cluster.published;
    tokio::select! {
        () = cluster.supervisor.stop() => {}
        // Whoever asks twice does not want to wait for running requests.
        () = signals.next() => {}
    }
    match served {
        // To be stopped is how a serving cluster ends; an unanswered --once has failed.
        Err(error) if error.is::<Interrupted>() && was_ready && args.once.is_none() => Ok(()),
        other => other,
    }
}

/// The signals that ask this process to stop.
struct Signals([Signal; 3]);

impl Signals {
    fn new() -> anyhow::Result<Self> {
        let watch = |kind| signal(kind).context("cannot watch signals");
        Ok(Self([
            watch(SignalKind::interrupt())?,
            watch(SignalKind::terminate())?,
            watch(SignalKind::hangup())?,
        ]))
    }

    async fn next(&mut self) {
        let [interrupt, terminate, hangup] = &mut self.0;
        tokio::select! {
            _ = interrupt.recv() => {}
            _ = terminate.recv() => {}
            _ = hangup.recv() => {}
        }
    }
}

/// The processes that are running, in the order in which they were started.
struct Cluster {
    members: Vec<Member>,
    addresses: Vec<SocketAddr>,
    logs: Vec<PathBuf>,
    /// Experts that each process holds, once it said so.
    experts: Vec<Option<usize>>,
    progress: Progress,
    supervisor: Supervisor,
    /// Whether `cluster.json` was written.
    published: bool,
}

impl Cluster {
    /// Binds all ports first, so that nothing is started when one is taken.
    fn start(
        args: &UpArgs,
        model: &Path,
        data: &DataDir,
        logging: &LogArgs,
    ) -> anyhow::Result<Self> {
        let everyone = args.regions.members();
        // Expert nodes inside their coordinator are no processes and have no address.
        let is_process =
            |m: &&Member| m.role == Role::Coordinator || args.transport != Transport::Inproc;
        let members: Vec<Member> = everyone.iter().filter(is_process).cloned().collect();
        let listeners = bind(&members, args.http)?;
        let addresses =
            listeners.iter().map(TcpListener::local_addr).collect::<io::Result<Vec<_>>>()?;
        let nodes = everyone.into_iter().filter(|m| m.role == Role::ExpertNode).map(|node| {
            let address = members.iter().position(|member| *member == node).map(|at| addresses[at]);
            (node, address)
        });
        let roster = plan::roster(args.replicas, nodes)?;
        // Nothing leaves a process whose expert nodes are in it.
        let tls = (args.transport != Transport::Inproc).then(|| data.tls());
        if let Some(folder) = &tls {
            pki::mint(folder, &roster, &members)?;
        }
        let common = Common {
            model: model.to_owned(),
            weights: args.weights,
            kv_dtype: args.kv_dtype,
            threads: args.threads,
            transport: args.transport,
            tls,
            roster,
        };

        let exe = std::env::current_exe().context("cannot find this program's own file")?;
        let mut supervisor = Supervisor::new();
        let mut logs = Vec::new();
        for ((member, listener), address) in members.iter().zip(listeners).zip(&addresses) {
            let toml = plan::configuration(&common, member, *address)?;
            let config = data.write_config(&member.name, &toml)?;
            let log = data.log(&member.name);
            logs.push(log.clone());
            supervisor.start(&exe, Launch { member, config, log, listener }, logging)?;
        }
        let progress = Progress::new(&members);
        let experts = vec![None; members.len()];
        Ok(Self { members, addresses, logs, experts, progress, supervisor, published: false })
    }

    /// Brings the cluster to where it answers, then watches it. Returns when there is an answer to
    /// `--once`, or when it cannot go on.
    async fn serve(&mut self, args: &UpArgs, model: &Path, data: &DataDir) -> anyhow::Result<()> {
        self.ready().await?;
        let file = self.file();
        data.publish(&file)?;
        self.published = true;

        let style = style_of(model);
        if let Some(prompt) = &args.once {
            let ask = answer(file.http, style, prompt.clone(), args.max_tokens);
            return self.watch_until(ask).await;
        }
        let prompt = if args.model.is_none() { bundled::PROMPT } else { NEUTRAL_PROMPT };
        self.introduce(&file, style, prompt)?;
        let ask = answer(file.http, style, prompt.to_owned(), DEMO_TOKENS_MAX);
        if let Err(error) = self.watch_until(ask).await {
            tracing::warn!("the first prompt was not answered: {error:#}");
        }
        self.watch_until(std::future::pending()).await
    }

    /// Waits until every process said that it is ready. A coordinator says so when it has found
    /// all its experts.
    async fn ready(&mut self) -> anyhow::Result<()> {
        while let Some(waiting) = self.experts.iter().position(Option::is_none) {
            let next = tokio::time::timeout(STALL_DEADLINE, self.supervisor.next());
            let Ok(event) = next.await else {
                let what = format!("has said nothing for {STALL_DEADLINE:?}");
                return Err(self.trouble(waiting, &what));
            };
            match event {
                (index, Event::Said(Status::Loading { done, total })) => {
                    self.progress.loading(index, done, total);
                }
                (index, Event::Said(Status::Ready { experts, weights_bytes, .. })) => {
                    self.experts[index] = Some(experts);
                    self.progress.ready(index, weights_bytes);
                }
                (index, Event::Exited(status)) => {
                    return Err(self.trouble(index, &format!("ended during the start ({status})")));
                }
            }
        }
        Ok(())
    }

    /// Runs `work`, telling about every process that ends meanwhile. The others go on: what is left
    /// of a cluster may well be enough.
    async fn watch_until(
        &mut self,
        work: impl Future<Output = anyhow::Result<()>>,
    ) -> anyhow::Result<()> {
        tokio::pin!(work);
        loop {
            tokio::select! {
                result = &mut work => return result,
                (index, status) = next_exit(&mut self.supervisor) => {
                    let log = self.logs[index].display();
                    let name = &self.members[index].name;
                    tracing::warn!(%name, %status, %log, "a process of the cluster ended");
                }
            }
        }
    }

    /// What is wrong with a process, in its own last words.
    fn trouble(&self, index: usize, what: &str) -> anyhow::Error {
        let (name, log) = (&self.members[index].name, &self.logs[index]);
        anyhow!("{name} {what}; the end of {}:{}", log.display(), log_tail(log))
    }

    fn file(&self) -> ClusterFile {
        let processes = self.members.iter().zip(&self.addresses).zip(self.supervisor.pids());
        let processes: Vec<ProcessEntry> = processes
            .map(|((member, address), pid)| ProcessEntry {
                name: member.name.clone(),
                role: member.role,
                region: member.region,
                pid: *pid,
                address: *address,
            })
            .collect();
        let coordinators = processes.iter().filter(|process| process.role == Role::Coordinator);
        ClusterFile {
            http: url(self.addresses[0]),
            endpoints: coordinators.map(|process| (process.region, url(process.address))).collect(),
            processes,
        }
    }

    /// What a person wants to see first: what runs, where it is, and how to ask it.
    fn introduce(&self, file: &ClusterFile, style: Style, prompt: &str) -> anyhow::Result<()> {
        let experts: Vec<usize> = self.experts.iter().map(|held| held.unwrap_or(0)).collect();
        let mut stdout = io::stdout().lock();
        writeln!(stdout, "\n{}\n", process_table(&file.processes, &experts))?;
        for (region, url) in &file.endpoints {
            writeln!(stdout, "{region}: {url}")?;
        }
        let (path, field) = match style {
            Style::Chat => ("chat/completions", chat_field(prompt)),
            Style::Completion => ("completions", format!(r#""prompt": "{prompt}""#)),
        };
        writeln!(
            stdout,
            "\ncurl {}/v1/{path} -H 'content-type: application/json' -d '{{{field}}}'\n",
            file.http
        )?;
        writeln!(stdout, "{prompt}")?;
        Ok(())
    }
}

fn chat_field(prompt: &str) -> String {
    format!(r#""messages": [{{"role": "user", "content": "{prompt}"}}]"#)
}

/// The next end of any child; what else they say no longer matters.
async fn next_exit(supervisor: &mut Supervisor) -> (usize, std::process::ExitStatus) {
    loop {
        if let (index, Event::Exited(status)) = supervisor.next().await {
            return (index, status);
        }
    }
}

/// One listener a process: the first at `http`, the other coordinators on free ports beside it, and
/// expert nodes on free ports of the loopback interface.
fn bind(members: &[Member], http: SocketAddr) -> anyhow::Result<Vec<TcpListener>> {
    let wanted = members.iter().enumerate().map(|(at, member)| match member.role {
        Role::Coordinator if at == 0 => http,
        Role::Coordinator => SocketAddr::new(http.ip(), 0),
        Role::ExpertNode => SocketAddr::from((Ipv4Addr::LOCALHOST, 0)),
    });
    let listener = |(member, address): (&Member, SocketAddr)| {
        TcpListener::bind(address)
            .with_context(|| format!("cannot listen at {address} for {}", member.name))
    };
    members.iter().zip(wanted).map(listener).collect()
}

/// The URL by which this machine reaches a listener.
fn url(address: SocketAddr) -> String {
    let ip = match address.ip() {
        IpAddr::V4(ip) if ip.is_unspecified() => Ipv4Addr::LOCALHOST.into(),
        IpAddr::V6(ip) if ip.is_unspecified() => Ipv6Addr::LOCALHOST.into(),
        ip => ip,
    };
    format!("http://{}", SocketAddr::new(ip, address.port()))
}

/// Whether a checkpoint can chat: its template is a file of its own or part of the tokenizer's
/// configuration.
fn style_of(model: &Path) -> Style {
    let in_config = || {
        let text = std::fs::read_to_string(model.join("tokenizer_config.json")).ok()?;
        let config: serde_json::Value = serde_json::from_str(&text).ok()?;
        config.get("chat_template").map(|_| ())
    };
    if model.join("chat_template.jinja").exists() || in_config().is_some() {
        Style::Chat
    } else {
        Style::Completion
    }
}

/// Asks the cluster through its public API and writes the answer to standard output as it comes.
async fn answer(http: String, style: Style, prompt: String, max_tokens: u32) -> anyhow::Result<()> {
    let ask = move || -> anyhow::Result<()> {
        let sampling = Sampling { max_tokens, temperature: Some(0.0) };
        let mut stdout = io::stdout().lock();
        Client::connect(&http)?.stream(style, &prompt, sampling, |text| {
            stdout.write_all(text.as_bytes())?;
            stdout.flush()
        })?;
        writeln!(stdout)?;
        Ok(())
    };
    spawn_blocking(ask).await.context("asking the cluster failed")?
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_unspecified_address_is_reached_over_loopback() {
        assert_eq!(url("0.0.0.0:80".parse().unwrap()), "http://127.0.0.1:80");
        assert_eq!(url("[::]:80".parse().unwrap()), "http://[::1]:80");
        assert_eq!(url("10.0.0.1:80".parse().unwrap()), "http://10.0.0.1:80");
    }

    #[test]
    fn every_port_but_the_first_is_free_to_choose() {
        let members = "fr=1,se=1".parse::<Regions>().unwrap().members();
        let taken = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = taken.local_addr().unwrap();
        let error = bind(&members, address).unwrap_err().to_string();
        assert!(
            error.contains(&address.to_string()) && error.contains("fr-coordinator"),
            "{error}"
        );
        drop(taken);
        assert_eq!(bind(&members, address).unwrap().len(), members.len());
    }
}
