//! The workload of a virtual machine: an image's defaults merged with the caller's
//! overrides, by Docker's rules.

use serde::{Deserialize, Serialize};
use sm_guest_proto::exec::{ExecRequest, Role};
pub use sm_guest_proto::exec::{Rlimit, Sysctl};
use thiserror::Error;

use crate::health::HealthCheck;
use crate::privileges::{self, PrivilegeError, Privileges};
use crate::signal;

/// Docker's search path for images that set none.
pub const DEFAULT_PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// Failure to combine an image's defaults and the caller's overrides into a command.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
#[non_exhaustive]
pub enum WorkloadError {
    /// Neither the image nor the caller names a command.
    #[error("no command: the image sets neither Entrypoint nor Cmd, and none was given")]
    NoCommand,
    /// A working directory that is not absolute.
    #[error("working directory \"{0}\" is not an absolute path")]
    RelativeDirectory(String),
    /// An environment entry has no name.
    #[error("environment entry \"{0}\" has no name: write NAME=value")]
    BadEnv(String),
    /// The stop signal does not exist.
    #[error(transparent)]
    StopSignal(#[from] signal::UnknownSignal),
    /// A string contains a NUL byte, which the guest's kernel does not accept.
    #[error("{0} contains a NUL byte")]
    Nul(&'static str),
    /// The host name is not one that the guest's kernel accepts.
    #[error("host name \"{0}\" is not valid: use 1 to 63 letters, digits, '-' and '.'")]
    Hostname(String),
    /// Linux has no such capability or kernel parameter.
    #[error(transparent)]
    Privileges(#[from] PrivilegeError),
}

/// The members of an image's configuration that determine the workload (OCI image-spec
/// config.md, `config`).
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct ImageDefaults {
    /// `Entrypoint`.
    pub entrypoint: Vec<String>,
    /// `Cmd`.
    pub cmd: Vec<String>,
    /// `Env`, as `NAME=value`.
    pub env: Vec<String>,
    /// `User`.
    pub user: String,
    /// `WorkingDir`.
    pub working_dir: String,
    /// `StopSignal`.
    pub stop_signal: Option<String>,
    /// `Volumes`.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub volumes: Vec<String>,
    /// `Healthcheck` (an extension of Docker).
    #[serde(skip_serializing_if = "Option::is_none")]
    pub health: Option<HealthCheck>,
}

/// The caller's overrides. `None` and empty collections keep the image's value.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct Overrides {
    /// Arguments that replace the image's `Cmd`.
    pub command: Vec<String>,
    /// Program that replaces `Entrypoint`, which also drops the image's `Cmd`. An empty
    /// string means no entrypoint.
    pub entrypoint: Option<String>,
    /// `NAME=value` entries that override those of the image.
    pub env: Vec<String>,
    /// `user[:group]`.
    pub user: Option<String>,
    /// Additional groups.
    pub groups: Vec<String>,
    /// Working directory.
    pub cwd: Option<String>,
    /// Host name; `None` for the VM's short identifier.
    pub hostname: Option<String>,
    /// Signal that requests the workload to exit.
    pub stop_signal: Option<String>,
    /// Run on a terminal.
    pub tty: bool,
    /// Keep standard input open.
    pub stdin: bool,
    /// Resource limits.
    pub rlimits: Vec<Rlimit>,
    /// Capabilities that it has although it is dropped, or all are.
    pub cap_add: Vec<String>,
    /// Capabilities that it does not have, or `ALL`.
    pub cap_drop: Vec<String>,
    /// It has all capabilities, whatever is dropped.
    pub privileged: bool,
    /// Its programs gain no privileges by set-user-ID bits and file capabilities.
    pub no_new_privileges: bool,
    /// Names and values of kernel parameters.
    pub sysctls: Vec<(String, String)>,
}

/// A complete workload, ready to be sent to the guest.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Workload {
    /// Program and arguments.
    pub argv: Vec<String>,
    /// `NAME=value` entries.
    pub env: Vec<String>,
    /// Working directory.
    pub cwd: String,
    /// `user[:group]`, empty for root.
    pub user: String,
    /// Additional groups.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub groups: Vec<String>,
    /// Run on a terminal.
    pub tty: bool,
    /// Keep standard input open.
    pub stdin: bool,
    /// Host name of the guest.
    pub hostname: String,
    /// Number of the signal that requests the workload to exit.
    pub stop_signal: u8,
    /// Resource limits.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub rlimits: Vec<Rlimit>,
    /// Limits of its privileges in the guest.
    #[serde(default, skip_serializing_if = "Privileges::are_unlimited")]
    pub privileges: Privileges,
    /// Parameters of the guest's kernel.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub sysctls: Vec<Sysctl>,
}

impl Workload {
    /// Merges an image's defaults with the caller's overrides.
    ///
    /// # Errors
    /// See [`WorkloadError`].
    pub fn merge(
        image: &ImageDefaults,
        wish: &Overrides,
        default_hostname: &str,
    ) -> Result<Self, WorkloadError> {
        let (mut argv, image_cmd) = match wish.entrypoint.as_deref() {
            None => (image.entrypoint.clone(), image.cmd.as_slice()),
            Some("") => (Vec::new(), [].as_slice()),
            Some(program) => (vec![program.to_owned()], [].as_slice()),
        };
        if wish.command.is_empty() {
            argv.extend_from_slice(image_cmd);
        } else {
            argv.extend_from_slice(&wish.command);
        }
        if argv.first().is_none_or(String::is_empty) {
            return Err(WorkloadError::NoCommand);
        }
        let hostname = wish.hostname.as_deref().unwrap_or(default_hostname);
        check_hostname(hostname)?;
        let cwd = match wish.cwd.as_deref() {
            Some(cwd) if !cwd.starts_with('/') => {
                return Err(WorkloadError::RelativeDirectory(cwd.to_owned()));
            }
            Some(cwd) => cwd.to_owned(),
            None if image.working_dir.is_empty() => "/".to_owned(),
            // Some images have a relative directory, which Docker resolves from the root.
            None if !image.working_dir.starts_with('/') => format!("/{}", image.working_dir),
            None => image.working_dir.clone(),
        };
        let stop_signal = match wish.stop_signal.as_ref().or(image.stop_signal.as_ref()) {
            Some(text) if !text.is_empty() => signal::parse(text)?,
            _ => signal::TERM,
        };
        let mut base = vec![
            format!("PATH={DEFAULT_PATH}"),
            format!("HOSTNAME={hostname}"),
        ];
        if wish.tty {
            base.push("TERM=xterm".to_owned());
        }
        let env = merge_env(&[&base, &image.env, &wish.env])?;
        no_nul("the command", &argv)?;
        no_nul("the environment", &env)?;
        Ok(Self {
            argv,
            env,
            cwd,
            user: wish.user.clone().unwrap_or_else(|| image.user.clone()),
            groups: wish.groups.clone(),
            tty: wish.tty,
            stdin: wish.stdin,
            hostname: hostname.to_owned(),
            stop_signal,
            rlimits: wish.rlimits.clone(),
            privileges: Privileges {
                capabilities: match wish.privileged {
                    true => None,
                    false => privileges::capabilities(&wish.cap_add, &wish.cap_drop)?,
                },
                no_new_privileges: wish.no_new_privileges,
            },
            sysctls: wish
                .sysctls
                .iter()
                .map(|(name, value)| privileges::sysctl(name, value))
                .collect::<Result<_, _>>()?,
        })
    }

