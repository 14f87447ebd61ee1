//! Tests of operations on files.

use std::collections::BTreeMap;
use std::io::Read as _;

use sm_guest_proto::container::ContainerId;
use sm_guest_proto::control::ControlReply;
use sm_guest_proto::exec::{ExecControl, Role};
use sm_guest_proto::files::{
    ChangeKind, FileChange, FileOperation, FileRequest, FileStat, FileType, PathBytes, WriteFile,
};
use sm_guest_proto::frame::FrameType;
use sm_tar::{TarHeader, TarKind, TarReader, TarWriter};

use crate::client::{Connection, Output, run, shell, start, stats_request};
use crate::{Agent, Test};

pub(crate) const TESTS: &[Test] = &[
    ("files_are_read_and_written", files_are_read_and_written),
    (
        "no_path_leads_out_of_the_root",
        no_path_leads_out_of_the_root,
    ),
    (
        "files_of_other_types_do_not_block",
        files_of_other_types_do_not_block,
    ),
    (
        "directories_are_packed_and_unpacked",
        directories_are_packed_and_unpacked,
    ),
    (
        "changes_and_layers_are_those_of_the_root",
        changes_and_layers_are_those_of_the_root,
    ),
    (
        "a_layer_of_renamed_directories",
        a_layer_of_renamed_directories,
    ),
    ("a_paused_container_continues", a_paused_container_continues),
    (
        "a_container_stays_paused_for_another_operation",
        a_container_stays_paused_for_another_operation,
    ),
    (
        "operations_need_a_root_and_end_with_it",
        operations_need_a_root_and_end_with_it,
    ),
];

fn begin(agent: &Agent, operation: FileOperation) -> Connection {
    let mut connection = Connection::open(agent.path(), "exec");
    connection.hello();
    let request = ExecControl::Files(FileRequest {
        container: ContainerId::default(),
        operation,
    });
    connection.send(FrameType::Control, &serde_json::to_vec(&request).unwrap());
    connection
}

fn perform(agent: &Agent, operation: FileOperation, input: Option<&[u8]>) -> Output {
    let mut connection = begin(agent, operation);
    if let Some(input) = input {
        for piece in input.chunks(60_000) {
            connection.send(FrameType::Stdin, piece);
        }
        connection.send(FrameType::Stdin, &[]);
    }
    connection.collect()
}

#[track_caller]
fn done(output: Output) -> Vec<u8> {
    let message = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status, Some(0), "{message} {:?}", output.error);
    output.stdout
}

#[track_caller]
fn refused(output: &Output, errno: i32) -> String {
    let message = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status, Some(errno.unsigned_abs()), "{message}");
    assert!(!message.is_empty());
    message
}

fn path(text: &str) -> PathBytes {
    PathBytes::from(text.as_bytes())
}

fn stat_of(text: &str, follow: bool) -> FileOperation {
    let path = path(text);
    FileOperation::Stat { path, follow }
}

fn stat(agent: &Agent, text: &str, follow: bool) -> FileStat {
    serde_json::from_slice(&done(perform(agent, stat_of(text, follow), None))).unwrap()
}

fn read_of(text: &str) -> FileOperation {
    FileOperation::Read {
        path: path(text),
        offset: 0,
        len: None,
    }
}

fn write_of(text: &str) -> WriteFile {
    WriteFile {
        path: path(text),
        mode: 0o640,
        create_new: false,
        append: false,
    }
}

fn entries(archive: &[u8]) -> Vec<(TarHeader, Vec<u8>)> {
    let mut reader = TarReader::new(archive);
    let mut entries = Vec::new();
    while let Some(header) = reader.next_entry().unwrap() {
        let mut data = Vec::new();
        reader.read_to_end(&mut data).unwrap();
        entries.push((header, data));
    }
    entries
}

fn names(archive: &[u8]) -> Vec<String> {
    let entries = entries(archive).into_iter();
    let names = entries.map(|(header, _)| String::from_utf8(header.path).unwrap());
    names.collect()
}

fn text_of(agent: &Agent, script: &str) -> String {
    let output = run(agent.path(), &shell(script));
    assert_eq!(
        output.status,
        Some(0),
        "{script}: {}",
        String::from_utf8_lossy(&output.stderr)
    );
    output.text()
}

