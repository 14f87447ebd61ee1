//! Writes the files that are generated from the definition of the command line. Run by
//! `cargo xtask docs`.
//!
//! ```text
//! reference pages DIRECTORY    # Markdown
//! reference help DIRECTORY     # the texts of --help
//! reference man DIRECTORY      # manual pages
//! ```

use std::fs;
use std::path::Path;

use anyhow::{Context as _, Result, bail};
use sm_cli::reference::{self, Page};

fn main() -> Result<()> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [kind, directory] = arguments.as_slice() else {
        bail!("usage: reference pages|help|man DIRECTORY");
    };
    let directory = Path::new(directory);
    fs::create_dir_all(directory).with_context(|| format!("cannot make {directory:?}"))?;
    match kind.as_str() {
        "pages" => replace(directory, &reference::markdown()),
        "help" => replace(directory, &reference::help()),
        "man" => clap_mangen::generate_to(sm_cli::command(), directory)
            .with_context(|| format!("cannot write to {directory:?}")),
        other => bail!("there are no \"{other}\" to write"),
    }
}

/// Writes these pages to the directory, and removes all other files.
fn replace(directory: &Path, pages: &[Page]) -> Result<()> {
    for entry in fs::read_dir(directory)? {
        let entry = entry?;
        if !pages.iter().any(|page| *page.name == *entry.file_name()) {
            fs::remove_file(entry.path())?;
        }
    }
    for page in pages {
        let path = directory.join(&page.name);
        fs::write(&path, &page.text).with_context(|| format!("cannot write {path:?}"))?;
    }
    Ok(())
}
