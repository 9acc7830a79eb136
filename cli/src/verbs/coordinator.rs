//! `entente coordinator`: one coordinator, as its configuration file describes it.

use clap::Args;
use entente_model::kernels::DeviceId;

use crate::exit::DeviceFailed;
use crate::role::{self, RoleArgs};

/// The flags of `entente coordinator`.
#[derive(Debug, Args)]
pub struct CoordinatorArgs {
    #[command(flatten)]
    role: RoleArgs,

    /// Where its part of the model is computed: cpu, or cuda:N for the CUDA device of this number;
    /// what the configuration says if absent.
    #[arg(long, env = "ENTENTE_DEVICE", value_name = "DEVICE")]
    device: Option<DeviceId>,
}

/// Runs until a signal, or until the supervisor lets go.
///
/// # Errors
/// [`DeviceFailed`] when nothing but the device keeps the coordinator from starting or going on.
pub fn run(args: CoordinatorArgs) -> anyhow::Result<()> {
    let [http, control] = role::inherited_listeners()?;
    let mut config: entente_coordinator::Config = role::load_config(&args.role.config)?;
    config.device = args.device.unwrap_or(config.device);
    role::run(&args.role, async |reporter, shutdown| {
        let loading = reporter.clone();
        let ended = entente_coordinator::run(
            config,
            http,
            control,
            move |done, total| loading.loading(done, total),
            move |ready| reporter.ready(ready.address, ready.experts, ready.weights_bytes),
            shutdown,
        );
        ended.await.map_err(|error| match error {
            entente_coordinator::Error::Device { .. } => DeviceFailed(error.to_string()).into(),
            error => anyhow::Error::from(error),
        })
    })
}
