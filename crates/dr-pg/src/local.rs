//! A cluster on this host: its files read directly, its server spoken to by SQL.

pub(crate) mod check;
pub(crate) mod facts;

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use dr_core::guard::Guard;
use dr_core::port::{
    BackupSession, BackupStart, BackupStop, ClusterDescription, ControlFacts, DatabaseSource, FileOpener,
    FileReader, FileStat, FileStream, Finding, HostFile, HostNeeds, PageChecker, RelationEntry, SlotState,
    SourceError, SourceFile, TablespaceFacts,
};
use dr_core::{Lsn, Timeline, Timestamp};
use futures_util::stream::BoxStream;

use crate::page::PgPages;
use crate::sql::{QUERY_LIMIT, Sql};
use crate::walk::{TreeWalk, file_error, stat_of};
use crate::{NEWEST_MAJOR, OLDEST_MAJOR, control};

/// Starting a backup waits for a checkpoint, which a busy server spreads over its interval.
const CHECKPOINT_LIMIT: Duration = Duration::from_secs(3600);

/// The server looks at every file to tell its size; the copy does not wait for that.
const SIZE_LIMIT: Duration = Duration::from_secs(10);

/// The advisory lock that one backup at a time holds ("dr", "backup").
pub(crate) const LOCK: (i32, i32) = (0x6472, 0x6261);

/// Reads of `pg_control` while the server writes it.
const CONTROL_READS: u32 = 20;

/// File systems of this host that keep time stamps and inodes as this job needs them
/// (`statfs(2)`): ext2 to 4, XFS, Btrfs, tmpfs, ZFS, overlay, F2FS.
const LOCAL_FILE_SYSTEMS: [u64; 7] =
    [0xEF53, 0x5846_5342, 0x9123_683E, 0x0102_1994, 0x2FC1_2FC1, 0x794C_7630, 0xF2F5_2010];

/// Whether a backup may be read from a standby.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum StandbyPolicy {
    /// Only from a primary.
    #[default]
    Never,
    /// From a standby where there is one, else from the primary.
    Prefer,
    /// Only from a standby.
    Only,
}

impl StandbyPolicy {
    /// Whether a server of this role will do.
    pub(crate) fn check(self, in_recovery: bool) -> Result<(), SourceError> {
        let refused = |what: &str, reason: &str| {
            Err(SourceError::Unsupported { what: what.to_owned(), reason: reason.to_owned() })
        };
        match (self, in_recovery) {
            (StandbyPolicy::Never, true) => {
                refused("a backup from a standby", "backup.standby is never, and the server is a standby")
            }
            (StandbyPolicy::Only, false) => {
                refused("a backup from the primary", "backup.standby is only, and the server is a primary")
            }
            _ => Ok(()),
        }
    }

    /// The same as a finding.
    pub(crate) fn finding(self, in_recovery: bool) -> Finding {
        let role = if in_recovery { "standby" } else { "primary" };
        match self.check(in_recovery) {
            Ok(()) => Finding::good("role", format!("the server is a {role}")),
            Err(_) => Finding::bad(
                "role",
                format!("the server is a {role}, which backup.standby does not let backups be read from"),
                "Set [cluster] connection to another server, or [backup] standby to prefer.",
            ),
        }
    }
}

/// How a local cluster is reached.
#[derive(Clone, Debug)]
pub struct LocalSourceOptions {
    /// A libpq connection string; a user without superuser rights needs what `dr check` names.
    pub conninfo: String,
    /// The data directory; `None`: the server is asked.
    pub data_directory: Option<PathBuf>,
    /// Whether the server may be a standby.
    pub standby: StandbyPolicy,
}

/// A cluster on this host.
#[derive(Clone, Debug)]
pub struct LocalSource {
    options: LocalSourceOptions,
}

impl LocalSource {
    /// A source; nothing is opened yet.
    pub fn new(options: LocalSourceOptions) -> Self {
        LocalSource { options }
    }

    async fn connect(&self) -> Result<Sql, SourceError> {
        Sql::connect(&self.options.conninfo, None).await
    }

    async fn data_directory(&self, sql: &Sql) -> Result<PathBuf, SourceError> {
        if let Some(path) = &self.options.data_directory {
            return Ok(path.clone());
        }
        let row = sql.row("tell its data directory", "SHOW data_directory", QUERY_LIMIT).await?;
        Ok(PathBuf::from(row.get::<_, String>(0)))
    }

