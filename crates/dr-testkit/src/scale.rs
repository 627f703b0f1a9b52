//! A cluster too large to make: its files are numbers until somebody reads them.
//!
//! Names, sizes and content are functions of the file's number, so that a cluster of 10 TB and six
//! million files takes no memory of its own. Relations of 1 GiB segments hold nearly all bytes, files
//! of one page are nearly all files, as in a cluster of many tenants. One extent of 64 is noise; the
//! others are rows that repeat, so that a processor gets through terabytes.

use std::io;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use async_trait::async_trait;
use bytes::Bytes;
use dr_core::port::{
    BackupSession, BackupStart, BackupStop, BadPage, Capabilities, ClusterDescription, DatabaseSource,
    FileKind, FileOpener, FileReader, FileStat, FileStream, Finding, HostFile, HostNeeds, Key, ObjectInfo,
    PageChecker, Payload, RelationEntry, SlotState, SourceError, SourceFile, StorageError, StorageTarget,
    TablespaceFacts,
};
use dr_core::{Lsn, SegmentSize, SystemId, Timeline, Timestamp};
use futures_util::StreamExt;
use futures_util::stream::{self, BoxStream};

use crate::instance::control_bytes;
use crate::sim::Random;

const PAGE: u64 = 8192;
const EXTENT: u64 = 256 << 10;
const SEGMENT: u64 = 1 << 30;
/// Files of a database directory.
const PER_DATABASE: u64 = 20_000;
/// One of so many files changes from one backup to the next.
const CHANGES: u64 = 100;

/// How much there is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Scale {
    /// Bytes of all files.
    pub bytes: u64,
    /// Regular files.
    pub files: u64,
    /// Relations in the catalogue.
    pub relations: u64,
}

impl Scale {
    /// The cluster that the limits of the format were made for.
    pub const WHOLE: Scale = Scale { bytes: 10_000_000_000_000, files: 6_000_000, relations: 2_000_000 };

    /// A part of it, alike in all things.
    pub fn part(self, divisor: u64) -> Scale {
        let Scale { bytes, files, relations } = self;
        Scale { bytes: bytes / divisor, files: files / divisor, relations: relations / divisor }
    }

    /// Files of 1 GiB among the others: every file but these has one page.
    fn large(self) -> u64 {
        (self.bytes.saturating_sub(self.files * PAGE) / SEGMENT).min(self.files)
    }

    /// Every `stride`-th file is a large one.
    fn stride(self) -> u64 {
        self.files / self.large().max(1)
    }

    fn size_of(self, number: u64) -> u64 {
        let stride = self.stride();
        if number.is_multiple_of(stride) && number / stride < self.large() { SEGMENT } else { PAGE }
    }
}

/// A pretended cluster at one moment.
#[derive(Clone, Debug)]
pub struct ScaleCluster {
    /// How much there is.
    pub scale: Scale,
    /// How often one of a hundred files has changed.
    pub generation: u64,
    content: Arc<Content>,
}

/// What extents are made of.
#[derive(Debug)]
struct Content {
    rows: Vec<u8>,
    noise: Vec<u8>,
}

impl ScaleCluster {
    /// Its identity.
    pub const SYSTEM: SystemId = SystemId(7_000_000_000_000_000_010);

    /// A cluster of this size, never changed.
    pub fn new(scale: Scale) -> Self {
        let mut random = Random::new(17);
        let page: Vec<u8> = random.bytes(PAGE as usize);
        let rows = page.iter().copied().cycle().take(EXTENT as usize).collect();
        let noise = (0..2 * EXTENT / 8).flat_map(|_| random.next().to_le_bytes()).collect();
        ScaleCluster { scale, generation: 0, content: Arc::new(Content { rows, noise }) }
    }

    /// The same after some time: one of a hundred files has changed in one page of 16 MiB.
    pub fn changed(&self) -> Self {
        ScaleCluster { generation: self.generation + 1, ..self.clone() }
    }

    fn start(&self) -> Lsn {
        Lsn(0x0100_0000 + 4096 * (self.generation + 1))
    }

