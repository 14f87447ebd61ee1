//! Commands beside the workload, as far as they involve the VM's process.

use super::*;

#[test]
fn sending_a_request_times_out() {
    let mut f = fixture(SupervisorSetup::default().detached());
    let (_agent, mut main) = f.vm.start();
    // No process reads the connection.
    let _exec = UnixListener::bind(f.vm.record.exec_socket()).unwrap();
    let vm = f.find();
    let mut command = vm.exec(["cat", "/tmp/f"]);
    command.send_timeout = Duration::from_millis(50);
    let error = command
        .stage_file("/tmp/f", 0o644, vec![b'x'; 4 << 20])
        .start()
        .unwrap_err();
    let Error::Vmm { operation, source } = &error else {
        panic!("{error:?}");
    };
    assert_eq!(*operation, "send the command to the VM");
    assert_eq!(source.kind(), io::ErrorKind::TimedOut);
    main.exit(0);
    f.vm.finish();
}

#[test]
fn a_command_in_a_paused_vm_is_refused_at_once() {
    let mut f = fixture(SupervisorSetup::default().detached());
    let (_agent, mut main) = f.vm.start();
    let vm = f.find();
    vm.pause().unwrap();
    let error = vm.exec(["true"]).start().unwrap_err().to_string();
    assert!(error.contains("VM \"vm\" is paused"), "{error}");
    vm.resume().unwrap();
    let error = vm.exec(["true"]).start().unwrap_err();
    assert!(matches!(error, Error::NotRunning(_)), "no agent: {error}");
    main.exit(0);
    f.vm.finish();
}
