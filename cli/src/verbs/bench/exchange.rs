//! `entente bench exchange`: what the way to the experts and back costs, arithmetic aside.
//!
//! One exchange sends a frame with so many bytes of rows to each node and is over when each has
//! answered with as many. The nodes are real but for their kernels, which copy ([`copying`]): each
//! has a runtime of its own and is reached over loopback by the real link. It is measured twice:
//! frames alone, with rows that nobody rounds ([`frames`]); and by the engine's own exchanger, which
//! rounds rows to bf16, plans, sends, and adds up what comes back ([`exchanges`]).
//!
//! Beside it, on the same machine in the same minute, a bare blocking echo of the same bytes to as
//! many peers ([`echo`]), with and without TLS 1.3: the least that a transport could cost.

mod cluster;
mod copying;
mod echo;
mod exchanges;
mod frames;

use std::sync::Arc;
use std::time::{Duration, Instant};

use clap::Args;
use comfy_table::Table;
use entente_membership::roster::Roster;
use entente_proto::frame::Dtype;
use entente_proto::identity::{Identity, Role};
use entente_proto::ids::NodeName;
use entente_tls::{Authority, Credentials};
use rustls::{ClientConfig, ServerConfig};
use serde::Serialize;

use self::cluster::Cluster;
use self::echo::Echo;
use self::exchanges::Exchanges;
use self::frames::Frames;
use crate::cluster::columns;
use crate::cluster::plan::Transport;
use crate::stats::{median, quantile};

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

    /// KiB of rows to each node and back; a row has 4.
    #[arg(long, env = "ENTENTE_KIB", value_name = "N,…", value_delimiter = ',')]
    #[arg(default_value = "8,64,1024", value_parser = clap::value_parser!(u16).range(8..=8_192))]
    kib: Vec<u16>,

    /// Expert nodes, or peers that echo.
    #[arg(long, env = "ENTENTE_NODES", value_name = "N,…", value_delimiter = ',')]
    #[arg(default_value = "1,2,4", value_parser = clap::value_parser!(u16).range(1..=8))]
    nodes: Vec<u16>,

    /// Without TLS on the link.
    #[arg(long, env = "ENTENTE_PLAIN")]
    plain: bool,
}

/// How long certificates are valid.
const VALID: Duration = Duration::from_secs(24 * 3_600);

/// Certificates for both ends, made for the occasion.
struct Tls {
    authority: Authority,
    coordinator: Credentials,
    roster: Roster,
}

impl Tls {
    fn new(roster: Roster) -> anyhow::Result<Self> {
        let cluster = roster.expect(Role::Coordinator, None).cluster;
        let authority = Authority::new(&cluster, "fr".parse()?, VALID)?;
        let coordinator =
            issue(&authority, &roster, Role::Coordinator, &"fr-coordinator".parse()?)?;
        Ok(Self { authority, coordinator, roster })
    }

    fn node(&self, name: &NodeName) -> anyhow::Result<Credentials> {
        issue(&self.authority, &self.roster, Role::Expert, name)
    }

    fn client(&self, alpn: &[&[u8]]) -> anyhow::Result<Arc<ClientConfig>> {
        Ok(self.coordinator.client(self.roster.expect(Role::Expert, None), alpn)?)
    }

    fn server(&self) -> anyhow::Result<Arc<ServerConfig>> {
        let node = self.node(&"fr-expert-1".parse()?)?;
        Ok(node.server(self.roster.expect(Role::Coordinator, None), &[])?)
    }
}

fn issue(
    authority: &Authority,
    roster: &Roster,
    role: Role,
    node: &NodeName,
) -> anyhow::Result<Credentials> {
    let cluster = roster.expect(role, None).cluster;
    let identity = Identity { cluster, region: "fr".parse()?, role, node: node.clone() };
    Ok(authority.credentials(&authority.issue(&identity, VALID)?)?)
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
    /// The same by the engine's exchanger, with rounding, planning and adding up.
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
    let nodes_max = args.nodes.iter().copied().max().unwrap_or(1);
    let tls = Tls::new(cluster::roster(nodes_max.into())?)?;
    let on_link = (!args.plain).then_some(&tls);
    let (mut exchanges, mut tls_cipher) = (Vec::new(), String::new());
    for peers in args.nodes.iter().map(|nodes| usize::from(*nodes)) {
        let cluster = |dtype| Cluster::start(peers, args.transport, on_link, dtype);
        let mut frames = Frames::new(cluster(Dtype::F32)?)?;
        let mut whole = Exchanges::new(cluster(Dtype::Bf16)?)?;
        for bytes in args.kib.iter().map(|kib| usize::from(*kib) << 10) {
            let mut plain = Echo::plain(peers, bytes)?;
            let mut secure = Echo::secure(peers, bytes, &tls)?;
            tls_cipher = secure.cipher();
            let mut us: [Vec<f64>; 4] = Default::default();
            for _ in 0..TURNS {
                repeat(turn, &mut us[0], || frames.run(bytes))?;
                repeat(turn, &mut us[1], || whole.run(bytes))?;
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
