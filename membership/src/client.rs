//! [`Client`]: what nodes, operators and voters themselves use to speak to the control plane.
//!
//! It finds the leader by asking: voters that do not lead say who does, and one that does not answer
//! is passed over for the next. A call is repeated until somebody answers or its time is up, so
//! whatever is called must be harmless to repeat; [`Client::propose`] makes a proposal harmless by
//! repeating it with the same session and sequence.
//!
//! What it does not know: what the calls are for. It keeps no opinion about who lives.

mod addresses;
mod propose;
mod watch;

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use entente_tls::Credentials;
use tokio::time::{Instant, sleep, timeout};
use tonic::transport::Channel;
use tonic::{Code, Status};

use crate::net::{Dialler, Reason};
use crate::state::Refused;
use crate::state::codec::Malformed;
use addresses::Addresses;
use propose::Session;

/// How long the first attempt of a call may take; each that takes longer doubles the next one's. A
/// leader that hangs must be passed over before the next one takes its callers for dead.
const ATTEMPT: Duration = Duration::from_millis(500);
/// Pause after nobody could answer, at first and at most: an election takes some hundred
/// milliseconds, and there is no event to wait for.
const PAUSE_MIN: Duration = Duration::from_millis(5);
const PAUSE_MAX: Duration = Duration::from_millis(40);

