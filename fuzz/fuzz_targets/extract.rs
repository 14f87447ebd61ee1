//! Extraction of tar archives: nothing outside the destination changes.
#![no_main]

use std::os::fd::AsFd as _;

use libfuzzer_sys::fuzz_target;
use sm_tar::ExtractOptions;

fuzz_target!(|data: &[u8]| {
    // Sparse files and devices are limits of the host, not of the extraction.
    let data = data.get(..64 << 10).unwrap_or(data);
    let outside = tempfile::tempdir().expect("a directory");
    let into = outside.path().join("in");
    std::fs::create_dir(&into).expect("a directory");
    std::fs::write(outside.path().join("secret"), "secret").expect("a file");
    let directory = std::fs::File::open(&into).expect("a directory");
    let _ = ExtractOptions::new().extract(data, directory.as_fd());
    let names = std::fs::read_dir(outside.path()).expect("names").count();
    assert_eq!(names, 2, "something was created outside");
    let secret = std::fs::read(outside.path().join("secret")).expect("the file");
    assert_eq!(secret, b"secret");
});
