//! Privileges of a workload, by Docker's rules and names.

pub use sm_guest_proto::privileges::{GuestCapabilities, Privileges};

use sm_guest_proto::exec::Sysctl;
use thiserror::Error;

/// A capability or parameter that Linux does not have.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
#[non_exhaustive]
pub enum PrivilegeError {
    /// Linux has no such capability.
    #[error(
        "\"{0}\" is no capability of Linux: write a name of capabilities(7), such as NET_ADMIN, \
         or ALL"
    )]
    Capability(String),
    /// The name is not that of a kernel parameter.
    #[error("\"{0}\" is no kernel parameter: write a name such as net.core.somaxconn")]
    Sysctl(String),
}

/// The name of all capabilities.
const ALL: &str = "ALL";

/// A name of a capability, or of all.
enum CapabilityName {
    All,
    One(GuestCapabilities),
}

impl CapabilityName {
    fn parse(name: &str) -> Result<Self, PrivilegeError> {
        let bare = name.strip_prefix("CAP_").unwrap_or(name);
        if bare.eq_ignore_ascii_case(ALL) {
            return Ok(Self::All);
        }
        let named = GuestCapabilities::named(name);
        let named = named.ok_or_else(|| PrivilegeError::Capability(name.to_owned()))?;
        Ok(Self::One(named))
    }
}

/// Names that were added, or dropped.
#[derive(Default)]
struct CapabilityNames {
    all: bool,
    named: GuestCapabilities,
}

impl CapabilityNames {
    fn parse(names: &[String]) -> Result<Self, PrivilegeError> {
        let mut list = Self::default();
        for name in names {
            match CapabilityName::parse(name)? {
                CapabilityName::All => list.all = true,
                CapabilityName::One(set) => list.named = list.named.and(set),
            }
        }
        Ok(list)
    }
}

/// Returns the capabilities of a workload; `None` for all.
///
/// A workload has all by default, as they are those of a kernel of its own. As in Docker,
/// those that are added to none (all are dropped) or dropped from all (all are added) are the
/// exact set, and a name that is added and dropped is added otherwise.
pub(crate) fn capabilities(
    add: &[String],
    drop: &[String],
) -> Result<Option<GuestCapabilities>, PrivilegeError> {
    const ALL: GuestCapabilities = GuestCapabilities::ALL;
    let added = CapabilityNames::parse(add)?;
    let dropped = CapabilityNames::parse(drop)?;
    let exact = match (dropped.all, added.all) {
        (true, false) => added.named,
        (_, true) => ALL.without(dropped.named),
        (false, false) => ALL.without(dropped.named).and(added.named),
    };
    // A kernel may have capabilities without a name here.
    Ok((exact != ALL).then_some(exact))
}

/// Returns a parameter of the kernel. Its name is written with dots; one with a slash before
/// the first dot, with slashes (sysctl.d(5)).
pub(crate) fn sysctl(name: &str, value: &str) -> Result<Sysctl, PrivilegeError> {
    let bad = || PrivilegeError::Sysctl(name.to_owned());
    let first = name.find(['.', '/']).ok_or_else(bad)?;
    let path = match name[first..].starts_with('/') {
        true => name.to_owned(),
        // A dot in the name of an interface is written as a slash.
        false => {
            let swapped = name.chars().map(|c| match c {
                '.' => '/',
                '/' => '.',
                other => other,
            });
            swapped.collect()
        }
    };
    let part_is_named = |part: &str| !matches!(part, "" | "." | "..");
    if !path.split('/').all(part_is_named) || path.contains('\0') || value.contains('\0') {
        return Err(bad());
    }
    Ok(Sysctl {
        path,
        value: value.to_owned(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn privileges(add: &[&str], drop: &[&str]) -> Result<Option<String>, PrivilegeError> {
        let list = |names: &[&str]| -> Vec<_> { names.iter().map(ToString::to_string).collect() };
        let set = capabilities(&list(add), &list(drop))?;
        Ok(set.map(|set| set.to_string()))
    }

    #[test]
    fn capabilities_are_combined_as_in_docker() {
        let all_but = |names: &[&str]| {
            let names = names
                .iter()
                .filter_map(|name| GuestCapabilities::named(name));
            let dropped = names.fold(GuestCapabilities::NONE, GuestCapabilities::and);
            Some(GuestCapabilities::ALL.without(dropped).to_string())
        };
        assert_eq!(privileges(&[], &[]), Ok(None));
        assert_eq!(privileges(&["net_admin", "ALL"], &[]), Ok(None));
        assert_eq!(privileges(&[], &["ALL"]), Ok(Some(String::new())));
        assert_eq!(
            privileges(&["CAP_NET_BIND_SERVICE", "chown"], &["all"]),
            Ok(Some("CHOWN, NET_BIND_SERVICE".to_owned()))
        );
        assert_eq!(privileges(&[], &["MKNOD"]), Ok(all_but(&["MKNOD"])));
        assert_eq!(
            privileges(&["MKNOD"], &["MKNOD", "KILL"]),
            Ok(all_but(&["KILL"]))
        );
        assert_eq!(privileges(&["ALL"], &["ALL"]), Ok(None));
        assert_eq!(
            privileges(&["ALL"], &["ALL", "KILL"]),
            Ok(all_but(&["KILL"]))
        );
        for unknown in ["FLY", ""] {
            let error = privileges(&[unknown], &[]).unwrap_err();
            assert_eq!(error, PrivilegeError::Capability(unknown.to_owned()));
        }
        assert!(privileges(&[], &["SYS"]).is_err());
    }

    #[test]
    fn names_of_parameters_become_paths() {
        let path = |name| sysctl(name, "1").map(|sysctl| sysctl.path);
        for (name, expected) in [
            ("net.core.somaxconn", "net/core/somaxconn"),
            (
                "net/ipv4/conf/eth0.1/forwarding",
                "net/ipv4/conf/eth0.1/forwarding",
            ),
            (
                "net.ipv4.conf.eth0/1.forwarding",
                "net/ipv4/conf/eth0.1/forwarding",
            ),
        ] {
            assert_eq!(path(name).as_deref(), Ok(expected));
        }
        for bad in [
            "",
            "net",
            ".net",
            "net.",
            "net..core",
            "/etc/passwd",
            "a/../b",
            "a.b\0",
        ] {
            assert_eq!(path(bad), Err(PrivilegeError::Sysctl(bad.to_owned())));
        }
    }
}
