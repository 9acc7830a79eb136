//! `entente model`: work with checkpoint folders, without a cluster.

use std::ffi::OsString;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use clap::{Args, Subcommand, ValueEnum};
use entente_model::kernels::{self, Kernels, WeightFormat};
use entente_model::packed::{self, Manifest};
use entente_model::synth::{self, Shape, SynthError};
use entente_model::{Checkpoint, Progress};
use indicatif::ProgressBar;

use crate::cluster::plan::Weights;
use crate::exit::Misuse;

/// The verbs of `entente model`.
#[derive(Debug, Args)]
pub struct ModelArgs {
    #[command(subcommand)]
    verb: ModelVerb,
}

#[derive(Debug, Subcommand)]
enum ModelVerb {
    /// Write the packed form of a checkpoint: a folder that is used in its place and starts faster.
    Import(ImportArgs),
    /// Compare all weights of a folder with its manifest, or with the checksums of an import.
    Verify(VerifyArgs),
    /// Write the manifest of a checkpoint: the SHA-256 of each expert and of the rest, as they are
    /// kept in one weight format. An import has one already.
    Manifest(ManifestArgs),
    /// Write a checkpoint of any shape with random weights, for measuring.
    Synth(SynthArgs),
}

/// The flags of `entente model import`.
#[derive(Debug, Args)]
struct ImportArgs {
    /// Checkpoint folder in Hugging Face format.
    dir: PathBuf,

    /// Weight format; the folder serves this one only.
    #[arg(long, env = "ENTENTE_WEIGHTS", value_enum, default_value = "bf16")]
    weights: Weights,

    /// Folder to write, replacing an earlier import; DIR-FORMAT if absent.
    #[arg(long, env = "ENTENTE_OUT", value_name = "OUT")]
    out: Option<PathBuf>,
}

/// The flags of `entente model verify`.
#[derive(Debug, Args)]
struct VerifyArgs {
    /// Folder that `entente model import` wrote, or that has a manifest.
    dir: PathBuf,
}

/// The flags of `entente model manifest`.
#[derive(Debug, Args)]
struct ManifestArgs {
    /// Checkpoint folder; the manifest is written there.
    dir: PathBuf,

    /// Weight format; that of the folder, if it has one, or bf16 when absent.
    #[arg(long, env = "ENTENTE_WEIGHTS", value_enum)]
    weights: Option<Weights>,
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
        ModelVerb::Import(args) => import(&args),
        ModelVerb::Verify(args) => verify(&args),
        ModelVerb::Manifest(args) => manifest(&args),
        ModelVerb::Synth(args) => synth(&args),
    }
}

/// Shows how many parts are done.
struct Parts(ProgressBar);

impl Progress for Parts {
    fn advance(&self, done: u64, total: u64) {
        self.0.set_length(total);
        self.0.set_position(done);
    }
}

/// Kernels of a format that use all of the machine.
fn all_kernels(format: WeightFormat) -> anyhow::Result<Arc<dyn Kernels>> {
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    Ok(kernels::select(format, threads)?)
}

fn import(args: &ImportArgs) -> anyhow::Result<()> {
    let checkpoint = Checkpoint::open(&args.dir)?;
    let format = WeightFormat::from(args.weights);
    let kernels = all_kernels(format)?;
    let out = match &args.out {
        Some(out) => out.clone(),
        None => beside(&args.dir, format)?,
    };
    let parts = Parts(ProgressBar::new(0));
    let imported = packed::import(&checkpoint, kernels.as_ref(), &out, &parts);
    parts.0.finish_and_clear();
    let packed::Imported { weights_bytes, parts, manifest } = imported?;
    let gb = weights_bytes as f64 / 1e9;
    say(&format!("{}: {gb:.2} GB of {} weights in {parts} parts", out.display(), format.name()))?;
    tell(&manifest)
}

/// The folder of an import beside that of its checkpoint, whatever way led to that one.
fn beside(dir: &Path, format: WeightFormat) -> anyhow::Result<PathBuf> {
    let dir = dir.canonicalize()?;
    let Some(name) = dir.file_name() else {
        return Err(Misuse(format!("{} has no name; give --out", dir.display())).into());
    };
    let mut name = OsString::from(name);
    name.push(format!("-{}", format.name()));
    Ok(dir.with_file_name(name))
}

fn verify(args: &VerifyArgs) -> anyhow::Result<()> {
    let checkpoint = Checkpoint::open(&args.dir)?;
    // A folder that says nothing of a format has nothing to be compared with either.
    let kernels = all_kernels(packed::format(&checkpoint).unwrap_or(WeightFormat::Bf16))?;
    let parts = Parts(ProgressBar::new(0));
    let verified = packed::verify(&checkpoint, kernels.as_ref(), &parts);
    parts.0.finish_and_clear();
    say(&format!("{}: all {} parts are as they were written", args.dir.display(), verified?))
}

fn manifest(args: &ManifestArgs) -> anyhow::Result<()> {
    let checkpoint = Checkpoint::open(&args.dir)?;
    let of_folder = packed::format(&checkpoint).unwrap_or(WeightFormat::Bf16);
    let kernels = all_kernels(args.weights.map_or(of_folder, WeightFormat::from))?;
    let parts = Parts(ProgressBar::new(0));
    let manifest = packed::manifest(&checkpoint, kernels.as_ref(), &parts);
    parts.0.finish_and_clear();
    let manifest = manifest?;
    manifest.write()?;
    tell(&manifest)
}

/// Shows what names all weights at once, to be compared between machines.
fn tell(manifest: &Manifest) -> anyhow::Result<()> {
    let sha256: String = manifest.sha256().iter().map(|byte| format!("{byte:02x}")).collect();
    say(&format!("manifest of {} weights: sha256 {sha256}", manifest.format().name()))
}

fn say(line: &str) -> anyhow::Result<()> {
    Ok(writeln!(std::io::stdout().lock(), "{line}")?)
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
