//! Disks of arbitrary layers: `fsck.erofs` accepts our output.
#![no_main]

use std::os::fd::AsRawFd as _;
use std::process::Command;

use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    let Some(disk) = sm_image::fuzzing::disk(data) else {
        return;
    };
    let path = format!("/proc/{}/fd/{}", std::process::id(), disk.as_raw_fd());
    // With this option, fsck.erofs reads all contents and writes none.
    let checked = Command::new("fsck.erofs")
        .args(["--extract", &path])
        .output()
        .expect("fsck.erofs, of erofs-utils");
    assert!(checked.status.success(), "{checked:?}");
});
