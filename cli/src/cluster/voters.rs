//! Which witnesses stand beside the coordinators, so that the raft group can lose somebody.
//!
//! Every coordinator votes. A group of two that loses one has no majority left, and a group of four
//! survives no more losses than one of three; so witnesses make the number odd, and at least three.

use std::str::FromStr;

use entente_proto::ids::Region;

use super::plan::{Member, Regions, Role};

/// Fewest voters of which one may be lost.
const VOTERS_MIN: usize = 3;

/// Where witnesses stand when nobody says it: the first that has no coordinator, so that the loss
/// of one country never takes two of three voters.
const REGIONS: [&str; 3] = ["de", "nl", "dk"];

/// What `--witness` says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Witness {
    /// They stand in this region.
    In(Region),
    /// There are none: coordinators alone vote.
    None,
}

impl FromStr for Witness {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "none" => Ok(Self::None),
            region => region.parse().map(Self::In).map_err(|error| format!("{error}, or none")),
        }
    }
}

/// The witnesses beside the coordinators of `regions`.
pub fn witnesses(regions: &Regions, wanted: Option<Witness>) -> Vec<Member> {
    let coordinators = regions.iter().count();
    // The next odd number that is large enough.
    let voters = coordinators.max(VOTERS_MIN) | 1;
    let region = match wanted {
        Some(Witness::None) => return Vec::new(),
        Some(Witness::In(region)) => region,
        None => free_region(regions),
    };
    let count = voters - coordinators;
    let witness = |number: usize| {
        let name = if count == 1 { "witness".to_owned() } else { format!("witness-{number}") };
        let name = name.parse().expect("the word and a number make a valid name");
        Member { name, role: Role::Witness, region }
    };
    (1..=count).map(witness).collect()
}

fn free_region(regions: &Regions) -> Region {
    let known = || REGIONS.iter().filter_map(|region| region.parse().ok());
    let is_free = |region: &Region| regions.iter().all(|(taken, _)| taken != *region);
    let free = known().find(is_free).or_else(|| known().next());
    free.expect("the list holds valid regions")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(regions: &str, witness: Option<&str>) -> Vec<String> {
        let witness = witness.map(|text| text.parse().unwrap());
        let witnesses = witnesses(&regions.parse().unwrap(), witness);
        witnesses.iter().map(|member| format!("{} {}", member.name, member.region)).collect()
    }

    #[test]
    fn voters_are_odd_in_number_and_at_least_three() {
        assert_eq!(names("fr=1", None), ["witness-1 de", "witness-2 de"]);
        assert_eq!(names("fr=2,se=2", None), ["witness de"]);
        assert_eq!(names("fr=1,se=1,it=1", None), [""; 0]);
        assert_eq!(names("fr=1,se=1,it=1,es=1", None), ["witness de"]);
    }

    #[test]
    fn a_witness_stands_where_it_is_told_or_where_no_coordinator_is() {
        assert_eq!(names("fr=1,de=1", None), ["witness nl"]);
        assert_eq!(names("fr=1,se=1", Some("fr")), ["witness fr"]);
        assert_eq!(names("fr=1,se=1", Some("none")), [""; 0]);
        let error = "Fr".parse::<Witness>().unwrap_err();
        assert!(error.contains("\"Fr\"") && error.ends_with("or none"), "{error}");
    }
}
