//! Why a job stopped.

use std::io;

use dr_core::id::BackupId;
use dr_core::plan::{ChoiceError, WalGap};
use dr_core::port::{ClusterError, Finding, KeyError, SourceError, StorageError, WalFault};
use dr_core::{Classified, ErrorClass, Lsn, SystemId};
use dr_storage::RepoError;
use thiserror::Error;

/// Why a job stopped: with the thing, the place and, by its class, what may be done.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum EngineError {
    /// The repository did not do what was needed.
    #[error("{doing}")]
    Repo {
        /// What the job was doing.
        doing: String,
        /// Why it failed.
        source: RepoError,
    },
    /// The cluster to back up did not do what was needed.
    #[error("{doing}")]
    Source {
        /// What the job was doing.
        doing: String,
        /// Why it failed.
        source: SourceError,
    },
    /// A restored directory or its server did not do what was needed.
    #[error("{doing}")]
    Cluster {
        /// What the job was doing.
        doing: String,
        /// Why it failed.
        source: ClusterError,
    },
    /// WAL is not what it is said to be.
    #[error("the WAL file was not stored")]
    Wal {
        /// What is wrong.
        source: WalFault,
    },
    /// A file of this host cannot be read or written.
    #[error("cannot {operation} {path}")]
    File {
        /// What was asked.
        operation: &'static str,
        /// The file.
        path: String,
        /// Why.
        source: io::Error,
    },
    /// No backup serves the request.
    #[error("no backup can be used")]
    NoBackup {
        /// Why.
        source: ChoiceError,
    },
    /// Content read back is not what was backed up.
    #[error("{path} in backup {backup} does not have the content that was backed up (at byte {offset})")]
    ContentMismatch {
        /// The file.
        path: String,
        /// Where the extent begins.
        offset: u64,
        /// The backup.
        backup: BackupId,
    },
    /// WAL of the backup's range did not arrive in the archive in time.
    #[error("WAL {missing} did not arrive in the archive within {waited}: the backup is not committed")]
    WalNotArchived {
        /// The first missing segment.
        missing: String,
        /// How long the job waited.
        waited: String,
    },
    /// The archived WAL has a hole on the way.
    #[error("WAL {} is missing from the archive: recovery can reach {} and no further", .gap.first_missing, .gap.at)]
    WalGap {
        /// The hole.
        gap: WalGap,
    },
    /// The target of a restore is not empty.
    #[error("{path} is not empty")]
    NotEmpty {
        /// The directory.
        path: String,
    },
    /// A delta restore into a directory of another cluster, or of none.
    #[error("{path} {reason}")]
    NotOurs {
        /// The directory.
        path: String,
        /// What it is instead.
        reason: String,
    },
    /// The plan found something that stops the job.
    #[error("{}", .findings.iter().map(|f| f.detail.clone()).collect::<Vec<_>>().join("; "))]
    Preflight {
        /// What was found.
        findings: Vec<Finding>,
    },
    /// Recovery ended without reaching its target.
    #[error("recovery did not reach its target ({target}): {reason}")]
    TargetNotReached {
        /// The target.
        target: String,
        /// What happened instead.
        reason: String,
    },
    /// Replay made no progress, or took longer than the limit.
    #[error("recovery stands at {at} and made no progress for {waited}")]
    ReplayStalled {
        /// The last known position.
        at: Lsn,
        /// How long.
        waited: String,
    },
    /// A standby was made and did not show that it follows.
    #[error("the standby in {data} did not prove that it follows its primary: {reason}")]
    StandbyNotProven {
        /// Its directory.
        data: String,
        /// What is wrong.
        reason: String,
    },
    /// The request cannot be followed.
    #[error("{what}")]
    Invalid {
        /// What is wrong.
        what: String,
        /// What to do.
        hint: String,
    },
    /// The repository does not know the cluster.
    #[error("the repository has no cluster {system_id}")]
    UnknownCluster {
        /// The cluster.
        system_id: SystemId,
    },
    /// A person or a signal stopped the job.
    #[error("the job was stopped")]
    Cancelled,
    /// A defect in dr.
    #[error("a defect in dr: {what}")]
    Bug {
        /// What went wrong.
        what: String,
    },
}

impl EngineError {
    /// Wraps an error of the repository with what was being done.
    pub fn repo(doing: impl Into<String>) -> impl FnOnce(RepoError) -> EngineError {
        let doing = doing.into();
        move |source| EngineError::Repo { doing, source }
    }

    /// Wraps an error of the source with what was being done.
    pub fn source(doing: impl Into<String>) -> impl FnOnce(SourceError) -> EngineError {
        let doing = doing.into();
        move |source| EngineError::Source { doing, source }
    }

    /// Wraps an error of the restored cluster with what was being done.
    pub fn cluster(doing: impl Into<String>) -> impl FnOnce(ClusterError) -> EngineError {
        let doing = doing.into();
        move |source| EngineError::Cluster { doing, source }
    }

    /// Wraps an error of a file with its path.
    pub fn file(
        operation: &'static str,
        path: impl AsRef<std::path::Path>,
    ) -> impl FnOnce(io::Error) -> EngineError {
        let path = path.as_ref().display().to_string();
        move |source| EngineError::File { operation, path, source }
    }

    /// The port error below, when there is one: it knows its class best.
    fn inner(&self) -> Option<&dyn Classified> {
        match self {
            EngineError::Repo { source, .. } => Some(source),
            EngineError::Source { source, .. } => Some(source),
            EngineError::Cluster { source, .. } => Some(source),
            EngineError::Wal { source } => Some(source),
            _ => None,
        }
    }
}

