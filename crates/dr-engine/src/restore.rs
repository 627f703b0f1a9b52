//! The restore job.
//!
//! 1. Plan: choose timeline, backup and WAL path; look at the host and the target. Nothing moves.
//! 2. Mark the directory as a restore under way. – *A crash leaves a marked directory without
//!    `pg_control`: no server starts on it, and `--delta` continues.*
//! 3. Fetch, check and write all files; sync them.
//! 4. Write labels and recovery settings; put `global/pg_control` in place, last. **Commit** of the
//!    directory. – *Before it no server can start; after it one can.*
//! 5. Start the server, follow the replay, prove what was reached (`--start`).
//!    – *A crash leaves a directory in recovery; starting the server continues it.*
//! 6. Put the receipt.

mod follow;
mod place;
mod plan;

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use dr_core::BackupId;
use dr_core::event::{Outcome, Receipt, Unit};
use dr_core::plan::WalPlan;
use dr_core::port::{Finding, HostFile, Instance, RecoverySpec, RecoveryTarget, TargetAction};
use dr_core::{Timeline, TimelineHistory};
use dr_storage::PackKind;
use dr_storage::format::{Manifest, ManifestHead};
use serde::Serialize;

pub use follow::Reached;
pub use place::MARKER;
pub use plan::{check_space, plan, stops};

use crate::context::{Context, JobLog};
use crate::error::EngineError;
use crate::tree::{FileOutput, TreeCounters, TreeRead};

/// How long replay may stand still if nobody says otherwise.
const STALL_LIMIT: Duration = Duration::from_secs(600);

/// The stage that writes files.
const FILES: &str = "files";

/// Which timeline a recovery follows.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum TimelineChoice {
    /// The newest one that descends from a backup.
    Latest,
    /// The one on which the backup was taken.
    Current,
    /// This one.
    Number(Timeline),
}

/// What is to be restored, where to, and what happens then.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct RestoreOptions {
    /// The data directory to make.
    pub to: PathBuf,
    /// The backup to start from; `None`: the best one for the target.
    pub backup: Option<BackupId>,
    /// Where recovery stops.
    pub target: RecoveryTarget,
    /// Whether the target itself is replayed.
    pub inclusive: bool,
    /// The timeline to follow.
    pub timeline: TimelineChoice,
    /// What the server does at the target.
    pub action: TargetAction,
    /// New places of tablespaces: oid, name or old path, and the new path.
    pub tablespaces: Vec<(String, PathBuf)>,
    /// Change an existing directory of the same cluster instead of filling an empty one.
    pub delta: bool,
    /// Start the server and follow the replay to the target.
    pub start: bool,
    /// Leave archiving as it was configured; otherwise it is switched off, so that a second
    /// primary cannot write into the archive of the first.
    pub keep_archiving: bool,
    /// Sync everything before `pg_control` is put in place. Only scratch restores go without.
    pub sync: bool,
    /// Worker threads; at least 1.
    pub workers: usize,
    /// `restore_command` for the recovery, with `%f` and `%p`.
    pub restore_command: String,
    /// Where to put the server's files that lay outside the data directory.
    pub host_files: Option<PathBuf>,
    /// How long replay may stand still before it counts as stuck.
    pub stall_limit: Duration,
}

impl RestoreOptions {
    /// What `dr restore` does when it is told no more than the directory: from the best backup along the
    /// newest timeline to the end of the archived WAL, durable; the server is not started.
    pub fn new(to: impl Into<PathBuf>, restore_command: impl Into<String>) -> Self {
        RestoreOptions {
            to: to.into(),
            backup: None,
            target: RecoveryTarget::Latest,
            inclusive: true,
            timeline: TimelineChoice::Latest,
            action: TargetAction::Promote,
            tablespaces: Vec::new(),
            delta: false,
            start: false,
            keep_archiving: false,
            sync: true,
            workers: 2,
            restore_command: restore_command.into(),
            host_files: None,
            stall_limit: STALL_LIMIT,
        }
    }
}

/// What a restore will do. Printed by `--plan`; nothing has been changed.
#[derive(Clone, Debug, Serialize)]
pub struct RestorePlan {
    /// The backup's manifest head.
    pub backup: ManifestHead,
    /// The timeline that is followed.
    pub timeline: Timeline,
    /// The WAL that is replayed.
    pub wal: WalPlan,
    /// Where each tablespace goes: oid, path.
    pub tablespaces: Vec<(u32, PathBuf)>,
    /// What was found on the way; nothing in it is bad.
    pub findings: Vec<Finding>,
    /// What was asked for.
    pub options: RestoreOptions,
    #[serde(skip)]
    pub(crate) manifest: Manifest,
    #[serde(skip)]
    pub(crate) history: TimelineHistory,
}

/// What a restore came to.
#[derive(Clone, Debug, Serialize)]
pub struct RestoreReport {
    /// The backup.
    pub backup: BackupId,
    /// The data directory.
    pub to: PathBuf,
    /// Regular files.
    pub files: u64,
    /// Bytes of content, all of them checked.
    pub bytes: u64,
    /// Bytes fetched from storage.
    pub bytes_fetched: u64,
    /// Bytes that were in place already (delta).
    pub bytes_kept: u64,
    /// Files of the server outside the data directory that were kept with the backup.
    pub host_files: Vec<String>,
    /// What the recovery reached; `None`: the server was not started.
    pub reached: Option<Reached>,
    /// The receipt, as stored.
    pub receipt: Receipt,
}

