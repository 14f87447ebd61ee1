//! Converts an OCI image to an EROFS disk file: `oci2erofs REFERENCE DISK [STORE]`.
//! Prints the image's digest and the time taken.

use std::fs::File;
use std::io;
use std::path::Path;
use std::time::Instant;

use sm_image::{PullOptions, Reference, Store};

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    run(&arguments)
}

fn run(arguments: &[String]) -> Result<(), Box<dyn std::error::Error>> {
    let (reference, disk, store) = match arguments {
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

#[cfg(test)]
mod tests {
    use std::fs;

    use sm_image::{Compression, Config, LayoutBuilder, MemoryFile};

    #[test]
    fn an_image_becomes_a_disk() {
        let directory = tempfile::tempdir().unwrap();
        let (layout, disk) = (
            directory.path().join("layout"),
            directory.path().join("disk"),
        );
        let mut image = LayoutBuilder::new(&layout, Compression::Gzip(1)).unwrap();
        let file = MemoryFile::File(b"a line of text\n".to_vec());
        image.memory_layer(&[("motd", 0o644, file)]).unwrap();
        image.finish("v1", Config::default()).unwrap();
        let reference = format!("oci:{}:v1", layout.display());
        super::run(&[reference, disk.display().to_string()]).unwrap();
        let disk = fs::read(disk).unwrap();
        assert_eq!(disk[1024..1028], 0xe0f5_e1e2_u32.to_le_bytes());
        assert!(disk.windows(14).any(|bytes| bytes == b"a line of text"));
    }
}
