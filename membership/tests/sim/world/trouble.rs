//! What goes wrong, until trouble ends: crashes, cuts, pauses, slow disks, and an operator who
//! changes the group meanwhile.

use super::*;

impl World {
    pub(super) fn trouble(&mut self) -> Result<(), String> {
        if self.now >= TROUBLE_ENDS {
            self.cut.clear();
            self.loss_percent = 0;
            for machine in self.machines.values_mut() {
                machine.slow_disk = false;
            }
            return Ok(());
        }
        let ids: Vec<u64> = self.machines.keys().copied().collect();
        // Leaders have more to lose.
        let leads = |id: &&u64| self.machines[*id].voter.as_ref().is_some_and(Voter::is_leader);
        let leader = ids.iter().find(leads).copied();
        let any = ids[self.below(ids.len() as u64) as usize];
        let one = leader.filter(|_| self.chance(40)).unwrap_or(any);
        let other = ids[self.below(ids.len() as u64) as usize];
        match self.below(13) {
            0..3 => self.crash(one),
            3 => {
                for id in ids {
                    if self.chance(60) {
                        self.crash(id);
                    }
                }
            }
            4 => self.split(&ids),
            5 => {
                self.cut.insert((one, other));
            }
            6 => {
                self.cut.clear();
                self.loss_percent = 2;
            }
            7 => {
                self.machine(one).paused = true;
                let delay = 100 * MS + self.below(1_500 * MS);
                self.after(delay, Event::Resume { node: one });
            }
            8 => {
                let slow = &mut self.machine(one).slow_disk;
                *slow = !*slow;
            }
            9 => self.loss_percent = 15,
            _ => {
                // The operator tries everyone; only the leader can.
                for to in ids {
                    self.after(MS, Event::Input { to, input: Input::Churn });
                }
            }
        }
        let delay = 50 * MS + self.below(500 * MS);
        self.after(delay, Event::Trouble);
        Ok(())
    }

    fn split(&mut self, ids: &[u64]) {
        let side: BTreeSet<u64> =
            ids.iter().copied().filter(|_| self.random.next_u32().is_multiple_of(2)).collect();
        for a in ids {
            for b in ids {
                if side.contains(a) != side.contains(b) {
                    self.cut.insert((*a, *b));
                }
            }
        }
    }

    pub(super) fn churn(&mut self, id: u64) {
        let dice = self.below(100);
        let pick = self.random.next_u64();
        let ids: Vec<u64> = self.machines.keys().copied().collect();
        let Some(voter) = &mut self.machine(id).voter else { return };
        if !voter.is_leader() {
            return;
        }
        let group = voter.group().clone();
        let nth = |set: &BTreeSet<u64>| set.iter().nth(pick as usize % set.len().max(1)).copied();
        let outside: BTreeSet<u64> = ids.into_iter().filter(|id| !group.contains(*id)).collect();
        let change = match (nth(&group.learners), nth(&group.voters), nth(&outside)) {
            (Some(learner), Some(remove), _) if dice < 50 => {
                Change::Replace { promote: learner, remove }
            }
            (Some(learner), _, _) => Change::Promote(learner),
            (None, Some(remove), _) if group.voters.len() > 3 && dice < 40 => {
                Change::Remove(remove)
            }
            (None, Some(to), None) => {
                // A refusal is an answer too.
                let _ = voter.transfer_leader(to);
                return;
            }
            (_, _, Some(joins)) => Change::AddLearner(joins),
            _ => return,
        };
        let _ = voter.change(change);
    }
}
