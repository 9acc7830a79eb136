//! `entente bench engine`: prefill and decode through the engine, as llama-batched-bench counts.
//!
//! The engine runs in this process, without the API around it; with `--transport grpc` its experts
//! are child processes. Tokens are drawn greedily, unless a temperature is given, and the end of
//! sequence is ignored, so that the work is the same for every engine that is asked for the same
//! sizes. Speculation is off unless it is asked for, since its gain is one of the text.
//!
//! - Prefill: one prompt, from handing it over until its first token is there.
//! - Decode: as many sequences as the size says. The clock starts when the youngest has its first
//!   token, so all prompts are computed, and stops when it has `--generate` more. What counts are
//!   the tokens that all sequences got meanwhile: one each in a step, or more with speculation.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, anyhow, bail};
use clap::{Args, ValueEnum};
use comfy_table::Table;
use entente_coordinator::Started;
use entente_coordinator::config::Speculation as EngineSpeculation;
use entente_coordinator::engine::origin::Origin;
use entente_coordinator::engine::output::StopConditions;
use entente_coordinator::engine::sampler::Sampling;
use entente_coordinator::engine::{EngineHandle, Event, Readiness, Request};
use entente_model::config::FfnSpec;
use entente_model::{Checkpoint, expert_bytes};
use indicatif::ProgressBar;
use serde::Serialize;
use tokio::runtime::Runtime;
use tokio::sync::mpsc::Receiver;

use super::cluster::{Nodes, Wanted};
use super::limits::{self, Measured, Probe};
use crate::cluster::columns;
use crate::cluster::plan::{KvCache, NODES_MAX, Transport, Weights};
use crate::logging::LogArgs;
use crate::random::Random;
use crate::stats::median;

/// Pages of the cache that nobody touches cost nothing, so there is room for any size.
const KV_CACHE_MIB: usize = 4_096;
/// Steps that may be over before this thread has heard of the first.
const LATE_STEPS_MAX: usize = 16;
/// How long links to the nodes may take to come up.
const LINKS_DEADLINE: Duration = Duration::from_secs(30);

/// The flags of `entente bench engine`.
#[derive(Debug, Args)]
pub struct EngineArgs {
    /// Checkpoint folder in Hugging Face format, or one that `entente model import` wrote.
    #[arg(long, env = "ENTENTE_MODEL", value_name = "DIR")]
    model: PathBuf,

    /// Weight format.
    #[arg(long, env = "ENTENTE_WEIGHTS", value_enum, default_value = "bf16")]
    weights: Weights,

    /// How keys and values are kept; f32 with f32 weights and bf16 with all others if absent.
    #[arg(long, env = "ENTENTE_KV_DTYPE", value_enum)]
    kv_dtype: Option<KvCache>,

    /// Whether expert nodes are processes of their own or live in this process.
    #[arg(long, env = "ENTENTE_TRANSPORT", value_enum, default_value = "inproc")]
    transport: Transport,

    /// Expert nodes over which the experts are spread.
    #[arg(long, env = "ENTENTE_NODES", value_name = "N", default_value_t = 1)]
    #[arg(value_parser = clap::value_parser!(u16).range(1..=i64::from(NODES_MAX)))]
    nodes: u16,

    /// Microseconds by which every byte to and from an expert node arrives later, as from another
    /// site.
    #[arg(long, env = "ENTENTE_LINK_DELAY_US", value_name = "US", default_value_t = 0)]
    #[arg(value_parser = clap::value_parser!(u32).range(..=1_000_000))]
    link_delay_us: u32,

    /// Rows that each half of a step must have for the step to be cut in two; the configuration's
    /// default if absent.
    #[arg(long, env = "ENTENTE_MICRO_BATCH_ROWS_MIN", value_name = "N")]
    #[arg(value_parser = clap::value_parser!(u16).range(1..))]
    micro_batch_rows_min: Option<u16>,

