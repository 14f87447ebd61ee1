//! The guest's identity: entropy, clock, names and identifiers.
//!
//! The workload's `/etc/hostname`, `/etc/hosts`, `/etc/resolv.conf`, `/run/sm-epoch` and
//! the kernel's `boot_id` are files of the agent that [`crate::root`] mounts over the
//! image's; `/etc/machine-id` is a file in the root. A refresh rewrites these files and
//! never accesses a path that the workload controls. It writes through descriptors that
//! were opened before the workload ran, because root in the workload could otherwise
//! block the open with a file lease.
//!
//! The containers of a guest share all of it, as they share its network and host name.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::fs::{self, File};
use std::io;
use std::net::{Ipv4Addr, UdpSocket};
use std::os::fd::{AsFd as _, BorrowedFd, OwnedFd};
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use rustix::fs::{Mode, OFlags};
use rustix::time::{ClockId, Timespec, clock_settime};
use sm_guest_proto::control::{AttachRoot, IdentityReport, Refresh};
use thiserror::Error;

use crate::names::{are_hosts, hosts_file, is_hostname, resolv_conf};
use crate::network::{self, NetDevice, NetworkConfig, NetworkError, parse_mac};
use crate::root::{
    BOOT_ID, BOOT_ID_FILE, EPOCH, EPOCH_FILE, MACHINE_ID, MACHINE_ID_FILE, RESOLV_CONF_FILE,
    read_in,
};
use crate::sys;

const UUID: &str = "proc/sys/kernel/random/uuid";

