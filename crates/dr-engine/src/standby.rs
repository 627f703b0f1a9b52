//! The standby job: a server made from a backup and the archive that follows its primary.
//!
//! 1. Plan: the restore's plan, what the primary lacks, the slot. Nothing moves.
//! 2. Mark the directory, write the files, sync. – *As in a restore: no server starts on a
//!    directory that is not whole; the same command with `delta` continues.*
//! 3. Write `standby.signal` and the settings; put `pg_control` in place. **Commit** of the
//!    directory.
//! 4. Make the slot (hot). – *A crash from here on leaves the slot, which keeps WAL on the primary:
//!    the receipt and `dr standby status` show it.*
//! 5. Start the server; write a canary into the primary's WAL; wait until it is replayed. A cold
//!    standby is stopped again. – *A failure drops the slot if this job made it.*
//! 6. Put the receipt.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use dr_core::event::{Event, Outcome, Receipt, Unit};
use dr_core::port::{
    Canary, Finding, Instance, Primary, RecoverySpec, RecoveryTarget, RunState, StandbySpec, TargetAction,
    Verdict,
};
use dr_core::{BackupId, Lsn, Timeline};
use serde::Serialize;

use crate::context::{Context, JobLog};
use crate::error::EngineError;
use crate::restore::{self, RestoreOptions, RestorePlan, TimelineChoice};

/// How often the standby is asked.
const POLL: Duration = Duration::from_millis(100);

/// How near a standby is to taking over.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Temperature {
    /// Runs, streams from the primary, answers queries.
    Hot,
    /// Runs and follows the archive; takes no connections before it is promoted.
    Warm,
    /// Does not run; brought forward by a refresh.
    Cold,
}

/// How a standby is to be made.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct StandbyOptions {
    /// How near it is to taking over.
    pub temperature: Temperature,
    /// Its name: the primary shows it as the application, synchronous replication names it.
    pub name: String,
    /// The slot that keeps WAL for it on the primary (hot only); `None`: the archive alone bridges
    /// times in which it does not run.
    pub slot: Option<String>,
    /// Further server settings, as a port of its own: `(name, value)`.
    pub settings: Vec<(String, String)>,
    /// Leave it stopped and unproven: another host's service manager starts it.
    pub start: bool,
    /// How long the canary may take to arrive.
    pub canary_limit: Duration,
    /// Where the files come from and go to. Target, action and start are this job's own.
    pub restore: RestoreOptions,
}

/// What will be done. Printed by `--plan`; nothing has been changed.
#[derive(Debug, Serialize)]
pub struct StandbyPlan {
    /// The files.
    pub restore: RestorePlan,
    /// What was found on the primary; nothing in it is bad.
    pub findings: Vec<Finding>,
    /// How it is to be made.
    pub options: StandbyOptions,
}

/// That a standby replayed what its primary wrote after it was made.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Proof {
    /// The mark in the primary's WAL.
    pub canary: Canary,
    /// Up to where the standby had replayed when it was seen.
    pub replayed: Lsn,
    /// From the mark to the sight of it.
    pub took_ms: u64,
}

/// What a standby came to.
#[derive(Debug, Serialize)]
pub struct StandbyReport {
    /// Its directory.
    pub to: PathBuf,
    /// How near it is to taking over.
    pub temperature: Temperature,
    /// The backup it was made from; `None`: it was brought forward only.
    pub backup: Option<BackupId>,
    /// Bytes of its files; 0 when it was brought forward only.
    pub bytes: u64,
    /// Bytes fetched from storage.
    pub bytes_fetched: u64,
    /// Bytes that were in place already (delta).
    pub bytes_kept: u64,
    /// Whether this job made the slot.
    pub made_slot: bool,
    /// `None`: it was not started.
    pub proof: Option<Proof>,
    /// How to reach it; `None` when it does not run or takes no connections.
    pub connection: Option<String>,
    /// The receipt, as stored.
    pub receipt: Receipt,
}