    /// Tokens of the prompts whose prefill is measured.
    #[arg(long, env = "ENTENTE_PREFILL", value_name = "N,…", value_delimiter = ',')]
    #[arg(default_value = "512", value_parser = clap::value_parser!(u16).range(1..))]
    prefill: Vec<u16>,

    /// Sequences that decode together.
    #[arg(long, env = "ENTENTE_DECODE", value_name = "N,…", value_delimiter = ',')]
    #[arg(default_value = "1,8,32", value_parser = clap::value_parser!(u16).range(1..=1024))]
    decode: Vec<u16>,

    /// Tokens of the prompts of sequences that decode: the context in which they do.
    #[arg(long, env = "ENTENTE_PROMPT", value_name = "N", default_value_t = 64)]
    #[arg(value_parser = clap::value_parser!(u16).range(1..))]
    prompt: u16,

    /// Tokens of each sequence that are timed.
    #[arg(long, env = "ENTENTE_GENERATE", value_name = "N", default_value_t = 64)]
    #[arg(value_parser = clap::value_parser!(u16).range(1..))]
    generate: u16,

    /// Rounds; medians are reported.
    #[arg(long, env = "ENTENTE_ROUNDS", value_name = "N", default_value_t = 5)]
    #[arg(value_parser = clap::value_parser!(u16).range(1..=1000))]
    rounds: u16,

    /// Compute threads of each process; all cores if absent.
    #[arg(long, env = "ENTENTE_THREADS", value_name = "N")]
    #[arg(value_parser = clap::value_parser!(u16).range(1..=1024))]
    threads: Option<u16>,

    /// Whether the engine guesses tokens from earlier text.
    #[arg(long, env = "ENTENTE_SPECULATION", value_enum, default_value = "off")]
    speculation: Speculation,

    /// How tokens are drawn. With 0, the likeliest, a random model of few tokens (`entente model
    /// synth --vocab 512`) soon repeats itself, with 1 it never does.
    #[arg(long, env = "ENTENTE_TEMPERATURE", value_name = "T", default_value_t = 0.0)]
    temperature: f32,

    /// Names the prompts' random tokens.
    #[arg(long, env = "ENTENTE_SEED", value_name = "N", default_value_t = 1)]
    seed: u64,
}

/// Whether the engine guesses tokens.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum, Serialize)]
#[serde(rename_all = "lowercase")]
enum Speculation {
    /// Where it expects to gain.
    Auto,
    /// Never.
    Off,
}

impl From<Speculation> for EngineSpeculation {
    fn from(speculation: Speculation) -> Self {
        match speculation {
            Speculation::Auto => Self::Auto,
            Speculation::Off => Self::Off,
        }
    }
}

/// Tokens a second by size: tokens of a prompt, or sequences.
type BySize = BTreeMap<usize, f64>;

/// One round as it was measured.
#[derive(Debug, Serialize)]
struct Round {
    prefill_tok_s: BySize,
    decode_tok_s: BySize,
    #[serde(flatten)]
    limits: Measured,
}

/// What was found; medians over the rounds.
#[derive(Debug, Serialize)]
pub struct Found {
    model: PathBuf,
    kernel_class: String,
    kv_dtype: &'static str,
    transport: &'static str,
    nodes: u16,
    link_delay_us: u32,
    threads: usize,
    speculation: Speculation,
    temperature: f32,
    prefill_tok_s: BySize,
    decode_tok_s: BySize,
    /// Tokens that were guessed and computed, in all rounds.
    draft_tokens: u64,
    /// How many of them were right.
    accepted_tokens: u64,
    #[serde(flatten)]
    limits: Measured,
    /// Bytes of weights that one token alone must read.
    active_bytes_per_token: u64,
    /// Operations that one token of a prompt takes in the layers, attention's scores left out.
    active_operations_per_token: u64,
    rounds: Vec<Round>,
}

