//! Words and paths that belong to one machine or one moment, and names that say nothing.

use super::{Fault, File, Place};
use crate::source::Source;

/// Folders of the machine that somebody developed on. Written in parts, so that this file passes.
const MACHINE_PATHS: &[&str] =
    &[concat!("/", "work/"), concat!("/", "root/"), concat!("/", "home/"), concat!("/", "Users/")];

/// Notes to oneself: they belong to an issue.
const NOTES: &[&str] = &[concat!("TO", "DO"), concat!("FIX", "ME"), concat!("XX", "X"), concat!("HA", "CK")];

/// Ends of type names that hide what the type is for.
const EMPTY_NAMES: &[&str] = &["Manager", "Helper", "Util", "Utils", "Service"];

/// Faults of all tracked files.
pub fn check(files: &[File]) -> Vec<Fault> {
    let mut faults = Vec::new();
    for file in files.iter().filter(|file| file.path != "Cargo.lock") {
        for (index, line) in file.text.lines().enumerate() {
            for path in MACHINE_PATHS.iter().filter(|path| has_path(line, path)) {
                faults.push(Fault::new(&file.path, index + 1, format!("{path} is a folder of one machine")));
            }
            for word in NOTES.iter().filter(|word| has_word(line, word)) {
                faults.push(Fault::new(&file.path, index + 1, format!("{word}: do it, or file an issue")));
            }
        }
        if file.is_rust() && file.place() == Place::Product {
            faults.extend(empty_names(file));
        }
    }
    faults
}

fn has_path(line: &str, path: &str) -> bool {
    line.match_indices(path).any(|(at, _)| {
        let before = line[..at].chars().next_back();
        !before.is_some_and(|c| c.is_alphanumeric() || "_-.$}>)~*".contains(c))
    })
}

fn has_word(line: &str, word: &str) -> bool {
    line.match_indices(word).any(|(at, _)| {
        let inside = |c: char| c.is_alphanumeric() || c == '_';
        !line[..at].ends_with(inside) && !line[at + word.len()..].starts_with(inside)
    })
}

fn empty_names(file: &File) -> Vec<Fault> {
    let source = Source::new(&file.text);
    let mut faults = Vec::new();
    for (index, line) in source.code.iter().enumerate() {
        let mut words =
            line.split_whitespace().skip_while(|word| !["struct", "enum", "trait"].contains(word));
        let name = words.nth(1).unwrap_or_default();
        let name: String = name.chars().take_while(|c| c.is_alphanumeric() || *c == '_').collect();
        if EMPTY_NAMES.iter().any(|end| name.ends_with(end)) {
            let text = format!("{name}: name the type after what it does");
            faults.push(Fault::new(&file.path, index + 1, text));
        }
    }
    faults
}

#[cfg(test)]
mod tests {
    use super::*;

    fn faults(path: &str, text: &str) -> usize {
        check(&[File { path: path.into(), text: text.into() }]).len()
    }

    #[test]
    fn a_machine_path_is_a_fault_in_any_file() {
        for path in MACHINE_PATHS {
            assert_eq!(faults("README.md", &format!("see {path}x")), 1, "{path}");
        }
        assert_eq!(faults("README.md", "the net/work/flow and /var/lib/postgresql/"), 0);
    }

    #[test]
    fn a_note_to_oneself_is_a_fault() {
        for note in NOTES {
            assert_eq!(faults("docs/a.md", &format!("{note}: later")), 1, "{note}");
        }
    }

    #[test]
    fn an_empty_name_is_a_fault() {
        let bad = format!("pub struct Backup{} {{}}", "Manager");
        assert_eq!(faults("crates/dr-engine/src/lib.rs", &bad), 1);
        assert_eq!(faults("crates/dr-engine/src/lib.rs", "pub struct Repository {}"), 0);
    }
}
