//! `entente bench serve`: load on a running cluster, as its users would make it.
//!
//! First a closed loop finds the capacity: so many requests are kept running for a while, each
//! thread sending its next as soon as its last is answered. Then an open loop sends requests at a
//! share of that, when a Poisson process says so, whether or not earlier ones were answered: a
//! server that falls behind shows it in its times, which a closed loop would hide. With `--rate`
//! the rate is given and the first part left out.
//!
//! A request's clock starts when it was due, so what this process may be late counts too.

use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use anyhow::bail;
use clap::Args;
use comfy_table::Table;
use serde::Serialize;

use crate::client::Client;
use crate::cluster::{Endpoint, columns};
use crate::exit::Misuse;
use crate::load::{self, Lengths, Mix, Outcome, Prompts, Sender};
use crate::stats::Percentiles;

/// Requests of the open loop that run at once; each has a thread.
const RUNNING_MAX: usize = 10_000;

/// The flags of `entente bench serve`.
#[derive(Debug, Args)]
pub struct ServeArgs {
    #[command(flatten)]
    endpoint: Endpoint,

    /// Share of the capacity at which requests arrive; the capacity is measured first.
    #[arg(long, env = "ENTENTE_LOAD", value_name = "SHARE", default_value_t = 0.8)]
    load: f64,

    /// Requests that arrive in a second, on average, instead of a share of the capacity.
    #[arg(long, env = "ENTENTE_RATE", value_name = "R", conflicts_with = "load")]
    rate: Option<f64>,

    /// Requests in all, once the capacity is known.
    #[arg(long, env = "ENTENTE_REQUESTS", value_name = "N", default_value_t = 200)]
    #[arg(value_parser = clap::value_parser!(u16).range(1..=10_000))]
    requests: u16,

    /// Requests that run at once while the capacity is measured.
    #[arg(long, env = "ENTENTE_CONCURRENCY", value_name = "N", default_value_t = 32)]
    #[arg(value_parser = clap::value_parser!(u16).range(1..=1_024))]
    concurrency: u16,

    /// How long the capacity is measured, a third of it to warm up.
    #[arg(long, env = "ENTENTE_CAPACITY_SECONDS", value_name = "S", default_value_t = 30)]
    #[arg(value_parser = clap::value_parser!(u16).range(1..=3_600))]
    capacity_seconds: u16,

    /// Lengths of prompts, from shortest to longest, drawn log-uniformly.
    #[arg(long, env = "ENTENTE_PROMPT_TOKENS", value_name = "MIN-MAX", default_value = "32-512")]
    prompt_tokens: Lengths,

    /// Lengths of answers, likewise.
    #[arg(long, env = "ENTENTE_OUTPUT_TOKENS", value_name = "MIN-MAX", default_value = "16-128")]
    output_tokens: Lengths,

    /// Names the arrival times, lengths and prompts.
    #[arg(long, env = "ENTENTE_SEED", value_name = "N", default_value_t = 1)]
    seed: u64,
}

/// What was found.
#[derive(Debug, Serialize)]
pub struct Found {
    /// Requests a second that a closed loop got answered; absent with `--rate`.
    capacity_requests_s: Option<f64>,
    /// Requests a second that arrived on average.
    rate: f64,
    requests: usize,
    errors: usize,
    first_error: Option<String>,
    seconds: f64,
    requests_s: f64,
    prompt_tok_s: f64,
    output_tok_s: f64,
    /// From arrival to first token.
    ttft_ms: Percentiles,
    /// Between pieces of one answer: a token each, or what came at once.
    itl_ms: Percentiles,
    itl_max_ms: f64,
}

/// Measures the capacity unless the rate is given, then sends everything and waits for the end.
pub fn run(args: &ServeArgs) -> anyhow::Result<Found> {
    let client = args.endpoint.connect()?;
    let prompts = Prompts::Tokens(args.prompt_tokens);
    let mix = |seed| Mix::new(seed, client.model(), prompts, args.output_tokens);
    let capacity = match args.rate {
        Some(_) => None,
        // Other prompts than the open loop's, which would be in the prefix cache then.
        None => Some(capacity(args, &client, mix(!args.seed))?),
    };
    let rate = args.rate.or(capacity.map(|capacity| capacity * args.load)).unwrap_or_default();
    if !(rate.is_finite() && rate > 0.0) {
        bail!(Misuse(format!("{rate} requests a second is no rate; see --rate and --load")));
    }
    let start = Instant::now();
    let arrivals = load::arrivals(args.seed, rate, mix(args.seed).take(args.requests.into()));
    let sender = Sender { servers: std::slice::from_ref(&client), on_piece: &|_| true };
    let outcomes = sender.open_loop(arrivals, RUNNING_MAX);
    Ok(found(capacity, rate, start.elapsed().as_secs_f64(), &outcomes))
}

