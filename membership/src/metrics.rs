//! What every process shows of itself in the Prometheus text format, and how it is written.
//!
//! Coordinators and expert nodes show it beside what they count themselves; a process that counts
//! nothing else has [`serve`].
//!
//! What it does not know: what else a process counts, and who asks.

use std::convert::Infallible;
use std::fmt::Write;
use std::sync::Arc;
use std::time::SystemTime;

use entente_tls::Credentials;
use hyper::body::Incoming;
use hyper::{Request, Response, StatusCode};
use tokio::net::TcpListener;
use tokio::sync::watch;
use tower::service_fn;

use crate::net::http::{self, Bounds, Refusals};
use crate::raft::Status;

/// Writes one metric `entente_<name>`: samples are labels, in braces or none, and values.
pub fn family(text: &mut String, name: &str, kind: &str, help: &str, samples: &[(String, u64)]) {
    // Writing to a String cannot fail.
    let _ = writeln!(text, "# HELP entente_{name} {help}\n# TYPE entente_{name} {kind}");
    for (labels, value) in samples {
        let _ = writeln!(text, "entente_{name}{labels} {value}");
    }
}

/// When this process's certificate ends, and the CAs that it believes: of each region the one that
/// ends first, so that an old one that was forgotten in the file is seen too.
pub fn certificates(text: &mut String, credentials: &Credentials) {
    let own = ("leaf", credentials.identity().region, credentials.expires());
    let roots = credentials.roots();
    let cas = roots.ends().map(|(region, end)| ("ca", region, end));
    let sample = |(kind, region, end): (_, _, SystemTime)| {
        let end_s = end.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default().as_secs();
        (format!("{{kind=\"{kind}\",region=\"{region}\"}}"), end_s)
    };
    let samples: Vec<_> = std::iter::once(own).chain(cas).map(sample).collect();
    let help = "Unix time at which this process's certificate and the CAs that it believes end.";
    family(text, "certificate_not_after_timestamp_seconds", "gauge", help, &samples);
}

/// Where this process stands in the raft group.
fn voter(text: &mut String, status: &Status) {
    let plain = |value| [(String::new(), value)];
    let leader = u64::from(status.is_leader);
    family(
        text,
        "raft_leader",
        "gauge",
        "1 while this process leads the raft group.",
        &plain(leader),
    );
    let known = u64::from(status.leader.is_some());
    let help = "1 while this process knows who leads the raft group, itself or another.";
    family(text, "raft_has_leader", "gauge", help, &plain(known));
    let help = "Raft term that this process is in.";
    family(text, "raft_term", "gauge", help, &plain(status.term));
}

/// Answers `/metrics` and `/livez` of a process that does nothing but vote, for as long as it is
/// polled.
pub async fn serve(
    listener: TcpListener,
    status: watch::Receiver<Status>,
    credentials: Credentials,
) {
    let refusals = Arc::new(Refusals::default());
    let counted = refusals.clone();
    let answer = move |request: Request<Incoming>| {
        let mut response = Response::new(String::new());
        match request.uri().path() {
            "/livez" => response.body_mut().push_str("ok\n"),
            "/metrics" => {
                let text = response.body_mut();
                voter(text, &status.borrow());
                certificates(text, &credentials);
                refused_connections(text, &counted);
            }
            _ => *response.status_mut() = StatusCode::NOT_FOUND,
        }
        async { Ok::<_, Infallible>(response) }
    };
    let (service, never) = (service_fn(answer), std::future::pending());
    http::serve(listener, service, Bounds::default(), refusals, never).await;
}

/// The connections that a listener for anybody has refused or given up.
pub fn refused_connections(text: &mut String, refusals: &Refusals) {
    let sample = |(reason, count)| (format!("{{reason=\"{reason}\"}}"), count);
    let samples = refusals.read().map(sample);
    let help = "HTTP connections that were not taken, or ended for what came or did not come.";
    family(text, "refused_connections_total", "counter", help, &samples);
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use entente_proto::identity::{Identity, Role};
    use entente_tls::{Authority, Roots};

    use super::*;

    #[test]
    fn of_several_cas_of_a_region_the_end_of_the_first_is_told() {
        let cluster = "demo".parse().unwrap();
        let day = |days: u64| Duration::from_secs(days * 86_400);
        let ca = |region: &str, days| {
            Authority::new(&cluster, region.parse().unwrap(), day(days)).unwrap()
        };
        let (old, new, other) = (ca("fr", 2), ca("fr", 50), ca("se", 9));
        let pem = [&new, &old, &other].map(|ca| ca.certificate_pem().to_owned()).concat();
        let (region, node) = ("fr".parse().unwrap(), "n".parse().unwrap());
        let own = Identity { cluster, region, role: Role::Expert, node };
        let issued = new.issue(&own, day(1)).unwrap();
        let roots = Roots::from_pem(pem.as_bytes()).unwrap();
        let own = Credentials::new(roots, &issued.certificate_pem, &issued.key_pem).unwrap();
        let mut text = String::new();
        certificates(&mut text, &own);
        let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap().as_secs();
        let days = |line: &str| {
            let (labels, end_s) = line.rsplit_once(' ').unwrap();
            let left_s = end_s.parse::<u64>().unwrap().saturating_sub(now);
            (labels.to_owned(), (left_s + 3_600) / 86_400)
        };
        let told: Vec<_> = text.lines().filter(|line| !line.starts_with('#')).map(days).collect();
        let of = |kind: &str, region: &str, days| {
            let name = "entente_certificate_not_after_timestamp_seconds";
            (format!("{name}{{kind=\"{kind}\",region=\"{region}\"}}"), days)
        };
        assert_eq!(told, [of("leaf", "fr", 1), of("ca", "fr", 2), of("ca", "se", 9)]);
    }
}
