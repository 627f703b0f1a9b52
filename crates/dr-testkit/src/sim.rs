//! A cluster in memory: files that a test edits, a server that only counts positions.

use std::collections::BTreeMap;
use std::io;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use async_trait::async_trait;
use dr_core::port::{
    BackupSession, BackupStart, BackupStop, BadPage, Clock, ClusterDescription, DatabaseSource, FileKind,
    FileReader, FileStat, FileStream, Finding, HostFile, HostNeeds, NoEvents, PageChecker, RelationEntry,
    SlotState, SourceError, SourceFile, TablespaceFacts,
};
use dr_core::{Lsn, SegmentSize, SystemId, Timeline, Timestamp, WalName, WalSegment};
use dr_engine::{Cancel, Context};
use dr_storage::{ClusterStore, Repository};
use futures_util::StreamExt;
use futures_util::stream::{self, BoxStream};

use crate::instance::control_bytes;

/// Bytes of a simulated page.
pub const PAGE: usize = 8192;

/// A page that begins with this is bad, whatever its place.
pub const BAD: &[u8; 8] = b"BADPAGE!";

/// A page that begins with this is being written while it is read: wrong, and newer than any backup.
pub const TORN: &[u8; 8] = b"TORNPAGE";

/// A clock that moves a second a look.
#[derive(Debug, Default)]
pub struct TickingClock(AtomicU64);

impl Clock for TickingClock {
    fn now(&self) -> Timestamp {
        let tick = self.0.fetch_add(1, Ordering::SeqCst);
        Timestamp::from_second(1_800_000_000 + tick as i64).unwrap()
    }
}

/// Numbers that look random, from a seed.
#[derive(Clone, Debug)]
pub struct Random(u64);

impl Random {
    /// The sequence of a seed.
    pub fn new(seed: u64) -> Self {
        Random(seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1)
    }

    /// The next number.
    #[allow(clippy::should_implement_trait)]
    pub fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0.wrapping_mul(0x2545_F491_4F6C_DD1D)
    }

    /// A number below `n`.
    pub fn below(&mut self, n: u64) -> u64 {
        self.next() % n.max(1)
    }

    /// Bytes that compress about threefold, as rows do.
    pub fn bytes(&mut self, len: usize) -> Vec<u8> {
        let mut out = Vec::with_capacity(len + 16);
        while out.len() < len {
            out.extend_from_slice(&self.next().to_le_bytes()[..3]);
            out.extend_from_slice(b"row text ");
        }
        out.truncate(len);
        out
    }
}

#[derive(Debug, Default)]
struct State {
    files: BTreeMap<String, (Vec<u8>, i64)>,
    links: BTreeMap<String, String>,
    /// The LSN that the next change gets.
    lsn: u64,
    /// The clock of time stamps, in nanoseconds.
    now_ns: i64,
    /// Bytes that may still be read before reads fail; `None`: no limit.
    read_budget: Option<u64>,
    /// What listings of relations show, one after the other, and the last one from then on.
    relations: Vec<Vec<RelationEntry>>,
    /// Pages that are being written while the stream sends them: wrong there, right in the file.
    torn_in_stream: BTreeMap<String, usize>,
}

/// A simulated cluster. Cloning shares it.
#[derive(Clone, Debug)]
pub struct SimCluster {
    /// Its identity.
    pub system_id: SystemId,
    state: Arc<Mutex<State>>,
    /// What `check` answers.
    pub findings: Vec<Finding>,
    /// Whether time stamps may be trusted.
    pub trust_stat: bool,
    /// Whether the files come as a stream.
    pub streamed: bool,
}

impl SimCluster {
    /// An empty cluster.
    pub fn new(system_id: u64) -> Self {
        let state = State { lsn: 0x0100_0000, now_ns: 1_700_000_000_000_000_000, ..State::default() };
        SimCluster {
            system_id: SystemId(system_id),
            state: Arc::new(Mutex::new(state)),
            findings: Vec::new(),
            trust_stat: true,
            streamed: false,
        }
    }

