//! Lists an archive, or extracts it below a directory: `untar [DIRECTORY] < ARCHIVE`.

use std::error::Error;
use std::fs::File;
use std::io::{self, Read};
use std::os::fd::AsFd as _;

use sm_tar::{ExtractOptions, TarReader};

fn list(archive: impl Read) -> Result<Vec<String>, Box<dyn Error>> {
    let mut reader = TarReader::new(archive);
    let mut names = Vec::new();
    while let Some(entry) = reader.next_entry()? {
        // Names are bytes that the archive chooses.
        names.push(entry.path.escape_ascii().to_string());
    }
    Ok(names)
}

fn main() -> Result<(), Box<dyn Error>> {
    match std::env::args_os().nth(1) {
        None => list(io::stdin().lock())?
            .iter()
            .for_each(|name| println!("{name}")),
        Some(directory) => {
            let directory = File::open(directory)?;
            ExtractOptions::new().extract(io::stdin().lock(), directory.as_fd())?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use sm_tar::TarWriter;

    use super::*;

    #[test]
    fn names_are_listed_and_files_extracted() -> Result<(), Box<dyn Error>> {
        let (from, to) = (tempfile::tempdir()?, tempfile::tempdir()?);
        std::fs::write(from.path().join("a"), "hello")?;
        let mut writer = TarWriter::new(Vec::new());
        writer.append_tree(from.path(), b"d", &|_| false)?;
        let archive = writer.finish()?;
        assert_eq!(list(archive.as_slice())?, ["d/", "d/a"]);
        let directory = File::open(to.path())?;
        ExtractOptions::new().extract(archive.as_slice(), directory.as_fd())?;
        assert_eq!(std::fs::read(to.path().join("d/a"))?, b"hello");
        Ok(())
    }
}
