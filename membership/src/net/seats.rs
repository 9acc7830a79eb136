//! Room for so many at once, and for so many of each: one peer must not take everybody's.

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv6Addr};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// Counts who is in. Cheap to clone.
#[derive(Debug)]
pub struct Seats<K: Ord + Clone> {
    taken: Arc<Mutex<Taken<K>>>,
    all_max: usize,
    each_max: usize,
}

#[derive(Debug)]
struct Taken<K> {
    all: usize,
    each: BTreeMap<K, usize>,
}

impl<K: Ord + Clone> Clone for Seats<K> {
    fn clone(&self) -> Self {
        let Self { taken, all_max, each_max } = self;
        Self { taken: taken.clone(), all_max: *all_max, each_max: *each_max }
    }
}

impl<K: Ord + Clone> Seats<K> {
    /// Room for `all_max`, of which any one may take `each_max`.
    pub fn new(all_max: usize, each_max: usize) -> Self {
        let taken = Arc::new(Mutex::new(Taken { all: 0, each: BTreeMap::new() }));
        Self { taken, all_max, each_max }
    }

    /// A seat until it is dropped; none when there is no room left, or none for this one.
    pub fn take(&self, who: K) -> Option<Seat<K>> {
        let mut taken = self.lock();
        let own = taken.each.get(&who).copied().unwrap_or(0);
        if taken.all >= self.all_max || own >= self.each_max {
            return None;
        }
        taken.all += 1;
        taken.each.insert(who.clone(), own + 1);
        drop(taken);
        Some(Seat { seats: self.clone(), who })
    }

    /// Whether there is no seat left for anybody.
    pub fn are_full(&self) -> bool {
        self.lock().all >= self.all_max
    }

    fn lock(&self) -> MutexGuard<'_, Taken<K>> {
        self.taken.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// One of the [`Seats`].
#[derive(Debug)]
pub struct Seat<K: Ord + Clone> {
    seats: Seats<K>,
    who: K,
}

impl<K: Ord + Clone> Drop for Seat<K> {
    fn drop(&mut self) {
        let mut taken = self.seats.lock();
        taken.all -= 1;
        // Whoever has left leaves nothing behind: addresses are many.
        match taken.each.get_mut(&self.who) {
            Some(own) if *own > 1 => *own -= 1,
            _ => drop(taken.each.remove(&self.who)),
        }
    }
}

/// Says when something that happens again and again is worth a line in the log: once a second.
#[derive(Debug, Default)]
pub struct Seldom(Option<Instant>);

impl Seldom {
    /// Whether a second has passed since this was last so.
    pub fn is_due(&mut self) -> bool {
        let due = self.0.is_none_or(|told| told.elapsed() >= Duration::from_secs(1));
        if due {
            self.0 = Some(Instant::now());
        }
        due
    }
}

/// Whom an address counts for: an IPv4 host, or the /64 of which an IPv6 host has every address.
pub fn host_of(ip: IpAddr) -> IpAddr {
    match ip.to_canonical() {
        IpAddr::V6(ip) => Ipv6Addr::from_bits(ip.to_bits() >> 64 << 64).into(),
        ip => ip,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nobody_takes_more_than_their_share_and_all_together_no_more_than_there_are() {
        let seats = Seats::new(3, 2);
        let a = [seats.take("a"), seats.take("a")];
        assert!(a.iter().all(Option::is_some) && seats.take("a").is_none());
        let b = seats.take("b");
        assert!(b.is_some() && seats.take("b").is_none() && seats.take("c").is_none());
        drop(a);
        assert!(seats.take("c").is_some());
        drop(b);
        assert_eq!(seats.lock().each.len(), 0, "who has left is forgotten");
    }

    #[test]
    fn an_ipv6_host_is_one_whichever_of_its_addresses_it_uses() {
        let host = |text: &str| host_of(text.parse().unwrap()).to_string();
        assert_eq!(host("2001:db8:1:2:3:4:5:6"), "2001:db8:1:2::");
        assert_eq!(host("192.0.2.7"), "192.0.2.7");
        assert_eq!(host("::ffff:192.0.2.7"), "192.0.2.7");
    }
}
