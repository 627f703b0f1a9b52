//! Rust source, seen just well enough to measure it: code without comments and literals, which
//! lines are tests, and where each function begins and ends.

/// A source file, cut into lines.
pub struct Source {
    /// The text as written.
    pub lines: Vec<String>,
    /// The same lines with comments and the insides of literals blanked.
    pub code: Vec<String>,
    /// Whether each line belongs to a test item (`#[cfg(test)]`, `#[test]`).
    pub test: Vec<bool>,
}

/// A function with its lines, counted from 1.
#[derive(Debug, PartialEq, Eq)]
pub struct Function {
    /// Its name.
    pub name: String,
    /// The line of its `fn`.
    pub line: usize,
    /// How many lines it has, signature and braces included.
    pub length: usize,
}

impl Source {
    /// Reads the text of one file.
    pub fn new(text: &str) -> Source {
        let blanked = blank(text);
        let code: Vec<String> = blanked.lines().map(str::to_owned).collect();
        let test = test_lines(&blanked, code.len());
        Source { lines: text.lines().map(str::to_owned).collect(), code, test }
    }

    /// How many lines are not tests.
    pub fn length_outside_tests(&self) -> usize {
        self.test.iter().filter(|test| !**test).count()
    }

    /// The functions outside tests.
    pub fn functions(&self) -> Vec<Function> {
        let text = self.code.join("\n");
        let bytes = text.as_bytes();
        let mut found = Vec::new();
        for (at, _) in text.match_indices("fn ") {
            let before = at.checked_sub(1).map(|index| bytes[index]);
            if before.is_some_and(|byte| byte.is_ascii_alphanumeric() || byte == b'_') {
                continue;
            }
            let name: String =
                text[at + 3..].chars().take_while(|c| c.is_alphanumeric() || *c == '_').collect();
            let line = line_of(&text, at);
            if name.is_empty() || self.test.get(line).copied().unwrap_or(false) {
                continue;
            }
            if let Some(end) = item_end(bytes, at).filter(|end| bytes[*end] == b'}') {
                found.push(Function { name, line: line + 1, length: line_of(&text, end) - line + 1 });
            }
        }
        found
    }
}

fn line_of(text: &str, at: usize) -> usize {
    text.as_bytes()[..at].iter().filter(|byte| **byte == b'\n').count()
}

/// Where the item that begins at `from` ends: its closing brace, or a semicolon before any brace.
fn item_end(code: &[u8], from: usize) -> Option<usize> {
    let (mut braces, mut inner) = (0_usize, 0_usize);
    for (offset, byte) in code[from..].iter().enumerate() {
        match byte {
            b'(' | b'[' => inner += 1,
            b')' | b']' => inner = inner.saturating_sub(1),
            b'{' => braces += 1,
            b'}' => {
                braces = braces.checked_sub(1)?;
                if braces == 0 && inner == 0 {
                    return Some(from + offset);
                }
            }
            b';' if braces == 0 && inner == 0 => return Some(from + offset),
            _ => {}
        }
    }
    None
}

fn test_lines(code: &str, count: usize) -> Vec<bool> {
    let mut test = vec![false; count];
    if code.trim_start().starts_with("#![cfg(test)]") {
        test.fill(true);
    }
    for marker in ["#[cfg(test)]", "#[cfg(all(test", "#[cfg(any(test", "#[test]", "#[tokio::test"] {
        for (at, _) in code.match_indices(marker) {
            let bytes = code.as_bytes();
            let Some(close) = code[at..].find(']').map(|offset| at + offset) else { continue };
            let end = item_end(bytes, close + 1).unwrap_or(close);
            let (first, last) = (line_of(code, at), line_of(code, end));
            for line in test.iter_mut().take(last + 1).skip(first) {
                *line = true;
            }
        }
    }
    test
}

