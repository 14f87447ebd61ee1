//! Arbitrary bytes as the payload of a working set, with a valid digest: ignored, or its pages
//! are requested of a small memory, each once.
#![no_main]

use std::fs;
use std::sync::LazyLock;

use libfuzzer_sys::fuzz_target;
use sm_snapshot::state_file::{Section, StateFile};
use sm_snapshot::working_set::{FILE, WorkingSet};
use sm_vmm_core::memory::{MIN_MEMORY, MachineMemory, MemoryConfig};
use tempfile::TempDir;

static DIRECTORY: LazyLock<TempDir> = LazyLock::new(|| tempfile::tempdir().expect("a directory"));

fuzz_target!(|data: &[u8]| {
    let path = DIRECTORY.path();
    fs::write(path.join(FILE), data).expect("a file");
    assert!(WorkingSet::load(path).is_none());
    let file = StateFile {
        sections: vec![Section {
            name: "working-set".to_owned(),
            version: 2,
            payload: data.to_vec(),
        }],
    };
    let (bytes, digest) = file.encode();
    fs::write(path.join(FILE), [digest.as_bytes(), &bytes].concat()).expect("a file");
    let Some(set) = WorkingSet::load(path) else {
        return;
    };
    let _ = set.pages();
    let memory = MachineMemory::anonymous(&MemoryConfig::new(MIN_MEMORY)).expect("64 MiB");
    assert!(set.prefetch(&memory) <= MIN_MEMORY >> 12, "{set:?}");
});
