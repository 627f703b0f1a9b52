//! `cargo xtask soak --budget 2h`: what takes long once, then the randomised and the long tests,
//! again and again.
//!
//! Each round uses another seed and more cases (`PROPTEST_CASES`, `DR_TEST_SEED`), so that a night
//! finds what a minute does not. A round that fails ends the soak and says with which seed.

use std::process::Command;
use std::time::{Duration, Instant};

use crate::child::{Child, Ended, last_lines};
use crate::environment::{self, cargo};
use crate::fuzz;
use crate::janitor::Scratch;
use crate::postgres;
use crate::scale;
use crate::steps::{State, Steps};

/// Which tests are worth repeating: those that draw at random and those that take long.
const FILTER: &str = "test(/(^|::)slow_/) | test(/(^|::)(any|random|every)_/) | test(/prop|sweep|seed/)";

/// Runs the task.
pub fn main(args: &[String]) -> Result<(), String> {
    let budget = match args {
        [flag, time] if flag == "--budget" => parse(time)?,
        _ => return Err("soak needs --budget, as in --budget 2h".into()),
    };
    if environment::find_program("cargo-nextest").is_none() {
        return Err("cargo-nextest is needed (cargo install cargo-nextest --locked)".into());
    }
    environment::ensure_postgres()?;
    let scratch = Scratch::new("drt")?;
    let started = Instant::now();
    once(&scratch, budget)?;
    rounds(&scratch, budget, started)
}

/// What is worth doing once.
fn once(scratch: &Scratch, budget: Duration) -> Result<(), String> {
    // As with a round, the last step may run over the budget, but not for ever.
    let limit = budget + Duration::from_secs(900);
    let mut steps = Steps::new(limit, environment::logs(), scratch.mark().clone())?;
    let place = scratch.path().to_string_lossy();
    steps.set("DR_TEST_TMP", place.clone());
    steps.set("TMPDIR", place);
    let major = postgres::FROM_ELSEWHERE;
    match postgres::programs(major, &scratch.path().join(format!("postgresql-{major}"))) {
        Ok(bin) => postgres::on_one(&mut steps, major, &bin, &["nextest", "run"]),
        Err(error) => steps.skip(&format!("postgresql {major}"), &error),
    }
    if steps.run("build fuzz targets", Duration::from_secs(1200), fuzz::build()) == State::Passed {
        fuzz::step(&mut steps, fuzz::LONG.min(budget), std::process::id());
    }
    if budget >= 3 * scale::TAKES {
        steps.call("scale", || scale::main(&[]));
    } else {
        steps.skip("scale", "it takes a third of a budget of 30 minutes");
    }
    steps.finish()
}

fn rounds(scratch: &Scratch, budget: Duration, started: Instant) -> Result<(), String> {
    let logs = environment::logs();
    std::fs::create_dir_all(&logs).map_err(|error| error.to_string())?;
    let first_seed = std::process::id();
    let (mut rounds, mut tests) = (0_u32, 0_u64);
    while rounds == 0 || started.elapsed() < budget {
        let cases = 256_u32.saturating_mul(1 << rounds.min(6));
        let seed = first_seed.wrapping_add(rounds);
        let log = logs.join("soak.log");
        // A round may run over the budget, but not for ever.
        let deadline = budget.saturating_sub(started.elapsed()) + Duration::from_secs(900);
        let round = Instant::now();
        let ended =
            Child::new(command(scratch, cases, seed), log.clone(), deadline).marked(scratch.mark()).run()?;
        let count = summary(&std::fs::read_to_string(&log).unwrap_or_default());
        (rounds, tests) = (rounds + 1, tests + count);
        println!(
            "round {rounds}: {count} tests, {cases} cases each, seed {seed}, {:.0} s",
            round.elapsed().as_secs_f64()
        );
        scratch.mark().sweep();
        if ended != Ended::Well {
            println!("{}", last_lines(&log, 60));
            return Err(format!(
                "round {rounds} failed with DR_TEST_SEED={seed} PROPTEST_CASES={cases}; see {}",
                log.display()
            ));
        }
    }
    println!("soak: {rounds} rounds, {tests} test runs, {:.0} s", started.elapsed().as_secs_f64());
    println!("{tests} passed, 0 failed");
    Ok(())
}

fn command(scratch: &Scratch, cases: u32, seed: u32) -> Command {
    let mut command = cargo(&["nextest", "run", "--workspace", "--profile", "soak", "-E", FILTER]);
    command.env("PROPTEST_CASES", cases.to_string()).env("DR_TEST_SEED", seed.to_string());
    command.env("DR_TEST_SERIES", (cases / 32).to_string());
    command.env("DR_TEST_TMP", scratch.path()).env("TMPDIR", scratch.path());
    command
}

/// How many tests nextest ran: `Summary [ 1.0s] 12 tests run: 12 passed`.
fn summary(log: &str) -> u64 {
    let line = log.lines().rev().find(|line| line.contains("tests run:")).unwrap_or_default();
    let words: Vec<&str> = line.split_whitespace().collect();
    let at = words.iter().position(|word| *word == "tests").unwrap_or(0);
    at.checked_sub(1).and_then(|at| words[at].parse().ok()).unwrap_or(0)
}

/// Reads a time with its unit.
pub fn parse(text: &str) -> Result<Duration, String> {
    let unit = text.chars().last().unwrap_or(' ');
    let count: Option<u64> = text.strip_suffix(unit).and_then(|count| count.parse().ok());
    let seconds = match unit {
        's' => Some(1),
        'm' => Some(60),
        'h' => Some(3600),
        _ => None,
    };
    match (count, seconds) {
        (Some(count), Some(seconds)) => Ok(Duration::from_secs(count * seconds)),
        _ => Err(format!("{text:?} is no time; write 90s, 30m or 2h")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_budget_has_a_unit() {
        assert_eq!(parse("2h"), Ok(Duration::from_secs(7200)));
        assert_eq!(parse("90s"), Ok(Duration::from_secs(90)));
        assert!(parse("2").is_err() && parse("").is_err());
    }

    #[test]
    fn the_runner_s_summary_is_counted() {
        assert_eq!(summary("x\n     Summary [   1.0s] 12 tests run: 12 passed, 3 skipped\n"), 12);
        assert_eq!(summary(""), 0);
    }
}
