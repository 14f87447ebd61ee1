//! Text that an image chose, in the output of commands: it reaches the terminal escaped,
//! in tables, in documents, and in errors.
#![expect(clippy::unwrap_used, reason = "a failed expectation is a failed test")]

mod common;

use std::io::Write as _;
use std::process::{Output, Stdio};

/// Sets the clipboard, clears the screen, starts a line, and does the same by C1 controls
/// and by the byte of a deleted character.
const HOSTILE: &str = "a\u{1b}]52;c;eA==\u{7}\u{1b}[2J\r\n\u{9b}2J\u{7f}z";

struct Home(tempfile::TempDir);

impl Home {
    fn sm(&self, arguments: &[&str], input: &[u8]) -> Output {
        let mut command = common::sm(self.0.path(), arguments);
        let pipes = command.stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut child = pipes.stderr(Stdio::piped()).spawn().unwrap();
        child.stdin.take().unwrap().write_all(input).unwrap();
        child.wait_with_output().unwrap()
    }
}

#[track_caller]
fn is_escaped(output: &Output) {
    for stream in [&output.stdout, &output.stderr] {
        let text = String::from_utf8(stream.clone()).unwrap();
        let control = text.chars().find(|c| c.is_control() && *c != '\n');
        assert_eq!(control, None, "{text:?}");
    }
}

#[test]
fn an_image_cannot_control_the_terminal() {
    let home = Home(tempfile::tempdir().unwrap());
    let label = format!("LABEL hostile={HOSTILE}");
    let command = format!("CMD [\"{}\"]", "\\u001b[2J\\u009b");
    let import = [
        "import", "-m", HOSTILE, "-c", &label, "-c", &command, "-", "mine:1",
    ];
    // The end of an archive without entries.
    let imported = home.sm(&import, &[0; 1024]);
    assert!(imported.status.success(), "{imported:?}");
    is_escaped(&imported);
    for arguments in [
        &["history", "--no-trunc", "mine:1"][..],
        &["history", "--json", "mine:1"],
        &["image", "inspect", "mine:1"],
        &["images"],
    ] {
        let shown = home.sm(arguments, b"");
        assert!(shown.status.success(), "{shown:?}");
        is_escaped(&shown);
    }
    let history = home.sm(&["history", "--no-trunc", "mine:1"], b"");
    let text = String::from_utf8(history.stdout).unwrap();
    assert_eq!(text.lines().count(), 2, "a new line begins a row: {text}");
    assert!(text.contains("52;c;eA==") && text.contains('z'), "{text}");

    let unknown = home.sm(&["history", HOSTILE], b"");
    assert_eq!(unknown.status.code(), Some(1));
    is_escaped(&unknown);
}
