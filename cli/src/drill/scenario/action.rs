//! What can be done to a cluster, as the file names it.

use std::fmt;
use std::time::Duration;

use entente_proto::ids::NodeName;
use serde::Deserialize;
use serde::de::value::{MapAccessDeserializer, SeqAccessDeserializer, StrDeserializer};
use serde::de::{self, Deserializer, MapAccess, SeqAccess, Visitor};
use serde_json::json;

use super::time::Span;
use crate::cluster::relay::rule::{Change, Link};

/// How long new connections are refused when those that there are shall end.
const DISCONNECTED: Duration = Duration::from_millis(100);

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
    /// In the name of the target, a coordinator: what it could still send if it had slept since
    /// before the first strike. All of it must be refused.
    SendStale {
        /// Frames to the expert nodes of its region.
        exchanges: u64,
        /// Changes to the leader.
        proposals: u64,
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

    /// What is done, in words for a report.
    pub fn words(&self) -> String {
        match self {
            Self::Exec { command, .. } => format!("{self} `{command}`"),
            _ => self.link().map_or(self.to_string(), |link| format!("{self} {link}")),
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

    /// Whether it makes sense, with a target or without.
    pub(super) fn check(&self, has_target: bool) -> Result<(), String> {
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
            Self::SendStale { .. } => "send-stale",
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
                let action = StrDeserializer::new(name);
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