/// Looks at repository, host and primary. Changes nothing.
pub async fn plan(
    context: &Context,
    instance: &dyn Instance,
    primary: &dyn Primary,
    options: &StandbyOptions,
) -> Result<StandbyPlan, EngineError> {
    let doing = "cannot look at the primary";
    let streams = options.temperature == Temperature::Hot;
    let found = primary.check_for_standby(streams).await.map_err(EngineError::source(doing))?;
    let bad: Vec<Finding> = found.iter().filter(|f| f.verdict == Verdict::Bad).cloned().collect();
    if !bad.is_empty() {
        return Err(EngineError::Preflight { findings: bad });
    }
    let state = primary.state().await.map_err(EngineError::source(doing))?;
    let restore = restore::plan(context, instance, &of_standby(options, state.timeline)).await?;
    let expected = restore.backup.cluster.system_id;
    if state.system_id != expected {
        let what = format!("the primary is cluster {}, the backup is of cluster {expected}", state.system_id);
        let hint = "Set [cluster] connection to the primary of this cluster.".into();
        return Err(EngineError::Invalid { what, hint });
    }
    Ok(StandbyPlan { restore, findings: found, options: options.clone() })
}

/// A standby follows for ever, whatever a restore would have been asked for.
fn of_standby(options: &StandbyOptions, timeline: Timeline) -> RestoreOptions {
    RestoreOptions {
        timeline: TimelineChoice::Number(timeline),
        target: RecoveryTarget::Latest,
        action: TargetAction::Promote,
        start: options.start,
        keep_archiving: true,
        ..options.restore.clone()
    }
}

/// Makes the standby as planned. With `start`, `Ok` means that it replayed a canary.
///
/// Cancel safety: see the steps above.
pub async fn apply(
    context: &Context,
    instance: &dyn Instance,
    primary: &dyn Primary,
    plan: &StandbyPlan,
) -> Result<StandbyReport, EngineError> {
    let mut log = JobLog::begin(context, "standby create");
    log.fact("to", plan.options.restore.to.display().to_string());
    log.fact("temperature", serde_json::to_value(plan.options.temperature).unwrap_or_default());
    match make(context, instance, primary, plan, &mut log).await {
        Ok(report) => close(log, report).await,
        Err(error) => {
            log.close(Err(&error)).await;
            Err(error)
        }
    }
}

async fn close(mut log: JobLog, mut report: StandbyReport) -> Result<StandbyReport, EngineError> {
    if let Some(proof) = &report.proof {
        log.fact("replayed", proof.replayed.to_string());
        log.fact("canary_ms", proof.took_ms);
    }
    report.receipt = log.close(Ok(Outcome::Done)).await;
    Ok(report)
}

async fn make(
    context: &Context,
    instance: &dyn Instance,
    primary: &dyn Primary,
    plan: &StandbyPlan,
    log: &mut JobLog,
) -> Result<StandbyReport, EngineError> {
    let options = &plan.options;
    let spec = spec(primary, options, plan.restore.timeline)?;
    let placed = restore::place_files(context, instance, &plan.restore, &spec, log).await?;
    let mut made_slot = false;
    if let Some(slot) = options.slot.as_deref().filter(|_| options.temperature == Temperature::Hot) {
        made_slot = primary.ensure_slot(slot).await.map_err(EngineError::source("cannot make the slot"))?;
    }
    let data = &options.restore.to;
    let proven = if options.start {
        let major = plan.restore.backup.cluster.version_num / 10_000;
        let standby = Standby { context, instance, primary, data, major, options: &Follow::of(options) };
        Some(standby.prove(log).await)
    } else {
        None
    };
    if let Some(Err(_)) = &proven {
        let _ = instance.stop(data).await;
        // A slot that nobody uses would keep WAL on the primary for ever.
        if let Some(slot) = options.slot.as_ref().filter(|_| made_slot)
            && let Err(error) = primary.drop_slot(slot).await
        {
            log.warn(format!("slot {slot} stays on the primary: {error}"));
        }
    }
    let proof = proven.transpose()?;
    let (bytes, bytes_fetched, bytes_kept) = placed.bytes();
    Ok(StandbyReport {
        to: data.clone(),
        temperature: options.temperature,
        backup: Some(plan.restore.backup.id),
        bytes,
        bytes_fetched,
        bytes_kept,
        made_slot,
        proof,
        connection: instance.connection(data).filter(|_| options.temperature == Temperature::Hot),
        receipt: Receipt::begun("standby create", context.clock.now()),
    })
}

