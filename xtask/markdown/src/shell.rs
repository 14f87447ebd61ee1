//! Simple commands of shell scripts, as in examples of documents.
//!
//! The reader splits at operators and resolves quotes. It expands nothing: `$NAME` is
//! unchanged, and a substitution is a word with the text of its own script.

use std::fmt;

/// A program with its arguments.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ShellCommand {
    /// The words without quotes; the first one is the program.
    pub words: Vec<String>,
}

/// An unclosed quote or parenthesis.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Unbalanced(char);

impl fmt::Display for Unbalanced {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} is not closed", self.0)
    }
}

impl std::error::Error for Unbalanced {}

/// Words before a command that are not part of it.
const PREFIXES: [&str; 11] = [
    "!", "do", "else", "elif", "exec", "if", "sudo", "then", "time", "until", "while",
];

/// Returns the simple commands of a script, including those in substitutions.
///
/// # Errors
/// An unclosed quote or parenthesis.
pub fn commands(script: &str) -> Result<Vec<ShellCommand>, Unbalanced> {
    let mut reader = ShellReader {
        rest: script,
        commands: Vec::new(),
        words: Vec::new(),
    };
    reader.script()?;
    Ok(reader.commands)
}

struct ShellReader<'a> {
    rest: &'a str,
    commands: Vec<ShellCommand>,
    words: Vec<String>,
}

impl ShellReader<'_> {
    fn next(&mut self) -> Option<char> {
        let next = self.rest.chars().next()?;
        self.rest = &self.rest[next.len_utf8()..];
        Some(next)
    }

    fn script(&mut self) -> Result<(), Unbalanced> {
        while let Some(next) = self.rest.chars().next() {
            match next {
                ';' | '|' | '\n' | '(' | ')' | '{' | '}' => {
                    self.next();
                    self.end();
                }
                '&' => {
                    self.next();
                    // `&>` redirects both outputs.
                    if !self.rest.starts_with('>') {
                        self.end();
                    }
                }
                ' ' | '\t' => drop(self.next()),
                '#' => {
                    let end = self.rest.find('\n').unwrap_or(self.rest.len());
                    self.rest = &self.rest[end..];
                }
                '<' | '>' => self.redirection()?,
                _ => self.command_word()?,
            }
        }
        self.end();
        Ok(())
    }

    /// Skips the target of a redirection, which is no word of the command.
    fn redirection(&mut self) -> Result<(), Unbalanced> {
        self.rest = self.rest.trim_start_matches(['<', '>', '&', ' ']);
        self.word().map(drop)
    }

    fn command_word(&mut self) -> Result<(), Unbalanced> {
        if let Some(rest) = self.rest.strip_prefix("\\\n") {
            self.rest = rest;
            return Ok(());
        }
        let word = self.word()?;
        // `2>` redirects a descriptor.
        let is_number = !word.is_empty() && word.bytes().all(|byte| byte.is_ascii_digit());
        if !(is_number && self.rest.starts_with(['<', '>'])) {
            self.words.push(word);
        }
        Ok(())
    }

    fn word(&mut self) -> Result<String, Unbalanced> {
        let mut word = String::new();
        while let Some(next) = self.rest.chars().next() {
            match next {
                ' ' | '\t' | '\n' | ';' | '|' | '&' | '(' | ')' | '<' | '>' => break,
                '\'' => {
                    self.next();
                    word.push_str(self.until('\'')?);
                }
                '"' => {
                    self.next();
                    self.double_quoted(&mut word)?;
                }
                '\\' => {
                    self.next();
                    word.extend(self.next().filter(|escaped| *escaped != '\n'));
                }
                '$' => self.dollar(&mut word)?,
                _ => word.extend(self.next()),
            }
        }
        Ok(word)
    }

    fn until(&mut self, end: char) -> Result<&str, Unbalanced> {
        let (text, rest) = self.rest.split_once(end).ok_or(Unbalanced(end))?;
        self.rest = rest;
        Ok(text)
    }

    fn double_quoted(&mut self, word: &mut String) -> Result<(), Unbalanced> {
        loop {
            match self.rest.chars().next().ok_or(Unbalanced('"'))? {
                '"' => {
                    self.next();
                    return Ok(());
                }
                '\\' => {
                    self.next();
                    word.extend(self.next());
                }
                '$' => self.dollar(word)?,
                _ => word.extend(self.next()),
            }
        }
    }

    /// Reads a variable, or the commands of a substitution.
    fn dollar(&mut self, word: &mut String) -> Result<(), Unbalanced> {
        self.next();
        word.push('$');
        if !self.rest.starts_with('(') {
            return Ok(());
        }
        self.next();
        let mut depth = 1;
        let end = self.rest.find(|character| {
            match character {
                '(' => depth += 1,
                ')' => depth -= 1,
                _ => {}
            }
            depth == 0
        });
        let end = end.ok_or(Unbalanced('('))?;
        let (script, rest) = self.rest.split_at(end);
        self.commands.extend(commands(script)?);
        self.rest = rest.strip_prefix(')').unwrap_or(rest);
        Ok(())
    }

    /// Ends a command: its words so far, without prefixes.
    fn end(&mut self) {
        let words = std::mem::take(&mut self.words);
        let words: Vec<String> = words
            .into_iter()
            .skip_while(|word| PREFIXES.contains(&word.as_str()) || is_assignment(word))
            .collect();
        if !words.is_empty() {
            self.commands.push(ShellCommand { words });
        }
    }
}

