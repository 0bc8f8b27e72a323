//! Text that a peer sent, where it stands in an error, an answer or a log line: cut, so that a message stays a message, and
//! with control characters escaped, so that no peer writes a line of its own into a log.

use std::fmt::{self, Write};

/// Characters that are shown of a peer's text.
pub const LONGEST: usize = 200;

/// Shows at most [`LONGEST`] characters, and each control character as Rust writes it: `\\n`, `\\u{1b}`.
#[derive(Clone, Copy, Debug)]
pub struct PeerText<'t>(pub &'t str);

impl fmt::Display for PeerText<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut characters = self.0.chars();
        for character in characters.by_ref().take(LONGEST) {
            if breaks_lines(character) {
                write!(f, "{}", character.escape_default())?;
            } else {
                f.write_char(character)?;
            }
        }
        if characters.next().is_some() { f.write_char('\u{2026}') } else { Ok(()) }
    }
}

/// What a terminal or a reader of lines may act on.
pub fn breaks_lines(character: char) -> bool {
    character.is_control()
        || matches!(character, '\u{2028}' | '\u{2029}' | '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}')
}

/// At most [`LONGEST`] characters of a text, with an ellipsis where some are missing; for errors that quote what they
/// show.
pub fn cut(text: &str) -> String {
    match text.char_indices().nth(LONGEST) {
        None => text.to_owned(),
        Some((end, _)) => format!("{}\u{2026}", &text[..end]),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_peers_text_is_cut_and_stays_on_its_line() {
        let shown = |text: &str| PeerText(text).to_string();
        for (text, expected) in [
            ("", ""),
            ("no such mode", "no such mode"),
            ("a\r\nERROR root", "a\\r\\nERROR root"),
            ("\u{1b}[2J\u{9b}2J\u{7f}\0", "\\u{1b}[2J\\u{9b}2J\\u{7f}\\u{0}"),
            ("a\u{2028}b\u{202e}c", "a\\u{2028}b\\u{202e}c"),
            ("größe 日本", "größe 日本"),
        ] {
            assert_eq!(shown(text), expected);
        }
        assert_eq!(shown(&"ä".repeat(200)), "ä".repeat(200));
        assert_eq!(shown(&"ä".repeat(100_000)), format!("{}\u{2026}", "ä".repeat(200)));
        assert_eq!(cut(&"ä".repeat(201)), format!("{}\u{2026}", "ä".repeat(200)));
        assert_eq!(cut("\n"), "\n");
    }
}
