//! What every long-running role does around its library: read the configuration, take an inherited
//! listener, tell its supervisor how it is doing, and know when to stop.
//!
//! **Socket activation.** A role takes its listeners from file descriptors 3 and 4 as far as
//! `LISTEN_FDS` says that they are there (and `LISTEN_PID` is absent or its own, as systemd sets
//! it): first what it serves, then the control plane of a coordinator or the metrics of an expert node.
//! `entente up` uses this to
//! bind every port before anything starts: no process ever guesses a port, and none can be taken by
//! somebody else in between. `up` sets no `LISTEN_PID`, since a child's pid is not known before
//! its environment is.
//!
//! **Two ways to stop.** SIGTERM and SIGINT ask a role to leave: it may first see to it that nobody
//! misses it. A second signal, or the end of supervision, asks it to stop at once.
//!
//! **A service manager** that started a role hears when it is ready and when it stops ([`notify`]).
//!
//! **Supervision.** Standard input is the leash: with `--supervised` it is a pipe whose other end
//! only the parent holds. It reaches its end when the parent closes it or dies of anything, also
//! SIGKILL, so no child can outlive its parent.

use std::future::Future;
use std::io::{self, Read, Write};
use std::net::{SocketAddr, TcpListener};
use std::path::{Path, PathBuf};
use std::pin::{Pin, pin};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::Duration;

use anyhow::Context;
use clap::Args;
use listenfd::ListenFd;
use serde::de::DeserializeOwned;
use tokio::runtime::Runtime;
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::oneshot;

use crate::exit::Misuse;
use crate::notify::{self, State};
use crate::status::Status;

/// How long a role may take to stop once its parent let go, before it just ends. Longer than a
/// coordinator lets running requests go on.
const ORPHAN_GRACE: Duration = Duration::from_secs(12);

/// Exit code of a role that was still busy when [`ORPHAN_GRACE`] was over.
const EXIT_ORPHANED: i32 = 1;

/// The flags of a role.
#[derive(Debug, Clone, Args)]
pub struct RoleArgs {
    /// The TOML file that describes this process; an unknown key in it is an error.
    #[arg(long, env = "ENTENTE_CONFIG", value_name = "FILE")]
    pub config: PathBuf,

    /// Report status as JSON lines on standard output, and stop when standard input ends.
    #[arg(long, env = "ENTENTE_SUPERVISED")]
    pub supervised: bool,
}

/// Reads the configuration of a role.
///
/// # Errors
/// [`Misuse`] when the file is not what the role understands; the text names file, line and key.
pub fn load_config<T: DeserializeOwned>(path: &Path) -> anyhow::Result<T> {
    let text = std::fs::read_to_string(path)
        .map_err(|error| Misuse(format!("cannot read {}: {error}", path.display())))?;
    let config = toml::from_str(&text)
        .map_err(|error| Misuse(format!("{} is not valid: {error}", path.display())))?;
    Ok(config)
}

/// The listeners that were handed over by whoever started this process, as far as there are any.
/// They can be taken once.
pub fn inherited_listeners() -> anyhow::Result<[Option<TcpListener>; 2]> {
    let mut inherited = ListenFd::from_env();
    let mut take =
        |at| inherited.take_tcp_listener(at).context("an inherited file descriptor is no listener");
    Ok([take(0)?, take(1)?])
}

/// Tells the supervisor, or without one the log, how a role is doing.
#[derive(Debug)]
pub struct Reporter {
    supervised: bool,
    percent: AtomicU64,
    ready: AtomicBool,
}

impl Reporter {
    fn new(supervised: bool) -> Self {
        Self { supervised, percent: AtomicU64::new(u64::MAX), ready: AtomicBool::new(false) }
    }

    /// Tells the progress of loading, at most once a percent. May be called from any thread.
    pub fn loading(&self, done: u64, total: u64) {
        let percent = u128::from(done) * 100 / u128::from(total.max(1));
        let percent = u64::try_from(percent).unwrap_or(100);
        let told = self.percent.swap(percent, Ordering::Relaxed);
        if told == percent {
            return;
        }
        if self.supervised {
            tell(&Status::Loading { done, total });
        } else if told == u64::MAX || told / 25 != percent / 25 {
            tracing::info!(percent, "loading");
        }
    }

    /// Tells that the role answers.
    pub fn ready(&self, address: SocketAddr, experts: usize, weights_bytes: u64) {
        self.ready.store(true, Ordering::Relaxed);
        if self.supervised {
            tell(&Status::Ready { address, experts, weights_bytes });
        } else {
            notify::tell(State::Ready);
        }
        tracing::info!(%address, experts, weights_bytes, "ready");
    }
}

