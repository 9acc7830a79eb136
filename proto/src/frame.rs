//! Exchange frames whose lengths are known to be right.
//!
//! `rows x hidden x sizeof(dtype)` must equal the byte length exactly; the product is checked
//! before anything of that size is allocated, since the numbers come from a peer.

mod dtype;

use bytes::Bytes;

use crate::ids::{
    ExchangeId, ExpertId, Fence, Incarnation, LayerId, MembershipEpoch, ModelDigest,
    PlacementEpoch, Region, RegionSet, RequestId,
};
use crate::wire;

pub use self::dtype::Dtype;

/// Most rows in one frame; row numbers are 16 bits on the wire.
pub const ROWS_MAX: usize = 4_096;
/// Most (row, expert) pairs in one frame.
pub const ASSIGNMENTS_MAX: usize = ROWS_MAX * 16;
/// Widest row that is accepted, in values.
pub const HIDDEN_MAX: usize = 65_536;
/// Most bytes of rows in a frame, and in the answer to it. It bounds what a message may make its
/// receiver allocate; bigger exchanges are split into several frames.
pub const ROWS_BYTES_MAX: usize = 32 << 20;
/// Bytes of one run of assignments of one request.
const RUN_BYTES: usize = 18;
/// Most bytes of a whole message: rows, assignments, whose they are, and the few fields beside them.
pub const MESSAGE_BYTES_MAX: usize =
    ROWS_BYTES_MAX + ASSIGNMENTS_MAX * (4 + RUN_BYTES) + (64 << 10);
/// Most regions that a frame may list.
pub const REGIONS_MAX: usize = 32;

/// Why a frame is not acceptable. The text names the field.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum FrameError {
    /// A field that must be there is not.
    #[error("{0} is missing")]
    Missing(&'static str),
    /// A field's length contradicts the others.
    #[error("{field} has {have} bytes, expected {want}")]
    Length {
        /// The field.
        field: &'static str,
        /// Bytes found.
        have: usize,
        /// Bytes that the other fields call for.
        want: usize,
    },
    /// A number is outside what is allowed.
    #[error("{field} is {have}, allowed is {allowed}")]
    Range {
        /// The field.
        field: &'static str,
        /// The number found.
        have: u64,
        /// What is allowed, for people.
        allowed: String,
    },
    /// A text is not an identifier.
    #[error("{field}: {reason}")]
    Text {
        /// The field.
        field: &'static str,
        /// What is wrong with it.
        reason: String,
    },
}

impl Dtype {
    fn to_wire(self) -> i32 {
        match self {
            Self::F32 => wire::Dtype::F32.into(),
            Self::Bf16 => wire::Dtype::Bf16.into(),
        }
    }

    fn from_wire(code: i32) -> Result<Self, FrameError> {
        match wire::Dtype::try_from(code) {
            Ok(wire::Dtype::F32) => Ok(Self::F32),
            Ok(wire::Dtype::Bf16) => Ok(Self::Bf16),
            _ => Err(FrameError::Range {
                field: "dtype",
                have: u64::try_from(code).unwrap_or(u64::MAX),
                allowed: "1 (f32) or 2 (bf16)".to_owned(),
            }),
        }
    }
}

/// One expert that one row goes through.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Assignment {
    /// Row within the frame.
    pub row: u16,
    /// Expert within the frame's layer.
    pub expert: ExpertId,
}

/// Rows on their way to the experts of one layer on one node.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Dispatch {
    /// Names the exchange; the answer carries it back.
    pub exchange: ExchangeId,
    /// What the receiver must agree with.
    pub fence: Fence,
    /// The layer whose experts are meant.
    pub layer: LayerId,
    /// The regions that may see these rows.
    pub allowed_regions: RegionSet,
    /// Milliseconds from receipt after which the answer is of no use.
    pub deadline_ms: u32,
    /// How rows are written, in the answer too.
    pub dtype: Dtype,
    /// Values of a row.
    pub hidden: usize,
    /// Which row goes through which expert; no pair twice.
    pub assignments: Vec<Assignment>,
    /// Whose the assignments are: so many of them of this request, then of the next. They add up
    /// to all of them.
    pub requests: Vec<(RequestId, u32)>,
    /// The rows, `row_count x hidden` values.
    pub rows: Bytes,
}

