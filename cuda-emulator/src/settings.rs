//! What a test can choose of an emulated machine, and the faults that it can plant.
//!
//! A process reads the environment once. Faults can also come later, by the file that
//! `ENTENTE_CUDA_EMULATOR_CONTROL` names, which is read at each launch: a line of it holds faults
//! as the variable does, after `pid=NUMBER` only for the process of that number.
//!
//! | variable `ENTENTE_CUDA_EMULATOR_…` | meaning | default |
//! |---|---|---|
//! | `DEVICES` | devices of the machine | 1 |
//! | `MEMORY_BYTES` | memory of each | 1 GiB |
//! | `SEED` | order of blocks, warps and lanes; see [`crate::engine::Order`] | 0 |
//! | `FAULTS` | `lost`, `wrong-architecture`, `no-graphs` (no stream can be captured), `slow=MILLISECONDS` (each kernel), `nccl-hangs` and `nccl-fails` (what is exchanged), by spaces | none |
//! | `CONTROL` | the file | none |

use std::path::PathBuf;
use std::time::Duration;
use std::{env, fs};

const PREFIX: &str = "ENTENTE_CUDA_EMULATOR_";

/// What goes wrong.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Faults {
    /// Every call on a device fails from now on.
    pub lost: bool,
    /// No image has code for the device.
    pub wrong_architecture: bool,
    /// No stream can be captured.
    pub no_graphs: bool,
    /// How long each kernel takes beside its work.
    pub slow: Duration,
    /// What befalls work of another library, NCCL's.
    pub foreign: Foreign,
}

/// What can befall work of another library; it is told by its number.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Foreign {
    /// Nothing.
    #[default]
    Works = 0,
    /// It goes no further, and nobody is told.
    Hangs = 1,
    /// It goes no further, and whoever asks is told.
    Fails = 2,
}

impl Faults {
    /// Adds the faults that a text names.
    fn add(&mut self, text: &str) {
        for word in text.split_whitespace() {
            match word.split_once('=').unwrap_or((word, "")) {
                ("lost", _) => self.lost = true,
                ("wrong-architecture", _) => self.wrong_architecture = true,
                ("no-graphs", _) => self.no_graphs = true,
                ("nccl-hangs", _) => self.foreign = Foreign::Hangs,
                ("nccl-fails", _) => self.foreign = Foreign::Fails,
                ("slow", milliseconds) => {
                    let milliseconds = milliseconds.parse().expect("slow=MILLISECONDS");
                    self.slow = Duration::from_millis(milliseconds);
                }
                _ => panic!("{word} is no fault that can be planted"),
            }
        }
    }
}

/// What the environment says.
#[derive(Clone, Debug)]
pub struct Settings {
    /// Devices of the machine.
    pub devices: usize,
    /// Memory of each.
    pub memory_bytes: usize,
    /// Order of blocks, warps and lanes.
    pub seed: u64,
    faults: Faults,
    planted: String,
    control: Option<PathBuf>,
}

impl Settings {
    /// Reads the environment.
    pub fn new() -> Self {
        let number = |name: &str, default: u64| {
            let text = env::var(format!("{PREFIX}{name}")).ok();
            text.map_or(default, |text| text.parse().expect("a number in the environment"))
        };
        let mut faults = Faults::default();
        faults.add(&env::var(format!("{PREFIX}FAULTS")).unwrap_or_default());
        Self {
            devices: number("DEVICES", 1) as usize,
            memory_bytes: number("MEMORY_BYTES", 1 << 30) as usize,
            seed: number("SEED", 0),
            faults,
            planted: String::new(),
            control: env::var_os(format!("{PREFIX}CONTROL")).map(PathBuf::from),
        }
    }

    /// Plants faults of this process, beside those of the environment and in place of those that
    /// were planted in this way before.
    pub fn plant(&mut self, text: &str) {
        text.clone_into(&mut self.planted);
    }

    /// What goes wrong just now.
    pub fn faults(&self) -> Faults {
        let mut faults = self.faults.clone();
        faults.add(&self.planted);
        let text = self.control.as_ref().and_then(|path| fs::read_to_string(path).ok());
        let own = format!("pid={} ", std::process::id());
        for line in text.as_deref().unwrap_or_default().lines() {
            match line.strip_prefix(&own) {
                Some(line) => faults.add(line),
                None if line.starts_with("pid=") => {}
                None => faults.add(line),
            }
        }
        faults
    }
}

impl Default for Settings {
    fn default() -> Self {
        Self::new()
    }
}
