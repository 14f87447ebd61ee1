//! Sessions whose command does not read its input.

use std::fs::{self, File};
use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::os::unix::net::UnixStream;
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{Receiver, channel};

use rustix::process::{Pid, Signal, kill_process};
use rustix::pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt};
use rustix::termios::{Winsize, tcsetwinsize};
use serde_json::{Value, json};
use sm_guest_proto::frame::{ExitStatus, FrameType};

use crate::fake::{User, receive, send, send_json};

const PID: u32 = 77;

/// `yes | sm exec -i vm x`, with a command that reads nothing.
struct Stuck {
    _user: User,
    yes: Child,
    sm: Child,
    session: UnixStream,
    /// Signals that the agent receives on other connections.
    signals: Receiver<u64>,
}

impl Stuck {
    fn new() -> Self {
        Self::with_agent(0)
    }

    /// With an agent that ends requests for a signal with `status`; 125 is that of an
    /// agent that does not have the request.
    fn with_agent(status: u32) -> Self {
        let user = User::new();
        let vm = user.vm(1, "vm");
        vm.answers();
        let exec = vm.listens("exec.sock");
        let mut yes = Command::new("yes").stdout(Stdio::piped()).spawn().unwrap();
        let mut sm = user
            .foreground(&["exec", "-i", "vm", "x"])
            .stdin(yes.stdout.take().unwrap())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let (mut session, _) = exec.accept().unwrap();
        let hello = receive(&mut session).unwrap();
        assert_eq!(hello.0, FrameType::Control);
        assert_eq!(receive(&mut session).unwrap().0, FrameType::Request);
        send_json(&mut session, &json!({"started": {"pid": PID}}));
        send(&mut session, FrameType::Stdout, b"ready\n");
        let mut line = String::new();
        let mut out = BufReader::new(sm.stdout.take().unwrap());
        out.read_line(&mut line).unwrap();
        assert_eq!(line, "ready\n");
        sm.stdout = Some(out.into_inner());
        // Waits until its input is blocked: `yes` has filled the pipe, and `sm` sleeps in
        // a write.
        let stdin = format!("/proc/{}/task", sm.id());
        let blocked = || {
            std::fs::read_dir(&stdin).unwrap().flatten().any(|task| {
                let comm = std::fs::read_to_string(task.path().join("comm"));
                let call = std::fs::read_to_string(task.path().join("syscall"));
                // The system calls write(2) or sendto(2) of x86-64.
                comm.is_ok_and(|comm| comm == "stdin\n")
                    && call.is_ok_and(|call| call.starts_with("1 ") || call.starts_with("44 "))
            })
        };
        while !blocked() {
            std::thread::yield_now();
        }
        let (sender, signals) = channel();
        std::thread::spawn(move || {
            // Plays the agent's handling of signals. The VM ends with the thread.
            let _vm = vm;
            for stream in exec.incoming() {
                let mut stream = stream.unwrap();
                receive(&mut stream).unwrap();
                let (_, payload) = receive(&mut stream).unwrap();
                let message: Value = serde_json::from_slice(&payload).unwrap();
                assert_eq!(message["signal"]["pid"], PID);
                let exit = ExitStatus {
                    status,
                    peak_rss_kib: None,
                };
                send(&mut stream, FrameType::Exit, &exit.to_payload());
                let _ = sender.send(message["signal"]["signal"].as_u64().unwrap());
            }
        });
        Self {
            _user: user,
            yes,
            sm,
            session,
            signals,
        }
    }

    fn kill(&self, signal: Signal) {
        let pid = Pid::from_raw(i32::try_from(self.sm.id()).unwrap()).unwrap();
        kill_process(pid, signal).unwrap();
    }
}

