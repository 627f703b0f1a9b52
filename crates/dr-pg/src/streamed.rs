//! A cluster on another host: its files through a replication connection, its facts by SQL.
//!
//! The files are those of `BASE_BACKUP`, with the same things left out as when they are read from
//! the disk, so that a restore of either backup gives the same bytes. No access to the host is
//! needed. One server process sends everything: where `dr` can run on the host, reading the files
//! there is faster, and unchanged files are not read at all.

mod check;
mod files;

use std::sync::{Arc, Mutex};

use async_trait::async_trait;
use dr_core::guard::Guard;
use dr_core::port::{
    BackupSession, BackupStart, BackupStop, ClusterDescription, DatabaseSource, FileOpener, FileReader,
    FileStat, FileStream, Finding, HostFile, HostNeeds, PageChecker, RelationEntry, SlotState, SourceError,
    SourceFile, TablespaceFacts,
};
use dr_core::{SegmentSize, SystemId, Timeline};
use futures_util::stream::BoxStream;
use tokio::runtime::Handle;

use crate::conn::{ConnInfo, SessionKind};
use crate::local::{LOCK, StandbyPolicy, facts, micros};
use crate::page::PgPages;
use crate::replication::{BackupEnd, BaseBackupOptions, ReplicationClient, ReplicationMode};
use crate::sql::{QUERY_LIMIT, Sql};
use crate::{NEWEST_MAJOR, OLDEST_MAJOR};

/// What a cluster is, from functions that every role may call.
const FACTS: &str = "SELECT s.system_identifier, current_setting('server_version_num')::int4, i.database_block_size, \
     i.bytes_per_wal_segment, i.blocks_per_segment, i.data_page_checksum_version <> 0, c.timeline_id, \
     pg_is_in_recovery() FROM pg_control_system() s, pg_control_init() i, pg_control_checkpoint() c";

/// How a cluster is reached.
#[derive(Clone, Debug)]
pub struct StreamSourceOptions {
    /// A libpq connection string; the role needs the `REPLICATION` attribute.
    pub conninfo: String,
    /// At most so many bytes a second are asked of the server; `None`: as fast as it can.
    pub max_rate: Option<u64>,
    /// Whether a standby may send the files. Among several hosts one of the wanted kind is chosen.
    pub standby: StandbyPolicy,
}

/// A cluster on any host.
#[derive(Clone, Debug)]
pub struct StreamSource {
    options: StreamSourceOptions,
}

impl StreamSource {
    /// A source; nothing is opened yet.
    pub fn new(options: StreamSourceOptions) -> Self {
        StreamSource { options }
    }

    async fn connect(&self) -> Result<Sql, SourceError> {
        let mut info = ConnInfo::parse(&self.options.conninfo)?;
        if info.session_kind == SessionKind::Any {
            info.session_kind = match self.options.standby {
                // One host is what it is: a refusal then says more than "none of these".
                _ if info.endpoints.len() < 2 => SessionKind::Any,
                StandbyPolicy::Never => SessionKind::Primary,
                StandbyPolicy::Prefer => SessionKind::PreferStandby,
                StandbyPolicy::Only => SessionKind::Standby,
            };
        }
        Sql::connect_by(info).await
    }
}

async fn look(sql: &Sql) -> Result<ClusterDescription, SourceError> {
    let row = sql.row("tell what it is", FACTS, QUERY_LIMIT).await?;
    let number = |index: usize| row.get::<_, i32>(index) as u32;
    let major = number(1) / 10_000;
    if !(OLDEST_MAJOR..=NEWEST_MAJOR).contains(&major) {
        return Err(SourceError::Unsupported {
            what: format!("PostgreSQL {major}"),
            reason: format!("dr knows {OLDEST_MAJOR} to {NEWEST_MAJOR}"),
        });
    }
    let segment_size = SegmentSize::try_from(u64::from(number(3))).map_err(|error| {
        SourceError::Unsupported { what: "the WAL segment size".into(), reason: error.to_string() }
    })?;
    // Only privileged roles see where it is, and nothing here depends on it.
    let directory = sql.row("tell its data directory", "SHOW data_directory", QUERY_LIMIT).await;
    Ok(ClusterDescription {
        system_id: SystemId(row.get::<_, i64>(0) as u64),
        version_num: number(1),
        page_size: number(2),
        segment_size,
        relation_segment_pages: number(4),
        checksums: row.get(5),
        timeline: Timeline(number(6)),
        in_recovery: row.get(7),
        data_directory: directory.map(|row| row.get::<_, String>(0)).unwrap_or_default(),
    })
}

