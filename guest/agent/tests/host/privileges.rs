//! Limits of privileges, and kernel parameters.

use std::collections::BTreeMap;
use std::fs;

use sm_guest_proto::exec::{Role, Sysctl};
use sm_guest_proto::privileges::{GuestCapabilities, Privileges};

use crate::client::{run, shell, start_running};
use crate::{Agent, Test};

pub(crate) const TESTS: &[Test] = &[
    (
        "privileges_of_the_main_command_limit_all",
        privileges_of_the_main_command_limit_all,
    ),
    ("kernel_parameters_are_set", kernel_parameters_are_set),
];

/// The lines of `/proc/PID/status` about privileges, with numbers without leading zeros.
fn status(text: &str) -> BTreeMap<String, u64> {
    let lines = text.lines().filter_map(|line| line.split_once(":\t"));
    lines
        .filter(|(name, _)| name.starts_with("Cap") || *name == "NoNewPrivs")
        .map(|(name, value)| (name.to_owned(), u64::from_str_radix(value, 16).unwrap()))
        .collect()
}

fn privileges_of_the_main_command_limit_all() {
    const SHOW: &str = "cat /proc/self/status";
    let agent = Agent::attached();
    let set = ["CHOWN", "KILL", "SETUID", "SETGID"];
    let set = set.map(|name| GuestCapabilities::named(name).unwrap());
    let set = set
        .into_iter()
        .fold(GuestCapabilities::NONE, GuestCapabilities::and);
    let here = status(&fs::read_to_string("/proc/self/status").unwrap());
    // Before the main command runs, nothing is limited.
    let shown = status(&run(agent.path(), &shell(SHOW)).text());
    assert_eq!(
        (shown["CapBnd"], shown["CapEff"]),
        (here["CapBnd"], here["CapBnd"])
    );

    let mut main = shell("cat /proc/self/status > /dev/shm/status; sleep 1000");
    main.role = Role::Main;
    main.privileges = Some(Privileges {
        capabilities: Some(set),
        no_new_privileges: true,
    });
    let _main = start_running(agent.path(), &main);
    let read = shell("until grep -s NoNewPrivs /dev/shm/status; do :; done; cat /dev/shm/status");
    let limited = |inheritable_of_all: u64| {
        BTreeMap::from([
            ("CapInh".to_owned(), 0),
            ("CapPrm".to_owned(), inheritable_of_all),
            ("CapEff".to_owned(), inheritable_of_all),
            ("CapBnd".to_owned(), set.bits()),
            ("CapAmb".to_owned(), 0),
            ("NoNewPrivs".to_owned(), 1),
        ])
    };
    assert_eq!(
        status(&run(agent.path(), &read).text()),
        limited(set.bits())
    );
    // Commands beside it have no more, and another user has none.
    assert_eq!(
        status(&run(agent.path(), &shell(SHOW)).text()),
        limited(set.bits())
    );
    let mut other = shell(SHOW);
    other.user = "65534".into();
    assert_eq!(status(&run(agent.path(), &other).text()), limited(0));
    let denied = run(agent.path(), &shell("mknod /dev/shm/null c 1 3"));
    assert_ne!(denied.status, Some(0));
    let mut privileged = shell(SHOW);
    privileged.privileges = Some(Privileges::default());
    let shown = status(&run(agent.path(), &privileged).text());
    assert_eq!((shown["CapEff"], shown["NoNewPrivs"]), (here["CapBnd"], 0));
}

fn kernel_parameters_are_set() {
    let agent = Agent::attached();
    let mut request = shell("cat /proc/sys/kernel/domainname");
    // It belongs to the agent's UTS namespace.
    let domain = |value: &str| Sysctl {
        path: "kernel/domainname".into(),
        value: value.into(),
    };
    request.sysctls = vec![domain("first.test"), domain("last.test")];
    assert_eq!(run(agent.path(), &request).text(), "last.test\n");
    for (path, why) in [
        ("kernel/sm_missing", "has no parameter"),
        ("../1/comm", "is no kernel parameter"),
        ("kernel/ostype", "set kernel parameter"),
    ] {
        request.sysctls[0].path = path.into();
        let output = run(agent.path(), &request);
        let error = output.error.unwrap();
        assert!(error.contains(why), "{error}");
        assert_eq!(output.status, Some(125));
    }
}
