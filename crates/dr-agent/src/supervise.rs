//! Supervision: named tasks that run for as long as the agent does.
//!
//! A [`Task`] is started, watched, started again by its [`Policy`] when it failed, and asked to stop
//! before it is cut off. What happens next is decided by a machine over values (`machine.rs`); the
//! [`Supervisor`] acts on it. No failure of a task, not even a panic, ends the process: a task that
//! fails too often makes the agent unready, and is tried on.
//!
//! ```
//! use std::sync::Arc;
//! use std::time::Duration;
//! use dr_agent::supervise::{Policy, Supervised, Supervisor, Task, TaskContext, TaskError};
//!
//! struct Beat;
//!
//! #[async_trait::async_trait]
//! impl Task for Beat {
//!     fn name(&self) -> &str {
//!         "beat"
//!     }
//!
//!     async fn run(&self, context: TaskContext) -> Result<(), TaskError> {
//!         // `pause` answers false as soon as the task is asked to stop.
//!         while context.pause(Duration::from_secs(5)).await {}
//!         Ok(())
//!     }
//! }
//!
//! # tokio::runtime::Runtime::new().expect("a runtime").block_on(async {
//! let (supervisor, handle) = Supervisor::new(Duration::from_secs(60));
//! let running = tokio::spawn(supervisor.run());
//! handle.apply(vec![Supervised::new(Arc::new(Beat), Policy::permanent())]).await?;
//! handle.drain().await?;
//! let ended = running.await.expect("it does not panic");
//! assert!(ended.cut.is_empty());
//! # Ok::<(), dr_agent::supervise::SuperviseError>(()) }).expect("it runs");
//! ```

mod machine;
mod runner;
mod view;

use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use dr_core::{Classified, ErrorClass};
use serde::Serialize;
use thiserror::Error;
use tokio::sync::watch;

pub use machine::{Changes, Phase};
pub use runner::{Ended, Handle, Supervisor};
use view::Reports;
pub use view::{Report, TaskView, View};

/// Work that goes on beside other work until it is asked to stop.
#[async_trait]
pub trait Task: Send + Sync {
    /// Its name, unique in an agent: it is a label in metrics and logs.
    fn name(&self) -> &str;

    /// Works until it is done or is asked to stop; then it ends at its next safe point.
    ///
    /// It may be called again after it failed. It may be dropped at any `await` when it did not stop
    /// in time, so what it leaves at each must be what a crash may leave. It does not block a thread:
    /// blocking work belongs on `spawn_blocking`.
    async fn run(&self, context: TaskContext) -> Result<(), TaskError>;
}

/// What a running task is given.
#[derive(Clone, Debug)]
pub struct TaskContext {
    name: String,
    stop: watch::Receiver<bool>,
    reports: Reports,
}

impl TaskContext {
    /// Whether the task was asked to stop.
    pub fn is_stop_requested(&self) -> bool {
        *self.stop.borrow()
    }

    /// Returns when the task is asked to stop.
    pub async fn stop_requested(&self) {
        let mut stop = self.stop.clone();
        // A supervisor that is gone wants nothing any more.
        let _ = stop.wait_for(|asked| *asked).await;
    }

    /// Waits; answers `false` at once when the task is asked to stop.
    pub async fn pause(&self, time: Duration) -> bool {
        tokio::select! {
            () = self.stop_requested() => false,
            () = tokio::time::sleep(time) => !self.is_stop_requested(),
        }
    }

    /// Says how things are: shown in the agent's status and metrics until the next report.
    pub fn report(&self, report: Report) {
        self.reports.put(&self.name, report);
    }
}

/// Why a task ended badly, as it is shown.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Error)]
#[error("{message}")]
pub struct TaskError {
    /// The class, as in all errors.
    pub class: ErrorClass,
    /// The error's page in `docs/errors/`.
    pub code: String,
    /// What and why, in one line.
    pub message: String,
    /// What to do.
    pub hint: Option<String>,
}