/// Failure of a step of a refresh.
#[derive(Debug, Error)]
pub(crate) enum IdentityError {
    #[error("{0} is malformed")]
    Malformed(&'static str),
    #[error(transparent)]
    Network(#[from] NetworkError),
    #[error("{operation}: {cause}")]
    Step {
        operation: &'static str,
        cause: io::Error,
    },
}

fn step<T>(
    operation: &'static str,
    result: Result<T, impl Into<io::Error>>,
) -> Result<T, IdentityError> {
    result.map_err(|cause| IdentityError::Step {
        operation,
        cause: cause.into(),
    })
}

/// The guest's identity and the files that contain it.
#[derive(Debug)]
pub(crate) struct Identity {
    directory: PathBuf,
    /// The kernel's random number generator.
    random: OwnedFd,
    /// Files that have been written, by name.
    files: HashMap<&'static str, File>,
    machine_id: String,
    /// The machine ID's files in the roots of containers, except those where it is one of
    /// `files`.
    root_machine_ids: Vec<File>,
    hostname: String,
    /// Further lines of `/etc/hosts`.
    hosts: Vec<(String, String)>,
    network_device: Option<NetDevice>,
}

impl Identity {
    /// Creates an identity with files in `directory`, and entropy written to `random`.
    pub(crate) fn new(directory: PathBuf, random: OwnedFd) -> Self {
        Self {
            directory,
            random,
            files: HashMap::new(),
            machine_id: String::new(),
            root_machine_ids: Vec::new(),
            hostname: String::from("localhost"),
            hosts: Vec::new(),
            network_device: None,
        }
    }

    /// Sets the device of which refreshes configure the interface.
    pub(crate) fn set_network_device(&mut self, device: Option<NetDevice>) {
        self.network_device = device;
    }

    /// Returns the descriptors that a forked process must keep open to report the identity.
    pub(crate) fn descriptors(&self) -> impl Iterator<Item = BorrowedFd<'_>> {
        self.network_device.iter().flat_map(NetDevice::descriptors)
    }

    /// Returns the directory of the files.
    pub(crate) fn directory(&self) -> &Path {
        &self.directory
    }

    /// Gives the guest the identity in `refresh`. Absent identifiers remain unchanged.
    pub(crate) fn refresh(&mut self, refresh: &Refresh) -> Result<(), IdentityError> {
        // All parts are checked before any is changed.
        let malformed = IdentityError::Malformed;
        let mac = refresh.mac.as_deref();
        let mac = mac.map(|mac| parse_mac(mac).ok_or(malformed("mac")));
        let mac = mac.transpose()?;
        let network = refresh.network.as_ref();
        let network =
            network.map(|network| NetworkConfig::new(network, mac).ok_or(malformed("network")));
        let network = network.transpose()?;
        if !refresh.machine_id.is_empty() && !is_hex(&refresh.machine_id, 32) {
            return Err(IdentityError::Malformed("machine_id"));
        }
        if !refresh.boot_id.is_empty() && !is_uuid(&refresh.boot_id) {
            return Err(IdentityError::Malformed("boot_id"));
        }
        if !refresh.hostname.is_empty() && !is_hostname(&refresh.hostname) {
            return Err(IdentityError::Malformed("hostname"));
        }
        if !refresh.epoch.is_empty() && !is_uuid(&refresh.epoch) {
            return Err(IdentityError::Malformed("epoch"));
        }
        if !are_hosts(&refresh.hosts) {
            return Err(IdentityError::Malformed("hosts"));
        }
        let servers = resolv_conf(&refresh.dns).ok_or(IdentityError::Malformed("dns"))?;
        if refresh.entropy.len() > 512 {
            return Err(IdentityError::Malformed("entropy"));
        }
        if !refresh.entropy.is_empty() {
            step(
                "add entropy",
                sys::add_entropy(self.random.as_fd(), &refresh.entropy),
            )?;
        }
        if refresh.realtime_ns != 0 {
            step("set the clock", set_clock(refresh.realtime_ns))?;
        }
        let hostname = match refresh.hostname.as_str() {
            "" => self.hostname.clone(),
            name => name.to_owned(),
        };
        self.hosts.clone_from(&refresh.hosts);
        self.set_hostname(&hostname)?;
        step("write resolv.conf", self.write(RESOLV_CONF_FILE, &servers))?;
        if !refresh.machine_id.is_empty() {
            self.set_machine_id(&refresh.machine_id)?;
        }
        if !refresh.boot_id.is_empty() {
            step(
                "write boot_id",
                self.write_line(BOOT_ID_FILE, &refresh.boot_id),
            )?;
        }
        if !refresh.epoch.is_empty() {
            step("write epoch", self.write_line(EPOCH_FILE, &refresh.epoch))?;
        }
        network::apply(self.network_device.as_ref(), network.as_ref())?;
        Ok(())
    }

    /// Prepares the files for a root that is about to be assembled.
    pub(crate) fn prepare(&mut self, plan: &AttachRoot) -> Result<(), IdentityError> {
        if !plan.hostname.is_empty() && !is_hostname(&plan.hostname) {
            return Err(IdentityError::Malformed("hostname"));
        }
        let hostname = match plan.hostname.as_str() {
            "" => self.hostname.clone(),
            name => name.to_owned(),
        };
        self.set_hostname(&hostname)?;
        if !self.files.contains_key(RESOLV_CONF_FILE) {
            step("write resolv.conf", self.write(RESOLV_CONF_FILE, ""))?;
        }
        // A host that never refreshes still gets identifiers of this boot.
        let kernels = fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default();
        if !self.files.contains_key(BOOT_ID_FILE) {
            step(
                "write boot_id",
                self.write_line(BOOT_ID_FILE, kernels.trim()),
            )?;
        }
        if !self.files.contains_key(EPOCH_FILE) {
            step("write epoch", self.write_line(EPOCH_FILE, kernels.trim()))?;
        }
        if !self.files.contains_key(MACHINE_ID_FILE) {
            let fresh = fs::read_to_string("/proc/sys/kernel/random/uuid").unwrap_or_default();
            let fresh = fresh.trim().replace('-', "");
            self.set_machine_id(&fresh)?;
        }
        Ok(())
    }

    /// Takes over a container's file for its machine ID, unless it is one of the
    /// prepared files.
    pub(crate) fn attached(&mut self, machine_id: Option<OwnedFd>) -> Result<(), IdentityError> {
        self.root_machine_ids.extend(machine_id.map(File::from));
        let id = self.machine_id.clone();
        self.set_machine_id(&id)
    }

    /// Returns the guest's current identity, read below `root` in the way of a process of
    /// the workload, or, without a workload, from the files prepared for it. May block on
    /// a file system that the workload has mounted.
    pub(crate) fn identity_report(
        &self,
        root: Option<PathBuf>,
    ) -> Result<IdentityReport, IdentityError> {
        let root = root
            .map(|root| {
                let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
                rustix::fs::open(root, flags, Mode::empty())
            })
            .transpose();
        let root = step("open the workload's root", root)?;
        // A value that cannot be read is reported as empty, which is the same in all
        // guests.
        let line = |ours: &str, theirs: &str| match &root {
            Some(root) => read_in(root, theirs).unwrap_or_default(),
            None => fs::read_to_string(self.directory.join(ours))
                .unwrap_or_default()
                .trim()
                .to_owned(),
        };
        let mut random = [0; 32];
        step(
            "get random bytes",
            rustix::rand::getrandom(&mut random, rustix::rand::GetRandomFlags::empty()),
        )?;
        let uuid = step(
            "read a random UUID",
            match &root {
                Some(root) => read_in(root, UUID),
                None => fs::read_to_string(Path::new("/").join(UUID)),
            },
        )?;
        let report = self.network_device.as_ref().map(network::report);
        let report = step("read the network interface", report.transpose())?.flatten();
        let (mac, addresses) = report.unzip();
        Ok(IdentityReport {
            random: random.iter().map(|byte| format!("{byte:02x}")).collect(),
            uuid: uuid.trim().to_owned(),
            machine_id: line(MACHINE_ID_FILE, MACHINE_ID),
            boot_id: line(BOOT_ID_FILE, BOOT_ID),
            epoch: line(EPOCH_FILE, EPOCH),
            hostname: rustix::system::uname()
                .nodename()
                .to_string_lossy()
                .into_owned(),
            mac,
            addresses: addresses.unwrap_or_default(),
            realtime_ns: realtime_ns(),
        })
    }

    fn set_hostname(&mut self, name: &str) -> Result<(), IdentityError> {
        step(
            "set the host name",
            rustix::system::sethostname(name.as_bytes()),
        )?;
        self.hostname = name.to_owned();
        step("write hostname", self.write_line("hostname", name))?;
        let hosts = hosts_file(name, &self.hosts);
        step("write hosts", self.write("hosts", &hosts))
    }

    fn set_machine_id(&mut self, id: &str) -> Result<(), IdentityError> {
        let written = self.write_line(MACHINE_ID_FILE, id);
        step("write machine-id", written)?;
        for file in &self.root_machine_ids {
            let rewritten = rewrite(file, &format!("{id}\n"));
            step("write the root's machine-id", rewritten)?;
        }
        id.clone_into(&mut self.machine_id);
        Ok(())
    }

    fn write_line(&mut self, name: &'static str, line: &str) -> io::Result<()> {
        self.write(name, &format!("{line}\n"))
    }

    /// Rewrites a file in place, because it may be mounted in the workload's namespace,
    /// where a new inode would not be visible.
    fn write(&mut self, name: &'static str, text: &str) -> io::Result<()> {
        let file = match self.files.entry(name) {
            Entry::Occupied(entry) => entry.into_mut(),
            Entry::Vacant(entry) => entry.insert(File::create(self.directory.join(name))?),
        };
        rewrite(file, text)
    }
}

fn rewrite(file: &File, text: &str) -> io::Result<()> {
    file.write_all_at(text.as_bytes(), 0)?;
    file.set_len(u64::try_from(text.len()).unwrap_or(u64::MAX))
}

fn is_hex(text: &str, len: usize) -> bool {
    text.len() == len
        && text
            .bytes()
            .all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f'))
}

fn is_uuid(text: &str) -> bool {
    let lengths = [8, 4, 4, 4, 12];
    let parts: Vec<_> = text.split('-').collect();
    parts.len() == lengths.len()
        && parts
            .iter()
            .zip(lengths)
            .all(|(part, len)| is_hex(part, len))
}

fn set_clock(nanoseconds: u64) -> io::Result<()> {
    let seconds =
        i64::try_from(nanoseconds / 1_000_000_000).map_err(|_| io::ErrorKind::InvalidInput)?;
    let rest =
        i64::try_from(nanoseconds % 1_000_000_000).map_err(|_| io::ErrorKind::InvalidInput)?;
    let time = Timespec {
        tv_sec: seconds,
        tv_nsec: rest,
    };
    clock_settime(ClockId::Realtime, time)?;
    Ok(())
}

/// Moves the wall clock by `offset_ns` nanoseconds.
pub(crate) fn adjust_clock(offset_ns: i64) -> io::Result<()> {
    let moved = realtime_ns().checked_add_signed(offset_ns);
    set_clock(moved.ok_or(io::ErrorKind::InvalidInput)?)
}

/// Returns the guest's wall clock in nanoseconds since the Unix epoch.
pub(crate) fn realtime_ns() -> u64 {
    let now = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .unwrap_or_default();
    u64::try_from(now.as_nanos()).unwrap_or(u64::MAX)
}

fn control_socket() -> io::Result<UdpSocket> {
    // Interface ioctls accept any socket; this one carries no traffic.
    UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0))
}

