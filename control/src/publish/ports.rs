//! Ranges of ports, each published individually.

use std::ops::RangeInclusive;
use std::str::FromStr;

use super::{Publication, PublishError};

/// Maximum number of ports in a range, each of which has its own listener.
const MOST: usize = 1000;

/// One or more publications, parsed from a port or a range of ports.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Ports(pub Vec<Publication>);

impl FromStr for Ports {
    type Err = PublishError;

    /// Parses the syntax of [`Publication`], and ranges with as many guest ports as host
    /// ports: `8000-8010:9000-9010`, or `9000-9010` for host ports that the system
    /// assigns.
    fn from_str(word: &str) -> Result<Self, PublishError> {
        let bad = |reason| PublishError {
            word: word.to_owned(),
            reason,
        };
        let (ports, protocol) = word.rsplit_once('/').unwrap_or((word, "tcp"));
        let (front, guest) = ports.rsplit_once(':').unwrap_or(("", ports));
        // An IPv6 address ends in a bracket and contains no dash.
        let (address, host) = match front.rsplit_once(':') {
            Some((address, host)) => (format!("{address}:"), host),
            None => (String::new(), front),
        };
        if !guest.contains('-') && !host.contains('-') {
            return Ok(Self(vec![word.parse()?]));
        }
        let guest =
            range(guest).ok_or_else(|| bad("a range of ports must have the form FIRST-LAST"))?;
        let most = guest.len();
        if most > MOST {
            return Err(bad("a range may have at most 1000 ports"));
        }
        let hosts = match host {
            "" => vec![String::new(); most],
            range_of_host => {
                let host = range(range_of_host)
                    .ok_or_else(|| bad("a range of ports must have the form FIRST-LAST"))?;
                if host.len() != most {
                    return Err(bad("the ranges of host and guest have different lengths"));
                }
                host.map(|port| port.to_string()).collect()
            }
        };
        let one = |(host, guest): (String, u16)| {
            format!("{address}{host}:{guest}/{protocol}").parse::<Publication>()
        };
        let publications: Result<_, _> = hosts.into_iter().zip(guest).map(one).collect();
        // Report the range as the caller wrote it instead of the expanded publication.
        publications.map(Self).map_err(|error| bad(error.reason))
    }
}

/// Parses `FIRST-LAST` or a single port.
fn range(word: &str) -> Option<RangeInclusive<u16>> {
    let (first, last) = word.split_once('-').unwrap_or((word, word));
    let range = first.parse().ok()?..=last.parse().ok()?;
    (!range.is_empty()).then_some(range)
}