impl Dispatch {
    /// Rows in the frame.
    pub fn row_count(&self) -> usize {
        self.rows.len() / (self.hidden * self.dtype.size())
    }

    /// Bytes of rows that an answer to this frame must have.
    pub fn answer_len(&self) -> usize {
        self.assignments.len() * self.hidden * self.dtype.size()
    }
}

fn in_range(field: &'static str, have: usize, min: usize, max: usize) -> Result<(), FrameError> {
    if (min..=max).contains(&have) {
        return Ok(());
    }
    Err(FrameError::Range { field, have: have as u64, allowed: format!("{min} to {max}") })
}

fn narrow<T: TryFrom<u32>>(field: &'static str, have: u32, max: u64) -> Result<T, FrameError> {
    T::try_from(have).map_err(|_| FrameError::Range {
        field,
        have: have.into(),
        allowed: format!("0 to {max}"),
    })
}

fn regions(codes: &[String]) -> Result<RegionSet, FrameError> {
    in_range("allowed_regions", codes.len(), 0, REGIONS_MAX)?;
    let parse = |code: &String| {
        code.parse::<Region>().map_err(|error| FrameError::Text {
            field: "allowed_regions",
            reason: error.to_string(),
        })
    };
    codes.iter().map(parse).collect()
}

/// Reads little-endian (u16, u16) pairs.
fn pairs(bytes: &[u8]) -> impl Iterator<Item = (u16, u16)> + '_ {
    bytes
        .chunks_exact(4)
        .map(|b| (u16::from_le_bytes([b[0], b[1]]), u16::from_le_bytes([b[2], b[3]])))
}

/// Writes pairs as [`pairs`] reads them.
fn pack_pairs(pairs: impl ExactSizeIterator<Item = (u16, u16)>) -> Bytes {
    let mut out = Vec::with_capacity(pairs.len() * 4);
    for (a, b) in pairs {
        out.extend_from_slice(&a.to_le_bytes());
        out.extend_from_slice(&b.to_le_bytes());
    }
    out.into()
}

fn assignments(bytes: &Bytes, row_count: usize) -> Result<Vec<Assignment>, FrameError> {
    let count = bytes.len() / 4;
    if !bytes.len().is_multiple_of(4) {
        let want = count * 4 + 4;
        return Err(FrameError::Length { field: "assignments", have: bytes.len(), want });
    }
    in_range("assignments", count, 1, ASSIGNMENTS_MAX)?;
    let list: Vec<Assignment> =
        pairs(bytes).map(|(row, expert)| Assignment { row, expert: ExpertId(expert) }).collect();
    if let Some(bad) = list.iter().find(|a| usize::from(a.row) >= row_count) {
        let (have, allowed) = (bad.row.into(), format!("below the row_count {row_count}"));
        return Err(FrameError::Range { field: "assignments.row", have, allowed });
    }
    let mut sorted = list.clone();
    sorted.sort_unstable();
    if let Some(twice) = sorted.windows(2).find(|w| w[0] == w[1]) {
        let reason = format!("row {} has one expert twice", twice[0].row);
        return Err(FrameError::Text { field: "assignments", reason });
    }
    Ok(list)
}