/// Replaces comments and what literals contain by spaces; line breaks stay.
fn blank(text: &str) -> String {
    let chars: Vec<char> = text.chars().collect();
    let mut out = String::with_capacity(text.len());
    let mut at = 0;
    while at < chars.len() {
        let end = literal_end(&chars, at);
        if end == at {
            out.push(chars[at]);
            at += 1;
            continue;
        }
        out.extend(chars[at..end].iter().map(|c| if *c == '\n' { '\n' } else { ' ' }));
        at = end;
    }
    out
}

/// The end of the comment or literal that begins at `at`, or `at` when none does.
fn literal_end(chars: &[char], at: usize) -> usize {
    let next = |offset: usize| chars.get(at + offset).copied().unwrap_or('\0');
    let after_word = at > 0 && (chars[at - 1].is_alphanumeric() || chars[at - 1] == '_');
    match chars[at] {
        '/' if next(1) == '/' => find(chars, at, |rest| rest[0] == '\n'),
        '/' if next(1) == '*' => block_comment_end(chars, at),
        '"' => string_end(chars, at),
        'r' if !after_word || (at > 0 && chars[at - 1] == 'b') => raw_string_end(chars, at),
        '\'' if next(1) == '\\' => {
            let from = at + 3;
            (find(chars, from, |rest| rest[0] == '\'') + 1).min(chars.len())
        }
        '\'' if next(2) == '\'' => at + 3,
        _ => at,
    }
}

fn find(chars: &[char], from: usize, is: impl Fn(&[char]) -> bool) -> usize {
    (from..chars.len()).find(|at| is(&chars[*at..])).unwrap_or(chars.len())
}

fn block_comment_end(chars: &[char], from: usize) -> usize {
    let mut depth = 0_usize;
    let mut at = from;
    while at + 1 < chars.len() {
        match (chars[at], chars[at + 1]) {
            ('/', '*') => (depth, at) = (depth + 1, at + 2),
            ('*', '/') => {
                (depth, at) = (depth.saturating_sub(1), at + 2);
                if depth == 0 {
                    return at;
                }
            }
            _ => at += 1,
        }
    }
    chars.len()
}

fn string_end(chars: &[char], from: usize) -> usize {
    let mut at = from + 1;
    while at < chars.len() {
        match chars[at] {
            '\\' => at += 2,
            '"' => return at + 1,
            _ => at += 1,
        }
    }
    chars.len()
}

fn raw_string_end(chars: &[char], from: usize) -> usize {
    let hashes = chars[from + 1..].iter().take_while(|c| **c == '#').count();
    let open = from + 1 + hashes;
    if chars.get(open) != Some(&'"') {
        return from;
    }
    let closes =
        |rest: &[char]| rest[0] == '"' && rest[1..].iter().take_while(|c| **c == '#').count() >= hashes;
    (find(chars, open + 1, closes) + 1 + hashes).min(chars.len())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn comments_and_literals_are_blanked_and_lines_stay() {
        let code = blank("a // x {\nb \"{ \\\" }\" c r#\"{\"# '{' '\\'' 'a: /* { /* } */\n */ d");
        assert_eq!(code.lines().count(), 3);
        assert!(!code.contains('{') && !code.contains('}'));
        for kept in ["a", "b", "c", "'a:", "d"] {
            assert!(code.contains(kept), "{kept} is missing in {code:?}");
        }
    }

    #[test]
    fn a_function_is_measured_from_its_name_to_its_brace() {
        let text = "trait T { fn none(&self) -> [u8; 3]; }\nfn two(\n) {\n}\n";
        let functions = Source::new(text).functions();
        assert_eq!(functions, [Function { name: "two".into(), line: 2, length: 3 }]);
    }

    #[test]
    fn tests_do_not_count() {
        let text = "fn a() {}\n#[cfg(test)]\nmod tests {\n    fn b() {}\n}\nfn c() {}\n";
        let source = Source::new(text);
        assert_eq!(source.length_outside_tests(), 2);
        let names: Vec<String> = source.functions().into_iter().map(|function| function.name).collect();
        assert_eq!(names, ["a", "c"]);
    }
}
