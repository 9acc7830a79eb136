//! Kernels and sampling spread over threads: nobody can tell from an answer how many there are.

use entente_coordinator::config::{Config, EngineConfig};

use crate::setup::*;

#[test]
fn answers_do_not_depend_on_the_number_of_threads() {
    let roster = roster(&[listener(), listener()], 1);
    let one = config(&roster, Transport::Inproc, EngineConfig::default());
    let engine = Engine::start(&Config { threads: Some(3), ..one });
    assert!(engine.answers() == reference());
}
