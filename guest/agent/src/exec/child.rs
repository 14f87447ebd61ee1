//! Code that runs in a new process between fork and exec.
//!
//! All access to the image's files, which may block, happens here and never in the agent:
//! a FIFO called `/etc/passwd` or a dead FUSE mount blocks only the command that accessed
//! it. The process is single-threaded, so ordinary code (including allocation) is
//! permitted after the fork.
//!
//! The result is written to the *status pipe* ([`super::status`]).

use std::convert::Infallible;
use std::ffi::CString;
use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{self, Read as _, Write as _};
use std::os::fd::{AsFd as _, BorrowedFd, OwnedFd};
use std::os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _, PermissionsExt as _, chown};
use std::path::Path;

use rustix::event::{PollFd, PollFlags, poll};
use rustix::fs::{Mode, fchown};
use rustix::process::{Pid, Resource, Rlimit as Limits, setrlimit};
use sm_guest_proto::exec::{ExecRequest, Role, StageFile};

use super::lookup::{DEFAULT_PATH, exec_error, find};
use super::privileges::{limit_gains, limit_own, set_parameter};
use super::status::MAX_FAILURE;
use super::stdio::ChildEnds;
use super::{Launch, LaunchError};
use crate::log;
use crate::sys;
use crate::users::{Account, resolve};

/// Maximum size of `/etc/passwd` and `/etc/group` in bytes.
const MAX_ACCOUNT_FILE: u64 = 4 << 20;

/// Soft and hard limit of open files for a command that requests none, as in systemd and
/// Docker. The agent's own limit must not be inherited.
const OPEN_FILES: (u64, u64) = (1024, 524_288);

/// Executes the command in this process.
pub(crate) fn become_command(launch: &Launch, ends: &ChildEnds, status: OwnedFd) -> ! {
    let mut status = Some(File::from(status));
    let pid = rustix::process::getpid().as_raw_nonzero().get();
    if let Some(status) = &mut status {
        let _ = status.write_all(&pid.to_le_bytes());
    }
    let Err(error) = prepare_and_exec(launch, ends, &mut status);
    report(&mut status, &error);
    sys::exit_now(error.status)
}

fn report(status: &mut Option<File>, error: &LaunchError) {
    let Some(status) = status else {
        return;
    };
    let mut bytes = vec![error.status];
    bytes.extend_from_slice(error.message.as_bytes());
    bytes.truncate(MAX_FAILURE);
    let _ = status.write_all(&bytes);
}

fn prepare_and_exec(
    launch: &Launch,
    ends: &ChildEnds,
    status: &mut Option<File>,
) -> Result<Infallible, LaunchError> {
    let request = &launch.request;
    let fail = |what: &str, error: io::Error| LaunchError::failed(format!("{what}: {error}"));
    rustix::process::setsid().map_err(|error| fail("start a session", error.into()))?;
    sys::reset_signals();
    rustix::process::umask(Mode::from_raw_mode(0o022));

    let account = account(request)?;
    attach_stdio(ends, &account).map_err(|error| fail("set up standard streams", error))?;
    for file in &request.stage_files {
        stage(file, &account)
            .map_err(|error| LaunchError::failed(format!("write {:?}: {error}", file.path)))?;
    }
    enter_directory(request, &account)?;
    let files = Limits {
        current: Some(OPEN_FILES.0),
        maximum: Some(OPEN_FILES.1),
    };
    let _ = setrlimit(Resource::Nofile, files);
    for limit in &request.rlimits {
        set_limit(limit)?;
    }
    let env = environment(request, &account);
    // The command is subject to the OOM killer. The agent, whose setting it inherited, is
    // not. This must precede the change of user.
    let _ = fs::write("/proc/self/oom_score_adj", "0");
    for sysctl in &request.sysctls {
        set_parameter(sysctl).map_err(LaunchError::failed)?;
    }
    let privileges = request.privileges.unwrap_or_default();
    let limited = |error| fail("limit the command's privileges", error);
    limit_gains(&privileges).map_err(limited)?;
    sys::set_user(account.uid, account.gid, &account.groups)
        .map_err(|error| fail("change user", error))?;
    limit_own(&privileges).map_err(limited)?;
    if request.chain.is_empty() {
        return Err(exec(&request.argv, &env));
    }
    Err(run_chain(request, &env, status))
}

