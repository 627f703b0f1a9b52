//! `cargo xtask bench-peers`: dr beside pgBackRest; `cargo xtask bench-stream`: a streamed backup
//! beside what bounds it.

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

/// Builds for release and runs `benches/stream.py`; further arguments go to it.
pub fn stream(args: &[String]) -> Result<(), String> {
    run(cargo(&["build", "--release", "--package", "dr-cli", "--package", "dr-benches"]))?;
    let mut bench = Command::new("python3");
    bench.current_dir(root()).arg("benches/stream.py");
    bench.arg("--dr").arg(target().join("release/dr"));
    bench.arg("--receive").arg(target().join("release/receive"));
    bench.args(args);
    run(bench)
}

fn run(mut command: Command) -> Result<(), String> {
    let status = command.status().map_err(|error| format!("{command:?}: {error}"))?;
    if status.success() { Ok(()) } else { Err(format!("{command:?} failed: {status}")) }
}
