//! Arguments about the privileges of a workload in its guest.

use clap::Args;
use sm_runtime::workload::{GuestCapabilities, PrivilegeError};

/// Privileges of a workload.
#[derive(Debug, Args)]
pub(crate) struct PrivilegeArgs {
    /// Keep a capability that --cap-drop ALL takes, such as NET_ADMIN, or ALL
    #[arg(long, value_name = "CAPABILITY", value_parser = parse_capability)]
    pub(crate) cap_add: Vec<String>,
    /// Take a capability from the workload, or ALL [default: it has all of the guest's own
    /// kernel]
    #[arg(long, value_name = "CAPABILITY", value_parser = parse_capability)]
    pub(crate) cap_drop: Vec<String>,
    /// Give the workload all capabilities, whatever --cap-drop takes
    #[arg(long)]
    pub(crate) privileged: bool,
    /// no-new-privileges: programs gain no privileges by set-user-ID bits and file
    /// capabilities
    #[arg(long, value_name = "OPTION", value_parser = SecurityOption::parse)]
    pub(crate) security_opt: Vec<SecurityOption>,
    /// Set a parameter of the guest's kernel
    #[arg(long, value_name = "NAME=VALUE", value_parser = parse_parameter)]
    pub(crate) sysctl: Vec<(String, String)>,
    // It is accepted only to refuse it with a helpful message.
    #[arg(long, value_name = "DEVICE", hide = true)]
    pub(crate) device: Vec<String>,
    /// Accepted for Docker's sake: every VM has an init that reaps processes
    #[arg(long, hide = true)]
    pub(crate) init: bool,
}

/// Checks the name of a capability before anything is downloaded.
fn parse_capability(name: &str) -> Result<String, PrivilegeError> {
    let all = name.trim_start_matches("CAP_").eq_ignore_ascii_case("all");
    match all || GuestCapabilities::named(name).is_some() {
        true => Ok(name.to_owned()),
        false => Err(PrivilegeError::Capability(name.to_owned())),
    }
}

fn parse_parameter(text: &str) -> Result<(String, String), String> {
    let (name, value) = text.split_once('=').ok_or("write NAME=VALUE")?;
    Ok((name.to_owned(), value.to_owned()))
}

/// Docker's security options.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum SecurityOption {
    NoNewPrivileges(bool),
    /// No profile is applied, as always.
    Unconfined,
}

impl SecurityOption {
    fn parse(text: &str) -> Result<Self, String> {
        // Docker accepts both separators.
        let (name, value) = match text.split_once(['=', ':']) {
            Some((name, value)) => (name, Some(value)),
            None => (text, None),
        };
        match (name, value) {
            ("no-new-privileges", None | Some("true")) => Ok(Self::NoNewPrivileges(true)),
            ("no-new-privileges", Some("false")) => Ok(Self::NoNewPrivileges(false)),
            ("seccomp" | "apparmor" | "systempaths", Some("unconfined"))
            | ("label", Some("disable")) => Ok(Self::Unconfined),
            _ => Err(
                "the VM is the boundary, and no profiles of seccomp, AppArmor or SELinux are \
                 applied in its guest; the only option is no-new-privileges"
                    .to_owned(),
            ),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn security_options_are_dockers() {
        let parse = SecurityOption::parse;
        for (text, expected) in [
            ("no-new-privileges", SecurityOption::NoNewPrivileges(true)),
            (
                "no-new-privileges:true",
                SecurityOption::NoNewPrivileges(true),
            ),
            (
                "no-new-privileges=false",
                SecurityOption::NoNewPrivileges(false),
            ),
            ("seccomp=unconfined", SecurityOption::Unconfined),
            ("label:disable", SecurityOption::Unconfined),
        ] {
            assert_eq!(parse(text), Ok(expected), "{text}");
        }
        for text in ["", "no-new-privileges:maybe", "seccomp=/p.json", "apparmor"] {
            assert!(parse(text).is_err(), "{text}");
        }
    }
}