fn files_are_read_and_written() {
    let agent = Agent::attached();
    text_of(
        &agent,
        "mkdir -p /t/d; ln -s d /t/l; echo old >/t/d/f; chown 7:8 /t/d/f",
    );
    let found = stat(&agent, "/t/l/f", true);
    assert_eq!(
        (found.path.0.as_slice(), found.kind),
        (&b"/t/d/f"[..], FileType::File)
    );
    assert_eq!((found.uid, found.gid, found.size), (7, 8, 4));
    let link = stat(&agent, "/t/l", false);
    assert_eq!(
        (link.kind, link.target),
        (FileType::Symlink, Some(path("d")))
    );
    let missing = perform(&agent, stat_of("/t/none", true), None);
    assert!(refused(&missing, libc_enoent()).contains("\"/t/none\""));

    let list = done(perform(
        &agent,
        FileOperation::List { path: path("/t") },
        None,
    ));
    let listed = list
        .split(|byte| *byte == b'\n')
        .filter(|line| !line.is_empty());
    let listed: BTreeMap<_, _> = listed
        .map(|line| serde_json::from_slice::<FileStat>(line).unwrap())
        .map(|stat| (stat.path.0, stat.kind))
        .collect();
    let expected = [
        (b"d".to_vec(), FileType::Directory),
        (b"l".to_vec(), FileType::Symlink),
    ];
    assert_eq!(listed, expected.into());

    // Contents are replaced, appended, and larger than all buffers.
    let write =
        |write: WriteFile, input: &[u8]| perform(&agent, FileOperation::Write(write), Some(input));
    done(write(write_of("/t/l/f"), b"new"));
    let append = WriteFile {
        append: true,
        ..write_of("/t/l/f")
    };
    done(write(append, b" and more"));
    assert_eq!(
        text_of(&agent, "cat /t/d/f; stat -c %a:%u /t/d/f"),
        "new and more644:7\n"
    );
    let create = WriteFile {
        create_new: true,
        ..write_of("/t/l/f")
    };
    refused(&write(create, b""), 17);
    let large: Vec<u8> = (0..3_000_000u32).flat_map(u32::to_le_bytes).collect();
    done(write(write_of("/t/large"), &large));
    assert_eq!(text_of(&agent, "stat -c %a /t/large"), "640\n");
    assert!(done(perform(&agent, read_of("/t/large"), None)) == large);
    let part = FileOperation::Read {
        path: path("/t/large"),
        offset: 4,
        len: Some(8),
    };
    assert_eq!(done(perform(&agent, part, None)), [1, 0, 0, 0, 2, 0, 0, 0]);

    let make = |text, parents| FileOperation::MakeDirectory {
        path: path(text),
        mode: 0o700,
        parents,
    };
    refused(&perform(&agent, make("/t/a/b", false), None), libc_enoent());
    done(perform(&agent, make("/t/l/a/b", true), None));
    done(perform(&agent, make("/t/l/a/b", true), None));
    let rename = FileOperation::Rename {
        from: path("/t/l/a/b"),
        to: path("/t/c"),
    };
    done(perform(&agent, rename, None));
    assert_eq!(text_of(&agent, "ls /t/d/a; stat -c %a /t/c"), "700\n");
    let remove = |text, recursive| FileOperation::Remove {
        path: path(text),
        recursive,
    };
    refused(&perform(&agent, remove("/t", false), None), 39);
    done(perform(&agent, remove("/t/l", false), None));
    done(perform(&agent, remove("/t/c", false), None));
    done(perform(&agent, remove("/t/", true), None));
    assert_eq!(text_of(&agent, "test -e /t || echo gone"), "gone\n");
}

fn libc_enoent() -> i32 {
    2
}

/// A container's links lead to its own files.
fn no_path_leads_out_of_the_root() {
    let agent = Agent::attached();
    std::fs::write(agent.path().join("outside"), "outside").unwrap();
    // The directory of the test is in the image, too: the container has another file there.
    let outside = agent.path().join("outside");
    let outside = outside.to_str().unwrap();
    text_of(
        &agent,
        &format!(
            "mkdir -p /t; echo inside >{outside}; ln -s {outside} /t/a; ln -s ../../../../..{outside} /t/b"
        ),
    );
    for link in ["/t/a", "/t/b", &format!("/../../..{outside}")] {
        assert_eq!(
            done(perform(&agent, read_of(link), None)),
            b"inside\n",
            "{link}"
        );
        done(perform(
            &agent,
            FileOperation::Write(write_of(link)),
            Some(b"inside\n"),
        ));
    }
    // Magic links lead to objects, not paths.
    text_of(&agent, "ln -s /proc/1/root/etc /t/c");
    let magic = perform(&agent, read_of("/t/c/passwd"), None);
    assert_ne!(magic.status, Some(0));
    assert_eq!(
        std::fs::read_to_string(agent.path().join("outside")).unwrap(),
        "outside"
    );
}

fn files_of_other_types_do_not_block() {
    let agent = Agent::attached();
    text_of(&agent, "mkdir /t; mkfifo /t/p; mknod /t/z c 1 5");
    for name in ["/t/p", "/t/z"] {
        refused(&perform(&agent, read_of(name), None), 22);
        let write = FileOperation::Write(write_of(name));
        refused(&perform(&agent, write, Some(b"x")), 22);
    }
    refused(&perform(&agent, read_of("/t"), None), 21);
}

