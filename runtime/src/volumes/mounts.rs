//! Mounts of a VM, and Docker's texts for them.

use std::path::PathBuf;

use sm_control::config::{HostChown, HostOptionsV1, HostOwner, MountSourceV1, MountV1};

/// A file system that is mounted in a workload's root.
///
/// ```
/// use sm_runtime::volumes::Mount;
///
/// let data = Mount::volume("db", "/var/lib/db");
/// assert_eq!(data, Mount::from_volume_option("db:/var/lib/db")?);
/// let scratch = Mount::tmpfs("/scratch").size(64 << 20).read_only(false);
/// assert_eq!(scratch, Mount::from_tmpfs_option("/scratch:size=64m")?);
/// # Ok::<(), String>(())
/// ```
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Mount {
    pub(super) kind: MountKind,
    pub(super) target: String,
    pub(super) read_only: bool,
    /// See [`MountV1::optional`].
    pub(super) optional: bool,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum MountKind {
    Volume {
        /// `None` for one that is created for the VM.
        name: Option<String>,
        copy: bool,
        /// It was created for the VM.
        anonymous: bool,
    },
    Host {
        path: PathBuf,
        options: HostOptionsV1,
    },
    Tmpfs {
        size: Option<u64>,
        mode: Option<u32>,
    },
}

impl Mount {
    /// Mounts a volume at the absolute path `target`. A volume that does not exist is created
    /// when the VM starts. The files that the image has at the target are copied to a volume
    /// that is empty.
    #[must_use]
    pub fn volume(name: impl Into<String>, target: impl Into<String>) -> Self {
        Self::of_disk(Some(name.into()), target)
    }

    /// Mounts a volume that is created for the VM, under a generated name. It is removed with
    /// a VM that is removed at its exit, and otherwise by
    /// [`Vm::remove_with_volumes`](crate::Vm::remove_with_volumes).
    #[must_use]
    pub fn anonymous(target: impl Into<String>) -> Self {
        Self::of_disk(None, target)
    }

    fn of_disk(name: Option<String>, target: impl Into<String>) -> Self {
        Self {
            kind: MountKind::Volume {
                name,
                copy: true,
                anonymous: false,
            },
            target: target.into(),
            read_only: false,
            optional: false,
        }
    }

    /// Mounts a directory or a regular file of the host at the absolute path `target`. The path
    /// is resolved when the VM starts, links included, and has to exist.
    ///
    /// The guest sees changes of the host within a second, and the host those of the guest at
    /// once. New files belong to the user who starts the VM. No file system of the host below
    /// the directory is left out.
    #[must_use]
    pub fn host(path: impl Into<PathBuf>, target: impl Into<String>) -> Self {
        Self {
            kind: MountKind::Host {
                path: path.into(),
                options: HostOptionsV1::default(),
            },
            target: target.into(),
            read_only: false,
            optional: false,
        }
    }

    /// Mounts a file system in guest memory, by default of half its size.
    #[must_use]
    pub fn tmpfs(target: impl Into<String>) -> Self {
        Self {
            kind: MountKind::Tmpfs {
                size: None,
                mode: None,
            },
            target: target.into(),
            read_only: false,
            optional: false,
        }
    }

    /// Sets whether the workload cannot write to it. Any number of VMs may mount a volume in
    /// this way at the same time, if none writes to it.
    #[must_use]
    pub fn read_only(mut self, yes: bool) -> Self {
        self.read_only = yes;
        self
    }

    /// Leaves an empty volume empty.
    #[must_use]
    pub fn without_copy(mut self) -> Self {
        if let MountKind::Volume { copy, .. } = &mut self.kind {
            *copy = false;
        }
        self
    }

    /// Sets the owners of the host's files in the guest. By default, they are those of the
    /// host if root starts the VM; otherwise files of the user who starts it belong to the
    /// workload's user.
    #[must_use]
    pub fn owner(mut self, owner: HostOwner) -> Self {
        if let MountKind::Host { options, .. } = &mut self.kind {
            options.owner = Some(owner);
        }
        self
    }

    /// Sets the effect of chown(2) in the guest on the host's files: by default, the owner is
    /// stored in an extended attribute of the file.
    #[must_use]
    pub fn chown(mut self, chown: HostChown) -> Self {
        if let MountKind::Host { options, .. } = &mut self.kind {
            options.chown = chown;
        }
        self
    }

    /// Notifies programs in the guest that watch files (inotify(7)) of changes by the host, in
    /// up to 8192 directories that the guest has used.
    #[must_use]
    pub fn watch(mut self, yes: bool) -> Self {
        if let MountKind::Host { options, .. } = &mut self.kind {
            options.watch = yes;
        }
        self
    }

    /// Sets the limit of a tmpfs in bytes.
    #[must_use]
    pub fn size(mut self, bytes: u64) -> Self {
        if let MountKind::Tmpfs { size, .. } = &mut self.kind {
            *size = Some(bytes);
        }
        self
    }

    /// Sets the permissions of the root directory of a tmpfs.
    #[must_use]
    pub fn mode(mut self, bits: u32) -> Self {
        if let MountKind::Tmpfs { mode, .. } = &mut self.kind {
            *mode = Some(bits);
        }
        self
    }

    /// Parses the value of Docker's `-v`: `[SOURCE:]TARGET[:OPTIONS]`, with the options `ro`,
    /// `rw`, for a volume `nocopy`, and for a path of the host `owner=squash|keep|UID:GID`,
    /// `chown=xattr|ignore|deny` and `watch`. A source that begins with `/`, `.` or `~` is a path of the
    /// host, any other is the name of a volume.
    ///
    /// # Errors
    /// A sentence.
    pub fn from_volume_option(text: &str) -> Result<Self, String> {
        // The options may contain colons.
        let parts: Vec<&str> = text.splitn(3, ':').collect();
        let (name, target, options) = match parts[..] {
            [target] => (None, target, ""),
            [name, target] if target.starts_with('/') => (Some(name), target, ""),
            [target, options] if target.starts_with('/') => (None, target, options),
            [_, target] => {
                return Err(format!(
                    "\"{target}\" is no option of this mount, and no target, which begins with \"/\""
                ));
            }
            [name, target, options] => (Some(name), target, options),
            _ => {
                return Err(format!(
                    "\"{text}\" is no volume: write [SOURCE:]TARGET[:OPTIONS]"
                ));
            }
        };
        let mut mount = match name {
            Some(path) if path.starts_with(['/', '.', '~']) => Self::host(path, target),
            Some(name) => Self::volume(name, target),
            None => Self::anonymous(target),
        };
        for option in options.split(',').filter(|option| !option.is_empty()) {
            let (name, value) = option.split_once('=').unwrap_or((option, ""));
            let is_host = matches!(mount.kind, MountKind::Host { .. });
            mount = match option {
                "ro" => mount.read_only(true),
                "rw" => mount.read_only(false),
                "nocopy" if matches!(mount.kind, MountKind::Volume { .. }) => mount.without_copy(),
                // Labels of SELinux, hints for caches of other systems, and the only way in
                // which mounts of a VM propagate.
                "z" | "Z" | "cached" | "delegated" | "consistent" | "private" | "rprivate" => mount,
                "watch" if is_host => mount.watch(true),
                _ if is_host && matches!(name, "owner" | "chown") => {
                    mount.with_host_option(name, value)?
                }
                _ if is_host => {
                    return Err(format!(
                        "\"{option}\" is no option of this mount: ro, rw, owner=, chown=, watch"
                    ));
                }
                _ => {
                    return Err(format!(
                        "\"{option}\" is no option of this mount: ro, rw, and nocopy for a volume"
                    ));
                }
            };
        }
        mount.checked()
    }

    /// Parses the value of Docker's `--mount`: `type=volume|bind|tmpfs,target=PATH`, with
    /// `source=NAME` or `source=PATH`, `readonly`, `volume-nocopy`, `tmpfs-size=SIZE` and
    /// `tmpfs-mode=MODE`; with a path, `owner=`, `chown=` and `watch` as in `-v`.
    ///
    /// # Errors
    /// A sentence.
    pub fn from_mount_option(text: &str) -> Result<Self, String> {
        let value = |wanted: &[&str]| {
            text.split(',').find_map(|part| {
                let (name, value) = part.split_once('=').unwrap_or((part, ""));
                wanted.contains(&name).then_some(value)
            })
        };
        let target = value(&["target", "dst", "destination"]);
        let target = target.ok_or_else(|| format!("\"{text}\" has no target: add target=PATH"))?;
        let mut mount = match value(&["type"]).unwrap_or("volume") {
            "volume" => Self::of_disk(value(&["source", "src"]).map(str::to_owned), target),
            "tmpfs" => Self::tmpfs(target),
            "bind" => match value(&["source", "src"]) {
                Some(path) if !path.is_empty() => Self::host(path, target),
                _ => return Err(format!("\"{text}\" has no source: add source=PATH")),
            },
            other => {
                return Err(format!(
                    "\"{other}\" is no type of a mount: volume, bind or tmpfs"
                ));
            }
        };
        let is_tmpfs = matches!(mount.kind, MountKind::Tmpfs { .. });
        let is_volume = matches!(mount.kind, MountKind::Volume { .. });
        let is_host = matches!(mount.kind, MountKind::Host { .. });
        for part in text.split(',') {
            let (name, value) = part.split_once('=').unwrap_or((part, ""));
            mount = match name {
                "type" | "target" | "dst" | "destination" => mount,
                "source" | "src" if !is_tmpfs => mount,
                "readonly" | "ro" => mount.read_only(matches!(value, "" | "true" | "1")),
                "volume-nocopy" if is_volume => match value {
                    "" | "true" | "1" => mount.without_copy(),
                    _ => mount,
                },
                "owner" | "chown" if is_host => mount.with_host_option(name, value)?,
                "watch" if is_host => mount.watch(matches!(value, "" | "true" | "1")),
                "consistency" if is_host => mount,
                "bind-propagation" if is_host && matches!(value, "private" | "rprivate") => mount,
                "tmpfs-size" if is_tmpfs => mount.size(parse_size(value)?),
                "tmpfs-mode" if is_tmpfs => mount.mode(parse_mode(value)?),
                _ => return Err(format!("\"{part}\" is no option of this mount")),
            };
        }
        mount.checked()
    }

    /// Parses the value of Docker's `--tmpfs`: `TARGET[:OPTIONS]`, with the options `size=`,
    /// `mode=`, `ro` and `rw`. Others of mount(8) are ignored if they have no meaning here.
    ///
    /// # Errors
    /// A sentence.
    pub fn from_tmpfs_option(text: &str) -> Result<Self, String> {
        let (target, options) = text.split_once(':').unwrap_or((text, ""));
        let mut mount = Self::tmpfs(target);
        for option in options.split(',').filter(|option| !option.is_empty()) {
            let (name, value) = option.split_once('=').unwrap_or((option, ""));
            mount = match name {
                "size" => mount.size(parse_size(value)?),
                "mode" => mount.mode(parse_mode(value)?),
                "ro" => mount.read_only(true),
                "rw" => mount.read_only(false),
                "exec" | "nosuid" | "nodev" | "noatime" => mount,
                _ => {
                    return Err(format!(
                        "\"{option}\" is no option of a tmpfs: size=, mode=, ro, rw"
                    ));
                }
            };
        }
        mount.checked()
    }

    /// Sets an option of a path of the host.
    fn with_host_option(self, name: &str, value: &str) -> Result<Self, String> {
        let bad = |error| format!("option \"{name}\": {error}");
        Ok(match name {
            "owner" => self.owner(value.parse().map_err(bad)?),
            _ => self.chown(value.parse().map_err(bad)?),
        })
    }

    /// Returns the form in the VM's record.
    pub(crate) fn stored(&self) -> MountV1 {
        MountV1 {
            source: match &self.kind {
                MountKind::Volume {
                    name,
                    copy,
                    anonymous,
                } => MountSourceV1::Volume {
                    name: name.clone(),
                    copy: *copy,
                    anonymous: *anonymous,
                },
                MountKind::Host { path, options } => MountSourceV1::Host {
                    options: *options,
                    // A later start has another working directory.
                    path: std::path::absolute(path).unwrap_or_else(|_| path.clone()),
                },
                MountKind::Tmpfs { size, mode } => MountSourceV1::Tmpfs {
                    size: *size,
                    mode: *mode,
                },
            },
            target: self.target.clone(),
            read_only: self.read_only,
            optional: self.optional,
        }
    }

    /// Returns the mount of a record.
    pub(super) fn of_stored(stored: &MountV1) -> Self {
        let kind = match stored.source.clone() {
            MountSourceV1::Volume {
                name,
                copy,
                anonymous,
            } => MountKind::Volume {
                name,
                copy,
                anonymous,
            },
            MountSourceV1::Host { path, options } => MountKind::Host { path, options },
            MountSourceV1::Tmpfs { size, mode } => MountKind::Tmpfs { size, mode },
        };
        Self {
            kind,
            target: stored.target.clone(),
            read_only: stored.read_only,
            optional: stored.optional,
        }
    }

    fn checked(self) -> Result<Self, String> {
        match self.target.starts_with('/') && self.target.len() > 1 {
            true => Ok(self),
            false => Err(format!(
                "\"{}\" cannot be mounted at: write an absolute path other than /",
                self.target
            )),
        }
    }
}

fn parse_size(text: &str) -> Result<u64, String> {
    let bad = || format!("\"{text}\" is no size: write 64m or 1g");
    let digits = text.trim_end_matches(|c: char| !c.is_ascii_digit());
    let unit = text.get(digits.len()..).unwrap_or_default();
    let shift = match unit.to_ascii_lowercase().as_str() {
        "" | "b" => 0,
        "k" | "kb" | "kib" => 10,
        "m" | "mb" | "mib" => 20,
        "g" | "gb" | "gib" => 30,
        "t" | "tb" | "tib" => 40,
        _ => return Err(bad()),
    };
    let number: u64 = digits.parse().map_err(|_| bad())?;
    number.checked_mul(1 << shift).ok_or_else(bad)
}

fn parse_mode(text: &str) -> Result<u32, String> {
    u32::from_str_radix(text, 8)
        .ok()
        .filter(|mode| *mode <= 0o7777)
        .ok_or_else(|| format!("\"{text}\" is no mode: write 1777 or 700"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn volume_options_are_dockers() {
        let parse = Mount::from_volume_option;
        assert_eq!(parse("db:/data"), Ok(Mount::volume("db", "/data")));
        assert_eq!(parse("/data"), Ok(Mount::anonymous("/data")));
        let read_only = Mount::volume("db", "/data").read_only(true);
        assert_eq!(parse("db:/data:ro"), Ok(read_only.clone()));
        assert_eq!(parse("db:/data:ro,nocopy"), Ok(read_only.without_copy()));
        let work = Mount::host("/home/me", "/work");
        assert_eq!(parse("/home/me:/work"), Ok(work.clone()));
        assert_eq!(parse("/home/me:/work:ro,z"), Ok(work.read_only(true)));
        assert_eq!(parse(".:/work"), Ok(Mount::host(".", "/work")));
        let owned = Mount::host(".", "/work").owner(HostOwner::Fixed { uid: 1, gid: 2 });
        assert_eq!(parse(".:/work:owner=1:2"), Ok(owned.clone()));
        assert_eq!(
            parse(".:/work:chown=deny,watch,owner=1:2,ro"),
            Ok(owned.chown(HostChown::Deny).watch(true).read_only(true))
        );
        assert_eq!(
            parse("/data:ro"),
            Ok(Mount::anonymous("/data").read_only(true))
        );
        for (text, why) in [
            ("", "absolute path"),
            ("data", "absolute path"),
            ("db:/", "absolute path"),
            ("db:/data:fast", "no option of this mount"),
            ("/home:/data:nocopy", "no option of this mount"),
            ("a:/b:ro:c", "\"ro:c\" is no option"),
            ("a:/b:owner=keep", "nocopy for a volume"),
            ("a:/b:watch", "nocopy for a volume"),
            (".:/b:owner=root", "squash, keep and UID:GID"),
            (".:/b:chown=yes", "xattr, ignore and deny"),
            ("/home:data", "no option of this mount"),
        ] {
            let error = parse(text).unwrap_err();
            assert!(error.contains(why), "{text}: {error}");
        }
    }

    #[test]
    fn mount_options_are_dockers() {
        let parse = Mount::from_mount_option;
        let db = Mount::volume("db", "/data");
        assert_eq!(parse("source=db,target=/data"), Ok(db.clone()));
        assert_eq!(
            parse("type=volume,src=db,dst=/data,readonly"),
            Ok(db.clone().read_only(true))
        );
        assert_eq!(
            parse("type=volume,src=db,destination=/data,volume-nocopy"),
            Ok(db.without_copy())
        );
        assert_eq!(
            parse("type=bind,source=./x,target=/x,readonly"),
            Ok(Mount::host("./x", "/x").read_only(true))
        );
        assert_eq!(
            parse("type=bind,source=.,target=/x,owner=squash,chown=ignore,watch=true"),
            Ok(Mount::host(".", "/x")
                .watch(true)
                .owner(HostOwner::Squash)
                .chown(HostChown::Ignore))
        );
        assert_eq!(
            parse("type=tmpfs,target=/t,tmpfs-size=1g,tmpfs-mode=700"),
            Ok(Mount::tmpfs("/t").size(1 << 30).mode(0o700))
        );
        for (text, why) in [
            ("type=volume,source=db", "no target"),
            ("type=npipe,target=/x", "no type"),
            ("type=bind,target=/x", "no source"),
            ("type=bind,source=/x,target=/x,volume-nocopy", "no option"),
            ("type=tmpfs,source=db,target=/x", "no option"),
            ("source=db,target=/x,owner=keep", "no option"),
            ("type=bind,source=.,target=/x,owner=me", "squash, keep and"),
            (
                "type=bind,source=.,target=/x,bind-propagation=shared",
                "no option",
            ),
            ("type=volume,target=/x,tmpfs-size=1m", "no option"),
            ("type=tmpfs,target=/x,tmpfs-size=much", "no size"),
            ("type=tmpfs,target=/x,tmpfs-mode=999", "no mode"),
        ] {
            let error = parse(text).unwrap_err();
            assert!(error.contains(why), "{text}: {error}");
        }
    }

    #[test]
    fn tmpfs_options_are_dockers() {
        let parse = Mount::from_tmpfs_option;
        assert_eq!(parse("/t"), Ok(Mount::tmpfs("/t")));
        assert_eq!(
            parse("/t:rw,nosuid,size=65536k,mode=1700"),
            Ok(Mount::tmpfs("/t").size(64 << 20).mode(0o1700))
        );
        assert!(parse("t").is_err() && parse("/t:uid=1").is_err());
    }
}
