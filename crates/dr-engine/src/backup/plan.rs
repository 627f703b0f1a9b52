//! What a backup will do and what it came to.

use std::time::Duration;

use dr_core::event::Receipt;
use dr_core::port::{ClusterDescription, DatabaseSource, Finding, Verdict};
use dr_core::{BackupId, Classified, ErrorClass, Lsn};
use dr_storage::RepoError;
use dr_storage::format::ManifestHead;
use futures_util::TryFutureExt;
use serde::Serialize;

use crate::context::{Context, chain};
use crate::error::EngineError;

/// How a backup is to be taken.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct BackupOptions {
    /// A word for people, kept in the manifest.
    pub note: String,
    /// Ask PostgreSQL for an immediate checkpoint.
    pub fast_checkpoint: bool,
    /// Worker threads; at least 1.
    pub workers: usize,
    /// How long to wait for the last WAL of the backup to arrive in the archive.
    pub wal_timeout: Duration,
    /// Record how far the backup is this often …
    pub point_every: Duration,
    /// … or after this many bytes read.
    pub point_every_bytes: u64,
    /// Read every file, whatever its time stamps say.
    pub read_all: bool,
    /// Start afresh, whatever was stored before.
    pub full: bool,
    /// Read at most so many bytes a second; `None`: no limit.
    pub max_rate: Option<u64>,
}

impl Default for BackupOptions {
    fn default() -> Self {
        BackupOptions {
            note: String::new(),
            fast_checkpoint: true,
            workers: std::thread::available_parallelism().map_or(2, |n| n.get().min(8)),
            wal_timeout: Duration::from_secs(60),
            point_every: Duration::from_secs(300),
            point_every_bytes: 50_000_000_000,
            read_all: false,
            full: false,
            max_rate: None,
        }
    }
}

/// What a backup will do. Printed by `--plan`; nothing has been changed.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct BackupPlan {
    /// The cluster.
    pub cluster: ClusterDescription,
    /// The backup that unchanged content is taken from; `None`: everything is stored.
    pub parent: Option<BackupId>,
    /// An interrupted backup that is continued.
    pub continues: Option<BackupId>,
    /// What was found on the way; nothing in it is [`Verdict::Bad`].
    pub findings: Vec<Finding>,
    /// How it is to be taken.
    pub options: BackupOptions,
}

/// What a backup came to.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct BackupReport {
    /// The head of its manifest: identity, status, sizes, LSNs.
    pub backup: ManifestHead,
    /// Pages whose checksum is wrong.
    pub bad_pages: Vec<BadPageReport>,
    /// The receipt, as stored.
    pub receipt: Receipt,
}

/// A bad page, for people.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct BadPageReport {
    /// The file, below the data directory.
    pub path: String,
    /// The relation, as `database.schema.name`, when it is known.
    pub relation: Option<String>,
    /// The block number within the relation's fork.
    pub block: u32,
}

/// Looks at the cluster and the repository and says what a backup would do. Changes nothing.
pub async fn plan(
    context: &Context,
    source: &dyn DatabaseSource,
    options: &BackupOptions,
) -> Result<BackupPlan, EngineError> {
    let described = source.describe().map_err(EngineError::source("cannot look at the cluster"));
    let cluster = context.cancel.or(described).await?;
    let checked = source.check().map_err(EngineError::source("cannot check the cluster"));
    let mut findings = context.cancel.or(checked).await?;
    let bad: Vec<Finding> = findings.iter().filter(|f| f.verdict == Verdict::Bad).cloned().collect();
    if !bad.is_empty() {
        return Err(EngineError::Preflight { findings: bad });
    }
    let (parent, continues) =
        if options.full { (None, None) } else { choose_parent(context, &mut findings).await? };
    Ok(BackupPlan { cluster, parent, continues, findings, options: options.clone() })
}

/// The newest backup, and an interrupted one that began after it and recorded a point.
///
/// What is damaged is told and not built upon: it must not stop the backups that make up for it.
async fn choose_parent(
    context: &Context,
    findings: &mut Vec<Finding>,
) -> Result<(Option<BackupId>, Option<BackupId>), EngineError> {
    let doing = "cannot list the backups";
    let catalogue = context.store.catalogue().await.map_err(EngineError::repo(doing))?;
    findings.extend(crate::context::unreadable(&catalogue));
    let sessions = context.store.sessions().await.map_err(EngineError::repo("cannot list the sessions"))?;
    let mut parent = None;
    for head in catalogue.heads.iter().rev() {
        match context.store.manifest(head.id).await {
            Ok(_) => {
                parent = Some(head);
                break;
            }
            Err(error) if error.class() == ErrorClass::Corrupt => findings.push(passed_over(head.id, &error)),
            Err(error) => return Err(EngineError::repo(format!("cannot read backup {}", head.id))(error)),
        }
    }
    let newer = |start: Lsn| parent.is_none_or(|p| start >= p.start.lsn);
    let mut continues = None;
    for session in sessions.iter().filter(|s| !s.committed && s.last_point.is_some()) {
        let doing = "cannot read how far an interrupted backup came";
        let point = match context.store.point(session.id).await {
            Err(error) if error.class() == ErrorClass::Corrupt => {
                findings.push(passed_over(session.id, &error));
                continue;
            }
            other => other.map_err(EngineError::repo(doing))?,
        };
        if let Some(point) = point.filter(|p| newer(p.start.lsn))
            && continues.as_ref().is_none_or(|(_, best)| *best < point.start.lsn)
        {
            continues = Some((session.id, point.start.lsn));
        }
    }
    Ok((parent.map(|p| p.id), continues.map(|(id, _)| id)))
}

fn passed_over(id: BackupId, error: &RepoError) -> Finding {
    let detail = format!("backup {id} is damaged and was not built upon: {}", chain(error));
    Finding::warning("backup-unreadable", detail, "Run `dr verify --all` to see what else is affected.")
}
