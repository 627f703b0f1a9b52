//! What can be seen of the tasks from outside.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use super::TaskError;
use super::machine::Phase;
use crate::metrics::Family;

/// What a task says of itself.
#[derive(Clone, Debug, Default)]
pub struct Report {
    /// For `dr agent status`.
    pub detail: serde_json::Value,
    /// For `/metrics`.
    pub metrics: Vec<Family>,
}

/// All tasks at one moment.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct View {
    /// Whether they run or are being stopped.
    pub phase: Phase,
    /// Each, by name.
    pub tasks: Vec<TaskView>,
}

/// A task at one moment. Moments count from the supervisor's start.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TaskView {
    /// Its name.
    pub name: String,
    /// `running`, `waiting` (for its next start), `stopping`, `ended` or `failed`.
    pub state: &'static str,
    /// Since when it is in this state.
    pub since: Duration,
    /// When it is started again.
    pub next_start: Option<Duration>,
    /// Whether it is required.
    pub required: bool,
    /// How often it failed in a row.
    pub failures: u32,
    /// How often it was started again after a failure.
    pub restarts: u64,
    /// Why it failed last.
    pub last_error: Option<TaskError>,
    /// Why the agent is not ready because of it.
    pub unready: Option<String>,
}

impl TaskView {
    /// Whether it does its work now.
    pub fn is_up(&self) -> bool {
        matches!(self.state, "running" | "stopping")
    }
}

/// The last report of each task.
#[derive(Clone, Debug, Default)]
pub(crate) struct Reports(Arc<Mutex<BTreeMap<String, Report>>>);

impl Reports {
    pub fn put(&self, name: &str, report: Report) {
        if let Ok(mut reports) = self.0.lock() {
            reports.insert(name.to_owned(), report);
        }
    }

    pub fn forget(&self, name: &str) {
        if let Ok(mut reports) = self.0.lock() {
            reports.remove(name);
        }
    }

    pub fn all(&self) -> BTreeMap<String, Report> {
        self.0.lock().map(|reports| reports.clone()).unwrap_or_default()
    }
}
