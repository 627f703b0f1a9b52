//! What a check found.

use serde::{Deserialize, Serialize};

/// The outcome of one check, for `dr check` and the plans of jobs.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Finding {
    /// The check's stable name, as `wal-level`.
    pub check: String,
    /// How it went.
    pub verdict: Verdict,
    /// What was found, as one sentence with its values.
    pub detail: String,
    /// What to do about it, as a command or a setting; empty when nothing is to be done.
    pub fix: String,
}

/// How a check went.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Verdict {
    /// As it should be.
    Good,
    /// It works, and will hurt one day.
    Warning,
    /// It does not work.
    Bad,
}

impl Finding {
    /// A check that found nothing wrong.
    pub fn good(check: &str, detail: impl Into<String>) -> Self {
        Finding { check: check.to_owned(), verdict: Verdict::Good, detail: detail.into(), fix: String::new() }
    }

    /// A check that found something to mend soon.
    pub fn warning(check: &str, detail: impl Into<String>, fix: impl Into<String>) -> Self {
        Finding { check: check.to_owned(), verdict: Verdict::Warning, detail: detail.into(), fix: fix.into() }
    }

    /// A check that found something that stops the job.
    pub fn bad(check: &str, detail: impl Into<String>, fix: impl Into<String>) -> Self {
        Finding { check: check.to_owned(), verdict: Verdict::Bad, detail: detail.into(), fix: fix.into() }
    }
}