    /// Puts a file, whole.
    pub fn put(&self, path: &str, content: Vec<u8>) {
        let mut state = self.state.lock().unwrap();
        state.now_ns += 10_000_000_000;
        let now = state.now_ns;
        state.files.insert(path.to_owned(), (content, now));
    }

    /// What listings of relations show from now on: each once, the last one for ever.
    pub fn list_relations(&self, listings: Vec<Vec<RelationEntry>>) {
        self.state.lock().unwrap().relations = listings;
    }

    /// Puts a link; below `pg_tblspc` it is a tablespace, by its OID.
    pub fn put_link(&self, path: &str, target: &str) {
        self.state.lock().unwrap().links.insert(path.to_owned(), target.to_owned());
    }

    fn tablespaces(&self) -> Vec<TablespaceFacts> {
        let state = self.state.lock().unwrap();
        let space = |(path, target): (&String, &String)| {
            let oid = path.strip_prefix("pg_tblspc/")?.parse().ok()?;
            Some(TablespaceFacts { oid, name: format!("space_{oid}"), location: target.clone() })
        };
        state.links.iter().filter_map(space).collect()
    }

    /// A relation file of `pages` pages of rows.
    pub fn put_relation(&self, path: &str, pages: usize, random: &mut Random) {
        let mut content = Vec::with_capacity(pages * PAGE);
        for _ in 0..pages {
            content.extend_from_slice(&self.page(random));
        }
        self.put(path, content);
    }

    /// A page of rows, with the current LSN in its header as PostgreSQL has it.
    fn page(&self, random: &mut Random) -> Vec<u8> {
        let mut state = self.state.lock().unwrap();
        state.lsn += 64;
        let mut page = random.bytes(PAGE);
        page[..4].copy_from_slice(&((state.lsn >> 32) as u32).to_le_bytes());
        page[4..8].copy_from_slice(&(state.lsn as u32).to_le_bytes());
        page
    }

    /// Writes one page of a relation anew.
    pub fn touch_page(&self, path: &str, page: usize, random: &mut Random) {
        let fresh = self.page(random);
        self.edit(path, |content| {
            let end = (page + 1) * PAGE;
            if content.len() < end {
                content.resize(end, 0);
            }
            content[page * PAGE..end].copy_from_slice(&fresh);
        });
    }

    /// Changes a file's content.
    pub fn edit(&self, path: &str, change: impl FnOnce(&mut Vec<u8>)) {
        let mut state = self.state.lock().unwrap();
        state.now_ns += 10_000_000_000;
        let now = state.now_ns;
        let file = state.files.get_mut(path).expect("a file");
        change(&mut file.0);
        file.1 = now;
    }

    /// Lets a page be wrong in streams, though it is right in the file.
    pub fn tear_in_stream(&self, path: &str, page: usize) {
        self.state.lock().unwrap().torn_in_stream.insert(path.to_owned(), page);
    }

    /// Removes a file.
    pub fn remove(&self, path: &str) {
        self.state.lock().unwrap().files.remove(path);
    }

    /// All files and their content.
    pub fn content(&self) -> BTreeMap<String, Vec<u8>> {
        let state = self.state.lock().unwrap();
        state.files.iter().map(|(path, (content, _))| (path.clone(), content.clone())).collect()
    }

    /// Lets reads fail after so many bytes, as a crash in the middle of a backup.
    pub fn fail_after(&self, bytes: Option<u64>) {
        self.state.lock().unwrap().read_budget = bytes;
    }

    /// The position now.
    pub fn lsn(&self) -> Lsn {
        Lsn(self.state.lock().unwrap().lsn)
    }

    /// Archives the segments of all positions so far, as the server's archiver would.
    pub async fn archive(&self, store: &ClusterStore) {
        let size = SegmentSize::DEFAULT;
        let last = self.lsn().0 / size.bytes();
        for number in 1..=last {
            archive_segment(store, 1, number).await;
        }
    }

