//! `entente coordinator`: one coordinator, as its configuration file describes it.

use crate::role::{self, RoleArgs};

/// Runs until a signal, or until the supervisor lets go.
pub fn run(args: RoleArgs) -> anyhow::Result<()> {
    let [http, control] = role::inherited_listeners()?;
    let config: entente_coordinator::Config = role::load_config(&args.config)?;
    role::run(&args, |reporter, shutdown| {
        let loading = reporter.clone();
        entente_coordinator::run(
            config,
            http,
            control,
            move |done, total| loading.loading(done, total),
            move |ready| reporter.ready(ready.address, ready.experts, ready.weights_bytes),
            shutdown,
        )
    })
}
