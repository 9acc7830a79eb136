//! Goal: whoever attacks a port gets errors and closed connections, makes no process keep much, and
//! hardly slows down those who mean well.
//! Method: raw sockets against a real cluster, while a healthy client goes on asking; what each
//! process keeps is read from /proc. `ENTENTE_TEST_FULL=1` makes as many attempts as the figures in
//! `docs/limits.md` are about, and holds the healthy client's times against them; without it attempts
//! are fewer, so that this takes seconds, and times only show what blocks. Where times count attackers
//! run at the lowest priority: they would have machines of their own, and take what nobody else wants.

use std::fs;
use std::io::{Read, Write};
use std::net::{Shutdown, SocketAddr, TcpStream};
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use entente_tests::{Cluster, http};
use serde_json::{Value, json};

/// How much more memory than before an attack a process may keep.
const GROWTH_MAX_KIB: u64 = 64 << 10;
/// How long a peer that is attacked may take to say anything.
const PATIENCE: Duration = Duration::from_secs(10);
/// Requests of the healthy client before an attack.
const HEALTHY: usize = 200;

/// Whether as many attempts are made as the figures are about.
fn is_full() -> bool {
    std::env::var_os("ENTENTE_TEST_FULL").is_some()
}

/// `short` attempts, or `full` ones when asked for.
fn attempts(short: usize, full: usize) -> usize {
    if is_full() { full } else { short }
}

/// A cluster of one region, and what its processes keep.
struct Scene {
    cluster: Cluster,
    kept_kib: Vec<(String, u64)>,
}

impl Scene {
    fn new() -> Self {
        let cluster = Cluster::start(&["--regions", "fr=2", "--replicas", "2"]);
        // What is kept once and for all is kept before anything is compared.
        healthy(&cluster, HEALTHY);
        let kept_kib = kept_kib(&cluster);
        Self { cluster, kept_kib }
    }

    fn http(&self) -> SocketAddr {
        self.cluster.http().strip_prefix("http://").unwrap().parse().unwrap()
    }

    fn address(&self, role: &str) -> SocketAddr {
        let processes = self.cluster.file()["processes"].as_array().unwrap();
        let found = processes.iter().find(|process| process["role"] == role).unwrap();
        found["address"].as_str().unwrap().parse().unwrap()
    }

    /// Runs an attack beside a healthy client, and compares.
    fn under(&self, name: &str, attack: impl FnOnce() + Send) {
        let before = p99(&healthy(&self.cluster, HEALTHY));
        let over = AtomicBool::new(false);
        let mut times = Vec::new();
        let start = Instant::now();
        thread::scope(|scope| {
            let attacking = scope.spawn(|| {
                // Of this thread alone: Linux has priorities by thread.
                if is_full() {
                    rustix::process::nice(19).unwrap();
                }
                attack();
                over.store(true, Ordering::Relaxed);
            });
            while !over.load(Ordering::Relaxed) && !attacking.is_finished() {
                times.extend(healthy(&self.cluster, 10));
            }
            attacking.join().unwrap();
        });
        let during = p99(&times);
        let after = kept_kib(&self.cluster);
        assert_eq!(after.len(), self.kept_kib.len(), "a process has ended");
        let growth = after.iter().zip(&self.kept_kib).map(|(now, then)| {
            assert_eq!(now.0, then.0, "a process was started again");
            (now.1.saturating_sub(then.1), &now.0)
        });
        let (growth_kib, whose) = growth.max().unwrap();
        println!(
            "{name}: {:?}; healthy p99 {before:?} -> {during:?} ({} requests); most memory: {whose} \
             +{growth_kib} KiB",
            start.elapsed(),
            times.len()
        );
        assert!(growth_kib <= GROWTH_MAX_KIB, "{whose} keeps {growth_kib} KiB more");
        // The machine of these tests is shared: otherwise this finds what blocks, not what costs.
        let bound = if is_full() { before * 2 } else { before * 10 + Duration::from_millis(500) };
        assert!(during <= bound, "{name}: {before:?} -> {during:?}");
        assert_eq!(http::get(&format!("{}/readyz", self.cluster.http())).status, 200);
    }
}

/// How long each of so many small requests took, all of which must be served.
fn healthy(cluster: &Cluster, count: usize) -> Vec<Duration> {
    let url = format!("{}/v1/completions", cluster.http());
    let ask = |_| {
        let start = Instant::now();
        let reply = http::post(&url, &json!({ "prompt": [1, 2, 3], "max_tokens": 2 }));
        assert_eq!(reply.status, 200, "{}", reply.text);
        start.elapsed()
    };
    (0..count).map(ask).collect()
}

fn p99(times: &[Duration]) -> Duration {
    let mut sorted = times.to_vec();
    sorted.sort_unstable();
    sorted.get((sorted.len() * 99).div_ceil(100).saturating_sub(1)).copied().unwrap_or_default()
}

/// Resident memory of every process, by name and pid.
fn kept_kib(cluster: &Cluster) -> Vec<(String, u64)> {
    let kept = |process: &Value| {
        let (name, pid) = (&process["name"], &process["pid"]);
        let status = fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
        let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"))?;
        let kib = line.trim().strip_suffix(" kB")?.parse().ok()?;
        Some((format!("{name} {pid}"), kib))
    };
    cluster.file()["processes"].as_array().unwrap().iter().filter_map(kept).collect()
}

/// Connects and sends; a peer that wants no more of it may close at any time.
fn send(to: SocketAddr, bytes: &[u8]) -> TcpStream {
    let mut socket = TcpStream::connect(to).unwrap();
    socket.set_read_timeout(Some(PATIENCE)).unwrap();
    let _ = socket.write_all(bytes);
    socket
}

