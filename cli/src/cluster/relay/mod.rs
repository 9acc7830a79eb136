//! A network between processes of one machine that can be slow, narrow, deaf on one side, or cut.
//!
//! Each process dials each other one at an address of the relay that belongs to the two of them, so
//! the relay knows who speaks to whom although all of it is TLS. It passes bytes on as they are and
//! can read none of them. What holds on a link ([`rule`]) can be changed while bytes are on their
//! way ([`control`]), and what has passed is counted ([`traffic`]).
//!
//! It is for drills and for seeing what distance costs; without `--link` there is none.
//!
//! Invariants: bytes arrive in the order in which they were sent, none twice, none changed; what is
//! on its way is bounded; when the relay ends, so do its connections; once a cut is acknowledged,
//! nothing more is counted and let through on its link.

pub mod control;
mod line;
pub mod rule;
#[cfg(test)]
mod tests;
pub mod traffic;

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::net::{Ipv4Addr, SocketAddr};
use std::sync::{Arc, Mutex, PoisonError};

use entente_membership::net::Via;
use entente_proto::ids::{NodeName, Region};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tokio::task::JoinSet;

use rule::{Change, Ends, Link, Rule, Rules};
use traffic::{Counters, Traffic};

/// Connections between two processes at most; more wait to be accepted.
const CONNECTIONS_MAX: usize = 256;

/// The relay of one cluster. Dropping it ends all connections.
#[derive(Debug)]
pub struct Relay {
    switch: Switch,
    tasks: JoinSet<()>,
    /// By dialler and by the address that it means.
    via: BTreeMap<NodeName, BTreeMap<SocketAddr, SocketAddr>>,
}

/// Where links are changed. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Switch(Arc<Mutex<Settings>>);

#[derive(Debug)]
struct Settings {
    rules: Rules,
    lanes: Vec<Lane>,
}

/// What is told to the connections from one process to another.
#[derive(Debug)]
struct Lane {
    ends: Ends,
    rules: [watch::Sender<Rule>; 2],
    counters: Arc<Counters>,
}

/// One process that dials another one.
#[derive(Debug, Clone)]
pub struct Path {
    /// The two of them.
    pub ends: Ends,
    /// Where the second one listens.
    pub target: SocketAddr,
}

impl Relay {
    /// Opens an address for each path, and applies what was said about links.
    ///
    /// # Errors
    /// There is no free port, or no such link.
    pub fn open(paths: Vec<Path>, changes: Vec<Change>) -> io::Result<Self> {
        let mut tasks = JoinSet::new();
        let mut lanes = Vec::new();
        let mut via: BTreeMap<NodeName, BTreeMap<SocketAddr, SocketAddr>> = BTreeMap::new();
        for Path { ends, target } in paths {
            let listener = std::net::TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?;
            listener.set_nonblocking(true)?;
            let there = via.entry(ends.dialler.1.clone()).or_default();
            there.insert(target, listener.local_addr()?);
            let (rules, told) = lane();
            let counters = Arc::<Counters>::default();
            let listener = TcpListener::from_std(listener)?;
            tasks.spawn(accept(listener, target, told, counters.clone()));
            lanes.push(Lane { ends, rules, counters });
        }
        let switch = Switch(Arc::new(Mutex::new(Settings { rules: Rules::default(), lanes })));
        switch.change_all(changes).map_err(io::Error::other)?;
        Ok(Self { switch, tasks, via })
    }

    /// Lets others change links, through a socket in `data_dir`.
    ///
    /// # Errors
    /// The socket cannot be made.
    pub fn serve(&mut self, data_dir: &std::path::Path) -> anyhow::Result<()> {
        self.tasks.spawn(control::serve(data_dir, self.switch.clone())?);
        Ok(())
    }

    /// The addresses that `dialler` uses instead of those that it knows.
    pub fn via(&self, dialler: &NodeName) -> Via {
        let pairs = self.via.get(dialler).into_iter().flatten();
        pairs.map(|(meant, dialled)| (meant.to_string(), dialled.to_string())).collect()
    }
}

fn lane() -> ([watch::Sender<Rule>; 2], [watch::Receiver<Rule>; 2]) {
    let (there, told_there) = watch::channel(Rule::default());
    let (back, told_back) = watch::channel(Rule::default());
    ([there, back], [told_there, told_back])
}

impl Switch {
    /// Changes what holds on links, also for connections that are there.
    ///
    /// # Errors
    /// There is no such link, and nothing is changed; the text names what there is.
    pub fn change_all(&self, changes: Vec<Change>) -> Result<(), String> {
        let mut settings = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        changes.iter().try_for_each(|change| settings.check(&change.link))?;
        changes.into_iter().for_each(|change| settings.rules.apply(change));
        for lane in &settings.lanes {
            let [there, back] = settings.rules.of(&lane.ends);
            lane.rules[0].send_replace(there);
            lane.rules[1].send_replace(back);
        }
        Ok(())
    }

    /// Every link about which something was said, and what.
    pub fn list(&self) -> Vec<(String, String)> {
        let settings = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let said = |(link, text): (&Link, &str)| (link.to_string(), text.to_owned());
        settings.rules.iter().map(said).collect()
    }

    /// What has passed between any two processes that may speak to each other.
    pub fn traffic(&self) -> Vec<Traffic> {
        let settings = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let of = |Lane { ends, counters, .. }: &Lane| {
            counters.of(ends.dialler.1.clone(), ends.target.1.clone())
        };
        settings.lanes.iter().map(of).collect()
    }
}

impl Settings {
    fn check(&self, link: &Link) -> Result<(), String> {
        let ends = || self.lanes.iter().flat_map(|l| [&l.ends.dialler, &l.ends.target]);
        let has_region = |region: &Region| ends().any(|(other, _)| other == region);
        let is_known = match link {
            Link::OneWay(a, b) | Link::Between(a, b) => has_region(a) && has_region(b),
            Link::Process(name) => ends().any(|(_, other)| other == name),
        };
        if is_known {
            return Ok(());
        }
        let regions: BTreeSet<&str> = ends().map(|(region, _)| region.as_str()).collect();
        let names: BTreeSet<&str> = ends().map(|(_, name)| name.as_str()).collect();
        let list = |set: BTreeSet<&str>| set.into_iter().collect::<Vec<_>>().join(", ");
        Err(format!(
            "there is no {link}; regions are {}, processes are {}",
            list(regions),
            list(names)
        ))
    }
}

/// Takes connections from one process to another and carries each.
async fn accept(
    listener: TcpListener,
    target: SocketAddr,
    rules: [watch::Receiver<Rule>; 2],
    counters: Arc<Counters>,
) {
    let mut connections = JoinSet::new();
    loop {
        while connections.try_join_next().is_some() {}
        if connections.len() >= CONNECTIONS_MAX {
            connections.join_next().await;
        }
        let dialler = match listener.accept().await {
            Ok((dialler, _)) => dialler,
            // Nothing is known of who wanted to connect; the next one may have more luck.
            Err(error) => {
                tracing::debug!(%error, "a connection to the relay was lost");
                continue;
            }
        };
        let refused = rules.iter().any(|rule| rule.borrow().is_cut);
        counters.connection(refused);
        if refused {
            continue;
        }
        let (rules, counters) = (rules.clone(), counters.clone());
        connections.spawn(async move {
            // A target that is not there is a connection that ends at once.
            if let Ok(target) = TcpStream::connect(target).await {
                line::carry(dialler, target, rules, &counters).await;
            }
        });
    }
}
