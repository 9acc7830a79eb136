//! What is done to the bytes between two processes, and how a person writes it. Pure.
//!
//! ```text
//!   fr-se=30ms            each direction takes 30 ms longer
//!   fr-se=1mbit           each connection carries so much in each direction
//!   fr-se=30ms+1mbit      both
//!   fr-se=cut             connections end, and new ones are refused
//!   fr->se=cut            nothing that fr says arrives in se; connections stay as they are
//!   fr-expert-1=slow:20   what this node answers takes 20 times as long
//!   fr-se=clear           as if nothing had been said
//! ```
//!
//! A word about a link replaces what was said about it before. What is said about two regions and
//! about a node adds up.

use std::collections::BTreeMap;
use std::fmt;
use std::str::FromStr;
use std::time::Duration;

use entente_proto::ids::{NodeName, Region};

/// The longest delay; what is on its way is kept in memory.
const DELAY_MAX: Duration = Duration::from_secs(10);
/// The largest factor by which a node can be slowed.
const SLOW_MAX: u32 = 1_000;

/// What a word is about.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub enum Link {
    /// Everything from processes of the first region to those of the second; `fr->se`.
    OneWay(Region, Region),
    /// Both ways between two regions, the smaller name first; `fr-se`.
    Between(Region, Region),
    /// Everything from and to one process.
    Process(NodeName),
}

/// What happens to bytes in one direction.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Rule {
    /// They arrive so much later.
    pub delay: Duration,
    /// So many arrive in a second at most.
    pub bits_per_s: Option<u64>,
    /// They do not arrive, until this ends.
    pub is_stalled: bool,
    /// There is no connection that could carry them.
    pub is_cut: bool,
    /// Answers take so many times as long; 0 and 1 leave them as they are.
    pub slow: u32,
}

/// One word: `fr-se=30ms`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Change {
    /// What it is about.
    pub link: Link,
    /// What holds from now on; nothing when it is cleared.
    pub rule: Option<Rule>,
    /// How it was written, without the link.
    pub text: String,
}

/// Everything that was said.
#[derive(Debug, Clone, Default)]
pub struct Rules(BTreeMap<Link, (Rule, String)>);

/// The two ends of a connection, of which the first has dialled the second.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Ends {
    /// Who dialled.
    pub dialler: (Region, NodeName),
    /// Who was dialled.
    pub target: (Region, NodeName),
}

impl Rules {
    /// Takes a word to heart.
    pub fn apply(&mut self, change: Change) {
        match change.rule {
            Some(rule) => self.0.insert(change.link, (rule, change.text)),
            None => self.0.remove(&change.link),
        };
    }

    /// Everything that holds, as it was said.
    pub fn iter(&self) -> impl Iterator<Item = (&Link, &str)> {
        self.0.iter().map(|(link, (_, text))| (link, text.as_str()))
    }

    /// What holds on a connection: for what its dialler says, and for what its target answers.
    pub fn of(&self, ends: &Ends) -> [Rule; 2] {
        let Ends { dialler, target } = ends;
        let there = self.one_way(dialler, target);
        // Only who is asked can be slow to answer.
        let back = self.one_way(target, dialler);
        let slow = self.about(&Link::Process(target.1.clone())).slow;
        [Rule { slow: 0, ..there }, Rule { slow, ..back }]
    }

    fn one_way(&self, from: &(Region, NodeName), to: &(Region, NodeName)) -> Rule {
        let between = Link::Between(from.0.min(to.0), from.0.max(to.0));
        let links = [
            Link::OneWay(from.0, to.0),
            between,
            Link::Process(from.1.clone()),
            Link::Process(to.1.clone()),
        ];
        links.iter().fold(Rule::default(), |sum, link| sum.and(self.about(link)))
    }

    fn about(&self, link: &Link) -> Rule {
        self.0.get(link).map(|(rule, _)| *rule).unwrap_or_default()
    }
}

