//! What every job is given: where to keep, what to tell, which time it is.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use dr_core::event::{Event, Outcome, Receipt, ReceiptDraft, Unit};
use dr_core::port::{Clock, EventSink};
use dr_core::{Classified, Timestamp};
use dr_storage::{ClusterStore, Repository};

use crate::error::EngineError;

/// How often a wait for a server looks whether the job is cancelled.
const ASK_EVERY: Duration = Duration::from_millis(200);

/// What every job is given.
#[derive(Clone, Debug)]
pub struct Context {
    /// The repository.
    pub repo: Repository,
    /// The cluster's part of it.
    pub store: ClusterStore,
    /// Where progress is told.
    pub events: Arc<dyn EventSink>,
    /// The wall clock.
    pub clock: Arc<dyn Clock>,
    /// The cluster's label: what people call it.
    pub label: String,
    /// The name of this host, for records.
    pub host: String,
    /// Set to stop the job at its next safe point.
    pub cancel: Cancel,
}

/// A request to stop, seen by all parts of a job.
#[derive(Clone, Debug, Default)]
pub struct Cancel(Arc<AtomicBool>);

impl Cancel {
    /// Asks the job to stop.
    pub fn cancel(&self) {
        self.0.store(true, Ordering::Relaxed);
    }

    /// Whether it was asked to stop.
    pub fn is_cancelled(&self) -> bool {
        self.0.load(Ordering::Relaxed)
    }

    /// An error of class *cancelled* when the job was asked to stop.
    pub fn check(&self) -> Result<(), EngineError> {
        if self.is_cancelled() { Err(EngineError::Cancelled) } else { Ok(()) }
    }

    /// Waits for a server's answer, but no longer than until the job is asked to stop: a server may
    /// need an hour for its checkpoint, or be gone. What is dropped then must end its side itself.
    pub async fn or<T>(
        &self,
        answer: impl Future<Output = Result<T, EngineError>>,
    ) -> Result<T, EngineError> {
        tokio::pin!(answer);
        loop {
            tokio::select! {
                biased;
                answer = &mut answer => return answer,
                () = tokio::time::sleep(ASK_EVERY) => self.check()?,
            }
        }
    }
}

/// The record of a running job: its stages as they pass, and the receipt at its end.
#[derive(Debug)]
pub struct JobLog {
    context: Context,
    job: &'static str,
    began: Timestamp,
    draft: ReceiptDraft,
}

impl JobLog {
    /// Begins the record of a job.
    pub fn begin(context: &Context, job: &'static str) -> Self {
        JobLog { context: context.clone(), job, began: context.clock.now(), draft: ReceiptDraft::default() }
    }

    /// Begins a stage; it ends with [`JobLog::end`].
    pub fn stage(&mut self, stage: &'static str, total: Option<u64>, unit: Unit) -> StageClock {
        self.context.events.emit(Event::StageBegan { stage, total, unit });
        StageClock { stage, began: Instant::now() }
    }

    /// Ends a stage and records its time.
    pub fn end(&mut self, clock: StageClock) -> Duration {
        let elapsed = clock.began.elapsed();
        self.draft.stage(clock.stage, elapsed);
        self.context
            .events
            .emit(Event::StageEnded { stage: clock.stage, elapsed_ms: elapsed.as_millis() as u64 });
        elapsed
    }

    /// Records a fact.
    pub fn fact(&mut self, name: &str, value: impl Into<serde_json::Value>) {
        self.draft.fact(name, value);
    }

    /// Warns the operator, now and in the receipt.
    pub fn warn(&mut self, text: impl Into<String>) {
        let text = text.into();
        self.context.events.emit(Event::Warning { text: text.clone() });
        self.draft.warn(text);
    }

    /// Ends the job: makes the receipt and appends it to the cluster's journal.
    ///
    /// A journal that cannot be written is a warning in the receipt: the job's own result stands.
    pub async fn close(self, result: Result<Outcome, &EngineError>) -> Receipt {
        let outcome = result.unwrap_or_else(|error| Outcome::Failed {
            class: error.class(),
            code: error.code().to_owned(),
            message: chain(error),
        });
        let ended = self.context.clock.now();
        let mut receipt = self.draft.finish(self.job, self.began, ended, self.context.host.clone(), outcome);
        let body = serde_json::to_value(&receipt).unwrap_or_default();
        if let Err(error) = self.context.store.journal().append("receipt", body).await {
            let text = format!("the receipt could not be stored: {}", chain(&error));
            self.context.events.emit(Event::Warning { text: text.clone() });
            receipt.warnings.push(text);
        }
        receipt
    }
}

/// The clock of one stage.
#[derive(Debug)]
pub struct StageClock {
    stage: &'static str,
    began: Instant,
}

/// An error and its causes in one line.
pub fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut next = error.source();
    while let Some(cause) = next {
        text.push_str(": ");
        text.push_str(&cause.to_string());
        next = cause.source();
    }
    text
}

/// What is to be said of manifests that cannot be read.
pub(crate) fn unreadable(catalogue: &dr_storage::Catalogue) -> Vec<dr_core::port::Finding> {
    let finding = |(id, error): &(dr_core::BackupId, dr_storage::RepoError)| {
        let detail = format!("backup {id} cannot be read and was passed over: {}", chain(error));
        let fix = "Run `dr verify --all`; bring its manifest back from a copy of the repository.";
        dr_core::port::Finding::warning("backup-unreadable", detail, fix)
    };
    catalogue.unreadable.iter().map(finding).collect()
}
