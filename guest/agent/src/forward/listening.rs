//! Search for a listening TCP port in `/proc/net`.

use std::fs;

/// State number of LISTEN in `/proc/net/tcp`.
const LISTEN: &str = "0A";

/// Returns the first listening port, IPv4 before IPv6.
pub(super) fn first() -> Option<u16> {
    ["/proc/net/tcp", "/proc/net/tcp6"]
        .iter()
        .find_map(|path| first_in(&fs::read_to_string(path).ok()?))
}

/// Parses lines of the form `sl local_address rem_address st ...`, with addresses as
/// `HEX:PORT`.
fn first_in(table: &str) -> Option<u16> {
    table.lines().skip(1).find_map(|line| {
        let mut words = line.split_whitespace().skip(1);
        let local = words.next()?;
        let state = words.nth(1)?;
        if state != LISTEN {
            return None;
        }
        let (_, port) = local.rsplit_once(':')?;
        u16::from_str_radix(port, 16).ok()
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const HEAD: &str = "  sl  local_address rem_address   st tx_queue rx_queue\n";

    #[test]
    fn connections_are_not_listeners() {
        let connected = "   0: 0100007F:A1B2 0100007F:0050 01 00000000:00000000\n";
        let listening = "   1: 00000000:1F90 00000000:0000 0A 00000000:00000000\n";
        assert_eq!(first_in(HEAD), None);
        assert_eq!(first_in(&format!("{HEAD}{connected}")), None);
        assert_eq!(
            first_in(&format!("{HEAD}{connected}{listening}")),
            Some(8080)
        );
        let v6 = "   0: 00000000000000000000000000000000:0050 00000000000000000000000000000000:0000 0A\n";
        assert_eq!(first_in(&format!("{HEAD}{v6}")), Some(80));
    }
}