#[async_trait]
impl DatabaseSource for StreamSource {
    async fn describe(&self) -> Result<ClusterDescription, SourceError> {
        look(&self.connect().await?).await
    }

    async fn check(&self) -> Result<Vec<Finding>, SourceError> {
        let sql = self.connect().await?;
        check::check(&sql, &self.options.conninfo, self.options.standby).await
    }

    async fn begin(&self, label: &str, fast: bool) -> Result<Box<dyn BackupSession>, SourceError> {
        let sql = self.connect().await?;
        let cluster = look(&sql).await?;
        self.options.standby.check(cluster.in_recovery)?;
        let lock = "SELECT pg_try_advisory_lock($1, $2)";
        let rows = sql.rows("lock out other backups", lock, &[&LOCK.0, &LOCK.1], QUERY_LIMIT).await?;
        let locked = rows.first().is_some_and(|row| row.get::<_, bool>(0));
        if !locked && Guard::OneBackupAtATime.holds() {
            return Err(SourceError::Busy { server: sql.server().to_owned() });
        }
        // The same server: another of several hosts may be of the same cluster and of another role.
        let mut client = ReplicationClient::connect(&sql.same_server(), ReplicationMode::Physical).await?;
        let found = client.identify().await?.system_id;
        if found != cluster.system_id {
            // Several hosts, and another one answered.
            let path = client.server().to_owned();
            return Err(SourceError::OtherCluster { path, found, expected: cluster.system_id });
        }
        let options = BaseBackupOptions {
            label: label.to_owned(),
            fast_checkpoint: fast,
            max_rate: self.options.max_rate.map(|bytes| u32::try_from(bytes >> 10).unwrap_or(u32::MAX)),
            manifest: false,
            incremental: false,
        };
        let (begun, backup) = client.base_backup(&options).await?;
        let query = "SELECT (extract(epoch FROM clock_timestamp()) * 1000000)::int8";
        let row = sql.row("tell the time", query, QUERY_LIMIT).await?;
        let start = BackupStart { lsn: begun.lsn, timeline: begun.timeline, time: micros(row.get(0)) };
        let pages =
            Arc::new(PgPages::new(cluster.page_size, cluster.relation_segment_pages, cluster.checksums));
        let ended = Arc::new(Mutex::new(None));
        let stream = files::ArrivingFiles::new(backup, &begun.tablespaces, Handle::current(), ended.clone());
        Ok(Box::new(StreamSession {
            sql: Arc::new(sql),
            conninfo: self.options.conninfo.clone(),
            cluster,
            start,
            size: begun.size,
            pages,
            stream: Some(stream),
            ended,
        }))
    }
}

/// What the stream leaves behind when it has been read to its end.
#[derive(Debug)]
struct Ended {
    end: BackupEnd,
    backup_label: Vec<u8>,
    tablespace_map: Vec<u8>,
    control: Vec<u8>,
}

/// A backup under way. The stream's connection is the backup; this one has the lock.
struct StreamSession {
    sql: Arc<Sql>,
    conninfo: String,
    cluster: ClusterDescription,
    start: BackupStart,
    size: u64,
    pages: Arc<PgPages>,
    stream: Option<files::ArrivingFiles>,
    ended: Arc<Mutex<Option<Ended>>>,
}

#[async_trait]
impl BackupSession for StreamSession {
    fn start(&self) -> &BackupStart {
        &self.start
    }

    fn pages(&self) -> Arc<dyn PageChecker> {
        self.pages.clone()
    }

    fn host(&self) -> String {
        self.sql.server().to_owned()
    }

    fn stat_is_trusted(&self) -> bool {
        false
    }

    fn files(&self) -> Box<dyn Iterator<Item = Result<SourceFile, SourceError>> + Send> {
        Box::new(std::iter::empty())
    }

    fn stream(&mut self) -> Option<Box<dyn FileStream>> {
        self.stream.take().map(|stream| Box::new(stream) as Box<dyn FileStream>)
    }

