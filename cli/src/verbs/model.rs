//! `entente model`: work with checkpoint folders, without a cluster.

use std::path::PathBuf;

use clap::{Args, Subcommand, ValueEnum};
use entente_model::synth::{self, Shape, SynthError};
use indicatif::ProgressBar;

use crate::exit::Misuse;

/// The verbs of `entente model`.
#[derive(Debug, Args)]
pub struct ModelArgs {
    #[command(subcommand)]
    verb: ModelVerb,
}

#[derive(Debug, Subcommand)]
enum ModelVerb {
    /// Write a checkpoint of any shape with random weights, for measuring.
    Synth(SynthArgs),
}

/// Shapes that have a name.
#[derive(Debug, Clone, Copy, ValueEnum)]
enum Named {
    /// 0.5 M parameters, for tests.
    Tiny,
    /// 0.79 B parameters.
    Mid,
    /// 3.0 B parameters.
    Large,
}

/// The flags of `entente model synth`.
#[derive(Debug, Args)]
struct SynthArgs {
    /// Folder to write; files in it are replaced.
    out: PathBuf,

    /// The shape to start from; the flags below change single numbers of it.
    #[arg(long, env = "ENTENTE_SHAPE", value_enum, default_value = "tiny")]
    shape: Named,

    /// Values of a row.
    #[arg(long, env = "ENTENTE_HIDDEN", value_name = "N")]
    hidden: Option<usize>,

    /// Values between the two halves of an expert.
    #[arg(long, env = "ENTENTE_INNER", value_name = "N")]
    inner: Option<usize>,

    /// Decoder layers.
    #[arg(long, env = "ENTENTE_LAYERS", value_name = "N")]
    layers: Option<usize>,

    /// Query heads.
    #[arg(long, env = "ENTENTE_HEADS", value_name = "N")]
    heads: Option<usize>,

    /// Key and value heads.
    #[arg(long, env = "ENTENTE_KV_HEADS", value_name = "N")]
    kv_heads: Option<usize>,

    /// Experts of a layer.
    #[arg(long, env = "ENTENTE_EXPERTS", value_name = "N")]
    experts: Option<usize>,

    /// Experts that a row goes through.
    #[arg(long, env = "ENTENTE_TOP_K", value_name = "N")]
    top_k: Option<usize>,

    /// Tokens.
    #[arg(long, env = "ENTENTE_VOCAB", value_name = "N")]
    vocab: Option<usize>,

    /// Names the random numbers: the same seed and shape give the same bytes.
    #[arg(long, env = "ENTENTE_SEED", value_name = "N", default_value_t = 1234)]
    seed: u64,
}

impl SynthArgs {
    fn shape(&self) -> Shape {
        let named = match self.shape {
            Named::Tiny => Shape::TINY,
            Named::Mid => Shape::MID,
            Named::Large => Shape::LARGE,
        };
        Shape {
            hidden: self.hidden.unwrap_or(named.hidden),
            inner: self.inner.unwrap_or(named.inner),
            layers: self.layers.unwrap_or(named.layers),
            heads: self.heads.unwrap_or(named.heads),
            kv_heads: self.kv_heads.unwrap_or(named.kv_heads),
            experts: self.experts.unwrap_or(named.experts),
            top_k: self.top_k.unwrap_or(named.top_k),
            vocab: self.vocab.unwrap_or(named.vocab),
        }
    }
}

/// Runs the verb.
pub fn run(args: ModelArgs) -> anyhow::Result<()> {
    match args.verb {
        ModelVerb::Synth(args) => synth(&args),
    }
}

fn synth(args: &SynthArgs) -> anyhow::Result<()> {
    let bar = ProgressBar::new(0);
    let progress = |done, total| {
        bar.set_length(total);
        bar.set_position(done);
    };
    let written = synth::write(&args.out, &args.shape(), args.seed, &progress);
    bar.finish_and_clear();
    written.map_err(|error| match error {
        SynthError::Shape(_) => Misuse(error.to_string()).into(),
        SynthError::Write { .. } => error.into(),
    })
}
