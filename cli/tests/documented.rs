//! The commands of `sm` in documents must parse.
#![expect(clippy::unwrap_used, reason = "a failed expectation is a failed test")]

use std::fs;
use std::path::{Path, PathBuf};

use clap::Command;
use clap::error::ErrorKind;
use sm_markdown::{block_commands, blocks, code_spans};

struct Document {
    name: String,
    text: String,
}

/// Returns the documents of the repository, except generated ones.
fn documents() -> Vec<Document> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap();
    let mut paths: Vec<PathBuf> = vec![root.to_owned()];
    let mut documents = Vec::new();
    while let Some(path) = paths.pop() {
        let name = path.file_name().unwrap().to_string_lossy();
        if path.is_dir() {
            if path != root && (name.starts_with('.') || name == "target" || name == "reference") {
                continue;
            }
            paths.extend(
                fs::read_dir(&path)
                    .unwrap()
                    .map(|entry| entry.unwrap().path()),
            );
        } else if name.ends_with(".md") {
            documents.push(Document {
                name: path.strip_prefix(root).unwrap().display().to_string(),
                text: fs::read_to_string(&path).unwrap(),
            });
        }
    }
    documents
}

/// Returns the reason why `sm` does not accept a line. Requests for help or the version
/// are accepted.
fn refused(words: &[String]) -> Option<String> {
    let error = sm_cli::check(words).err()?;
    let asked = matches!(
        error.kind(),
        ErrorKind::DisplayHelp | ErrorKind::DisplayVersion
    );
    (!asked).then(|| error.to_string())
}

#[test]
fn commands_in_blocks_of_shell_are_accepted() {
    let (mut faults, mut count) = (Vec::new(), 0);
    for document in documents() {
        for block in blocks(&document.text) {
            let place = format!("{}:{}", document.name, block.line);
            match block.unchecked() {
                None => {}
                Some("") => {
                    faults.push(format!("{place}: write \"unchecked: REASON\""));
                    continue;
                }
                Some(_) => continue,
            }
            let commands = match block_commands(&block) {
                Ok(commands) => commands,
                Err(error) => {
                    faults.push(format!("{place}: {error}"));
                    continue;
                }
            };
            for command in commands {
                let program = Path::new(&command.words[0]);
                if program.file_name().is_some_and(|name| name == "sm") {
                    count += 1;
                    let why = refused(&command.words);
                    faults.extend(why.map(|why| format!("{place}: {:?}: {why}", command.words)));
                }
            }
        }
    }
    assert!(faults.is_empty(), "{}", faults.join("\n"));
    assert!(count > 100, "only {count} commands were found");
}

/// In a sentence, arguments may be missing; commands and options must exist.
#[test]
fn commands_in_sentences_exist() {
    let (mut faults, mut count) = (Vec::new(), 0);
    for document in documents() {
        // The changelog describes the past.
        if document.name == "CHANGELOG.md" {
            continue;
        }
        for (line, span) in code_spans(&document.text) {
            let Ok(commands) = sm_markdown::commands(span) else {
                continue;
            };
            for command in commands.iter().filter(|command| command.words[0] == "sm") {
                count += 1;
                let why = unknown(&sm_cli::command(), &command.words[1..]);
                faults.extend(why.map(|why| format!("{}:{line}: `{span}`: {why}", document.name)));
            }
        }
    }
    assert!(faults.is_empty(), "{}", faults.join("\n"));
    assert!(count > 50, "only {count} commands were found");
}

/// Returns the first unknown command or option. `ls|rm` stands for either command.
fn unknown(root: &Command, words: &[String]) -> Option<String> {
    let mut root = root.clone();
    root.build();
    let mut commands = vec![&root];
    for word in words {
        if word == "--" || word.starts_with("...") || word.starts_with('…') {
            return None;
        }
        for command in &commands {
            let missing = match word.strip_prefix('-') {
                Some(option) => !has_option(command, option),
                None => command.has_subcommands() && alternatives(command, word).is_none(),
            };
            if missing {
                return Some(format!("\"{}\" has no {word}", command.get_name()));
            }
        }
        let is_argument = !word.starts_with('-') && commands.iter().all(|c| !c.has_subcommands());
        // Words after the image or the VM belong to another command.
        let of_another = |command: &&Command| ["run", "exec"].contains(&command.get_name());
        if is_argument && commands.iter().any(of_another) {
            return None;
        }
        let next = commands
            .iter()
            .filter_map(|command| alternatives(command, word));
        let next: Vec<&Command> = next.flatten().collect();
        if !next.is_empty() {
            commands = next;
        }
    }
    None
}

fn alternatives<'a>(command: &'a Command, word: &str) -> Option<Vec<&'a Command>> {
    let words = word.split('|');
    words.map(|word| command.find_subcommand(word)).collect()
}

/// `option` has lost its first dash.
fn has_option(command: &Command, option: &str) -> bool {
    let mut arguments = command.get_arguments();
    match option.strip_prefix('-') {
        Some(long) => {
            let name = long.split('=').next().unwrap_or_default();
            arguments.any(|argument| argument.get_long() == Some(name))
        }
        None => {
            let name = option.chars().next();
            name.is_none() || arguments.any(|argument| argument.get_short() == name)
        }
    }
}

/// The page for users of Docker is right about the options that exist.
#[test]
fn options_of_docker_exist_as_documented() {
    let page = Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/src/docker.md");
    let page = fs::read_to_string(page).unwrap();
    let (_, table) = page.split_once("## Options of `docker run`").unwrap();
    let (table, _) = table.split_once("\n## ").unwrap();
    let root = sm_cli::command();
    let run = root.find_subcommand("run").unwrap();
    let mut counts = [0, 0];
    for row in table.lines().filter(|line| line.starts_with("| `")) {
        let mut cells = row.trim_matches('|').split('|').map(str::trim);
        let (options, meaning) = (cells.next().unwrap(), cells.next().unwrap());
        let there = match meaning {
            "the same" => true,
            "not supported" => false,
            _ => continue,
        };
        for (_, option) in code_spans(options) {
            let found = has_option(run, option.strip_prefix('-').unwrap());
            assert_eq!(found, there, "{option}: {meaning}");
            counts[usize::from(there)] += 1;
        }
    }
    assert!(counts[0] > 2 && counts[1] > 15, "{counts:?}");
}

#[test]
fn commands_and_options_that_do_not_exist_are_found() {
    let unknown = |line: &str| {
        let words: Vec<String> = line.split(' ').map(str::to_owned).collect();
        unknown(&sm_cli::command(), &words)
    };
    for line in [
        "ps -a --json",
        "image ls|rm --help",
        "run -d IMAGE --no-such",
        "exec -i VM tar -x",
        "import - app:dev",
        "snapshot ...",
    ] {
        assert_eq!(unknown(line), None, "{line}");
    }
    for line in [
        "fly",
        "ps --bold",
        "image ls|fly",
        "run -y IMAGE",
        "image ls|rm --json",
    ] {
        assert!(unknown(line).is_some(), "{line}");
    }
}
