//! `entente up`: a whole cluster on this machine, in one command.
//!
//! It starts the roles as child processes ([`crate::cluster::local`]), waits until every
//! coordinator can serve, shows what is running, asks one question, and serves until a signal.
//! Whatever happens on the way, no child is left behind.

use std::io::{self, Write};
use std::net::SocketAddr;
use std::path::{Path, PathBuf};

use anyhow::Context;
use clap::Args;
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::task::spawn_blocking;

use crate::bundled;
use crate::client::{Client, Sampling, Style};
use crate::cluster::data_dir::{AUTHORIZATION_FILE, ClusterFile, DataDir};
use crate::cluster::local::{Cluster, Wanted};
use crate::cluster::pki;
use crate::cluster::plan::{DeviceOf, KvCache, Regions, Role, Transport, Weights};
use crate::cluster::relay::rule::Change;
use crate::cluster::voters::Witness;
use crate::exit::{Interrupted, Misuse};
use crate::logging::LogArgs;
use crate::operator::lifetime::Lifetime;

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

    /// Region of the witnesses, voters that make the number of voters odd and at least three; one
    /// without a coordinator if absent. With `none` coordinators alone vote.
    #[arg(long, env = "ENTENTE_WITNESS", value_name = "REGION|none")]
    witness: Option<Witness>,

    /// Leave a process that ends by itself where it is, instead of starting it again.
    #[arg(long, env = "ENTENTE_NO_RESTART")]
    no_restart: bool,

    /// What the network between processes is like, as LINK=EFFECT: fr-se=30ms delays each direction,
    /// fr-se=1mbit, fr-se=cut, 'fr->se=cut', fr-expert-1=slow:20. May be given several times; puts a
    /// relay between all processes, and `entente link` changes it.
    #[arg(long, env = "ENTENTE_LINK", value_name = "LINK=EFFECT", value_delimiter = ',')]
    link: Vec<Change>,

    /// Answer whoever asks, without a key. Only on loopback.
    #[arg(long, env = "ENTENTE_OPEN")]
    open: bool,

    /// How long a process's certificate lives, such as 24h; it is renewed when half of that is over.
    #[arg(long, env = "ENTENTE_CERTIFICATE_LIFE", value_name = "TIME", default_value = "24h")]
    certificate_life: Lifetime,

    /// Compute threads of each process; all cores if absent.
    #[arg(long, env = "ENTENTE_THREADS", value_name = "N")]
    #[arg(value_parser = clap::value_parser!(u16).range(1..=1024))]
    threads: Option<u16>,

    /// Where an expert node or a coordinator computes, as NODE=DEVICE: fr-expert-1=cuda:0. May be given
    /// several times; all others compute on the processor.
    #[arg(long, env = "ENTENTE_DEVICES", value_name = "NODE=DEVICE", value_delimiter = ',')]
    device: Vec<DeviceOf>,

    /// Let rows travel from GPU to GPU by NCCL, unencrypted, where a coordinator and its expert node
    /// both compute on one; without NCCL they travel as ever.
    #[arg(long, env = "ENTENTE_NCCL")]
    nccl: bool,
}

/// Starts the cluster and serves until it is told to stop.
pub fn run(args: UpArgs, logging: &LogArgs) -> anyhow::Result<()> {
    pki::certificate_life(args.certificate_life)?;
    args.regions.check_replicas(args.replicas)?;
    args.check_devices()?;
    if args.transport == Transport::Inproc && !args.link.is_empty() {
        let text = "--link is about the network between processes; with --transport inproc there \
                    is none";
        return Err(Misuse(text.to_owned()).into());
    }
    if args.nccl && args.transport != Transport::Stream {
        return Err(Misuse("--nccl is for --transport stream".to_owned()).into());
    }
    if args.open && !args.http.ip().is_loopback() {
        let text =
            format!("--open is for loopback only: {} can be reached from elsewhere", args.http);
        return Err(Misuse(text).into());
    }
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
    let mut cluster = Cluster::start(args.wanted(model.clone()), data, logging)?;
    let served = tokio::select! {
        result = serve(&mut cluster, args, &model) => result,
        () = signals.next() => Err(Interrupted.into()),
    };
    let was_ready = cluster.was_ready();
    tokio::select! {
        stopped = cluster.stop() => stopped?,
        // Whoever asks twice does not want to wait for running requests.
        () = signals.next() => {}
    }
    match served {
        // To be stopped is how a serving cluster ends; an unanswered --once has failed.
        Err(error) if error.is::<Interrupted>() && was_ready && args.once.is_none() => Ok(()),
        other => other,
    }
}

