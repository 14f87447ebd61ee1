//! The reference manual: pages in Markdown and the texts of `--help`, from the definition
//! of the command line.

use std::fmt::Write as _;

use clap::{Arg, Command};

/// Width of the texts of `--help`, which is their maximum width in a terminal.
const WIDTH: usize = 100;

/// A generated file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Page {
    /// The file's name.
    pub name: String,
    /// Its contents.
    pub text: String,
}

/// Returns the manual in Markdown: `sm.md` with all commands, and a page for each of
/// them, including its subcommands.
pub fn markdown() -> Vec<Page> {
    let root = built();
    let mut pages = vec![Page {
        name: "sm.md".to_owned(),
        text: overview(&root),
    }];
    pages.extend(children(&root).map(|command| Page {
        name: page_name(command),
        text: page(command),
    }));
    pages
}

/// Returns the texts that `--help` prints, for `sm` and every command below it.
pub fn help() -> Vec<Page> {
    let mut pages = Vec::new();
    collect_help(&built(), &mut Vec::new(), &mut pages);
    pages
}

fn built() -> Command {
    let mut root = crate::command();
    root.build();
    root
}

/// Returns the visible subcommands.
fn children(command: &Command) -> impl Iterator<Item = &Command> {
    let shown = |child: &&Command| !child.is_hide_set() && child.get_name() != "help";
    command.get_subcommands().filter(shown)
}

fn collect_help(command: &Command, path: &mut Vec<String>, pages: &mut Vec<Page>) {
    path.push(command.get_name().to_owned());
    let line = path.iter().map(String::as_str).chain(["--help"]);
    let parsed = crate::command()
        .term_width(WIDTH)
        .try_get_matches_from(line);
    if let Err(help) = parsed {
        pages.push(Page {
            name: format!("{}.txt", path.join("-")),
            text: help.render().to_string(),
        });
    }
    for child in children(command) {
        collect_help(child, path, pages);
    }
    path.pop();
}

fn page_name(command: &Command) -> String {
    format!("{}.md", command.get_name())
}

fn overview(root: &Command) -> String {
    let mut text = String::new();
    heading(&mut text, root, 1);
    text.push_str("\n| command | |\n|---|---|\n");
    for command in children(root) {
        let (name, about) = (command.get_name(), about(command));
        let _ = writeln!(text, "| [`sm {name}`]({}) | {about} |", page_name(command));
    }
    text.push_str("\nEvery command has `-h` and `--help`.\n");
    options(&mut text, root, 2, |argument| argument.is_global_set());
    text
}

fn page(command: &Command) -> String {
    let mut text = String::new();
    section(&mut text, command, 1);
    text
}

fn section(text: &mut String, command: &Command, level: usize) {
    heading(text, command, level);
    arguments(text, command, level + 1);
    options(text, command, level + 1, |argument| {
        !argument.is_global_set() && !is_everywhere(argument)
    });
    for child in children(command) {
        text.push('\n');
        section(text, child, level + 1);
    }
}

/// Returns true for options that every command has.
fn is_everywhere(argument: &Arg) -> bool {
    ["help", "version"].contains(&argument.get_id().as_str())
}

fn heading(text: &mut String, command: &Command, level: usize) {
    let name = command.get_bin_name().unwrap_or_else(|| command.get_name());
    let _ = writeln!(text, "{} {name}\n", "#".repeat(level));
    let _ = writeln!(text, "{}.", about(command));
    let usage = command.clone().render_usage().to_string();
    let usage = usage.trim_start_matches("Usage:").trim();
    let _ = writeln!(text, "\n```text\n{usage}\n```");
}

fn arguments(text: &mut String, command: &Command, level: usize) {
    let shown: Vec<&Arg> = command.get_positionals().filter(is_shown).collect();
    if shown.is_empty() {
        return;
    }
    let _ = writeln!(text, "\n{} Arguments\n", "#".repeat(level));
    for argument in shown {
        let names = argument.get_value_names().unwrap_or_default();
        let names: Vec<&str> = names.iter().map(|name| name.as_str()).collect();
        let _ = writeln!(text, "- `{}`: {}", names.join(" "), described(argument));
    }
}

fn options(text: &mut String, command: &Command, level: usize, wanted: impl Fn(&Arg) -> bool) {
    let options = command.get_opts().chain(flags(command));
    let mut shown: Vec<&Arg> = options
        .filter(|argument| is_shown(argument) && wanted(argument))
        .collect();
    if shown.is_empty() {
        return;
    }
    shown.sort_by_key(|argument| {
        let name = argument.get_long().map(str::to_owned);
        name.or_else(|| argument.get_short().map(String::from))
    });
    let _ = writeln!(text, "\n{} Options\n", "#".repeat(level));
    for argument in shown {
        let _ = writeln!(text, "- {}: {}", spelled(argument), described(argument));
    }
}

/// Returns the options without a value.
fn flags(command: &Command) -> impl Iterator<Item = &Arg> {
    let arguments = command.get_arguments();
    arguments.filter(|argument| !argument.is_positional() && !argument.get_action().takes_values())
}

#[expect(
    clippy::trivially_copy_pass_by_ref,
    reason = "the signature is that of an iterator's filter"
)]
fn is_shown(argument: &&Arg) -> bool {
    !argument.is_hide_set()
}

/// Returns `-m`, `--memory <SIZE>`.
fn spelled(argument: &Arg) -> String {
    let value = match argument.get_value_names() {
        Some([name]) if argument.get_action().takes_values() => format!(" <{name}>"),
        _ => String::new(),
    };
    match (argument.get_short(), argument.get_long()) {
        (Some(short), Some(long)) => format!("`-{short}`, `--{long}{value}`"),
        (None, Some(long)) => format!("`--{long}{value}`"),
        (Some(short), None) => format!("`-{short}{value}`"),
        (None, None) => format!("`{}`", argument.get_id()),
    }
}

/// Returns the help of an argument with its values and its default.
fn described(argument: &Arg) -> String {
    let help = argument.get_help().map(ToString::to_string);
    let mut text = escaped(&help.unwrap_or_default());
    let values = argument.get_possible_values();
    let values: Vec<String> = values
        .iter()
        .filter(|value| !value.is_hide_set() && argument.get_action().takes_values())
        .map(|value| match value.get_help() {
            Some(help) => format!("`{}` ({help})", value.get_name()),
            None => format!("`{}`", value.get_name()),
        })
        .collect();
    if !values.is_empty() {
        let _ = write!(text, "; one of {}", values.join(", "));
    }
    let defaults = argument.get_default_values();
    if let [default] = defaults
        && !argument.is_hide_default_value_set()
        && argument.get_action().takes_values()
    {
        let _ = write!(text, " [default: `{}`]", default.to_string_lossy());
    }
    text
}

fn about(command: &Command) -> String {
    let about = command.get_about().map(ToString::to_string);
    escaped(about.unwrap_or_default().trim_end_matches('.'))
}

/// Escapes the special characters of Markdown.
fn escaped(text: &str) -> String {
    let mut escaped = String::new();
    for character in text.chars() {
        if ['<', '>', '*', '|', '[', ']', '_', '`'].contains(&character) {
            escaped.push('\\');
        }
        escaped.push(character);
    }
    escaped
}
