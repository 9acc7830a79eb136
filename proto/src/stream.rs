//! Exchange frames on a plain byte stream, for the transport `stream`.
//!
//! ```text
//!   u32 message length | u32 rows length | message (prost, without its rows) | rows
//! ```
//!
//! The rows stand apart from the message, so that they are encrypted from where they lie and stay
//! where they were decrypted to. The node begins with its description, and frames follow, both
//! ways. Without TLS, whose ALPN name tells this protocol from HTTP/2 to the same port, the
//! coordinator sends [`PREFACE`] before that.
//!
//! Where rows travel another way ([`FrameReader::next_apart`], [`FrameWriter::apart`]) the second
//! length is theirs all the same, and no bytes of them follow.
//!
//! Invariants: no length is believed beyond its bound, and none is allocated before that; of a long
//! frame no more is allocated than a small multiple of what has come of it.
//!
//! What it does not know: sockets and TLS. It takes bytes and gives bytes.

use std::io;

use bytes::{Bytes, BytesMut};
use prost::Message;

use crate::frame::{Answer, Dispatch, MESSAGE_BYTES_MAX, ROWS_BYTES_MAX};
use crate::wire;

/// First bytes of a connection without TLS. HTTP/2 starts with `PRI * HT`.
pub const PREFACE: [u8; 8] = *b"ENTENTE1";

const PREFIX_LEN: usize = 8;
/// The message and the first rows are one piece of this length: what one record of TLS holds.
pub const FIRST_PIECE_BYTES: usize = 16 << 10;

/// Bytes of a frame that are allocated on the word of its prefix. Longer frames get more room as
/// they come; it is set so that most need none, since each time costs a copy.
pub const BELIEVED_BYTES_MAX: usize = 1 << 20;

/// A message and the rows that came with it.
#[derive(Debug, Clone, PartialEq)]
pub struct Framed<M> {
    /// The message; its own field for rows is empty.
    pub message: M,
    /// The rows.
    pub rows: Bytes,
}

impl Framed<wire::Dispatch> {
    /// Takes a frame apart for sending.
    pub fn dispatch(frame: Dispatch) -> Self {
        let mut message = wire::Dispatch::from(frame);
        let rows = std::mem::take(&mut message.rows);
        Self { message, rows }
    }

    /// Puts a received frame together. It is not checked yet.
    pub fn into_wire(self) -> wire::Dispatch {
        wire::Dispatch { rows: self.rows, ..self.message }
    }
}

impl Framed<wire::Combine> {
    /// Takes an answer apart for sending.
    pub fn answer(answer: Answer) -> Self {
        use wire::combine::Result as Wire;
        let mut message = wire::Combine::from(answer);
        let rows = match &mut message.result {
            Some(Wire::Rows(rows)) => std::mem::take(rows),
            _ => Bytes::new(),
        };
        Self { message, rows }
    }

    /// Puts a received answer together. It is not checked yet.
    pub fn into_wire(self) -> wire::Combine {
        use wire::combine::Result as Wire;
        let mut message = self.message;
        if let Some(Wire::Rows(rows)) = &mut message.result {
            *rows = self.rows;
        }
        message
    }
}

/// Cuts a byte stream into frames.
#[derive(Debug, Default)]
pub struct FrameReader {
    buffer: BytesMut,
}

impl FrameReader {
    /// Takes what came next.
    pub fn extend(&mut self, bytes: &[u8]) {
        self.buffer.extend_from_slice(bytes);
    }

    /// The next frame, once all of it has come. Its rows stay where they were put.
    ///
    /// # Errors
    /// `InvalidData` for lengths out of bounds and for what is no message.
    pub fn next_frame<M: Message + Default>(&mut self) -> io::Result<Option<Framed<M>>> {
        let Some((message, rows)) = self.lengths()? else { return Ok(None) };
        let Some(mut frame) = self.take(PREFIX_LEN + message + rows) else { return Ok(None) };
        let rows = frame.split_off(PREFIX_LEN + message);
        Ok(Some(Framed { message: decode(frame)?, rows }))
    }