impl TaskError {
    /// Of any error, with its causes.
    pub fn of(error: &(impl Classified + 'static)) -> Self {
        TaskError {
            class: error.class(),
            code: error.code().to_owned(),
            message: dr_engine::chain(error),
            hint: error.hint(),
        }
    }

    /// A defect: it panicked, or ended although it goes on for ever.
    pub fn bug(message: impl Into<String>) -> Self {
        TaskError {
            class: ErrorClass::Bug,
            code: "agent-bug".to_owned(),
            message: message.into(),
            hint: Some("Report it with the agent's log.".to_owned()),
        }
    }
}

/// When a task is started again.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Restart {
    /// Whenever it ended: it should never end by itself.
    Permanent,
    /// When it failed.
    Transient,
    /// Never.
    OneShot,
}

/// How a task is looked after.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Policy {
    /// When it is started again.
    pub restart: Restart,
    /// Whether the agent is unready while it keeps failing.
    pub required: bool,
    /// The wait before the first restart; it doubles with each failure in a row.
    pub first_wait: Duration,
    /// The longest wait.
    pub longest_wait: Duration,
    /// After so long without a failure the failures before are forgotten.
    pub steady: Duration,
    /// So many failures in a row are too often.
    pub too_often: u32,
}

/// The wait before the first restart.
pub const FIRST_WAIT: Duration = Duration::from_secs(1);
/// The longest wait before a restart.
pub const LONGEST_WAIT: Duration = Duration::from_secs(60);
/// A task that ran for so long is steady.
pub const STEADY: Duration = Duration::from_secs(60);
/// So many failures in a row make the agent unready.
pub const TOO_OFTEN: u32 = 3;

impl Policy {
    const fn of(restart: Restart) -> Self {
        Policy {
            restart,
            required: true,
            first_wait: FIRST_WAIT,
            longest_wait: LONGEST_WAIT,
            steady: STEADY,
            too_often: TOO_OFTEN,
        }
    }

    /// For a required task that never ends by itself.
    pub const fn permanent() -> Self {
        Self::of(Restart::Permanent)
    }

    /// For a required task that may be done one day.
    pub const fn transient() -> Self {
        Self::of(Restart::Transient)
    }

    /// For a required task that is tried once.
    pub const fn one_shot() -> Self {
        Self::of(Restart::OneShot)
    }

    /// The wait after so many failures in a row.
    fn wait(&self, failures: u32) -> Duration {
        let doubled = 2u32.checked_pow(failures.saturating_sub(1)).unwrap_or(u32::MAX);
        self.first_wait.saturating_mul(doubled).min(self.longest_wait)
    }
}

/// A task with how it is looked after.
#[derive(Clone)]
pub struct Supervised {
    task: Arc<dyn Task>,
    policy: Policy,
    settings: String,
}

impl Supervised {
    /// A task whose settings never change.
    pub fn new(task: Arc<dyn Task>, policy: Policy) -> Self {
        Supervised { task, policy, settings: String::new() }
    }

    /// With everything that the task was made of, as text: a reload restarts it when this differs.
    pub fn made_of(mut self, settings: impl Into<String>) -> Self {
        self.settings = settings.into();
        self
    }
}

/// What was made of settings may hold secrets: it is not shown.
impl std::fmt::Debug for Supervised {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Supervised").field("task", &self.task.name()).field("policy", &self.policy).finish()
    }
}

/// Why a supervisor did not do what it was asked for.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum SuperviseError {
    /// It stops, or has stopped.
    #[error("the tasks are being stopped")]
    Stopping,
    /// Two tasks have one name.
    #[error("two tasks are called {name:?}")]
    Twice {
        /// The name.
        name: String,
    },
    /// Its loop does not answer.
    #[error("the supervisor does not answer within {} s", within.as_secs())]
    Late {
        /// How long it was waited for.
        within: Duration,
    },
}