/// Measures.
pub fn run(args: &EngineArgs, logging: &LogArgs) -> anyhow::Result<Found> {
    let runtime = Runtime::new().context("cannot start the runtime")?;
    let wanted = Wanted {
        model: args.model.clone(),
        weights: args.weights,
        threads: args.threads,
        transport: args.transport,
        nodes: args.nodes,
        link_delay: Duration::from_micros(args.link_delay_us.into()),
    };
    let nodes = runtime.block_on(Nodes::start(wanted, logging))?;
    let found = measure(args, &nodes, &runtime);
    runtime.block_on(nodes.stop());
    found
}

fn measure(args: &EngineArgs, nodes: &Nodes, runtime: &Runtime) -> anyhow::Result<Found> {
    let mut config = nodes.coordinator.clone();
    config.engine.kv_cache_mib = Some(KV_CACHE_MIB);
    if let Some(rows_min) = args.micro_batch_rows_min {
        config.engine.micro_batch_rows_min = rows_min.into();
    }
    config.engine.speculation = args.speculation.into();
    config.engine.kv_dtype = args.kv_dtype.map(Into::into);
    let sequences_max = args.decode.iter().copied().max().unwrap_or(1);
    config.engine.running_max = config.engine.running_max.max(sequences_max.into());
    config.engine.waiting_max = config.engine.waiting_max.max(sequences_max.into());
    config.engine.tenant_waiting_max = config.engine.waiting_max;
    let started = runtime.block_on(async {
        let started = entente_coordinator::start(&config, |_, _| {}).await?;
        links_up(&started.api.engine).await?;
        anyhow::Ok(started)
    })?;
    let threads = limits::threads(args.threads);
    let probe = Probe::new(args.weights.into(), threads);
    let mut session = Session {
        args,
        engine: &started.api.engine,
        origin: Arc::new(Origin::anonymous(started.api.home)),
        // A step gives a sequence so many tokens at most.
        step_tokens_max: match args.speculation {
            Speculation::Auto => 1 + config.engine.draft_tokens_max,
            Speculation::Off => 1,
        },
        vocab: started.api.vocab,
        random: Random::new(args.seed),
    };
    let steps = usize::from(args.rounds) * (args.prefill.len() + args.decode.len());
    let bar = ProgressBar::new(steps as u64);
    let mut rounds = Vec::new();
    for _ in 0..args.rounds {
        rounds.push(session.round(&probe, &bar)?);
    }
    bar.finish_and_clear();
    found(args, threads, &started, rounds)
}

/// Waits until every expert can be reached.
pub async fn links_up(engine: &EngineHandle) -> anyhow::Result<()> {
    let mut readiness = engine.readiness();
    let up = readiness.wait_for(|now| *now == Readiness::Ready);
    match tokio::time::timeout(LINKS_DEADLINE, up).await {
        Ok(Ok(_)) => Ok(()),
        Ok(Err(_)) => bail!("the engine ended"),
        Err(_) => bail!("the expert nodes could not be reached within {LINKS_DEADLINE:?}"),
    }
}

/// An engine that is asked for one thing after the other.
struct Session<'a> {
    args: &'a EngineArgs,
    engine: &'a EngineHandle,
    origin: Arc<Origin>,
    step_tokens_max: usize,
    vocab: usize,
    random: Random,
}

