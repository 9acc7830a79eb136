//! The file of a drill: what runs, what breaks, and what must hold nevertheless.
//!
//! Everything that can be wrong with a file is found before anything is started: a key that is not
//! known is an error that names it and its line, and so is a combination that makes no sense.

use std::fmt;
use std::str::FromStr;
use std::time::Duration;

use entente_proto::ids::{NodeName, Region};
use serde::de::value::{MapAccessDeserializer, SeqAccessDeserializer};
use serde::de::{self, Deserializer, MapAccess, SeqAccess, Visitor};
use serde::{Deserialize, Serialize};
use serde_json::json;

use super::place::Server;
use crate::cluster::plan::Role;
use crate::cluster::relay::rule::{Change, Link};
use crate::exit::Misuse;
use crate::load::{Lengths, Prompts};

/// Requests that differ from each other, at most; their undisturbed answers are kept.
const DISTINCT_MAX: usize = 10_000;

/// Requests that differ when the load is given by its duration.
const DISTINCT_DEFAULT: usize = 256;

/// How long new connections are refused when those that there are shall end.
const DISCONNECTED: Duration = Duration::from_millis(100);

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

/// One deed.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(rename_all = "kebab-case", rename_all_fields = "kebab-case", deny_unknown_fields)]
#[serde(remote = "Self")]
pub enum Action {
    /// SIGKILL.
    Kill {},
    /// SIGTERM: a node moves its replicas away and stops.
    Term {},
    /// SIGTERM, and wait until the process has ended.
    Restart {},
    /// SIGSTOP, and SIGCONT when the time is over; at the end of the drill without a time.
    Pause {
        /// How long.
        #[serde(rename = "for")]
        lasts: Option<Span>,
    },
    /// SIGCONT.
    Resume {},
    /// SIGKILL to the voter that leads.
    KillLeader {},
    /// `entente node drain`, to its end.
    Drain {},
    /// What a link carries, or what a process answers, takes longer.
    Slow {
        /// Which link; absent for all that the target speaks to.
        link: Option<String>,
        /// How many times as long the target's answers take.
        factor: Option<u32>,
        /// How much longer each direction takes.
        delay: Option<Span>,
        /// How long; to the end of the drill without.
        #[serde(rename = "for")]
        lasts: Option<Span>,
    },
    /// Connections end; new ones come up.
    Disconnect {
        /// Which link; absent for all that the target speaks to.
        link: Option<String>,
    },
    /// Connections end, and no new ones come up.
    Cut {
        /// Which link; absent for all that the target speaks to.
        link: Option<String>,
        /// How long; to the end of the drill without.
        #[serde(rename = "for")]
        lasts: Option<Span>,
    },
    /// Connections stay, and what one side says does not arrive.
    CutOneWay {
        /// From where to where, such as `fr->se`.
        link: Option<String>,
        /// How long; to the end of the drill without.
        #[serde(rename = "for")]
        lasts: Option<Span>,
    },
    /// Whatever a drill did to a link is undone.
    Heal {
        /// Which link; absent for all that the target speaks to.
        link: Option<String>,
    },
    /// A command of the user's own.
    Exec {
        /// Words for a shell; `{target}`, `{data-dir}` and `{entente}` are filled in.
        command: String,
        /// Whether it must fail.
        #[serde(default)]
        fails: bool,
        /// What its output must contain.
        says: Option<String>,
    },
}

impl Action {
    /// Whether it is done to a process; nothing when it may be either way.
    fn needs_target(&self) -> Option<bool> {
        match self {
            Self::Exec { .. } => None,
            Self::KillLeader {} => Some(false),
            _ => Some(self.link().is_none()),
        }
    }

    /// The link that it is done to.
    fn link(&self) -> Option<&str> {
        match self {
            Self::Slow { link, .. }
            | Self::Disconnect { link }
            | Self::Cut { link, .. }
            | Self::CutOneWay { link, .. }
            | Self::Heal { link } => link.as_deref(),
            _ => None,
        }
    }

    /// What is said of a link for this, in the words of `entente link set`; nothing for an action
    /// that is not about links.
    fn effect(&self) -> Option<String> {
        let words = |parts: [Option<String>; 2]| {
            parts.into_iter().flatten().collect::<Vec<String>>().join("+")
        };
        match self {
            Self::Slow { factor, delay, .. } => Some(words([
                delay.map(|delay| format!("{}ms", delay.0.as_millis())),
                factor.map(|factor| format!("slow:{factor}")),
            ])),
            Self::Disconnect { .. } | Self::Cut { .. } | Self::CutOneWay { .. } => {
                Some("cut".to_owned())
            }
            Self::Heal { .. } => Some("clear".to_owned()),
            _ => None,
        }
    }

    /// What it says of its link, or of those of `names`; nothing for an action that is not about
    /// links.
    pub fn changes(&self, names: &[NodeName]) -> Vec<String> {
        let Some(effect) = self.effect() else { return Vec::new() };
        let of = |link: &str| format!("{link}={effect}");
        match self.link() {
            Some(link) => vec![of(link)],
            None => names.iter().map(|name| of(name.as_str())).collect(),
        }
    }

    fn check(&self, has_target: bool) -> Result<(), String> {
        match (self.needs_target(), has_target) {
            (Some(true), false) => return Err(format!("`{self}` needs a `target`")),
            (Some(false), true) => return Err(format!("`{self}` takes no `target`")),
            _ => {}
        }
        let example = ["fr-expert-1".parse().expect("a valid name")];
        for change in self.changes(&example) {
            let change = change.parse::<Change>().map_err(|error| format!("`{self}`: {error}"))?;
            let is_one_way = matches!(change.link, Link::OneWay(..));
            if is_one_way != matches!(self, Self::CutOneWay { .. }) && !is_heal(self) {
                let text = "`cut-one-way` and no other wants a link such as fr->se";
                return Err(text.to_owned());
            }
        }
        Ok(())
    }

