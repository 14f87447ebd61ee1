//! Start of the agent after the kernel has executed it, and power-off.
//!
//! Only steps that serving requires are done here; others are deferred to the first
//! request that needs them.

use std::fs::{self, File};
use std::io;
use std::os::fd::{AsFd as _, OwnedFd};
use std::path::{Path, PathBuf};

use rustix::mount::{MountFlags, mount};
use rustix::process::{Resource, Rlimit, setrlimit};
use rustix::system::{RebootCommand, finit_module, reboot};
use sm_guest_proto::port;

use crate::agent::{Agent, Listeners};
use crate::cgroup::Cgroup;
use crate::facts::{Facts, uptime_us};
use crate::network::NetDevice;
use crate::{control, identity, log, sys};

/// The agent's own directory in the initramfs.
const DIRECTORY: &str = "/sm";

/// List of kernel modules to load, one path per line, for kernels with the virtio drivers
/// as modules.
const MODULES: &str = "/sm/modules.list";

const CGROUPS: &str = "/sys/fs/cgroup";

/// The cgroup of all containers.
const CONTAINERS: &str = "containers";

/// Message for users who run the agent by hand.
const NOT_INIT: &str = "sm-guest-agent: this is the init of a guest, and cannot run elsewhere\n";

/// Runs the agent as PID 1, and exits if the process is not PID 1. It never returns and
/// ends in power-off. A failure panics, and the kernel with it, so that the reason is on
/// the host's console and the guest does not hang.
pub fn run() -> ! {
    // The following steps change the machine, and finally power it off.
    if std::process::id() != 1 {
        log::to_stderr(NOT_INIT);
        std::process::exit(1);
    }
    let init_us = uptime_us();
    std::panic::set_hook(Box::new(|info| {
        log::line(0, &format!("agent panic: {info}"))
    }));
    match serve(init_us) {
        Ok(()) => {}
        Err(error) => log::line(0, &format!("agent failed: {error}")),
    }
    rustix::fs::sync();
    let failed = reboot(RebootCommand::PowerOff);
    panic!("power off: {failed:?}");
}

/// Serves exec, forward and control on any listening sockets, in that order, until the
/// host requests power-off. This runs the agent without a machine.
///
/// `directory` is for mount points and files of the agent; the group of containers is
/// created in the cgroup2 directory `cgroups`. The calling process must be
/// single-threaded. Its state changes: signals are blocked, the host name may be set.
///
/// # Errors
/// The agent cannot start, or its event loop fails.
pub fn serve_on(listeners: [OwnedFd; 3], directory: &Path, cgroups: &Path) -> io::Result<()> {
    let [exec, forward, control] = listeners;
    let listeners = Listeners {
        exec,
        forward,
        control,
    };
    sys::ignore_signal(libc::SIGPIPE);
    let cgroup = Cgroup::create(cgroups, CONTAINERS)?;
    let mut agent = Agent::new(listeners, directory.into(), cgroup, Facts::default())?;
    agent.run()
}

fn serve(init_us: u64) -> io::Result<()> {
    mount_early()?;
    standard_streams()?;
    load_modules(Path::new(MODULES));
    let listeners = Listeners {
        exec: listen(port::EXEC)?,
        forward: listen(port::FORWARD)?,
        control: listen(port::CONTROL)?,
    };
    protect_agent();
    set_limits();
    log::note_failure("bring lo up", identity::loopback_up());
    fs::create_dir_all(DIRECTORY)?;
    let cgroup = Cgroup::create(Path::new(CGROUPS), CONTAINERS)?;
    let command_line = fs::read_to_string("/proc/cmdline").unwrap_or_default();
    let facts = Facts {
        init_us,
        ready_us: uptime_us(),
        debug: command_line
            .split_whitespace()
            .any(|word| word == "sm.debug"),
    };
    let mut agent = Agent::new(listeners, PathBuf::from(DIRECTORY), cgroup, facts)?;
    match NetDevice::find() {
        Ok(device) => agent.identity.set_network_device(device),
        Err(error) => log::error("find the network device", error),
    }
    // Last: the host may take a snapshot as soon as the agent connects, so the agent must
    // be complete before. In particular the kernel log must be open: opened after a
    // restore, it would start behind the line about the generation ID.
    match control::dial() {
        Ok(socket) => agent.announce(socket),
        // The host connects to the agent instead.
        Err(error) => log::error("tell the host", error),
    }
    if facts.debug {
        log::line(
            6,
            &format!("init at {init_us} us, ready at {} us", facts.ready_us),
        );
    }
    agent.run()?;
    for container in agent.containers.iter_mut() {
        container.workload.end();
    }
    Ok(())
}