/// The status of the answer; none when the connection was closed without one.
fn status(mut socket: TcpStream) -> Option<u16> {
    let mut answer = Vec::new();
    // What came before a connection was reset counts.
    let end = socket.read_to_end(&mut answer);
    let timed_out = end.is_err_and(|error| error.kind() == std::io::ErrorKind::WouldBlock);
    assert!(!timed_out, "neither answered nor closed: {}", String::from_utf8_lossy(&answer));
    let text = String::from_utf8_lossy(&answer);
    text.strip_prefix("HTTP/1.1 ")?.get(..3)?.parse().ok()
}

/// splitmix64 (Steele, Lea and Flood 2014).
struct Random(u64);

impl Random {
    fn below(&mut self, bound: usize) -> usize {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        ((z ^ (z >> 31)) % bound as u64) as usize
    }
}

/// A request as bytes, with the cluster's key.
fn request(scene: &Scene) -> Vec<u8> {
    let body = r#"{"prompt": "a b", "max_tokens": 1, "temperature": 0, "stop": ["x"], "n": 1}"#;
    let key = scene.cluster.api_key().unwrap_or_default();
    format!(
        "POST /v1/completions HTTP/1.1\r\nhost: a\r\nauthorization: Bearer {key}\r\n\
         content-type: application/json\r\ncontent-length: {}\r\nconnection: close\r\n\r\n{body}",
        body.len()
    )
    .into_bytes()
}

/// Flips, cuts, repeats or puts in bytes, in one to four places.
fn mutate(bytes: &mut Vec<u8>, random: &mut Random) {
    for _ in 0..=random.below(4) {
        let at = random.below(bytes.len().max(1));
        let len = random.below(16).min(bytes.len() - at.min(bytes.len()));
        match random.below(4) {
            0 if at < bytes.len() => bytes[at] ^= 1 << random.below(8),
            1 => drop(bytes.drain(at..at + len)),
            2 => {
                let again: Vec<u8> = bytes[at..at + len].to_vec();
                bytes.splice(at..at, again.repeat(1 + random.below(4)));
            }
            _ => bytes.insert(at.min(bytes.len()), random.below(256) as u8),
        }
    }
}

#[test]
fn the_public_port_outlives_mutated_requests_slow_ones_and_huge_heads() {
    let scene = Scene::new();
    let to = scene.http();
    let (seed, valid) = (0x5eed_u64, request(&scene));
    assert_eq!(status(send(to, &valid)), Some(200));
    println!("seed {seed:#x}");
    scene.under("mutated requests", || {
        let mut random = Random(seed);
        for number in 0..attempts(2_000, 100_000) {
            let mut bytes = valid.clone();
            mutate(&mut bytes, &mut random);
            let socket = send(to, &bytes);
            let _ = socket.shutdown(Shutdown::Write);
            let status = status(socket);
            let fine = status.is_none_or(|status| status < 500 || status == 503);
            assert!(fine, "{status:?} for {number}: {}", String::from_utf8_lossy(&bytes));
        }
    });
    scene.under("slow heads and bodies", || {
        let half = &valid[..valid.len() - 10];
        let mut slow: Vec<TcpStream> = (0..attempts(300, 800))
            .map(|at| send(to, if at % 2 == 0 { &valid[..40] } else { half }))
            .collect();
        for _ in 0..attempts(10, 350) {
            thread::sleep(Duration::from_millis(100));
            // A byte of a head now and then, of a body none; a closed connection takes none.
            slow.iter_mut().step_by(2).for_each(|socket| drop(socket.write(b"a")));
        }
        if attempts(0, 1) == 1 {
            slow.into_iter().for_each(|socket| assert_ne!(status(socket), Some(200)));
        }
    });
    scene.under("huge heads", || {
        let many: String = (0..20_000).map(|n| format!("x-{n}: {n}\r\n")).collect();
        let long = format!("x: {}\r\n", "a".repeat(1 << 20));
        for number in 0..attempts(50, 1_000) {
            let head = if number % 2 == 0 { &many } else { &long };
            let text = format!("GET /livez HTTP/1.1\r\nhost: a\r\n{head}\r\n");
            let status = status(send(to, text.as_bytes()));
            assert!(matches!(status, None | Some(400 | 431)), "{status:?}");
        }
    });
    scene.under("another protocol", || {
        for _ in 0..attempts(50, 1_000) {
            let status = status(send(to, b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"));
            assert!(matches!(status, None | Some(400..=505)), "{status:?}");
        }
    });
}

#[test]
fn ports_between_processes_outlive_handshakes_that_are_never_finished() {
    let scene = Scene::new();
    let control = scene.cluster.file()["control"].as_object().unwrap().values().next().unwrap();
    let control: SocketAddr = control.as_str().unwrap().parse().unwrap();
    // A record of a handshake of which the most is missing.
    let begun = [0x16, 3, 1, 2, 0, 1, 0, 1, 0xfc, 3, 3];
    for (name, to) in [("control port", control), ("expert node", scene.address("expert-node"))] {
        scene.under(&format!("half-open handshakes, {name}"), || {
            for _ in 0..attempts(2, 20) {
                let open: Vec<TcpStream> = (0..500).map(|_| send(to, &begun)).collect();
                // Whoever is let wait for the rest hears the end of it in time.
                assert!(open.into_iter().all(|socket| status(socket).is_none()));
            }
        });
    }
}