    fn open(&self, path: &str) -> Result<Option<Box<dyn FileReader>>, SourceError> {
        (self.opener())(path)
    }

    fn opener(&self) -> FileOpener {
        let (sql, handle) = (self.sql.clone(), Handle::current());
        Arc::new(move |path| {
            let (sql, handle, path) = (sql.clone(), handle.clone(), path.to_owned());
            Ok(Some(Box::new(RemoteFile { sql, handle, path })))
        })
    }

    async fn size_estimate(&mut self) -> Result<Option<u64>, SourceError> {
        Ok(Some(self.size))
    }

    fn relations(&mut self) -> BoxStream<'_, Result<RelationEntry, SourceError>> {
        facts::relations(&self.sql, &self.conninfo)
    }

    async fn tablespaces(&mut self) -> Result<Vec<TablespaceFacts>, SourceError> {
        facts::tablespaces(&self.sql).await
    }

    async fn slots(&mut self) -> Result<Vec<SlotState>, SourceError> {
        crate::primary::slots(&self.sql).await
    }

    /// None: they are files of another host, which this connection does not reach.
    async fn host_files(&mut self) -> Result<Vec<HostFile>, SourceError> {
        Ok(Vec::new())
    }

    async fn host_needs(&mut self) -> Result<HostNeeds, SourceError> {
        facts::host_needs(&self.sql, &self.conninfo, self.cluster.version_num / 10_000).await
    }

    async fn finish(self: Box<Self>) -> Result<(BackupStop, Vec<u8>), SourceError> {
        let incomplete = |what: &str| SourceError::Query {
            server: self.sql.server().to_owned(),
            operation: "end the backup".into(),
            source: format!("{what} did not arrive").into(),
        };
        let ended = self.ended.lock().ok().and_then(|mut ended| ended.take());
        let ended = ended.ok_or_else(|| incomplete("the end of the stream"))?;
        let text = |bytes: Vec<u8>, what: &str| String::from_utf8(bytes).map_err(|_| incomplete(what));
        let backup_label = text(ended.backup_label, "a readable backup_label")?;
        if backup_label.is_empty() || ended.control.is_empty() {
            return Err(incomplete("backup_label or global/pg_control"));
        }
        crate::control::parse(&ended.control, "global/pg_control").map_err(|error| SourceError::Damaged {
            path: "global/pg_control".into(),
            reason: error.to_string(),
        })?;
        let query = "SELECT (extract(epoch FROM clock_timestamp()) * 1000000)::int8";
        let row = self.sql.row("tell the time", query, QUERY_LIMIT).await?;
        let stop = BackupStop {
            lsn: ended.end.lsn,
            timeline: ended.end.timeline,
            time: micros(row.get(0)),
            backup_label,
            tablespace_map: text(ended.tablespace_map, "a readable tablespace_map")?,
        };
        Ok((stop, ended.control))
    }
}

/// A place of a file, looked at once more by SQL: a page that was being written when the server
/// read it. Roles without `pg_read_server_files` cannot, and the page then counts as it came.
struct RemoteFile {
    sql: Arc<Sql>,
    handle: Handle,
    path: String,
}

impl FileReader for RemoteFile {
    fn read_at(&self, buffer: &mut [u8], offset: u64) -> std::io::Result<usize> {
        let query = "SELECT pg_read_binary_file($1, $2, $3, true)";
        let (from, len) = (offset as i64, buffer.len() as i64);
        let rows = self
            .handle
            .block_on(self.sql.rows("read a page again", query, &[&self.path, &from, &len], QUERY_LIMIT))
            .map_err(std::io::Error::other)?;
        let bytes: Option<Vec<u8>> = rows.first().and_then(|row| row.get(0));
        let bytes = bytes.unwrap_or_default();
        let len = bytes.len().min(buffer.len());
        buffer[..len].copy_from_slice(&bytes[..len]);
        Ok(len)
    }

    fn stat(&self) -> std::io::Result<FileStat> {
        Err(std::io::ErrorKind::Unsupported.into())
    }

    fn look_again(&self, buffer: &mut [u8], offset: u64) -> std::io::Result<usize> {
        self.read_at(buffer, offset)
    }

    fn is_live(&self) -> bool {
        false
    }
}
