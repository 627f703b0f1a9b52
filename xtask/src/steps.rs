//! Steps with a deadline each and one budget for all, and the table at the end.

use std::path::PathBuf;
use std::process::Command;
use std::time::{Duration, Instant};

use crate::child::{Child, Ended, Mark};

/// What became of a step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum State {
    /// Done, and good.
    Passed,
    /// Done, and not good.
    Failed,
    /// Killed at its deadline, or at the end of the budget.
    TimedOut,
    /// Not started, because the budget was used up or an earlier step is needed.
    NotRun,
    /// Left out, with a reason that was printed.
    Skipped,
}

struct Line {
    name: String,
    state: State,
    took: Duration,
}

/// Runs steps one after the other and remembers how each went.
pub struct Steps {
    started: Instant,
    budget: Duration,
    logs: PathBuf,
    lines: Vec<Line>,
    env: Vec<(String, String)>,
    mark: Mark,
}

impl Steps {
    /// Steps that all end within `budget`; logs go to the directory `logs`, and every process
    /// carries `mark`.
    pub fn new(budget: Duration, logs: PathBuf, mark: Mark) -> Result<Steps, String> {
        std::fs::create_dir_all(&logs).map_err(|error| format!("cannot make {}: {error}", logs.display()))?;
        Ok(Steps { started: Instant::now(), budget, logs, lines: Vec::new(), env: Vec::new(), mark })
    }

    /// Sets a variable for every later step.
    pub fn set(&mut self, name: &str, value: impl Into<String>) {
        self.env.push((name.to_owned(), value.into()));
    }

    /// What is left of the budget.
    pub fn remaining(&self) -> Duration {
        self.budget.saturating_sub(self.started.elapsed())
    }

    /// Runs one command as a step; its output is shown as it comes.
    pub fn run(&mut self, name: &str, deadline: Duration, mut command: Command) -> State {
        let deadline = deadline.min(self.remaining());
        if deadline.is_zero() {
            println!("== {name}: not run, the budget of {} is used up", minutes(self.budget));
            return self.note(name, State::NotRun, Duration::ZERO);
        }
        println!("== {name} (at most {})", minutes(deadline));
        // What the step itself says wins.
        let own: Vec<_> = command.get_envs().map(|(name, _)| name.to_owned()).collect();
        command
            .envs(self.env.iter().filter(|(name, _)| !own.iter().any(|own| own == name.as_str())).cloned());
        let log = self.logs.join(format!("{}.log", name.replace([' ', '/'], "-")));
        let started = Instant::now();
        let state = match Child::new(command, log, deadline).marked(&self.mark).echo(true).run() {
            Ok(Ended::Well) => State::Passed,
            Ok(Ended::Badly(status)) => {
                println!("== {name}: FAILED, {status}");
                State::Failed
            }
            Ok(Ended::TimedOut) => {
                println!("== {name}: TIMED OUT after {}", minutes(deadline));
                State::TimedOut
            }
            Err(error) => {
                println!("== {name}: FAILED, {error}");
                State::Failed
            }
        };
        let left = self.mark.sweep();
        if left > 0 {
            println!("== {name}: left {left} processes behind; they were ended");
        }
        self.note(name, state, started.elapsed())
    }

    /// Runs a function as a step.
    pub fn call(&mut self, name: &str, work: impl FnOnce() -> Result<(), String>) -> State {
        println!("== {name}");
        let started = Instant::now();
        let state = match work() {
            Ok(()) => State::Passed,
            Err(error) => {
                println!("== {name}: FAILED, {error}");
                State::Failed
            }
        };
        self.note(name, state, started.elapsed())
    }

    /// Notes a step that is left out, saying why.
    pub fn skip(&mut self, name: &str, why: &str) {
        println!("== {name}: left out, {why}");
        self.note(name, State::Skipped, Duration::ZERO);
    }

    /// Notes a step that cannot be run because an earlier one failed.
    pub fn not_run(&mut self, name: &str, why: &str) {
        println!("== {name}: not run, {why}");
        self.note(name, State::NotRun, Duration::ZERO);
    }

    fn note(&mut self, name: &str, state: State, took: Duration) -> State {
        self.lines.push(Line { name: name.to_owned(), state, took });
        state
    }

    /// Prints the table; an error if any step did not pass.
    pub fn finish(self) -> Result<(), String> {
        println!("\n{:<24} {:>9}  result", "step", "seconds");
        for line in &self.lines {
            let word = match line.state {
                State::Passed => "passed",
                State::Failed => "FAILED",
                State::TimedOut => "TIMED OUT",
                State::NotRun => "NOT RUN",
                State::Skipped => "left out",
            };
            println!("{:<24} {:>9.1}  {word}", line.name, line.took.as_secs_f64());
        }
        println!("{:<24} {:>9.1}\n", "together", self.started.elapsed().as_secs_f64());
        let count = |wanted: &[State]| self.lines.iter().filter(|line| wanted.contains(&line.state)).count();
        let passed = count(&[State::Passed]);
        let failed = count(&[State::Failed, State::TimedOut, State::NotRun]);
        println!("steps: {passed} passed, {failed} failed, {} skipped", count(&[State::Skipped]));
        if failed == 0 { Ok(()) } else { Err(format!("{failed} of {} steps did not pass", self.lines.len())) }
    }
}

fn minutes(time: Duration) -> String {
    let seconds = time.as_secs();
    if seconds < 120 { format!("{seconds} s") } else { format!("{} min", seconds / 60) }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn steps(name: &str, budget: Duration) -> Steps {
        let logs = std::env::temp_dir().join(format!("xtask-steps-{}-{name}", std::process::id()));
        Steps::new(budget, logs, Mark::fresh()).expect("steps")
    }

    fn sh(script: &str) -> Command {
        let mut command = Command::new("/bin/sh");
        command.args(["-c", script]);
        command
    }

    #[test]
    fn a_step_that_fails_fails_the_whole() {
        let mut steps = steps("fails", Duration::from_secs(60));
        assert_eq!(steps.run("good", Duration::from_secs(9), sh("exit 0")), State::Passed);
        assert_eq!(steps.run("bad", Duration::from_secs(9), sh("exit 3")), State::Failed);
        assert!(steps.finish().is_err());
    }

    #[test]
    fn nothing_starts_after_the_budget_and_that_is_a_failure() {
        let mut steps = steps("budget", Duration::ZERO);
        assert_eq!(steps.run("late", Duration::from_secs(9), sh("exit 0")), State::NotRun);
        assert!(steps.finish().is_err());
    }
}
