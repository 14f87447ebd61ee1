use super::*;

/// Starts another program in place of a VMM; returns the error, and true if a record or a
/// process is left.
fn started_as(program: &str, timeout: Duration) -> (String, bool) {
    let dir = tempfile::tempdir().unwrap();
    let at = |name| dir.path().join(name);
    let home = Home::new(&at("data"), &at("run"), &at("cache"));
    let records = Records::open(&home).unwrap();
    let config = |id, name| {
        Ok(VmConfig {
            id,
            name,
            image: String::new(),
            image_digest: String::new(),
            created_ns: 0,
            workload: Workload::default(),
            memory: MIN_MEMORY,
            cpus: 1,
            kernel: PathBuf::new(),
            auto_remove: false,
            read_only: false,
            stop_timeout_ms: 0,
            publish: Vec::new(),
            publish_wait_ms: 0,
        })
    };
    let source = Source {
        origin: Origin::Cold,
        root: Vec::new(),
        modules: None,
    };
    let program = Program {
        path: program.into(),
        timeout,
    };
    let launched = launch_program(
        &home,
        &records,
        &RunOptions::new(),
        config,
        source,
        &program,
    );
    let Err(error) = launched else {
        panic!("{:?} is a VMM", program.path);
    };
    let left = !records.list().unwrap().is_empty() || has_child(&program.path);
    (sm_control::with_causes(&error), left)
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