    fn listing(&self) -> Vec<SourceFile> {
        let state = self.state.lock().unwrap();
        let mut out: BTreeMap<String, SourceFile> = BTreeMap::new();
        for (path, (content, changed)) in &state.files {
            for (at, _) in path.match_indices('/') {
                let dir = path[..at].to_owned();
                let stat = FileStat { mode: 0o700, ..FileStat::default() };
                out.entry(dir.clone()).or_insert(SourceFile { path: dir, kind: FileKind::Directory, stat });
            }
            let stat = FileStat {
                size: content.len() as u64,
                mode: 0o600,
                mtime_ns: *changed,
                ctime_ns: *changed,
                inode: 7,
                device: 1,
            };
            out.insert(path.clone(), SourceFile { path: path.clone(), kind: FileKind::Regular, stat });
        }
        for (path, target) in &state.links {
            let kind = FileKind::Link(target.clone());
            let stat = FileStat { mode: 0o777, ..FileStat::default() };
            out.insert(path.clone(), SourceFile { path: path.clone(), kind, stat });
        }
        let mut files: Vec<_> = out.into_values().collect();
        files.sort_by(|a, b| dr_core::path::compare(&a.path, &b.path));
        files
    }
}

/// Archives one simulated segment.
pub async fn archive_segment(store: &ClusterStore, timeline: u32, number: u64) {
    let size = SegmentSize::DEFAULT;
    let wal = store.wal(size);
    let segment = WalSegment { timeline: Timeline(timeline), number };
    let mut encoder = wal.encoder(&WalName::Segment(segment)).unwrap();
    let piece = vec![number as u8; 256 << 10];
    for _ in 0..size.bytes() / piece.len() as u64 {
        encoder.feed(&piece).unwrap();
    }
    wal.store(encoder.finish(segment.end(size)).unwrap()).await.unwrap();
}

/// What a job of this cluster is given.
pub fn context(repo: &Repository, cluster: &SimCluster, clock: Arc<dyn Clock>) -> Context {
    Context {
        repo: repo.clone(),
        store: repo.cluster(cluster.system_id),
        events: Arc::new(NoEvents),
        clock,
        label: "sim".into(),
        host: "sim-host".into(),
        cancel: Cancel::default(),
    }
}

/// Simulated pages: bad when they begin with [`BAD`].
#[derive(Debug)]
struct SimPages;

impl PageChecker for SimPages {
    fn page_size(&self) -> usize {
        PAGE
    }

    fn has_checksums(&self) -> bool {
        true
    }

    fn check(&self, pages: &[u8], _: u32, bad: &mut Vec<BadPage>) {
        for (index, page) in pages.chunks_exact(PAGE).enumerate() {
            if &page[..8] == BAD || &page[..8] == TORN {
                bad.push(BadPage { index: index as u32, found: 1, expected: 2 });
            }
        }
    }

    fn page_lsn(&self, page: &[u8]) -> Lsn {
        if page.starts_with(BAD) {
            return Lsn(0);
        }
        if page.starts_with(TORN) {
            return Lsn(u64::MAX);
        }
        let half = |at: usize| u64::from(u32::from_le_bytes(page[at..at + 4].try_into().unwrap()));
        Lsn(half(0) << 32 | half(4))
    }

    fn first_block(&self, path: &str) -> Option<u32> {
        path.starts_with("base/").then_some(0)
    }
}

#[async_trait]
impl DatabaseSource for SimCluster {
    async fn describe(&self) -> Result<ClusterDescription, SourceError> {
        Ok(ClusterDescription {
            system_id: self.system_id,
            version_num: 150_018,
            page_size: PAGE as u32,
            segment_size: SegmentSize::DEFAULT,
            relation_segment_pages: 131_072,
            checksums: true,
            timeline: Timeline(1),
            in_recovery: false,
            data_directory: "/simulated".into(),
        })
    }

