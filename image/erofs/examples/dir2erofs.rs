//! Writes an EROFS image of a directory, or of the tar archive on standard input:
//! `dir2erofs DIRECTORY IMAGE`, `tar -c FILES | dir2erofs - IMAGE`.

use std::error::Error;
use std::ffi::OsString;
use std::fs::File;
use std::io;
use std::path::Path;

use sm_erofs::{Options, Tree, write};

fn main() -> Result<(), Box<dyn Error>> {
    let arguments: Vec<_> = std::env::args_os().skip(1).collect();
    println!("{} bytes", run(&arguments)?);
    Ok(())
}

/// Writes the image and returns its length.
fn run(arguments: &[OsString]) -> Result<u64, Box<dyn Error>> {
    let [source, image] = arguments else {
        return Err("usage: dir2erofs DIRECTORY|- IMAGE".into());
    };
    let tree = if source == "-" {
        Tree::from_tar(io::stdin().lock(), tempfile::tempfile()?)?
    } else {
        Tree::from_directory(Path::new(source))?
    };
    let image = File::create_new(image)?;
    Ok(write(&tree, &image, &Options::default())?)
}

#[cfg(test)]
mod tests {
    use std::fs;

    #[test]
    fn a_directory_becomes_an_image() {
        let directory = tempfile::tempdir().unwrap();
        let (source, image) = (
            directory.path().join("root"),
            directory.path().join("image"),
        );
        fs::create_dir(&source).unwrap();
        fs::write(source.join("motd"), "hello\n").unwrap();
        let len = super::run(&[source.into(), image.clone().into()]).unwrap();
        let image = fs::read(image).unwrap();
        assert_eq!(image.len() as u64, len);
        // The magic number of the superblock, and the file, which lies in the image as it is.
        assert_eq!(image[1024..1028], 0xe0f5_e1e2_u32.to_le_bytes());
        assert!(image.windows(6).any(|bytes| bytes == b"hello\n"));
    }
}
