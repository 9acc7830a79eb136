//! The file of a drill: what runs, what breaks, and what must hold nevertheless.
//!
//! Everything that can be wrong with a file is found before anything is started: a key that is not
//! known is an error that names it and its line, and so is a combination that makes no sense.

mod action;
mod time;

use std::fmt;
use std::time::Duration;

use entente_proto::ids::{NodeName, Region};
use serde::de::value::MapAccessDeserializer;
use serde::de::{self, Deserializer, MapAccess, Visitor};
use serde::{Deserialize, Serialize};

pub use self::action::{Action, Actions};
pub use self::time::{Moment, Span};
use super::place::Server;
use crate::cluster::plan::Role;
use crate::exit::Misuse;
use crate::load::{Lengths, Prompts};

/// Requests that differ from each other, at most; their undisturbed answers are kept.
const DISTINCT_MAX: usize = 10_000;

/// Requests that differ when the load is given by its duration.
const DISTINCT_DEFAULT: usize = 256;

/// Requests at once, at most; each has a thread.
const STREAMS_MAX: usize = 1_024;

/// What a drill does and requires.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Scenario {
    /// What it is called.
    pub name: String,
    /// What it shows when it passes, in one sentence.
    pub proves: String,
    /// Flags of the `entente up` that the drill starts; absent for a cluster that runs already.
    pub cluster: Option<String>,
    /// What is asked of the cluster meanwhile.
    pub load: Load,
    /// What is done to it.
    #[serde(default)]
    pub faults: Vec<Fault>,
    /// What must hold.
    pub expect: Expect,
    /// A form that takes seconds: each section here stands for the one of the same name.
    short: Option<Short>,
}

#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
struct Short {
    cluster: Option<String>,
    load: Option<Load>,
    faults: Option<Vec<Fault>>,
    expect: Option<Expect>,
}

/// Streaming requests, which follow from a seed.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Load {
    /// Closed loop: so many requests run at all times.
    streams: Option<usize>,
    /// Open loop: so many requests arrive in a second, on average.
    rate: Option<f64>,
    /// At least so many requests in all.
    requests: Option<usize>,
    /// For at least so long.
    duration: Option<Span>,
    /// How many different requests there are; they come again in turn.
    distinct: Option<usize>,
    /// Tokens of each answer.
    pub max_tokens: u16,
    /// What prompts are made of.
    #[serde(default = "prompts_default")]
    pub prompts: Prompts,
    /// Names lengths, prompts, arrival times and the targets that are drawn.
    #[serde(default = "seed_default")]
    pub seed: u64,
    /// Whose coordinators are asked; all when absent.
    pub regions: Option<Vec<Region>>,
    /// The only regions that may serve the requests; whatever is allowed when absent.
    pub residency: Option<Vec<Region>>,
    /// Longest that one request may take.
    #[serde(default = "deadline_default")]
    pub deadline: Span,
}

fn prompts_default() -> Prompts {
    Prompts::Tokens("16-64".parse().expect("a range of lengths"))
}

fn seed_default() -> u64 {
    1
}

fn deadline_default() -> Span {
    Span(Duration::from_secs(60))
}

/// How requests come.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Pace {
    /// So many run at all times.
    Closed {
        /// Requests at once.
        streams: usize,
    },
    /// They arrive by a Poisson process.
    Open {
        /// Requests a second.
        rate: f64,
    },
}

impl Load {
    /// How requests come.
    ///
    /// # Errors
    /// Unless exactly one of `streams` and `rate` is given, within its bounds.
    pub fn pace(&self) -> Result<Pace, Misuse> {
        match (self.streams, self.rate) {
            (Some(streams), None) if (1..=STREAMS_MAX).contains(&streams) => {
                Ok(Pace::Closed { streams })
            }
            (None, Some(rate)) if rate.is_finite() && rate > 0.0 => Ok(Pace::Open { rate }),
            _ => Err(Misuse(format!(
                "load: give either `streams` (1 to {STREAMS_MAX}) or `rate` (requests a second)"
            ))),
        }
    }

    /// How many requests, and how long, at the least.
    pub fn least(&self) -> (usize, Duration) {
        (self.requests.unwrap_or(0), self.duration.map_or(Duration::ZERO, |span| span.0))
    }

    /// How many different requests there are.
    pub fn distinct(&self) -> usize {
        let all = self.requests.unwrap_or(DISTINCT_DEFAULT);
        self.distinct.unwrap_or(all).min(DISTINCT_MAX)
    }

    /// Whether the load goes to this coordinator.
    pub fn is_for(&self, server: &Server) -> bool {
        let Some(regions) = &self.regions else { return true };
        server.region.is_some_and(|region| regions.contains(&region))
    }

    /// The length of every answer.
    pub fn output(&self) -> Lengths {
        self.max_tokens.to_string().parse().expect("checked to be at least 1")
    }

    fn check(&self) -> Result<(), Misuse> {
        self.pace()?;
        let wrong = |text: &str| Err(Misuse(format!("load: {text}")));
        if self.least() == (0, Duration::ZERO) {
            return wrong("give `requests`, `duration` or both");
        }
        if self.distinct() == 0 || self.max_tokens == 0 {
            return wrong("`distinct` and `max_tokens` must be at least 1");
        }
        if self.regions.as_ref().is_some_and(Vec::is_empty) {
            return wrong("`regions` is empty");
        }
        Ok(())
    }
}

/// Something that is done to the cluster, once or again and again.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Fault {
    /// When it strikes first.
    pub at: Moment,
    /// What is done, one after the other.
    #[serde(rename = "action")]
    pub actions: Actions,
    /// To whom.
    pub target: Option<Target>,
    /// How often: strikes, or rounds when the target is `each`.
    #[serde(default = "once")]
    pub repeat: u32,
    /// From one strike to the next, which also waits until the cluster has recovered.
    pub every: Option<Moment>,
}