impl Drop for Stuck {
    fn drop(&mut self) {
        for child in [&mut self.yes, &mut self.sm] {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

#[test]
fn a_signal_reaches_a_command_that_does_not_read() {
    let mut stuck = Stuck::new();
    stuck.kill(Signal::TERM);
    assert_eq!(stuck.signals.recv().unwrap(), 15);
    // The command exits by the signal.
    let exit = ExitStatus {
        status: 143,
        peak_rss_kib: None,
    };
    send(&mut stuck.session, FrameType::Exit, &exit.to_payload());
    stuck.session.shutdown(std::net::Shutdown::Both).unwrap();
    assert_eq!(stuck.sm.wait().unwrap().code(), Some(143));
}

#[test]
fn three_interrupts_end_it_whatever_the_command_does() {
    let mut stuck = Stuck::new();
    for _ in 0..2 {
        stuck.kill(Signal::INT);
        assert_eq!(stuck.signals.recv().unwrap(), 2);
    }
    stuck.kill(Signal::INT);
    assert_eq!(stuck.sm.wait().unwrap().code(), Some(130));
}

#[test]
fn a_command_without_a_reader_of_its_output_is_ended() {
    let mut stuck = Stuck::new();
    drop(stuck.sm.stdout.take());
    send(&mut stuck.session, FrameType::Stdout, b"more\n");
    assert_eq!(stuck.signals.recv().unwrap(), 13);
    // `sm` disconnects: earlier bytes are all there is.
    let mut rest = Vec::new();
    stuck.session.read_to_end(&mut rest).unwrap();
    assert_eq!(stuck.sm.wait().unwrap().code(), Some(137));
}

/// The agent of a VM that was restored from an older snapshot.
#[test]
fn it_ends_although_the_agent_knows_no_signal_beside() {
    let mut stuck = Stuck::with_agent(125);
    drop(stuck.sm.stdout.take());
    send(&mut stuck.session, FrameType::Stdout, b"more\n");
    assert_eq!(stuck.signals.recv().unwrap(), 13);
    // Nobody reads what is in its way.
    assert_eq!(stuck.sm.wait().unwrap().code(), Some(137));
}

/// Returns true if a thread of the process sleeps in write(2) or sendto(2) of x86-64.
fn is_blocked(pid: u32, thread: &str) -> bool {
    let tasks = fs::read_dir(format!("/proc/{pid}/task")).unwrap().flatten();
    tasks.map(|task| task.path()).any(|task| {
        let read = |file: &str| fs::read_to_string(task.join(file)).unwrap_or_default();
        let call = read("syscall");
        read("comm").trim_end() == thread
            && (call.starts_with("1 ") || call.starts_with("44 "))
            && read("status").contains("State:\tS")
    })
}

/// The terminal's size waits behind sizes that the command has not read. The thread that
/// sends it holds the lock of the session, and nothing else does.
#[test]
fn detach_keys_end_it_while_a_size_waits() {
    let user = User::new();
    let vm = user.vm(1, "vm");
    vm.answers();
    let exec = vm.listens("exec.sock");
    let mut master = File::from(openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY).unwrap());
    grantpt(&master).unwrap();
    unlockpt(&master).unwrap();
    let size = Winsize {
        ws_row: 24,
        ws_col: 80,
        ws_xpixel: 0,
        ws_ypixel: 0,
    };
    tcsetwinsize(&master, size).unwrap();
    let name = ptsname(&master, Vec::new()).unwrap();
    let slave = || {
        let path = name.to_str().unwrap();
        let slave = File::options().read(true).write(true).open(path);
        Stdio::from(slave.unwrap())
    };
    let mut sm = user
        .foreground(&["exec", "-it", "vm", "x"])
        .stdin(slave())
        .stdout(slave())
        .spawn()
        .unwrap();
    let (mut session, _) = exec.accept().unwrap();
    receive(&mut session).unwrap();
    assert_eq!(receive(&mut session).unwrap().0, FrameType::Request);
    send_json(&mut session, &json!({"started": {"pid": PID}}));
    send(&mut session, FrameType::Stdout, b"!");
    // The terminal is raw, and its size is watched, before output is shown.
    let mut shown = [0];
    master.read_exact(&mut shown).unwrap();
    assert_eq!(shown, *b"!");
    let pid = Pid::from_raw(i32::try_from(sm.id()).unwrap()).unwrap();
    while !is_blocked(sm.id(), "sizes") {
        kill_process(pid, Signal::WINCH).unwrap();
        std::thread::yield_now();
    }
    assert!(!is_blocked(sm.id(), "stdin"));
    master.write_all(b"\x10\x11").unwrap();
    assert_eq!(sm.wait().unwrap().code(), Some(0));
    // All that has arrived are sizes, none of them in part.
    while let Some((kind, payload)) = receive(&mut session) {
        assert_eq!((kind, payload.len()), (FrameType::Resize, 4));
    }
}