/// Restores as planned. With `start`, `Ok` means that the target was reached and proven.
///
/// Cancel safety: a dropped or cancelled restore leaves a marked directory without `pg_control`;
/// the same command with `delta` continues.
pub async fn apply(
    context: &Context,
    instance: &dyn Instance,
    plan: &RestorePlan,
) -> Result<RestoreReport, EngineError> {
    let mut log = JobLog::begin(context, "restore");
    log.fact("backup_id", plan.backup.id.to_string());
    log.fact("to", plan.options.to.display().to_string());
    match run(context, instance, plan, &mut log).await {
        Ok(mut report) => {
            report.receipt = log.close(Ok(Outcome::Done)).await;
            Ok(report)
        }
        Err(error) => {
            log.close(Err(&error)).await;
            Err(error)
        }
    }
}

async fn run(
    context: &Context,
    instance: &dyn Instance,
    plan: &RestorePlan,
    log: &mut JobLog,
) -> Result<RestoreReport, EngineError> {
    let options = &plan.options;
    let placed = place_files(context, instance, plan, &recovery_spec(plan), log).await?;
    let reached = if options.start {
        let stage = log.stage("replay", None, Unit::Bytes);
        let reached = follow::start_and_follow(context, instance, plan).await?;
        log.end(stage);
        Some(reached)
    } else {
        None
    };
    let (bytes, bytes_fetched, bytes_kept) = placed.bytes();
    let report = RestoreReport {
        backup: plan.manifest.head.id,
        to: options.to.clone(),
        files: placed.counters.files.load(Ordering::Relaxed),
        bytes,
        bytes_fetched,
        bytes_kept,
        host_files: placed.host_files,
        reached,
        receipt: Receipt::begun("restore", context.clock.now()),
    };
    record(log, &report);
    Ok(report)
}

/// What was put in place.
pub(crate) struct Placed {
    counters: Arc<TreeCounters>,
    host_files: Vec<String>,
}

impl Placed {
    /// Bytes of content, bytes fetched, and bytes that were in place already.
    pub fn bytes(&self) -> (u64, u64, u64) {
        let count = |counter: &std::sync::atomic::AtomicU64| counter.load(Ordering::Relaxed);
        let counters = &self.counters;
        (count(&counters.bytes), count(&counters.fetched), count(&counters.kept))
    }
}

/// Makes the directory, up to and with its commit: files, settings, sync, `pg_control`.
pub(crate) async fn place_files(
    context: &Context,
    instance: &dyn Instance,
    plan: &RestorePlan,
    spec: &RecoverySpec,
    log: &mut JobLog,
) -> Result<Placed, EngineError> {
    let options = &plan.options;
    let manifest = &plan.manifest;
    place::begin(plan)?;

    let stage = log.stage(FILES, Some(manifest.head.bytes), Unit::Bytes);
    let output =
        FileOutput { root: options.to.clone(), delta: options.delta, tablespaces: plan.tablespaces.clone() };
    let read = TreeRead { context, manifest, output: Some(output), workers: options.workers, stage: FILES };
    let counters = read.run().await?;
    if options.delta {
        place::remove_foreign(context, plan).await?;
    }
    log.end(stage);

    let stage = log.stage("settings", None, Unit::Steps);
    place::write_labels(plan)?;
    instance
        .prepare_recovery(&options.to, &manifest.body.pg_control, spec)
        .map_err(EngineError::cluster("cannot write the recovery settings"))?;
    let host_files = host_files(context, plan).await?;
    log.end(stage);

    let stage = log.stage("sync", None, Unit::Steps);
    place::commit(plan)?;
    log.end(stage);
    Ok(Placed { counters, host_files })
}

fn recovery_spec(plan: &RestorePlan) -> RecoverySpec {
    let options = &plan.options;
    let mut settings = Vec::new();
    if !options.keep_archiving {
        settings.push(("archive_mode".to_owned(), "off".to_owned()));
    }
    RecoverySpec {
        target: options.target.clone(),
        inclusive: options.inclusive,
        timeline: plan.timeline,
        action: options.action,
        restore_command: options.restore_command.clone(),
        settings,
        standby: None,
    }
}

/// Writes the server's outside files below a directory of their own, never to their old places.
async fn host_files(context: &Context, plan: &RestorePlan) -> Result<Vec<String>, EngineError> {
    let doing = "cannot read the server's files outside the data directory";
    let reader = context.store.reader().await.map_err(EngineError::repo(doing))?;
    let mut bytes = Vec::new();
    for frame in &plan.manifest.body.host_files {
        bytes.extend(reader.frame(PackKind::Meta, frame).await.map_err(EngineError::repo(doing))?);
    }
    let damaged = |_| {
        EngineError::repo(doing)(dr_storage::RepoError::unreadable_part(
            "the list of files outside the data directory",
        ))
    };
    let files: Vec<HostFile> =
        if bytes.is_empty() { Vec::new() } else { serde_json::from_slice(&bytes).map_err(damaged)? };
    if let Some(dir) = &plan.options.host_files {
        for file in &files {
            place::write_host_file(dir, file)?;
        }
    }
    Ok(files.into_iter().map(|file| file.path).collect())
}

fn record(log: &mut JobLog, report: &RestoreReport) {
    log.fact("files", report.files);
    log.fact("bytes", report.bytes);
    log.fact("bytes_fetched", report.bytes_fetched);
    log.fact("bytes_kept", report.bytes_kept);
    if let Some(reached) = &report.reached {
        log.fact("reached", serde_json::to_value(reached).unwrap_or_default());
    }
}