    /// Returns the request that starts the workload in the guest, on a terminal of this
    /// size.
    #[must_use]
    pub fn request(&self, columns: u16, rows: u16) -> ExecRequest {
        ExecRequest {
            argv: self.argv.clone(),
            env: self.env.clone(),
            cwd: self.cwd.clone(),
            user: self.user.clone(),
            groups: self.groups.clone(),
            tty: self.tty,
            cols: columns,
            rows,
            stdin: self.stdin,
            role: Role::Main,
            rlimits: self.rlimits.clone(),
            privileges: Some(self.privileges),
            sysctls: self.sysctls.clone(),
            ..ExecRequest::default()
        }
    }
}

/// Merges environments. Later layers override earlier ones; a name keeps the position of
/// its first appearance.
///
/// # Errors
/// An entry has no name.
pub fn merge_env(layers: &[&[String]]) -> Result<Vec<String>, WorkloadError> {
    let mut merged: Vec<String> = Vec::new();
    for entry in layers.iter().copied().flatten() {
        let name = match entry.split_once('=') {
            Some((name, _)) if !name.is_empty() => name,
            _ => return Err(WorkloadError::BadEnv(entry.clone())),
        };
        let known = merged
            .iter_mut()
            .find(|known| known.split_once('=').is_some_and(|(n, _)| n == name));
        match known {
            Some(known) => known.clone_from(entry),
            None => merged.push(entry.clone()),
        }
    }
    Ok(merged)
}

fn no_nul(what: &'static str, texts: &[String]) -> Result<(), WorkloadError> {
    if texts.iter().any(|text| text.contains('\0')) {
        return Err(WorkloadError::Nul(what));
    }
    Ok(())
}

fn check_hostname(name: &str) -> Result<(), WorkloadError> {
    let valid = (1..=63).contains(&name.len())
        && !name.starts_with('-')
        && name
            .bytes()
            .all(|b| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'.' | b'_'));
    if valid {
        Ok(())
    } else {
        Err(WorkloadError::Hostname(name.to_owned()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn strings(items: &[&str]) -> Vec<String> {
        items.iter().map(|&item| item.to_owned()).collect()
    }

    fn image() -> ImageDefaults {
        ImageDefaults {
            entrypoint: strings(&["/entry"]),
            cmd: strings(&["default"]),
            env: strings(&["A=image", "PATH=/image"]),
            user: "app".into(),
            working_dir: "/srv".into(),
            stop_signal: Some("SIGQUIT".into()),
            volumes: Vec::new(),
            health: None,
        }
    }

    #[test]
    fn the_image_decides_when_nothing_is_asked() {
        let merged = Workload::merge(&image(), &Overrides::default(), "host").unwrap();
        assert_eq!(merged.argv, ["/entry", "default"]);
        assert_eq!(merged.env, ["PATH=/image", "HOSTNAME=host", "A=image"]);
        assert_eq!((merged.cwd.as_str(), merged.user.as_str()), ("/srv", "app"));
        assert_eq!((merged.stop_signal, merged.hostname.as_str()), (3, "host"));
    }

    #[test]
    fn arguments_replace_cmd_and_entrypoint_drops_it() {
        let argv = |entrypoint: Option<&str>, command: &[&str]| {
            let wish = Overrides {
                entrypoint: entrypoint.map(str::to_owned),
                command: strings(command),
                ..Overrides::default()
            };
            Workload::merge(&image(), &wish, "h").map(|w| w.argv)
        };
        assert_eq!(argv(None, &["x"]).unwrap(), ["/entry", "x"]);
        assert_eq!(argv(Some("sh"), &[]).unwrap(), ["sh"]);
        assert_eq!(argv(Some("sh"), &["-c", "x"]).unwrap(), ["sh", "-c", "x"]);
        assert_eq!(argv(Some(""), &["x"]).unwrap(), ["x"]);
        assert_eq!(argv(Some(""), &[]), Err(WorkloadError::NoCommand));
    }

    #[test]
    fn the_caller_overrides_environment_user_and_directory() {
        let wish = Overrides {
            env: strings(&["A=caller", "B=", "A=last"]),
            user: Some("0:0".into()),
            cwd: Some("/tmp".into()),
            hostname: Some("box".into()),
            stop_signal: Some("9".into()),
            tty: true,
            ..Overrides::default()
        };
        let merged = Workload::merge(&image(), &wish, "h").unwrap();
        assert_eq!(
            merged.env,
            ["PATH=/image", "HOSTNAME=box", "TERM=xterm", "A=last", "B="]
        );
        assert_eq!((merged.cwd.as_str(), merged.user.as_str()), ("/tmp", "0:0"));
        assert_eq!(merged.stop_signal, 9);
    }

    #[test]
    fn invalid_overrides_are_refused_with_the_reason() {
        let merge = |wish: Overrides| Workload::merge(&image(), &wish, "h").unwrap_err();
        let wish = Overrides {
            cwd: Some("tmp".into()),
            ..Overrides::default()
        };
        assert_eq!(merge(wish), WorkloadError::RelativeDirectory("tmp".into()));
        let wish = Overrides {
            env: strings(&["=x"]),
            ..Overrides::default()
        };
        assert_eq!(merge(wish), WorkloadError::BadEnv("=x".into()));
        let wish = Overrides {
            hostname: Some("a b".into()),
            ..Overrides::default()
        };
        assert_eq!(merge(wish), WorkloadError::Hostname("a b".into()));
        let wish = Overrides {
            command: strings(&["a\0b"]),
            ..Overrides::default()
        };
        assert_eq!(merge(wish), WorkloadError::Nul("the command"));
    }
}
