//! Pages whose commands are run in order.
#![expect(
    clippy::unwrap_used,
    clippy::expect_used,
    reason = "a failed expectation is a failed test"
)]

use std::os::unix::fs::symlink;
use std::path::Path;
use std::process::Command;

use sm_e2e::{Done, Home, binary};
use sm_markdown::{Prompt, blocks, prompts};

/// Commands that are not run, with the reason.
const LEFT_OUT: [(&str, &str); 4] = [
    ("cargo ", "the source tree is built already"),
    ("docker ", "there is no Docker here"),
    ("logs -f", "it runs until it is interrupted"),
    ("registry.example", "there is no such registry"),
];
/// Commands with an exit status other than 0.
const STATUSES: [(&str, i32); 1] = [("sm snapshot diff", 1)];

/// A user with `sm` in the search path, in a directory with the images that pages name.
struct User {
    home: Home,
    directory: tempfile::TempDir,
    /// The directory of images, which is `/images` on pages.
    images: String,
}

impl User {
    fn new() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let fixtures = std::env::var_os("SM_FIXTURES").expect("SM_FIXTURES is set");
        let fixtures = Path::new(&fixtures).canonicalize().unwrap();
        for image in ["busybox", "debian", "python"] {
            let fixture = fixtures.join(image);
            symlink(fixture, directory.path().join(image)).unwrap();
        }
        std::fs::create_dir(directory.path().join("bin")).unwrap();
        symlink(binary(), directory.path().join("bin/sm")).unwrap();
        Self {
            home: Home::new(),
            directory,
            images: fixtures.to_str().unwrap().to_owned(),
        }
    }

    /// Runs a script with standard error merged into its output.
    fn run(&self, script: &str) -> Done {
        let path = std::env::var("PATH").unwrap_or_default();
        let path = format!("{}/bin:{path}", self.directory.path().display());
        let mut shell = Command::new("sh");
        shell
            .args(["-c", &format!("exec 2>&1\n{script}")])
            .current_dir(self.directory.path())
            .env("PATH", path);
        for (name, value) in self.home.command::<&str>(&[]).get_envs() {
            shell.env(name, value.unwrap_or_default());
        }
        shell.output().unwrap().into()
    }

    #[track_caller]
    fn prompt(&self, prompt: &Prompt) {
        let Prompt { typed, output } = prompt;
        if let Some((_, why)) = LEFT_OUT.iter().find(|(words, _)| typed.contains(words)) {
            eprintln!("$ {typed}\n(left out: {why})");
            return;
        }
        let status = STATUSES.iter().find(|(words, _)| typed.starts_with(words));
        let done = self
            .run(typed)
            .exits(status.map_or(0, |(_, status)| *status));
        let printed = done.out().replace(&self.images, "/images");
        eprintln!("$ {typed}\n{printed}");
        // Lines may be in any order, among others: tables are sorted by time.
        let lines: Vec<_> = printed.lines().map(general).collect();
        for expected in output.iter().map(|line| general(line)) {
            let found = lines.contains(&expected);
            assert!(
                found,
                "no {expected:?} in the output of {typed:?}:\n{printed}"
            );
        }
    }

    /// Runs all blocks of shell on a page.
    #[track_caller]
    fn read(&self, page: &str) {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("..").join(page);
        let page = std::fs::read_to_string(path).unwrap();
        let mut count = 0;
        for block in blocks(&page) {
            match block.language() {
                "console" => {
                    let prompts = prompts(&block.text);
                    count += prompts.len();
                    prompts.iter().for_each(|prompt| self.prompt(prompt));
                }
                "sh" => {
                    count += 1;
                    self.run(&format!("set -ex\n{}", block.text)).exits(0);
                }
                _ => {}
            }
        }
        assert!(count > 10, "{count} commands");
    }
}

impl Drop for User {
    fn drop(&mut self) {
        self.run("sm ps -q | xargs -r sm rm -f");
    }
}

/// Removes the differences between runs from a line: numbers, identifiers, units, white
/// space.
fn general(line: &str) -> String {
    let is_number = |character: char| character.is_ascii_hexdigit() || "-.".contains(character);
    let words = line.split_whitespace().map(|word| {
        let (mut text, mut rest) = (String::new(), word);
        while let Some(first) = rest.chars().next() {
            let end = rest.find(|c| is_number(c) != is_number(first));
            let (part, after) = rest.split_at(end.unwrap_or(rest.len()));
            let has_digit = part.bytes().any(|byte| byte.is_ascii_digit());
            text.push_str(if has_digit { "#" } else { part });
            rest = after;
        }
        match text.as_str() {
            "KiB" | "MiB" | "GiB" => "B".to_owned(),
            "second" | "seconds" | "minute" | "minutes" => "time".to_owned(),
            _ => text,
        }
    });
    words.collect::<Vec<_>>().join(" ")
}

#[test]
fn numbers_and_identifiers_are_generalised() {
    assert_eq!(
        general("warm   3.5 MiB  1 second ago 127.0.0.1:43139"),
        general("warm 4 B 12 seconds ago 127.0.0.1:1")
    );
    assert_ne!(general("warm"), general("cold"));
    assert_eq!(
        general("base-512m-1c-cf95d86e"),
        general("base-256m-4c-01234567")
    );
}

#[test]
fn the_commands_of_readme_work() {
    User::new().read("README.md");
}

#[test]
fn the_commands_of_the_quick_start_work() {
    User::new().read("docs/src/quick-start.md");
}

/// The image on the page is replaced by busybox, in a guest.
#[test]
fn the_commands_of_the_snapshots_page_work() {
    let user = User::new();
    let make = "cd /bin; for name in app-ready app-job; do echo \"#!/bin/sh\" >$name; chmod +x $name; \
                done; tar -c -C / bin";
    let tick = "CMD [\"/bin/sh\", \"-c\", \"while :; do echo tick; sleep 1; done\"]";
    user.run(&format!(
        "set -e\nsm run --rm oci:busybox sh -c '{make}' > app.tar\n\
         sm import -c '{tick}' app.tar app:dev"
    ))
    .exits(0);
    user.read("docs/src/snapshots.md");
}
