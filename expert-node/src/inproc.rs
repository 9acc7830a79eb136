//! The link to a node in the same process. The frame is handed over as it is; rows were rounded
//! when it was made, so that results are the same bits as over the network.

use std::sync::Arc;

use entente_proto::frame::Dispatch;
use entente_proto::ids::NodeId;
use entente_proto::link::{Link, LinkEvent, LinkEvents, NotSent};

use crate::node::NodeHandle;

/// A link that is up for as long as it exists.
pub struct InprocLink {
    node: NodeId,
    handle: NodeHandle,
    events: Arc<dyn LinkEvents>,
}

impl InprocLink {
    /// Opens the link; `events` hears that it is up before this returns.
    pub fn open(node: NodeId, handle: NodeHandle, events: Arc<dyn LinkEvents>) -> Self {
        let up = LinkEvent::Up { info: handle.info(), certificate_sha256: [0; 32] };
        events.on_event(node, up);
        Self { node, handle, events }
    }
}

impl Link for InprocLink {
    fn send(&self, frame: Dispatch) -> Result<(), NotSent> {
        let (node, events) = (self.node, self.events.clone());
        let reply = move |answer| events.on_event(node, LinkEvent::Answer(answer));
        // The engine waits for the answer anyway.
        self.handle.compute(frame, Box::new(reply));
        Ok(())
    }

    fn is_asynchronous(&self) -> bool {
        false
    }
}
