//! The control protocol: the host sends requests, and the agent answers each with one
//! CONTROL frame, in order.
//!
//! The agent serves it on connections accepted on guest port [`crate::port::CONTROL`] and
//! on the one stream that it dials to the host after a cold boot. The first request on a
//! connection must be [`ControlRequest::Hello`]. Requests may be pipelined; they are
//! processed one after the other.
//!
//! A cold start is HELLO, REFRESH, ATTACH ROOT. A snapshot is FREEZE, PREPARE SNAPSHOT,
//! and the capture. A restore resets every connection, after which the host connects
//! again: HELLO, REFRESH (with [`Refresh::vmgenid_wait_ms`]), and THAW only after the
//! refresh succeeded.

use std::net::IpAddr;

use serde::{Deserialize, Serialize};

use crate::base64_bytes;
use crate::container::ContainerId;
use crate::exec::Hello;

/// A request of the host.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ControlRequest {
    /// Negotiate the protocol version. Answered by [`ControlReply::Hello`].
    Hello(Hello),
    /// Give this guest a fresh identity. Sent after every start and reset, before any
    /// workload code runs: when the reply arrives, the guest has no identifier in common
    /// with other clones.
    Refresh(Refresh),
    /// Move the wall clock by `offset_ns` nanoseconds. Sent when a refresh took so long
    /// that the time in it was late. Answered by [`ControlReply::ClockAdjusted`].
    AdjustClock {
        /// Nanoseconds to add; negative to move the clock back.
        offset_ns: i64,
    },
    /// Create a container: mount its root file system and prepare it for commands.
    AttachRoot(AttachRoot),
    /// Mount file systems in a container's root, after it was attached and before the main
    /// command runs.
    Mount {
        /// The container.
        container: ContainerId,
        /// In the order in which they are mounted.
        mounts: Vec<GuestMount>,
    },
    /// Notify programs that watch files of shared directories (inotify(7)) of changes by the
    /// host: set the times of the files to [`TOUCH`]. An error if the last such request is
    /// still performed.
    NoteHostChanges {
        /// The container.
        container: ContainerId,
        /// The changed files.
        changes: Vec<HostFileChange>,
    },
    /// Stop scheduling the processes of all containers (cgroup v2 freezer).
    Freeze,
    /// Resume the processes that [`ControlRequest::Freeze`] has stopped.
    Thaw,
    /// Write back dirty data and discard caches that a snapshot need not contain.
    PrepareSnapshot,
    /// Send `signal` to a container's main process.
    SignalMain {
        /// The container.
        container: ContainerId,
        /// Signal number, 1..=64.
        signal: u8,
        /// The signal is meant to end the container. If the process is systemd, SIGTERM is
        /// then replaced by SIGRTMIN+3, because systemd re-executes itself on SIGTERM.
        #[serde(default)]
        stop: bool,
    },
    /// Terminate all processes (SIGTERM, then SIGKILL after `grace_ms`), unmount, power
    /// off.
    PowerOff {
        /// Milliseconds between SIGTERM and SIGKILL.
        grace_ms: u64,
    },
    /// Report usage figures of the guest and of a container.
    Stats {
        /// The container.
        container: ContainerId,
    },
    /// Report the identity of this guest, as the processes of a container see it, or, if
    /// there is no such container yet, as they would. Answered by
    /// [`ControlReply::IdentityReport`].
    #[serde(rename = "evidence")]
    IdentityReport {
        /// The container.
        container: ContainerId,
    },
}

/// The fresh identity of a guest.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Refresh {
    /// Restore epoch: a UUID in text form that is new after every start and reset. The
    /// workload reads it from `/run/sm-epoch`, and a change of that file means that it
    /// was cloned.
    pub epoch: String,
    /// Host entropy, 32 to 512 bytes, mixed into the kernel's CRNG and credited.
    #[serde(with = "base64_bytes")]
    pub entropy: Vec<u8>,
    /// Wall-clock time in nanoseconds since the Unix epoch, when the request is sent.
    pub realtime_ns: u64,
    /// Host name to set.
    pub hostname: String,
    /// 32 lower-case hexadecimal digits for `/etc/machine-id`.
    pub machine_id: String,
    /// UUID in text form shown as `/proc/sys/kernel/random/boot_id`.
    pub boot_id: String,
    /// MAC address for the network interface, if `network` is present; the previous one
    /// remains without it.
    pub mac: Option<String>,
    /// Configuration of the network interface. When absent, the guest has the loopback
    /// interface only.
    pub network: Option<GuestNetwork>,
    /// Contents of `/etc/resolv.conf`, which replaces the image's file.
    pub dns: GuestDns,
    /// Further lines of `/etc/hosts`: address, then names separated by spaces. At most 1,024.
    pub hosts: Vec<(String, String)>,
    /// Maximum time that the answer waits for the kernel to process a new VM generation
    /// ID, in milliseconds. Set after a restore; with 0 the answer does not wait.
    pub vmgenid_wait_ms: u32,
}

