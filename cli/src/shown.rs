//! Escapes foreign text for a terminal: images, guests and registries choose parts of the
//! output of `sm`, and must not control the terminal.

use std::fmt::{self, Display, Write};
use std::io;

/// Returns true if a terminal or a reader could interpret the character as something
/// other than text: C0 and C1 controls, DEL, and controls of the writing direction.
fn is_control(character: char) -> bool {
    character.is_control()
        || matches!(
            character,
            '\u{61c}' | '\u{200e}' | '\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2066}'..='\u{2069}'
        )
}

/// Displays text with control characters escaped, except line feeds and tabs.
pub(crate) struct Shown<T>(pub(crate) T);

impl<T: Display> Display for Shown<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            Escaping {
                to: f,
                keep: "\n\t"
            },
            "{}",
            self.0
        )
    }
}

/// Displays text with all control characters escaped, so that it stays in its line and
/// column.
pub(crate) struct ShownInline<T>(pub(crate) T);

impl<T: Display> Display for ShownInline<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(Escaping { to: f, keep: "" }, "{}", self.0)
    }
}

struct Escaping<'a, 'b> {
    to: &'a mut fmt::Formatter<'b>,
    keep: &'static str,
}

impl fmt::Write for Escaping<'_, '_> {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        for character in text.chars() {
            if is_control(character) && !self.keep.contains(character) {
                write!(self.to, "{}", character.escape_default())?;
            } else {
                self.to.write_char(character)?;
            }
        }
        Ok(())
    }
}

/// Escapes control characters that JSON allows in strings (U+007F and above), by the
/// rules of JSON.
pub(crate) fn json(text: &str) -> String {
    let mut shown = String::with_capacity(text.len());
    for character in text.chars() {
        // Those below U+007F are already escaped, or are white space of JSON.
        if character >= '\u{7f}' && is_control(character) {
            // All of them are in the basic multilingual plane.
            shown.push_str(&format!("\\u{:04x}", u32::from(character)));
        } else {
            shown.push(character);
        }
    }
    shown
}

/// Standard error for log lines, which can quote foreign text. Each write is one line.
#[derive(Debug, Default)]
pub(crate) struct LogLines;

impl io::Write for LogLines {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let text = String::from_utf8_lossy(bytes);
        io::stderr().write_all(Shown(text).to_string().as_bytes())?;
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const HOSTILE: &str = "a\u{1b}[2J\r\u{7}\u{7f}\u{9b}\u{202e}\u{2066}ü\n\tb\\n";

    #[test]
    fn controls_are_escaped_and_text_is_not() {
        let escaped = "a\\u{1b}[2J\\r\\u{7}\\u{7f}\\u{9b}\\u{202e}\\u{2066}ü";
        assert_eq!(Shown(HOSTILE).to_string(), format!("{escaped}\n\tb\\n"));
        let inline = ShownInline(HOSTILE).to_string();
        assert_eq!(inline, format!("{escaped}\\n\\tb\\n"));
        // Escaping is idempotent: escaped text is text.
        assert_eq!(
            Shown(Shown(HOSTILE)).to_string(),
            Shown(HOSTILE).to_string()
        );
    }

    #[test]
    fn json_keeps_its_meaning() {
        let text = serde_json::to_string_pretty(&[HOSTILE]).unwrap();
        let shown = json(&text);
        assert!(
            !shown.chars().any(|c| is_control(c) && c != '\n'),
            "{shown}"
        );
        let read: Vec<String> = serde_json::from_str(&shown).unwrap();
        assert_eq!(read, [HOSTILE]);
    }
}
