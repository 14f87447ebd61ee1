//! Control: the host asks, the agent answers, one CONTROL frame each, in order.
//!
//! Served on connections accepted on guest port [`crate::port::CONTROL`] and on
//! the one stream that the agent dials to the host after a cold boot. The
//! first request on a connection must be [`ControlRequest::Hello`]. Requests
//! may be sent ahead; they are answered one after the other.
//!
//! A cold start is HELLO, REFRESH, ATTACH ROOT. A snapshot is FREEZE, PREPARE
//! SNAPSHOT, and the capture; every connection is reset by the restore, after
//! which the host connects anew: HELLO, REFRESH (with
//! [`Refresh::vmgenid_wait_ms`]), and only when that was answered as wished, THAW.

use serde::{Deserialize, Serialize};

use crate::exec::{Hello, base64_bytes};

/// What the host asks for.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ControlRequest {
    /// Agree on a version. Answered by [`ControlReply::Hello`].
    Hello(Hello),
    /// Give this guest an identity of its own. Sent after every start, before
    /// any workload code runs; everything the workload could observe as shared
    /// with another clone is fresh when the reply arrives.
    Refresh(Refresh),
    /// Mount the root file system and prepare it for workloads.
    AttachRoot(AttachRoot),
    /// Stop scheduling workload processes (cgroup v2 freezer).
    Freeze,
    /// Let frozen workload processes run again.
    Thaw,
    /// Write back dirty data and drop what need not be in a snapshot.
    PrepareSnapshot,
    /// Send `signal` to the workload's main process.
    SignalMain {
        /// Signal number, 1..=64.
        signal: u8,
        /// The signal is to end the workload, so what ends it stands for it: systemd
        /// re-executes itself on SIGTERM, and ends the system on SIGRTMIN+3.
        #[serde(default)]
        stop: bool,
    },
    /// End all processes (SIGTERM, after `grace_ms` SIGKILL), unmount, power off.
    PowerOff {
        /// Milliseconds between SIGTERM and SIGKILL.
        grace_ms: u64,
    },
    /// Report usage figures.
    Stats,
    /// Report what tells this guest from every other; answered by
    /// [`ControlReply::Evidence`].
    Evidence,
}

/// Fresh identity for a guest.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Refresh {
    /// Restore epoch: a UUID in text form, new at every start and reset. The workload
    /// finds it in `/run/sm-epoch`, and by a change of that file that it was cloned.
    pub epoch: String,
    /// Host entropy, 32 to 512 bytes, mixed into the kernel's CRNG and credited.
    #[serde(with = "base64_bytes")]
    pub entropy: Vec<u8>,
    /// Wall-clock time in nanoseconds since the Unix epoch, at sending.
    pub realtime_ns: u64,
    /// Host name to set.
    pub hostname: String,
    /// 32 lower-case hexadecimal digits for `/etc/machine-id`.
    pub machine_id: String,
    /// UUID in text form shown as `/proc/sys/kernel/random/boot_id`.
    pub boot_id: String,
    /// MAC address for the network interface, when there is one.
    pub mac: Option<String>,
    /// How long the answer may wait for the kernel to notice a new VM
    /// generation ID, in milliseconds. Set after a restore; 0 does not wait.
    pub vmgenid_wait_ms: u32,
}

/// How to assemble the root file system.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct AttachRoot {
    /// Block device of the read-only EROFS lower layer, such as `/dev/vda`.
    pub lower: String,
    /// Where changes go.
    pub upper: Upper,
    /// Host name, also written to `/etc/hosts`.
    pub hostname: String,
    /// Further lines for `/etc/hosts`: address, then names.
    pub extra_hosts: Vec<(String, String)>,
    /// Name servers for `/etc/resolv.conf`; when empty, the image's file stays, or is
    /// made where it has none.
    pub nameservers: Vec<String>,
    /// Size of `/dev/shm` in bytes; 64 MiB when 0.
    pub shm_size: u64,
    /// Mount the root read-only (no upper at all).
    pub read_only: bool,
}

/// Where changes to the root file system go.
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

/// The agent's answer.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ControlReply {
    /// Answer to HELLO.
    Hello(AgentHello),
    /// Done; nothing to add.
    Done,
    /// Answer to a refresh.
    Refreshed(Refreshed),
    /// Answer to [`ControlRequest::Stats`].
    Stats(GuestStats),
    /// Answer to [`ControlRequest::Evidence`].
    Evidence(Evidence),
    /// It failed; a sentence naming operation, object and cause.
    Error {
        /// The sentence.
        message: String,
    },
}

/// Who answers.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct AgentHello {
    /// The agent's [`crate::PROTOCOL_VERSION`].
    pub protocol: u32,
    /// The agent's crate version.
    pub version: String,
    /// Kernel release, as `uname -r` prints it.
    pub kernel: String,
    /// Guest uptime (CLOCK_BOOTTIME) in microseconds when the agent's `main` began.
    pub init_us: u64,
    /// Guest uptime in microseconds when the agent was ready to serve.
    pub ready_us: u64,
    /// Number of online vCPUs.
    pub cpus: u32,
    /// Usable memory in KiB (MemTotal).
    pub memory_kib: u64,
}

/// What a refresh did, as evidence.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Refreshed {
    /// Guest wall clock in nanoseconds since the Unix epoch after stepping.
    pub realtime_ns: u64,
    /// Whether the kernel has seen a new VM generation ID since the last refresh.
    pub vmgenid_seen: bool,
}

/// What tells a guest from every other, as its own processes would find it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Evidence {
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
    /// The wall clock, in nanoseconds since the Unix epoch.
    pub realtime_ns: u64,
}

/// Usage figures of a guest.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct GuestStats {
    /// Usable memory in KiB.
    pub memory_total_kib: u64,
    /// Available memory in KiB.
    pub memory_available_kib: u64,
    /// Number of workload processes.
    pub processes: u32,
    /// CPU time used by workload processes, in microseconds.
    pub cpu_us: u64,
    /// Workload processes that the guest's kernel killed for want of memory, since
    /// this VM was started or restored.
    pub oom_kills: u64,
    /// Those of them that were not a command run next to the main one.
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
        // As hosts sent it before there was `stop`.
        let request = serde_json::from_str(r#"{"signal_main":{"signal":15}}"#).unwrap();
        assert_eq!(
            ControlRequest::SignalMain {
                signal: 15,
                stop: false
            },
            request
        );
    }

    #[test]
    fn an_unknown_request_is_an_error_not_a_default() {
        assert!(serde_json::from_str::<ControlRequest>(r#"{"fly":{}}"#).is_err());
    }
}