impl UpArgs {
    fn check_devices(&self) -> anyhow::Result<()> {
        let members = self.regions.members();
        let computes = |role| match role {
            // Those of a coordinator's own process compute where it does.
            Role::ExpertNode => self.transport != Transport::Inproc,
            Role::Coordinator => true,
            Role::Witness => false,
        };
        let is_there =
            |of: &&DeviceOf| members.iter().any(|m| m.name == of.name && computes(m.role));
        match self.device.iter().find(|of| !is_there(of)) {
            Some(DeviceOf { name, .. }) => {
                let text = format!("--device {name}: there is no process {name} that computes");
                Err(Misuse(text).into())
            }
            None => Ok(()),
        }
    }

    fn wanted(&self, model: PathBuf) -> Wanted {
        Wanted {
            model,
            regions: self.regions.clone(),
            witness: self.witness,
            replicas: self.replicas,
            http: self.http,
            weights: self.weights,
            kv_dtype: self.kv_dtype,
            threads: self.threads,
            transport: self.transport,
            restart: !self.no_restart,
            links: self.link.clone(),
            certificate_life: self.certificate_life.0,
            open: self.open,
            devices: self.device.clone(),
            nccl: self.nccl,
        }
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

/// Brings the cluster to where it answers, then watches it. Returns when there is an answer to
/// `--once`, or when it cannot go on.
async fn serve(cluster: &mut Cluster, args: &UpArgs, model: &Path) -> anyhow::Result<()> {
    let file = cluster.ready().await?;
    let style = style_of(model);
    if let Some(prompt) = &args.once {
        let ask = answer(file, style, prompt.clone(), args.max_tokens);
        return cluster.watch_until(ask).await;
    }
    let prompt = if args.model.is_none() { bundled::PROMPT } else { NEUTRAL_PROMPT };
    introduce(&cluster.table(), &file, args, (style, prompt))?;
    let ask = answer(file, style, prompt.to_owned(), DEMO_TOKENS_MAX);
    if let Err(error) = cluster.watch_until(ask).await {
        tracing::warn!("the first prompt was not answered: {error:#}");
    }
    cluster.watch_until(std::future::pending()).await
}

/// What a person wants to see first: what runs, where it is, and how to ask it.
fn introduce(
    table: &str,
    file: &ClusterFile,
    args: &UpArgs,
    (style, prompt): (Style, &str),
) -> anyhow::Result<()> {
    let mut stdout = io::stdout().lock();
    writeln!(stdout, "\n{table}\n")?;
    for (region, url) in &file.endpoints {
        writeln!(stdout, "{region}: {url}")?;
    }
    let (path, field) = match style {
        Style::Chat => ("chat/completions", chat_field(prompt)),
        Style::Completion => ("completions", format!(r#""prompt": "{prompt}""#)),
    };
    // The file has the key's header in it; without a key there is none to show.
    let key = match file.api_key.as_ref().filter(|_| !args.open) {
        Some(_) => format!("-H '@{}' ", args.data_dir.join(AUTHORIZATION_FILE).display()),
        None => String::new(),
    };
    writeln!(
        stdout,
        "\ncurl {}/v1/{path} {key}-H 'content-type: application/json' -d '{{{field}}}'\n",
        file.http
    )?;
    writeln!(stdout, "{prompt}")?;
    Ok(())
}

fn chat_field(prompt: &str) -> String {
    format!(r#""messages": [{{"role": "user", "content": "{prompt}"}}]"#)
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
async fn answer(
    file: ClusterFile,
    style: Style,
    prompt: String,
    max_tokens: u32,
) -> anyhow::Result<()> {
    let ask = move || -> anyhow::Result<()> {
        let sampling = Sampling { max_tokens, temperature: Some(0.0) };
        let mut stdout = io::stdout().lock();
        Client::connect(&file.http, file.api_key.as_ref())?.stream(
            style,
            &prompt,
            sampling,
            |text| {
                stdout.write_all(text.as_bytes())?;
                stdout.flush()
            },
        )?;
        writeln!(stdout)?;
        Ok(())
    };
    spawn_blocking(ask).await.context("asking the cluster failed")?
}
