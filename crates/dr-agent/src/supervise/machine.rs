//! What happens next to each task: a state machine over values, without a clock.
//!
//! A moment is the time since the supervisor began. Every input answers what is to be done.

use std::collections::BTreeMap;
use std::time::Duration;

use serde::Serialize;

use super::view::{TaskView, View};
use super::{Policy, Restart, TaskError};

/// How long a task that was cut off may take to be gone.
pub(super) const CUT_LIMIT: Duration = Duration::from_secs(5);

/// Whether the tasks run or are being stopped.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Phase {
    /// They run.
    Running,
    /// They were asked to stop, and may reach their safe point.
    Draining,
    /// What did not stop was cut off.
    Cut,
}

/// What a reload did to the tasks, by name.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Changes {
    /// New ones.
    pub started: Vec<String>,
    /// Started anew with other settings.
    pub restarted: Vec<String>,
    /// No longer wanted.
    pub stopped: Vec<String>,
    /// Left alone.
    pub kept: Vec<String>,
}

/// What is to be done.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Act {
    Start(String),
    AskToStop(String),
    Cut(String),
    Forget(String),
}

/// How a run of a task ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Outcome {
    Well,
    Badly(TaskError),
    WasCut,
}

/// A task that should be there.
#[derive(Clone)]
pub(super) struct Wanted {
    pub name: String,
    pub policy: Policy,
    pub settings: String,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    Running,
    Waiting { until: Duration },
    Stopping { until: Duration, then: Then },
    Cutting { then: Then },
    Ended,
    Failed,
}

/// What follows when a task has stopped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Then {
    Start,
    Forget,
    Rest,
}

struct Entry {
    policy: Policy,
    settings: String,
    state: State,
    since: Duration,
    failures: u32,
    restarts: u64,
    last_error: Option<TaskError>,
}

impl Entry {
    fn enter(&mut self, state: State, now: Duration) {
        (self.state, self.since) = (state, now);
    }

    /// Failures that are still held against it.
    fn failures(&self, now: Duration) -> u32 {
        let steady = self.state == State::Running && now.saturating_sub(self.since) >= self.policy.steady;
        if steady { 0 } else { self.failures }
    }

    fn unready(&self, now: Duration) -> Option<String> {
        let why = || self.last_error.as_ref().map(|e| format!(": {e}")).unwrap_or_default();
        if !self.policy.required {
            return None;
        }
        if self.state == State::Failed {
            return Some(format!("it failed{}", why()));
        }
        let failures = self.failures(now);
        (failures >= self.policy.too_often).then(|| format!("it failed {failures} times in a row{}", why()))
    }
}

pub(super) struct Machine {
    stop_timeout: Duration,
    phase: Phase,
    /// When a phase of stopping ends.
    ends: Duration,
    tasks: BTreeMap<String, Entry>,
    cut: Vec<String>,
}

impl Machine {
    pub fn new(stop_timeout: Duration) -> Self {
        let (phase, ends) = (Phase::Running, Duration::MAX);
        Machine { stop_timeout, phase, ends, tasks: BTreeMap::new(), cut: Vec::new() }
    }

    pub fn phase(&self) -> Phase {
        self.phase
    }

    pub fn set_stop_timeout(&mut self, stop_timeout: Duration) {
        self.stop_timeout = stop_timeout;
    }

    /// Names of the tasks that did not stop in time.
    pub fn cut(&self) -> &[String] {
        &self.cut
    }

    /// The tasks that should be there from now on; others are stopped, changed ones started anew.
    pub fn want(&mut self, wanted: Vec<Wanted>, now: Duration) -> (Changes, Vec<Act>) {
        let (mut changes, mut acts) = (Changes::default(), Vec::new());
        let gone: Vec<String> =
            self.tasks.keys().filter(|name| !wanted.iter().any(|w| w.name == **name)).cloned().collect();
        for name in gone {
            acts.extend(self.leave(&name, Then::Forget, now));
            changes.stopped.push(name);
        }
        for Wanted { name, policy, settings } in wanted {
            let Some(entry) = self.tasks.get_mut(&name) else {
                let (since, state) = (now, State::Running);
                let fresh =
                    Entry { policy, settings, state, since, failures: 0, restarts: 0, last_error: None };
                self.tasks.insert(name.clone(), fresh);
                acts.push(Act::Start(name.clone()));
                changes.started.push(name);
                continue;
            };
            let leaving = matches!(
                entry.state,
                State::Stopping { then: Then::Forget, .. } | State::Cutting { then: Then::Forget }
            );
            if entry.policy == policy && entry.settings == settings && !leaving {
                changes.kept.push(name);
                continue;
            }
            (entry.policy, entry.settings, entry.failures, entry.last_error) = (policy, settings, 0, None);
            acts.extend(self.leave(&name, Then::Start, now));
            changes.restarted.push(name);
        }
        (changes, acts)
    }

    /// Stops a task, or skips what it waited for; `then` follows.
    fn leave(&mut self, name: &str, then: Then, now: Duration) -> Option<Act> {
        let until = now.saturating_add(self.stop_timeout);
        let entry = self.tasks.get_mut(name)?;
        match entry.state {
            State::Running => {
                entry.enter(State::Stopping { until, then }, now);
                Some(Act::AskToStop(name.to_owned()))
            }
            State::Stopping { until, .. } => {
                entry.state = State::Stopping { until, then };
                None
            }
            State::Cutting { .. } => {
                entry.state = State::Cutting { then };
                None
            }
            State::Waiting { .. } | State::Ended | State::Failed => self.follow(name, then, now),
        }
    }

