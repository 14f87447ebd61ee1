//! Various situations of users.

use std::fs::{self, File};
use std::process::{Command, Stdio};
use std::sync::mpsc::sync_channel;

use rustix::process::{Pid, Signal, kill_process};
use rustix::pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt};
use rustix::termios::{LocalModes, tcgetattr};
use serde_json::json;
use sm_image::{Compression, Config, LayoutBuilder, MemoryFile};

use crate::fake::{User, receive, send_json, text};

/// Creates an image of one file, and returns its reference.
fn layout(user: &User) -> String {
    let layout = user.path("layout");
    let mut image = LayoutBuilder::new(&layout, Compression::Gzip(1)).unwrap();
    let file = MemoryFile::File(b"x".to_vec());
    image.memory_layer(&[("file", 0o644, file)]).unwrap();
    image.finish("latest", Config::default()).unwrap();
    format!("oci:{}", layout.display())
}

#[test]
fn an_invalid_quota_is_refused_before_a_pull() {
    let user = User::new();
    let reference = layout(&user);
    for (command, status) in [("pull", 1), ("run", 125)] {
        let done = user
            .command(&[command, &reference])
            .env("SM_IMAGE_QUOTA", "plenty")
            .output()
            .unwrap();
        assert_eq!(done.status.code(), Some(status), "{done:?}");
        let error = text(&done.stderr);
        assert!(error.contains("SM_IMAGE_QUOTA"), "{error}");
        let listed = user.sm(&["images", "-q"]);
        assert_eq!(text(&listed.stdout), "", "nothing was pulled");
    }
    let done = user
        .command(&["pull", &reference])
        .env("SM_IMAGE_QUOTA", "1g")
        .output()
        .unwrap();
    assert!(done.status.success(), "{done:?}");
}

/// The quota cannot be enforced, and the image can be used nevertheless.
#[test]
fn the_warning_about_a_quota_says_what_to_do() {
    let user = User::new();
    let reference = layout(&user);
    let snapshot = user.path("data/sm/snapshots/warm");
    fs::create_dir_all(&snapshot).unwrap();
    fs::write(snapshot.join("manifest.json"), b"{").unwrap();
    let done = user
        .command(&["pull", &reference])
        .env("SM_IMAGE_QUOTA", "1")
        .output()
        .unwrap();
    assert!(done.status.success(), "{done:?}");
    let warning = text(&done.stderr);
    assert!(warning.contains("\"warm\" cannot be read"), "{warning}");
    assert!(warning.contains("sm snapshot rm warm"), "{warning}");
}

/// JSON shows port 0 of a publication whose port in the guest is not fixed.
#[test]
fn ports_are_selected_by_the_numbers_that_are_shown() {
    let user = User::new();
    let vm = user.vm(1, "vm");
    let listener = vm.listens("control.sock");
    std::thread::spawn(move || {
        let connections = json!({
            "accepted": 0, "active": 0, "refused": 0, "evicted": 0, "unanswered": 0,
            "to_guest": 0, "from_guest": 0,
        });
        for stream in listener.incoming() {
            let mut stream = stream.unwrap();
            receive(&mut stream).unwrap();
            let published = json!([
                {"host": {"tcp": "127.0.0.1:8080"}, "guest": 80, "connections": connections},
                {"host": {"hybrid": "/any.sock"}, "guest": 0, "connections": connections},
            ]);
            let status = json!({"status": {
                "stage": "running", "paused": false, "vmm_pid": 1, "epoch": "",
                "started_ns": 1, "clients": 0, "published": published,
            }});
            send_json(&mut stream, &status);
        }
    });
    for (port, shown) in [("80", "127.0.0.1:8080"), ("0", "/any.sock")] {
        let done = user.sm(&["port", "vm", port]);
        assert!(done.status.success(), "{done:?}");
        let hosts = text(&done.stdout);
        assert!(hosts.contains(shown), "{hosts}");
        assert_eq!(hosts.lines().count(), 1, "{hosts}");
    }
    assert_eq!(user.sm(&["port", "vm", "81"]).status.code(), Some(1));
}

#[test]
fn a_command_in_a_paused_vm_is_refused_with_dockers_status() {
    let user = User::new();
    let vm = user.vm(1, "vm");
    let listener = vm.listens("control.sock");
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            let mut stream = stream.unwrap();
            receive(&mut stream).unwrap();
            let status = json!({"status": {
                "stage": "running", "paused": true, "vmm_pid": 1, "epoch": "",
                "started_ns": 1, "clients": 0, "published": [],
            }});
            send_json(&mut stream, &status);
        }
    });
    let done = user.sm(&["exec", "vm", "true"]);
    assert_eq!(done.status.code(), Some(1), "{done:?}");
    let error = text(&done.stderr);
    assert!(error.contains("\"vm\" is paused"), "{error}");
}

