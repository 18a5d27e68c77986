//! Ports for single exports, from a range.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpListener};
use std::str::FromStr;

/// A range of TCP ports, both ends included.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PortRange {
    first: u16,
    last: u16,
}

impl PortRange {
    /// The ports, in order.
    pub fn iter(self) -> std::ops::RangeInclusive<u16> {
        self.first..=self.last
    }
}

impl Default for PortRange {
    fn default() -> Self {
        Self { first: 10100, last: 10200 }
    }
}

impl FromStr for PortRange {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let parse = || {
            let (first, last) = text.split_once('-')?;
            let range = Self { first: first.parse().ok()?, last: last.parse().ok()? };
            (range.first > 0 && range.first <= range.last).then_some(range)
        };
        parse().ok_or_else(|| format!("'{text}' is no range of ports such as 10100-10200"))
    }
}

impl fmt::Display for PortRange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}-{}", self.first, self.last)
    }
}

/// The pool: which port serves which export. A port that others use is passed over.
#[derive(Debug)]
pub struct Ports {
    range: PortRange,
    used: BTreeMap<u16, String>,
    /// Ports that are set aside for others.
    avoided: BTreeSet<u16>,
}

impl Ports {
    /// A pool of the ports in `range` on the loopback address.
    pub fn new(range: PortRange) -> Self {
        Self { range, used: BTreeMap::new(), avoided: BTreeSet::new() }
    }

    /// The range.
    pub fn range(&self) -> PortRange {
        self.range
    }

    /// Binds the lowest free port for `export`.
    ///
    /// # Errors
    /// A sentence where no port is free.
    pub fn allocate(&mut self, export: &str) -> Result<TcpListener, String> {
        for port in self.range.iter() {
            if self.used.contains_key(&port) || self.avoided.contains(&port) {
                continue;
            }
            let address = SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), port);
            if let Ok(listener) = TcpListener::bind(address) {
                self.used.insert(port, export.to_owned());
                return Ok(listener);
            }
        }
        Err(format!(
            "no port of {} is free for export '{export}' ({} in use by exports here); \
             choose a larger range",
            self.range,
            self.used.len()
        ))
    }

    /// Passes over these ports from now on, and over no others that are free.
    pub fn avoid(&mut self, ports: impl IntoIterator<Item = u16>) {
        self.avoided = ports.into_iter().collect();
    }

    /// Gives the port of `export` back.
    pub fn release(&mut self, export: &str) {
        self.used.retain(|_, name| name != export);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ports_in_use_are_passed_over_and_released_ones_come_again() {
        let taken = TcpListener::bind("127.0.0.1:0").unwrap();
        let first = taken.local_addr().unwrap().port();
        let last = first.saturating_add(20);
        let mut ports = Ports::new(PortRange { first, last });
        let a = ports.allocate("a").unwrap();
        assert!(a.local_addr().unwrap().port() > first);
        let b = ports.allocate("b").unwrap();
        assert!(b.local_addr().unwrap().port() > a.local_addr().unwrap().port());
        let port = a.local_addr().unwrap().port();
        drop(a);
        ports.release("a");
        assert_eq!(ports.allocate("c").unwrap().local_addr().unwrap().port(), port);
    }

    #[test]
    fn ranges_are_read_strictly() {
        assert_eq!("10100-10200".parse(), Ok(PortRange::default()));
        for text in ["", "1", "5-4", "0-9", "a-b", "1-70000"] {
            assert!(text.parse::<PortRange>().is_err(), "{text}");
        }
    }
}