    async fn look(&self, sql: &Sql) -> Result<(ClusterDescription, PathBuf, u32), SourceError> {
        let data = self.data_directory(sql).await?;
        let query = "SELECT s.system_identifier, current_setting('server_version_num')::int4, pg_is_in_recovery(), \
                     c.timeline_id FROM pg_control_system() s, pg_control_checkpoint() c";
        let row = sql.row("tell what it is", query, QUERY_LIMIT).await?;
        let version: i32 = row.get(1);
        let major = version as u32 / 10_000;
        if !(OLDEST_MAJOR..=NEWEST_MAJOR).contains(&major) {
            return Err(SourceError::Unsupported {
                what: format!("PostgreSQL {major}"),
                reason: format!("dr knows {OLDEST_MAJOR} to {NEWEST_MAJOR}"),
            });
        }
        let facts = read_control(&data)?.1;
        let server = dr_core::SystemId(row.get::<_, i64>(0) as u64);
        if facts.system_id != server {
            let path = data.display().to_string();
            return Err(SourceError::OtherCluster { path, found: facts.system_id, expected: server });
        }
        let description = ClusterDescription {
            system_id: server,
            version_num: version as u32,
            page_size: facts.page_size,
            segment_size: facts.segment_size,
            relation_segment_pages: facts.relation_segment_pages,
            checksums: facts.checksums,
            timeline: Timeline(row.get::<_, i32>(3) as u32),
            in_recovery: row.get(2),
            data_directory: data.display().to_string(),
        };
        Ok((description, data, facts.catalog_version))
    }
}

/// Whether the cluster's files lie on file systems whose stats tell a change.
fn is_on_local_file_systems(data: &Path) -> bool {
    let known = |path: &Path| {
        rustix::fs::statfs(path).is_ok_and(|fs| LOCAL_FILE_SYSTEMS.contains(&(fs.f_type as u64)))
    };
    let tablespaces = std::fs::read_dir(data.join("pg_tblspc"));
    known(data) && tablespaces.is_ok_and(|dir| dir.flatten().all(|entry| known(&entry.path())))
}

/// Reads `pg_control` again while its checksum is wrong: the server may be writing it.
fn read_control(data: &Path) -> Result<(Vec<u8>, ControlFacts), SourceError> {
    let path = data.join("global/pg_control");
    let mut last = String::new();
    for _ in 0..CONTROL_READS {
        let bytes = std::fs::read(&path).map_err(|source| file_error("read", &path, source))?;
        match control::parse(&bytes, &path.display().to_string()) {
            Ok(facts) => return Ok((bytes, facts)),
            Err(error) => last = error.to_string(),
        }
        std::thread::sleep(Duration::from_millis(10));
    }
    Err(SourceError::Damaged { path: path.display().to_string(), reason: last })
}

#[async_trait]
impl DatabaseSource for LocalSource {
    async fn describe(&self) -> Result<ClusterDescription, SourceError> {
        let sql = self.connect().await?;
        Ok(self.look(&sql).await?.0)
    }

    async fn check(&self) -> Result<Vec<Finding>, SourceError> {
        let sql = self.connect().await?;
        let data = self.data_directory(&sql).await;
        check::check(&sql, &self.options.conninfo, data, self.options.standby).await
    }

    async fn begin(&self, label: &str, fast: bool) -> Result<Box<dyn BackupSession>, SourceError> {
        let sql = self.connect().await?;
        let (cluster, data, catalog_version) = self.look(&sql).await?;
        self.options.standby.check(cluster.in_recovery)?;
        let lock = "SELECT pg_try_advisory_lock($1, $2)";
        let rows = sql.rows("lock out other backups", lock, &[&LOCK.0, &LOCK.1], QUERY_LIMIT).await?;
        let locked = rows.first().is_some_and(|row| row.get::<_, bool>(0));
        if !locked && Guard::OneBackupAtATime.holds() {
            return Err(SourceError::Busy { server: sql.server().to_owned() });
        }
        let query = "SELECT pg_backup_start($1, $2)::text";
        let rows = sql.rows("start a backup", query, &[&label, &fast], CHECKPOINT_LIMIT).await?;
        let lsn = parse_lsn(rows.first().map(|row| row.get(0)).unwrap_or_default(), &sql)?;
        let query = "SELECT c.timeline_id, (extract(epoch FROM clock_timestamp()) * 1000000)::int8 \
                     FROM pg_control_checkpoint() c";
        let row = sql.row("tell its timeline", query, QUERY_LIMIT).await?;
        let start =
            BackupStart { lsn, timeline: Timeline(row.get::<_, i32>(0) as u32), time: micros(row.get(1)) };
        let pages =
            Arc::new(PgPages::new(cluster.page_size, cluster.relation_segment_pages, cluster.checksums));
        let conninfo = self.options.conninfo.clone();
        Ok(Box::new(LocalSession { sql, conninfo, data, cluster, catalog_version, start, pages }))
    }
}

fn parse_lsn(text: String, sql: &Sql) -> Result<Lsn, SourceError> {
    text.parse().map_err(|error: dr_core::guard::InvalidText| SourceError::Query {
        server: sql.server().to_owned(),
        operation: "tell a position".into(),
        source: Box::new(error),
    })
}

