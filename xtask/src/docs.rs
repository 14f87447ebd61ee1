//! `cargo xtask docs`: the site, its generated pages, and manual pages.

use std::ffi::OsStr;
use std::path::{Path, PathBuf};

use anyhow::Result;

use crate::apt::Apt;
use crate::build::{self, cargo};
use crate::{cmd, paths};

/// The version of mdBook that the site is built with.
const MDBOOK: &str = "0.5.4";

/// The documents to build or write.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) enum DocsOptions {
    /// The site and manual pages, in the build output.
    #[default]
    All,
    /// The pages and texts in the repository that are generated from the parser.
    Generated,
    /// Manual pages, in a directory.
    Man(PathBuf),
}

pub(crate) fn run(apt: &Apt, options: &DocsOptions) -> Result<()> {
    apt.ensure(&build::PACKAGES)?;
    match options {
        DocsOptions::Generated => {
            generate("pages", &paths::root().join("docs/src/reference"))?;
            generate("help", &paths::root().join("cli/tests/help"))
        }
        DocsOptions::Man(directory) => generate("man", directory),
        DocsOptions::All => {
            let mdbook = mdbook()?;
            let output = paths::target().join("docs");
            cmd::step("building the site");
            let arguments: [&OsStr; 3] = ["build".as_ref(), "--dest-dir".as_ref(), output.as_ref()];
            let mut build = cmd::command(&mdbook.to_string_lossy(), arguments);
            cmd::check(build.current_dir(paths::root().join("docs")))?;
            let man = paths::target().join("man");
            generate("man", &man)?;
            println!("{}", output.join("index.html").display());
            println!("{}", man.display());
            Ok(())
        }
    }
}

/// Runs a program of `sm-cli`, which has the parser, to write files into a directory.
fn generate(kind: &str, directory: &Path) -> Result<()> {
    cmd::step(format_args!("writing {}", directory.display()));
    let directory = std::path::absolute(directory)?;
    let mut run = cargo(["run", "--quiet", "--locked", "-p", "sm-cli"]);
    run.args(["--example", "reference", "--", kind]);
    cmd::check(run.arg(directory))
}

/// Returns mdBook from the cache; building it takes some minutes, once.
fn mdbook() -> Result<PathBuf> {
    let cache = paths::cache("mdbook")?;
    let home = cache.join(MDBOOK);
    let program = home.join("bin/mdbook");
    if let Some(_lock) = paths::lock_unless(&program, &cache)? {
        cmd::step(format_args!("building mdBook {MDBOOK}, once"));
        let mut install = cargo(["install", "mdbook", "--version", MDBOOK, "--locked"]);
        // The server is not needed.
        install.args(["--no-default-features", "--features", "search", "--root"]);
        cmd::check(install.arg(&home))?;
    }
    Ok(program)
}
