//! `entente expert-node`: one expert node, as its configuration file describes it.

use entente_expert_node::Listeners;

use crate::role::{self, RoleArgs};

/// Runs until a signal, or until the supervisor lets go. In a live cluster the first signal makes
/// the node leave: it serves until what it holds is elsewhere.
pub fn run(args: RoleArgs) -> anyhow::Result<()> {
    let [exchange, metrics] = role::inherited_listeners()?;
    let listeners = Listeners { exchange, metrics };
    let config: entente_expert_node::Config = role::load_config(&args.config)?;
    role::run_leaving(&args, |reporter, leave, stop| {
        let loading = reporter.clone();
        entente_expert_node::run(
            config,
            listeners,
            move |done, total| loading.loading(done, total),
            move |ready| reporter.ready(ready.address, ready.experts, ready.weights_bytes),
            leave,
            stop,
        )
    })
}