impl Rule {
    fn and(self, other: Self) -> Self {
        Self {
            delay: self.delay + other.delay,
            bits_per_s: match (self.bits_per_s, other.bits_per_s) {
                (Some(a), Some(b)) => Some(a.min(b)),
                (a, b) => a.or(b),
            },
            is_stalled: self.is_stalled || other.is_stalled,
            is_cut: self.is_cut || other.is_cut,
            slow: self.slow.max(other.slow),
        }
    }
}

impl FromStr for Change {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (link, effects) = text
            .split_once('=')
            .ok_or(format!("{text:?} is not LINK=EFFECT, such as fr-se=30ms"))?;
        let link: Link = link.trim().parse()?;
        let effects = effects.trim();
        let rule = match effects {
            "clear" => None,
            effects => {
                let mut rule = Rule::default();
                effects.split('+').try_for_each(|effect| add(&mut rule, &link, effect.trim()))?;
                Some(rule)
            }
        };
        Ok(Self { link, rule, text: effects.to_owned() })
    }
}

fn add(rule: &mut Rule, link: &Link, effect: &str) -> Result<(), String> {
    let number = |suffix: &str| effect.strip_suffix(suffix)?.parse::<u64>().ok();
    let is_one_way = matches!(link, Link::OneWay(..));
    let is_process = matches!(link, Link::Process(_));
    let slow = effect.strip_prefix("slow:").and_then(|factor| factor.parse().ok());
    if effect == "cut" {
        // A connection has two ends: what is lost in one direction leaves the other one as it is.
        *(if is_one_way { &mut rule.is_stalled } else { &mut rule.is_cut }) = true;
    } else if effect == "stall" {
        rule.is_stalled = true;
    } else if let (Some(slow), true) = (slow.filter(|slow| *slow <= SLOW_MAX), is_process) {
        rule.slow = slow;
    } else if let Some(delay) = number("ms").map(Duration::from_millis).filter(|d| *d <= DELAY_MAX)
    {
        rule.delay = delay;
    } else if let Some(bits) =
        number("mbit").and_then(|m| m.checked_mul(1_000_000)).filter(|b| *b > 0)
    {
        rule.bits_per_s = Some(bits);
    } else if let Some(bits) = number("kbit").and_then(|k| k.checked_mul(1_000)).filter(|b| *b > 0)
    {
        rule.bits_per_s = Some(bits);
    } else {
        return Err(format!(
            "{effect:?} is not 30ms (up to {} ms), 1mbit, 100kbit, cut, stall, clear, or for a \
             process slow:20 (up to {SLOW_MAX})",
            DELAY_MAX.as_millis()
        ));
    }
    Ok(())
}

impl Link {
    /// Whether it is about what these two say to each other, in one direction at least.
    pub fn joins(&self, a: &(Region, NodeName), b: &(Region, NodeName)) -> bool {
        match self {
            Self::OneWay(from, to) | Self::Between(from, to) => {
                (a.0, b.0) == (*from, *to) || (b.0, a.0) == (*from, *to)
            }
            Self::Process(name) => a.1 == *name || b.1 == *name,
        }
    }
}

impl FromStr for Link {
    type Err = String;

    /// `fr->se`, `fr-se`, or the name of a process.
    fn from_str(text: &str) -> Result<Self, String> {
        let pair = |a: &str, b: &str| Some((a.parse().ok()?, b.parse().ok()?));
        if let Some((from, to)) = text.split_once("->") {
            let pair = pair(from, to).ok_or(format!("{text:?} is not REGION->REGION"))?;
            return Ok(Self::OneWay(pair.0, pair.1));
        }
        if let Some((a, b)) = text.split_once('-').and_then(|(a, b)| pair(a, b)) {
            return Ok(Self::Between(a.min(b), a.max(b)));
        }
        let name = text.parse().map_err(|_| {
            format!("{text:?} is not REGION-REGION, REGION->REGION or the name of a process")
        })?;
        Ok(Self::Process(name))
    }
}

