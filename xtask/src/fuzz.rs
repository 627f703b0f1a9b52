//! `cargo xtask fuzz --budget 60s`: every reader against bytes that nobody wrote (`fuzz/README.md`).

use std::path::PathBuf;
use std::process::Command;
use std::time::Duration;

use crate::child::{Child, Ended};
use crate::environment::{self, cargo};
use crate::soak::parse;
use crate::steps::Steps;

/// The course that `cargo xtask test` takes: always the same.
const FIXED_SEED: u32 = 1;
/// How long `cargo xtask test` fuzzes.
const SHORT: Duration = Duration::from_secs(10);
/// How long `cargo xtask soak` fuzzes.
pub const LONG: Duration = Duration::from_secs(120);

/// Seeds are read first, and a target may be busy when the time is over.
const SLACK: Duration = Duration::from_secs(90);

/// Runs the task.
pub fn main(args: &[String]) -> Result<(), String> {
    let mut time = SHORT;
    let mut passed_on: Vec<String> = Vec::new();
    let mut args = args.iter();
    while let Some(flag) = args.next() {
        let value = args.next().ok_or_else(|| format!("{flag} needs a value"))?;
        match flag.as_str() {
            "--budget" => time = parse(value)?,
            "--seed" | "--target" | "--input" => passed_on.extend([flag.clone(), value.clone()]),
            _ => return Err(format!("fuzz does not know {flag}")),
        }
    }
    let logs = environment::logs();
    std::fs::create_dir_all(&logs).map_err(|error| format!("cannot make {}: {error}", logs.display()))?;
    let build =
        Child::new(build(), logs.join("fuzz-build.log"), Duration::from_secs(1200)).echo(true).run()?;
    if build != Ended::Well {
        return Err("the fuzz targets do not build".into());
    }
    let mut command = command(time)?;
    command.args(passed_on);
    match Child::new(command, logs.join("fuzz.log"), time + SLACK).echo(true).run()? {
        Ended::Well => Ok(()),
        ended => Err(format!("a fault was found ({ended:?}); inputs are in {}", folder().display())),
    }
}

/// The whole workspace's features, so that nothing is built twice.
pub fn build() -> Command {
    cargo(&["build", "--quiet", "--workspace", "--bin", "dr-fuzz"])
}

/// Where inputs are kept.
fn folder() -> PathBuf {
    environment::logs().join("fuzz")
}

fn command(time: Duration) -> Result<Command, String> {
    let folder = folder();
    std::fs::create_dir_all(&folder).map_err(|error| format!("cannot make {}: {error}", folder.display()))?;
    let mut command = Command::new(environment::target().join("debug/dr-fuzz"));
    command.arg("--seconds").arg(time.as_secs().to_string()).arg("--folder").arg(folder);
    Ok(command)
}

/// Fuzzes as a step, with the programs already built.
pub fn step(steps: &mut Steps, time: Duration, seed: u32) {
    match command(time) {
        Ok(mut command) => {
            command.arg("--seed").arg(seed.to_string());
            steps.run("fuzz", time + SLACK, command);
        }
        Err(error) => steps.not_run("fuzz", &error),
    }
}

/// The slice that `cargo xtask test` has time for.
pub fn short_step(steps: &mut Steps) {
    step(steps, SHORT, FIXED_SEED);
}