/// Protects the agent from effects of the workload.
fn protect_agent() {
    // Children reset this; see `exec::child`.
    let adjusted = fs::write("/proc/self/oom_score_adj", "-1000");
    log::note_failure("protect from the OOM killer", adjusted);
    sys::ignore_signal(libc::SIGPIPE);
    // Turns Ctrl-Alt-Del into a signal, which is ignored, instead of a reset.
    let _ = reboot(RebootCommand::CadOff);
}

fn mount_early() -> io::Result<()> {
    let safe = MountFlags::NOSUID | MountFlags::NOEXEC | MountFlags::NODEV;
    for (target, kind, flags, options) in [
        ("/proc", "proc", safe, c""),
        ("/sys", "sysfs", safe, c""),
        ("/dev", "devtmpfs", MountFlags::NOSUID, c""),
        // The workload must not thaw its own group or lift its limits.
        (CGROUPS, "cgroup2", safe, c"nsdelegate"),
    ] {
        fs::create_dir_all(target)?;
        match mount(kind, target, kind, flags, Some(options)) {
            Ok(()) | Err(rustix::io::Errno::BUSY) => {}
            Err(error) => {
                return Err(io::Error::other(format!(
                    "mount {kind} on {target}: {error}"
                )));
            }
        }
    }
    Ok(())
}

/// Ensures that descriptors 0 to 2 are in use, so that nothing else is opened with these
/// numbers. Without a console the kernel starts init with none.
fn standard_streams() -> io::Result<()> {
    loop {
        let null: OwnedFd = File::options()
            .read(true)
            .write(true)
            .open("/dev/null")?
            .into();
        if std::os::fd::AsRawFd::as_raw_fd(&null) > 2 {
            return Ok(());
        }
        std::mem::forget(null);
    }
}

/// Sets the limits that Docker sets in a container.
fn set_limits() {
    // Each forwarded connection needs two descriptors.
    let files = Rlimit {
        current: Some(1 << 20),
        maximum: Some(1 << 20),
    };
    log::note_failure(
        "raise the limit of open files",
        setrlimit(Resource::Nofile, files),
    );
    for (name, value) in [
        // Any user may bind port 80 ...
        ("ip_unprivileged_port_start", "0"),
        // ... and use ping sockets.
        ("ping_group_range", "0 2147483647"),
        // Clients connect through the loopback interface, where SYN floods do not occur.
        // With SYN cookies, a server with a full backlog would reset established clients.
        ("tcp_syncookies", "0"),
    ] {
        log::note_failure(name, fs::write(format!("/proc/sys/net/ipv4/{name}"), value));
    }
}

fn load_modules(list: &Path) {
    let Ok(list) = fs::read_to_string(list) else {
        return;
    };
    /// `MODULE_INIT_COMPRESSED_FILE`.
    const COMPRESSED: i32 = 4;
    for path in list.lines().map(str::trim).filter(|line| !line.is_empty()) {
        let plain = Path::new(path)
            .extension()
            .is_some_and(|extension| extension == "ko");
        let flags = if plain { 0 } else { COMPRESSED };
        let loaded = File::open(path).and_then(|file| Ok(finit_module(&file, c"", flags)?));
        match loaded {
            Err(error) if error.kind() != io::ErrorKind::AlreadyExists => {
                log::error(&format!("load {path}"), error);
            }
            _ => {}
        }
    }
}

fn listen(port: u32) -> io::Result<OwnedFd> {
    let socket = sys::vsock_socket()?;
    sys::vsock_listen(socket.as_fd(), port)
        .map_err(|error| io::Error::other(format!("listen on vsock port {port}: {error}")))?;
    Ok(socket)
}
