//! Privileges of commands (capabilities(7), `PR_SET_NO_NEW_PRIVS` in prctl(2)).

use std::fmt;

use serde::de::{Deserializer, Error as _};
use serde::{Deserialize, Serialize, Serializer};

/// Names of capabilities by their numbers, without `CAP_`.
const NAMES: [&str; 41] = [
    "CHOWN",
    "DAC_OVERRIDE",
    "DAC_READ_SEARCH",
    "FOWNER",
    "FSETID",
    "KILL",
    "SETGID",
    "SETUID",
    "SETPCAP",
    "LINUX_IMMUTABLE",
    "NET_BIND_SERVICE",
    "NET_BROADCAST",
    "NET_ADMIN",
    "NET_RAW",
    "IPC_LOCK",
    "IPC_OWNER",
    "SYS_MODULE",
    "SYS_RAWIO",
    "SYS_CHROOT",
    "SYS_PTRACE",
    "SYS_PACCT",
    "SYS_ADMIN",
    "SYS_BOOT",
    "SYS_NICE",
    "SYS_RESOURCE",
    "SYS_TIME",
    "SYS_TTY_CONFIG",
    "MKNOD",
    "LEASE",
    "AUDIT_WRITE",
    "AUDIT_CONTROL",
    "SETFCAP",
    "MAC_OVERRIDE",
    "MAC_ADMIN",
    "SYSLOG",
    "WAKE_ALARM",
    "BLOCK_SUSPEND",
    "AUDIT_READ",
    "PERFMON",
    "BPF",
    "CHECKPOINT_RESTORE",
];

/// A set of capabilities. In JSON it is a list of names, such as `["CHOWN"]`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct GuestCapabilities(u64);

impl GuestCapabilities {
    /// No capability.
    pub const NONE: Self = Self(0);
    /// All capabilities that have a name.
    pub const ALL: Self = Self((1 << NAMES.len()) - 1);

    /// Returns the capability `name`, with or without `CAP_`, in upper or lower case.
    #[must_use]
    pub fn named(name: &str) -> Option<Self> {
        let upper = name.to_ascii_uppercase();
        let name = upper.strip_prefix("CAP_").unwrap_or(&upper);
        let number = NAMES.iter().position(|known| *known == name)?;
        Some(Self(1 << number))
    }

    /// Returns the capabilities of both sets.
    #[must_use]
    pub fn and(self, other: Self) -> Self {
        Self(self.0 | other.0)
    }

    /// Returns the capabilities of this set that `other` does not contain.
    #[must_use]
    pub fn without(self, other: Self) -> Self {
        Self(self.0 & !other.0)
    }

    /// Returns one bit for each capability: bit n for capability n.
    #[must_use]
    pub fn bits(self) -> u64 {
        self.0
    }

    /// Returns the names of the capabilities, without `CAP_`, by number.
    pub fn names(self) -> impl Iterator<Item = &'static str> {
        let names = NAMES.iter().enumerate();
        names.filter_map(move |(number, name)| (self.0 >> number & 1 == 1).then_some(*name))
    }
}

impl fmt::Display for GuestCapabilities {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let names: Vec<_> = self.names().collect();
        formatter.write_str(&names.join(", "))
    }
}

impl Serialize for GuestCapabilities {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_seq(self.names())
    }
}

impl<'de> Deserialize<'de> for GuestCapabilities {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let mut set = Self::NONE;
        for name in Vec::<String>::deserialize(deserializer)? {
            let named = Self::named(&name);
            let named = named.ok_or_else(|| D::Error::custom(format!("no capability {name:?}")))?;
            set = set.and(named);
        }
        Ok(set)
    }
}

/// Limits of a command's privileges. The default is none: root has all capabilities.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Privileges {
    /// The bounding set, and the other sets of a command that runs as root, except for the
    /// inheritable and the ambient one, which are empty. Absent for all capabilities of the
    /// guest's kernel.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub capabilities: Option<GuestCapabilities>,
    /// Programs gain no privileges by set-user-ID bits and file capabilities.
    pub no_new_privileges: bool,
}

impl Privileges {
    /// Returns true if nothing is limited.
    #[must_use]
    pub fn are_unlimited(&self) -> bool {
        *self == Self::default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_those_of_linux() {
        let named = |name| GuestCapabilities::named(name).unwrap();
        assert_eq!(named("chown").bits(), 1);
        assert_eq!(named("CAP_NET_ADMIN"), named("net_admin"));
        // linux/capability.h: CAP_SYS_ADMIN, CAP_AUDIT_READ and CAP_CHECKPOINT_RESTORE.
        for (name, number) in [
            ("SYS_ADMIN", 21),
            ("AUDIT_READ", 37),
            ("CHECKPOINT_RESTORE", 40),
        ] {
            assert_eq!(named(name).bits(), 1 << number, "{name}");
        }
        for unknown in ["", "ALL", "CAP_", "CAP_CAP_KILL", "FLY"] {
            assert_eq!(GuestCapabilities::named(unknown), None, "{unknown}");
        }
        assert_eq!(GuestCapabilities::ALL.names().count(), 41);
    }

    #[test]
    fn sets_are_lists_of_names_in_json() {
        let kill = GuestCapabilities::named("KILL").unwrap();
        let set = GuestCapabilities::named("CHOWN").unwrap().and(kill);
        let json = serde_json::to_string(&set).unwrap();
        assert_eq!(json, r#"["CHOWN","KILL"]"#);
        assert_eq!(
            serde_json::from_str::<GuestCapabilities>(&json).unwrap(),
            set
        );
        let unknown = serde_json::from_str::<GuestCapabilities>(r#"["FLY"]"#).unwrap_err();
        assert!(unknown.to_string().contains("FLY"), "{unknown}");
        assert_eq!(set.without(kill).to_string(), "CHOWN");
        let none = serde_json::to_string(&Privileges::default()).unwrap();
        assert_eq!(none, r#"{"no_new_privileges":false}"#);
    }
}
