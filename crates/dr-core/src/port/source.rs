//! A cluster to back up.

use std::fmt;
use std::io;

use async_trait::async_trait;
use futures_util::stream::BoxStream;
use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use thiserror::Error;

use std::sync::Arc;

use crate::error::{Classified, ErrorClass};
use crate::id::SystemId;
use crate::lsn::{Lsn, SegmentSize, Timeline};
use crate::port::finding::Finding;
use crate::port::host::{HostFile, HostNeeds};
use crate::port::pages::PageChecker;
use crate::port::primary::SlotState;

/// What a cluster is, before a backup of it begins.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ClusterDescription {
    /// Its identity.
    pub system_id: SystemId,
    /// `server_version_num`, as 150018.
    pub version_num: u32,
    /// Bytes in a page (BLCKSZ).
    pub page_size: u32,
    /// Bytes in a WAL segment.
    pub segment_size: SegmentSize,
    /// Pages in a relation's segment file (RELSEG_SIZE).
    pub relation_segment_pages: u32,
    /// Whether pages carry checksums.
    pub checksums: bool,
    /// The current timeline.
    pub timeline: Timeline,
    /// Whether it is in recovery (a standby).
    pub in_recovery: bool,
    /// Where its data directory is, on its host.
    pub data_directory: String,
}

/// Where a backup began.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct BackupStart {
    /// The LSN from which WAL is needed (the redo point).
    pub lsn: Lsn,
    /// The timeline at that LSN.
    pub timeline: Timeline,
    /// The server's clock.
    pub time: Timestamp,
}

/// Where a backup ended, and the files that PostgreSQL gives at the end.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct BackupStop {
    /// The LSN up to which WAL must be replayed for the cluster to be consistent.
    pub lsn: Lsn,
    /// The timeline at that LSN.
    pub timeline: Timeline,
    /// The server's clock.
    pub time: Timestamp,
    /// `backup_label`, byte for byte.
    pub backup_label: String,
    /// `tablespace_map`, byte for byte; empty without tablespaces.
    pub tablespace_map: String,
}

/// A tablespace outside the data directory.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct TablespaceFacts {
    /// Its oid, the name under `pg_tblspc`.
    pub oid: u32,
    /// Its SQL name; empty when unknown.
    pub name: String,
    /// Where it lies on the host.
    pub location: String,
}

/// One relation and the file it was in, as SQL told it.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct RelationEntry {
    /// The database's name.
    pub database: String,
    /// The schema's name.
    pub schema: String,
    /// The relation's name.
    pub name: String,
    /// `pg_class.relkind`.
    pub kind: char,
    /// `pg_class.oid`.
    pub oid: u32,
    /// The database's oid, the directory under `base`; 0 for shared relations.
    pub database_oid: u32,
    /// Tablespace oid of the file (never 0).
    pub tablespace_oid: u32,
    /// The file's number: `pg_relation_filenode`, which also resolves mapped relations.
    pub filenode: u32,
    /// The table that a toast table or an index belongs to; 0 otherwise.
    pub owner_oid: u32,
}

/// What kind of file a [`SourceFile`] is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum FileKind {
    /// A regular file.
    Regular,
    /// A directory.
    Directory,
    /// A symbolic link (a tablespace, or `pg_wal` kept elsewhere) and its target.
    Link(String),
}

/// A file's state as the file system tells it; equal twice means that nothing changed between,
/// under the conditions of the backup job.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct FileStat {
    /// Bytes.
    pub size: u64,
    /// Permission bits.
    pub mode: u32,
    /// Last change of the content, in nanoseconds since 1970.
    pub mtime_ns: i64,
    /// Last change of content or inode, in nanoseconds since 1970.
    pub ctime_ns: i64,
    /// The inode.
    pub inode: u64,
    /// The device.
    pub device: u64,
}

/// One thing in a cluster to keep.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SourceFile {
    /// Path below the data directory; tablespaces appear below `pg_tblspc/<oid>/`. Encoded by
    /// [`path::encode`](crate::path::encode).
    pub path: String,
    /// What it is.
    pub kind: FileKind,
    /// Its state when it was listed; only `mode` for directories and links.
    pub stat: FileStat,
}

/// Reads one file of a cluster. Blocking; made and used on a worker thread.
pub trait FileReader: Send {
    /// Reads at most `buffer.len()` bytes at `offset`; fewer only at the end of the file.
    fn read_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<usize>;

    /// The state of the open file.
    fn stat(&self) -> io::Result<FileStat>;

    /// Reads a place once more that was damaged when it was read: as it is now, where the file is.
    fn look_again(&self, buffer: &mut [u8], offset: u64) -> io::Result<usize>;