fn spec(
    primary: &dyn Primary,
    options: &StandbyOptions,
    timeline: Timeline,
) -> Result<RecoverySpec, EngineError> {
    let hot = options.temperature == Temperature::Hot;
    let doing = "cannot tell the standby how to reach the primary";
    let conninfo = hot.then(|| primary.conninfo_for(&options.name)).transpose();
    Ok(RecoverySpec {
        target: RecoveryTarget::Latest,
        inclusive: true,
        timeline,
        action: TargetAction::Promote,
        restore_command: options.restore.restore_command.clone(),
        settings: options.settings.clone(),
        standby: Some(StandbySpec {
            primary_conninfo: conninfo.map_err(EngineError::source(doing))?,
            slot: options.slot.clone().filter(|_| hot),
            hot,
        }),
    })
}

/// Brings a cold standby forward: starts it in private, waits until it has replayed a canary, and
/// stops it.
///
/// Cancel safety: a dropped refresh leaves a standby that runs in private; the next one goes on.
pub async fn refresh(
    context: &Context,
    instance: &dyn Instance,
    primary: &dyn Primary,
    data: &Path,
    canary_limit: Duration,
) -> Result<StandbyReport, EngineError> {
    let mut log = JobLog::begin(context, "standby refresh");
    log.fact("to", data.display().to_string());
    match bring_forward(context, instance, primary, data, canary_limit, &mut log).await {
        Ok(report) => close(log, report).await,
        Err(error) => {
            log.close(Err(&error)).await;
            Err(error)
        }
    }
}

async fn bring_forward(
    context: &Context,
    instance: &dyn Instance,
    primary: &dyn Primary,
    data: &Path,
    canary_limit: Duration,
    log: &mut JobLog,
) -> Result<StandbyReport, EngineError> {
    let control = instance.control(data).map_err(EngineError::cluster("cannot look at the standby"))?;
    let state = primary.state().await.map_err(EngineError::source("cannot look at the primary"))?;
    let not_ours = |reason: String| EngineError::NotOurs { path: data.display().to_string(), reason };
    if control.system_id != state.system_id {
        let reason =
            format!("belongs to cluster {}, the primary is cluster {}", control.system_id, state.system_id);
        return Err(not_ours(reason));
    }
    if !data.join("standby.signal").exists() {
        return Err(not_ours("is no standby: it has no standby.signal".into()));
    }
    let status = instance.status(data).await.map_err(EngineError::cluster("cannot look at the standby"))?;
    if status.state != RunState::Stopped {
        return Err(not_ours("has a running server: only a cold standby is refreshed".into()));
    }
    let major = instance.major(data).map_err(EngineError::cluster("cannot look at the standby"))?;
    let follow = Follow { temperature: Temperature::Cold, canary_limit, note: "refresh".into() };
    let standby = Standby { context, instance, primary, data, major, options: &follow };
    let proof = standby.prove(log).await?;
    Ok(StandbyReport {
        to: data.to_owned(),
        temperature: Temperature::Cold,
        backup: None,
        bytes: 0,
        bytes_fetched: 0,
        bytes_kept: 0,
        made_slot: false,
        proof: Some(proof),
        connection: None,
        receipt: Receipt::begun("standby refresh", context.clock.now()),
    })
}

