//! Text of others on a terminal: images, guests and registries choose some of what
//! `sm` prints, and must not control the terminal by it.

use std::fmt::{self, Display, Write};
use std::io;

/// Whether a terminal, or whoever reads it, could take the character for something
/// else than text: C0 and C1 controls, DEL, and controls of the direction of writing.
fn is_control(character: char) -> bool {
    character.is_control()
        || matches!(
            character,
            '\u{61c}' | '\u{200e}' | '\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2066}'..='\u{2069}'
        )
}

/// Displays text with control characters escaped, but for the ends of lines and tabs.
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

/// Displays text with all control characters escaped, so that it stays on its line
/// and in its column.
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

/// JSON with the control characters that it may contain as they are (U+007F and
/// above) escaped by its own rules.
pub(crate) fn json(text: &str) -> String {
    let mut shown = String::with_capacity(text.len());
    for character in text.chars() {
        // Those below U+007F are escaped already, or are JSON's own white space.
        if character >= '\u{7f}' && is_control(character) {
            // All of them are in the basic plane.
            shown.push_str(&format!("\\u{:04x}", u32::from(character)));
        } else {
            shown.push(character);
        }
    }
    shown
}

/// Standard error for log lines, which can quote anybody. Each write is one line.
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
        // Once is enough: what has been escaped before is text.
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