impl Session<'_> {
    fn round(&mut self, probe: &Probe, bar: &ProgressBar) -> anyhow::Result<Round> {
        let limits = probe.measure();
        let (mut prefill_tok_s, mut decode_tok_s) = (BySize::new(), BySize::new());
        for size in self.args.prefill.iter().map(|size| usize::from(*size)) {
            prefill_tok_s.insert(size, self.prefill(size)?);
            bar.inc(1);
        }
        for size in self.args.decode.iter().map(|size| usize::from(*size)) {
            decode_tok_s.insert(size, self.decode(size)?);
            bar.inc(1);
        }
        Ok(Round { prefill_tok_s, decode_tok_s, limits })
    }

    fn prefill(&mut self, tokens: usize) -> anyhow::Result<f64> {
        self.settle()?;
        let prompt = self.random.tokens(tokens, self.vocab);
        let start = Instant::now();
        let mut events = self.submit(prompt, 1)?;
        next_token(&mut events)?;
        Ok(tokens as f64 / start.elapsed().as_secs_f64())
    }

    fn decode(&mut self, sequences: usize) -> anyhow::Result<f64> {
        self.settle()?;
        let tokens = usize::from(self.args.generate);
        // Others may be ahead by as many steps as all take together; they must still be there when
        // the youngest is done. So may all be when this thread is woken late.
        let tokens_max = 1 + (tokens + sequences + LATE_STEPS_MAX) * self.step_tokens_max;
        let mut all = Vec::new();
        for _ in 0..sequences {
            let prompt = self.random.tokens(self.args.prompt.into(), self.vocab);
            all.push(self.submit(prompt, tokens_max)?);
        }
        next_token(all.last_mut().context("at least one sequence")?)?;
        let start = Instant::now();
        received(&mut all)?;
        let mut count = 0;
        for _ in 0..tokens {
            next_token(all.last_mut().context("at least one sequence")?)?;
            count += 1;
        }
        let seconds = start.elapsed().as_secs_f64();
        count += received(&mut all)?;
        Ok(count as f64 / seconds)
    }

    /// Runs one token through, so that nothing of an earlier measurement is still going on.
    fn settle(&mut self) -> anyhow::Result<()> {
        let prompt = self.random.tokens(1, self.vocab);
        next_token(&mut self.submit(prompt, 1)?)
    }

    fn submit(&self, prompt: Vec<u32>, tokens_max: usize) -> anyhow::Result<Receiver<Event>> {
        let temperature = self.args.temperature;
        let request = Request {
            origin: self.origin.clone(),
            prompt,
            sampling: Sampling { temperature, top_p: 1.0, top_k: 0, min_p: 0.0, seed: 0 },
            // No token ends it.
            stop: StopConditions { max_tokens: tokens_max, ..StopConditions::default() },
            logprobs: None,
            prompt_logprobs: None,
        };
        Ok(self.engine.submit(request)?)
    }
}

/// Tokens that have arrived and were not counted yet.
fn received(all: &mut [Receiver<Event>]) -> anyhow::Result<usize> {
    let mut count = 0;
    for events in all {
        while let Ok(event) = events.try_recv() {
            match event {
                Event::Token { .. } => count += 1,
                other => bail!("expected a token, got {other:?}"),
            }
        }
    }
    Ok(count)
}

fn next_token(events: &mut Receiver<Event>) -> anyhow::Result<()> {
    match events.blocking_recv() {
        Some(Event::Token { .. }) => Ok(()),
        Some(Event::Failed(error)) => Err(error.into()),
        other => Err(anyhow!("expected a token, got {other:?}")),
    }
}

fn found(
    args: &EngineArgs,
    threads: usize,
    started: &Started,
    rounds: Vec<Round>,
) -> anyhow::Result<Found> {
    let checkpoint = Checkpoint::open(&args.model)?;
    let of_rounds = |of: &dyn Fn(&Round) -> f64| median(&rounds.iter().map(of).collect::<Vec<_>>());
    let by_size = |sizes: &[u16], of: &dyn Fn(&Round) -> &BySize| -> BySize {
        let sizes = sizes.iter().map(|size| usize::from(*size));
        sizes.map(|size| (size, of_rounds(&|round| of(round)[&size]))).collect()
    };
    let experts_bytes = expert_bytes(&checkpoint, args.weights.into())?;
    let active_experts: u64 = active_experts(&checkpoint).sum();
    Ok(Found {
        model: args.model.clone(),
        kernel_class: started.kernel_class.to_string(),
        kv_dtype: started.kv_dtype.name(),
        transport: args.transport.name(),
        nodes: args.nodes,
        link_delay_us: args.link_delay_us,
        threads,
        speculation: args.speculation,
        temperature: args.temperature,
        prefill_tok_s: by_size(&args.prefill, &|round| &round.prefill_tok_s),
        decode_tok_s: by_size(&args.decode, &|round| &round.decode_tok_s),
        draft_tokens: started.api.metrics.draft_tokens.get(),
        accepted_tokens: started.api.metrics.accepted_tokens.get(),
        limits: Measured {
            read_bandwidth_gb_s: of_rounds(&|round| round.limits.read_bandwidth_gb_s),
            multiply_peak_gflop_s: of_rounds(&|round| round.limits.multiply_peak_gflop_s),
        },
        active_bytes_per_token: started.step_weights_bytes + active_experts * experts_bytes,
        active_operations_per_token: operations_per_token(&checkpoint),
        rounds,
    })
}

