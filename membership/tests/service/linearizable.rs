//! Several clients change and read records while leaders are killed; what they saw must be what one
//! machine could have shown that does one thing after the other.

use std::collections::{BTreeMap, HashSet};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use entente_membership::client::{Client, ClientError};
use entente_membership::service::Membership;
use entente_membership::state::{Applied, Expect, RecordKind, RefusedCode};

use crate::world::{World, put};

const CLIENTS: usize = 4;
const KEYS: [&str; 2] = ["a", "b"];
const ROUNDS: usize = 6;
/// Between two events.
const WORK: Duration = Duration::from_millis(150);

/// What a client did to a record. The revision that the machine gives stands for the whole record,
/// as none is given twice; 0 is a record that is not there.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Deed {
    /// Written where it had `from`, now it has `to`.
    Wrote { from: u64, to: u64 },
    /// Refused: it did not have `from`.
    Refused { from: u64 },
    /// Written where it had `from`, or never.
    Unknown { from: u64 },
    /// Read.
    Read { have: u64 },
}

#[derive(Debug, Clone, Copy)]
pub struct Operation {
    pub called: u64,
    /// `u64::MAX`: it may take effect at any time later, or never.
    pub returned: u64,
    pub deed: Deed,
}

/// Whether there is an order of the operations of one record that keeps to time, and in which each
/// sees what those before it left (Wing and Gong, Testing and Verifying Concurrent Objects, 1993;
/// with the cache of seen configurations of Lowe, Testing for Linearizability, 2017).
pub fn linearizable(history: &[Operation]) -> bool {
    let mut operations = history.to_vec();
    operations.sort_by_key(|operation| operation.called);
    search(&operations, &mut vec![false; operations.len()], 0, &mut HashSet::new())
}

/// The revision after an unknown write is not known either. Whoever sees a revision that nobody is
/// known to have written may see that of an unknown write, and only one; so it is taken for it.
fn search(
    operations: &[Operation],
    done: &mut Vec<bool>,
    revision: u64,
    seen: &mut HashSet<(Vec<bool>, u64)>,
) -> bool {
    let pending = |i: &usize| !done[*i];
    let must = (0..operations.len()).filter(pending);
    if must.clone().all(|i| matches!(operations[i].deed, Deed::Unknown { .. })) {
        return true;
    }
    if !seen.insert((done.clone(), revision)) {
        return false;
    }
    // Nothing may come before what had returned when it was called.
    let first_return = must.clone().map(|i| operations[i].returned).min().unwrap_or(u64::MAX);
    let candidates: Vec<usize> = must.filter(|i| operations[*i].called <= first_return).collect();
    for i in candidates {
        for after in outcomes(operations, operations[i].deed, revision) {
            done[i] = true;
            if search(operations, done, after, seen) {
                return true;
            }
            done[i] = false;
        }
    }
    false
}

/// The revisions that the record may have after it; none if it cannot take place now.
fn outcomes(operations: &[Operation], deed: Deed, revision: u64) -> Vec<u64> {
    match deed {
        Deed::Wrote { from, to } if from == revision => vec![to],
        Deed::Refused { from } if from != revision => vec![revision],
        Deed::Read { have } if have == revision => vec![revision],
        Deed::Unknown { from } if from == revision => unclaimed(operations, revision),
        // Applied where it did not fit: refused.
        Deed::Unknown { .. } => vec![revision],
        _ => Vec::new(),
    }
}

/// Later revisions that were seen and that nobody knows to have written.
fn unclaimed(operations: &[Operation], revision: u64) -> Vec<u64> {
    let written: HashSet<u64> = operations
        .iter()
        .filter_map(|operation| match operation.deed {
            Deed::Wrote { to, .. } => Some(to),
            _ => None,
        })
        .collect();
    let seen = operations.iter().map(|operation| match operation.deed {
        Deed::Wrote { from, .. } | Deed::Refused { from } | Deed::Unknown { from } => from,
        Deed::Read { have } => have,
    });
    let mut unclaimed: Vec<u64> =
        seen.filter(|seen| *seen > revision && !written.contains(seen)).collect();
    unclaimed.sort_unstable();
    unclaimed.dedup();
    // One that nobody ever saw.
    unclaimed.push(u64::MAX);
    unclaimed
}

