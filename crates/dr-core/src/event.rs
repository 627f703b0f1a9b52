//! What a job tells while it runs, and the receipt that it leaves.

use std::collections::BTreeMap;
use std::time::Duration;

use jiff::Timestamp;
use serde::{Deserialize, Serialize};

use crate::error::ErrorClass;

/// One thing that happened in a job, told to an [`EventSink`](crate::port::EventSink).
#[derive(Clone, Debug, PartialEq, Serialize)]
#[serde(tag = "event", rename_all = "snake_case")]
#[non_exhaustive]
pub enum Event {
    /// A stage of the job began; `total` is in `unit`s when it is known.
    StageBegan {
        /// The stage's stable name, as `copy`.
        stage: &'static str,
        /// How much there is to do, when known.
        total: Option<u64>,
        /// What `total` and `done` count.
        unit: Unit,
    },
    /// Work done in a stage since it began (never decreases).
    Progress {
        /// The stage.
        stage: &'static str,
        /// How much is done, in the stage's unit.
        done: u64,
        /// A short word on where it is, as an LSN or a path.
        note: Option<String>,
    },
    /// A stage ended.
    StageEnded {
        /// The stage.
        stage: &'static str,
        /// How long it took.
        elapsed_ms: u64,
    },
    /// Something an operator should know, though the job goes on.
    Warning {
        /// One sentence.
        text: String,
    },
    /// Something worth reading, not worth worrying about.
    Note {
        /// One sentence.
        text: String,
    },
}

/// What a stage counts.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Unit {
    /// Bytes.
    Bytes,
    /// Files.
    Files,
    /// WAL segments.
    Segments,
    /// Steps without a measure.
    Steps,
}

/// How one stage of a job went.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct StageTiming {
    /// The stage's stable name.
    pub stage: String,
    /// Wall-clock time, in milliseconds.
    pub elapsed_ms: u64,
}

/// The record of one job: what ran, how it ended, how long each stage took.
///
/// It is stored in the cluster's job journal and printed at the end of a job.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Receipt {
    /// The job's kind, as `backup` or `restore`.
    pub job: String,
    /// When the job began, by the clock of the host that ran it.
    pub began: Timestamp,
    /// When it ended.
    pub ended: Timestamp,
    /// The host that ran it.
    pub host: String,
    /// The version of `dr` that ran it.
    pub version: String,
    /// How it ended.
    pub outcome: Outcome,
    /// The stages, in the order in which they began.
    pub stages: Vec<StageTiming>,
    /// Facts of the job, by stable names (`backup_id`, `stored_bytes`, `reached_lsn`, …).
    pub facts: BTreeMap<String, serde_json::Value>,
    /// What the operator was warned of.
    pub warnings: Vec<String>,
}

impl Receipt {
    /// A receipt of a job that has just begun, to be replaced at its end.
    pub fn begun(job: &str, at: Timestamp) -> Self {
        ReceiptDraft::default().finish(job, at, at, String::new(), Outcome::Done)
    }
}

/// How a job ended.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "result", rename_all = "snake_case")]
pub enum Outcome {
    /// It did what it was asked to do.
    Done,
    /// It did it, and something in the result is not as it should be (a bad page, for instance).
    Degraded,
    /// It failed.
    Failed {
        /// The class of the error.
        class: ErrorClass,
        /// The stable code of the error.
        code: String,
        /// The message.
        message: String,
    },
}

/// Collects the stages, warnings and facts of a job as it runs.
///
/// Time is passed in; this type reads no clock.
#[derive(Debug, Default)]
pub struct ReceiptDraft {
    stages: Vec<StageTiming>,
    facts: BTreeMap<String, serde_json::Value>,
    warnings: Vec<String>,
}

impl ReceiptDraft {
    /// Records that a stage took `elapsed`.
    pub fn stage(&mut self, stage: &str, elapsed: Duration) {
        self.stages.push(StageTiming { stage: stage.to_owned(), elapsed_ms: elapsed.as_millis() as u64 });
    }

    /// Records a fact; a later one of the same name replaces it.
    pub fn fact(&mut self, name: &str, value: impl Into<serde_json::Value>) {
        self.facts.insert(name.to_owned(), value.into());
    }

    /// Records a warning.
    pub fn warn(&mut self, text: impl Into<String>) {
        self.warnings.push(text.into());
    }

    /// The warnings so far.
    pub fn warnings(&self) -> &[String] {
        &self.warnings
    }

    /// Completes the receipt.
    pub fn finish(
        self,
        job: &str,
        began: Timestamp,
        ended: Timestamp,
        host: String,
        outcome: Outcome,
    ) -> Receipt {
        Receipt {
            job: job.to_owned(),
            began,
            ended,
            host,
            version: env!("CARGO_PKG_VERSION").to_owned(),
            outcome,
            stages: self.stages,
            facts: self.facts,
            warnings: self.warnings,
        }
    }
}
