//! Every bound of this crate in one place.

use std::time::Duration;

use entente_proto::frame::ROWS_BYTES_MAX;

/// Frames that are queued or computed; more are answered BUSY.
pub const QUEUE_LEN_MAX: usize = 1_024;
/// Bytes of rows, sent and to be answered, that are queued or computed; more are answered BUSY. One
/// frame of any size is always taken.
pub const QUEUE_BYTES_MAX: usize = 8 * ROWS_BYTES_MAX;
/// Bytes of answer rows that are computed in one call of the kernels.
pub const BATCH_BYTES_MAX: usize = ROWS_BYTES_MAX;
/// Frames of one stream that are taken and whose answers the peer has not read. Past it the stream
/// is not read, so that a peer which does not read holds up nobody but itself.
pub const STREAM_FRAMES_MAX: usize = 128;
/// Streams on one connection; a coordinator needs one, and one for asking who is there.
pub const STREAMS_MAX: u32 = 16;
/// HTTP/2 window of one stream: a frame of 1 MiB must not wait for the peer's permission.
pub const STREAM_WINDOW_BYTES: u32 = 8 << 20;
/// HTTP/2 window of a connection.
pub const CONNECTION_WINDOW_BYTES: u32 = 16 << 20;
/// Largest piece in which HTTP/2 carries a message.
pub const HTTP2_FRAME_BYTES_MAX: u32 = 1 << 20;
/// Silence after which a peer is asked for a sign of life, and how long it may take to give one.
pub const KEEPALIVE: Duration = Duration::from_secs(10);
/// How long frames in the queue may take once the node is told to stop.
pub const DRAIN_MAX: Duration = Duration::from_secs(5);
/// How long streams may take to end after that.
pub const CLOSE_MAX: Duration = Duration::from_secs(1);
/// Connections of the transport `stream`, each with a thread; a coordinator needs one.
pub const STREAM_CONNECTIONS_MAX: usize = 64;
/// How long a peer may take to say who it is and which protocol it speaks.
pub const HELLO_MAX: Duration = Duration::from_secs(3);
/// Peers that are being greeted; more are turned away. A cluster has few coordinators, and each
/// connects once, so past it somebody means no good.
pub const HANDSHAKES_MAX: usize = 64;
/// Those of one host among them; all processes of a trial on one machine are one host.
pub const HANDSHAKES_OF_HOST_MAX: usize = 32;
/// Connections over gRPC; a coordinator needs one, and one more now and then for a question.
pub const GRPC_CONNECTIONS_MAX: usize = 256;
/// Those of one coordinator among them.
pub const GRPC_CONNECTIONS_OF_PEER_MAX: usize = 32;
/// How long writing a part of an answer may take before the peer is given up. A coordinator reads
/// while it waits for answers, not while it computes, so this is longer than a part of its step.
pub const WRITE_MAX: Duration = Duration::from_secs(3);
/// Accepted connections that wait for the gRPC server to take them.
pub const ACCEPT_LEN_MAX: usize = 64;
/// Experts that are sent to peers at once.
pub const LENDS_MAX: usize = 2;
/// Peers that wait for an expert, those included to whom one is sent.
pub const LENDS_WAITING_MAX: usize = 32;
/// Bytes of an expert that are sent at once.
pub const LEND_PIECE_BYTES: usize = 512 << 10;
/// How fast one expert is sent; frames must not wait for weights.
pub const LEND_BYTES_PER_S: f64 = 256e6;
/// How long a peer may take to read a piece.
pub const LEND_WAIT_MAX: Duration = Duration::from_secs(10);
/// How fast weights in memory are looked at.
pub const SCRUB_BYTES_PER_S: f64 = 256e6;
/// How long a node that holds nothing waits before it looks again whether it does.
pub const SCRUB_PAUSE_MAX: Duration = Duration::from_secs(1);
/// Experts whose weights have changed that wait until the node's session takes them out.
pub const SPOILT_MAX: usize = 16;
/// Peers that are asked for one expert.
pub const PEERS_MAX: usize = 8;
/// Requests whose rows are remembered, for statements.
pub const REQUESTS_MAX: usize = 65_536;
/// Pause after a connection could not be accepted.
pub const ACCEPT_RETRY: Duration = Duration::from_millis(50);