    /// The next message, once all of it has come, and the length of its rows, which travel another
    /// way.
    ///
    /// # Errors
    /// As for [`FrameReader::next_frame`].
    pub fn next_apart<M: Message + Default>(&mut self) -> io::Result<Option<(M, usize)>> {
        let Some((message, rows)) = self.lengths()? else { return Ok(None) };
        let Some(frame) = self.take(PREFIX_LEN + message) else { return Ok(None) };
        Ok(Some((decode(frame)?, rows)))
    }

    /// So many bytes, once they have come.
    fn take(&mut self, len: usize) -> Option<Bytes> {
        if self.buffer.len() < len {
            let believed = len.min(BELIEVED_BYTES_MAX.max(3 * self.buffer.len()));
            // Takes the old allocation over once nobody holds rows of earlier frames.
            self.buffer.reserve(believed - self.buffer.len());
            return None;
        }
        Some(self.buffer.split_to(len).freeze())
    }

    /// Whether the stream may end here: not within a frame.
    pub fn is_between_frames(&self) -> bool {
        self.buffer.is_empty()
    }

    /// Lengths of message and rows of the frame that comes next, once its prefix is there.
    fn lengths(&self) -> io::Result<Option<(usize, usize)>> {
        if self.buffer.len() < PREFIX_LEN {
            return Ok(None);
        }
        let number = |at: usize| {
            let bytes = [0, 1, 2, 3].map(|i| self.buffer[at + i]);
            u32::from_le_bytes(bytes) as usize
        };
        let (message, rows) = (number(0), number(4));
        if message > MESSAGE_BYTES_MAX || rows > ROWS_BYTES_MAX {
            let text = format!("a frame of {message} + {rows} bytes");
            return Err(io::Error::new(io::ErrorKind::InvalidData, text));
        }
        Ok(Some((message, rows)))
    }
}

/// The message behind a prefix.
fn decode<M: Message + Default>(mut frame: Bytes) -> io::Result<M> {
    M::decode(frame.split_off(PREFIX_LEN))
        .map_err(|error| io::Error::new(io::ErrorKind::InvalidData, error))
}

/// Cuts frames into pieces for sending, reusing one buffer for everything but rows.
#[derive(Debug, Default)]
pub struct FrameWriter {
    head: Vec<u8>,
}

