//! Checks whether guests can ping hosts.

use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketFlags, SocketType, ipproto, socket_with};

/// Returns the finding: a guest without it has a network nevertheless.
pub(super) fn describe() -> String {
    finding(open(SocketType::DGRAM), open(SocketType::RAW))
}

fn open(kind: SocketType) -> Result<(), Errno> {
    let flags = SocketFlags::CLOEXEC;
    socket_with(AddressFamily::INET, kind, flags, Some(ipproto::ICMP)).map(drop)
}

fn finding(unprivileged: Result<(), Errno>, raw: Result<(), Errno>) -> String {
    match (unprivileged, raw) {
        (Ok(()), _) => "guests can ping hosts".to_owned(),
        (Err(_), Ok(())) => "guests can ping hosts, by this user's privileges".to_owned(),
        (Err(_), Err(_)) => "guests cannot ping other hosts (everything else works): let this \
                             user's programs with \"sysctl -w net.ipv4.ping_group_range='0 \
                             2147483647'\" as root"
            .to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_remedy_is_shown_only_if_there_is_none() {
        let refused = Err(Errno::ACCESS);
        assert!(!finding(Ok(()), refused).contains("sysctl"));
        assert!(!finding(refused, Ok(())).contains("sysctl"));
        assert!(finding(refused, refused).contains("ping_group_range"));
        assert!(describe().contains("ping"));
    }
}