/// Why a call came to nothing.
#[derive(Debug, Clone, thiserror::Error)]
pub enum ClientError {
    /// There is nobody to call.
    #[error("no address of a voter is known")]
    NoAddress,
    /// Nobody could do it in time.
    #[error("the control plane did not answer in time; the last it said: {0}")]
    Deadline(String),
    /// The proposal may have been committed or not, and may still be.
    #[error("the outcome of the proposal is not known; the last that was heard: {0}")]
    Unknown(String),
    /// It was refused for good.
    #[error("{}", .0.message())]
    Status(Box<Status>),
    /// It was committed, and refused alike by all voters.
    #[error(transparent)]
    Refused(#[from] Refused),
    /// An answer has no meaning here; perhaps a newer version gave it.
    #[error("the answer of a voter: {0}")]
    Malformed(#[from] Malformed),
}

impl ClientError {
    /// The reason that a program can do something about.
    pub fn reason(&self) -> Option<Reason> {
        match self {
            Self::Status(status) => Reason::of(status),
            Self::Unknown(_) => Some(Reason::UnknownOutcome),
            _ => None,
        }
    }
}

/// Speaks to the voters of one cluster. Cheap to clone; clones share connections and the session.
#[derive(Clone)]
pub struct Client(Arc<Inner>);

struct Inner {
    dialler: Dialler,
    addresses: Mutex<Addresses>,
    session: tokio::sync::Mutex<Session>,
}

/// What is to be done after an attempt that failed.
enum Next {
    /// Somebody may lead.
    Ask(Option<String>),
    GiveUp(Box<Status>),
}

impl Client {
    /// `addresses`: control ports of some voters; others are learnt from what they say.
    ///
    /// # Errors
    /// There are none, or the credentials are of no use.
    pub fn new(credentials: &Credentials, addresses: Vec<String>) -> Result<Self, ClientError> {
        let dialler = Dialler::new(credentials, None);
        let dialler = dialler.map_err(|error| {
            ClientError::Status(Box::new(Status::unauthenticated(error.to_string())))
        })?;
        Self::with(dialler, addresses)
    }

    /// The same with a dialler that knows more.
    pub fn with(dialler: Dialler, addresses: Vec<String>) -> Result<Self, ClientError> {
        if addresses.is_empty() {
            return Err(ClientError::NoAddress);
        }
        Ok(Self(Arc::new(Inner {
            dialler,
            addresses: Mutex::new(Addresses::new(addresses)),
            session: tokio::sync::Mutex::default(),
        })))
    }

    fn addresses(&self) -> MutexGuard<'_, Addresses> {
        self.0.addresses.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Calls the leader: follows redirects, tries the others on errors, until the deadline. `call`
    /// may be made several times.
    ///
    /// # Errors
    /// It was refused for good, or nobody answered in time.
    pub async fn leader<T, F>(
        &self,
        deadline: Duration,
        call: impl Fn(Channel) -> F,
    ) -> Result<T, ClientError>
    where
        F: Future<Output = Result<T, Status>>,
    {
        self.until(Instant::now() + deadline, true, call).await
    }

    /// Calls any voter, the one that answered last if it still does.
    ///
    /// # Errors
    /// As [`Client::leader`].
    pub async fn any<T, F>(
        &self,
        deadline: Duration,
        call: impl Fn(Channel) -> F,
    ) -> Result<T, ClientError>
    where
        F: Future<Output = Result<T, Status>>,
    {
        self.until(Instant::now() + deadline, false, call).await
    }

    async fn until<T, F>(
        &self,
        end: Instant,
        leader: bool,
        call: impl Fn(Channel) -> F,
    ) -> Result<T, ClientError>
    where
        F: Future<Output = Result<T, Status>>,
    {
        let (mut attempt, mut pause) = (ATTEMPT, PAUSE_MIN);
        let mut to = self.addresses().first(leader);
        let mut tried = Vec::new();
        loop {
            let left = end.saturating_duration_since(Instant::now());
            let answer = match timeout(attempt.min(left), self.attempt(&to, &call)).await {
                Ok(Ok(value)) => {
                    self.addresses().answered(&to, leader);
                    return Ok(value);
                }
                Ok(Err(status)) => status,
                Err(_) => {
                    attempt *= 2;
                    self.addresses().failed(&to);
                    Status::deadline_exceeded(format!("{to} did not answer"))
                }
            };
            let hint = match next(&answer) {
                Next::Ask(hint) => hint,
                Next::GiveUp(status) => return Err(ClientError::Status(status)),
            };
            if Instant::now() + pause >= end {
                return Err(ClientError::Deadline(answer.message().to_owned()));
            }
            tried.push(to);
            let untried = self.addresses().next(&tried, hint);
            to = match untried {
                Some(address) => address,
                None => {
                    sleep(pause).await;
                    pause = (pause * 2).min(PAUSE_MAX);
                    let last = tried.pop().unwrap_or_default();
                    tried.clear();
                    self.addresses().after(&last)
                }
            };
        }
    }

    async fn attempt<T, F>(&self, to: &str, call: &impl Fn(Channel) -> F) -> Result<T, Status>
    where
        F: Future<Output = Result<T, Status>>,
    {
        let known = self.addresses().channel(to);
        let channel = match known {
            Some(channel) => channel,
            None => {
                let dialled = self.0.dialler.dial(to).await;
                let channel = dialled.map_err(|error| {
                    self.addresses().failed(to);
                    Status::unavailable(error.to_string())
                })?;
                self.addresses().keep_channel(to, channel.clone());
                channel
            }
        };
        let result = call(channel).await;
        if let Err(status) = &result
            && Reason::of(status).is_none()
        {
            // The connection may be broken; the next attempt dials again.
            self.addresses().failed(to);
        }
        result
    }
}

/// Whether somebody else, or the same one later, may answer otherwise.
fn next(status: &Status) -> Next {
    match (Reason::of(status), status.code()) {
        (Some(Reason::NotLeader), _) => Next::Ask(Reason::leader_in(status).map(str::to_owned)),
        (Some(Reason::UnknownOutcome | Reason::NoAuthority), _) => Next::Ask(None),
        (Some(_), _) => Next::GiveUp(Box::new(status.clone())),
        (
            None,
            Code::Unavailable
            | Code::Unknown
            | Code::Cancelled
            | Code::Internal
            | Code::Aborted
            | Code::DeadlineExceeded
            | Code::ResourceExhausted,
        ) => Next::Ask(None),
        (None, _) => Next::GiveUp(Box::new(status.clone())),
    }
}
