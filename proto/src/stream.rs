//! Exchange frames on a plain byte stream, for the transport `stream`.
//!
//! ```text
//!   u32 message length | u32 rows length | message (prost, without its rows) | rows
//! ```
//!
//! The rows stand apart from the message, so that they are written from where they lie and read to
//! where they stay: no copy on either side, and one write a frame. A connection starts with
//! [`PREFACE`] from the coordinator, which tells it from an HTTP/2 connection to the same port; the
//! node answers with its description, and frames follow, both ways.
//!
//! Invariant: no length is believed beyond its bound, and none is allocated before that.
//!
//! What it does not know: sockets. It reads from and writes to whatever does so.

use std::io::{self, IoSlice, Read, Write};

use bytes::{Bytes, BytesMut};
use prost::Message;

use crate::frame::{Answer, Dispatch, MESSAGE_BYTES_MAX, ROWS_BYTES_MAX};
use crate::wire;

/// First bytes of a connection. HTTP/2 starts with `PRI * HT`.
pub const PREFACE: [u8; 8] = *b"ENTENTE1";

const PREFIX_LEN: usize = 8;
/// What one read may bring beyond the frame that it completes.
const READ_AHEAD_BYTES: usize = 64 << 10;

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
    /// All of it is initialised; the first `filled` bytes were read.
    buffer: BytesMut,
    filled: usize,
}

impl FrameReader {
    /// Reads until a frame is complete. `None` at the end of the stream.
    ///
    /// # Errors
    /// What the source says; `InvalidData` for lengths out of bounds and for what is no message.
    pub fn read<M: Message + Default>(
        &mut self,
        source: &mut impl Read,
    ) -> io::Result<Option<Framed<M>>> {
        loop {
            let needed = match self.lengths()? {
                Some((message, rows)) if self.filled >= PREFIX_LEN + message + rows => {
                    return self.take(message, rows).map(Some);
                }
                Some((message, rows)) => PREFIX_LEN + message + rows,
                None => PREFIX_LEN,
            };
            if self.buffer.len() < needed + READ_AHEAD_BYTES {
                // Takes the old allocation over once nobody holds rows of earlier frames.
                self.buffer.resize(needed + READ_AHEAD_BYTES, 0);
            }
            match source.read(&mut self.buffer[self.filled..])? {
                0 if self.filled == 0 => return Ok(None),
                0 => return Err(io::ErrorKind::UnexpectedEof.into()),
                read => self.filled += read,
            }
        }
    }

    /// Lengths of message and rows of the frame that comes next, once its prefix is there.
    fn lengths(&self) -> io::Result<Option<(usize, usize)>> {
        if self.filled < PREFIX_LEN {
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

    fn take<M: Message + Default>(&mut self, message: usize, rows: usize) -> io::Result<Framed<M>> {
        let mut frame = self.buffer.split_to(PREFIX_LEN + message + rows).freeze();
        self.filled -= frame.len();
        let rows = frame.split_off(PREFIX_LEN + message);
        let message = M::decode(frame.split_off(PREFIX_LEN))
            .map_err(|error| io::Error::new(io::ErrorKind::InvalidData, error))?;
        Ok(Framed { message, rows })
    }
}

/// Writes frames to a byte stream, reusing one buffer for everything but rows.
#[derive(Debug, Default)]
pub struct FrameWriter {
    head: Vec<u8>,
}

impl FrameWriter {
    /// Writes a frame, with one call if the sink takes it whole.
    pub fn write<M: Message>(
        &mut self,
        sink: &mut impl Write,
        frame: &Framed<M>,
    ) -> io::Result<()> {
        let (message_len, rows_len) = (frame.message.encoded_len(), frame.rows.len());
        self.head.clear();
        self.head.extend_from_slice(&(message_len as u32).to_le_bytes());
        self.head.extend_from_slice(&(rows_len as u32).to_le_bytes());
        frame.message.encode(&mut self.head).map_err(io::Error::other)?;
        let mut slices = [IoSlice::new(&self.head), IoSlice::new(&frame.rows)];
        let mut left = &mut slices[..];
        while !left.is_empty() {
            match sink.write_vectored(left) {
                Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
                Ok(written) => IoSlice::advance_slices(&mut left, written),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
            while left.first().is_some_and(|slice| slice.is_empty()) {
                left = &mut left[1..];
            }
        }
        Ok(())
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

    /// Gives out a stream in pieces of a fixed length.
    struct Pieces<'a>(&'a [u8], usize);

    impl Read for Pieces<'_> {
        fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
            let len = self.1.min(self.0.len()).min(into.len());
            into[..len].copy_from_slice(&self.0[..len]);
            self.0 = &self.0[len..];
            Ok(len)
        }
    }

    fn written(answers: &[Answer]) -> Vec<u8> {
        let (mut writer, mut stream) = (FrameWriter::default(), Vec::new());
        for answer in answers {
            writer.write(&mut stream, &Framed::answer(answer.clone())).unwrap();
        }
        stream
    }

    #[test]
    fn frames_come_out_as_they_went_in_however_the_stream_is_cut() {
        let answers: Vec<Answer> = [0, 5, 200_000, 1].map(|n| answer(n as u64, n)).to_vec();
        let stream = written(&answers);
        for piece in [1, 7, 4_096, usize::MAX] {
            let (mut reader, mut source) = (FrameReader::default(), Pieces(&stream, piece));
            for answer in &answers {
                let frame = reader.read::<wire::Combine>(&mut source).unwrap().unwrap();
                assert_eq!(Answer::try_from(frame.into_wire()).unwrap(), *answer);
            }
            assert_eq!(reader.read::<wire::Combine>(&mut source).unwrap(), None);
        }
    }

    #[test]
    fn a_stream_that_ends_within_a_frame_is_an_error() {
        let stream = written(&[answer(1, 100)]);
        for len in [1, 7, 8, 20, stream.len() - 1] {
            let mut source = Pieces(&stream[..len], usize::MAX);
            let error = FrameReader::default().read::<wire::Combine>(&mut source).unwrap_err();
            assert_eq!(error.kind(), io::ErrorKind::UnexpectedEof, "cut after {len} bytes");
        }
    }

    #[test]
    fn lengths_out_of_bounds_are_refused_before_anything_is_allocated() {
        for lengths in [[u32::MAX, 0], [0, u32::MAX], [0, ROWS_BYTES_MAX as u32 + 1]] {
            let stream: Vec<u8> = lengths.iter().flat_map(|n| n.to_le_bytes()).collect();
            let mut reader = FrameReader::default();
            let error = reader.read::<wire::Combine>(&mut Pieces(&stream, usize::MAX)).unwrap_err();
            assert_eq!(error.kind(), io::ErrorKind::InvalidData);
            assert!(reader.buffer.capacity() <= 2 * READ_AHEAD_BYTES);
        }
    }
}
