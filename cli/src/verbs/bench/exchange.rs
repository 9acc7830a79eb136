//! `entente bench exchange`: what the way to the experts and back costs, arithmetic aside.
//!
//! One exchange sends a frame with so many bytes of rows to each node and is over when each has
//! answered with as many. The nodes are real but for their kernels, which copy ([`node`]): each has
//! a runtime of its own and is reached over loopback by the real link. It is measured twice: the
//! frame alone, with rows in f32 that nobody rounds; and with what a coordinator and a node do to
//! rows in bf16 on the way, rounding and widening on both sides and adding up at the end.
//!
//! Beside it, on the same machine in the same minute, a bare blocking echo of the same bytes to as
//! many peers ([`echo`]), with and without TLS 1.3: the least that a transport could cost.

mod echo;
mod node;

use std::sync::Arc;
use std::time::{Duration, Instant};

use clap::Args;
use comfy_table::Table;
use entente_membership::roster::Roster;
use entente_proto::frame::Dtype;
use entente_proto::identity::{Identity, Role};
use entente_tls::{Authority, Credentials};
use rustls::{ClientConfig, ServerConfig};
use serde::Serialize;

use self::echo::Echo;
use self::node::Nodes;
use super::stats::{median, quantile};
use crate::cluster::columns;
use crate::cluster::plan::Transport;

/// Sizes in KiB.
const SIZES_KIB: [usize; 3] = [8, 64, 1_024];
/// Nodes or peers.
const PEERS: [usize; 3] = [1, 2, 4];
/// Turns that what is measured takes for each line, so that all see the same machine.
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

    /// Without TLS on the link.
    #[arg(long, env = "ENTENTE_PLAIN")]
    plain: bool,
}

/// Certificates for both ends, made for the occasion.
struct Tls {
    coordinator: Credentials,
    node: Credentials,
    roster: Roster,
}

impl Tls {
    fn new(roster: Roster) -> anyhow::Result<Self> {
        let valid = Duration::from_secs(24 * 3_600);
        let authority = Authority::new(roster.name(), valid)?;
        let credentials = |role, node: &str| {
            let cluster = roster.expect(role, None).cluster;
            let identity = Identity { cluster, region: "fr".parse()?, role, node: node.parse()? };
            anyhow::Ok(authority.credentials(authority.issue(&identity, valid)?)?)
        };
        Ok(Self {
            coordinator: credentials(Role::Coordinator, "fr-coordinator")?,
            node: credentials(Role::Expert, node::NAME)?,
            roster,
        })
    }

    fn client(&self, alpn: &[&[u8]]) -> anyhow::Result<Arc<ClientConfig>> {
        Ok(self.coordinator.client(self.roster.expect(Role::Expert, None), alpn)?)
    }

    fn server(&self) -> anyhow::Result<Arc<ServerConfig>> {
        Ok(self.node.server(self.roster.expect(Role::Coordinator, None), &[])?)
    }
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
    /// Bytes out and back through the link and the node.
    frame: Times,
    /// The same with rounding and adding up.
    exchange: Times,
    tcp_echo: Times,
    tls_echo: Times,
    /// p50 of the frame divided by that of the TLS echo.
    frame_to_tls: f64,
    /// p50 of the frame divided by that of the TCP echo.
    frame_to_tcp: f64,
    /// p50 of the exchange divided by that of the TLS echo.
    exchange_to_tls: f64,
    /// p50 of the exchange divided by that of the TCP echo.
    exchange_to_tcp: f64,
}

/// What was found.
#[derive(Debug, Serialize)]
pub struct Found {
    transport: &'static str,
    tls: bool,
    tls_cipher: String,
    exchanges: Vec<Line>,
}

/// Measures every size to every number of nodes.
pub fn run(args: &ExchangeArgs) -> anyhow::Result<Found> {
    let turn = Duration::from_secs(args.seconds.into()) / TURNS;
    let tls = Tls::new(node::roster()?)?;
    let on_link = (!args.plain).then_some(&tls);
    let (mut exchanges, mut tls_cipher) = (Vec::new(), String::new());
    for peers in PEERS {
        let mut exact = Nodes::start(peers, args.transport, on_link, Dtype::F32)?;
        let mut rounded = Nodes::start(peers, args.transport, on_link, Dtype::Bf16)?;
        for bytes in SIZES_KIB.map(|kib| kib << 10) {
            let mut plain = Echo::plain(peers, bytes)?;
            let mut secure = Echo::secure(peers, bytes, &tls)?;
            tls_cipher = secure.cipher();
            let mut us: [Vec<f64>; 4] = Default::default();
            for _ in 0..TURNS {
                repeat(turn, &mut us[0], || exact.frames(bytes))?;
                repeat(turn, &mut us[1], || rounded.exchange(bytes))?;
                repeat(turn, &mut us[2], || plain.exchange())?;
                repeat(turn, &mut us[3], || secure.exchange())?;
            }
            exchanges.push(line(bytes, peers, us.map(|us| Times::of(&us))));
        }
    }
    Ok(Found { transport: args.transport.name(), tls: !args.plain, tls_cipher, exchanges })
}

fn line(bytes: usize, nodes: usize, times: [Times; 4]) -> Line {
    let [frame, exchange, tcp_echo, tls_echo] = times;
    Line {
        bytes,
        nodes,
        frame_to_tls: frame.p50_us / tls_echo.p50_us,
        frame_to_tcp: frame.p50_us / tcp_echo.p50_us,
        exchange_to_tls: exchange.p50_us / tls_echo.p50_us,
        exchange_to_tcp: exchange.p50_us / tcp_echo.p50_us,
        frame,
        exchange,
        tcp_echo,
        tls_echo,
    }
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
            "KIB",
            "NODES",
            "FRAME P50",
            "P99",
            "EXCHANGE P50",
            "P99",
            "TCP P50",
            "P99",
            "TLS P50",
            "P99",
            "FRAME/TCP",
            "FRAME/TLS",
            "EXCHANGE/TCP",
            "EXCHANGE/TLS",
        ]);
        for line in &self.exchanges {
            let times = [&line.frame, &line.exchange, &line.tcp_echo, &line.tls_echo];
            let ratios =
                [line.frame_to_tcp, line.frame_to_tls, line.exchange_to_tcp, line.exchange_to_tls];
            let mut row = vec![(line.bytes >> 10).to_string(), line.nodes.to_string()];
            let us = |us: f64| format!("{us:.0}");
            row.extend(times.iter().flat_map(|times| [us(times.p50_us), us(times.p99_us)]));
            row.extend(ratios.iter().map(|ratio| format!("{ratio:.2}")));
            table.add_row(row);
        }
        table
    }

    fn notes(&self) -> Vec<String> {
        let secured = if self.tls { "over TLS" } else { "in plain text" };
        vec![format!(
            "µs; bytes of rows to each node and back; link: {} {secured}, echoes: blocking; TLS 1.3 \
             with {}",
            self.transport, self.tls_cipher
        )]
    }
}
