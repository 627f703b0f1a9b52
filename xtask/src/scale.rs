//! `cargo xtask scale`: does memory stay flat when the cluster grows?
//!
//! Parts of a pretended cluster of 10 TB and six million files are backed up, each in a process of its
//! own (`benches/src/bin/scale.rs`), and their peaks compared.

use std::path::Path;
use std::process::Command;
use std::time::Duration;

use serde_json::Value;

use crate::child::{Child, Ended, last_lines};
use crate::environment::{self, cargo};
use crate::janitor::Scratch;

/// The cluster that the limits of the format were made for.
const WHOLE: Part = Part { bytes: 10_000_000_000_000, files: 6_000_000, relations: 2_000_000 };

/// No backup takes more memory, whatever the size of the cluster.
const MOST_MIB: u64 = 256;

/// Ten times the cluster may take so much more, in percent: allocators keep what they once had.
const GROWTH_PERCENT: u64 = 25;

/// About 2.3 GB a second were read where this was written; a slower machine may take four times as long.
const BYTES_A_SECOND: u64 = 600_000_000;

/// How long all parts of the plain task take together there, so that `soak` knows whether it has the time.
pub const TAKES: Duration = Duration::from_secs(600);

#[derive(Clone, Copy, Debug)]
struct Part {
    bytes: u64,
    files: u64,
    relations: u64,
}

impl Part {
    fn of(divisor: u64) -> Part {
        let Part { bytes, files, relations } = WHOLE;
        Part { bytes: bytes / divisor, files: files / divisor, relations: relations / divisor }
    }
}

/// What a part took.
#[derive(Debug)]
struct Taken {
    first_mib: u64,
    second_mib: u64,
}

/// Runs the task: the standard parts, or one of the reader's choice.
pub fn main(args: &[String]) -> Result<(), String> {
    let divisor = match args {
        [] => None,
        [flag, divisor] if flag == "--part" => {
            let wrong = || format!("--part {divisor}: write 4 for a quarter");
            Some(divisor.parse::<u64>().ok().filter(|divisor| *divisor > 0).ok_or_else(wrong)?)
        }
        _ => return Err("scale knows only --part DIVISOR, as in --part 4".into()),
    };
    let scratch = Scratch::new("drt")?;
    build()?;
    println!(
        "{:>8} {:>10} {:>10} {:>8} {:>9} {:>9} {:>8} {:>9}",
        "GB", "files", "relations", "seconds", "stored MB", "peak MiB", "second s", "peak MiB"
    );
    match divisor {
        Some(divisor) => within(measure(&scratch, Part::of(divisor))?),
        None => compare(&scratch),
    }
}

fn compare(scratch: &Scratch) -> Result<(), String> {
    let small = measure(scratch, Part::of(100))?;
    let large = measure(scratch, Part::of(10))?;
    let many = measure(scratch, Part { bytes: Part::of(100).bytes, ..WHOLE })?;
    judge(small, large)?;
    within(many)
}

/// Whether memory is flat between a part and one ten times as large.
fn judge(small: Taken, large: Taken) -> Result<(), String> {
    let most = small.first_mib * (100 + GROWTH_PERCENT) / 100;
    if large.first_mib > most {
        let (took, before) = (large.first_mib, small.first_mib);
        return Err(format!("ten times the cluster took {took} MiB in place of {before}; {most} would do"));
    }
    within(small)?;
    within(large)
}

fn within(taken: Taken) -> Result<(), String> {
    match taken.first_mib.max(taken.second_mib) {
        peak if peak > MOST_MIB => Err(format!("a backup took {peak} MiB; {MOST_MIB} are allowed")),
        _ => Ok(()),
    }
}

fn build() -> Result<(), String> {
    let command = cargo(&["build", "--release", "--quiet", "--package", "dr-benches", "--bin", "scale"]);
    environment::run("scale-build", Duration::from_secs(40 * 60), command)
}

/// Backs a part up, twice, and prints what it took.
fn measure(scratch: &Scratch, part: Part) -> Result<Taken, String> {
    let place = scratch.path().join("scale");
    let log = environment::logs().join("scale.log");
    let mut command = Command::new(environment::target().join("release/scale"));
    command.arg(&place).args([part.bytes, part.files, part.relations].map(|number| number.to_string()));
    let deadline = Duration::from_secs(300 + part.bytes / BYTES_A_SECOND);
    let ended = Child::new(command, log.clone(), deadline).marked(scratch.mark()).run()?;
    let _ = std::fs::remove_dir_all(&place);
    if ended != Ended::Well {
        return Err(format!("{part:?}: {ended:?}\n{}", last_lines(&log, 10)));
    }
    report(part, &log)
}

fn report(part: Part, log: &Path) -> Result<Taken, String> {
    let unclear = || format!("{} is not what was expected", log.display());
    let value: Value = serde_json::from_str(&last_lines(log, 1)).map_err(|_| unclear())?;
    let run = |number: usize| &value["runs"][number];
    let number = |run: &Value, name: &str| run[name].as_u64().ok_or_else(unclear);
    let taken = Taken { first_mib: number(run(0), "peak_mib")?, second_mib: number(run(1), "peak_mib")? };
    println!(
        "{:>8} {:>10} {:>10} {:>8.1} {:>9} {:>9} {:>8.1} {:>9}",
        part.bytes / 1_000_000_000,
        part.files,
        part.relations,
        run(0)["seconds"].as_f64().ok_or_else(unclear)?,
        number(run(0), "stored")? / 1_000_000,
        taken.first_mib,
        run(1)["seconds"].as_f64().ok_or_else(unclear)?,
        taken.second_mib
    );
    Ok(taken)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn taken(first_mib: u64, second_mib: u64) -> Taken {
        Taken { first_mib, second_mib }
    }

    #[test]
    fn memory_that_grows_with_the_cluster_is_a_fault() {
        assert_eq!(judge(taken(149, 143), taken(143, 155)), Ok(()));
        assert!(judge(taken(149, 143), taken(200, 155)).is_err_and(|text| text.contains("ten times")));
        assert!(judge(taken(149, 143), taken(150, 300)).is_err_and(|text| text.contains("300 MiB")));
    }
}