    fn has_changed(&self, number: u64) -> bool {
        self.generation > 0 && number.is_multiple_of(CHANGES)
    }

    fn stat_of(&self, number: u64) -> FileStat {
        let generation = if self.has_changed(number) { self.generation } else { 0 };
        let changed = 1_700_000_000_000_000_000 + generation as i64 * 10_000_000_000;
        FileStat {
            size: self.scale.size_of(number),
            mode: 0o600,
            mtime_ns: changed,
            ctime_ns: changed,
            inode: number + 1,
            device: 1,
        }
    }

    /// Fills a buffer with the content of a file at an offset, a page at a time.
    fn fill(&self, number: u64, buffer: &mut [u8], offset: u64) {
        for (index, page) in buffer.chunks_mut(PAGE as usize).enumerate() {
            let at = offset + index as u64 * PAGE;
            let extent = number * (SEGMENT / EXTENT) + at / EXTENT;
            let within = (at % EXTENT) as usize;
            let whole = if extent.is_multiple_of(64) {
                let from = (extent as usize * 4093) % EXTENT as usize;
                &self.content.noise[from + within..]
            } else {
                &self.content.rows[within..]
            };
            page.copy_from_slice(&whole[..page.len()]);
            if page.len() >= 16 {
                let changed = self.has_changed(number) && at.is_multiple_of(16 << 20);
                let lsn = if changed { self.start().0 - 1 } else { 0x0100_0000 };
                page[..8].copy_from_slice(&lsn.to_le_bytes());
                page[8..16].copy_from_slice(&extent.to_le_bytes());
            }
        }
    }
}

/// The path of a file: its number in digits, below a directory of its database.
fn path_of(number: u64) -> String {
    format!("base/{}/{}", 10_000 + number / PER_DATABASE, 10_000_000 + number)
}

fn number_of(path: &str) -> Option<u64> {
    path.rsplit('/').next()?.parse::<u64>().ok()?.checked_sub(10_000_000)
}

/// Pages whose LSN is their first eight bytes, and which are all good.
#[derive(Debug)]
struct ScalePages;

impl PageChecker for ScalePages {
    fn page_size(&self) -> usize {
        PAGE as usize
    }

    fn has_checksums(&self) -> bool {
        true
    }

    fn check(&self, _: &[u8], _: u32, _: &mut Vec<BadPage>) {}

    fn page_lsn(&self, page: &[u8]) -> Lsn {
        Lsn(page[..8].try_into().map_or(0, u64::from_le_bytes))
    }

    fn first_block(&self, path: &str) -> Option<u32> {
        number_of(path).map(|_| 0)
    }
}

#[async_trait]
impl DatabaseSource for ScaleCluster {
    async fn describe(&self) -> Result<ClusterDescription, SourceError> {
        Ok(ClusterDescription {
            system_id: Self::SYSTEM,
            version_num: 150_018,
            page_size: PAGE as u32,
            segment_size: SegmentSize::DEFAULT,
            relation_segment_pages: 131_072,
            checksums: true,
            timeline: Timeline(1),
            in_recovery: false,
            data_directory: "/pretended".into(),
        })
    }

    async fn check(&self) -> Result<Vec<Finding>, SourceError> {
        Ok(Vec::new())
    }

    async fn begin(&self, _: &str, _: bool) -> Result<Box<dyn BackupSession>, SourceError> {
        let time = Timestamp::from_second(1_790_000_000 + self.generation as i64).unwrap();
        let start = BackupStart { lsn: self.start(), timeline: Timeline(1), time };
        Ok(Box::new(ScaleSession { cluster: self.clone(), start }))
    }
}

struct ScaleSession {
    cluster: ScaleCluster,
    start: BackupStart,
}

struct ScaleFile {
    cluster: ScaleCluster,
    number: u64,
}

impl FileReader for ScaleFile {
    fn read_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<usize> {
        let left = self.cluster.scale.size_of(self.number).saturating_sub(offset);
        let len = buffer.len().min(left as usize);
        self.cluster.fill(self.number, &mut buffer[..len], offset);
        Ok(len)
    }

