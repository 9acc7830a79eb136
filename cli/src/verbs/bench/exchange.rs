//! `entente bench exchange`: what the way to the experts and back costs, arithmetic aside.
//!
//! One exchange sends a frame with so many bytes of rows to each node and is over when each has
//! answered with as many. The nodes are real but for their kernels, which copy ([`node`]): each has
//! a runtime of its own and is reached over loopback by the real link. Beside it, on the same
//! machine in the same minute, a bare blocking echo of the same bytes to as many peers ([`echo`]),
//! with and without TLS 1.3: the least that a transport could cost.

mod echo;
mod node;

use std::time::{Duration, Instant};

use clap::Args;
use comfy_table::Table;
use serde::Serialize;

use self::echo::{Echo, Tls};
use self::node::Nodes;
use super::stats::{median, quantile};
use crate::cluster::columns;
use crate::cluster::plan::Transport;

/// Sizes in KiB.
const SIZES_KIB: [usize; 3] = [8, 64, 1_024];
/// Nodes or peers.
const PEERS: [usize; 3] = [1, 2, 4];
/// Turns that the three transports take for each line, so that all see the same machine.
const TURNS: u32 = 4;

/// The flags of `entente bench exchange`.
#[derive(Debug, Args)]
pub struct ExchangeArgs {
    /// How long each transport is measured at each size and number of nodes.
    #[arg(long, env = "ENTENTE_SECONDS", value_name = "S", default_value_t = 1)]
    #[arg(value_parser = clap::value_parser!(u16).range(1..=600))]
    seconds: u16,

    /// The link to measure: frames on a byte stream, gRPC, or none at all.
    #[arg(long, env = "ENTENTE_TRANSPORT", value_enum, default_value = "stream")]
    transport: Transport,
}

/// Times of one transport.
#[derive(Debug, Serialize)]
struct Times {
    p50_us: f64,
    p99_us: f64,
    exchanges: usize,
}

impl Times {
    fn of(us: &[f64]) -> Self {
        Self { p50_us: median(us), p99_us: quantile(us, 0.99), exchanges: us.len() }
    }
}

/// One size to so many nodes.
#[derive(Debug, Serialize)]
struct Line {
    bytes: usize,
    nodes: usize,
    link: Times,
    tcp_echo: Times,
    tls_echo: Times,
    /// p50 of the link divided by that of the TLS echo.
    link_to_tls: f64,
    /// p50 of the link divided by that of the TCP echo.
    link_to_tcp: f64,
}

/// What was found.
#[derive(Debug, Serialize)]
pub struct Found {
    transport: &'static str,
    tls_cipher: String,
    exchanges: Vec<Line>,
}

/// Measures every size to every number of nodes.
pub fn run(args: &ExchangeArgs) -> anyhow::Result<Found> {
    let turn = Duration::from_secs(args.seconds.into()) / TURNS;
    let tls = Tls::new()?;
    let (mut exchanges, mut tls_cipher) = (Vec::new(), String::new());
    for peers in PEERS {
        let mut nodes = Nodes::start(peers, args.transport)?;
        for bytes in SIZES_KIB.map(|kib| kib << 10) {
            let mut plain = Echo::plain(peers, bytes)?;
            let mut secure = Echo::secure(peers, bytes, &tls)?;
            tls_cipher = secure.cipher();
            let (mut link_us, mut tcp_us, mut tls_us) = (Vec::new(), Vec::new(), Vec::new());
            for _ in 0..TURNS {
                repeat(turn, &mut link_us, || nodes.exchange(bytes))?;
                repeat(turn, &mut tcp_us, || plain.exchange())?;
                repeat(turn, &mut tls_us, || secure.exchange())?;
            }
            let (link, tcp_echo, tls_echo) =
                (Times::of(&link_us), Times::of(&tcp_us), Times::of(&tls_us));
            exchanges.push(Line {
                bytes,
                nodes: peers,
                link_to_tls: link.p50_us / tls_echo.p50_us,
                link_to_tcp: link.p50_us / tcp_echo.p50_us,
                link,
                tcp_echo,
                tls_echo,
            });
        }
    }
    Ok(Found { transport: args.transport.name(), tls_cipher, exchanges })
}

/// Runs `exchange` for so long, after some runs that do not count.
fn repeat(
    long: Duration,
    us: &mut Vec<f64>,
    mut exchange: impl FnMut() -> anyhow::Result<()>,
) -> anyhow::Result<()> {
    for _ in 0..3 {
        exchange()?;
    }
    let start = Instant::now();
    while start.elapsed() < long {
        let start = Instant::now();
        exchange()?;
        us.push(start.elapsed().as_secs_f64() * 1e6);
    }
    Ok(())
}

impl super::Report for Found {
    fn table(&self) -> Table {
        let mut table = columns([
            "KIB", "NODES", "LINK P50", "P99", "TCP P50", "P99", "TLS P50", "P99", "LINK/TCP",
            "LINK/TLS",
        ]);
        for line in &self.exchanges {
            let us = |us: f64| format!("{us:.0}");
            table.add_row([
                (line.bytes >> 10).to_string(),
                line.nodes.to_string(),
                us(line.link.p50_us),
                us(line.link.p99_us),
                us(line.tcp_echo.p50_us),
                us(line.tcp_echo.p99_us),
                us(line.tls_echo.p50_us),
                us(line.tls_echo.p99_us),
                format!("{:.2}", line.link_to_tcp),
                format!("{:.2}", line.link_to_tls),
            ]);
        }
        table
    }

    fn notes(&self) -> Vec<String> {
        vec![format!(
            "µs; bytes of rows to each node and back; link: {}, echoes: blocking, TLS 1.3 with {}",
            self.transport, self.tls_cipher
        )]
    }
}