    async fn check(&self) -> Result<Vec<Finding>, SourceError> {
        Ok(self.findings.clone())
    }

    async fn begin(&self, _: &str, _: bool) -> Result<Box<dyn BackupSession>, SourceError> {
        let lsn = {
            let mut state = self.state.lock().unwrap();
            state.lsn += 1024;
            state.now_ns += 10_000_000_000;
            state.lsn
        };
        let start = BackupStart { lsn: Lsn(lsn), timeline: Timeline(1), time: time_of(lsn) };
        Ok(Box::new(SimSession { cluster: self.clone(), start }))
    }
}

fn time_of(lsn: u64) -> Timestamp {
    Timestamp::from_second(1_790_000_000 + (lsn / 64) as i64).unwrap()
}

struct SimSession {
    cluster: SimCluster,
    start: BackupStart,
}

struct SimFile {
    cluster: SimCluster,
    path: String,
}

impl FileReader for SimFile {
    fn read_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<usize> {
        let mut state = self.cluster.state.lock().unwrap();
        if let Some(budget) = &mut state.read_budget {
            if *budget < buffer.len() as u64 {
                return Err(io::Error::other("planted: the reader died"));
            }
            *budget -= buffer.len() as u64;
        }
        let Some((content, _)) = state.files.get(&self.path) else { return Ok(0) };
        let from = (offset as usize).min(content.len());
        let n = buffer.len().min(content.len() - from);
        buffer[..n].copy_from_slice(&content[from..from + n]);
        Ok(n)
    }

    fn stat(&self) -> io::Result<FileStat> {
        let state = self.cluster.state.lock().unwrap();
        let (content, changed) = state.files.get(&self.path).ok_or(io::ErrorKind::NotFound)?;
        let size = content.len() as u64;
        Ok(FileStat { size, mode: 0o600, mtime_ns: *changed, ctime_ns: *changed, inode: 7, device: 1 })
    }

    fn look_again(&self, buffer: &mut [u8], offset: u64) -> io::Result<usize> {
        self.read_at(buffer, offset)
    }

    fn is_live(&self) -> bool {
        true
    }
}

/// A table of database `pos` and its file's number.
pub fn relation(schema: &str, name: &str, filenode: u32) -> RelationEntry {
    RelationEntry {
        database: "pos".into(),
        schema: schema.into(),
        name: name.into(),
        kind: 'r',
        oid: 100,
        database_oid: 5,
        tablespace_oid: 1663,
        filenode,
        owner_oid: 0,
    }
}

/// Files in an order of the server's own, each with its content.
struct SimStream {
    files: Vec<SourceFile>,
    current: Vec<u8>,
    cluster: SimCluster,
}

impl FileStream for SimStream {
    fn interrupt_when(&mut self, _: Box<dyn Fn() -> bool + Send>) {}

    fn next_file(&mut self) -> Result<Option<SourceFile>, SourceError> {
        let Some(file) = self.files.pop() else { return Ok(None) };
        let mut state = self.cluster.state.lock().unwrap();
        self.current = state.files.get(&file.path).map(|(content, _)| content.clone()).unwrap_or_default();
        if let Some(page) = state.torn_in_stream.get(&file.path) {
            self.current[page * PAGE..page * PAGE + 8].copy_from_slice(BAD);
        }
        let size = self.current.len() as u64;
        if let Some(budget) = &mut state.read_budget {
            *budget = budget.checked_sub(size).ok_or_else(|| SourceError::Unreachable {
                server: "sim".into(),
                source: "planted: the stream broke".into(),
            })?;
        }
        let stat = FileStat { mode: file.stat.mode, size, ..FileStat::default() };
        Ok(Some(SourceFile { stat, ..file }))
    }