/// Returns true for `NAME=value` before a command, which sets a variable for it.
fn is_assignment(word: &str) -> bool {
    word.split_once('=').is_some_and(|(name, _)| {
        !name.is_empty()
            && name
                .bytes()
                .all(|byte| byte.is_ascii_alphanumeric() || byte == b'_')
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parsed(script: &str) -> Vec<Vec<String>> {
        let commands = commands(script).unwrap();
        commands.into_iter().map(|command| command.words).collect()
    }

    #[test]
    fn operators_end_commands() {
        for (script, expected) in [
            ("a b; c", &[&["a", "b"][..], &["c"]][..]),
            (
                "a | b -c && d || e & f",
                &[&["a"], &["b", "-c"], &["d"], &["e"], &["f"]],
            ),
            ("a >x 2>&1 <y b", &[&["a", "b"]]),
            ("a &> x; b", &[&["a"], &["b"]]),
            ("a # b; c\nd", &[&["a"], &["d"]]),
            ("a \\\n  b", &[&["a", "b"]]),
            ("(a b)", &[&["a", "b"]]),
            ("", &[]),
        ] {
            assert_eq!(parsed(script), expected, "{script}");
        }
    }

    #[test]
    fn quotes_are_resolved() {
        let line = r#"sm exec x sh -c 'a; "b" | c' "d \" $e" f\ g"#;
        let expected = [
            "sm",
            "exec",
            "x",
            "sh",
            "-c",
            "a; \"b\" | c",
            "d \" $e",
            "f g",
        ];
        assert_eq!(parsed(line), [expected]);
    }

    #[test]
    fn words_before_a_command_are_no_part_of_it() {
        for line in ["A=1 B= sm ps", "sudo sm ps", "if ! sm ps", "time sm ps"] {
            assert_eq!(parsed(line), [["sm", "ps"]], "{line}");
        }
        assert_eq!(
            parsed("while sm ps; do sm rm a; done"),
            [&["sm", "ps"][..], &["sm", "rm", "a"], &["done"]]
        );
    }

    #[test]
    fn substitutions_are_commands_too() {
        let expected = [&["sm", "run", "-d"][..], &["sm", "rm", "$"]];
        assert_eq!(parsed("sm rm \"$(sm run -d)\""), expected);
        assert_eq!(parsed("sm rm $(sm run -d)"), expected);
    }

    #[test]
    fn open_quotes_are_errors() {
        for script in ["a 'b", "a \"b", "a $(b", "a \"$(b\""] {
            assert!(commands(script).is_err(), "{script}");
        }
    }
}
