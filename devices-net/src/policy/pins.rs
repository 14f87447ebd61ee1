//! Names for which the guest got an address.

use std::collections::hash_map::Entry;
use std::collections::{BTreeMap, HashMap};
use std::net::IpAddr;
use std::time::{Duration, Instant};

use super::effective_address;

/// Shortest time that an answer is valid, whatever its time to live: programs use an address
/// for a while.
const MIN_TTL: Duration = Duration::from_secs(60);
/// Longest time that an answer is valid.
const MAX_TTL: Duration = Duration::from_secs(24 * 3600);
/// Maximum number of names of one address.
const MAX_NAMES: usize = 64;

/// Names of addresses, as answers of name servers have said. Bounded: the pins that end first
/// are dropped for others.
#[derive(Clone, Debug)]
pub struct DnsPins {
    limit: usize,
    names: HashMap<IpAddr, Vec<Pin>>,
    /// Addresses and numbers of pins by their ends.
    ends: BTreeMap<(Instant, u64), IpAddr>,
    next: u64,
    /// Numbers of flows to addresses, whose names stay valid.
    held: HashMap<IpAddr, u32>,
}

#[derive(Clone, Debug)]
struct Pin {
    name: String,
    end: Instant,
    number: u64,
}

impl DnsPins {
    /// Creates an empty list of at most `limit` names of addresses.
    #[must_use]
    pub fn new(limit: usize) -> Self {
        Self {
            limit: limit.max(1),
            names: HashMap::new(),
            ends: BTreeMap::new(),
            next: 0,
            held: HashMap::new(),
        }
    }

    /// Keeps the names of an address valid until [`Self::release`] is called as often as this.
    pub fn hold(&mut self, address: IpAddr) {
        *self.held.entry(effective_address(address)).or_default() += 1;
    }

    /// Ends a [`Self::hold`] of an address.
    pub fn release(&mut self, address: IpAddr) {
        if let Entry::Occupied(mut held) = self.held.entry(effective_address(address)) {
            *held.get_mut() -= 1;
            if *held.get() == 0 {
                held.remove();
            }
        }
    }

    /// Notes that `name` has an address, for `ttl` seconds, at least a minute and at most a
    /// day.
    pub fn pin(&mut self, name: &str, address: IpAddr, ttl: u32, now: Instant) {
        let address = effective_address(address);
        let ttl = Duration::from_secs(ttl.into()).clamp(MIN_TTL, MAX_TTL);
        let Some(mut end) = now.checked_add(ttl) else {
            return;
        };
        let pins = self.names.get(&address);
        let old = pins.and_then(|pins| pins.iter().find(|pin| pin.name == name));
        if let Some(old) = old {
            end = end.max(old.end);
            self.remove((old.end, old.number));
        } else if let Some(first) = pins.filter(|pins| pins.len() >= MAX_NAMES)
            && let Some(first) = first.iter().map(|pin| (pin.end, pin.number)).min()
        {
            self.remove(first);
        }
        while self.ends.len() >= self.limit {
            let Some((&first, _)) = self.ends.first_key_value() else {
                break;
            };
            self.remove(first);
        }
        let number = self.next;
        self.next += 1;
        self.ends.insert((end, number), address);
        self.names.entry(address).or_default().push(Pin {
            name: name.to_owned(),
            end,
            number,
        });
    }

    fn remove(&mut self, key: (Instant, u64)) {
        let Some(address) = self.ends.remove(&key) else {
            return;
        };
        if let Some(pins) = self.names.get_mut(&address) {
            pins.retain(|pin| pin.number != key.1);
            if pins.is_empty() {
                self.names.remove(&address);
            }
        }
    }

    /// Returns the names of an address, which is an [effective](effective_address) one.
    pub fn names(&self, address: IpAddr, now: Instant) -> impl Iterator<Item = &str> {
        let pins = self.names.get(&address).map_or(&[][..], Vec::as_slice);
        let is_held = self.held.contains_key(&address);
        let valid = pins.iter().filter(move |pin| is_held || now < pin.end);
        valid.map(|pin| pin.name.as_str())
    }

    /// Returns the number of names of addresses, those that have ended included.
    #[must_use]
    pub fn len(&self) -> usize {
        self.ends.len()
    }

    /// Returns true if there are none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.ends.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn the_limit_holds_and_what_is_valid_is_found(
            steps in prop::collection::vec((0u8..6, 0u8..6, 0u32..400, 0u64..50), 1..120),
            limit in 1usize..12,
        ) {
            let mut now = Instant::now();
            let mut pins = DnsPins::new(limit);
            for (name, address, ttl, wait) in steps {
                let name = format!("n{name}.example");
                let address = IpAddr::from([198, 51, 100, address]);
                pins.pin(&name, address, ttl, now);
                prop_assert!(pins.len() <= limit);
                prop_assert_eq!(pins.names(address, now).filter(|it| *it == name).count(), 1);
                let counted: usize = pins.names.values().map(Vec::len).sum();
                prop_assert_eq!(counted, pins.len());
                now += Duration::from_secs(wait);
            }
        }
    }

    #[test]
    fn times_to_live_have_bounds() {
        let start = Instant::now();
        let mut pins = DnsPins::new(10);
        let address = IpAddr::from([198, 51, 100, 1]);
        let has = |pins: &DnsPins, after| {
            let now = start + Duration::from_secs(after);
            pins.names(address, now).next().is_some()
        };
        pins.pin("a.example", address, 0, start);
        assert!(has(&pins, 59) && !has(&pins, 60));
        // A later answer does not shorten an earlier one.
        pins.pin("a.example", address, 300, start);
        pins.pin("a.example", address, 0, start);
        assert!(has(&pins, 299) && !has(&pins, 300));
        pins.pin("a.example", address, u32::MAX, start);
        assert!(has(&pins, 86_399) && !has(&pins, 86_400));
        assert_eq!(pins.len(), 1);
        // The address is that which is reached.
        pins.pin(
            "b.example",
            "::ffff:198.51.100.2".parse().unwrap(),
            60,
            start,
        );
        let other = IpAddr::from([198, 51, 100, 2]);
        assert_eq!(pins.names(other, start).collect::<Vec<_>>(), ["b.example"]);
        // A flow to the address keeps its name.
        let late = start + Duration::from_secs(86_400);
        pins.hold(other);
        pins.hold("::ffff:198.51.100.2".parse().unwrap());
        pins.release(other);
        assert_eq!(pins.names(other, late).count(), 1);
        pins.release(other);
        pins.release(other);
        assert_eq!(pins.names(other, late).count(), 0);
        assert!(pins.held.is_empty());
    }
}