/// Brings the loopback interface up.
pub(crate) fn loopback_up() -> io::Result<()> {
    sys::interface_up(control_socket()?.as_fd(), "lo")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn identity(directory: &Path) -> Identity {
        let random = File::options().write(true).open("/dev/null").unwrap();
        Identity::new(directory.into(), random.into())
    }

    #[test]
    fn malformed_identities_are_refused_before_anything_changes() {
        let directory = tempfile::tempdir().unwrap();
        let mut identity = identity(directory.path());
        let refused = |refresh: Refresh| identity.refresh(&refresh).unwrap_err().to_string();
        let base = Refresh::default;
        let mut refused = refused;
        assert_eq!(
            refused(Refresh {
                machine_id: "../../etc".into(),
                ..base()
            }),
            "machine_id is malformed"
        );
        assert_eq!(
            refused(Refresh {
                hostname: "a\n127.0.0.1 evil".into(),
                ..base()
            }),
            "hostname is malformed"
        );
        assert_eq!(
            refused(Refresh {
                boot_id: "1-2-3-4-5".into(),
                ..base()
            }),
            "boot_id is malformed"
        );
        assert_eq!(
            refused(Refresh {
                mac: Some("01:00:5e:00:00:01".into()),
                ..base()
            }),
            "mac is malformed"
        );
        assert_eq!(fs::read_dir(directory.path()).unwrap().count(), 0);
    }

    #[test]
    fn files_are_rewritten_in_place() {
        let directory = tempfile::tempdir().unwrap();
        let mut identity = identity(directory.path());
        identity
            .write_line("machine-id", "a longer first content")
            .unwrap();
        let inode = |name| {
            std::os::unix::fs::MetadataExt::ino(&fs::metadata(directory.path().join(name)).unwrap())
        };
        let before = inode("machine-id");
        identity.write_line("machine-id", "short").unwrap();
        assert_eq!(inode("machine-id"), before);
        let text = fs::read_to_string(directory.path().join("machine-id")).unwrap();
        assert_eq!(text, "short\n");
    }
}
