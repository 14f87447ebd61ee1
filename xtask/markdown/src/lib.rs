//! The parts of Markdown documents that can be checked: headings with their anchors,
//! links, fenced blocks, and the commands in blocks of shell.
//!
//! `cargo xtask tidy` follows the links and parses the commands of `cargo xtask`; tests
//! of `sm-cli` parse the commands of `sm`. This reads the Markdown that the documents
//! of this repository use, not all of CommonMark: fences of backticks, headings with
//! `#`, inline links.

mod inline;
mod lines;
mod shell;

pub use inline::{MarkdownLink, code_spans, includes, links};
pub use lines::{MarkdownBlock, anchors, blocks};
pub use shell::{ShellCommand, Unbalanced, commands};

/// Returns the commands of a fenced block: those after a `$` in a block of `console`, all
/// of a block of `sh`, and none of others.
///
/// # Errors
/// An unclosed quote or parenthesis.
pub fn block_commands(block: &MarkdownBlock) -> Result<Vec<ShellCommand>, Unbalanced> {
    match block.language() {
        "sh" => commands(&block.text),
        "console" => {
            let mut found = Vec::new();
            for prompt in prompts(&block.text) {
                found.extend(commands(&prompt.typed)?);
            }
            Ok(found)
        }
        _ => Ok(Vec::new()),
    }
}

/// A prompt of a console.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Prompt {
    /// The typed script. A line that ends with a backslash continues in the next.
    pub typed: String,
    /// The printed lines.
    pub output: Vec<String>,
}

/// Returns the prompts in a block of `console`.
pub fn prompts(text: &str) -> Vec<Prompt> {
    let mut prompts: Vec<Prompt> = Vec::new();
    let mut continues = false;
    for line in text.lines() {
        if let Some(typed) = line.strip_prefix("$ ") {
            prompts.push(Prompt {
                typed: typed.to_owned(),
                output: Vec::new(),
            });
        } else if let Some(prompt) = prompts.last_mut() {
            if continues {
                prompt.typed.push('\n');
                prompt.typed.push_str(line);
            } else {
                prompt.output.push(line.to_owned());
                continue;
            }
        }
        continues = line.ends_with('\\');
    }
    prompts
}

#[cfg(test)]
mod tests {
    use super::*;

    fn block(info: &str, text: &str) -> MarkdownBlock {
        MarkdownBlock {
            info: info.to_owned(),
            line: 1,
            text: text.to_owned(),
        }
    }

    fn programs(block: &MarkdownBlock) -> Vec<String> {
        let commands = block_commands(block).unwrap();
        commands
            .into_iter()
            .map(|command| command.words.join(" "))
            .collect()
    }

    #[test]
    fn a_console_has_prompts_and_output() {
        let text = "$ sm ps\nID  NAME\n$ sm run \\\n    --rm x\n$ sm rm a; sm rm b\n";
        let expected = ["sm ps", "sm run --rm x", "sm rm a", "sm rm b"];
        assert_eq!(programs(&block("console", text)), expected);
        assert_eq!(programs(&block("console unchecked: x", text)), expected);
        assert_eq!(programs(&block("text", text)), [""; 0]);
        let output: Vec<_> = prompts(text).into_iter().map(|p| p.output).collect();
        assert_eq!(output, [&["ID  NAME"][..], &[], &[]]);
    }

    #[test]
    fn a_script_is_all_commands() {
        assert_eq!(
            programs(&block("sh", "sm ps # x\n\nsm rm a")),
            ["sm ps", "sm rm a"]
        );
    }

    #[test]
    fn a_reason_is_part_of_the_mark() {
        assert_eq!(block("sh", "").unchecked(), None);
        let marked = block("console unchecked: other program", "");
        assert_eq!(marked.unchecked(), Some("other program"));
        assert_eq!(block("console unchecked", "").unchecked(), Some(""));
    }
}