/// A parent that no longer reads is about to close standard input as well, so a failed write needs
/// no handling of its own.
fn tell(status: &Status) {
    if let Ok(line) = serde_json::to_string(status) {
        let _ = writeln!(io::stdout().lock(), "{line}");
    }
}

/// Completes when a role is asked to leave or to stop.
pub type Shutdown = Pin<Box<dyn Future<Output = ()> + Send>>;

/// Runs a role that knows one way to stop, until it ends or is asked to leave or to stop.
pub fn run<F, E>(
    args: &RoleArgs,
    role: impl FnOnce(Arc<Reporter>, Shutdown) -> F,
) -> anyhow::Result<()>
where
    F: Future<Output = Result<(), E>>,
    anyhow::Error: From<E>,
{
    run_leaving(args, |reporter, leave, stop| {
        let either = async {
            tokio::select! {
                () = leave => {}
                () = stop => {}
            }
        };
        role(reporter, Box::pin(either))
    })
}

/// Runs a role until it ends. The first future completes when it should leave, the second when it
/// should stop whatever it still has to do.
///
/// A role that is ready is asked, and this waits for its end. One that is still loading has nothing
/// to finish and is left where it is.
pub fn run_leaving<F, E>(
    args: &RoleArgs,
    role: impl FnOnce(Arc<Reporter>, Shutdown, Shutdown) -> F,
) -> anyhow::Result<()>
where
    F: Future<Output = Result<(), E>>,
    anyhow::Error: From<E>,
{
    let reporter = Arc::new(Reporter::new(args.supervised));
    let runtime = Runtime::new().context("cannot start the runtime")?;
    let result = runtime.block_on(async {
        let mut asks = Asks::new(args.supervised)?;
        let (leave, asked_to_leave) = order();
        let (stop, asked_to_stop) = order();
        let mut role = pin!(role(reporter.clone(), asked_to_leave, asked_to_stop));
        let ask = tokio::select! {
            result = &mut role => return Ok(result?),
            ask = asks.next() => ask,
        };
        if !reporter.ready.load(Ordering::Relaxed) {
            return Ok(());
        }
        if !args.supervised {
            notify::tell(State::Stopping);
        }
        if ask == Ask::Leave {
            let _ = leave.send(());
            // Whoever asks twice, by whatever means, does not want to wait.
            tokio::select! {
                result = &mut role => return Ok(result?),
                _ = asks.next() => {}
            }
        }
        let _ = stop.send(());
        Ok(role.await?)
    });
    // Weights may still be read on a thread of the runtime, for nobody.
    runtime.shutdown_background();
    result
}

/// A message without content, and the future that waits for it; one that can no longer come is
/// never waited for in vain, since its sender lives as long as the role.
fn order() -> (oneshot::Sender<()>, Shutdown) {
    let (send, receive) = oneshot::channel();
    let order = async {
        if receive.await.is_err() {
            std::future::pending().await
        }
    };
    (send, Box::pin(order))
}

/// What a role can be asked from outside.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Ask {
    Leave,
    Stop,
}

/// Hears what the role is asked. Not to be heard again after [`Ask::Stop`].
struct Asks {
    terminate: Signal,
    interrupt: Signal,
    leash: Option<oneshot::Receiver<()>>,
}

impl Asks {
    fn new(supervised: bool) -> anyhow::Result<Self> {
        Ok(Self {
            terminate: signal(SignalKind::terminate()).context("cannot watch SIGTERM")?,
            interrupt: signal(SignalKind::interrupt()).context("cannot watch SIGINT")?,
            leash: supervised.then(parent_gone).transpose()?,
        })
    }

    async fn next(&mut self) -> Ask {
        let let_go = async {
            match &mut self.leash {
                Some(leash) => drop(leash.await),
                None => std::future::pending().await,
            }
        };
        let (why, ask) = tokio::select! {
            _ = self.terminate.recv() => ("SIGTERM", Ask::Leave),
            _ = self.interrupt.recv() => ("SIGINT", Ask::Leave),
            () = let_go => ("the supervisor let go", Ask::Stop),
        };
        tracing::info!(why, "stopping");
        ask
    }
}

/// Watches standard input from a thread of its own, so that the end of the parent is seen however
/// busy the runtime is.
fn parent_gone() -> anyhow::Result<oneshot::Receiver<()>> {
    let (gone, watcher) = oneshot::channel();
    let watch = move || {
        let mut sink = [0; 64];
        // Nothing is ever sent on the leash; an error means as much as its end.
        while io::stdin().lock().read(&mut sink).is_ok_and(|len| len > 0) {}
        let _ = gone.send(());
        thread::sleep(ORPHAN_GRACE);
        std::process::exit(EXIT_ORPHANED);
    };
    thread::Builder::new().name("leash".into()).spawn(watch).context("cannot start a thread")?;
    Ok(watcher)
}