fn directories_are_packed_and_unpacked() {
    let agent = Agent::attached();
    text_of(
        &agent,
        "mkdir -p /t/d/e; cd /t/d; echo 1 >f; ln f g; ln -s /etc/passwd l; chown 7:8 f; chmod 4755 f; mkfifo p",
    );
    let pack = |text: &str, name: &str, follow| FileOperation::Pack {
        path: path(text),
        name: path(name),
        follow,
    };
    let archive = done(perform(&agent, pack("/t/d", "x", false), None));
    assert_eq!(names(&archive), ["x/", "x/e/", "x/f", "x/g", "x/l", "x/p"]);
    let all = entries(&archive);
    let (file, data) = &all[2];
    assert_eq!(
        (file.uid, file.gid, file.mode, data.as_slice()),
        (7, 8, 0o4755, &b"1\n"[..])
    );
    assert_eq!(all[3].0.kind, TarKind::Hardlink(b"x/f".to_vec()));
    let contents = done(perform(&agent, pack("/t/d/.", ".", false), None));
    assert_eq!(names(&contents), ["./", "e/", "f", "g", "l", "p"]);
    let link = done(perform(&agent, pack("/t/d/l", "n", false), None));
    assert_eq!(
        entries(&link)[0].0.kind,
        TarKind::Symlink(b"/etc/passwd".to_vec())
    );
    let followed = done(perform(&agent, pack("/t/d/l", "n", true), None));
    assert_eq!(entries(&followed)[0].0.kind, TarKind::File);
    refused(
        &perform(&agent, pack("/t/none", "n", false), None),
        libc_enoent(),
    );

    text_of(&agent, "mkdir /t/root /t/owners; ln -s root /t/to");
    let unpack = |text: &str, owners| FileOperation::Unpack {
        path: path(text),
        owners,
    };
    done(perform(&agent, unpack("/t/to", false), Some(&archive)));
    done(perform(&agent, unpack("/t/owners", true), Some(&archive)));
    let script = "stat -c %a:%u:%h /t/root/x/f /t/owners/x/f; readlink /t/root/x/l";
    assert_eq!(text_of(&agent, script), "4755:0:2\n4755:7:2\n/etc/passwd\n");

    // Refusals come while the input is sent.
    refused(
        &perform(&agent, unpack("/t/none", false), Some(&archive)),
        libc_enoent(),
    );
    let mut writer = TarWriter::new(Vec::new());
    writer.append_empty(b"../escaped").unwrap();
    let hostile = writer.finish().unwrap();
    let output = perform(&agent, unpack("/t/root", false), Some(&hostile));
    assert!(refused(&output, 22).contains("leaves the destination"));
    let output = perform(&agent, unpack("/t/root", false), Some(&[1; 5000]));
    refused(&output, 74);
}

fn changes(agent: &Agent) -> Vec<String> {
    let output = done(perform(agent, FileOperation::Changes, None));
    let lines = output
        .split(|byte| *byte == b'\n')
        .filter(|line| !line.is_empty());
    lines
        .map(|line| serde_json::from_slice::<FileChange>(line).unwrap())
        .map(|change| {
            let letter = match change.kind {
                ChangeKind::Added => 'A',
                ChangeKind::Deleted => 'D',
                _ => 'C',
            };
            format!("{letter} {}", String::from_utf8(change.path.0).unwrap())
        })
        .collect()
}

fn layer(agent: &Agent, pause: bool) -> Vec<u8> {
    done(perform(agent, FileOperation::Layer { pause }, None))
}

fn changes_and_layers_are_those_of_the_root() {
    let agent = Agent::attached();
    assert_eq!(changes(&agent), Vec::<String>::new());
    assert_eq!(names(&layer(&agent, false)), Vec::<String>::new());
    text_of(
        &agent,
        "mkdir -p /srv/new/sub; echo 1 >/srv/new/sub/f; rm /etc/passwd; touch /etc/group; \
         rm -r /etc/init.d; mkdir /etc/init.d; echo 2 >/etc/init.d/mine; echo own >>/etc/hosts; \
         exec 3</etc/shadow",
    );
    let found = changes(&agent);
    for line in [
        "C /etc",
        "D /etc/passwd",
        "C /etc/group",
        "C /etc/init.d",
        "A /etc/init.d/mine",
        "C /srv",
        "A /srv/new",
        "A /srv/new/sub",
        "A /srv/new/sub/f",
    ] {
        assert!(
            found.iter().any(|found| found == line),
            "{line} in {found:?}"
        );
    }
    assert!(
        !found
            .iter()
            .any(|line| line.contains("hosts") || line.contains("shadow"))
    );

    let archive = layer(&agent, false);
    let written = names(&archive);
    for name in [
        "etc/",
        "etc/.wh.passwd",
        "etc/group",
        "etc/init.d/",
        "etc/init.d/.wh..wh..opq",
        "etc/init.d/mine",
        "srv/",
        "srv/new/",
        "srv/new/sub/",
        "srv/new/sub/f",
    ] {
        let count = written.iter().filter(|written| *written == name).count();
        assert_eq!(count, 1, "{name} in {written:?}");
    }
    for absent in [
        "etc/hosts",
        "etc/machine-id",
        "run/sm-epoch",
        "etc/passwd",
        "proc/",
    ] {
        assert!(!written.iter().any(|name| name == absent), "{absent}");
    }
    let is_overlays = |header: &TarHeader| {
        let mut names = header.xattrs.iter().map(|(name, _)| name);
        names.any(|name| name.starts_with(b"trusted.overlay"))
    };
    assert!(
        !entries(&archive)
            .iter()
            .any(|(header, _)| is_overlays(header))
    );
}