impl Classified for EngineError {
    fn class(&self) -> ErrorClass {
        if let Some(inner) = self.inner() {
            return inner.class();
        }
        match self {
            EngineError::File { source, .. } => file_class(source),
            EngineError::NoBackup { source: ChoiceError::TargetBeforeBackup { .. } } => ErrorClass::Invalid,
            EngineError::NoBackup { .. } | EngineError::UnknownCluster { .. } => ErrorClass::Missing,
            EngineError::ContentMismatch { .. } => ErrorClass::Corrupt,
            EngineError::WalNotArchived { .. } => ErrorClass::Transient,
            EngineError::WalGap { .. } => ErrorClass::Missing,
            EngineError::NotEmpty { .. } | EngineError::NotOurs { .. } => ErrorClass::Invalid,
            EngineError::Preflight { .. } | EngineError::Invalid { .. } => ErrorClass::Invalid,
            EngineError::TargetNotReached { .. } => ErrorClass::Missing,
            EngineError::ReplayStalled { .. } | EngineError::StandbyNotProven { .. } => ErrorClass::Transient,
            EngineError::Cancelled => ErrorClass::Cancelled,
            _ => ErrorClass::Bug,
        }
    }

    fn code(&self) -> &'static str {
        if let Some(inner) = self.inner() {
            return inner.code();
        }
        match self {
            EngineError::File { .. } => "job-file",
            EngineError::NoBackup { source: ChoiceError::TargetBeforeBackup { .. } } => {
                "job-target-before-backup"
            }
            EngineError::NoBackup { .. } => "job-no-backup",
            EngineError::UnknownCluster { .. } => "job-unknown-cluster",
            EngineError::ContentMismatch { .. } => "job-content-mismatch",
            EngineError::WalNotArchived { .. } => "job-wal-not-archived",
            EngineError::WalGap { .. } => "job-wal-gap",
            EngineError::NotEmpty { .. } => "job-not-empty",
            EngineError::NotOurs { .. } => "job-not-ours",
            EngineError::Preflight { .. } => "job-preflight",
            EngineError::TargetNotReached { .. } => "job-target-not-reached",
            EngineError::ReplayStalled { .. } => "job-replay-stalled",
            EngineError::StandbyNotProven { .. } => "job-standby-not-proven",
            EngineError::Invalid { .. } => "job-invalid",
            EngineError::Cancelled => "job-cancelled",
            _ => "job-bug",
        }
    }

    fn hint(&self) -> Option<String> {
        if let Some(inner) = self.inner() {
            return inner.hint();
        }
        Some(match self {
            EngineError::File { .. } => "Check the path, its owner and the free space; then run the command again.".into(),
            EngineError::NoBackup { source: ChoiceError::TargetBeforeBackup { .. } } => {
                "Choose a later target, or an older backup: `dr list` shows them.".into()
            }
            EngineError::NoBackup { .. } => "`dr list` shows the backups; `dr backup` takes one.".into(),
            EngineError::UnknownCluster { .. } => "`dr list --json` shows the clusters of the repository; choose one with --cluster.".into(),
            EngineError::ContentMismatch { .. } => {
                "Nothing was put in place. Restore an older backup with --backup, and run `dr verify --all`.".into()
            }
            EngineError::WalNotArchived { .. } => {
                "Look at pg_stat_archiver and the server's log: archive_command must be `dr wal push %p`. For a backup from a standby the primary closes the segment: set its archive_timeout. What was copied is kept; the next backup continues from it.".into()
            }
            EngineError::WalGap { gap } => format!(
                "Recover to a point before the hole with `--lsn {}`, or start from a backup taken after it.",
                gap.at
            ),
            EngineError::NotEmpty { .. } => {
                "Choose an empty directory; or, to change this one into the backup, give --delta.".into()
            }
            EngineError::NotOurs { .. } => "Nothing was touched. Choose another directory.".into(),
            EngineError::Preflight { findings } => {
                findings.iter().map(|f| f.fix.as_str()).filter(|f| !f.is_empty()).collect::<Vec<_>>().join(" ")
            }
            EngineError::TargetNotReached { .. } => {
                "The directory is kept for inspection. `dr show latest` tells which WAL is archived.".into()
            }
            EngineError::StandbyNotProven { .. } => {
                "Look at dr-recovery.log in its directory and at the primary's log; a hot standby needs a way through \
                 pg_hba.conf, a warm or cold one WAL in the archive."
                    .into()
            }
            EngineError::ReplayStalled { .. } => "Look at the server's log in the restored directory.".into(),
            EngineError::Invalid { hint, .. } => hint.clone(),
            EngineError::Cancelled => "Run the command again: what was stored or restored is taken up.".into(),
            _ => "Please report it, with the command and this message.".into(),
        })
    }
}

fn file_class(error: &io::Error) -> ErrorClass {
    match error.kind() {
        io::ErrorKind::PermissionDenied => ErrorClass::Denied,
        io::ErrorKind::NotFound => ErrorClass::Missing,
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => ErrorClass::Exhausted,
        _ => ErrorClass::Transient,
    }
}

/// Wraps a storage error where no repository call stands between.
impl EngineError {
    /// Wraps an error of a storage target.
    pub fn storage(doing: impl Into<String>) -> impl FnOnce(StorageError) -> EngineError {
        let doing = doing.into();
        move |source| EngineError::Repo { doing, source: RepoError::from_storage(source) }
    }

    /// Wraps a missing or wrong key.
    pub fn key(doing: impl Into<String>) -> impl FnOnce(KeyError) -> EngineError {
        let doing = doing.into();
        move |source| EngineError::Repo { doing, source: RepoError::from_key(source) }
    }
}