    /// Whether what [`look_again`](Self::look_again) gives may be stored in place of what was read.
    /// Not so when the server may have ended the backup since: the WAL of the backup would not cover
    /// what was written after that. It then only shows that the page was being written, and the
    /// full-page image in the WAL makes it whole.
    fn is_live(&self) -> bool;
}

/// Opens a listed file from any thread; `None` when it has vanished.
pub type FileOpener = Arc<dyn Fn(&str) -> Result<Option<Box<dyn FileReader>>, SourceError> + Send + Sync>;

/// Files in the order in which a server sends them, each with its content. Blocking; used on one
/// worker thread. An error ends it.
pub trait FileStream: Send {
    /// Gives something to ask now and then while a wait lasts: `true` ends the wait with an error.
    fn interrupt_when(&mut self, asked: Box<dyn Fn() -> bool + Send>);

    /// The next file, in any order but each path once; what was not read of the last one is passed
    /// over. `None` at the end.
    fn next_file(&mut self) -> Result<Option<SourceFile>, SourceError>;

    /// Reads content of the current file: exactly as many bytes as its `stat` says until 0 at its
    /// end.
    fn read(&mut self, buffer: &mut [u8]) -> Result<usize, SourceError>;
}

/// A cluster that can be backed up.
#[async_trait]
pub trait DatabaseSource: Send + Sync + fmt::Debug {
    /// What the cluster is.
    async fn describe(&self) -> Result<ClusterDescription, SourceError>;

    /// Looks at everything a backup needs of the server (privileges, settings, versions, clock)
    /// and says what is wrong, with the fix.
    async fn check(&self) -> Result<Vec<Finding>, SourceError>;

    /// Begins a backup: from now on PostgreSQL writes whole pages to WAL after a checkpoint.
    ///
    /// `fast` asks for an immediate checkpoint. Dropping the session ends the backup on the
    /// server without a result.
    async fn begin(&self, label: &str, fast: bool) -> Result<Box<dyn BackupSession>, SourceError>;
}

/// A backup under way.
#[async_trait]
pub trait BackupSession: Send {
    /// Where it began.
    fn start(&self) -> &BackupStart;

    /// The pages' format.
    fn pages(&self) -> Arc<dyn PageChecker>;

    /// An identity of the host whose file system gives the stats (machine id or host name).
    fn host(&self) -> String;

    /// Whether the stats can be trusted to tell a changed file (a local file system).
    fn stat_is_trusted(&self) -> bool;

    /// Everything to keep, in [`path::compare`](crate::path::compare) order, except
    /// `global/pg_control`, `backup_label` and `tablespace_map`. Memory is bounded by the names
    /// of the largest directory. Files that vanish meanwhile are left out.
    fn files(&self) -> Box<dyn Iterator<Item = Result<SourceFile, SourceError>> + Send>;

    /// The files as they arrive, for a source that cannot list and open them; asked for once,
    /// instead of [`files`](Self::files), and read to its end before [`finish`](Self::finish).
    /// `None`: the files are listed and opened. With a stream, [`opener`](Self::opener) only serves
    /// to look at a place again.
    fn stream(&mut self) -> Option<Box<dyn FileStream>>;

    /// Opens a listed file; `None` when it has vanished.
    fn open(&self, path: &str) -> Result<Option<Box<dyn FileReader>>, SourceError>;

    /// A handle that opens files, for worker threads.
    fn opener(&self) -> FileOpener;

    /// Bytes of all files together, roughly, when that is cheap to know.
    async fn size_estimate(&mut self) -> Result<Option<u64>, SourceError>;

    /// The relations and their files now. Called when the backup begins and again when it ends.
    /// Sorted by the bytes of database, schema and name: what is stored of an unchanged catalogue
    /// depends on its order. Rows are fetched as they are taken, and after an error there are none.
    fn relations(&mut self) -> BoxStream<'_, Result<RelationEntry, SourceError>>;

    /// Tablespaces outside the data directory.
    async fn tablespaces(&mut self) -> Result<Vec<TablespaceFacts>, SourceError>;

    /// Replication slots, which no backup holds: what they served must be set up anew.
    async fn slots(&mut self) -> Result<Vec<SlotState>, SourceError>;

    /// Files outside the data directory that the server needs.
    async fn host_files(&mut self) -> Result<Vec<HostFile>, SourceError>;

    /// What the cluster needs of a host.
    async fn host_needs(&mut self) -> Result<HostNeeds, SourceError>;

    /// Ends the backup and reads `global/pg_control` (second value) after everything else.
    ///
    /// It does not wait for the archiver; the job checks its own archive.
    async fn finish(self: Box<Self>) -> Result<(BackupStop, Vec<u8>), SourceError>;
}

type Source = Box<dyn std::error::Error + Send + Sync>;