fn requests(bytes: &Bytes, assignments: usize) -> Result<Vec<(RequestId, u32)>, FrameError> {
    let (count, field) = (bytes.len() / RUN_BYTES, "requests");
    if !bytes.len().is_multiple_of(RUN_BYTES) {
        let want = (count + 1) * RUN_BYTES;
        return Err(FrameError::Length { field, have: bytes.len(), want });
    }
    // No run is empty, so that there are no more of them than there are assignments.
    in_range(field, count, 1, assignments)?;
    let run = |run: &[u8]| -> Result<(RequestId, u32), FrameError> {
        let (id, len) = run.split_at(RUN_BYTES - 2);
        let mut number = [0; RUN_BYTES - 2];
        number.copy_from_slice(id);
        let len = u16::from_le_bytes([len[0], len[1]]);
        in_range("requests.assignments", len.into(), 1, assignments)?;
        Ok((RequestId(u128::from_le_bytes(number)), len.into()))
    };
    let runs = bytes.chunks_exact(RUN_BYTES).map(run).collect::<Result<Vec<_>, _>>()?;
    // At most ASSIGNMENTS_MAX runs of 16 bits each: far below 2^64.
    let have = runs.iter().map(|(_, len)| u64::from(*len)).sum::<u64>();
    if have != assignments as u64 {
        let (field, allowed) = ("requests.assignments in all", assignments.to_string());
        return Err(FrameError::Range { field, have, allowed });
    }
    Ok(runs)
}

/// Writes runs as [`requests`] reads them; one that is too long for its field becomes several.
fn pack_requests(requests: &[(RequestId, u32)]) -> Bytes {
    let mut out = Vec::with_capacity(requests.len() * RUN_BYTES);
    for (request, len) in requests {
        let mut left = *len;
        while left > 0 {
            let len = u16::try_from(left).unwrap_or(u16::MAX);
            out.extend_from_slice(&request.0.to_le_bytes());
            out.extend_from_slice(&len.to_le_bytes());
            left -= u32::from(len);
        }
    }
    out.into()
}

impl TryFrom<wire::Dispatch> for Dispatch {
    type Error = FrameError;

    fn try_from(message: wire::Dispatch) -> Result<Self, FrameError> {
        let row_count = message.row_count as usize;
        let hidden = message.hidden as usize;
        in_range("row_count", row_count, 1, ROWS_MAX)?;
        in_range("hidden", hidden, 1, HIDDEN_MAX)?;
        let dtype = Dtype::from_wire(message.dtype)?;
        // The bounds above keep this product below 2^31.
        let want = row_count * hidden * dtype.size();
        if message.rows.len() != want {
            return Err(FrameError::Length { field: "rows", have: message.rows.len(), want });
        }
        in_range("rows", want, 1, ROWS_BYTES_MAX)?;
        let assignments = assignments(&message.assignments, row_count)?;
        let frame = Self {
            exchange: ExchangeId(message.exchange_id),
            fence: message.fence.ok_or(FrameError::Missing("fence"))?.try_into()?,
            layer: LayerId(narrow("layer", message.layer, u16::MAX.into())?),
            allowed_regions: regions(&message.allowed_regions)?,
            deadline_ms: message.deadline_ms,
            dtype,
            hidden,
            requests: requests(&message.requests, assignments.len())?,
            assignments,
            rows: message.rows,
        };
        in_range("rows of the answer", frame.answer_len(), 1, ROWS_BYTES_MAX)?;
        Ok(frame)
    }
}

impl From<Dispatch> for wire::Dispatch {
    fn from(frame: Dispatch) -> Self {
        Self {
            exchange_id: frame.exchange.0,
            row_count: frame.row_count() as u32,
            fence: Some(frame.fence.into()),
            layer: frame.layer.0.into(),
            allowed_regions: frame.allowed_regions.iter().map(Region::to_string).collect(),
            deadline_ms: frame.deadline_ms,
            dtype: frame.dtype.to_wire(),
            hidden: frame.hidden as u32,
            assignments: pack_pairs(frame.assignments.iter().map(|a| (a.row, a.expert.0))),
            requests: pack_requests(&frame.requests),
            rows: frame.rows,
        }
    }
}