/// Runs `argv` and then each command of `chain`, as their parent, while they exit with 0.
/// Signals for the command are forwarded to the current process. A terminating signal
/// also ends the chain, even if it arrives between two commands.
fn run_chain(request: &ExecRequest, env: &[String], status: &mut Option<File>) -> LaunchError {
    const FORWARDED: [libc::c_int; 8] = [
        libc::SIGHUP,
        libc::SIGINT,
        libc::SIGQUIT,
        libc::SIGTERM,
        libc::SIGUSR1,
        libc::SIGUSR2,
        libc::SIGWINCH,
        libc::SIGCHLD,
    ];
    let signals = match sys::signal_fd(&FORWARDED) {
        Ok(signals) => signals,
        Err(error) => return LaunchError::failed(format!("watch signals: {error}")),
    };
    let mut last = 0;
    for (index, argv) in std::iter::once(&request.argv)
        .chain(&request.chain)
        .enumerate()
    {
        match fork_plain() {
            Err(error) => return LaunchError::failed(format!("fork: {error}")),
            Ok(sys::Fork::Child) => {
                sys::reset_signals();
                let error = exec(argv, env);
                if index == 0 {
                    report(status, &error);
                } else {
                    log::to_stderr(&format!("sm: {}\n", error.message));
                }
                sys::exit_now(error.status);
            }
            Ok(sys::Fork::Parent(pid)) => {
                if index == 0 {
                    // Closing this copy leaves the decision to the first command: its
                    // exec closes the status pipe.
                    *status = None;
                }
                last = wait_forwarding(signals.as_fd(), pid);
            }
        }
        if last != 0 {
            break;
        }
    }
    sys::exit_now(u8::try_from(last).unwrap_or(255))
}

#[expect(
    unsafe_code,
    reason = "fork needs the caller's word that there is one thread"
)]
fn fork_plain() -> io::Result<sys::Fork> {
    // SAFETY: this process was forked from the single-threaded agent and has started no
    // thread.
    unsafe { sys::fork(0, None) }
}

/// Waits for `child` and forwards signals to it. Returns its status, or 128+n if it
/// exited with 0 after a terminating signal n.
fn wait_forwarding(signals: BorrowedFd<'_>, child: Pid) -> u32 {
    const ENDING: [libc::c_int; 4] = [libc::SIGHUP, libc::SIGINT, libc::SIGQUIT, libc::SIGTERM];
    let mut asked_to_end = 0;
    loop {
        let mut watched = [PollFd::from_borrowed_fd(signals, PollFlags::IN)];
        let _ = poll(&mut watched, None);
        while let Some(signal) = sys::next_signal(signals) {
            if signal != libc::SIGCHLD {
                let _ = sys::kill(child, u8::try_from(signal).unwrap_or(0));
            }
            if ENDING.contains(&signal) {
                asked_to_end = 128 + signal.unsigned_abs();
            }
        }
        while let Ok(Some(reaped)) = sys::reap() {
            if reaped.pid == child {
                return match reaped.status {
                    0 => asked_to_end,
                    status => status,
                };
            }
        }
    }
}

fn exec(argv: &[String], env: &[String]) -> LaunchError {
    let Some(program) = argv.first() else {
        return LaunchError::failed("the request names no command");
    };
    let path = variable(env, "PATH").unwrap_or(DEFAULT_PATH);
    let file = match find(program, path) {
        Ok(file) => file,
        Err(error) => return error,
    };
    let strings = |list: &[String]| -> Result<Vec<CString>, LaunchError> {
        list.iter()
            .map(|item| CString::new(item.as_str()))
            .collect::<Result<_, _>>()
            .map_err(|_| LaunchError::failed("a NUL byte in an argument or variable"))
    };
    let prepared = strings(argv).and_then(|argv| {
        let path = strings(std::slice::from_ref(&file))?;
        Ok((argv, strings(env)?, path))
    });
    match prepared {
        Ok((argv, env, path)) => exec_error(&file, &sys::exec(&path[0], &argv, &env)),
        Err(error) => error,
    }
}

