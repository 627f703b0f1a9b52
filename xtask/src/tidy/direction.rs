//! Which crate may use which: the picture in ARCHITECTURE.md, checked against `cargo metadata`.

use serde_json::Value;

use super::Fault;
use crate::child;
use crate::environment::cargo;

/// A workspace crate with the names of what it depends on, outside tests.
pub struct Package {
    /// Its name.
    pub name: String,
    /// Its normal and build dependencies.
    pub dependencies: Vec<String>,
}

/// What each crate may use of the workspace. A crate that is not named here is a fault.
const ALLOWED: &[(&str, &[&str])] = &[
    ("dr-core", &[]),
    ("dr-storage", &["dr-core"]),
    ("dr-pg", &["dr-core"]),
    ("dr-notify", &["dr-core"]),
    ("dr-failover", &["dr-core"]),
    ("dr-engine", &["dr-core", "dr-storage"]),
    ("dr-verify", &["dr-core", "dr-storage", "dr-engine"]),
    ("dr-agent", &["dr-core", "dr-storage", "dr-pg", "dr-notify", "dr-failover", "dr-engine", "dr-verify"]),
    (
        "dr-cli",
        &["dr-core", "dr-storage", "dr-pg", "dr-notify", "dr-failover", "dr-engine", "dr-verify", "dr-agent"],
    ),
    ("dr-testkit", &["dr-core", "dr-storage", "dr-pg", "dr-engine", "dr-verify"]),
    ("dr-examples", &["*"]),
    ("dr-benches", &["*"]),
    ("dr-fuzz", &["*"]),
    ("xtask", &[]),
];

/// Crates of others that would bring in what a crate promises to be without.
const WITHOUT: &[(&str, &[&str], &str)] = &[
    (
        "dr-core",
        &["tokio", "reqwest", "object_store", "tokio-postgres", "rustix", "libc"],
        "no I/O and no runtime",
    ),
    (
        "dr-engine",
        &["object_store", "reqwest", "tokio-postgres"],
        "reaches storage and PostgreSQL through ports",
    ),
    ("dr-pg", &["object_store", "reqwest"], "does not know where bytes are kept"),
    ("dr-storage", &["tokio-postgres"], "does not know PostgreSQL"),
];

/// The workspace's crates.
pub fn packages() -> Result<Vec<Package>, String> {
    let text = child::output(&mut cargo(&["metadata", "--no-deps", "--offline", "--format-version", "1"]))?;
    let value: Value = serde_json::from_str(&text).map_err(|error| format!("cargo metadata: {error}"))?;
    let list = |value: &Value| value.as_array().cloned().unwrap_or_default();
    let name = |value: &Value| value["name"].as_str().unwrap_or_default().to_owned();
    Ok(list(&value["packages"])
        .iter()
        .map(|package| Package {
            name: name(package),
            dependencies: list(&package["dependencies"])
                .iter()
                .filter(|dependency| dependency["kind"] != "dev")
                .map(name)
                .collect(),
        })
        .collect())
}

/// Faults of the crates against the two tables.
pub fn check(packages: &[Package]) -> Vec<Fault> {
    let ours = |name: &str| packages.iter().any(|package| package.name == name);
    let mut faults = Vec::new();
    for package in packages {
        let place = "Cargo.toml";
        let Some((_, allowed)) = ALLOWED.iter().find(|(name, _)| *name == package.name) else {
            let text = format!("{} has no line in xtask/src/tidy/direction.rs", package.name);
            faults.push(Fault::new(place, 0, text));
            continue;
        };
        for used in package.dependencies.iter().filter(|used| ours(used)) {
            if !allowed.contains(&used.as_str()) && !allowed.contains(&"*") {
                let text = format!("{} may not depend on {used}: see ARCHITECTURE.md", package.name);
                faults.push(Fault::new(place, 0, text));
            }
        }
        for (_, banned, why) in WITHOUT.iter().filter(|(name, ..)| *name == package.name) {
            for used in package.dependencies.iter().filter(|used| banned.contains(&used.as_str())) {
                faults.push(Fault::new(place, 0, format!("{} may not use {used}: it {why}", package.name)));
            }
        }
    }
    faults
}

#[cfg(test)]
mod tests {
    use super::*;

    fn package(name: &str, dependencies: &[&str]) -> Package {
        let dependencies = dependencies.iter().map(|name| (*name).to_owned()).collect();
        Package { name: name.into(), dependencies }
    }

    #[test]
    fn adapters_do_not_see_each_other() {
        let packages = [package("dr-storage", &[]), package("dr-pg", &["dr-storage"])];
        assert_eq!(check(&packages).len(), 1);
    }

    #[test]
    fn the_core_stays_without_a_runtime() {
        assert_eq!(check(&[package("dr-core", &["serde", "tokio"])]).len(), 1);
    }

    #[test]
    fn a_crate_that_nobody_placed_is_a_fault() {
        assert_eq!(check(&[package("dr-new", &[])]).len(), 1);
    }
}