    fn read(&mut self, buffer: &mut [u8]) -> Result<usize, SourceError> {
        // In odd pieces, as the network gives them.
        let len = self.current.len().min(buffer.len()).min(10_007);
        buffer[..len].copy_from_slice(&self.current[..len]);
        self.current.drain(..len);
        Ok(len)
    }
}

#[async_trait]
impl BackupSession for SimSession {
    fn start(&self) -> &BackupStart {
        &self.start
    }

    fn pages(&self) -> Arc<dyn PageChecker> {
        Arc::new(SimPages)
    }

    fn host(&self) -> String {
        "sim-host/1".into()
    }

    fn stat_is_trusted(&self) -> bool {
        self.cluster.trust_stat
    }

    fn files(&self) -> Box<dyn Iterator<Item = Result<SourceFile, SourceError>> + Send> {
        Box::new(self.cluster.listing().into_iter().map(Ok))
    }

    fn stream(&mut self) -> Option<Box<dyn FileStream>> {
        if !self.cluster.streamed {
            return None;
        }
        let mut files = self.cluster.listing();
        // Any order will do but the table's.
        files.sort_by_key(|file| file.path.bytes().rev().collect::<Vec<u8>>());
        Some(Box::new(SimStream { files, current: Vec::new(), cluster: self.cluster.clone() }))
    }

    fn open(&self, path: &str) -> Result<Option<Box<dyn FileReader>>, SourceError> {
        (self.opener())(path)
    }

    fn opener(&self) -> Arc<dyn Fn(&str) -> Result<Option<Box<dyn FileReader>>, SourceError> + Send + Sync> {
        let cluster = self.cluster.clone();
        Arc::new(move |path| {
            let there = cluster.state.lock().unwrap().files.contains_key(path);
            let file = SimFile { cluster: cluster.clone(), path: path.to_owned() };
            Ok(there.then(|| Box::new(file) as Box<dyn FileReader>))
        })
    }

    async fn size_estimate(&mut self) -> Result<Option<u64>, SourceError> {
        Ok(Some(self.cluster.content().values().map(|c| c.len() as u64).sum()))
    }

    fn relations(&mut self) -> BoxStream<'_, Result<RelationEntry, SourceError>> {
        let mut state = self.cluster.state.lock().unwrap();
        let listing = match state.relations.len() {
            0 => vec![relation("tenant_1", "orders", 100)],
            1 => state.relations[0].clone(),
            _ => state.relations.remove(0),
        };
        stream::iter(listing.into_iter().map(Ok)).boxed()
    }

    async fn tablespaces(&mut self) -> Result<Vec<TablespaceFacts>, SourceError> {
        Ok(self.cluster.tablespaces())
    }

    async fn slots(&mut self) -> Result<Vec<SlotState>, SourceError> {
        Ok(Vec::new())
    }

    async fn host_files(&mut self) -> Result<Vec<HostFile>, SourceError> {
        Ok(vec![HostFile {
            path: "/etc/sim/server.conf".into(),
            role: "config_file".into(),
            mode: 0o640,
            content: Some(b"a = 1\n".to_vec()),
        }])
    }

    async fn host_needs(&mut self) -> Result<HostNeeds, SourceError> {
        Ok(HostNeeds { major: 15, architecture: "sim".into(), ..HostNeeds::default() })
    }

    async fn finish(self: Box<Self>) -> Result<(BackupStop, Vec<u8>), SourceError> {
        let lsn = {
            let mut state = self.cluster.state.lock().unwrap();
            state.lsn += 1024;
            state.lsn
        };
        let stop = BackupStop {
            lsn: Lsn(lsn),
            timeline: Timeline(1),
            time: time_of(lsn),
            backup_label: format!("START WAL LOCATION: {} (file x)\nSTART TIMELINE: 1\n", self.start.lsn),
            tablespace_map: self
                .cluster
                .tablespaces()
                .iter()
                .map(|space| format!("{} {}\n", space.oid, space.location))
                .collect(),
        };
        Ok((stop, control_bytes(self.cluster.system_id)))
    }
}
