//! Control of VMs under load, and of paused VMs.
#![expect(clippy::unwrap_used, reason = "a failed expectation is a failed test")]

use std::io::Write as _;
use std::os::unix::net::UnixStream;

use sm_e2e::{Home, Vm, image};

fn sleeper(home: &Home) -> Vm<'_> {
    home.detached(&["-m", "128m", &image("busybox"), "sleep", "1000"])
}

/// Connects a client to the control socket that waits for the VM's end.
fn waiting(vm: &Vm<'_>, home: &Home) -> UnixStream {
    let id = vm.inspect()["id"].as_str().unwrap().to_owned();
    let sockets = home.run_dir().join("sm/vms");
    let of_vm = std::fs::read_dir(sockets)
        .unwrap()
        .map(|entry| entry.unwrap())
        .find(|entry| id.starts_with(entry.file_name().to_str().unwrap()))
        .unwrap();
    let mut client = UnixStream::connect(of_vm.path().join("control.sock")).unwrap();
    let call = br#""wait""#;
    let len = u32::try_from(call.len()).unwrap().to_be_bytes();
    client
        .write_all(&[&[0xff], &len[..], call].concat())
        .unwrap();
    client
}

#[test]
fn a_paused_machine_is_stopped_by_its_signal() {
    let home = Home::shared();
    // The status is that of the workload, not of SIGKILL.
    let workload = "trap 'exit 7' TERM; echo ready; while :; do sleep 1; done";
    let vm = home.detached(&["-m", "128m", &image("busybox"), "sh", "-c", workload]);
    vm.until_it_says("ready");
    home.sm(&["pause", &vm.name]).exits(0);
    home.sm(&["stop", "-t", "60", &vm.name]).exits(0);
    assert_eq!(vm.inspect()["state"]["exit_code"], 7);
}

#[test]
fn a_paused_machine_is_killed_and_removed() {
    let home = Home::shared();
    let vm = sleeper(home);
    home.sm(&["pause", &vm.name]).exits(0);
    home.sm(&["kill", &vm.name]).exits(0);
    assert_eq!(vm.wait()["state"]["exit_code"], 137);
    let vm = sleeper(home);
    home.sm(&["pause", &vm.name]).exits(0);
    home.sm(&["rm", "-f", &vm.name]).exits(0);
}

#[test]
fn waiting_clients_do_not_prevent_control() {
    let home = Home::shared();
    let vm = sleeper(home);
    let clients: Vec<UnixStream> = (0..70).map(|_| waiting(&vm, home)).collect();
    let mut processes = Vec::new();
    for command in ["wait", "attach", "logs"] {
        let mut arguments = vec![command];
        if command == "logs" {
            arguments.push("-f");
        }
        arguments.push(&vm.name);
        processes.push(home.command(&arguments).spawn().unwrap());
    }
    assert_eq!(vm.exec(&["echo", "here"]).exits(0).out(), "here\n");
    assert!(home.sm(&["ps"]).exits(0).out().contains(&vm.name));
    home.sm(&["stop", "-t", "1", &vm.name]).exits(0);
    for process in processes {
        process.wait_with_output().unwrap();
    }
    drop(clients);
}
