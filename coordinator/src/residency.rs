//! Where the rows of a request may go, decided once and before its prompt is looked at.
//!
//! A policy says in which regions a tenant's rows may be; nothing that it does not name is allowed.
//! A request may narrow that and never widen it. What is left must contain the region of the
//! coordinator that was asked, since it sees the whole prompt and uses the expert nodes of its own
//! region only. Nothing is ever sent elsewhere instead: the client is told where to ask.
//!
//! Pure. What it does not know: HTTP, tenants, keys, who is live.

use std::collections::BTreeMap;
use std::fmt::Write;

use entente_proto::ids::{InvalidId, Region, RegionSet};

/// Where coordinators of other regions are asked, by region.
pub type Endpoints = BTreeMap<Region, String>;

/// What becomes of a request.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Decision {
    /// It is served here; these regions may see its rows.
    Allowed(RegionSet),
    /// No region may serve it, or none that anybody could be sent to.
    Unsatisfiable {
        /// Why, for the client.
        reason: String,
    },
    /// It may be served, but not here.
    WrongEntry {
        /// A region that may.
        region: Region,
        /// Where its coordinator is asked.
        url: String,
    },
}

/// Reads what a header says: regions with commas between them.
///
/// # Errors
/// Names the first that is none.
pub fn parse(list: &str) -> Result<RegionSet, InvalidId> {
    list.split(',').map(|code| code.trim().parse()).collect()
}

/// To what a request narrows its tenant's policy by its body and by its header.
pub fn both(body: Option<RegionSet>, header: Option<RegionSet>) -> Option<RegionSet> {
    match (body, header) {
        (Some(body), Some(header)) => Some(body.intersection(&header).copied().collect()),
        (body, header) => body.or(header),
    }
}

/// Decides on a request that arrived in `home`, of somebody who is bound by `policy` and narrows it
/// to `narrowing`.
pub fn decide(
    policy: &RegionSet,
    narrowing: Option<&RegionSet>,
    home: Region,
    endpoints: &Endpoints,
) -> Decision {
    let allowed: RegionSet = match narrowing {
        Some(narrowing) => policy.intersection(narrowing).copied().collect(),
        None => policy.clone(),
    };
    if allowed.contains(&home) {
        return Decision::Allowed(allowed);
    }
    let elsewhere = allowed.iter().find_map(|region| Some((*region, endpoints.get(region)?)));
    match elsewhere {
        Some((region, url)) => Decision::WrongEntry { region, url: url.clone() },
        None => Decision::Unsatisfiable { reason: reason(policy, narrowing, &allowed, home) },
    }
}

fn reason(
    policy: &RegionSet,
    narrowing: Option<&RegionSet>,
    allowed: &RegionSet,
    home: Region,
) -> String {
    let policy = list(policy);
    match narrowing {
        Some(narrowing) if allowed.is_empty() => {
            let narrowing = list(narrowing);
            format!("the request is narrowed to {narrowing}, the policy allows {policy}")
        }
        _ if allowed.is_empty() => "the policy allows no region".to_owned(),
        _ => {
            let allowed = list(allowed);
            format!(
                "the request may be served in {allowed}, this is {home}, and no entry is known there"
            )
        }
    }
}

/// Regions for people.
pub fn list(regions: &RegionSet) -> String {
    let mut text = String::new();
    for region in regions {
        let comma = if text.is_empty() { "" } else { ", " };
        let _ = write!(text, "{comma}{region}");
    }
    if text.is_empty() { "no region".to_owned() } else { text }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn regions(codes: &str) -> RegionSet {
        codes.split_whitespace().map(|code| code.parse().unwrap()).collect()
    }

    /// In fr, with an entry in se and none in de.
    fn decided(policy: &str, narrowing: Option<&str>) -> Decision {
        let narrowing = narrowing.map(regions);
        let endpoints = [("fr", "https://fr"), ("se", "https://se")];
        let endpoints = endpoints.map(|(code, url)| (code.parse().unwrap(), url.to_owned()));
        decide(&regions(policy), narrowing.as_ref(), "fr".parse().unwrap(), &endpoints.into())
    }

    #[test]
    fn a_request_is_served_where_policy_and_narrowing_both_allow_it_and_nowhere_else() {
        let allowed = |codes| Decision::Allowed(regions(codes));
        assert_eq!(decided("fr", None), allowed("fr"));
        assert_eq!(decided("fr se", None), allowed("fr se"));
        assert_eq!(decided("fr se", Some("fr")), allowed("fr"));
        assert_eq!(decided("fr se", Some("fr de")), allowed("fr"));
        assert_eq!(decided("fr", Some("fr se de")), allowed("fr"), "nothing is widened");
    }

    #[test]
    fn who_may_be_served_elsewhere_only_is_told_where() {
        let se =
            Decision::WrongEntry { region: "se".parse().unwrap(), url: "https://se".to_owned() };
        for (policy, narrowing) in [("se", None), ("fr se", Some("se")), ("de se", Some("de se"))] {
            assert_eq!(decided(policy, narrowing), se, "{policy} {narrowing:?}");
        }
    }

    #[test]
    fn who_may_be_served_nowhere_is_told_why() {
        let cases = [
            ("", None, "the policy allows no region"),
            ("", Some("fr"), "the request is narrowed to fr, the policy allows no region"),
            ("fr", Some("se"), "the request is narrowed to se, the policy allows fr"),
            ("fr", Some(""), "the request is narrowed to no region, the policy allows fr"),
            (
                "de",
                None,
                "the request may be served in de, this is fr, and no entry is known there",
            ),
        ];
        for (policy, narrowing, reason) in cases {
            let reason = reason.to_owned();
            assert_eq!(decided(policy, narrowing), Decision::Unsatisfiable { reason });
        }
    }

    /// Over every policy, narrowing and home of three regions.
    #[test]
    fn what_is_allowed_is_never_more_than_policy_or_narrowing_and_always_contains_home() {
        let all = regions("de fr se");
        let subset = |bits: usize| -> RegionSet {
            let chosen = all.iter().enumerate().filter(|(at, _)| bits >> at & 1 == 1);
            chosen.map(|(_, region)| *region).collect()
        };
        for bits in 0..8 * 8 * 3 {
            let (policy, narrowing) = (subset(bits % 8), subset(bits / 8 % 8));
            let home = *all.iter().nth(bits / 64).unwrap();
            let both: RegionSet = policy.intersection(&narrowing).copied().collect();
            let urls = all.iter().map(|region| (*region, region.to_string())).collect();
            match decide(&policy, Some(&narrowing), home, &urls) {
                Decision::Allowed(allowed) => {
                    assert!(allowed == both && allowed.contains(&home));
                }
                Decision::WrongEntry { region, .. } => {
                    assert!(both.contains(&region) && !both.contains(&home));
                }
                Decision::Unsatisfiable { .. } => assert_eq!(both, regions("")),
            }
        }
    }
}
