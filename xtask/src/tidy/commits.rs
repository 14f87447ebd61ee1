//! Titles of commits: `component: imperative verb ...`, at most 72 characters.

use std::path::Path;
use std::process::Stdio;

use crate::cmd;

/// Last commit before the rule.
const SINCE: &str = "fd31d7fb95724ca5ef58170a916523d22ed52b08";
/// Most characters of a title.
const MAX_CHARACTERS: usize = 72;

/// Returns the titles in the history of `root` that violate the rule. A copy without the
/// history since the rule, such as an archive or a shallow clone, is not checked.
pub(super) fn check(root: &Path) -> Vec<String> {
    let range = format!("{SINCE}..HEAD");
    let mut git = cmd::command("git", ["log", "--no-merges", "--format=%h %s", &range]);
    let log = git.current_dir(root).stderr(Stdio::null()).output();
    match log {
        Ok(log) if log.status.success() => faults(&String::from_utf8_lossy(&log.stdout)),
        _ => {
            cmd::note("titles of commits are not checked: the history is not there");
            Vec::new()
        }
    }
}

/// Returns the violations in lines of an abbreviated hash and a title.
fn faults(log: &str) -> Vec<String> {
    log.lines()
        .filter_map(|line| line.split_once(' '))
        .filter_map(|(hash, title)| {
            let why = fault(title)?;
            Some(format!("commit {hash}: \"{title}\": {why}"))
        })
        .collect()
}

fn fault(title: &str) -> Option<String> {
    let characters = title.chars().count();
    if characters > MAX_CHARACTERS {
        return Some(format!(
            "it has {characters} characters, more than {MAX_CHARACTERS}"
        ));
    }
    let component = title.split_once(": ").map(|(component, _)| component);
    let is_component = component.is_some_and(|component| {
        let mut bytes = component.bytes();
        bytes.next().is_some_and(|byte| byte.is_ascii_lowercase())
            && bytes.all(|byte| {
                byte.is_ascii_lowercase() || byte.is_ascii_digit() || b"-_/., ".contains(&byte)
            })
    });
    (!is_component).then(|| "it does not start with a component and a colon".to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn titles_are_a_component_and_a_short_sentence() {
        for title in [
            "runtime: resolve links",
            "devices-vsock, virtio: rename a queue",
            &format!("a: {}", "x".repeat(69)),
        ] {
            assert_eq!(fault(title), None, "{title}");
        }
        for title in [
            "Resolve links",
            "Runtime: resolve links",
            "resolve: ",
            "runtime:resolve",
            "runtime (vmm): resolve",
            &format!("a: {}", "x".repeat(70)),
        ] {
            let stripped = title.trim_end();
            assert!(fault(stripped).is_some(), "{title}");
        }
    }

    #[test]
    fn faults_name_the_commit() {
        assert_eq!(
            faults("abc1234 a: b\ndef5678 No component\n"),
            [
                "commit def5678: \"No component\": it does not start with a component and a \
                 colon"
            ]
        );
    }

    #[test]
    fn a_copy_without_history_is_not_checked() {
        let copy = tempfile::tempdir().unwrap();
        assert_eq!(check(copy.path()), [""; 0]);
    }
}