    /// How long it lasts before it is undone.
    pub fn lasts(&self) -> Duration {
        match self {
            Self::Pause { lasts }
            | Self::Slow { lasts, .. }
            | Self::Cut { lasts, .. }
            | Self::CutOneWay { lasts, .. } => lasts.map_or(Duration::ZERO, |span| span.0),
            Self::Disconnect { .. } => DISCONNECTED,
            _ => Duration::ZERO,
        }
    }

    /// Whether a process ends by it, to be started again by whoever looks after it.
    pub fn ends_process(&self) -> bool {
        matches!(self, Self::Kill {} | Self::Term {} | Self::Restart {} | Self::KillLeader {})
    }
}

fn is_heal(action: &Action) -> bool {
    matches!(action, Action::Heal { .. })
}

impl fmt::Display for Action {
    /// As it is called in the file.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Kill {} => "kill",
            Self::Term {} => "term",
            Self::Restart {} => "restart",
            Self::Pause { .. } => "pause",
            Self::Resume {} => "resume",
            Self::KillLeader {} => "kill-leader",
            Self::Drain {} => "drain",
            Self::Slow { .. } => "slow",
            Self::Disconnect { .. } => "disconnect",
            Self::Cut { .. } => "cut",
            Self::CutOneWay { .. } => "cut-one-way",
            Self::Heal { .. } => "heal",
            Self::Exec { .. } => "exec",
        })
    }
}

impl<'de> Deserialize<'de> for Action {
    /// `kill` stands for `kill: {}`.
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Either;
        impl<'de> Visitor<'de> for Either {
            type Value = Action;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an action, such as `kill` or `pause: {for: 3s}`")
            }

            fn visit_str<E: de::Error>(self, name: &str) -> Result<Action, E> {
                Action::deserialize(json!({ (name): {} })).map_err(E::custom)
            }

            fn visit_map<A: MapAccess<'de>>(self, map: A) -> Result<Action, A::Error> {
                Action::deserialize(MapAccessDeserializer::new(map))
            }
        }
        deserializer.deserialize_any(Either)
    }
}

/// One action or a list of them.
#[derive(Debug, Clone, PartialEq)]
pub struct Actions(pub Vec<Action>);

impl<'de> Deserialize<'de> for Actions {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct OneOrMore;
        impl<'de> Visitor<'de> for OneOrMore {
            type Value = Actions;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an action or a list of actions")
            }

            fn visit_str<E: de::Error>(self, name: &str) -> Result<Actions, E> {
                let action = de::value::StrDeserializer::new(name);
                Ok(Actions(vec![Deserialize::deserialize(action)?]))
            }

            fn visit_map<A: MapAccess<'de>>(self, map: A) -> Result<Actions, A::Error> {
                Ok(Actions(vec![Deserialize::deserialize(MapAccessDeserializer::new(map))?]))
            }

            fn visit_seq<A: SeqAccess<'de>>(self, seq: A) -> Result<Actions, A::Error> {
                Ok(Actions(Deserialize::deserialize(SeqAccessDeserializer::new(seq))?))
            }
        }
        deserializer.deserialize_any(OneOrMore)
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

/// A stretch of time, in the file a number of seconds or `300ms`, `2.5s`, `1m`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Span(pub Duration);

impl FromStr for Span {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let text = text.trim();
        let units = [("ms", 1e-3), ("s", 1.0), ("m", 60.0), ("", 1.0)];
        let (number, unit_s) = units
            .iter()
            .find_map(|(unit, seconds)| Some((text.strip_suffix(unit)?, seconds)))
            .expect("every text ends with nothing");
        let number: Option<f64> = number.trim().parse().ok();
        number
            .and_then(|number| Duration::try_from_secs_f64(number * unit_s).ok())
            .map(Self)
            .ok_or(format!("{text:?} is no time, such as 300ms, 2.5s or 1m"))
    }
}

/// A point of a run.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Moment {
    /// So long after the first request was sent.
    After(Duration),
    /// Once so many tokens have arrived, over all requests.
    Tokens(u64),
}

impl FromStr for Moment {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text.trim().strip_suffix("tokens") {
            Some(count) => count
                .trim()
                .parse()
                .map(Self::Tokens)
                .map_err(|_| format!("{text:?} is no number of tokens, such as 400 tokens")),
            None => text.parse().map(|Span(span)| Self::After(span)),
        }
    }
}

/// Lets a type be read from a text or a number, by way of its text.
macro_rules! from_text_or_number {
    ($type:ty, $expecting:literal) => {
        impl<'de> Deserialize<'de> for $type {
            fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
                struct Text;
                impl Visitor<'_> for Text {
                    type Value = $type;

                    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                        f.write_str($expecting)
                    }

                    fn visit_str<E: de::Error>(self, text: &str) -> Result<$type, E> {
                        text.parse().map_err(E::custom)
                    }

                    fn visit_u64<E: de::Error>(self, number: u64) -> Result<$type, E> {
                        self.visit_str(&number.to_string())
                    }

                    fn visit_f64<E: de::Error>(self, number: f64) -> Result<$type, E> {
                        self.visit_str(&number.to_string())
                    }
                }
                deserializer.deserialize_any(Text)
            }
        }
    };
}

from_text_or_number!(Span, "a time, such as 300ms, 2.5s or 1m");
from_text_or_number!(Moment, "a time, such as 2.5s, or a number of tokens, such as 400 tokens");

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