/// Why a node did not compute a frame.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    /// The queue is full; another replica may be free.
    #[error("busy")]
    Busy,
    /// The node is leaving.
    #[error("draining")]
    Draining,
    /// The fence of the frame is not the node's.
    #[error("stale fence, the node has {0:?}")]
    StaleFence(Box<Fence>),
    /// The node does not hold an expert that was asked for.
    #[error("expert not held: {0}")]
    NotHeld(String),
    /// The node stands in a region that the rows may not enter.
    #[error("region refused: {0}")]
    RegionRefused(String),
    /// The frame contradicts itself or the model.
    #[error("invalid frame: {0}")]
    Invalid(String),
    /// The deadline passed before the frame's turn came.
    #[error("deadline passed in the queue")]
    Expired,
}

/// What a node answers to one dispatch.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Answer {
    /// The dispatch's name.
    pub exchange: ExchangeId,
    /// The fence under which the rows were computed; absent when the frame was not understood.
    pub fence: Option<Fence>,
    /// One row for each assignment, in order, or why not.
    pub result: Result<Bytes, Refusal>,
}

impl Answer {
    /// Whether the rows have exactly the length that `dispatch` calls for.
    pub fn check(&self, dispatch: &Dispatch) -> Result<(), FrameError> {
        let want = dispatch.answer_len();
        match &self.result {
            Ok(rows) if rows.len() != want => {
                Err(FrameError::Length { field: "rows", have: rows.len(), want })
            }
            _ => Ok(()),
        }
    }
}

impl TryFrom<wire::Combine> for Answer {
    type Error = FrameError;

    fn try_from(message: wire::Combine) -> Result<Self, FrameError> {
        use wire::combine::Result as Wire;
        let result = match message.result.ok_or(FrameError::Missing("result"))? {
            Wire::Rows(rows) => Ok(rows),
            Wire::Error(error) => Err(refusal(error)?),
        };
        let fence = message.fence.map(Fence::try_from).transpose()?;
        if result.is_ok() && fence.is_none() {
            return Err(FrameError::Missing("fence"));
        }
        Ok(Self { exchange: ExchangeId(message.exchange_id), fence, result })
    }
}

fn refusal(error: wire::ExchangeError) -> Result<Refusal, FrameError> {
    use wire::exchange_error::Code;
    Ok(match Code::try_from(error.code).unwrap_or(Code::Unspecified) {
        Code::Busy => Refusal::Busy,
        Code::Draining => Refusal::Draining,
        Code::StaleFence => {
            let have = error.have.ok_or(FrameError::Missing("error.have"))?;
            Refusal::StaleFence(Box::new(have.try_into()?))
        }
        Code::NotHeld => Refusal::NotHeld(error.message),
        Code::RegionRefused => Refusal::RegionRefused(error.message),
        Code::Invalid => Refusal::Invalid(error.message),
        Code::Expired => Refusal::Expired,
        Code::Unspecified => {
            let allowed = "a code of ExchangeError.Code".to_owned();
            let have = u64::try_from(error.code).unwrap_or(u64::MAX);
            return Err(FrameError::Range { field: "error.code", have, allowed });
        }
    })
}

impl From<Answer> for wire::Combine {
    fn from(answer: Answer) -> Self {
        use wire::combine::Result as Wire;
        Self {
            exchange_id: answer.exchange.0,
            fence: answer.fence.map(Into::into),
            result: Some(match answer.result {
                Ok(rows) => Wire::Rows(rows),
                Err(refusal) => Wire::Error(refusal.into()),
            }),
        }
    }
}

