//! The workload's output, as logged by its VM's process.

use super::*;
use crate::output_log::LogReader;

#[test]
fn the_log_of_a_vm_that_has_gone_is_read_to_its_end() {
    let mut f = fixture(SupervisorSetup::default().auto_remove(true));
    let (_agent, mut main) = f.vm.start();
    let mut logs = Logs::open(f.vm.record.clone()).unwrap();
    main.send(FrameType::Stdout, b"last");
    main.exit(0);
    f.vm.finish();
    assert!(!f.vm.record.directory().exists());
    assert_eq!(logs.wait_record().unwrap().unwrap().bytes, b"last");
    assert!(logs.wait_record().unwrap().is_none());
}

/// The test runs on a file system of a megabyte, in a mount namespace of its own.
#[test]
fn a_full_disk_loses_only_what_is_written_while_it_is_full() {
    let at = tempfile::tempdir().unwrap();
    let mut command = Command::new("unshare");
    // Users other than root may mount in a user namespace.
    if !rustix::process::geteuid().is_root() {
        command.args(["--user", "--map-root-user"]);
    }
    command
        .args(["--mount", "sh", "-c"])
        .arg("mount -t tmpfs -o size=1m none \"$TMPDIR\" && exec \"$0\" \"$@\"")
        .arg(std::env::current_exe().unwrap())
        .env("TMPDIR", at.path());
    let name = "a_full_disk_loses_only_what_is_written_while_it_is_full";
    if !in_own_process(module_path!(), name, &mut command) {
        return;
    }
    let mut f = fixture(SupervisorSetup::default());
    let (_agent, mut main) = f.vm.start();
    let mut output = |f: &mut Fixture, bytes: &[u8]| {
        main.send(FrameType::Stdout, bytes);
        let session = f.vm.launcher.as_mut().unwrap();
        // Clients receive output after the attempt to log it.
        while !matches!(session.next_event().unwrap().unwrap(), Event::Stdout(seen) if seen == bytes)
        {
        }
    };
    let ballast = std::env::temp_dir().join("ballast");
    let fill = || {
        let mut file = std::fs::File::options()
            .create(true)
            .append(true)
            .open(&ballast)
            .unwrap();
        while file.write(&[0; 4096]).is_ok_and(|count| count > 0) {}
    };
    output(&mut f, b"before");
    fill();
    output(&mut f, &[b'x'; 60_000]);
    std::fs::remove_file(&ballast).unwrap();
    output(&mut f, b"after");
    fill();
    output(&mut f, &[b'x'; 50_000]);
    main.exit(5);
    assert_eq!(f.vm.events(), ["exit 5", "ended 5"]);
    assert_eq!(f.vm.record.state().unwrap(), VmState::Running);
    std::fs::remove_file(&ballast).unwrap();
    f.vm.finish();
    assert!(matches!(f.vm.record.state().unwrap(), VmState::Exited(exit) if exit.status == 5));
    let mut log = LogReader::open(f.vm.record.directory()).unwrap();
    let records = std::iter::from_fn(|| log.next_record().unwrap());
    let texts: Vec<String> = records.map(|record| text(&record.bytes)).collect();
    assert_eq!(texts.len(), 4, "{texts:?}");
    assert_eq!((texts[0].as_str(), texts[2].as_str()), ("before", "after"));
    assert!(texts[1].starts_with("[sm: 60000 bytes"), "{}", texts[1]);
    assert!(texts[3].starts_with("[sm: 50000 bytes"), "{}", texts[3]);
}
