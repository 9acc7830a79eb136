//! Proposals that are applied once, however often they had to be sent.

use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, SystemTime};

use entente_proto::wire;
use entente_proto::wire::membership_client::MembershipClient;
use tokio::time::{Instant, timeout_at};
use tonic::Status;
use tonic::transport::Channel;

use super::{Client, ClientError};
use crate::state::codec::{Malformed, REQUEST_LEN_MAX, outcome_in};
use crate::state::{Applied, Command, Expect, Outcome, Refused, RefusedCode, Request, SessionId};

/// The session of a client, once it has one.
#[derive(Default)]
pub(super) struct Session {
    id: Option<SessionId>,
    sequence: u64,
}

impl Client {
    /// Proposes a command exactly once: it is repeated with the same sequence until its outcome is
    /// known or the deadline has passed. Proposals of one client are made one after the other.
    ///
    /// # Errors
    /// [`ClientError::Refused`]: committed, and refused. [`ClientError::Unknown`]: the deadline has
    /// passed, and it may have been committed, or never will be once another one of this client is.
    /// [`ClientError::Deadline`]: it was not even sent.
    pub async fn propose(
        &self,
        deadline: Duration,
        expect: Expect,
        command: Command,
    ) -> Result<Applied, ClientError> {
        let end = Instant::now() + deadline;
        let locked = timeout_at(end, self.0.session.lock()).await;
        let mut session = locked.map_err(|_| {
            ClientError::Deadline("another proposal of this client is on its way".to_owned())
        })?;
        loop {
            let id = match session.id {
                Some(id) => id,
                None => self.open_session(end, &mut session).await?,
            };
            session.sequence += 1;
            let request = Request {
                session: id,
                sequence: session.sequence,
                at_ms: now_ms(),
                expect,
                command: command.clone(),
            };
            let (outcome, sent) = self.send(end, &request).await;
            match outcome {
                // It was not applied by this attempt, and there was no other.
                Ok(Err(Refused { code: RefusedCode::SessionExpired, .. })) if sent <= 1 => {
                    session.id = None;
                }
                // Another attempt may have been applied before the session was closed.
                Ok(Err(refused)) if refused.code == RefusedCode::SessionExpired => {
                    session.id = None;
                    return Err(ClientError::Unknown(refused.text));
                }
                Ok(outcome) => return Ok(outcome?),
                Err(ClientError::Deadline(last)) if sent > 0 => {
                    return Err(ClientError::Unknown(last));
                }
                Err(error) => return Err(error),
            }
        }
    }

    async fn open_session(
        &self,
        end: Instant,
        session: &mut Session,
    ) -> Result<SessionId, ClientError> {
        let (expect, command) = (Expect::default(), Command::OpenSession);
        let request =
            Request { session: SessionId(0), sequence: 0, at_ms: now_ms(), expect, command };
        match self.send(end, &request).await.0?? {
            Applied::Session(id) => {
                *session = Session { id: Some(id), sequence: 0 };
                Ok(id)
            }
            _ => Err(Malformed::Unknown("the number of a session").into()),
        }
    }

    /// The outcome, and how often the request may have reached a voter.
    async fn send(&self, end: Instant, request: &Request) -> (Result<Outcome, ClientError>, u32) {
        let sent = AtomicU32::new(0);
        let message = request.to_wire();
        let call = |channel: Channel| {
            sent.fetch_add(1, Ordering::Relaxed);
            submit(channel, message.clone())
        };
        let reply = self.until(end, true, call).await;
        let outcome = reply.and_then(|reply| {
            let outcome = reply.outcome.ok_or(Malformed::Unknown("the outcome"))?;
            Ok(outcome_in(outcome)?)
        });
        (outcome, sent.into_inner())
    }
}

async fn submit(
    channel: Channel,
    request: wire::MembershipRequest,
) -> Result<wire::ProposeReply, Status> {
    let mut client = MembershipClient::new(channel).max_encoding_message_size(2 * REQUEST_LEN_MAX);
    let reply = client.propose(wire::ProposeRequest { request: Some(request) }).await?;
    Ok(reply.into_inner())
}

/// Milliseconds since 1970: data in the log, never a reason to decide.
fn now_ms() -> u64 {
    let since = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_millis()).unwrap_or(u64::MAX)
}
