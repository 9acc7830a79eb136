//! The network: it loses, delays, reorders, doubles and damages what voters say to each other.

use super::*;

impl World {
    pub(super) fn send(&mut self, messages: Vec<wire::RaftEnvelope>) -> Result<(), String> {
        for envelope in messages {
            if let Some(message) = &envelope.message {
                self.oracle.sends(message)?;
            }
            let (from, to) = (envelope.from, envelope.to);
            if !self.machines.contains_key(&to) || self.cut.contains(&(from, to)) {
                continue;
            }
            if self.chance(self.loss_percent) {
                continue;
            }
            let copies = if self.chance(2) { 2 } else { 1 };
            for _ in 0..copies {
                let mut envelope = envelope.clone();
                let troubled = self.now < TROUBLE_ENDS;
                let snapshot = envelope.message.as_mut().and_then(|m| m.snapshot.as_mut());
                if let Some(snapshot) = snapshot.filter(|_| troubled)
                    && self.random.next_u32().is_multiple_of(3)
                {
                    bugs::damaged(self.bug, snapshot);
                }
                // Now and then one takes so long that later ones overtake it.
                let late = self.chance(3);
                let delay = 500 + self.below(if late { 400 * MS } else { 8 * MS });
                self.after(delay, Event::Input { to, input: Input::Message(Box::new(envelope)) });
            }
        }
        Ok(())
    }
}
