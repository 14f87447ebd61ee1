//! Commands in documents: those of `cargo xtask` must parse, and other commands of cargo
//! must name existing packages and programs.

use std::collections::BTreeSet;

use anyhow::{Context as _, Result};
use serde_json::Value;
use sm_markdown::{block_commands, blocks, code_spans};

use super::RepositoryFile;
use crate::options;

/// Names of packages and targets in the workspace.
pub(super) struct Names {
    packages: BTreeSet<String>,
    targets: BTreeSet<String>,
}

impl Names {
    /// Reads the output of `cargo metadata`.
    pub(super) fn new(metadata: &Value) -> Result<Self> {
        let mut names = Self {
            packages: BTreeSet::new(),
            targets: BTreeSet::new(),
        };
        let packages = metadata["packages"].as_array();
        for package in packages.context("cargo metadata lists no packages")? {
            names
                .packages
                .extend(package["name"].as_str().map(str::to_owned));
            let targets = package["targets"].as_array().into_iter().flatten();
            names
                .targets
                .extend(targets.filter_map(|target| target["name"].as_str().map(str::to_owned)));
        }
        Ok(names)
    }

    /// Returns the reason why a command of cargo, given without its first word, is
    /// invalid.
    fn refused(&self, arguments: &[String]) -> Option<String> {
        if let Some((command, rest)) = arguments.split_first()
            && command == "xtask"
        {
            let parsed = options::read(lexopt::Parser::from_args(rest));
            return parsed.err().map(|error| error.to_string());
        }
        let own = arguments.iter().take_while(|word| *word != "--");
        let own: Vec<&str> = own.map(String::as_str).collect();
        own.windows(2).find_map(|pair| {
            let [option, name] = pair else { return None };
            let known = match *option {
                "-p" | "--package" => &self.packages,
                "--example" | "--test" | "--bin" | "--bench" => &self.targets,
                _ => return None,
            };
            (!known.contains(*name)).then(|| format!("there is no \"{name}\" in the workspace"))
        })
    }
}

/// Returns the invalid commands of cargo: in blocks of shell, and those of xtask in
/// sentences, without their arguments.
pub(super) fn unknown(files: &[RepositoryFile], names: &Names) -> Vec<String> {
    let mut faults = Vec::new();
    for file in files.iter().filter(|file| file.path.ends_with(".md")) {
        for (line, span) in code_spans(&file.text) {
            let mut words = span.split_whitespace();
            let is_xtask = words.next() == Some("cargo") && words.next() == Some("xtask");
            let name = words.next().filter(|_| is_xtask);
            // Names of commands are lower case; other words are placeholders.
            let name = name.filter(|name| name.bytes().all(is_of_name));
            if let Some(name) = name
                && let Err(error) = options::read(lexopt::Parser::from_args([name, "--help"]))
            {
                faults.push(format!("{}:{line}: `{span}`: {error}", file.path));
            }
        }
        for block in blocks(&file.text) {
            if block.unchecked().is_some() {
                continue;
            }
            // The tests of sm-cli find open quotes.
            for command in block_commands(&block).unwrap_or_default() {
                let Some((program, arguments)) = command.words.split_first() else {
                    continue;
                };
                if program != "cargo" {
                    continue;
                }
                let why = names.refused(arguments);
                faults.extend(why.map(|why| {
                    let line = command.words.join(" ");
                    format!("{}:{}: \"{line}\": {why}", file.path, block.line)
                }));
            }
        }
    }
    faults
}

fn is_of_name(byte: u8) -> bool {
    byte.is_ascii_lowercase() || byte == b'-'
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn faults(script: &str) -> Vec<String> {
        let package = json!({ "name": "sm-a", "targets": [{ "name": "boot" }] });
        let metadata = json!({ "packages": [package] });
        let file = RepositoryFile {
            path: "a.md".to_owned(),
            text: format!("```sh\n{script}\n```\n"),
        };
        unknown(&[file], &Names::new(&metadata).unwrap())
    }

    #[test]
    fn commands_of_xtask_are_parsed() {
        assert_eq!(faults("cargo xtask test --e2e web; ls"), [""; 0]);
        let found = faults("cargo xtask frobnicate");
        assert!(found[0].starts_with("a.md:2: \"cargo xtask frobnicate\": there is no command"));
        assert_eq!(faults("cargo xtask test --sideways").len(), 1);
    }

    #[test]
    fn commands_in_sentences_exist() {
        let found = |text: &str| {
            let file = RepositoryFile {
                path: "a.md".to_owned(),
                text: text.to_owned(),
            };
            let metadata = json!({ "packages": [] });
            unknown(&[file], &Names::new(&metadata).unwrap())
        };
        let fine = "see `cargo xtask fuzz [NAME...]`, `cargo xtask lab`, `cargo xtask COMMAND`";
        assert_eq!(found(fine), [""; 0]);
        let faults = found("\nsee `cargo xtask fly`");
        assert!(faults[0].starts_with("a.md:2: `cargo xtask fly`: there is no command"));
    }

    #[test]
    fn packages_and_programs_exist() {
        assert_eq!(faults("cargo run -p sm-a --example boot -- -p x"), [""; 0]);
        for line in ["cargo test -p sm-b", "cargo run -p sm-a --example fly"] {
            assert_eq!(faults(line).len(), 1, "{line}");
        }
    }
}
