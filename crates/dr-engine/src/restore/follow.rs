//! The replay: started, followed, and proven to have reached its target.

use std::time::{Duration, Instant};

use dr_core::event::Event;
use dr_core::guard::Guard;
use dr_core::port::{Instance, InstanceStatus, RecoveryEnd, RecoveryTarget, RunState, TargetAction};
use dr_core::{Lsn, SystemId, Timeline, Timestamp};
use serde::Serialize;

use super::RestorePlan;
use crate::context::Context;
use crate::error::EngineError;

/// How often the server is asked.
const POLL: Duration = Duration::from_millis(100);

/// What a recovery reached, with the server's own words as evidence.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Reached {
    /// The cluster.
    pub system_id: SystemId,
    /// The timeline that the server is on now.
    pub timeline: Timeline,
    /// The position after the last record replayed.
    pub lsn: Lsn,
    /// The time of the last commit replayed.
    pub last_commit: Option<Timestamp>,
    /// Whether the server is a primary now.
    pub promoted: bool,
    /// Whether it runs: it was stopped at the target when that was asked for.
    pub running: bool,
    /// How to reach it, as a connection string; `None` when it does not run.
    pub connection: Option<String>,
    /// Lines of the server's log.
    pub evidence: Vec<String>,
}

/// Starts the server on the restored directory and waits until the target is reached.
pub(super) async fn start_and_follow(
    context: &Context,
    instance: &dyn Instance,
    plan: &RestorePlan,
) -> Result<Reached, EngineError> {
    let data = &plan.options.to;
    let major = plan.backup.cluster.version_num / 10_000;
    instance
        .start(data, major, false)
        .await
        .map_err(EngineError::cluster("cannot start the restored server"))?;
    let mut progress = Progress::new(plan);
    loop {
        context.cancel.check()?;
        let doing = "cannot tell how far the restored server is";
        let status = instance.status(data).await.map_err(EngineError::cluster(doing))?;
        progress.note(context, &status)?;
        match status.state {
            RunState::Primary | RunState::Paused => return prove(instance, plan, &status, &progress),
            RunState::Stopped => return stopped(instance, plan, &status, &progress),
            RunState::Starting | RunState::Recovering => {}
        }
        tokio::time::sleep(POLL).await;
    }
}

/// How far the replay is, and since when it stands still.
struct Progress {
    start: Lsn,
    last: Lsn,
    changed: Instant,
    last_commit: Option<Timestamp>,
    limit: Duration,
}

impl Progress {
    fn new(plan: &RestorePlan) -> Self {
        let start = plan.backup.start.lsn;
        Progress {
            start,
            last: start,
            changed: Instant::now(),
            last_commit: None,
            limit: plan.options.stall_limit,
        }
    }

    fn note(&mut self, context: &Context, status: &InstanceStatus) -> Result<(), EngineError> {
        if let Some(lsn) = status.lsn.filter(|lsn| *lsn > self.last) {
            self.last = lsn;
            self.changed = Instant::now();
        }
        self.last_commit = status.last_commit.or(self.last_commit);
        let commit = self.last_commit.map(|t| format!(", last commit {t:.0}")).unwrap_or_default();
        context.events.emit(Event::Progress {
            stage: "replay",
            done: self.last.since(self.start),
            note: Some(format!("at {}{commit}", self.last)),
        });
        if self.changed.elapsed() > self.limit {
            let waited = dr_core::size::duration(self.limit);
            return Err(EngineError::ReplayStalled { at: self.last, waited });
        }
        Ok(())
    }
}

fn describe(target: &RecoveryTarget) -> String {
    match target {
        RecoveryTarget::Latest => "the end of the archived WAL".into(),
        RecoveryTarget::Immediate => "the first consistent state".into(),
        RecoveryTarget::Time { time } => format!("time {time}"),
        RecoveryTarget::Lsn { lsn } => format!("LSN {lsn}"),
        RecoveryTarget::Xid { xid } => format!("transaction {xid}"),
        RecoveryTarget::Name { name } => format!("restore point {name:?}"),
    }
}

fn missed(plan: &RestorePlan, reason: impl Into<String>) -> EngineError {
    EngineError::TargetNotReached { target: describe(&plan.options.target), reason: reason.into() }
}

/// The server stopped: right when that was asked for at the target, else a failure.
fn stopped(
    instance: &dyn Instance,
    plan: &RestorePlan,
    status: &InstanceStatus,
    progress: &Progress,
) -> Result<Reached, EngineError> {
    let end = end_of(instance, plan)?;
    if plan.options.action == TargetAction::Shutdown && end.stopped_at_target && !end.failed {
        return prove(instance, plan, status, progress);
    }
    Err(missed(plan, words_of(&end)))
}

fn end_of(instance: &dyn Instance, plan: &RestorePlan) -> Result<RecoveryEnd, EngineError> {
    instance
        .recovery_end(&plan.options.to)
        .map_err(EngineError::cluster("cannot read the restored server's log"))
}

fn words_of(end: &RecoveryEnd) -> String {
    let words = end.evidence.join("; ");
    if words.is_empty() {
        "the server stopped without a word".into()
    } else {
        format!("the server says: {words}")
    }
}

/// Compares what was reached with the plan. A target that was not reached is a failure.
fn prove(
    instance: &dyn Instance,
    plan: &RestorePlan,
    status: &InstanceStatus,
    progress: &Progress,
) -> Result<Reached, EngineError> {
    let end = end_of(instance, plan)?;
    let doing = "cannot read pg_control of the restored server";
    let control = instance.control(&plan.options.to).map_err(EngineError::cluster(doing))?;
    let expected = plan.backup.cluster.system_id;
    if control.system_id != expected {
        return Err(missed(plan, format!("the server is cluster {}, not {expected}", control.system_id)));
    }
    let reached = Reached {
        system_id: control.system_id,
        timeline: end.new_timeline.or(status.timeline).unwrap_or(control.timeline),
        // A server that stopped at its target tells no position any more: pg_control has it.
        lsn: end.lsn.or(status.lsn).unwrap_or(progress.last.max(control.min_recovery_end)),
        last_commit: end.last_commit.or(progress.last_commit),
        promoted: status.state == RunState::Primary,
        running: status.state != RunState::Stopped,
        connection: instance.connection(&plan.options.to),
        evidence: end.evidence.clone(),
    };
    if Guard::TargetReached.holds() {
        check_reached(plan, &end, &reached)?;
    }
    Ok(reached)
}

fn check_reached(plan: &RestorePlan, end: &RecoveryEnd, reached: &Reached) -> Result<(), EngineError> {
    if end.failed {
        return Err(missed(plan, words_of(end)));
    }
    if reached.lsn < plan.backup.stop_lsn {
        return Err(missed(
            plan,
            format!("replay ended at {}, before the backup is consistent", reached.lsn),
        ));
    }
    match &plan.options.target {
        RecoveryTarget::Latest => {}
        RecoveryTarget::Time { time } if reached.last_commit.is_some_and(|at| at > *time) => {
            return Err(missed(plan, "a commit after the target was replayed"));
        }
        _ if !end.stopped_at_target => {
            return Err(missed(plan, "the archived WAL ended before the target"));
        }
        _ => {}
    }
    if reached.promoted && reached.timeline <= plan.history.timeline {
        return Err(missed(
            plan,
            format!("the server was promoted but stayed on timeline {}", reached.timeline),
        ));
    }
    Ok(())
}