pub(crate) fn micros(value: i64) -> Timestamp {
    Timestamp::from_microsecond(value).unwrap_or(Timestamp::UNIX_EPOCH)
}

/// A backup under way. Its connection is the backup: PostgreSQL ends the backup with it.
struct LocalSession {
    sql: Sql,
    conninfo: String,
    data: PathBuf,
    cluster: ClusterDescription,
    catalog_version: u32,
    start: BackupStart,
    pages: Arc<PgPages>,
}

struct LocalFile(File);

impl FileReader for LocalFile {
    fn read_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<usize> {
        loop {
            match self.0.read_at(buffer, offset) {
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                other => return other,
            }
        }
    }

    fn stat(&self) -> io::Result<FileStat> {
        Ok(stat_of(&self.0.metadata()?))
    }

    fn look_again(&self, buffer: &mut [u8], offset: u64) -> io::Result<usize> {
        self.read_at(buffer, offset)
    }

    fn is_live(&self) -> bool {
        true
    }
}

fn open_file(data: &Path, path: &str) -> Result<Option<Box<dyn FileReader>>, SourceError> {
    use std::os::unix::ffi::OsStrExt;
    let place = data.join(std::ffi::OsStr::from_bytes(&dr_core::path::decode(path)));
    match File::open(&place) {
        Ok(file) => Ok(Some(Box::new(LocalFile(file)))),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(source) => Err(file_error("open", &place, source)),
    }
}

#[async_trait]
impl BackupSession for LocalSession {
    fn start(&self) -> &BackupStart {
        &self.start
    }

    fn pages(&self) -> Arc<dyn PageChecker> {
        self.pages.clone()
    }

    fn host(&self) -> String {
        let id = std::fs::read_to_string("/etc/machine-id").unwrap_or_default();
        let name = rustix::system::uname().nodename().to_string_lossy().into_owned();
        if id.trim().is_empty() { name } else { format!("{name}/{}", id.trim()) }
    }

    fn stat_is_trusted(&self) -> bool {
        is_on_local_file_systems(&self.data)
    }

    fn files(&self) -> Box<dyn Iterator<Item = Result<SourceFile, SourceError>> + Send> {
        let major = self.cluster.version_num / 10_000;
        Box::new(TreeWalk::new(&self.data).of_version(major, self.catalog_version))
    }

    fn stream(&mut self) -> Option<Box<dyn FileStream>> {
        None
    }

    fn open(&self, path: &str) -> Result<Option<Box<dyn FileReader>>, SourceError> {
        open_file(&self.data, path)
    }

    fn opener(&self) -> FileOpener {
        let data = self.data.clone();
        Arc::new(move |path| open_file(&data, path))
    }

    async fn size_estimate(&mut self) -> Result<Option<u64>, SourceError> {
        let query =
            "SELECT coalesce(sum(pg_database_size(oid)), 0)::int8 FROM pg_database WHERE datallowconn";
        // A role without CONNECT on every database may not ask; the estimate is a courtesy.
        let row = self.sql.row("tell its size", query, SIZE_LIMIT).await;
        Ok(row.ok().map(|row| row.get::<_, i64>(0) as u64))
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

    async fn host_files(&mut self) -> Result<Vec<HostFile>, SourceError> {
        facts::host_files(&self.sql, &self.data).await
    }

    async fn host_needs(&mut self) -> Result<HostNeeds, SourceError> {
        facts::host_needs(&self.sql, &self.conninfo, self.cluster.version_num / 10_000).await
    }

    async fn finish(self: Box<Self>) -> Result<(BackupStop, Vec<u8>), SourceError> {
        // On a standby pg_control says up to where WAL is needed, so it is read before the end, whose
        // position then covers it (`do_pg_backup_stop` in xlog.c).
        let before = if self.cluster.in_recovery { Some(read_control(&self.data)?.0) } else { None };
        // Not waiting for the archiver here: the job looks into its own archive.
        let query = "SELECT lsn::text, labelfile, spcmapfile, \
                     (extract(epoch FROM clock_timestamp()) * 1000000)::int8 FROM pg_backup_stop(false)";
        let row = self.sql.row("end the backup", query, QUERY_LIMIT).await?;
        let lsn = parse_lsn(row.get(0), &self.sql)?;
        let backup_label: String = row.get(1);
        let label = crate::history_files::parse_backup_label(&backup_label);
        let timeline = label.map_or(self.start.timeline, |label| label.timeline);
        let control = before.map_or_else(|| read_control(&self.data).map(|read| read.0), Ok)?;
        let stop = BackupStop {
            lsn,
            timeline,
            time: micros(row.get(3)),
            backup_label,
            tablespace_map: row.get::<_, Option<String>>(2).unwrap_or_default(),
        };
        Ok((stop, control))
    }
}