/// Configuration of a guest's network interface, which replaces the previous one. The
/// device's link is up before a host sends it: the answer waits for it, for up to a second,
/// because packets that are sent earlier are lost.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct GuestNetwork {
    /// Maximum size of a packet in bytes, without the Ethernet header; at least 68, and
    /// 1,280 for IPv6.
    pub mtu: u16,
    /// At most 16.
    pub addresses: Vec<GuestAddress>,
    /// MAC address of the gateways.
    pub gateway_mac: String,
}

/// Address of a [`GuestNetwork`]. It is usable at once, without a search for duplicates.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct GuestAddress {
    /// Address of the interface.
    pub address: IpAddr,
    /// Length of the network's prefix in bits.
    pub prefix: u8,
    /// Target of the default route of this family, in the same network.
    #[serde(default)]
    pub gateway: Option<IpAddr>,
}

/// Settings of the resolver, as in resolv.conf(5).
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct GuestDns {
    /// Name servers, at most 16.
    pub nameservers: Vec<IpAddr>,
    /// Domains in which names are searched, at most 32.
    pub search: Vec<String>,
    /// Options such as `ndots:1`, at most 32.
    pub options: Vec<String>,
}

/// Creation of a container: assembly of its root file system.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct AttachRoot {
    /// The container, which must not exist yet.
    pub container: ContainerId,
    /// Block device of the read-only EROFS lower layer, such as `/dev/vda`.
    pub lower: String,
    /// Storage for changes.
    pub upper: Upper,
    /// Host name, also written to `/etc/hosts`.
    pub hostname: String,
    /// Size of `/dev/shm` in bytes; 64 MiB when 0.
    pub shm_size: u64,
    /// Mount the root read-only, without an upper layer.
    pub read_only: bool,
}

/// Storage for changes to the root file system.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Upper {
    /// Guest memory, at most `size` bytes; half of guest memory when 0.
    Tmpfs {
        /// Limit in bytes.
        size: u64,
    },
    /// An ext4 file system on a block device, such as `/dev/vdb`.
    Ext4 {
        /// The block device.
        device: String,
    },
}

/// A mount in the workload's root. Set-user-ID bits and device nodes in it have no effect.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct GuestMount {
    /// The mounted file system.
    pub source: GuestMountSource,
    /// Absolute path in the root, in which links are resolved. Missing directories are
    /// created.
    pub target: String,
    /// The workload cannot write to it.
    pub read_only: bool,
    /// It is left out if there is no directory at the target, and none can be created.
    #[serde(default)]
    pub optional: bool,
}

/// The file system of a [`GuestMount`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum GuestMountSource {
    /// The directory `data` of the ext4 file system on a block device, such as `/dev/vdc`.
    Disk {
        /// The block device.
        device: String,
        /// If that directory is empty, the files at the target are copied to it first.
        copy: bool,
    },
    /// A directory of the host, which is an entry of the virtio-fs file system `sm`.
    Shared {
        /// Name of the entry.
        name: String,
        /// The only file of the directory, which is mounted in its place.
        file: Option<String>,
        /// If the directory is empty, the files at the target are copied to it first.
        #[serde(default)]
        copy: bool,
        /// [`ControlRequest::NoteHostChanges`] is sent for it.
        #[serde(default)]
        watch: bool,
    },
    /// Guest memory.
    Tmpfs {
        /// Limit in bytes; absent for half of guest memory.
        size: Option<u64>,
        /// Permissions of its root directory.
        mode: u32,
    },
}

/// Seconds and nanoseconds of the time of modification, and for a directory of access, too, by
/// which a guest asks the server of shared directories to notify its programs of a change. No
/// file gets this time.
pub const TOUCH: (i64, u32) = (-1_000_000_007_001, 736_687_623);

/// A file or directory that the host has changed.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct HostFileChange {
    /// Name of the shared directory, as in [`GuestMountSource::Shared`].
    pub share: String,
    /// Path below it; empty for the directory itself.
    pub path: String,
    /// It is a directory, in which an entry has appeared or disappeared.
    pub is_directory: bool,
}

