//! Calls that are banned, each with what to use in its place.
//!
//! A place that has a reason says so on its line or the one before: `// tidy: allow(name): why`.

use super::{Fault, File, Place};
use crate::source::Source;

struct Ban {
    name: &'static str,
    patterns: &'static [&'static str],
    instead: &'static str,
    applies: fn(&File) -> bool,
}

fn product(file: &File) -> bool {
    file.place() == Place::Product
}

fn outside_clocks(file: &File) -> bool {
    product(file) && !file.path.ends_with("/clock.rs")
}

fn core(file: &File) -> bool {
    file.package() == "dr-core" && product(file)
}

fn silent(file: &File) -> bool {
    product(file) && file.package() != "dr-cli"
}

fn without_environment(file: &File) -> bool {
    product(file) && !["dr-agent", "dr-cli"].contains(&file.package()) && !file.path.ends_with("/guard.rs")
}

const BANS: &[Ban] = &[
    Ban {
        name: "wall-clock",
        patterns: &["SystemTime::now(", "Timestamp::now(", "Zoned::now("],
        instead: "ask the `Clock` port, so that tests decide what time it is",
        applies: outside_clocks,
    },
    Ban {
        name: "core-clock",
        patterns: &["Instant::now("],
        instead: "dr-core takes times as values; measure in the caller",
        applies: core,
    },
    Ban {
        name: "unbounded",
        patterns: &["unbounded_channel(", "mpsc::channel()", "mpsc::channel::<", "channel::unbounded("],
        instead: "use a bounded channel (`mpsc::channel(n)`, `sync_channel(n)`), so that memory has a bound",
        applies: product,
    },
    Ban {
        name: "unwrap",
        patterns: &[".unwrap()"],
        instead: "return an error, or `expect` with the reason why it cannot happen",
        applies: product,
    },
    Ban {
        name: "print",
        patterns: &["println!(", "print!(", "eprintln!(", "eprint!("],
        instead: "emit an event or a `tracing` record; only dr-cli prints",
        applies: silent,
    },
    Ban {
        name: "rename",
        patterns: &["fs::rename("],
        instead: "sync the file before and its directory after, in the one function that does both",
        applies: product,
    },
    Ban {
        name: "environment",
        patterns: &["env::var(", "env::var_os(", "env::vars("],
        instead: "take it as a value; only dr-agent and dr-cli read the environment",
        applies: without_environment,
    },
];

/// Faults of the Rust files against the bans.
pub fn check(files: &[File]) -> Vec<Fault> {
    let mut faults = Vec::new();
    for file in files.iter().filter(|file| file.is_rust()) {
        let bans: Vec<&Ban> = BANS.iter().filter(|ban| (ban.applies)(file)).collect();
        if bans.is_empty() {
            continue;
        }
        let source = Source::new(&file.text);
        for (index, line) in source.code.iter().enumerate().filter(|(index, _)| !source.test[*index]) {
            for ban in bans.iter().filter(|ban| breaks(ban, line) && !is_allowed(ban, &source, index)) {
                faults.push(Fault::new(&file.path, index + 1, format!("{}: {}", ban.name, ban.instead)));
            }
        }
    }
    faults
}

fn breaks(ban: &Ban, line: &str) -> bool {
    ban.patterns.iter().any(|pattern| {
        line.match_indices(pattern).any(|(at, _)| {
            let word = |c: char| c.is_alphanumeric() || c == '_';
            !pattern.starts_with(word) || !line[..at].ends_with(word)
        })
    })
}

fn is_allowed(ban: &Ban, source: &Source, index: usize) -> bool {
    let excuse = format!("tidy: allow({}):", ban.name);
    let here = source.lines[index].contains(&excuse);
    here || index.checked_sub(1).is_some_and(|before| source.lines[before].contains(&excuse))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn faults(path: &str, text: &str) -> usize {
        check(&[File { path: path.into(), text: text.into() }]).len()
    }

    #[test]
    fn every_ban_catches_each_of_its_patterns() {
        for ban in BANS {
            for pattern in ban.patterns {
                let text = format!("fn f() {{ x{pattern}; }}").replace("xprint", "print").replace("xe", "e");
                let text = text.replace("xSys", "Sys").replace("xTime", "Time").replace("xZoned", "Zoned");
                let text = ["Instant", "unbounded", "mpsc", "channel", "fs", "eprint"]
                    .iter()
                    .fold(text, |text, word| text.replace(&format!("x{word}"), word));
                assert!(faults("crates/dr-core/src/lib.rs", &text) > 0, "{}: {text}", ban.name);
            }
        }
    }

    #[test]
    fn a_planted_call_is_a_fault_outside_tests_only() {
        let call = "fn f() { let _ = std::time::SystemTime::now(); }\n";
        assert_eq!(faults("crates/dr-engine/src/lib.rs", call), 1);
        assert_eq!(faults("crates/dr-engine/tests/all.rs", call), 0);
        assert_eq!(faults("crates/dr-agent/src/clock.rs", call), 0);
        assert_eq!(
            faults("crates/dr-engine/src/lib.rs", &format!("#[cfg(test)]\nmod tests {{\n{call}}}\n")),
            0
        );
    }

    #[test]
    fn comments_and_text_are_not_calls_and_reasons_are_accepted() {
        assert_eq!(faults("crates/dr-engine/src/lib.rs", "// fs::rename(a, b)\n"), 0);
        assert_eq!(faults("crates/dr-engine/src/lib.rs", "const A: &str = \".unwrap()\";\n"), 0);
        let excused =
            "fn f() {\n    // tidy: allow(rename): the directory is synced below\n    fs::rename(a, b);\n}\n";
        assert_eq!(faults("crates/dr-engine/src/lib.rs", excused), 0);
    }

    #[test]
    fn only_the_command_line_prints() {
        assert_eq!(faults("crates/dr-pg/src/lib.rs", "fn f() { println!(); }"), 1);
        assert_eq!(faults("crates/dr-cli/src/main.rs", "fn f() { println!(); }"), 0);
        assert_eq!(faults("xtask/src/main.rs", "fn f() { println!(); }"), 0);
    }
}
