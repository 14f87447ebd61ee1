//! The committed reference pages and help texts are those of the parser.
#![expect(clippy::unwrap_used, reason = "a failed expectation is a failed test")]

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use sm_cli::reference::{self, Page};

const REMEDY: &str = "run `cargo xtask docs --write`";

#[track_caller]
fn is_up_to_date(directory: &str, pages: Vec<Page>) {
    let directory = Path::new(env!("CARGO_MANIFEST_DIR")).join(directory);
    let mut committed = BTreeMap::new();
    for entry in fs::read_dir(&directory).unwrap() {
        let entry = entry.unwrap();
        let name = entry.file_name().into_string().unwrap();
        committed.insert(name, fs::read_to_string(entry.path()).unwrap());
    }
    assert!(!pages.is_empty());
    for Page { name, text } in pages {
        let found = committed.remove(&name);
        let found = found.unwrap_or_else(|| panic!("{name} is missing: {REMEDY}"));
        for (number, (found, expected)) in (1..).zip(found.lines().zip(text.lines())) {
            assert_eq!(found, expected, "{name}:{number} is out of date: {REMEDY}");
        }
        assert!(found == text, "{name} is out of date: {REMEDY}");
    }
    let left: Vec<_> = committed.keys().collect();
    assert!(left.is_empty(), "{left:?} describe no command: {REMEDY}");
}

#[test]
fn the_reference_is_up_to_date() {
    is_up_to_date("../docs/src/reference", reference::markdown());
}

#[test]
fn the_texts_of_help_are_up_to_date() {
    is_up_to_date("tests/help", reference::help());
}

#[test]
fn the_parsers_commands_are_all_described() {
    let pages = reference::help();
    for name in ["sm", "sm-run", "sm-image-du", "sm-snapshot-prove-distinct"] {
        let name = format!("{name}.txt");
        assert!(pages.iter().any(|page| page.name == name), "{name}");
    }
    let overview = &reference::markdown()[0];
    assert!(overview.text.contains("[`sm run`](run.md)"));
}
