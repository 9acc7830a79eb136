//! Changing links from outside: a socket in the data directory.
//!
//! One line of JSON each way. Only who may write in the data directory can connect; it is made for
//! its owner alone.

use std::fs;
use std::io::{self, BufRead, BufReader, Read, Write};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, bail};
use serde::{Deserialize, Serialize};
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt};
use tokio::net::{UnixListener, UnixStream as Peer};

use super::Switch;
use super::traffic::Traffic;
use crate::exit::{Failure, Misuse};

/// Longest line in bytes: the traffic of a cluster of the largest size that `up` starts.
const LINE_BYTES_MAX: u64 = 1 << 20;
/// How long either side waits for the other.
const PATIENCE: Duration = Duration::from_secs(5);

/// What is asked.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
enum Request {
    /// Change these links, each a word such as `fr-se=30ms`.
    Set(Vec<String>),
    /// Say what holds.
    List,
    /// Say what has passed.
    Traffic,
}

/// What is answered.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
enum Reply {
    /// What holds now: links and words.
    Links(Vec<(String, String)>),
    /// What has passed between any two processes.
    Traffic(Vec<Traffic>),
    /// Why it was not done.
    Refused(String),
}

fn socket_in(data_dir: &Path) -> PathBuf {
    data_dir.join("links.sock")
}

/// Answers at the socket in `data_dir`, for as long as the result is polled.
///
/// # Errors
/// The socket cannot be made, for example as its path is longer than the system allows.
pub fn serve(data_dir: &Path, switch: Switch) -> anyhow::Result<impl Future<Output = ()> + use<>> {
    let path = socket_in(data_dir);
    let cannot = || format!("cannot listen at {}", path.display());
    match fs::remove_file(&path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            return Err(error).with_context(cannot);
        }
        _ => {}
    }
    let listener = UnixListener::bind(&path).with_context(cannot)?;
    fs::set_permissions(&path, fs::Permissions::from_mode(0o600)).with_context(cannot)?;
    Ok(async move {
        loop {
            // One at a time: nobody asks often, and the order of changes is theirs.
            let Ok((peer, _)) = listener.accept().await else { continue };
            let _ = tokio::time::timeout(PATIENCE, answer(peer, &switch)).await;
        }
    })
}

async fn answer(peer: Peer, switch: &Switch) -> io::Result<()> {
    let (read, mut write) = peer.into_split();
    let mut line = String::new();
    tokio::io::BufReader::new(read.take(LINE_BYTES_MAX)).read_line(&mut line).await?;
    let reply = match serde_json::from_str(&line) {
        Ok(request) => reply(request, switch),
        Err(error) => Reply::Refused(format!("not understood: {error}")),
    };
    let text = serde_json::to_string(&reply)?;
    write.write_all(format!("{text}\n").as_bytes()).await
}

/// Changes all or, when one word is wrong, none.
fn reply(request: Request, switch: &Switch) -> Reply {
    let words = match request {
        Request::List => Vec::new(),
        Request::Set(words) => words,
        Request::Traffic => return Reply::Traffic(switch.traffic()),
    };
    let changes: Result<Vec<_>, String> = words.iter().map(|word| word.parse()).collect();
    match changes.and_then(|changes| switch.change_all(changes)) {
        Ok(()) => Reply::Links(switch.list()),
        Err(error) => Reply::Refused(error),
    }
}

/// Changes links of the cluster in `data_dir`; says what holds afterwards.
///
/// # Errors
/// There is no relay there, or it refuses.
pub fn set(data_dir: &Path, words: Vec<String>) -> anyhow::Result<Vec<(String, String)>> {
    links(ask(data_dir, &Request::Set(words))?)
}

/// What holds on the links of the cluster in `data_dir`.
pub fn list(data_dir: &Path) -> anyhow::Result<Vec<(String, String)>> {
    links(ask(data_dir, &Request::List)?)
}

/// What has passed between the processes of the cluster in `data_dir`.
pub fn traffic(data_dir: &Path) -> anyhow::Result<Vec<Traffic>> {
    match ask(data_dir, &Request::Traffic)? {
        Reply::Traffic(traffic) => Ok(traffic),
        other => bail!("the relay answered something else: {other:?}"),
    }
}

fn links(reply: Reply) -> anyhow::Result<Vec<(String, String)>> {
    match reply {
        Reply::Links(links) => Ok(links),
        other => bail!("the relay answered something else: {other:?}"),
    }
}

fn ask(data_dir: &Path, request: &Request) -> anyhow::Result<Reply> {
    let path = socket_in(data_dir);
    let mut socket = UnixStream::connect(&path).map_err(|error| {
        Misuse(format!(
            "there is no relay in {} ({error}): start the cluster with `entente up --link`, for \
             example with --link fr-se=0ms",
            data_dir.display()
        ))
    })?;
    socket.set_read_timeout(Some(PATIENCE))?;
    socket.write_all(format!("{}\n", serde_json::to_string(request)?).as_bytes())?;
    let mut line = String::new();
    BufReader::new(socket.take(LINE_BYTES_MAX)).read_line(&mut line)?;
    if line.is_empty() {
        bail!("the relay did not answer");
    }
    match serde_json::from_str(&line)? {
        Reply::Refused(text) => Err(Failure::Refused(text).into()),
        reply => Ok(reply),
    }
}