/// For each MoE layer, the experts that one row goes through.
fn active_experts(checkpoint: &Checkpoint) -> impl Iterator<Item = u64> {
    checkpoint.architecture().layers.iter().map(|layer| match layer.ffn {
        FfnSpec::Dense { .. } => 0,
        FfnSpec::Moe { top_k, .. } => top_k as u64,
    })
}

fn operations_per_token(checkpoint: &Checkpoint) -> u64 {
    let arch = checkpoint.architecture();
    let attention = 2 * (arch.heads + arch.kv_heads) * arch.head_dim * arch.hidden;
    let ffn = |ffn: &FfnSpec| match *ffn {
        FfnSpec::Dense { inner } => 3 * arch.hidden * inner,
        FfnSpec::Moe { experts, top_k, inner, .. } => {
            3 * arch.hidden * inner * top_k + experts * arch.hidden
        }
    };
    let weights: usize = arch.layers.iter().map(|layer| attention + ffn(&layer.ffn)).sum();
    2 * weights as u64
}

impl super::Report for Found {
    fn table(&self) -> Table {
        let mut table = columns(["PHASE", "SIZE", "TOK/S", "OF LIMIT"]);
        let peak = self.limits.multiply_peak_gflop_s * 1e9;
        for (size, speed) in &self.prefill_tok_s {
            let share = speed * self.active_operations_per_token as f64 / peak;
            table.add_row(row("prefill", *size, *speed, Some(share)));
        }
        let read = self.limits.read_bandwidth_gb_s * 1e9;
        for (size, speed) in &self.decode_tok_s {
            // What several sequences share depends on the experts that they choose.
            let share = (*size == 1).then(|| speed * self.active_bytes_per_token as f64 / read);
            table.add_row(row("decode", *size, *speed, share));
        }
        table
    }

    fn notes(&self) -> Vec<String> {
        let Measured { read_bandwidth_gb_s, multiply_peak_gflop_s } = self.limits;
        let mut notes = vec![
            format!(
                "{} with {} keys and values of {} on {} threads, {} over {} nodes; medians of {} \
                 rounds",
                self.kernel_class,
                self.kv_dtype,
                self.model.display(),
                self.threads,
                self.transport,
                self.nodes,
                self.rounds.len()
            ),
            format!(
                "limits: {read_bandwidth_gb_s:.1} GB/s read, {multiply_peak_gflop_s:.0} GFLOP/s; \
                 a token reads {:.1} MB",
                self.active_bytes_per_token as f64 / 1e6
            ),
        ];
        if self.speculation == Speculation::Auto {
            let Self { draft_tokens, accepted_tokens, .. } = self;
            notes.push(format!("{draft_tokens} tokens guessed, {accepted_tokens} of them right"));
        }
        notes
    }
}

fn row(phase: &str, size: usize, speed: f64, share: Option<f64>) -> [String; 4] {
    let share = share.map_or("-".to_owned(), |share| format!("{:.0} %", share * 100.0));
    [phase.to_owned(), size.to_string(), format!("{speed:.1}"), share]
}