/// A full backlog is no sign of a VM that hangs.
#[test]
fn a_vm_whose_backlog_is_full_is_listed_when_it_has_room() {
    let user = User::new();
    // The youngest VM is queried first: when the older one is queried, the backlog of the
    // young one was full.
    let older = user.vm(1, "older");
    let young = user.vm(2, "young");
    let (asked, has_been_asked) = sync_channel::<()>(0);
    let answer = json!({"status": {
        "stage": "running", "paused": false, "vmm_pid": 1, "epoch": "",
        "started_ns": 1, "clients": 0, "published": [],
    }});
    let listener = older.listens("control.sock");
    let status = answer.clone();
    std::thread::spawn(move || {
        let (mut stream, _) = listener.accept().unwrap();
        receive(&mut stream).unwrap();
        asked.send(()).unwrap();
        send_json(&mut stream, &status);
    });
    let listener = young.listens("control.sock");
    rustix::net::listen(&listener, 0).unwrap();
    let path = young.sockets.join("control.sock");
    let waiting = std::os::unix::net::UnixStream::connect(path).unwrap();
    std::thread::spawn(move || {
        has_been_asked.recv().unwrap();
        drop(waiting);
        for stream in listener.incoming() {
            let mut stream = stream.unwrap();
            if receive(&mut stream).is_some() {
                send_json(&mut stream, &answer);
            }
        }
    });
    let done = user.sm(&["ps", "--json"]);
    let rows: serde_json::Value = serde_json::from_slice(&done.stdout).unwrap();
    let rows = rows.as_array().unwrap().iter();
    let rows: Vec<_> = rows
        .map(|row| {
            (
                row["name"].as_str().unwrap(),
                row["status"].as_str().unwrap(),
            )
        })
        .collect();
    assert_eq!(rows, [("young", "running"), ("older", "running")]);
}

/// Returns the state of a process, and the signals that it catches.
fn state(pid: u32) -> (char, u64) {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let field = |name: &str| {
        let value = status.lines().find_map(|line| line.strip_prefix(name));
        value.unwrap().trim().to_owned()
    };
    let caught = u64::from_str_radix(&field("SigCgt:"), 16).unwrap();
    (field("State:").chars().next().unwrap(), caught)
}

/// A process in the background of its terminal is stopped when it changes the terminal's
/// settings, which is here the moment before raw mode.
#[test]
fn signals_are_caught_before_the_terminal_is_raw() {
    signals_are_caught_but_for("");
}

/// The disposition that `nohup` sets, so that the command survives the terminal.
#[test]
fn a_signal_that_is_ignored_stays_so() {
    signals_are_caught_but_for("HUP");
}

fn signals_are_caught_but_for(ignored: &str) {
    let user = User::new();
    let vm = user.vm(1, "vm");
    vm.answers();
    let _exec = vm.listens("exec.sock");
    let master = File::from(openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY).unwrap());
    grantpt(&master).unwrap();
    unlockpt(&master).unwrap();
    let name = ptsname(&master, Vec::new()).unwrap();
    let slave = File::options()
        .read(true)
        .write(true)
        .open(name.to_str().unwrap())
        .unwrap();
    let side = || Stdio::from(slave.try_clone().unwrap());
    let sm = user.command(&["exec", "-it", "vm", "x"]);
    let mut shell = Command::new("setsid");
    shell
        // The test itself may have been started with ignored signals.
        .args(["--ctty", "env", "--default-signal", "bash", "-c"])
        .arg(
            match ignored {
                "" => String::new(),
                name => format!("trap '' {name}; "),
            } + "set -m; \"$0\" \"$@\" & echo $! >pid; mv pid pid-of-sm; exec sleep 1000",
        )
        .arg(sm.get_program())
        .args(sm.get_args())
        .current_dir(user.path("."));
    for (name, value) in sm.get_envs() {
        if let Some(value) = value {
            shell.env(name, value);
        }
    }
    let mut shell = shell
        .stdin(side())
        .stdout(side())
        .stderr(side())
        .spawn()
        .unwrap();
    let pid = loop {
        if let Ok(pid) = fs::read_to_string(user.path("pid-of-sm")) {
            break pid.trim().parse().unwrap();
        }
        assert!(shell.try_wait().unwrap().is_none(), "it ended before");
        std::thread::yield_now();
    };
    let caught = loop {
        match state(pid) {
            ('T', caught) => break caught,
            ('Z', _) => panic!("it ended before"),
            _ => std::thread::yield_now(),
        }
    };
    for (name, signal) in [
        ("HUP", Signal::HUP),
        ("INT", Signal::INT),
        ("TERM", Signal::TERM),
    ] {
        let is_caught = caught & 1 << (signal.as_raw() - 1) != 0;
        assert_eq!(is_caught, name != ignored, "{name} would leave it raw");
    }
    let modes = tcgetattr(&slave).unwrap().local_modes;
    assert!(modes.contains(LocalModes::ICANON), "not yet");
    let sm = Pid::from_raw(i32::try_from(pid).unwrap()).unwrap();
    kill_process(sm, Signal::KILL).unwrap();
    shell.kill().unwrap();
    shell.wait().unwrap();
}
