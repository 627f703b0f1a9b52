//! Documents: links lead somewhere, and the fault atlas names tests and guards that exist.

use std::collections::BTreeSet;

use super::{Fault, File};

/// The page whose last column names tests and guards.
const ATLAS: &str = "docs/fault-atlas.md";

/// Faults of the documents; `guards` are the names in the registry.
pub fn check(files: &[File], guards: &[String]) -> Vec<Fault> {
    let mut paths: BTreeSet<&str> = BTreeSet::new();
    for file in files {
        let mut path = file.path.as_str();
        paths.insert(path);
        while let Some((folder, _)) = path.rsplit_once('/') {
            paths.insert(folder);
            path = folder;
        }
    }
    let mut faults = Vec::new();
    for file in files.iter().filter(|file| file.path.ends_with(".md")) {
        for (index, line) in file.text.lines().enumerate() {
            for target in links(line).filter(|target| !leads_somewhere(&file.path, target, &paths)) {
                faults.push(Fault::new(&file.path, index + 1, format!("the link {target} leads nowhere")));
            }
        }
        if file.path == ATLAS {
            faults.extend(atlas(file, files, guards));
        }
    }
    faults
}

fn links(line: &str) -> impl Iterator<Item = &str> {
    line.match_indices("](").filter_map(move |(at, _)| line[at + 2..].split(')').next())
}

fn leads_somewhere(page: &str, target: &str, paths: &BTreeSet<&str>) -> bool {
    let target = target.split('#').next().unwrap_or_default();
    if target.is_empty() || target.contains("://") || target.starts_with("mailto:") {
        return true;
    }
    let mut parts: Vec<&str> = page.split('/').collect();
    parts.pop();
    for part in target.trim_end_matches('/').split('/') {
        match part {
            "." | "" => {}
            ".." => {
                if parts.pop().is_none() {
                    return false;
                }
            }
            part => parts.push(part),
        }
    }
    parts.is_empty() || paths.contains(parts.join("/").as_str())
}

fn atlas(page: &File, files: &[File], guards: &[String]) -> Vec<Fault> {
    let exists = |name: &str| {
        let test = format!("fn {name}(");
        guards.iter().any(|guard| guard == name)
            || files.iter().any(|file| file.is_rust() && file.text.contains(&test))
    };
    let mut faults = Vec::new();
    for (index, line) in page.text.lines().enumerate().filter(|(_, line)| line.starts_with("| ")) {
        let last = line.trim_end_matches(['|', ' ']).rsplit('|').next().unwrap_or_default();
        let names: Vec<&str> = last.split('`').skip(1).step_by(2).collect();
        let heading = last.trim().starts_with("---") || last.trim() == "guard or test";
        if names.is_empty() && !heading {
            faults.push(Fault::new(&page.path, index + 1, "a claim without a test"));
        }
        for name in names.into_iter().filter(|name| !exists(name)) {
            faults.push(Fault::new(&page.path, index + 1, format!("there is no test or guard {name}")));
        }
    }
    faults
}

#[cfg(test)]
mod tests {
    use super::*;

    fn file(path: &str, text: &str) -> File {
        File { path: path.into(), text: text.into() }
    }

    #[test]
    fn a_link_that_leads_nowhere_is_a_fault() {
        let files = [
            file("README.md", "[a](docs/a.md) [b](https://example.org) [c](docs) [d](#x) [e](docs/none.md)"),
            file("docs/a.md", "[up](../README.md#top) [b](b.md)"),
        ];
        let texts: Vec<String> = check(&files, &[]).into_iter().map(|fault| fault.text).collect();
        assert_eq!(texts, ["the link docs/none.md leads nowhere", "the link b.md leads nowhere"]);
    }

    #[test]
    fn the_atlas_names_only_what_exists() {
        let page = "| fault | what | guard or test |\n| --- | --- | --- |\n| a | b | `tag`, `it_holds` |\n| c | d | `gone` |\n| e | f | none |\n";
        let files = [file(ATLAS, page), file("crates/a/tests/a.rs", "fn it_holds() {}")];
        let lines: Vec<usize> = check(&files, &["tag".into()]).into_iter().map(|fault| fault.line).collect();
        assert_eq!(lines, [4, 5]);
    }
}