impl fmt::Display for Link {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::OneWay(from, to) => write!(f, "{from}->{to}"),
            Self::Between(a, b) => write!(f, "{a}-{b}"),
            Self::Process(name) => write!(f, "{name}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ends(dialler: &str, target: &str) -> Ends {
        let end = |name: &str| (name[..2].parse().unwrap(), name.parse().unwrap());
        Ends { dialler: end(dialler), target: end(target) }
    }

    fn rules(words: &[&str]) -> Rules {
        let mut rules = Rules::default();
        words.iter().for_each(|word| rules.apply(word.parse().unwrap()));
        rules
    }

    #[test]
    fn a_link_between_regions_holds_both_ways_and_for_nobody_else() {
        let rules = rules(&["se-fr=30ms+1mbit"]);
        let far = Rule {
            delay: Duration::from_millis(30),
            bits_per_s: Some(1_000_000),
            ..Rule::default()
        };
        assert_eq!(rules.of(&ends("fr-coordinator", "se-coordinator")), [far, far]);
        assert_eq!(rules.of(&ends("se-coordinator", "fr-coordinator")), [far, far]);
        assert_eq!(rules.of(&ends("fr-coordinator", "fr-expert-1")), [Rule::default(); 2]);
    }

    #[test]
    fn a_cut_in_one_direction_stalls_whoever_has_dialled() {
        let rules = rules(&["fr->se=cut"]);
        let stalled = Rule { is_stalled: true, ..Rule::default() };
        assert_eq!(rules.of(&ends("fr-x", "se-x")), [stalled, Rule::default()]);
        assert_eq!(rules.of(&ends("se-x", "fr-x")), [Rule::default(), stalled]);
    }

    #[test]
    fn only_what_a_slow_node_answers_is_slow() {
        let rules = rules(&["fr-expert-1=slow:20"]);
        let slow = Rule { slow: 20, ..Rule::default() };
        assert_eq!(rules.of(&ends("fr-coordinator", "fr-expert-1")), [Rule::default(), slow]);
        assert_eq!(rules.of(&ends("fr-expert-1", "fr-coordinator")), [Rule::default(); 2]);
    }

    #[test]
    fn what_is_said_of_regions_and_of_a_process_adds_up_until_it_is_cleared() {
        let mut rules = rules(&["fr-se=30ms", "se-x=5ms+1mbit", "fr->se=2mbit", "fr-se=20ms"]);
        let [there, _] = rules.of(&ends("fr-x", "se-x"));
        assert_eq!(there.delay, Duration::from_millis(25));
        assert_eq!(there.bits_per_s, Some(1_000_000));
        rules.apply("se-x=clear".parse().unwrap());
        let said: Vec<String> = rules.iter().map(|(l, text)| format!("{l}={text}")).collect();
        assert_eq!(said, ["fr->se=2mbit", "fr-se=20ms"]);
    }

    #[test]
    fn a_link_joins_whom_it_is_about() {
        let joins = |link: &str, dialler: &str, target: &str| {
            let Ends { dialler, target } = ends(dialler, target);
            link.parse::<Link>().unwrap().joins(&dialler, &target)
        };
        assert!(joins("fr-se", "se-x", "fr-x") && joins("fr->se", "se-x", "fr-x"));
        assert!(!joins("fr-se", "fr-x", "fr-y") && !joins("fr-se", "fr-x", "de-x"));
        assert!(joins("fr-x", "de-x", "fr-x") && !joins("fr-x", "de-x", "fr-y"));
    }

    #[test]
    fn a_wrong_word_is_named() {
        for (word, part) in [
            ("fr-se", "LINK=EFFECT"),
            ("fr-se=fast", "\"fast\""),
            ("fr-se=slow:20", "slow:20"),
            ("fr-se=99999ms", "up to 10000 ms"),
            ("fr-se=0mbit", "0mbit"),
            ("fr->x=cut", "REGION->REGION"),
            ("FR=cut", "name of a process"),
        ] {
            let error = word.parse::<Change>().unwrap_err();
            assert!(error.contains(part), "{word}: {error}");
        }
    }
}
