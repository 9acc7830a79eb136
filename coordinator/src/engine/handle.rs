//! The way into the engine: requests go in, and whoever asks learns whether they are served.
//!
//! Invariant: whoever has put something where the engine looks rings after that, also when the last
//! handle goes.

use std::sync::Arc;
use std::time::Instant;

use crossbeam_channel::{Sender, TrySendError};
use entente_model::kernels::DeviceError;
use tokio::sync::{mpsc, watch};

use super::{EXTRA_EVENTS, EngineError, Event, Readiness, Request};
use crate::link::Bell;

/// A request, where its events go, and when it came.
pub(super) type Submission = (Request, mpsc::Sender<Event>, Instant);

/// The way in. Cheap to clone.
#[derive(Clone)]
pub struct EngineHandle {
    // Dropped before the ringer, so that the engine finds it gone when it is woken.
    pub(super) submissions: Sender<Submission>,
    pub(super) ringer: Ringer,
    pub(super) readiness: watch::Receiver<Readiness>,
    pub(super) failure: watch::Receiver<Option<DeviceError>>,
}

/// Wakes an engine that waits, also when it is dropped.
#[derive(Clone)]
pub(super) struct Ringer(pub(super) Arc<Bell>);

impl Drop for Ringer {
    fn drop(&mut self) {
        self.0.ring();
    }
}

impl EngineHandle {
    /// Hands a request over; its events come out of the receiver. Dropping the receiver ends it.
    pub fn submit(&self, request: Request) -> Result<mpsc::Receiver<Event>, EngineError> {
        let (sender, receiver) = mpsc::channel(request.stop.max_tokens + EXTRA_EVENTS);
        match self.submissions.try_send((request, sender, Instant::now())) {
            Ok(()) => {
                self.ringer.0.ring();
                Ok(receiver)
            }
            Err(TrySendError::Full(_)) => Err(EngineError::Busy("too many requests wait".into())),
            Err(TrySendError::Disconnected(_)) => Err(EngineError::Stopped),
        }
    }

    /// Whether requests can be served now.
    pub fn readiness(&self) -> watch::Receiver<Readiness> {
        self.readiness.clone()
    }

    /// Why nothing can be computed any more; none while the engine serves.
    pub fn failure(&self) -> watch::Receiver<Option<DeviceError>> {
        self.failure.clone()
    }
}