impl From<Refusal> for wire::ExchangeError {
    fn from(refusal: Refusal) -> Self {
        use wire::exchange_error::Code;
        let (code, have, message) = match refusal {
            Refusal::Busy => (Code::Busy, None, String::new()),
            Refusal::Draining => (Code::Draining, None, String::new()),
            Refusal::StaleFence(have) => (Code::StaleFence, Some((*have).into()), String::new()),
            Refusal::NotHeld(text) => (Code::NotHeld, None, text),
            Refusal::RegionRefused(text) => (Code::RegionRefused, None, text),
            Refusal::Invalid(text) => (Code::Invalid, None, text),
            Refusal::Expired => (Code::Expired, None, String::new()),
        };
        Self { code: code.into(), have, message }
    }
}

impl TryFrom<wire::Fence> for Fence {
    type Error = FrameError;

    fn try_from(fence: wire::Fence) -> Result<Self, FrameError> {
        let have = fence.model_digest.len();
        let field = "fence.model_digest";
        let digest = <[u8; 32]>::try_from(fence.model_digest.as_ref())
            .map_err(|_| FrameError::Length { field, have, want: 32 })?;
        Ok(Self {
            membership_epoch: MembershipEpoch(fence.membership_epoch),
            placement_epoch: PlacementEpoch(fence.placement_epoch),
            incarnation: Incarnation(fence.incarnation),
            model_digest: ModelDigest(digest),
        })
    }
}

impl From<Fence> for wire::Fence {
    fn from(fence: Fence) -> Self {
        Self {
            membership_epoch: fence.membership_epoch.0,
            placement_epoch: fence.placement_epoch.0,
            incarnation: fence.incarnation.0,
            model_digest: Bytes::copy_from_slice(&fence.model_digest.0),
        }
    }
}

impl TryFrom<wire::NodeInfo> for crate::link::NodeInfo {
    type Error = FrameError;

    fn try_from(info: wire::NodeInfo) -> Result<Self, FrameError> {
        let text = |field, reason: crate::ids::InvalidId| FrameError::Text {
            field,
            reason: reason.to_string(),
        };
        if !info.experts.len().is_multiple_of(4) {
            let (have, want) = (info.experts.len(), info.experts.len() / 4 * 4);
            return Err(FrameError::Length { field: "experts", have, want });
        }
        let experts =
            pairs(&info.experts).map(|(layer, expert)| (LayerId(layer), ExpertId(expert)));
        Ok(Self {
            name: info.name.parse().map_err(|e| text("name", e))?,
            region: info.region.parse().map_err(|e| text("region", e))?,
            fence: info.fence.ok_or(FrameError::Missing("fence"))?.try_into()?,
            kernel_class: crate::ids::KernelClass(info.kernel_class),
            experts: experts.collect(),
            weights_bytes: info.weights_bytes,
        })
    }
}

