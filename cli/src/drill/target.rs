//! Whom the strikes of a fault are for. Pure, and drawn from the seed of the scenario.

use entente_proto::ids::NodeName;

use super::scenario::{Fault, Pick, Target};
use crate::cluster::data_dir::ProcessEntry;
use crate::exit::Misuse;
use crate::random::Random;

/// For each strike of `fault`, the names of the processes that it is for; names are empty for a
/// fault that is not about processes.
///
/// # Errors
/// When nothing matches the target.
pub fn strikes(
    fault: &Fault,
    processes: &[ProcessEntry],
    random: &mut Random,
) -> Result<Vec<Vec<NodeName>>, Misuse> {
    let rounds = fault.repeat as usize;
    let Some(target) = &fault.target else { return Ok(vec![Vec::new(); rounds]) };
    let names = matching(target, processes);
    if names.is_empty() {
        let known: Vec<String> = processes.iter().map(|process| process.name.to_string()).collect();
        return Err(Misuse(format!(
            "no process matches {target:?}; the cluster has {}",
            known.join(", ")
        )));
    }
    Ok(match target.pick {
        Pick::All => vec![names; rounds],
        Pick::One => (0..rounds).map(|_| vec![names[random.below(names.len())].clone()]).collect(),
        Pick::Each => {
            let round = names.iter().map(|name| vec![name.clone()]);
            std::iter::repeat_n(round, rounds).flatten().collect()
        }
    })
}

/// The names that match, in the order of the cluster's file.
pub fn matching(target: &Target, processes: &[ProcessEntry]) -> Vec<NodeName> {
    let matches = |process: &&ProcessEntry| {
        target.name.as_ref().is_none_or(|name| *name == process.name)
            && target.role.is_none_or(|role| role == process.role)
            && target.region.is_none_or(|region| region == process.region)
    };
    processes.iter().filter(matches).map(|process| process.name.clone()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cluster::plan::Regions;

    fn check(target: &str, repeat: u32, expected: &[&[&str]]) {
        let members = "fr=2,se=1".parse::<Regions>().unwrap().members();
        let processes = members.into_iter().map(|member| ProcessEntry {
            name: member.name,
            role: member.role,
            region: member.region,
            pid: 1,
            address: "127.0.0.1:1".parse().unwrap(),
            metrics: None,
        });
        let processes: Vec<ProcessEntry> = processes.collect();
        let text = format!("at: 1\naction: kill\nrepeat: {repeat}\n{target}");
        let fault: Fault = serde_saphyr::from_str(&text).unwrap();
        let strikes = strikes(&fault, &processes, &mut Random::new(1)).unwrap();
        let strikes: Vec<Vec<String>> =
            strikes.iter().map(|names| names.iter().map(NodeName::to_string).collect()).collect();
        assert_eq!(strikes, expected, "{target}");
    }

    #[test]
    fn a_target_is_a_name_or_what_several_have_in_common() {
        check("", 2, &[&[], &[]]);
        check("target: se-expert-1", 1, &[&["se-expert-1"]]);
        let each = "target: {role: expert-node, region: fr, pick: each}";
        let round: [&[&str]; 2] = [&["fr-expert-1"], &["fr-expert-2"]];
        check(each, 2, &[round, round].concat());
        check("target: {region: se, pick: all}", 1, &[&["se-coordinator", "se-expert-1"]]);
    }

    #[test]
    fn who_is_struck_follows_from_the_seed() {
        let fault = "at: 1\naction: kill\ntarget: {region: fr}\nrepeat: 20";
        let fault: Fault = serde_saphyr::from_str(fault).unwrap();
        let process = |number| ProcessEntry {
            name: format!("fr-expert-{number}").parse().unwrap(),
            role: crate::cluster::plan::Role::ExpertNode,
            region: "fr".parse().unwrap(),
            pid: 1,
            address: "127.0.0.1:1".parse().unwrap(),
            metrics: None,
        };
        let processes = [process(1), process(2), process(3)];
        let drawn = |seed| strikes(&fault, &processes, &mut Random::new(seed)).unwrap();
        assert_eq!(drawn(1), drawn(1));
        assert_ne!(drawn(1), drawn(2));
        assert!(strikes(&fault, &[], &mut Random::new(1)).is_err());
    }
}
