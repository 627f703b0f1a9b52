//! A cluster's directory and the server that runs on it.

use std::fmt;
use std::path::Path;

use async_trait::async_trait;
use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use thiserror::Error;

use crate::error::{Classified, ErrorClass};
use crate::id::SystemId;
use crate::lsn::{Lsn, SegmentSize, Timeline};
use crate::port::host::{HostFacts, HostNeeds};

/// Where a recovery stops.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "target", rename_all = "snake_case")]
pub enum RecoveryTarget {
    /// At the end of the WAL that there is.
    Latest,
    /// As soon as the cluster is consistent.
    Immediate,
    /// Before the first commit later than this time (`inclusive`: after the last commit at it).
    Time {
        /// The instant.
        time: Timestamp,
    },
    /// At this position.
    Lsn {
        /// The position.
        lsn: Lsn,
    },
    /// At the end of this transaction.
    Xid {
        /// The transaction.
        xid: u64,
    },
    /// At a restore point made by `pg_create_restore_point`.
    Name {
        /// Its name.
        name: String,
    },
}

/// What happens when the target is reached.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum TargetAction {
    /// The server becomes a primary on a new timeline.
    Promote,
    /// The server stays read-only for inspection.
    Pause,
    /// The server stops.
    Shutdown,
}

/// The recovery that a restored directory is set up for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RecoverySpec {
    /// Where to stop.
    pub target: RecoveryTarget,
    /// Whether the target itself is replayed (PostgreSQL's `recovery_target_inclusive`).
    pub inclusive: bool,
    /// The timeline to follow.
    pub timeline: Timeline,
    /// What happens at the target.
    pub action: TargetAction,
    /// `restore_command`, with `%f` and `%p`.
    pub restore_command: String,
    /// Further settings, written last: `(name, value)`.
    pub settings: Vec<(String, String)>,
    /// Not a recovery that ends, but a standby that follows; the target is then `Latest`.
    pub standby: Option<StandbySpec>,
}

/// How a standby follows its primary.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StandbySpec {
    /// Streams from here; `None`: only the archive is followed.
    pub primary_conninfo: Option<String>,
    /// The slot that keeps WAL for it.
    pub slot: Option<String>,
    /// Whether it answers queries while it follows.
    pub hot: bool,
}

/// What `global/pg_control` says.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ControlFacts {
    /// The cluster.
    pub system_id: SystemId,
    /// Format of `pg_control` (1300 for PostgreSQL 13 to 16, 1700, 1800).
    pub control_version: u32,
    /// Catalogue version.
    pub catalog_version: u32,
    /// The state, as `pg_controldata` words it.
    pub state: String,
    /// Whether the state is that of a server that was shut down in order.
    pub is_shut_down: bool,
    /// The last checkpoint's redo LSN.
    pub redo: Lsn,
    /// The last checkpoint's timeline.
    pub timeline: Timeline,
    /// LSN to be reached before the cluster is consistent; zero when none.
    pub min_recovery_end: Lsn,
    /// BLCKSZ.
    pub page_size: u32,
    /// RELSEG_SIZE in pages.
    pub relation_segment_pages: u32,
    /// Bytes in a WAL segment.
    pub segment_size: SegmentSize,
    /// Whether pages carry checksums.
    pub checksums: bool,
}

/// Whether a server runs on a directory.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum RunState {
    /// No server process.
    Stopped,
    /// A server that does not take connections yet.
    Starting,
    /// A server in recovery that answers queries.
    Recovering,
    /// A server in recovery that reached its target and waits.
    Paused,
    /// A primary.
    Primary,
}

/// How far a server is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct InstanceStatus {
    /// Its state.
    pub state: RunState,
    /// The position replayed or written.
    pub lsn: Option<Lsn>,
    /// The time of the last commit replayed.
    pub last_commit: Option<Timestamp>,
    /// The timeline.
    pub timeline: Option<Timeline>,
}

/// What a recovery reached, from the server's own words.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct RecoveryEnd {
    /// Whether the server said that it stopped at its target (and not at the end of WAL).
    pub stopped_at_target: bool,
    /// Whether the server gave up (a target beyond the WAL, a damaged record).
    pub failed: bool,
    /// The position after the last record replayed, when told.
    pub lsn: Option<Lsn>,
    /// The time of the last commit replayed, when told.
    pub last_commit: Option<Timestamp>,
    /// The new timeline after a promotion.
    pub new_timeline: Option<Timeline>,
    /// The lines of the server's log that say so.
    pub evidence: Vec<String>,
}