/// Requests a second that are answered when there are always enough of them. Each counts by the
/// share of its tokens that arrived after the warm-up, in which all begin at once, and before the
/// end, which cuts some off.
fn capacity(args: &ServeArgs, client: &Client, mix: Mix) -> anyhow::Result<f64> {
    let long = Duration::from_secs(args.capacity_seconds.into());
    let begin = Instant::now() + long / 3;
    let stop = begin + long - long / 3;
    let mix = Mutex::new(mix);
    let next = || {
        let more = Instant::now() < stop;
        more.then(|| mix.lock().unwrap_or_else(PoisonError::into_inner).next()).flatten()
    };
    let servers = std::slice::from_ref(client);
    let sender = Sender { servers, on_piece: &|_| Instant::now() < stop };
    let outcomes = sender.closed_loop(args.concurrency.into(), next);
    let answered: f64 = outcomes.iter().map(|outcome| outcome.share_after(begin)).sum();
    match outcomes.iter().find_map(|outcome| outcome.error.as_ref()) {
        Some(error) if answered == 0.0 => bail!("no request was answered: {error}"),
        _ => Ok(answered / (long - long / 3).as_secs_f64()),
    }
}

fn found(capacity: Option<f64>, rate: f64, seconds: f64, outcomes: &[Outcome]) -> Found {
    let answered: Vec<&Outcome> = outcomes.iter().filter(|o| o.error.is_none()).collect();
    let ttft_ms: Vec<f64> = answered.iter().filter_map(|outcome| outcome.ttft_ms()).collect();
    let gaps_ms: Vec<f64> = answered.iter().flat_map(|outcome| outcome.gaps_ms()).collect();
    let per_s = |of: &dyn Fn(&Outcome) -> usize| {
        answered.iter().map(|outcome| of(outcome)).sum::<usize>() as f64 / seconds
    };
    Found {
        capacity_requests_s: capacity,
        rate,
        requests: outcomes.len(),
        errors: outcomes.len() - answered.len(),
        first_error: outcomes.iter().find_map(|outcome| outcome.error.clone()),
        seconds,
        requests_s: answered.len() as f64 / seconds,
        prompt_tok_s: per_s(&|outcome| outcome.prompt_len),
        output_tok_s: per_s(&Outcome::tokens),
        ttft_ms: Percentiles::of(&ttft_ms),
        itl_ms: Percentiles::of(&gaps_ms),
        itl_max_ms: gaps_ms.iter().copied().fold(0.0, f64::max),
    }
}

impl super::Report for Found {
    fn table(&self) -> Table {
        let mut table = columns(["MS", "P50", "P90", "P99"]);
        for (name, percentiles) in [("ttft", &self.ttft_ms), ("itl", &self.itl_ms)] {
            let [p50, p90, p99] = percentiles.cells();
            table.add_row([name.to_owned(), p50, p90, p99]);
        }
        table
    }

    fn notes(&self) -> Vec<String> {
        let mut notes = Vec::new();
        notes.extend(self.capacity_requests_s.map(|capacity| {
            let share = self.rate / capacity * 100.0;
            format!("capacity {capacity:.2} requests/s, load {share:.0} %")
        }));
        notes.push(format!(
            "{} requests at {:.2} a second in {:.1} s: {:.2} requests/s, {:.1} tok/s of prompts, \
             {:.1} tok/s of answers, {} errors; longest gap {:.1} ms",
            self.requests,
            self.rate,
            self.seconds,
            self.requests_s,
            self.prompt_tok_s,
            self.output_tok_s,
            self.errors,
            self.itl_max_ms
        ));
        notes.extend(self.first_error.iter().map(|error| format!("first error: {error}")));
        notes
    }
}