/// Why a cluster could not be looked at or backed up.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum SourceError {
    /// The server cannot be reached.
    #[error("the server at {server} cannot be reached")]
    Unreachable {
        /// Host and port, without secrets.
        server: String,
        /// Why.
        source: Source,
    },
    /// The server refuses this user.
    #[error("the server at {server} refused: {operation}")]
    Denied {
        /// Host and port.
        server: String,
        /// What was asked.
        operation: String,
        /// The server's answer.
        source: Source,
    },
    /// Another backup of this server is under way.
    #[error("another backup of the server at {server} is under way")]
    Busy {
        /// Host and port.
        server: String,
    },
    /// A query failed.
    #[error("the server at {server} could not {operation}")]
    Query {
        /// Host and port.
        server: String,
        /// What was asked.
        operation: String,
        /// The server's answer.
        source: Source,
    },
    /// A file of the cluster cannot be read.
    #[error("cannot {operation} {path}")]
    File {
        /// What was asked.
        operation: &'static str,
        /// The file.
        path: String,
        /// Why.
        source: io::Error,
    },
    /// A file of the cluster is not what it should be.
    #[error("{path} is damaged: {reason}")]
    Damaged {
        /// The file.
        path: String,
        /// What is wrong.
        reason: String,
    },
    /// The data directory is not the one of the server.
    #[error("the data directory {path} belongs to cluster {found}, but the server is cluster {expected}")]
    OtherCluster {
        /// The directory.
        path: String,
        /// The cluster of the directory.
        found: SystemId,
        /// The cluster of the server.
        expected: SystemId,
    },
    /// A setting or an address is wrong.
    #[error("{setting} is wrong: {reason}")]
    Invalid {
        /// The setting.
        setting: String,
        /// What is wrong.
        reason: String,
    },
    /// This version of PostgreSQL is not known.
    #[error("{what} is not supported: {reason}")]
    Unsupported {
        /// The thing.
        what: String,
        /// Why not.
        reason: String,
    },
}

impl SourceError {
    /// What was asked of a server that let nobody in at all.
    pub const CONNECTION: &'static str = "the connection";
}

impl Classified for SourceError {
    fn class(&self) -> ErrorClass {
        match self {
            SourceError::Unreachable { .. } | SourceError::Query { .. } => ErrorClass::Transient,
            SourceError::Denied { .. } => ErrorClass::Denied,
            SourceError::Busy { .. } => ErrorClass::Fenced,
            SourceError::File { source, .. } => match source.kind() {
                io::ErrorKind::PermissionDenied => ErrorClass::Denied,
                io::ErrorKind::NotFound => ErrorClass::Missing,
                io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => ErrorClass::Exhausted,
                _ => ErrorClass::Transient,
            },
            SourceError::Damaged { .. } => ErrorClass::Corrupt,
            SourceError::OtherCluster { .. } | SourceError::Invalid { .. } => ErrorClass::Invalid,
            SourceError::Unsupported { .. } => ErrorClass::Unsupported,
        }
    }

    fn code(&self) -> &'static str {
        match self {
            SourceError::Unreachable { .. } => "source-unreachable",
            SourceError::Denied { .. } => "source-denied",
            SourceError::Busy { .. } => "source-busy",
            SourceError::Query { .. } => "source-query",
            SourceError::File { .. } => "source-file",
            SourceError::Damaged { .. } => "source-damaged",
            SourceError::OtherCluster { .. } => "source-other-cluster",
            SourceError::Invalid { .. } => "source-invalid",
            SourceError::Unsupported { .. } => "source-unsupported",
        }
    }

    fn hint(&self) -> Option<String> {
        Some(match self {
            SourceError::Unreachable { .. } => "Is PostgreSQL running, and is [cluster] connection right? `dr check` tests it.".into(),
            SourceError::Denied { operation, .. } if operation == SourceError::CONNECTION => "Check user and password of [cluster] connection, and the server's pg_hba.conf. Without user= it is the name of whoever runs dr.".into(),
            SourceError::Denied { .. } => "The role needs pg_read_all_settings and EXECUTE on pg_backup_start and pg_backup_stop; `dr check` names what is missing.".into(),
            SourceError::Busy { .. } => "Wait for it to end: `dr jobs` shows it. A backup whose process died has released its lock.".into(),
            SourceError::Query { .. } => "See the server's log; then run the command again.".into(),
            SourceError::File { .. } => "dr must run as the user that owns the data directory (usually postgres).".into(),
            SourceError::Damaged { .. } => "Look at the server's log and disk before anything else; older backups are untouched.".into(),
            SourceError::OtherCluster { .. } => "Set [cluster] data_directory and connection to the same server.".into(),
            SourceError::Invalid { .. } => "Run `dr config check`.".into(),
            SourceError::Unsupported { .. } => "dr supports PostgreSQL 15 to 18.".into(),
        })
    }
}
