//! `cargo xtask tidy`: rules of this workspace that no compiler checks.
//!
//! Each check is a function from file contents to faults, so that its tests can plant a fault.

mod bans;
mod direction;
mod documents;
mod size;
mod words;

use std::fmt;
use std::path::PathBuf;
use std::process::Command;

use crate::child;
use crate::environment::root;

/// A broken rule, with its place and the way out.
#[derive(Debug, PartialEq, Eq)]
pub struct Fault {
    /// The file, from the root.
    pub path: String,
    /// The line, from 1; 0 for the whole file.
    pub line: usize,
    /// What is wrong and what to do.
    pub text: String,
}

impl Fault {
    fn new(path: &str, line: usize, text: impl Into<String>) -> Fault {
        Fault { path: path.to_owned(), line, text: text.into() }
    }
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}: {}", self.path, self.line, self.text)
    }
}

/// A tracked file with text in it.
pub struct File {
    /// Its path from the root, with forward slashes.
    pub path: String,
    /// What it contains.
    pub text: String,
}

/// Where a Rust file stands, which decides what it may do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Place {
    /// Code that ships.
    Product,
    /// A test, or code that only tests use.
    Test,
    /// A program for developers or readers: xtask, examples, benches.
    Tool,
}

impl File {
    /// The crate's folder name, or the first part of the path.
    pub fn package(&self) -> &str {
        let mut parts = self.path.split('/');
        match parts.next() {
            Some("crates") => parts.next().unwrap_or_default(),
            first => first.unwrap_or_default(),
        }
    }

    /// Where the file stands.
    pub fn place(&self) -> Place {
        let name = self.path.rsplit('/').next().unwrap_or_default();
        let tests = self.path.contains("/tests/") || self.path.contains("/fuzz/");
        if tests || name == "tests.rs" || name.ends_with("_tests.rs") || self.package() == "dr-testkit" {
            return Place::Test;
        }
        match self.package() {
            "xtask" | "examples" | "benches" | "fuzz" => Place::Tool,
            _ if self.path.contains("/benches/") || self.path.contains("/examples/") => Place::Tool,
            _ => Place::Product,
        }
    }

    fn is_rust(&self) -> bool {
        self.path.ends_with(".rs")
    }
}

/// Runs every check on the files that git knows, or would know.
pub fn main() -> Result<(), String> {
    let files = files()?;
    let mut faults = size::check(&files, &read(size::EXCEPTIONS));
    faults.extend(bans::check(&files));
    faults.extend(words::check(&files));
    faults.extend(direction::check(&direction::packages()?));
    faults.extend(documents::check(&files, &crate::guards::names()?));
    faults.extend(unused_guards(&files));
    if crate::guards::page()? != read(crate::guards::PAGE) {
        faults.push(Fault::new(crate::guards::PAGE, 0, "is stale: run `cargo xtask gen`"));
    }
    faults.sort_by(|a, b| (&a.path, a.line).cmp(&(&b.path, b.line)));
    for fault in &faults {
        println!("{fault}");
    }
    println!("tidy: {} files, {} faults", files.len(), faults.len());
    if faults.is_empty() { Ok(()) } else { Err(format!("{} faults", faults.len())) }
}

fn unused_guards(files: &[File]) -> Vec<Fault> {
    let product = files.iter().filter(|file| file.is_rust() && file.place() == Place::Product);
    let product: String = product.map(|file| file.text.as_str()).collect();
    let unused = crate::guards::unused(&read(crate::guards::REGISTRY), &product);
    let fault = |variant| {
        Fault::new(crate::guards::REGISTRY, 0, format!("Guard::{variant} guards nothing: no code asks it"))
    };
    unused.into_iter().map(fault).collect()
}

fn read(path: &str) -> String {
    std::fs::read_to_string(root().join(path)).unwrap_or_default()
}

fn files() -> Result<Vec<File>, String> {
    let mut git = Command::new("git");
    git.args(["ls-files", "--cached", "--others", "--exclude-standard", "-z"]).current_dir(root());
    let mut files = Vec::new();
    for path in child::output(&mut git)?.split('\0').filter(|path| !path.is_empty()) {
        let place: PathBuf = root().join(path);
        // A file may be deleted but not yet committed, and binary files have no lines.
        if let Ok(text) = std::fs::read_to_string(place) {
            files.push(File { path: path.to_owned(), text });
        }
    }
    Ok(files)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_knows_its_package_and_place() {
        let file = |path: &str| File { path: path.into(), text: String::new() };
        assert_eq!(file("crates/dr-pg/src/wal.rs").package(), "dr-pg");
        assert_eq!(file("crates/dr-pg/src/wal.rs").place(), Place::Product);
        assert_eq!(file("crates/dr-pg/tests/wal.rs").place(), Place::Test);
        assert_eq!(file("crates/dr-pg/src/wal/tests.rs").place(), Place::Test);
        assert_eq!(file("xtask/src/main.rs").place(), Place::Tool);
    }
}