#[test]
fn the_checker_takes_what_one_machine_could_show_and_refuses_the_rest() {
    let at = |called, returned, deed| Operation { called, returned, deed };
    let write = |from, to| Deed::Wrote { from, to };
    let read = |have| Deed::Read { have };
    let good: &[&[Operation]] = &[
        &[at(0, 1, write(0, 1)), at(2, 3, read(1))],
        // They overlap, so either may come first.
        &[at(0, 5, write(0, 1)), at(1, 2, read(0)), at(3, 4, read(1))],
        &[at(0, 9, write(0, 1)), at(1, 2, Deed::Refused { from: 7 })],
        // The unknown write took place after its client had given up.
        &[at(0, u64::MAX, Deed::Unknown { from: 0 }), at(1, 2, read(0)), at(3, 4, read(5))],
        &[at(0, u64::MAX, Deed::Unknown { from: 0 }), at(1, 2, read(0))],
    ];
    let bad: &[&[Operation]] = &[
        // A stale read.
        &[at(0, 1, write(0, 1)), at(2, 3, read(0))],
        // A write that was lost.
        &[at(0, 1, write(0, 1)), at(2, 3, write(0, 2))],
        // A write that was applied twice.
        &[at(0, 1, write(0, 1)), at(2, 3, read(1)), at(4, 5, read(2))],
        // A read that goes back.
        &[at(0, 9, write(0, 1)), at(1, 2, read(1)), at(3, 4, read(0))],
        // Refused, although it fitted.
        &[at(0, 1, write(0, 1)), at(2, 3, Deed::Refused { from: 1 })],
    ];
    for history in good {
        assert!(linearizable(history), "{history:?} was refused");
    }
    for history in bad {
        assert!(!linearizable(history), "{history:?} was taken");
    }
}

/// The readers' doors to the voters, which come and go.
type Doors = Arc<Mutex<Vec<Option<Membership>>>>;
type History = Arc<Mutex<BTreeMap<&'static str, Vec<Operation>>>>;

struct Worker {
    number: usize,
    client: Client,
    doors: Doors,
    history: History,
    began: Instant,
    over: Arc<AtomicBool>,
}

impl Worker {
    fn now(&self) -> u64 {
        u64::try_from(self.began.elapsed().as_nanos()).unwrap()
    }

    async fn run(self) {
        let mut latest: BTreeMap<&str, u64> = KEYS.iter().map(|key| (*key, 0)).collect();
        for turn in self.number.. {
            if self.over.load(Ordering::Relaxed) {
                return;
            }
            let key = KEYS[turn / 2 % KEYS.len()];
            let called = self.now();
            let deed = if turn.is_multiple_of(2) {
                self.read(key, turn).await
            } else {
                self.write(key, latest[key]).await
            };
            let Some(deed) = deed else { continue };
            let returned = if matches!(deed, Deed::Unknown { .. }) { u64::MAX } else { self.now() };
            if let Deed::Read { have } | Deed::Wrote { to: have, .. } = deed {
                latest.insert(key, have);
            }
            let operation = Operation { called, returned, deed };
            self.history.lock().unwrap().entry(key).or_default().push(operation);
        }
    }

    async fn read(&self, key: &str, turn: usize) -> Option<Deed> {
        let door = {
            let doors = self.doors.lock().unwrap();
            doors[turn / 2 % doors.len()].clone()?
        };
        let state = door.read(Duration::from_millis(300)).await?;
        let record = state.record(RecordKind::Tenant, key);
        Some(Deed::Read { have: record.map_or(0, |record| record.revision) })
    }

    async fn write(&self, key: &str, from: u64) -> Option<Deed> {
        let command = put(key, &self.number.to_string(), Some(from));
        let short = Duration::from_millis(400);
        match self.client.propose(short, Expect::default(), command).await {
            Ok(Applied::Revision(to)) => Some(Deed::Wrote { from, to }),
            Err(ClientError::Refused(refused)) if refused.code == RefusedCode::StaleRevision => {
                Some(Deed::Refused { from })
            }
            Err(ClientError::Deadline(_)) => None,
            _ => Some(Deed::Unknown { from }),
        }
    }
}

#[test]
fn what_clients_see_is_linearizable_while_leaders_are_killed() {
    let mut world = World::of(3);
    world.leader();
    let doors: Doors =
        Arc::new(Mutex::new((0..3).map(|i| Some(world.handle(i).clone())).collect()));
    let (history, over) = (History::default(), Arc::new(AtomicBool::new(false)));
    let began = Instant::now();
    let workers: Vec<_> = (0..CLIENTS)
        .map(|number| {
            let client = world.operator();
            let (doors, history, over) = (doors.clone(), history.clone(), over.clone());
            let worker = Worker { number, client, doors, history, began, over };
            world.runtime.spawn(worker.run())
        })
        .collect();
    for _ in 0..ROUNDS {
        let leader = world.leader();
        doors.lock().unwrap()[leader] = None;
        world.end(leader);
        // Work goes on under the next leader, and then with all three.
        world.leader();
        std::thread::sleep(WORK);
        world.disk_given_up(leader);
        world.start(leader);
        doors.lock().unwrap()[leader] = Some(world.handle(leader).clone());
        std::thread::sleep(WORK);
    }
    over.store(true, Ordering::Relaxed);
    for worker in workers {
        world.runtime.block_on(worker).unwrap();
    }
    let history = history.lock().unwrap();
    for key in KEYS {
        let operations = &history[key];
        let wrote = |operation: &&Operation| matches!(operation.deed, Deed::Wrote { .. });
        let count = operations.iter().filter(wrote).count();
        println!("record {key}: {} operations, {count} of them writes", operations.len());
        assert!(count > ROUNDS, "too little was written to say anything");
        assert!(linearizable(operations), "record {key}: {operations:?}");
    }
}
