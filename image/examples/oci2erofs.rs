//! Converts an OCI image to an EROFS disk file: `oci2erofs REFERENCE DISK [STORE]`.
//! Prints the image's digest and the time taken.

use std::fs::File;
use std::io;
use std::path::Path;
use std::time::Instant;

use sm_image::{PullOptions, Reference, Store};

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let (reference, disk, store) = match arguments.as_slice() {
        [reference, disk] => (reference, disk, None),
        [reference, disk, store] => (reference, disk, Some(store)),
        _ => return Err("usage: oci2erofs REFERENCE DISK [STORE]".into()),
    };
    let temporary = tempfile::tempdir()?;
    let root = store.map_or_else(|| temporary.path(), Path::new);
    let began = Instant::now();
    let image =
        Store::open(root)?.open_image(&Reference::parse(reference)?, &PullOptions::default())?;
    println!("{} in {:?}", image.digest, began.elapsed());
    let mut out = File::create(disk)?;
    for segment in &image.segments {
        io::copy(&mut File::open(&segment.path)?, &mut out)?;
    }
    Ok(())
}
