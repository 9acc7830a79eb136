//! What was recorded of steps that decode.
//!
//! A step is launched in segments: from where the host has given something to where it wants
//! something back. Between two exchanges that is the end of a layer and the beginning of the next; a
//! model of dense layers has one segment a step. A segment of a step of some [`Shape`] is always the
//! same launches, and is recorded when the shape comes for the second time: one that comes once would
//! pay for nothing.
//!
//! Graphs save time and change no bit. So where the driver has no room for one, or does not record,
//! steps go on without, launch by launch.

use entente_model::kernels::DeviceError;
use entente_model::kernels::cuda::{Graph, Stream};

use super::compute::Work;
use super::shape::Shape;

/// Shapes whose graphs are kept, those that came last; a shape has as many graphs as the model has
/// layers with experts, and one.
const GRAPH_SHAPES_MAX: usize = 32;

/// See the module.
#[derive(Default)]
pub(super) struct Graphs {
    /// The last one is that of the step, if it has one.
    shapes: Vec<Recorded>,
    /// Whether the step's shape has come before, so that graphs of it are made and used.
    in_use: bool,
    given_up: bool,
}

struct Recorded {
    shape: Shape,
    graphs: Vec<(Vec<Work>, Graph)>,
}

impl Graphs {
    /// A step of this shape begins, or one that has none.
    pub fn begin(&mut self, shape: Option<Shape>) {
        self.in_use = false;
        let Some(shape) = shape.filter(|_| !self.given_up) else { return };
        let known = self.shapes.iter().position(|recorded| recorded.shape == shape);
        self.in_use = known.is_some();
        let recorded = match known {
            Some(at) => self.shapes.remove(at),
            None => Recorded { shape, graphs: Vec::new() },
        };
        if self.shapes.len() >= GRAPH_SHAPES_MAX {
            self.shapes.remove(0);
        }
        self.shapes.push(recorded);
    }

    /// Launches a segment of the step as a graph, which `record` issues if there is none yet. False
    /// if the segment is to be issued without.
    ///
    /// # Errors
    /// The device is lost.
    pub fn launch(
        &mut self,
        stream: &Stream,
        segment: &[Work],
        record: impl FnOnce() -> Result<(), DeviceError>,
    ) -> Result<bool, DeviceError> {
        let recorded = self.shapes.last_mut().filter(|_| self.in_use);
        // Rows that are wanted one by one are hardly ever the same ones.
        let whole = |shape: Shape| segment.iter().all(|work| work.is_of(&(0..shape.rows)));
        let Some(recorded) = recorded.filter(|recorded| whole(recorded.shape)) else {
            return Ok(false);
        };
        match recorded.launch(stream, segment, record) {
            Ok(()) => Ok(true),
            Err(error @ (DeviceError::Unsupported(_) | DeviceError::OutOfMemory { .. })) => {
                tracing::warn!(%error, "no graphs are recorded any more; steps are as exact without");
                *self = Self { given_up: true, ..Self::default() };
                Ok(false)
            }
            Err(error) => Err(error),
        }
    }
}

impl Recorded {
    fn launch(
        &mut self,
        stream: &Stream,
        segment: &[Work],
        record: impl FnOnce() -> Result<(), DeviceError>,
    ) -> Result<(), DeviceError> {
        if let Some((_, graph)) = self.graphs.iter().find(|(own, _)| own == segment) {
            return stream.launch(graph);
        }
        let graph = stream.capture(record)?;
        stream.launch(&graph)?;
        self.graphs.push((segment.to_vec(), graph));
        Ok(())
    }
}
