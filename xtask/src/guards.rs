//! `cargo xtask guards`: switches off each safety guard in turn and demands that its tests fail.
//!
//! A check that cannot fail is a defect (and so is a guard that no test would miss). The registry
//! is `dr_core::guard`; which tests watch which guard is `xtask/guards.toml`.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::process::Command;
use std::time::{Duration, Instant};

use crate::child::{Child, Ended, last_lines};
use crate::environment::{self, cargo, root};

/// Where the registry is written down.
pub const REGISTRY: &str = "crates/dr-core/src/guard.rs";
/// Which tests watch which guard.
const TABLE: &str = "xtask/guards.toml";
/// The page made from both.
pub const PAGE: &str = "docs/guards.md";

/// One entry of the registry.
#[derive(Debug, PartialEq, Eq)]
pub struct Guard {
    name: String,
    rule: String,
    text: String,
}

/// Tests by guard: `package test`, the test with its modules.
type Watchers = BTreeMap<String, Vec<String>>;

/// Reads the registry's table: `Variant = "name", "rule", "text";`.
fn registry(source: &str) -> Vec<Guard> {
    let entry = |line: &str| {
        let (_, rest) = line.trim().strip_suffix(';')?.split_once(" = \"")?;
        let mut parts = rest.strip_suffix('"')?.splitn(3, "\", \"").map(str::to_owned);
        Some(Guard { name: parts.next()?, rule: parts.next()?, text: parts.next()? })
    };
    let table = source.split("\nguards! {").nth(1).unwrap_or_default();
    table.lines().take_while(|line| *line != "}").filter_map(entry).collect()
}

fn watchers(text: &str) -> Result<Watchers, String> {
    toml::from_str(text).map_err(|error| format!("{TABLE}: {error}"))
}

fn read(path: &str) -> Result<String, String> {
    std::fs::read_to_string(root().join(path)).map_err(|error| format!("{path}: {error}"))
}

/// The names in the registry.
pub fn names() -> Result<Vec<String>, String> {
    Ok(registry(&read(REGISTRY)?).into_iter().map(|guard| guard.name).collect())
}

/// What `docs/guards.md` should say.
pub fn page() -> Result<String, String> {
    Ok(render(&registry(&read(REGISTRY)?), &watchers(&read(TABLE)?)?))
}

fn render(guards: &[Guard], watchers: &Watchers) -> String {
    let mut page = String::from(
        "# Safety guards\n\n\
         Made by `cargo xtask gen` from `crates/dr-core/src/guard.rs` and `xtask/guards.toml`.\n\n\
         A guard stands between an operator and a loss. `cargo xtask guards` builds the tests with the \
         test-only\nfeature `guards-off`, switches off one guard at a time, and fails unless every test named \
         here goes red.\n\n\
         | guard | what it ensures | tests that go red without it |\n| --- | --- | --- |\n",
    );
    for guard in guards {
        let tests = watchers.get(&guard.name).map(|tests| tests.iter().map(|test| format!("`{test}`")));
        let tests = tests.map(|tests| tests.collect::<Vec<_>>().join("<br>")).unwrap_or_default();
        let tests = if tests.is_empty() { "**none yet**".to_owned() } else { tests };
        let _ = writeln!(page, "| `{}` | {} | {tests} |", guard.name, guard.text);
    }
    page
}

/// Guards that no code asks: a name in the registry protects nobody.
pub fn unused(registry_source: &str, product: &str) -> Vec<String> {
    let table = registry_source.split("\nguards! {").nth(1).unwrap_or_default();
    let variants = table.lines().take_while(|line| *line != "}").filter_map(|line| line.split_once(" = \""));
    let asked = |variant: &str| {
        product.match_indices(&format!("Guard::{variant}")).any(|(at, found)| {
            !product[at + found.len()..].starts_with(|c: char| c.is_alphanumeric() || c == '_')
        })
    };
    variants.map(|(variant, _)| variant.trim().to_owned()).filter(|variant| !asked(variant)).collect()
}