fn account(request: &ExecRequest) -> Result<Account, LaunchError> {
    let passwd = read_account_file("/etc/passwd");
    let group = read_account_file("/etc/group");
    resolve(&request.user, &request.groups, &passwd, &group)
        .map_err(|error| LaunchError::failed(error.to_string()))
}

/// Reads a regular file up to a limit. Any other file counts as empty.
fn read_account_file(path: &str) -> Vec<u8> {
    let mut bytes = Vec::new();
    // O_NONBLOCK: opening a FIFO must not wait for a writer.
    let file = OpenOptions::new()
        .read(true)
        .custom_flags(libc::O_NONBLOCK)
        .open(path);
    if let Ok(file) = file
        && file.metadata().is_ok_and(|metadata| metadata.is_file())
        && file.take(MAX_ACCOUNT_FILE).read_to_end(&mut bytes).is_err()
    {
        bytes.clear();
    }
    bytes
}

fn attach_stdio(ends: &ChildEnds, account: &Account) -> io::Result<()> {
    let owner = Some(rustix::fs::Uid::from_raw(account.uid));
    match ends {
        ChildEnds::Pipes(fds) => {
            for (fd, number) in fds.iter().zip(0..) {
                sys::dup_to(fd.as_fd(), number)?;
                // The user can then reopen /dev/stdout. /dev/null keeps its owner.
                if rustix::fs::fstat(fd)?.st_mode & libc::S_IFMT == libc::S_IFIFO {
                    fchown(fd, owner, None)?;
                }
            }
        }
        ChildEnds::Terminal(path) => {
            let slave: OwnedFd = OpenOptions::new()
                .read(true)
                .write(true)
                .custom_flags(libc::O_NOCTTY)
                .open(path)?
                .into();
            rustix::process::ioctl_tiocsctty(&slave)?;
            fchown(&slave, owner, None)?;
            for number in 0..3 {
                sys::dup_to(slave.as_fd(), number)?;
            }
        }
    }
    Ok(())
}

fn stage(file: &StageFile, account: &Account) -> io::Result<()> {
    let path = Path::new(&file.path);
    if !path.is_absolute() {
        return Err(io::Error::new(
            io::ErrorKind::InvalidInput,
            "path is not absolute",
        ));
    }
    if let Some(parent) = path.parent() {
        DirBuilder::new()
            .recursive(true)
            .mode(0o755)
            .create(parent)?;
    }
    let mode = file.mode & 0o7777;
    // The old file is replaced, so that no existing link is followed.
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    let mut target = OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(mode & 0o777)
        .open(path)?;
    target.write_all(&file.data)?;
    chown(path, Some(account.uid), Some(account.gid))?;
    target.set_permissions(fs::Permissions::from_mode(mode))
}

fn enter_directory(request: &ExecRequest, account: &Account) -> Result<(), LaunchError> {
    let cwd = if request.cwd.is_empty() {
        "/"
    } else {
        &request.cwd
    };
    if !cwd.starts_with('/') {
        return Err(LaunchError::failed(format!(
            "working directory {cwd:?} is not absolute"
        )));
    }
    if request.role == Role::Main && !Path::new(cwd).exists() {
        let created = DirBuilder::new().recursive(true).mode(0o755).create(cwd);
        if created.is_ok() {
            let _ = chown(cwd, Some(account.uid), Some(account.gid));
        }
    }
    std::env::set_current_dir(cwd).map_err(|error| {
        let text = format!("chdir to cwd ({cwd:?}) failed: {error}");
        match error.kind() {
            io::ErrorKind::NotFound => LaunchError::absent(text),
            _ => LaunchError::denied(text),
        }
    })
}

fn variable<'a>(env: &'a [String], name: &str) -> Option<&'a str> {
    env.iter().rev().find_map(|entry| {
        let (key, value) = entry.split_once('=')?;
        (key == name).then_some(value)
    })
}