impl FrameWriter {
    /// The bytes of a frame in pieces of at most `piece_len`. The first rows join the message, as
    /// many as make [`FIRST_PIECE_BYTES`], so that a small frame is one piece; the others are given
    /// from where they lie.
    ///
    /// # Errors
    /// When the message cannot be encoded, which does not happen with memory to spare.
    pub fn pieces<'a, M: Message>(
        &'a mut self,
        frame: &'a Framed<M>,
        piece_len: usize,
    ) -> io::Result<impl Iterator<Item = &'a [u8]>> {
        let rows_len = frame.rows.len();
        self.begin(&frame.message, rows_len)?;
        let joining = FIRST_PIECE_BYTES.saturating_sub(self.head.len()).min(rows_len);
        let (joining, rest) = frame.rows.split_at(joining);
        self.head.extend_from_slice(joining);
        Ok(self.head.chunks(piece_len).chain(rest.chunks(piece_len)))
    }

    /// The bytes of a message whose rows, of this length, travel another way.
    ///
    /// # Errors
    /// As for [`FrameWriter::pieces`].
    pub fn apart<M: Message>(
        &mut self,
        message: &M,
        rows_len: usize,
        piece_len: usize,
    ) -> io::Result<impl Iterator<Item = &[u8]>> {
        self.begin(message, rows_len)?;
        Ok(self.head.chunks(piece_len))
    }

    /// Makes the head: both lengths and the message.
    fn begin<M: Message>(&mut self, message: &M, rows_len: usize) -> io::Result<()> {
        self.head.clear();
        self.head.extend_from_slice(&(message.encoded_len() as u32).to_le_bytes());
        self.head.extend_from_slice(&(rows_len as u32).to_le_bytes());
        message.encode(&mut self.head).map_err(io::Error::other)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ids::ExchangeId;

    fn answer(exchange: u64, rows: usize) -> Answer {
        let fence = crate::ids::Fence {
            membership_epoch: Default::default(),
            placement_epoch: Default::default(),
            incarnation: Default::default(),
            model_digest: crate::ids::ModelDigest([1; 32]),
        };
        let rows = (0..rows).map(|i| (i * 7 + exchange as usize) as u8).collect::<Vec<_>>();
        Answer { exchange: ExchangeId(exchange), fence: Some(fence), result: Ok(rows.into()) }
    }

    fn written(answers: &[Answer]) -> Vec<u8> {
        let (mut writer, mut stream) = (FrameWriter::default(), Vec::new());
        for answer in answers {
            let framed = Framed::answer(answer.clone());
            for piece in writer.pieces(&framed, 50_000).unwrap() {
                assert!(piece.len() <= 50_000);
                stream.extend_from_slice(piece);
            }
        }
        stream
    }

    #[test]
    fn frames_come_out_as_they_went_in_however_the_stream_is_cut() {
        let answers: Vec<Answer> = [0, 5, 200_000, 1].map(|n| answer(n as u64, n)).to_vec();
        let stream = written(&answers);
        for len in [1, 7, 4_096, stream.len()] {
            let (mut reader, mut read) = (FrameReader::default(), Vec::new());
            for piece in stream.chunks(len) {
                reader.extend(piece);
                while let Some(frame) = reader.next_frame::<wire::Combine>().unwrap() {
                    read.push(Answer::try_from(frame.into_wire()).unwrap());
                }
            }
            assert!(read == answers, "in pieces of {len} bytes");
            assert!(reader.is_between_frames());
        }
    }

    #[test]
    fn a_frame_that_has_not_come_whole_is_none() {
        let stream = written(&[answer(1, 100)]);
        for len in [1, 7, 8, 20, stream.len() - 1] {
            let mut reader = FrameReader::default();
            reader.extend(&stream[..len]);
            assert_eq!(reader.next_frame::<wire::Combine>().unwrap(), None, "after {len} bytes");
            assert!(!reader.is_between_frames());
        }
    }

    #[test]
    fn messages_whose_rows_travel_another_way_follow_each_other_with_their_lengths() {
        let answers: Vec<Answer> = [0, 5, 200_000].map(|n| answer(n as u64, n)).to_vec();
        let (mut writer, mut reader) = (FrameWriter::default(), FrameReader::default());
        let mut read = Vec::new();
        for answer in &answers {
            let Framed { message, rows } = Framed::answer(answer.clone());
            for byte in writer.apart(&message, rows.len(), 50_000).unwrap().flatten() {
                assert_eq!(reader.next_apart::<wire::Combine>().unwrap(), None);
                reader.extend(&[*byte]);
            }
            let (message, rows_len) = reader.next_apart::<wire::Combine>().unwrap().unwrap();
            assert_eq!(rows_len, rows.len());
            read.push(Answer::try_from(Framed { message, rows }.into_wire()).unwrap());
        }
        assert!(read == answers);
        assert!(reader.is_between_frames());
    }

    #[test]
    fn a_small_frame_is_one_piece() {
        let (mut writer, framed) = (FrameWriter::default(), Framed::answer(answer(1, 8_192)));
        assert_eq!(writer.pieces(&framed, 1 << 20).unwrap().count(), 1);
    }

    #[test]
    fn frames_that_are_done_with_leave_their_memory_to_the_next() {
        let stream = written(&[answer(1, 300_000)]);
        let mut reader = FrameReader::default();
        for _ in 0..50 {
            stream.chunks(16_384).for_each(|piece| {
                reader.extend(piece);
                // Dropped at once, as an exchange drops its rows when it is combined.
                let _ = reader.next_frame::<wire::Combine>().unwrap();
            });
        }
        assert!(reader.buffer.capacity() < 4 * stream.len(), "{}", reader.buffer.capacity());
    }

    #[test]
    fn lengths_out_of_bounds_are_refused_before_anything_is_allocated() {
        for lengths in [[u32::MAX, 0], [0, u32::MAX], [0, ROWS_BYTES_MAX as u32 + 1]] {
            let mut reader = FrameReader::default();
            lengths.iter().for_each(|n| reader.extend(&n.to_le_bytes()));
            let error = reader.next_frame::<wire::Combine>().unwrap_err();
            assert_eq!(error.kind(), io::ErrorKind::InvalidData);
            assert!(reader.buffer.capacity() <= 4_096);
        }
    }
}
