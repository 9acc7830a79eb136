//! `entente bench serve`: open-loop load on a running cluster, as its users would make it.
//!
//! Requests arrive when a Poisson process says so, whether or not earlier ones were answered: a
//! server that falls behind shows it in its times, which a closed loop would hide. Each request has
//! a thread of its own and reads its stream through the public API.

use std::thread;
use std::time::{Duration, Instant};

use anyhow::bail;
use clap::Args;
use comfy_table::Table;
use serde::Serialize;
use serde_json::{Value, json};

use super::random::Random;
use super::stats::Percentiles;
use crate::client::Client;
use crate::cluster::{Endpoint, columns};
use crate::exit::Misuse;

/// Prompts use the ids below this, which every byte-level vocabulary has.
const VOCAB: usize = 256;

/// The flags of `entente bench serve`.
#[derive(Debug, Args)]
pub struct ServeArgs {
    #[command(flatten)]
    endpoint: Endpoint,

    /// Requests that arrive in a second, on average.
    #[arg(long, env = "ENTENTE_RATE", value_name = "R", default_value_t = 1.0)]
    rate: f64,

    /// Requests in all.
    #[arg(long, env = "ENTENTE_REQUESTS", value_name = "N", default_value_t = 200)]
    #[arg(value_parser = clap::value_parser!(u16).range(1..=10_000))]
    requests: u16,

    /// Lengths of prompts, of which each request takes one by chance.
    #[arg(long, env = "ENTENTE_PROMPT_TOKENS", value_name = "N,…", value_delimiter = ',')]
    #[arg(default_value = "64,512", value_parser = clap::value_parser!(u16).range(1..))]
    prompt_tokens: Vec<u16>,

    /// Lengths of answers, likewise.
    #[arg(long, env = "ENTENTE_OUTPUT_TOKENS", value_name = "N,…", value_delimiter = ',')]
    #[arg(default_value = "16,128", value_parser = clap::value_parser!(u16).range(1..))]
    output_tokens: Vec<u16>,

    /// Names the arrival times, lengths and prompts.
    #[arg(long, env = "ENTENTE_SEED", value_name = "N", default_value_t = 1)]
    seed: u64,
}

/// One request before it is sent.
struct Planned {
    at: Duration,
    body: Value,
}

/// What became of a request.
#[derive(Debug, Default)]
struct Outcome {
    /// From its arrival until its first token, in ms.
    ttft_ms: Option<f64>,
    /// Between pieces of the answer, in ms.
    gaps_ms: Vec<f64>,
    tokens: usize,
    error: Option<String>,
}

/// What was found.
#[derive(Debug, Serialize)]
pub struct Found {
    rate: f64,
    requests: usize,
    errors: usize,
    first_error: Option<String>,
    seconds: f64,
    requests_s: f64,
    output_tok_s: f64,
    /// From arrival to first token.
    ttft_ms: Percentiles,
    /// Between pieces of one answer: a token each, or what became text at once.
    itl_ms: Percentiles,
    itl_max_ms: f64,
}

/// Sends everything and waits for the last answer.
pub fn run(args: &ServeArgs) -> anyhow::Result<Found> {
    if !(args.rate.is_finite() && args.rate > 0.0) {
        bail!(Misuse(format!("--rate {} is no number of requests a second", args.rate)));
    }
    let client = Client::connect(&args.endpoint.url()?)?;
    let planned = plan(args, client.model());
    let start = Instant::now();
    let outcomes: Vec<Outcome> = thread::scope(|scope| {
        let mut asked = Vec::with_capacity(planned.len());
        for request in &planned {
            thread::sleep(request.at.saturating_sub(start.elapsed()));
            let (client, due) = (&client, start + request.at);
            asked.push(scope.spawn(move || ask(client, &request.body, due)));
        }
        asked.into_iter().map(|asked| asked.join().expect("asking does not panic")).collect()
    });
    Ok(found(args.rate, start.elapsed().as_secs_f64(), &outcomes))
}

fn plan(args: &ServeArgs, model: &str) -> Vec<Planned> {
    let mut random = Random::new(args.seed);
    let mut at_s = 0.0;
    let mut request = || {
        at_s += random.gap_s(args.rate);
        let prompt = args.prompt_tokens[random.below(args.prompt_tokens.len())];
        let output = args.output_tokens[random.below(args.output_tokens.len())];
        let body = json!({
            "model": model,
            "prompt": random.tokens(prompt.into(), VOCAB),
            "max_tokens": output,
            "temperature": 0.0,
            "ignore_eos": true,
            "stream": true,
            "return_token_ids": true,
        });
        Planned { at: Duration::from_secs_f64(at_s), body }
    };
    (0..args.requests).map(|_| request()).collect()
}

fn ask(client: &Client, body: &Value, due: Instant) -> Outcome {
    let mut outcome = Outcome::default();
    let mut last: Option<Instant> = None;
    let answered = client.stream_chunks("completions", body, |chunk| {
        let tokens = chunk["choices"][0]["token_ids"].as_array().map_or(0, Vec::len);
        if tokens == 0 {
            return Ok(());
        }
        let now = Instant::now();
        let ms = |since: Instant| now.duration_since(since).as_secs_f64() * 1e3;
        match last.replace(now) {
            None => outcome.ttft_ms = Some(ms(due)),
            Some(last) => outcome.gaps_ms.push(ms(last)),
        }
        outcome.tokens += tokens;
        Ok(())
    });
    outcome.error = answered.err().map(|error| format!("{error:#}"));
    outcome
}

fn found(rate: f64, seconds: f64, outcomes: &[Outcome]) -> Found {
    let answered = outcomes.iter().filter(|outcome| outcome.error.is_none());
    let ttft_ms: Vec<f64> = answered.clone().filter_map(|outcome| outcome.ttft_ms).collect();
    let gaps_ms: Vec<f64> =
        answered.clone().flat_map(|outcome| outcome.gaps_ms.iter().copied()).collect();
    let tokens: usize = outcomes.iter().map(|outcome| outcome.tokens).sum();
    let answered = answered.count();
    Found {
        rate,
        requests: outcomes.len(),
        errors: outcomes.len() - answered,
        first_error: outcomes.iter().find_map(|outcome| outcome.error.clone()),
        seconds,
        requests_s: answered as f64 / seconds,
        output_tok_s: tokens as f64 / seconds,
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
        let mut notes = vec![format!(
            "{} requests at {} a second in {:.1} s: {:.2} requests/s, {:.1} tok/s, {} errors; \
             longest gap {:.1} ms",
            self.requests,
            self.rate,
            self.seconds,
            self.requests_s,
            self.output_tok_s,
            self.errors,
            self.itl_max_ms
        )];
        notes.extend(self.first_error.iter().map(|error| format!("first error: {error}")));
        notes
    }
}