impl From<crate::link::NodeInfo> for wire::NodeInfo {
    fn from(info: crate::link::NodeInfo) -> Self {
        let experts: Vec<(u16, u16)> = info.experts.iter().map(|(l, e)| (l.0, e.0)).collect();
        Self {
            name: info.name.to_string(),
            region: info.region.to_string(),
            fence: Some(info.fence.into()),
            kernel_class: info.kernel_class.0,
            experts: pack_pairs(experts.into_iter()),
            weights_bytes: info.weights_bytes,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn message() -> wire::Dispatch {
        Dispatch {
            exchange: ExchangeId(7),
            fence: Fence {
                membership_epoch: MembershipEpoch(1),
                placement_epoch: PlacementEpoch(2),
                incarnation: Incarnation(3),
                model_digest: ModelDigest([9; 32]),
            },
            layer: LayerId(1),
            allowed_regions: ["fr".parse().unwrap()].into(),
            deadline_ms: 500,
            dtype: Dtype::Bf16,
            hidden: 8,
            assignments: vec![
                Assignment { row: 0, expert: ExpertId(3) },
                Assignment { row: 1, expert: ExpertId(0) },
            ],
            requests: vec![(RequestId(u128::MAX), 1), (RequestId(2), 1)],
            rows: Bytes::from(vec![1; 2 * 8 * 2]),
        }
        .into()
    }

    /// Runs of so many assignments each, as they are on the wire.
    fn runs(lens: &[u16]) -> Bytes {
        let run = |len: &u16| [&7_u128.to_le_bytes()[..], &len.to_le_bytes()].concat();
        lens.iter().flat_map(run).collect::<Vec<u8>>().into()
    }

    #[test]
    fn a_run_too_long_for_its_field_is_written_as_several() {
        let (id, count) = (RequestId(7), ASSIGNMENTS_MAX as u32);
        let read = requests(&pack_requests(&[(id, count)]), ASSIGNMENTS_MAX).unwrap();
        assert_eq!(read, [(id, u32::from(u16::MAX)), (id, 1)]);
    }

    #[test]
    fn a_frame_survives_the_wire() {
        let frame = Dispatch::try_from(message()).unwrap();
        assert_eq!(frame.row_count(), 2);
        assert_eq!(wire::Dispatch::from(frame), message());
    }

    #[test]
    fn every_length_that_does_not_fit_is_refused_by_name() {
        type Spoil = fn(&mut wire::Dispatch);
        let cases: [(&str, Spoil); 18] = [
            ("rows", |m| m.rows = Bytes::from(vec![0; 31])),
            ("rows", |m| m.rows = Bytes::new()),
            ("row_count", |m| m.row_count = 0),
            ("row_count", |m| m.row_count = u32::MAX),
            ("hidden", |m| m.hidden = 0),
            ("hidden", |m| m.hidden = u32::MAX),
            ("dtype", |m| m.dtype = 9),
            ("layer", |m| m.layer = 70_000),
            ("fence", |m| m.fence = None),
            ("assignments", |m| m.assignments = Bytes::from(vec![0; 5])),
            ("assignments.row", |m| m.assignments = Bytes::from(vec![2, 0, 0, 0])),
            ("assignments", |m| m.assignments = Bytes::from(vec![0; 8])),
            ("requests", |m| m.requests = Bytes::new()),
            ("requests", |m| m.requests = m.requests.slice(1..)),
            ("requests is 3", |m| m.requests = runs(&[1, 1, 1])),
            ("requests.assignments is 0", |m| m.requests = runs(&[0, 2])),
            ("requests.assignments in all is 1", |m| m.requests = runs(&[1])),
            ("requests.assignments in all is 4", |m| m.requests = runs(&[2, 2])),
        ];
        for (field, spoil) in cases {
            let mut bad = message();
            spoil(&mut bad);
            let error = Dispatch::try_from(bad).unwrap_err().to_string();
            assert!(error.contains(field), "{error} does not name {field}");
        }
    }

    #[test]
    fn a_small_frame_that_asks_for_a_huge_answer_is_refused() {
        let hidden = HIDDEN_MAX;
        let frame = |experts: u16| wire::Dispatch {
            dtype: Dtype::F32.to_wire(),
            row_count: 1,
            hidden: hidden as u32,
            assignments: pack_pairs((0..experts).map(|expert| (0, expert))),
            requests: runs(&[experts]),
            rows: vec![0; hidden * 4].into(),
            ..message()
        };
        let most = (ROWS_BYTES_MAX / (hidden * 4)) as u16;
        assert!(Dispatch::try_from(frame(most)).is_ok());
        let error = Dispatch::try_from(frame(most + 1)).unwrap_err().to_string();
        assert!(error.starts_with("rows of the answer is"), "{error}");
    }

    #[test]
    fn an_answer_of_another_length_is_noticed() {
        let frame = Dispatch::try_from(message()).unwrap();
        let answer = |len| Answer {
            exchange: frame.exchange,
            fence: Some(frame.fence),
            result: Ok(Bytes::from(vec![0; len])),
        };
        assert!(answer(frame.answer_len()).check(&frame).is_ok());
        assert!(answer(frame.answer_len() - 1).check(&frame).is_err());
        assert!(answer(frame.answer_len() + 1).check(&frame).is_err());
    }
}