/// Runs the task: all guards, or those named with `--only`.
pub fn main(args: &[String]) -> Result<(), String> {
    let only = match args {
        [] => None,
        [flag, name] if flag == "--only" => Some(name.as_str()),
        _ => return Err("guards knows only --only NAME".into()),
    };
    if environment::find_program("cargo-nextest").is_none() {
        return Err("cargo-nextest is needed (cargo install cargo-nextest --locked)".into());
    }
    let guards = registry(&read(REGISTRY)?);
    let watchers = watchers(&read(TABLE)?)?;
    if let Some(name) = watchers.keys().find(|name| guards.iter().all(|guard| guard.name != **name)) {
        return Err(format!("{TABLE}: there is no guard {name}"));
    }
    let chosen: Vec<&Guard> =
        guards.iter().filter(|guard| only.is_none_or(|name| guard.name == name)).collect();
    if chosen.is_empty() {
        return Err(format!("there is no guard {}", only.unwrap_or_default()));
    }
    examine(&chosen, &watchers)
}

fn examine(guards: &[&Guard], watchers: &Watchers) -> Result<(), String> {
    let tests_of = |guard: &Guard| watchers.get(&guard.name).cloned().unwrap_or_default();
    let mut all: Vec<String> = guards.iter().flat_map(|guard| tests_of(guard)).collect();
    all.sort();
    all.dedup();
    println!("with every guard on, {} tests must pass", all.len());
    let missing = failing(&all, None, Duration::from_secs(1200))?;
    if !missing.is_empty() {
        return Err(format!("these fail with every guard on: {}", missing.join(", ")));
    }
    let mut faults = Vec::new();
    for guard in guards {
        let tests = tests_of(guard);
        if tests.is_empty() {
            println!("{:<28} NO TEST", guard.name);
            faults.push(guard.name.clone());
            continue;
        }
        let started = Instant::now();
        let red = failing(&tests, Some(&guard.name), Duration::from_secs(240))?;
        let green: Vec<&String> = tests.iter().filter(|test| !red.contains(test)).collect();
        let word = if green.is_empty() { "red, as it must be" } else { "STILL GREEN" };
        println!("{:<28} {word} ({:.1} s)", guard.name, started.elapsed().as_secs_f64());
        for test in &green {
            println!("    passes without it: {test}");
        }
        if !green.is_empty() {
            faults.push(guard.name.clone());
        }
    }
    println!("guards: {} watched, {} not", guards.len() - faults.len(), faults.len());
    if faults.is_empty() { Ok(()) } else { Err(format!("no test misses {}", faults.join(", "))) }
}

/// Runs these tests, with one guard off, and returns those that failed.
fn failing(tests: &[String], off: Option<&str>, deadline: Duration) -> Result<Vec<String>, String> {
    if tests.is_empty() {
        return Ok(Vec::new());
    }
    let mut command = cargo(&["nextest", "run", "--workspace", "--features", "guards-off", "--no-fail-fast"]);
    command.args(["--status-level", "fail", "--final-status-level", "none", "--color", "never"]);
    command.args(["--failure-output", "never", "-E", &filter(tests)?]);
    if let Some(name) = off {
        command.env("DR_GUARD_OFF", name);
    }
    let log = environment::logs().join(format!("guard-{}.log", off.unwrap_or("none")));
    std::fs::create_dir_all(environment::logs()).map_err(|error| error.to_string())?;
    let ended = Child::new(with_place(command), log.clone(), deadline).run()?;
    let text = std::fs::read_to_string(&log).unwrap_or_default();
    let red: Vec<String> = tests.iter().filter(|test| failed(&text, test)).cloned().collect();
    let ran =
        text.lines().any(|line| line.trim_start().starts_with("Summary") && !line.contains(" 0 tests run"));
    let count = ran_tests(&text);
    match ended {
        _ if !ran => Err(format!("no test was run; see {}\n{}", log.display(), last_lines(&log, 15))),
        _ if off.is_none() && count < tests.len() => {
            Err(format!("{TABLE} names {} tests, {count} were found: {}", tests.len(), log.display()))
        }
        // With every guard on, a failure that we do not recognise must not count as good.
        Ended::Badly(_) | Ended::TimedOut if red.is_empty() && off.is_none() => {
            Err(format!("the tests failed; see {}\n{}", log.display(), last_lines(&log, 15)))
        }
        _ => Ok(red),
    }
}