/// The kernel stores the rename as a redirect, and no contents.
fn a_layer_of_renamed_directories() {
    let agent = Agent::attached();
    text_of(
        &agent,
        "mv /etc/init.d /etc/renamed && mkdir /srv/new && mv /etc/skel /srv/new/skel",
    );
    let written = names(&layer(&agent, false));
    let has = |name: &str| written.iter().any(|written| written == name);
    for name in [
        "etc/.wh.init.d",
        "etc/renamed/",
        "etc/.wh.skel",
        "srv/new/skel/",
    ] {
        assert!(has(name), "{name} in {written:?}");
    }
    for (old, new) in [
        ("/etc/init.d", "etc/renamed"),
        ("/etc/skel", "srv/new/skel"),
    ] {
        for entry in std::fs::read_dir(old).unwrap() {
            let name = entry.unwrap().file_name();
            let name = format!("{new}/{}", name.to_str().unwrap());
            assert!(
                has(&name) || has(&format!("{name}/")),
                "{name} in {written:?}"
            );
        }
    }
}

fn a_paused_container_continues() {
    let agent = Agent::attached();
    let mut request = shell("echo tick >/tick; echo on; while :; do echo tick >>/tick; done");
    request.role = Role::Main;
    let mut main = start(agent.path(), &request);
    main.next_kind(FrameType::Control);
    main.next_kind(FrameType::Control);
    main.next_kind(FrameType::Stdout);
    let archive = layer(&agent, true);
    assert!(names(&archive).iter().any(|name| name == "tick"));
    let frozen = || {
        let events = agent.cgroup().join("containers/main/cgroup.events");
        std::fs::read_to_string(events)
            .unwrap()
            .contains("frozen 1")
    };
    // The exit of the operation is reported after the thaw.
    assert!(!frozen());
    // So it is after a client that does not wait.
    drop(begin(&agent, FileOperation::Layer { pause: true }));
    let ControlReply::Stats(stats) = agent.control().ask(&stats_request()) else {
        panic!("stats");
    };
    assert!(stats.processes > 0);
    text_of(&agent, "true");
}

fn a_container_stays_paused_for_another_operation() {
    let agent = Agent::attached();
    text_of(&agent, "head -c 33554432 /dev/zero >/large");
    let frozen = || {
        let events = agent.cgroup().join("containers/main/cgroup.events");
        std::fs::read_to_string(events)
            .unwrap()
            .contains("frozen 1")
    };
    // It waits for its client, which reads the beginning only.
    let mut first = begin(&agent, FileOperation::Layer { pause: true });
    first.next_kind(FrameType::Control);
    first.next_kind(FrameType::Control);
    first.next_kind(FrameType::Stdout);
    assert!(frozen());
    layer(&agent, true);
    assert!(frozen(), "the first operation is not at its end");
    drop(first);
    text_of(&agent, "true");
    assert!(!frozen());
}

fn operations_need_a_root_and_end_with_it() {
    let mut agent = Agent::bare();
    let output = perform(&agent, stat_of("/", true), None);
    assert_eq!(output.status, Some(125));
    assert_eq!(
        output.error.unwrap(),
        "container main has no root file system yet"
    );
    agent = agent.attach();
    // An operation without the end of its input does not prevent the power-off.
    let mut waiting = begin(&agent, FileOperation::Write(write_of("/t")));
    waiting.send(FrameType::Stdin, b"x");
    waiting.next_kind(FrameType::Control);
    waiting.next_kind(FrameType::Control);
    let power_off = sm_guest_proto::control::ControlRequest::PowerOff { grace_ms: 60_000 };
    assert_eq!(agent.control().ask(&power_off), ControlReply::Done);
    assert_eq!(waiting.collect().status, Some(137));
    assert!(agent.wait());
}
