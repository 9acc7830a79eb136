//! `entente expert-node`: one expert node, as its configuration file describes it.

use clap::Args;
use entente_expert_node::Listeners;
use entente_model::kernels::DeviceId;

use crate::exit::DeviceFailed;
use crate::role::{self, RoleArgs};

/// The flags of `entente expert-node`.
#[derive(Debug, Args)]
pub struct ExpertNodeArgs {
    #[command(flatten)]
    role: RoleArgs,

    /// Where it computes: cpu, or cuda:N for the CUDA device of this number; what the configuration
    /// says if absent.
    #[arg(long, env = "ENTENTE_DEVICE", value_name = "DEVICE")]
    device: Option<DeviceId>,
}

/// Runs until a signal, or until the supervisor lets go. In a live cluster the first signal makes
/// the node leave: it serves until what it holds is elsewhere.
///
/// # Errors
/// [`DeviceFailed`] when nothing but the device keeps the node from starting or going on.
pub fn run(args: ExpertNodeArgs) -> anyhow::Result<()> {
    let [exchange, metrics] = role::inherited_listeners()?;
    let listeners = Listeners { exchange, metrics };
    let mut config: entente_expert_node::Config = role::load_config(&args.role.config)?;
    config.device = args.device.unwrap_or(config.device);
    role::run_leaving(&args.role, async |reporter, leave, stop| {
        let loading = reporter.clone();
        let ended = entente_expert_node::run(
            config,
            listeners,
            move |done, total| loading.loading(done, total),
            move |ready| reporter.ready(ready.address, ready.experts, ready.weights_bytes),
            leave,
            stop,
        );
        ended.await.map_err(|error| match error.is_of_device() {
            true => DeviceFailed(error.to_string()).into(),
            false => anyhow::Error::from(error),
        })
    })
}
