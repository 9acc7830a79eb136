//! Whether the device that a node computes on still does what it is asked.
//!
//! A device that failed once is not asked again: what it holds cannot be trusted, and only another
//! process brings it back. So the first failure stays. From that moment on every frame is refused
//! unread, which sends coordinators to other replicas within one round trip, and whoever runs the
//! node ends it.
//!
//! What it does not know: what to do about it.

use entente_model::kernels::DeviceError;
use tokio::sync::watch;

/// See the module.
#[derive(Debug, Default)]
pub(crate) struct Health(watch::Sender<Option<DeviceError>>);

impl Health {
    /// Takes note that the device failed. Whoever comes first says why.
    pub(crate) fn fail(&self, error: DeviceError) {
        self.0.send_if_modified(|failure| {
            let first = failure.is_none();
            if first {
                tracing::error!(%error, "the device failed; every frame is refused from here on");
                *failure = Some(error);
            }
            first
        });
    }

    /// Why the device cannot be used any more, if so.
    pub(crate) fn failure(&self) -> Option<DeviceError> {
        self.0.borrow().clone()
    }

    /// Whether it cannot.
    pub(crate) fn has_failed(&self) -> bool {
        self.0.borrow().is_some()
    }

    /// Resolves once it has.
    pub(crate) fn failed(&self) -> impl Future<Output = ()> + Send + use<> {
        let mut failure = self.0.subscribe();
        async move {
            if failure.wait_for(Option::is_some).await.is_err() {
                // The node is gone, and nobody waits for its device.
                std::future::pending::<()>().await;
            }
        }
    }
}
