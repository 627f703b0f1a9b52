//! Functions to 70 lines, files to 600, both outside tests; exceptions are listed and only shrink.

use std::collections::BTreeMap;

use super::{Fault, File, Place};
use crate::source::Source;

/// The list of exceptions: `path lines` or `path::function lines`, one a line.
pub const EXCEPTIONS: &str = "xtask/tidy-exceptions.txt";

const FUNCTION_LINES: usize = 70;
const FILE_LINES: usize = 600;

/// Faults of the Rust files against the limits and the list.
pub fn check(files: &[File], exceptions: &str) -> Vec<Fault> {
    let mut allowed = match parse(exceptions) {
        Ok(allowed) => allowed,
        Err(fault) => return vec![fault],
    };
    let mut faults = Vec::new();
    for file in files.iter().filter(|file| file.is_rust() && file.place() != Place::Test) {
        let source = Source::new(&file.text);
        let length = source.length_outside_tests();
        measure(&mut faults, &mut allowed, file, 0, file.path.clone(), length, FILE_LINES);
        for function in source.functions() {
            let key = format!("{}::{}", file.path, function.name);
            measure(&mut faults, &mut allowed, file, function.line, key, function.length, FUNCTION_LINES);
        }
    }
    for key in allowed.keys() {
        faults.push(Fault::new(EXCEPTIONS, 0, format!("{key} needs no exception any more; remove the line")));
    }
    faults
}

fn measure(
    faults: &mut Vec<Fault>,
    allowed: &mut BTreeMap<String, usize>,
    file: &File,
    line: usize,
    key: String,
    length: usize,
    limit: usize,
) {
    if length <= limit {
        return;
    }
    match allowed.remove(&key) {
        Some(exception) if length == exception => {}
        Some(exception) if length < exception => {
            let text = format!("{key} has shrunk to {length} lines; lower its exception from {exception}");
            faults.push(Fault::new(EXCEPTIONS, 0, text));
        }
        _ => {
            let text = format!("{length} lines outside tests, {limit} are allowed: split it");
            faults.push(Fault::new(&file.path, line, text));
        }
    }
}

fn parse(text: &str) -> Result<BTreeMap<String, usize>, Fault> {
    let mut allowed = BTreeMap::new();
    for (index, line) in text.lines().enumerate() {
        if line.trim().is_empty() || line.starts_with('#') {
            continue;
        }
        let entry = line.rsplit_once(' ').and_then(|(key, count)| Some((key, count.parse().ok()?)));
        let Some((key, count)) = entry else {
            return Err(Fault::new(EXCEPTIONS, index + 1, "expected `path lines` or `path::function lines`"));
        };
        allowed.insert(key.to_owned(), count);
    }
    Ok(allowed)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn file(path: &str, lines: usize) -> File {
        let text = format!("fn long() {{\n{}}}\n", "    work();\n".repeat(lines - 2));
        File { path: path.into(), text }
    }

    #[test]
    fn a_long_function_is_a_fault_at_its_line() {
        let faults = check(&[file("crates/a/src/lib.rs", 71)], "");
        assert_eq!(faults.len(), 1);
        assert_eq!(faults[0].line, 1);
        assert!(check(&[file("crates/a/src/lib.rs", 70)], "").is_empty());
    }

    #[test]
    fn a_long_file_is_a_fault_unless_it_is_a_test() {
        assert_eq!(check(&[file("crates/a/src/lib.rs", 601)], "").len(), 2);
        assert!(check(&[file("crates/a/tests/all.rs", 601)], "").is_empty());
    }

    #[test]
    fn exceptions_only_shrink() {
        let long = || [file("crates/a/src/lib.rs", 80)];
        assert!(check(&long(), "# why\ncrates/a/src/lib.rs::long 80\n").is_empty());
        assert_eq!(check(&long(), "crates/a/src/lib.rs::long 79\n").len(), 1, "grown");
        assert_eq!(check(&long(), "crates/a/src/lib.rs::long 81\n").len(), 1, "shrunk, not lowered");
        assert_eq!(check(&[], "crates/a/src/lib.rs::long 80\n").len(), 1, "not needed");
        assert_eq!(check(&[], "nonsense\n").len(), 1);
    }
}