    fn stat(&self) -> io::Result<FileStat> {
        Ok(self.cluster.stat_of(self.number))
    }

    fn look_again(&self, buffer: &mut [u8], offset: u64) -> io::Result<usize> {
        self.read_at(buffer, offset)
    }

    fn is_live(&self) -> bool {
        true
    }
}

/// The entries of a cluster in order: directories before what is in them.
fn entries(cluster: ScaleCluster) -> impl Iterator<Item = SourceFile> + Send {
    let directory = |path: String| {
        let stat = FileStat { mode: 0o700, ..FileStat::default() };
        SourceFile { path, kind: FileKind::Directory, stat }
    };
    std::iter::once(directory("base".into())).chain((0..cluster.scale.files).flat_map(move |number| {
        let path = path_of(number);
        let above = number.is_multiple_of(PER_DATABASE).then(|| path.rsplit_once('/').unwrap().0.to_owned());
        let file = SourceFile { path, kind: FileKind::Regular, stat: cluster.stat_of(number) };
        above.map(directory).into_iter().chain([file])
    }))
}

#[async_trait]
impl BackupSession for ScaleSession {
    fn start(&self) -> &BackupStart {
        &self.start
    }

    fn pages(&self) -> Arc<dyn PageChecker> {
        Arc::new(ScalePages)
    }

    fn host(&self) -> String {
        "pretended/1".into()
    }

    fn stat_is_trusted(&self) -> bool {
        true
    }

    fn files(&self) -> Box<dyn Iterator<Item = Result<SourceFile, SourceError>> + Send> {
        Box::new(entries(self.cluster.clone()).map(Ok))
    }

    fn stream(&mut self) -> Option<Box<dyn FileStream>> {
        None
    }

    fn open(&self, path: &str) -> Result<Option<Box<dyn FileReader>>, SourceError> {
        (self.opener())(path)
    }

    fn opener(&self) -> FileOpener {
        let cluster = self.cluster.clone();
        Arc::new(move |path| {
            let number = number_of(path).filter(|number| *number < cluster.scale.files);
            let file = |number| ScaleFile { cluster: cluster.clone(), number };
            Ok(number.map(|number| Box::new(file(number)) as Box<dyn FileReader>))
        })
    }

    async fn size_estimate(&mut self) -> Result<Option<u64>, SourceError> {
        Ok(Some(self.cluster.scale.bytes))
    }

    fn relations(&mut self) -> BoxStream<'_, Result<RelationEntry, SourceError>> {
        stream::iter((0..self.cluster.scale.relations).map(|number| Ok(relation(number)))).boxed()
    }

    async fn tablespaces(&mut self) -> Result<Vec<TablespaceFacts>, SourceError> {
        Ok(Vec::new())
    }

    async fn slots(&mut self) -> Result<Vec<SlotState>, SourceError> {
        Ok(Vec::new())
    }

    async fn host_files(&mut self) -> Result<Vec<HostFile>, SourceError> {
        Ok(Vec::new())
    }

    async fn host_needs(&mut self) -> Result<HostNeeds, SourceError> {
        Ok(HostNeeds { major: 15, architecture: "sim".into(), ..HostNeeds::default() })
    }

    async fn finish(self: Box<Self>) -> Result<(BackupStop, Vec<u8>), SourceError> {
        let lsn = Lsn(self.start.lsn.0 + 1024);
        let stop = BackupStop {
            lsn,
            timeline: Timeline(1),
            time: self.start.time,
            backup_label: format!("START WAL LOCATION: {} (file x)\nSTART TIMELINE: 1\n", self.start.lsn),
            tablespace_map: String::new(),
        };
        Ok((stop, control_bytes(ScaleCluster::SYSTEM)))
    }
}

fn relation(number: u64) -> RelationEntry {
    let database = number / PER_DATABASE;
    RelationEntry {
        database: format!("tenants_{database}"),
        schema: format!("tenant_{}", number / 40),
        name: format!("relation_{number}"),
        kind: 'r',
        oid: 10_000_000 + number as u32,
        database_oid: 10_000 + database as u32,
        tablespace_oid: 1663,
        filenode: 10_000_000 + number as u32,
        owner_oid: 10,
    }
}

