//! From the kernel's hand-over to serving, and the end.
//!
//! Only what is needed to serve is done here; the rest waits for the first
//! request that needs it.

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
use crate::{control, identity, log, sys};

/// The agent's own directory in the initramfs.
const DIRECTORY: &str = "/sm";

/// Kernel modules to load, one path per line, for kernels that have the virtio
/// drivers as modules.
const MODULES: &str = "/sm/modules.list";

const CGROUPS: &str = "/sys/fs/cgroup";

/// What a person who starts the agent by hand reads.
const NOT_INIT: &[u8] =
    b"sm-guest-agent: this is the init of a guest, and not of any use elsewhere\n";

/// Runs the agent as PID 1; refuses to be anything else. Ends in power-off; a failure panics, and the kernel
/// with it, so that the host sees a reason on the console instead of a guest
/// that does nothing.
pub fn run() -> ! {
    // Everything below changes the machine, and ends in turning it off.
    if std::process::id() != 1 {
        let _ = rustix::io::write(rustix::stdio::stderr(), NOT_INIT);
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

/// Serves exec, forward and control on any listening sockets, in that order,
/// until the host asks to power off: the agent without the machine around it.
///
/// `directory` is for mount points and files of the agent, `cgroups` a cgroup2
/// directory to make the workload's group in. The calling process must have one
/// thread only, and is changed: signals are blocked, the host name may be set.
///
/// # Errors
/// What the agent cannot work without failed.
pub fn serve_on(listeners: [OwnedFd; 3], directory: &Path, cgroups: &Path) -> io::Result<()> {
    let [exec, forward, control] = listeners;
    let listeners = Listeners {
        exec,
        forward,
        control,
    };
    sys::ignore_signal(libc::SIGPIPE);
    let cgroup = Cgroup::create(cgroups, "workload")?;
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
    let cgroup = Cgroup::create(Path::new(CGROUPS), "workload")?;
    let command_line = fs::read_to_string("/proc/cmdline").unwrap_or_default();
    let facts = Facts {
        init_us,
        ready_us: uptime_us(),
        debug: command_line
            .split_whitespace()
            .any(|word| word == "sm.debug"),
    };
    let mut agent = Agent::new(listeners, PathBuf::from(DIRECTORY), cgroup, facts)?;
    // Last: the host may take a snapshot as soon as it hears of the agent, which
    // must then have everything it needs, the kernel log above all. It would
    // otherwise be opened after a restore, behind the line that tells of it.
    match control::dial() {
        Ok(socket) => agent.announce(socket),
        // It connects to us instead.
        Err(error) => log::error("tell the host", error),
    }
    if facts.debug {
        log::line(
            6,
            &format!("init at {init_us} us, ready at {} us", facts.ready_us),
        );
    }
    agent.run()?;
    agent.workload.end();
    Ok(())
}

/// Keeps what happens to the workload from happening to the agent.
fn protect_agent() {
    // Children reset this; see `exec::child`.
    let adjusted = fs::write("/proc/self/oom_score_adj", "-1000");
    log::note_failure("protect from the OOM killer", adjusted);
    sys::ignore_signal(libc::SIGPIPE);
    // Ctrl-Alt-Del is a signal to ignore, not a reset.
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

/// Makes sure that descriptors 0 to 2 are taken, so that nothing else gets
/// these numbers. Without a console the kernel starts init with none.
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

/// Limits that suit a machine of one workload, as Docker sets them.
fn set_limits() {
    // Two descriptors per forwarded connection.
    let files = Rlimit {
        current: Some(1 << 20),
        maximum: Some(1 << 20),
    };
    log::note_failure(
        "raise the limit of open files",
        setrlimit(Resource::Nofile, files),
    );
    for (name, value) in [
        // Any user may serve port 80 ...
        ("ip_unprivileged_port_start", "0"),
        // ... and ping.
        ("ping_group_range", "0 2147483647"),
        // Clients come by the loopback interface, of which none floods. With cookies, a
        // server whose backlog is full resets clients that have connected.
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
