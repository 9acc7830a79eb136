//! `entente bench quality`: how far a weight format moves a model's predictions.
//!
//! The same random prompts are scored with bf16 weights and with another format, one engine after
//! the other in this process. For each position the two distributions over the whole vocabulary
//! are compared: their Kullback–Leibler divergence, `sum p_bf16 * (ln p_bf16 - ln p)` in nats
//! (Kullback and Leibler 1951), and whether the likeliest token is the same.
//!
//! What it does not know: whether the text makes sense. `entente eval` marks answers.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, bail};
use clap::Args;
use comfy_table::Table;
use entente_coordinator::api::Api;
use entente_coordinator::engine::origin::Origin;
use entente_coordinator::engine::output::StopConditions;
use entente_coordinator::engine::sampler::{Sampling, TokenLogprob};
use entente_coordinator::engine::{Event, Request};
use serde::Serialize;
use tokio::runtime::Runtime;

use super::cluster::{Nodes, Wanted};
use super::engine::links_up;
use crate::cluster::columns;
use crate::cluster::plan::{Transport, Weights};
use crate::logging::LogArgs;
use crate::random::Random;
use crate::stats::quantile;

/// The flags of `entente bench quality`.
#[derive(Debug, Args)]
pub struct QualityArgs {
    /// Checkpoint folder in Hugging Face format; not a packed one, since it is read in two formats.
    #[arg(long, env = "ENTENTE_MODEL", value_name = "DIR")]
    model: PathBuf,

    /// Weight formats that are compared with bf16.
    #[arg(long, env = "ENTENTE_WEIGHTS", value_enum, value_delimiter = ',')]
    #[arg(default_value = "q8,fp8,q4")]
    weights: Vec<Weights>,

    /// Prompts.
    #[arg(long, env = "ENTENTE_PROMPTS", value_name = "N", default_value_t = 8)]
    #[arg(value_parser = clap::value_parser!(u16).range(1..=1024))]
    prompts: u16,

    /// Tokens of each prompt; all but the first are predicted.
    #[arg(long, env = "ENTENTE_PROMPT", value_name = "N", default_value_t = 64)]
    #[arg(value_parser = clap::value_parser!(u16).range(2..=4096))]
    prompt: u16,

    /// Names the prompts' random tokens.
    #[arg(long, env = "ENTENTE_SEED", value_name = "N", default_value_t = 1)]
    seed: u64,
}

/// One format beside bf16.
#[derive(Debug, Serialize)]
struct Row {
    kernel_class: String,
    kl_mean_nats: f64,
    kl_p99_nats: f64,
    /// Share of positions with the same likeliest token.
    same_top_token: f64,
}

/// What was found.
#[derive(Debug, Serialize)]
pub struct Found {
    model: PathBuf,
    positions: usize,
    formats: Vec<Row>,
}

/// One format's predictions: log-probabilities by token id for each position.
struct Scores {
    kernel_class: String,
    positions: Vec<Vec<f32>>,
}

/// Measures.
pub fn run(args: &QualityArgs, logging: &LogArgs) -> anyhow::Result<Found> {
    let runtime = Runtime::new().context("cannot start the runtime")?;
    let reference = scores(args, Weights::Bf16, &runtime, logging)?;
    let mut formats = Vec::new();
    for weights in &args.weights {
        formats.push(compare(&reference, &scores(args, *weights, &runtime, logging)?));
    }
    Ok(Found { model: args.model.clone(), positions: reference.positions.len(), formats })
}