    fn follow(&mut self, name: &str, then: Then, now: Duration) -> Option<Act> {
        let entry = self.tasks.get_mut(name)?;
        match then {
            Then::Start => {
                entry.enter(State::Running, now);
                Some(Act::Start(name.to_owned()))
            }
            Then::Rest => {
                entry.enter(State::Ended, now);
                None
            }
            Then::Forget => {
                self.tasks.remove(name);
                Some(Act::Forget(name.to_owned()))
            }
        }
    }

    /// A run of a task ended.
    pub fn ended(&mut self, name: &str, outcome: Outcome, now: Duration) -> Option<Act> {
        let entry = self.tasks.get_mut(name)?;
        entry.failures = entry.failures(now);
        let outcome = match (outcome, entry.policy.restart, entry.state) {
            (Outcome::Well, Restart::Permanent, State::Running) => {
                Outcome::Badly(TaskError::bug("it ended by itself, though it should go on"))
            }
            (outcome, ..) => outcome,
        };
        let failed = match outcome {
            Outcome::Badly(error) => {
                entry.last_error = Some(error);
                true
            }
            _ => false,
        };
        match entry.state {
            State::Stopping { then, .. } | State::Cutting { then } => return self.follow(name, then, now),
            _ if !failed => entry.enter(State::Ended, now),
            _ => {
                entry.failures = entry.failures.saturating_add(1);
                let until = now.saturating_add(entry.policy.wait(entry.failures));
                let again = entry.policy.restart != Restart::OneShot;
                entry.enter(if again { State::Waiting { until } } else { State::Failed }, now);
            }
        }
        None
    }

    /// Time has passed.
    pub fn tick(&mut self, now: Duration) -> Vec<Act> {
        if self.phase == Phase::Draining && now >= self.ends {
            return self.cut_all(now);
        }
        let mut acts = Vec::new();
        for (name, entry) in &mut self.tasks {
            match entry.state {
                State::Waiting { until } if now >= until => {
                    entry.restarts += 1;
                    entry.enter(State::Running, now);
                    acts.push(Act::Start(name.clone()));
                }
                State::Stopping { until, then } if now >= until => {
                    entry.enter(State::Cutting { then }, now);
                    acts.push(Act::Cut(name.clone()));
                    if self.phase != Phase::Running {
                        self.cut.push(name.clone());
                    }
                }
                _ => {}
            }
        }
        acts
    }

    /// All tasks are to stop at their safe point.
    pub fn drain(&mut self, now: Duration) -> Vec<Act> {
        if self.phase != Phase::Running {
            return Vec::new();
        }
        (self.phase, self.ends) = (Phase::Draining, now.saturating_add(self.stop_timeout));
        let names: Vec<String> = self.tasks.keys().cloned().collect();
        names.iter().filter_map(|name| self.leave(name, Then::Rest, now)).collect()
    }

    /// All tasks are to be gone at once.
    pub fn cut_all(&mut self, now: Duration) -> Vec<Act> {
        if self.phase == Phase::Cut {
            return Vec::new();
        }
        (self.phase, self.ends) = (Phase::Cut, now.saturating_add(CUT_LIMIT));
        let mut acts = Vec::new();
        for (name, entry) in &mut self.tasks {
            match entry.state {
                State::Running | State::Stopping { .. } => {
                    acts.push(Act::Cut(name.clone()));
                    self.cut.push(name.clone());
                    entry.enter(State::Cutting { then: Then::Rest }, now);
                }
                State::Cutting { .. } => {
                    if !self.cut.contains(name) {
                        self.cut.push(name.clone());
                    }
                    entry.state = State::Cutting { then: Then::Rest };
                }
                _ => entry.enter(State::Ended, now),
            }
        }
        acts
    }

    /// Whether all tasks are gone, or nothing more can be done about those that are not.
    pub fn is_over(&self, now: Duration) -> bool {
        let gone = |entry: &Entry| matches!(entry.state, State::Ended | State::Failed);
        match self.phase {
            Phase::Running => false,
            Phase::Draining => self.tasks.values().all(gone),
            Phase::Cut => now >= self.ends || self.tasks.values().all(gone),
        }
    }

    /// When time itself next changes something.
    pub fn next(&self, now: Duration) -> Option<Duration> {
        let of_task = |entry: &Entry| match entry.state {
            State::Waiting { until } | State::Stopping { until, .. } => Some(until),
            // When its failures are forgotten.
            State::Running if entry.failures > 0 => Some(entry.since.saturating_add(entry.policy.steady)),
            _ => None,
        };
        let stopping = (self.phase != Phase::Running).then_some(self.ends);
        self.tasks.values().filter_map(of_task).chain(stopping).filter(|at| *at > now).min()
    }

    /// How everything is.
    pub fn view(&self, now: Duration) -> View {
        let of_task = |(name, entry): (&String, &Entry)| TaskView {
            name: name.clone(),
            state: match entry.state {
                State::Running => "running",
                State::Waiting { .. } => "waiting",
                State::Stopping { .. } | State::Cutting { .. } => "stopping",
                State::Ended => "ended",
                State::Failed => "failed",
            },
            since: entry.since,
            next_start: match entry.state {
                State::Waiting { until } => Some(until),
                _ => None,
            },
            required: entry.policy.required,
            failures: entry.failures(now),
            restarts: entry.restarts,
            last_error: entry.last_error.clone(),
            unready: entry.unready(now),
        };
        View { phase: self.phase, tasks: self.tasks.iter().map(of_task).collect() }
    }
}

#[cfg(test)]
mod tests;