/// A reply of the agent.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[non_exhaustive]
#[serde(rename_all = "snake_case")]
pub enum ControlReply {
    /// Answer to HELLO.
    Hello(AgentHello),
    /// The request was carried out and has no result.
    Done,
    /// Answer to a refresh.
    Refreshed(Refreshed),
    /// Answer to [`ControlRequest::AdjustClock`].
    ClockAdjusted {
        /// Guest wall clock in nanoseconds since the Unix epoch after it was moved.
        realtime_ns: u64,
    },
    /// Answer to [`ControlRequest::Stats`].
    Stats(GuestStats),
    /// Answer to [`ControlRequest::IdentityReport`].
    #[serde(rename = "evidence")]
    IdentityReport(IdentityReport),
    /// The last request of this kind is still performed; this one was not.
    Busy,
    /// The request failed.
    Error {
        /// The operation, the object and the cause, in a sentence.
        message: String,
    },
}

/// Version and boot data of the agent.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct AgentHello {
    /// The agent's [`crate::PROTOCOL_VERSION`].
    pub protocol: u32,
    /// The agent's crate version.
    pub version: String,
    /// Kernel release, as `uname -r` prints it.
    pub kernel: String,
    /// Guest uptime (CLOCK_BOOTTIME) in microseconds when `main` of the agent was
    /// entered.
    pub init_us: u64,
    /// Guest uptime in microseconds when the agent was ready to serve.
    pub ready_us: u64,
    /// Number of online vCPUs.
    pub cpus: u32,
    /// Usable memory in KiB (MemTotal).
    pub memory_kib: u64,
}

/// Result of a refresh.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Refreshed {
    /// Guest wall clock in nanoseconds since the Unix epoch after it was set.
    pub realtime_ns: u64,
    /// True if the kernel has processed a new VM generation ID since the last refresh.
    pub vmgenid_seen: bool,
}

/// Identity report: the data that distinguishes a guest from its clones, as its own
/// processes read it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct IdentityReport {
    /// 32 bytes of `getrandom(2)`, in hexadecimal.
    pub random: String,
    /// One read of `/proc/sys/kernel/random/uuid`.
    pub uuid: String,
    /// The workload's `/etc/machine-id`.
    pub machine_id: String,
    /// The workload's `/proc/sys/kernel/random/boot_id`.
    pub boot_id: String,
    /// The workload's `/run/sm-epoch`.
    pub epoch: String,
    /// The host name.
    pub hostname: String,
    /// MAC address of the network interface; absent when there is none.
    pub mac: Option<String>,
    /// Addresses of the network interface, at most 64.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub addresses: Vec<IpAddr>,
    /// The wall clock, in nanoseconds since the Unix epoch.
    pub realtime_ns: u64,
}

/// Usage figures of a guest and of one of its containers.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct GuestStats {
    /// Usable memory in KiB.
    pub memory_total_kib: u64,
    /// Available memory in KiB.
    pub memory_available_kib: u64,
    /// Number of processes of the container.
    pub processes: u32,
    /// CPU time used by processes of the container, in microseconds.
    pub cpu_us: u64,
    /// Processes of the container that the guest's OOM killer killed since this VM was
    /// started or restored.
    pub oom_kills: u64,
    /// The part of `oom_kills` that concerns the main command and not an exec.
    pub main_oom_kills: u64,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn requests_have_a_stable_json_form() {
        let json = serde_json::to_string(&ControlRequest::PowerOff { grace_ms: 10 }).unwrap();
        assert_eq!(json, r#"{"power_off":{"grace_ms":10}}"#);
        let json = serde_json::to_string(&ControlRequest::Freeze).unwrap();
        assert_eq!(json, r#""freeze""#);
        // `stop` has a default.
        let json = r#"{"signal_main":{"container":"main","signal":15}}"#;
        let request = serde_json::from_str(json).unwrap();
        assert_eq!(
            ControlRequest::SignalMain {
                container: ContainerId::default(),
                signal: 15,
                stop: false
            },
            request
        );
    }

    #[test]
    fn parts_of_a_refresh_may_be_absent() {
        let refresh: Refresh = serde_json::from_str(r#"{"hostname":"box"}"#).unwrap();
        assert_eq!((refresh.network, refresh.hosts), (None, Vec::new()));
        assert_eq!(refresh.dns, GuestDns::default());
        let json = r#"{"network":{"mtu":1500,"gateway_mac":"02:00:00:00:00:01",
            "addresses":[{"address":"fd73:6d00::2","prefix":64}]},
            "dns":{"nameservers":["100.96.0.1"]}}"#;
        let refresh: Refresh = serde_json::from_str(json).unwrap();
        assert_eq!(refresh.network.unwrap().addresses[0].gateway, None);
        assert_eq!(refresh.dns.nameservers.len(), 1);
    }

    #[test]
    fn an_unknown_request_is_an_error_not_a_default() {
        assert!(serde_json::from_str::<ControlRequest>(r#"{"fly":{}}"#).is_err());
    }
}
