//! Docker's exit statuses, as a table.

use crate::fake::{User, text};

/// Command lines, and their statuses if no object of that name exists.
const TABLE: &[(&str, i32)] = &[
    // Docker: 125 for `run` and for invalid options.
    ("run oci:nowhere", 125),
    ("run --from nothing", 125),
    ("run --frobnicate x", 125),
    ("run -m 1k oci:nowhere", 125),
    ("ps --frobnicate", 125),
    ("logs --since yesterday x", 125),
    // Docker: 1 for everything else.
    ("frobnicate", 1),
    ("run", 1),
    ("exec x", 1),
    ("stop", 1),
    ("exec nobody true", 1),
    ("exec -it nobody sh", 1),
    ("attach nobody", 1),
    ("port nobody", 1),
    ("logs nobody", 1),
    ("logs -f nobody", 1),
    ("logs --console nobody", 1),
    ("stop nobody", 1),
    ("kill nobody", 1),
    ("kill -s NOSIG nobody", 1),
    ("pause nobody", 1),
    ("unpause nobody", 1),
    ("wait nobody", 1),
    ("rm nobody", 1),
    ("rm -f nobody", 1),
    ("inspect nobody", 1),
    ("stats nobody", 1),
    ("reset nobody", 1),
    ("fork nobody", 1),
    ("rmi nothing", 1),
    ("tag nothing other", 1),
    ("history nothing", 1),
    ("save -o file nothing", 1),
    ("load -i nothing", 1),
    ("import nothing", 1),
    ("push nothing", 1),
    ("pull oci:nowhere", 1),
    ("image inspect nothing", 1),
    ("image verify nothing", 1),
    ("snapshot create nobody name", 1),
    ("snapshot rm nothing", 1),
    ("snapshot inspect nothing", 1),
    ("snapshot verify nothing", 1),
    ("kernel use nowhere", 1),
    // 0 for commands without an error.
    ("ps", 0),
    ("images", 0),
    ("snapshot ls", 0),
    ("--help", 0),
    ("run --help", 0),
    ("version", 0),
];

#[test]
fn statuses_are_dockers() {
    let user = User::new();
    let mut wrong = Vec::new();
    for (line, status) in TABLE {
        let words: Vec<&str> = line.split(' ').collect();
        let done = user.sm(&words);
        if done.status.code() != Some(*status) {
            wrong.push(format!("{line}: {:?}: {}", done.status, text(&done.stderr)));
        }
        assert!(
            *status == 0 || !done.stderr.is_empty(),
            "{line}: not a word"
        );
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

/// No hint that an option which does not exist could be passed as a value.
#[test]
fn an_unknown_option_is_named_and_the_help_is_pointed_at() {
    let done = User::new().sm(&["run", "--restrat", "always", "busybox"]);
    assert_eq!(done.status.code(), Some(125));
    let said = text(&done.stderr);
    assert!(
        said.contains("'--restrat'") && said.contains("--help"),
        "{said}"
    );
    assert!(!said.contains("-- --restrat"), "{said}");
    assert!(!said.contains("\n\n\n"), "{said:?}");
    // Other tips stay: the option exists, but not here.
    let done = User::new().sm(&["--detach", "run", "busybox"]);
    let said = text(&done.stderr);
    assert!(said.contains("'run --detach' exists"), "{said}");
}
