//! Writes an EROFS image of a directory, or of the tar archive on standard input:
//! `dir2erofs DIRECTORY IMAGE`, `tar -c FILES | dir2erofs - IMAGE`.

use std::error::Error;
use std::fs::File;
use std::io;
use std::path::Path;

use sm_erofs::{Options, Tree, write};

fn main() -> Result<(), Box<dyn Error>> {
    let arguments: Vec<_> = std::env::args_os().skip(1).collect();
    let [source, image] = arguments.as_slice() else {
        return Err("usage: dir2erofs DIRECTORY|- IMAGE".into());
    };
    let tree = if source == "-" {
        Tree::from_tar(io::stdin().lock(), tempfile::tempfile()?)?
    } else {
        Tree::from_directory(Path::new(source))?
    };
    let image = File::create_new(image)?;
    let len = write(&tree, &image, &Options::default())?;
    println!("{len} bytes");
    Ok(())
}