/// Tests find their scratch space in our variables when they run below `cargo xtask test`.
fn with_place(mut command: Command) -> Command {
    command.env("RUST_BACKTRACE", "0");
    command
}

fn ran_tests(text: &str) -> usize {
    let summary = text.lines().rev().find(|line| line.trim_start().starts_with("Summary"));
    let words: Vec<&str> = summary.unwrap_or_default().split_whitespace().collect();
    let at = words.iter().position(|word| *word == "tests" || *word == "test").unwrap_or(0);
    at.checked_sub(1).and_then(|at| words[at].split('/').next()?.parse().ok()).unwrap_or(0)
}

/// Whether nextest said that this test failed: `FAIL [ 0.004s] (1/3) package::binary test`.
fn failed(log: &str, test: &str) -> bool {
    let (package, name) = test.split_once(' ').unwrap_or(("", test));
    log.lines().any(|line| {
        let mut words = line.split_whitespace();
        let word = words.next().unwrap_or_default();
        let bad = ["FAIL", "TIMEOUT", "ABORT", "SIGABRT", "SIGKILL", "SIGSEGV", "LEAK-FAIL"].contains(&word);
        bad && line.split_whitespace().last() == Some(name)
            && words.any(|word| word == package || word.starts_with(&format!("{package}::")))
    })
}

fn filter(tests: &[String]) -> Result<String, String> {
    let mut parts = Vec::new();
    for test in tests {
        let (package, name) =
            test.split_once(' ').ok_or_else(|| format!("{TABLE}: {test:?} is not `package test`"))?;
        parts.push(format!("(package({package}) & test(={name}))"));
    }
    Ok(parts.join(" | "))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_line_of_the_registry_is_read() {
        let source = read(REGISTRY).expect("registry");
        let table =
            source.split("\nguards! {").nth(1).expect("table").split("\n}").next().expect("end").to_owned();
        let lines = table.lines().filter(|line| line.contains(" = \"")).count();
        assert_eq!(registry(&source).len(), lines);
        assert!(lines > 20);
    }

    #[test]
    fn a_failed_test_is_recognised_by_package_and_name() {
        let log = "        FAIL [   0.004s] (1/3) dr-core guard::tests::a\n   Summary [0.1s] 3 tests run: 2 passed\n";
        assert!(failed(log, "dr-core guard::tests::a"));
        assert!(!failed(log, "dr-pg guard::tests::a"));
        assert!(!failed(log, "dr-core guard::tests::b"));
        assert_eq!(ran_tests(log), 3);
        let log = "  FAIL [   0.004s] (1/3) dr-storage::contract law\n";
        assert!(failed(log, "dr-storage law"));
    }

    #[test]
    fn a_guard_that_no_code_asks_is_found() {
        let source =
            "x\nguards! {\n    Tag = \"tag\", \"1\", \"A.\";\n    TagTwo = \"tag-two\", \"1\", \"B.\";\n}\n";
        assert_eq!(unused(source, "if Guard::TagTwo.holds() {}"), ["Tag"]);
        assert!(unused(source, "Guard::Tag.holds() Guard::TagTwo.holds()").is_empty());
    }

    #[test]
    fn a_guard_without_tests_shows_on_the_page() {
        let guards = [Guard { name: "a".into(), rule: "1".into(), text: "A.".into() }];
        assert!(render(&guards, &Watchers::new()).contains("none yet"));
    }
}