/// A target that counts content and does not keep it; tables, maps and documents go to another one.
#[derive(Debug)]
pub struct CountingTarget {
    inner: Arc<dyn StorageTarget>,
    bytes: AtomicU64,
    objects: AtomicU64,
}

impl CountingTarget {
    /// A target that keeps in `inner` what a later backup reads.
    pub fn over(inner: Arc<dyn StorageTarget>) -> Self {
        CountingTarget { inner, bytes: AtomicU64::new(0), objects: AtomicU64::new(0) }
    }

    /// Objects and bytes that were stored, kept or not.
    pub fn stored(&self) -> (u64, u64) {
        (self.objects.load(Ordering::Relaxed), self.bytes.load(Ordering::Relaxed))
    }
}

#[async_trait]
impl StorageTarget for CountingTarget {
    fn location(&self) -> String {
        format!("counting {}", self.inner.location())
    }

    fn capabilities(&self) -> Capabilities {
        self.inner.capabilities()
    }

    async fn create(&self, key: &Key, payload: Payload) -> Result<(), StorageError> {
        self.objects.fetch_add(1, Ordering::Relaxed);
        self.bytes.fetch_add(payload.len(), Ordering::Relaxed);
        // Content is only read by a restore; fingerprints that are lost cost space, not safety.
        let dropped = ["/pack/", "/page/"].iter().any(|part| key.as_str().contains(part));
        if dropped { Ok(()) } else { self.inner.create(key, payload).await }
    }

    async fn get(&self, key: &Key, range: Option<Range<u64>>) -> Result<Bytes, StorageError> {
        self.inner.get(key, range).await
    }

    async fn head(&self, key: &Key) -> Result<ObjectInfo, StorageError> {
        self.inner.head(key).await
    }

    fn list<'a>(
        &'a self,
        prefix: &'a str,
        after: Option<&'a Key>,
    ) -> BoxStream<'a, Result<ObjectInfo, StorageError>> {
        self.inner.list(prefix, after)
    }

    async fn list_parts(&self, prefix: &str) -> Result<Vec<String>, StorageError> {
        self.inner.list_parts(prefix).await
    }

    async fn delete(&self, key: &Key) -> Result<(), StorageError> {
        self.inner.delete(key).await
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pretended_cluster_is_as_large_as_it_says_and_in_order() {
        let scale = Scale::WHOLE.part(1000);
        let cluster = ScaleCluster::new(scale);
        let all: Vec<_> = entries(cluster.clone()).collect();
        assert!(all.is_sorted_by(|a, b| dr_core::path::compare(&a.path, &b.path).is_lt()));
        let files = all.iter().filter(|file| file.kind == FileKind::Regular);
        let (count, bytes) = files.fold((0, 0), |(count, bytes), file| (count + 1, bytes + file.stat.size));
        assert_eq!(count, scale.files);
        assert!(bytes.abs_diff(scale.bytes) < SEGMENT, "{bytes}");
        let changed =
            entries(cluster.changed()).zip(&all).filter(|(now, then)| now.stat != then.stat).count();
        assert_eq!(changed as u64, scale.files.div_ceil(CHANGES));
    }

    #[test]
    fn content_is_a_function_of_its_place() {
        let cluster = ScaleCluster::new(Scale::WHOLE.part(1000));
        let read = |cluster: &ScaleCluster, number, offset| {
            let mut buffer = vec![0; EXTENT as usize];
            let file = ScaleFile { cluster: cluster.clone(), number };
            assert_eq!(file.read_at(&mut buffer, offset).unwrap(), buffer.len());
            buffer
        };
        let stride = cluster.scale.stride();
        assert_eq!(read(&cluster, stride, EXTENT), read(&cluster, stride, EXTENT));
        assert_ne!(read(&cluster, stride, 0), read(&cluster, stride, EXTENT));
        assert_ne!(read(&cluster, 0, 0), read(&cluster.changed(), 0, 0));
        assert_eq!(read(&cluster, 0, EXTENT), read(&cluster.changed(), 0, EXTENT));
    }
}
