//! Colour, where it is wanted: never in JSON, and nothing is told by colour alone.

use std::ffi::{OsStr, OsString};
use std::io::IsTerminal;
use std::sync::OnceLock;

use clap::ColorChoice;

use crate::args::Color;

/// What a word is, and so how it looks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Ink {
    /// It failed, or is damaged.
    Bad,
    /// It deserves a look.
    Warning,
    /// It is as it should be.
    Good,
    /// It is beside the point.
    Faint,
}

impl Ink {
    /// The parameters of the terminal's "select graphic rendition" (ECMA-48, 8.3.117).
    fn code(self) -> &'static str {
        match self {
            Ink::Bad => "1;31",
            Ink::Warning => "33",
            Ink::Good => "32",
            Ink::Faint => "2",
        }
    }
}

/// Whether standard output and standard error are coloured.
static CHOICE: OnceLock<(bool, bool)> = OnceLock::new();

/// Decides for the whole run; the first decision stays.
pub(crate) fn choose(when: Color) {
    let variable = |name| std::env::var_os(name);
    let (no_color, term) = (variable("NO_COLOR"), variable("TERM"));
    let decide = |terminal| decide(when, terminal, no_color.as_deref(), term.as_deref());
    CHOICE.get_or_init(|| (decide(std::io::stdout().is_terminal()), decide(std::io::stderr().is_terminal())));
}

/// What was asked for; or else only a terminal that can, unless `NO_COLOR` is set and not empty.
fn decide(when: Color, terminal: bool, no_color: Option<&OsStr>, term: Option<&OsStr>) -> bool {
    match when {
        Color::Always => true,
        Color::Never => false,
        Color::Auto => {
            let refused = no_color.is_some_and(|value| !value.is_empty());
            terminal && !refused && term.is_some_and(|term| term != "dumb")
        }
    }
}

/// A word for standard output.
pub(crate) fn out(ink: Ink, word: &str) -> String {
    paint(CHOICE.get().is_some_and(|(out, _)| *out), ink, word)
}

/// A word for standard error.
pub(crate) fn err(ink: Ink, word: &str) -> String {
    paint(CHOICE.get().is_some_and(|(_, err)| *err), ink, word)
}

fn paint(coloured: bool, ink: Ink, word: &str) -> String {
    if coloured { format!("\x1b[{}m{word}\x1b[0m", ink.code()) } else { word.to_owned() }
}

/// How many columns a text takes on a terminal, which shows no colour codes.
pub(crate) fn width(text: &str) -> usize {
    let mut count = 0;
    let mut inside = false;
    for c in text.chars() {
        match (inside, c) {
            (false, '\x1b') => inside = true,
            (true, 'm') => inside = false,
            (false, _) => count += 1,
            (true, _) => {}
        }
    }
    count
}

/// What the parser's own messages look like: they come before the flags are known.
pub(crate) fn of_parser(arguments: &[OsString]) -> ColorChoice {
    let mut choice = ColorChoice::Auto;
    let texts: Vec<&str> = arguments.iter().map(|a| a.to_str().unwrap_or_default()).collect();
    for (index, text) in texts.iter().take_while(|text| **text != "--").enumerate() {
        let value = match text.strip_prefix("--color") {
            Some("") => texts.get(index + 1).copied(),
            Some(rest) => rest.strip_prefix('='),
            None => continue,
        };
        choice = match value {
            Some("always") => ColorChoice::Always,
            Some("never") => ColorChoice::Never,
            _ => ColorChoice::Auto,
        };
    }
    choice
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_flag_decides_and_else_a_terminal_without_no_color() {
        let (xterm, dumb) = (Some(OsStr::new("xterm")), Some(OsStr::new("dumb")));
        let (set, empty) = (Some(OsStr::new("1")), Some(OsStr::new("")));
        for (when, terminal, no_color, term, expected) in [
            (Color::Auto, true, None, xterm, true),
            (Color::Auto, true, empty, xterm, true),
            (Color::Auto, true, set, xterm, false),
            (Color::Auto, true, None, dumb, false),
            (Color::Auto, true, None, None, false),
            (Color::Auto, false, None, xterm, false),
            (Color::Always, false, set, dumb, true),
            (Color::Never, true, None, xterm, false),
        ] {
            let found = decide(when, terminal, no_color, term);
            assert_eq!(found, expected, "{when:?} {terminal} {no_color:?} {term:?}");
        }
    }

    #[test]
    fn colour_takes_no_column() {
        assert_eq!(width(&paint(true, Ink::Bad, "käse")), 4);
        assert_eq!(width("plain"), 5);
    }

    #[test]
    fn the_parser_sees_the_flag_in_each_of_its_forms() {
        let of = |words: &[&str]| of_parser(&words.iter().map(OsString::from).collect::<Vec<_>>());
        assert_eq!(of(&["dr", "--color", "always", "list"]), ColorChoice::Always);
        assert_eq!(of(&["dr", "list", "--color=never"]), ColorChoice::Never);
        assert_eq!(of(&["dr", "list"]), ColorChoice::Auto);
        assert_eq!(of(&["dr", "show", "--", "--color=always"]), ColorChoice::Auto);
        assert_eq!(of(&["dr", "--color"]), ColorChoice::Auto);
    }
}