fn environment(request: &ExecRequest, account: &Account) -> Vec<String> {
    let mut env = request.env.clone();
    let mut default = |name: &str, value: &str| {
        if variable(&env, name).is_none_or(str::is_empty) {
            env.retain(|entry| !entry.starts_with(&format!("{name}=")));
            env.push(format!("{name}={value}"));
        }
    };
    default("PATH", DEFAULT_PATH);
    default("HOME", &account.home);
    if request.tty {
        default("TERM", "xterm");
    }
    env
}

fn resource(name: &str) -> Option<Resource> {
    Some(match name {
        "as" => Resource::As,
        "core" => Resource::Core,
        "cpu" => Resource::Cpu,
        "data" => Resource::Data,
        "fsize" => Resource::Fsize,
        "locks" => Resource::Locks,
        "memlock" => Resource::Memlock,
        "msgqueue" => Resource::Msgqueue,
        "nice" => Resource::Nice,
        "nofile" => Resource::Nofile,
        "nproc" => Resource::Nproc,
        "rss" => Resource::Rss,
        "rtprio" => Resource::Rtprio,
        "rttime" => Resource::Rttime,
        "sigpending" => Resource::Sigpending,
        "stack" => Resource::Stack,
        _ => return None,
    })
}

fn set_limit(limit: &sm_guest_proto::exec::Rlimit) -> Result<(), LaunchError> {
    let resource = resource(&limit.name)
        .ok_or_else(|| LaunchError::failed(format!("unknown resource limit {:?}", limit.name)))?;
    let bound = |value: u64| (value != u64::MAX).then_some(value);
    let limits = Limits {
        current: bound(limit.soft),
        maximum: bound(limit.hard),
    };
    setrlimit(resource, limits).map_err(|error| {
        LaunchError::failed(format!("set resource limit {:?}: {error}", limit.name))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn account() -> Account {
        Account {
            uid: 0,
            gid: 0,
            groups: Vec::new(),
            home: "/root".into(),
        }
    }

    #[test]
    fn only_missing_variables_are_added() {
        let mut request = ExecRequest {
            env: vec!["PATH=/mine".into(), "A=1".into()],
            ..ExecRequest::default()
        };
        assert_eq!(
            environment(&request, &account()),
            ["PATH=/mine", "A=1", "HOME=/root"]
        );
        request.env = vec!["HOME=".into()];
        request.tty = true;
        let env = environment(&request, &account());
        assert_eq!(
            env,
            [
                format!("PATH={DEFAULT_PATH}"),
                "HOME=/root".into(),
                "TERM=xterm".into()
            ]
        );
    }

    #[test]
    fn the_last_of_equal_variables_counts() {
        let env = ["A=1".to_owned(), "A=2".to_owned(), "B".to_owned()];
        assert_eq!(variable(&env, "A"), Some("2"));
        assert_eq!(variable(&env, "B"), None);
    }

    #[test]
    fn a_fifo_as_account_file_is_empty_not_a_hang() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("passwd");
        rustix::fs::mknodat(
            rustix::fs::CWD,
            &path,
            rustix::fs::FileType::Fifo,
            Mode::from_raw_mode(0o644),
            0,
        )
        .unwrap();
        assert!(read_account_file(path.to_str().unwrap()).is_empty());
    }

    #[test]
    fn staged_files_replace_links_instead_of_following_them() {
        let directory = tempfile::tempdir().unwrap();
        let victim = directory.path().join("victim");
        fs::write(&victim, "old").unwrap();
        let link = directory.path().join("deep/link");
        fs::create_dir(directory.path().join("deep")).unwrap();
        std::os::unix::fs::symlink(&victim, &link).unwrap();
        let metadata = fs::metadata(&victim).unwrap();
        let owner = Account {
            uid: std::os::unix::fs::MetadataExt::uid(&metadata),
            gid: std::os::unix::fs::MetadataExt::gid(&metadata),
            ..account()
        };
        let file = StageFile {
            path: link.to_str().unwrap().into(),
            mode: 0o750,
            data: b"new".to_vec(),
        };
        stage(&file, &owner).unwrap();
        assert_eq!(fs::read(&victim).unwrap(), b"old");
        assert_eq!(fs::read(&link).unwrap(), b"new");
        assert_eq!(
            fs::metadata(&link).unwrap().permissions().mode() & 0o7777,
            0o750
        );
    }
}