/// Loads the model in one format and scores all prompts.
fn scores(
    args: &QualityArgs,
    weights: Weights,
    runtime: &Runtime,
    logging: &LogArgs,
) -> anyhow::Result<Scores> {
    let wanted = Wanted {
        model: args.model.clone(),
        weights,
        threads: None,
        transport: Transport::Inproc,
        nodes: 1,
        link_delay: Duration::ZERO,
    };
    let (nodes, started) = runtime.block_on(async {
        let nodes = Nodes::start(wanted, logging).await?;
        let started = entente_coordinator::start(&nodes.coordinator, |_, _| {}).await?;
        links_up(&started.api.engine).await?;
        anyhow::Ok((nodes, started))
    })?;
    let mut random = Random::new(args.seed);
    let mut positions = Vec::new();
    for _ in 0..args.prompts {
        let prompt = random.tokens(args.prompt.into(), started.api.vocab);
        positions.extend(score(&started.api, prompt)?);
    }
    runtime.block_on(nodes.stop());
    Ok(Scores { kernel_class: started.kernel_class.to_string(), positions })
}

/// Log-probabilities of all tokens at each position of a prompt but the first.
fn score(api: &Api, prompt: Vec<u32>) -> anyhow::Result<Vec<Vec<f32>>> {
    let vocab = api.vocab;
    let request = Request {
        origin: Arc::new(Origin::anonymous(api.home)),
        prompt,
        sampling: Sampling { temperature: 0.0, top_p: 1.0, top_k: 0, min_p: 0.0, seed: 0 },
        stop: StopConditions::default(),
        logprobs: None,
        prompt_logprobs: Some(vocab),
    };
    let mut events = api.engine.submit(request)?;
    let scored = match events.blocking_recv() {
        Some(Event::Prompt(scored)) => scored,
        Some(Event::Failed(error)) => return Err(error.into()),
        other => bail!("expected the prompt's scores, got {other:?}"),
    };
    let by_id = |top: Vec<TokenLogprob>| {
        let mut logprobs = vec![f32::NEG_INFINITY; vocab];
        for entry in top {
            logprobs[entry.id as usize] = entry.logprob;
        }
        logprobs
    };
    Ok(scored.into_iter().flatten().map(|token| by_id(token.top)).collect())
}

fn compare(reference: &Scores, other: &Scores) -> Row {
    let pairs = || reference.positions.iter().zip(&other.positions);
    let divergences: Vec<f64> = pairs().map(|(p, q)| divergence(p, q)).collect();
    let same = pairs().filter(|(p, q)| likeliest(p) == likeliest(q)).count();
    let count = divergences.len() as f64;
    Row {
        kernel_class: other.kernel_class.clone(),
        kl_mean_nats: divergences.iter().sum::<f64>() / count,
        kl_p99_nats: quantile(&divergences, 0.99),
        same_top_token: same as f64 / count,
    }
}

/// `sum p * (ln p - ln q)` of two rows of log-probabilities.
fn divergence(p: &[f32], q: &[f32]) -> f64 {
    let term = |(p, q): (&f32, &f32)| f64::from(*p).exp() * (f64::from(*p) - f64::from(*q));
    p.iter().zip(q).map(term).sum()
}

fn likeliest(logprobs: &[f32]) -> Option<usize> {
    (0..logprobs.len()).max_by(|a, b| logprobs[*a].total_cmp(&logprobs[*b]))
}

impl super::Report for Found {
    fn table(&self) -> Table {
        let mut table = columns(["KERNELS", "KL MEAN", "KL P99", "SAME TOP TOKEN"]);
        for row in &self.formats {
            table.add_row([
                row.kernel_class.clone(),
                format!("{:.6}", row.kl_mean_nats),
                format!("{:.6}", row.kl_p99_nats),
                format!("{:.1} %", row.same_top_token * 100.0),
            ]);
        }
        table
    }

    fn notes(&self) -> Vec<String> {
        let (positions, model) = (self.positions, self.model.display());
        vec![format!("{positions} positions of {model}; divergence from bf16 in nats")]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_divergence_is_that_of_the_formula_and_none_from_itself() {
        let (p, q) = ([0.25_f32, 0.75].map(f32::ln), [0.5_f32, 0.5].map(f32::ln));
        let expected = 0.25 * (0.25_f64 / 0.5).ln() + 0.75 * (0.75_f64 / 0.5).ln();
        assert!((divergence(&p, &q) - expected).abs() < 1e-6);
        assert_eq!(divergence(&p, &p), 0.0);
    }
}
