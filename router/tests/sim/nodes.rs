//! Expert nodes: what they compute, and how they fail to.

use bytes::Bytes;
use entente_proto::frame::{Answer, Dispatch, Dtype, Refusal};
use entente_proto::ids::{ExpertId, Incarnation, LayerId};
use entente_sim::Random;

/// One node and what is wrong with it.
#[derive(Debug, Clone)]
pub struct Node {
    pub incarnation: Incarnation,
    /// Tells connections apart: what travels on a broken one is lost.
    pub link: u64,
    /// Microseconds for a frame, at least.
    pub pace_us: u64,
    /// An earlier start of it that is still there and answers what it should not have got.
    pub zombie: Option<Incarnation>,
    pub is_draining: bool,
    pub hangs_until_us: u64,
}

impl Node {
    pub fn new(pace_us: u64) -> Self {
        Self {
            incarnation: Incarnation(1),
            link: 0,
            pace_us,
            zombie: None,
            is_draining: false,
            hangs_until_us: 0,
        }
    }

    /// The answer to a frame. A frame of another start is refused; the epochs may differ, because
    /// commits reach processes at different moments.
    pub fn answer(&self, random: &mut Random, frame: &Dispatch, faulty: bool) -> Answer {
        let mut fence = frame.fence;
        fence.incarnation = self.incarnation;
        let refuse = |refusal| answer(frame, Err(refusal));
        if frame.fence.incarnation != self.incarnation {
            return refuse(Refusal::StaleFence(Box::new(fence)));
        }
        if self.is_draining {
            return refuse(Refusal::Draining);
        }
        match random.below(if faulty { 40 } else { u64::MAX }) {
            0 => refuse(Refusal::Busy),
            1 => refuse(Refusal::Expired),
            2 => refuse(Refusal::NotHeld("one".to_owned())),
            3 => {
                let mut rows = compute(frame);
                let len = if random.one_in(2) { rows.len() - 1 } else { rows.len() + 4 };
                rows.resize(len, 0);
                answer(frame, Ok(rows.into()))
            }
            _ => answer(frame, Ok(compute(frame).into())),
        }
    }

    /// What an earlier start says: rows of other weights, under its own fence.
    pub fn answer_of_zombie(&self, frame: &Dispatch) -> Option<Answer> {
        let incarnation = self.zombie?;
        let mut rows = compute(frame);
        rows.iter_mut().step_by(3).for_each(|byte| *byte ^= 0x11);
        let mut late = answer(frame, Ok(rows.into()));
        late.fence = late.fence.map(|fence| entente_proto::ids::Fence { incarnation, ..fence });
        Some(late)
    }
}

fn answer(frame: &Dispatch, result: Result<Bytes, Refusal>) -> Answer {
    Answer { exchange: frame.exchange, fence: Some(frame.fence), result }
}

/// One output row for each assignment, encoded.
fn compute(frame: &Dispatch) -> Vec<u8> {
    let size = frame.hidden * frame.dtype.size();
    let mut rows = Vec::with_capacity(frame.answer_len());
    for assignment in &frame.assignments {
        let start = usize::from(assignment.row) * size;
        let row = &frame.rows[start..start + size];
        rows.extend(output(frame.dtype, frame.layer, assignment.expert, frame.hidden, row));
    }
    rows
}

/// What an expert makes of a row: any function will do that tells layers, experts and rows apart.
pub fn output(
    dtype: Dtype,
    layer: LayerId,
    expert: ExpertId,
    hidden: usize,
    row: &[u8],
) -> Vec<u8> {
    let mut values = vec![0.0; hidden];
    dtype.decode(row, &mut values);
    let factor = 1.0 + f32::from(expert.0) + 0.1 * f32::from(layer.0);
    let out: Vec<f32> =
        values.iter().enumerate().map(|(i, x)| (x * factor).sin() * factor + i as f32).collect();
    let mut encoded = Vec::new();
    dtype.encode(&out, &mut encoded);
    encoded
}