/// A cluster's directory on this host and the server on it.
///
/// Cancel safety: a dropped `start` or `stop` leaves the server as it is; ask `status`.
#[async_trait]
pub trait Instance: Send + Sync + fmt::Debug {
    /// Reads and checks `global/pg_control` below `data`.
    fn control(&self, data: &Path) -> Result<ControlFacts, ClusterError>;

    /// Reads `pg_control` from its bytes.
    fn parse_control(&self, bytes: &[u8]) -> Result<ControlFacts, ClusterError>;

    /// The major version of the cluster in `data`, as its `PG_VERSION` says.
    fn major(&self, data: &Path) -> Result<u32, ClusterError>;

    /// Writes recovery settings and signal file into a restored directory. Idempotent. Earlier
    /// recovery settings are removed; all other settings stay as they were. `control` are the bytes
    /// of `pg_control`, which is not in place yet.
    fn prepare_recovery(&self, data: &Path, control: &[u8], spec: &RecoverySpec) -> Result<(), ClusterError>;

    /// What this host offers to a cluster with these needs.
    fn host_facts(&self, needs: &HostNeeds) -> HostFacts;

    /// Starts the server of the given major on `data`: as it is configured if `public`, else
    /// listening on a private socket only; answers once the process runs (it may still be in recovery).
    async fn start(&self, data: &Path, major: u32, public: bool) -> Result<(), ClusterError>;

    /// Whether a server runs on `data`, and how far it is.
    async fn status(&self, data: &Path) -> Result<InstanceStatus, ClusterError>;

    /// A connection string for the server that runs on `data`; `None` when none does.
    fn connection(&self, data: &Path) -> Option<String>;

    /// What the server's log since the last `start` says about the end of recovery.
    fn recovery_end(&self, data: &Path) -> Result<RecoveryEnd, ClusterError>;

    /// Stops the server in order; `Ok` when none runs.
    async fn stop(&self, data: &Path) -> Result<(), ClusterError>;
}

/// Why a directory or its server is not usable.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum ClusterError {
    /// A file cannot be read or written.
    #[error("cannot {operation} {path}")]
    File {
        /// What was asked.
        operation: &'static str,
        /// The file.
        path: String,
        /// Why.
        source: std::io::Error,
    },
    /// `pg_control` or another file is not what it should be.
    #[error("{path} is damaged: {reason}")]
    Damaged {
        /// The file.
        path: String,
        /// What is wrong.
        reason: String,
    },
    /// No server programs of this major were found.
    #[error("no PostgreSQL {major} programs were found on this host")]
    NoPrograms {
        /// The major version needed.
        major: u32,
    },
    /// A server program failed.
    #[error("{program} on {data} failed: {reason}")]
    Program {
        /// The program.
        program: String,
        /// The data directory.
        data: String,
        /// What it said.
        reason: String,
    },
    /// The format is of a version that is not known.
    #[error("{what} is not supported: {reason}")]
    Unsupported {
        /// The thing.
        what: String,
        /// Why not.
        reason: String,
    },
}

impl Classified for ClusterError {
    fn class(&self) -> ErrorClass {
        match self {
            ClusterError::File { source, .. } => match source.kind() {
                std::io::ErrorKind::PermissionDenied => ErrorClass::Denied,
                std::io::ErrorKind::NotFound => ErrorClass::Missing,
                std::io::ErrorKind::StorageFull | std::io::ErrorKind::QuotaExceeded => ErrorClass::Exhausted,
                _ => ErrorClass::Transient,
            },
            ClusterError::Damaged { .. } => ErrorClass::Corrupt,
            ClusterError::NoPrograms { .. } => ErrorClass::Missing,
            ClusterError::Program { .. } => ErrorClass::Transient,
            ClusterError::Unsupported { .. } => ErrorClass::Unsupported,
        }
    }

    fn code(&self) -> &'static str {
        match self {
            ClusterError::File { .. } => "cluster-file",
            ClusterError::Damaged { .. } => "cluster-damaged",
            ClusterError::NoPrograms { .. } => "cluster-no-programs",
            ClusterError::Program { .. } => "cluster-program",
            ClusterError::Unsupported { .. } => "cluster-unsupported",
        }
    }

    fn hint(&self) -> Option<String> {
        Some(match self {
            ClusterError::File { .. } => "Check the path, its owner and the free space.".into(),
            ClusterError::Damaged { .. } => {
                "The directory was not restored whole; run the restore again with --delta.".into()
            }
            ClusterError::NoPrograms { major } => {
                format!("Install PostgreSQL {major}, or set [cluster] bin_dir to its programs.")
            }
            ClusterError::Program { .. } => "The server's log in the data directory says more.".into(),
            ClusterError::Unsupported { .. } => "dr supports PostgreSQL 15 to 18.".into(),
        })
    }
}
