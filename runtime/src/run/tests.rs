use std::path::Path;

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

use super::*;

/// Starts another program in place of a VMM; returns the error, and true if a record or a
/// process is left.
fn started_as(program: &str, timeout: Duration) -> (String, bool) {
    started_with(program, timeout, None)
}

/// As [`started_as`]; with `free`, this process can open so many descriptors meanwhile.
fn started_with(program: &str, timeout: Duration, free: Option<u64>) -> (String, bool) {
    let dir = tempfile::tempdir().unwrap();
    let sm = Sm::builder().below(dir.path()).build().unwrap();
    let records = Records::open(sm.home()).unwrap();
    let config = |id, name: String| Ok(VmConfig::new(id, name));
    let source = StartSource::Image(ImageSource {
        root: Vec::new(),
        modules: None,
        cold: true,
    });
    let program = Program {
        path: program.into(),
        environment: Vec::new(),
        timeout,
    };
    let limit = free.map(limit_descriptors);
    let launched = launch_program(&sm, &records, &RunOptions::new(), config, source, &program);
    if let Some(limit) = limit {
        setrlimit(Resource::Nofile, limit).unwrap();
    }
    let Err(error) = launched else {
        panic!("{:?} is a VMM", program.path);
    };
    let left = !records.list().unwrap().is_empty() || has_child(&program.path);
    (sm_control::with_causes(&error), left)
}

/// Limits the descriptors to those that are open and `free` more; returns the limit before.
fn limit_descriptors(free: u64) -> Rlimit {
    let before = getrlimit(Resource::Nofile);
    // One of them is that of the list itself.
    let open = std::fs::read_dir("/proc/self/fd").unwrap().count() - 1;
    let limit = Rlimit {
        current: Some(u64::try_from(open).unwrap() + free),
        ..before
    };
    setrlimit(Resource::Nofile, limit).unwrap();
    before
}

/// Returns true if this process has a child (or a zombie) that runs `program`.
fn has_child(program: &Path) -> bool {
    let name = program.file_name().unwrap().to_str().unwrap();
    let wanted = (format!("({name})"), std::process::id().to_string());
    let processes = std::fs::read_dir("/proc").unwrap();
    processes.flatten().any(|entry| {
        let stat = std::fs::read_to_string(entry.path().join("stat")).unwrap_or_default();
        let mut words = stat.split(' ').skip(1);
        let (comm, parent) = (words.next(), words.nth(1));
        comm == Some(wanted.0.as_str()) && parent == Some(wanted.1.as_str())
    })
}

#[test]
fn a_program_that_is_no_vmm_is_detected() {
    // The program exits at once without reading.
    let (error, left) = started_as("/usr/bin/false", Duration::from_secs(60));
    assert!(error.contains("run_vmm_if_asked"), "{error}");
    assert!(!left, "{error}");
    // The program keeps running without reading.
    let (error, left) = started_as("/usr/bin/yes", Duration::from_millis(200));
    assert!(error.contains("run_vmm_if_asked"), "{error}");
    assert!(!left, "{error}");
}

/// Whichever descriptor is the first that is missing.
#[test]
fn nothing_is_left_of_a_vm_for_which_descriptors_do_not_suffice() {
    // The limit is one of the whole process.
    const OWN: &str = "SM_TEST_OWN_PROCESS";
    let name = "run::tests::nothing_is_left_of_a_vm_for_which_descriptors_do_not_suffice";
    if std::env::var_os(OWN).is_none() {
        let test = std::process::Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "--nocapture", name])
            .env(OWN, "1")
            .output()
            .unwrap();
        assert!(test.status.success(), "{test:?}");
        assert!(String::from_utf8_lossy(&test.stdout).contains("1 passed"));
        return;
    }
    let started = |free| started_with("/usr/bin/false", Duration::from_secs(60), Some(free));
    let enough = (0..100).find(|&free| {
        let (error, left) = started(free);
        assert!(!left, "{free}: {error}");
        let was_started = error.contains("run_vmm_if_asked");
        assert!(
            was_started || error.contains("Too many open files"),
            "{free}: {error}"
        );
        was_started
    });
    assert!(enough.expect("100 suffice") > 5, "{enough:?}");
}
