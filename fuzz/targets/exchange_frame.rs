//! A frame from a peer, in a gRPC message and on a byte stream.
#![no_main]

use bytes::Bytes;
use entente_fuzz::{ALLOWANCE_BYTES, bounded, bounded_beyond, seed};
use entente_proto::frame::{Answer, Dispatch};
use entente_proto::stream::{BELIEVED_BYTES_MAX, FrameReader, FrameWriter, Framed};
use entente_proto::wire;
use libfuzzer_sys::fuzz_target;
use prost::Message;

fn seeds() {
    let epoch = 7;
    let fence = wire::Fence {
        membership_epoch: epoch,
        placement_epoch: epoch,
        incarnation: 3,
        model_digest: Bytes::from_static(&[5; 32]),
    };
    let dispatch = wire::Dispatch {
        exchange_id: 1,
        fence: Some(fence.clone()),
        layer: 2,
        allowed_regions: vec!["fr".to_owned(), "se".to_owned()],
        deadline_ms: 100,
        dtype: wire::Dtype::Bf16.into(),
        row_count: 2,
        hidden: 4,
        assignments: Bytes::from_static(&[0, 0, 1, 0, 1, 0, 2, 0]),
        rows: Bytes::from_static(&[1; 16]),
        // One assignment of each of two requests.
        requests: [[9_u8; 16], [8; 16]].map(|id| [&id[..], &[1, 0]].concat()).concat().into(),
        ..wire::Dispatch::default()
    };
    seed("dispatch", &dispatch.encode_to_vec());
    let rows = wire::combine::Result::Rows(Bytes::from_static(&[2; 16]));
    let combine = wire::Combine { exchange_id: 1, fence: Some(fence), result: Some(rows) };
    seed("combine", &combine.encode_to_vec());
    let frame = Framed::dispatch(dispatch.try_into().expect("the frame is good"));
    let mut writer = FrameWriter::default();
    let pieces = writer.pieces(&frame, 16).expect("it fits into memory");
    seed("stream", &[vec![9], pieces.collect::<Vec<_>>().concat()].concat());
}

fuzz_target!(init: seeds(), |input: &[u8]| {
    bounded(input.len(), || messages(input));
    // The length in front of a frame is believed up to a bound before the bytes are there.
    let believed = BELIEVED_BYTES_MAX + ALLOWANCE_BYTES;
    bounded_beyond(input.len(), believed, || stream(input));
});

fn messages(input: &[u8]) {
    let bytes = Bytes::copy_from_slice(input);
    if let Ok(Ok(frame)) = wire::Dispatch::decode(bytes.clone()).map(Dispatch::try_from) {
        let again = wire::Dispatch::from(frame.clone());
        assert_eq!(Dispatch::try_from(again).as_ref(), Ok(&frame));
    }
    if let Ok(Ok(answer)) = wire::Combine::decode(bytes).map(Answer::try_from) {
        let again = wire::Combine::from(answer.clone());
        assert_eq!(Answer::try_from(again).as_ref(), Ok(&answer));
    }
}

/// The bytes come in two parts; where they are cut is in the input.
fn stream(input: &[u8]) {
    let Some((cut, input)) = input.split_first() else { return };
    let (first, rest) = input.split_at(usize::from(*cut).min(input.len()));
    let mut reader = FrameReader::default();
    for part in [first, rest] {
        reader.extend(part);
        while let Ok(Some(frame)) = reader.next_frame::<wire::Dispatch>() {
            let _ = Dispatch::try_from(frame.into_wire());
        }
    }
}