fn once() -> u32 {
    1
}

impl Fault {
    fn check(&self) -> Result<(), String> {
        let each = self.target.as_ref().is_some_and(|target| target.pick == Pick::Each);
        if self.repeat == 0 {
            return Err("`repeat` must be at least 1".to_owned());
        }
        if self.every.is_none() && (each || self.repeat > 1) {
            return Err("more than one strike needs `every`".to_owned());
        }
        for action in &self.actions.0 {
            action.check(self.target.is_some())?;
        }
        if self.actions.0.is_empty() { Err("`action` is empty".to_owned()) } else { Ok(()) }
    }
}

/// Whom a fault strikes: by name, or by what is the same for several processes.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, remote = "Self")]
pub struct Target {
    /// The one process of this name.
    pub name: Option<NodeName>,
    /// Processes that do this.
    pub role: Option<Role>,
    /// Processes that stand there.
    pub region: Option<Region>,
    /// Which of those that match.
    #[serde(default)]
    pub pick: Pick,
}

impl fmt::Display for Target {
    /// What its processes have in common: `fr coordinator`.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let words = [
            self.name.as_ref().map(ToString::to_string),
            self.region.map(|region| region.to_string()),
            self.role.map(|role| role.to_string()),
        ];
        let words: Vec<String> = words.into_iter().flatten().collect();
        f.write_str(if words.is_empty() { "anybody" } else { "" })?;
        f.write_str(&words.join(" "))
    }
}

/// Connections over which nothing may pass, in either direction.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Way {
    /// Those that any of these dials ...
    pub from: Target,
    /// ... to any of those.
    pub to: Target,
}

impl fmt::Display for Way {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} -> {}", self.from, self.to)
    }
}

/// Which of several processes a strike is for.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Pick {
    /// One that the seed draws, anew for each strike.
    #[default]
    One,
    /// All of them in turn, a strike each.
    Each,
    /// All of them in one strike.
    All,
}

impl<'de> Deserialize<'de> for Target {
    /// `fr-expert-1` stands for `name: fr-expert-1`.
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Either;
        impl<'de> Visitor<'de> for Either {
            type Value = Target;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a name, or `role`, `region` and `pick`")
            }

            fn visit_str<E: de::Error>(self, name: &str) -> Result<Target, E> {
                let name = name.parse().map_err(E::custom)?;
                Ok(Target { name: Some(name), ..Target::default() })
            }

            fn visit_map<A: MapAccess<'de>>(self, map: A) -> Result<Target, A::Error> {
                Target::deserialize(MapAccessDeserializer::new(map))
            }
        }
        deserializer.deserialize_any(Either)
    }
}

/// What must hold at the end. What is absent is not required.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Expect {
    /// Requests that may fail; those on a coordinator that a fault ended do not count.
    #[serde(default)]
    pub failed_max: usize,
    /// Whether every answer must be, byte for byte, that of the undisturbed run.
    #[serde(default)]
    pub identical: bool,
    /// How much longer than usual streams may wait for their next token around a strike.
    pub added_stall_ms: Option<Limits>,
    /// How long after a strike the cluster is ready again.
    pub recovery_ms: Option<Limits>,
    /// Share of the throughput before the first strike that may be missing from then on.
    pub throughput_dip_max: Option<f64>,
    /// Share of all rows that may be asked of a second node while nothing is wrong.
    pub hedged_share_max: Option<f64>,
    /// Whether the committed epochs must never go back.
    #[serde(default)]
    pub epochs_forward: bool,
    /// Whether changes that are made all the while must have a linearizable history.
    #[serde(default)]
    pub changes_linearizable: bool,
    /// How many replicas must have been placed anew meanwhile.
    pub moves_min: Option<u64>,
    /// Over which connections through the relay not one byte may pass, from begin to end.
    #[serde(default)]
    pub no_bytes: Vec<Way>,
    /// How many bytes may pass over links while a `cut` holds on them.
    pub cut_bytes_max: Option<u64>,
    /// How long after a strike its effects are looked for.
    #[serde(default = "window_default")]
    pub window: Span,
}

fn window_default() -> Span {
    Span(Duration::from_secs(2))
}

/// Bounds of two percentiles.
#[derive(Debug, Clone, Copy, PartialEq, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct Limits {
    /// Of the median.
    pub p50: Option<f64>,
    /// Of the 99th percentile.
    pub p99: Option<f64>,
}

impl Scenario {
    /// Reads a scenario, in its short form if so wanted, and checks that it makes sense.
    ///
    /// # Errors
    /// With the key that is wrong, and its line where it is the text that is wrong.
    pub fn parse(text: &str, short: bool) -> Result<Self, Misuse> {
        let mut scenario: Self =
            serde_saphyr::from_str(text).map_err(|error| Misuse(error.to_string()))?;
        if let Some(form) = scenario.short.take().filter(|_| short) {
            scenario.cluster = form.cluster.or(scenario.cluster);
            scenario.load = form.load.unwrap_or(scenario.load);
            scenario.faults = form.faults.unwrap_or(scenario.faults);
            scenario.expect = form.expect.unwrap_or(scenario.expect);
        }
        scenario.load.check()?;
        for (number, fault) in scenario.faults.iter().enumerate() {
            fault.check().map_err(|error| Misuse(format!("fault {}: {error}", number + 1)))?;
        }
        Ok(scenario)
    }
}

#[cfg(test)]
mod tests;
