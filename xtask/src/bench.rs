//! `cargo xtask bench-peers`: dr beside pgBackRest, in one run.

use std::process::Command;

use crate::environment::{cargo, find_program, root, target};

/// Builds `dr` for release and runs `benches/peers.py`; further arguments go to it.
pub fn main(args: &[String]) -> Result<(), String> {
    let given = args.iter().any(|arg| arg.starts_with("--pgbackrest"));
    let other = find_program("pgbackrest");
    if !given && other.is_none() {
        return Err("pgBackRest is not installed; name it with --pgbackrest PATH".into());
    }
    run(cargo(&["build", "--release", "--package", "dr-cli"]))?;
    let mut bench = Command::new("python3");
    bench.current_dir(root()).arg("benches/peers.py").arg("--dr").arg(target().join("release/dr"));
    if let (false, Some(path)) = (given, other) {
        bench.arg("--pgbackrest").arg(path);
    }
    bench.args(args);
    run(bench)
}

fn run(mut command: Command) -> Result<(), String> {
    let status = command.status().map_err(|error| format!("{command:?}: {error}"))?;
    if status.success() { Ok(()) } else { Err(format!("{command:?} failed: {status}")) }
}