/// What proving needs of the options.
struct Follow {
    temperature: Temperature,
    canary_limit: Duration,
    note: String,
}

impl Follow {
    fn of(options: &StandbyOptions) -> Self {
        Follow {
            temperature: options.temperature,
            canary_limit: options.canary_limit,
            note: options.name.clone(),
        }
    }
}

/// A standby on its directory.
struct Standby<'a> {
    context: &'a Context,
    instance: &'a dyn Instance,
    primary: &'a dyn Primary,
    data: &'a Path,
    major: u32,
    options: &'a Follow,
}

impl Standby<'_> {
    /// Starts it and waits for a canary; a cold one is stopped again.
    async fn prove(&self, log: &mut JobLog) -> Result<Proof, EngineError> {
        let cold = self.options.temperature == Temperature::Cold;
        let stage = log.stage("start", None, Unit::Steps);
        let doing = "cannot start the standby";
        self.instance.start(self.data, self.major, !cold).await.map_err(EngineError::cluster(doing))?;
        log.end(stage);
        let stage = log.stage("canary", None, Unit::Bytes);
        let proven = self.follow().await;
        if cold {
            let doing = "cannot stop the standby";
            self.instance.stop(self.data).await.map_err(EngineError::cluster(doing))?;
        }
        log.end(stage);
        proven
    }

    async fn follow(&self) -> Result<Proof, EngineError> {
        let archived = self.options.temperature != Temperature::Hot;
        let note = format!("standby {}", self.options.note);
        let canary = self.primary.canary(&note, archived).await;
        let canary = canary.map_err(EngineError::source("cannot write a mark into the primary's WAL"))?;
        let began = Instant::now();
        let mut last = None;
        loop {
            self.context.cancel.check()?;
            let doing = "cannot tell how far the standby is";
            let status = self.instance.status(self.data).await.map_err(EngineError::cluster(doing))?;
            match (status.state, status.lsn) {
                (RunState::Primary, _) => return Err(self.failed("it was promoted".into())),
                (RunState::Stopped, _) => {
                    return Err(self.failed(format!("its server stopped: {}", self.last_words())));
                }
                // Another server was promoted and archives into the same place: to reach the
                // position on its timeline proves nothing.
                (..) if status.timeline.is_some_and(|timeline| timeline > canary.timeline) => {
                    let other = status.timeline.unwrap_or(canary.timeline);
                    let reason = format!(
                        "it follows timeline {other} of the archive, but the primary is on timeline {}: another \
                         server was promoted",
                        canary.timeline
                    );
                    return Err(self.failed(reason));
                }
                (_, Some(lsn)) if lsn >= canary.lsn => {
                    let took_ms = u64::try_from(began.elapsed().as_millis()).unwrap_or(u64::MAX);
                    return Ok(Proof { canary, replayed: lsn, took_ms });
                }
                (_, lsn) => last = lsn.or(last),
            }
            let at = last.map_or("no position yet".into(), |lsn| format!("at {lsn}"));
            let done = last.map_or(0, |lsn| lsn.0);
            self.context.events.emit(Event::Progress { stage: "canary", done, note: Some(at.clone()) });
            if began.elapsed() > self.options.canary_limit {
                let waited = dr_core::size::duration(self.options.canary_limit);
                return Err(self.failed(format!("it did not replay {} within {waited} ({at})", canary.lsn)));
            }
            tokio::time::sleep(POLL).await;
        }
    }

    /// Why a server that is gone went, in its own words.
    fn last_words(&self) -> String {
        let said = self.instance.recovery_end(self.data).ok().and_then(|end| end.evidence.last().cloned());
        said.unwrap_or_else(|| "its log does not say why".into())
    }

    fn failed(&self, reason: String) -> EngineError {
        EngineError::StandbyNotProven { data: self.data.display().to_string(), reason }
    }
}
