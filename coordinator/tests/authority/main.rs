//! Who gets through which door: real sockets, real TLS, every call of the program.
//!
//! One voter and one expert node stand in fr. Sweden has a CA that is believed too, and two
//! processes there that only exist as certificates.

// Everything here is a test, which clippy sees in #[test] functions only.
#![allow(clippy::unwrap_used)]

mod certificates;
mod cluster;
mod spoofing;

use entente_membership::access::{self, RULES};
use entente_proto::identity::Role;

use certificates::Shown;
use cluster::{Cluster, Outcome, name_of};

const ROLES: [Role; 4] = [Role::Coordinator, Role::Expert, Role::Witness, Role::Operator];

#[test]
fn every_call_is_let_through_exactly_where_the_table_lists_it() {
    let cluster = Cluster::start();
    for role in ROLES {
        for region in ["fr", "se"] {
            let caller = name_of(role, region);
            let client = cluster.client(&Shown::Good.of(&cluster, &caller));
            for rule in RULES {
                let listed = access::check(&caller, "fr".parse().unwrap(), rule.call);
                let wanted = if listed.is_ok() { Outcome::Served } else { Outcome::Denied };
                let outcome = cluster.call(&client, rule.call);
                assert_eq!(outcome, wanted, "{caller} calls {}", rule.call);
                let Err(denied) = listed else { continue };
                let trace = cluster.events(|event| {
                    event.call == rule.call && event.caller.as_ref() == Some(&caller)
                });
                let [event] = &trace[..] else { panic!("the trace of {caller}: {trace:?}") };
                assert_eq!((event.allowed, &event.reason), (false, &denied.to_string()));
            }
        }
    }
}

#[test]
fn no_call_is_let_through_with_a_certificate_that_is_wrong_in_any_way() {
    let cluster = Cluster::start();
    let mut turned_away = 0;
    for role in ROLES {
        for shown in Shown::BAD {
            let client = cluster.client(&shown.of(&cluster, &name_of(role, "fr")));
            for rule in RULES {
                let outcome = cluster.call(&client, rule.call);
                assert_eq!(outcome, Outcome::TurnedAway, "{role}, {shown:?}, {}", rule.call);
                turned_away += 1;
            }
        }
    }
    // Whoever is turned away hears of it before it is written down.
    cluster.until("each of them was audited", || {
        cluster.events(|event| event.call == "connection" && !event.allowed).len() >= turned_away
    });
}
