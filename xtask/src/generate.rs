//! `cargo xtask gen`: writes the documents that are made from code.

use std::path::Path;

use crate::child;
use crate::environment::{cargo, root};
use crate::guards;

/// Documents that `dr` itself prints: its argument, and the page.
const PRINTED: &[(&str, &str)] = &[("cli", "docs/cli/reference.md"), ("config", "docs/reference/config.md")];

/// Writes them all.
pub fn main() -> Result<(), String> {
    write(guards::PAGE, &guards::page()?)?;
    for (what, page) in PRINTED {
        let text = child::output(&mut cargo(&[
            "run",
            "--quiet",
            "--package",
            "dr-cli",
            "--bin",
            "dr",
            "--",
            "reference",
            what,
        ]))?;
        write(page, &text)?;
    }
    Ok(())
}

fn write(page: &str, text: &str) -> Result<(), String> {
    let path = root().join(page);
    let failed = |error: std::io::Error| format!("{page}: {error}");
    std::fs::create_dir_all(path.parent().unwrap_or(Path::new("."))).map_err(failed)?;
    let before = std::fs::read_to_string(&path).unwrap_or_default();
    println!("{page}: {}", if before == text { "current" } else { "written" });
    std::fs::write(&path, text).map_err(failed)
}
