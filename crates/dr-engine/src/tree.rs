//! Reading a backup's files: every extent fetched, opened, put together and checked.
//!
//! One thread reads the file table and hands out jobs; worker threads fetch, open, decompress,
//! check the digest and pass the content on. Each extent is independent of all others. Memory:
//! a worker holds one stretch's map, one fetched range and one extent.

mod job;
mod output;
mod stretch;

use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, SyncSender};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use dr_core::BackupId;
use dr_core::event::Event;
use dr_storage::FrameOpener;
use dr_storage::FrameReader;
use dr_storage::format::{Content, EntryKind, FileEntry, FrameRef, Manifest};
use tokio::runtime::Handle;

use crate::context::Context;
use crate::error::EngineError;
use crate::failure::Failure;
use crate::meta::MetaReader;
use job::Job;
pub(crate) use output::{FileOutput, OutFile};

/// Jobs that wait for a worker at most.
const JOB_QUEUE: usize = 64;

/// Files without stored content that are made by one job at most.
const INLINE_BATCH: usize = 256;

/// Threads that fetch from a store over a network at least: at 50 ms and 100 MB/s each, so many hide
/// the waiting (`benches/src/bin/far.rs`). Each holds one fetched range.
const FAR_THREADS: usize = 16;

/// How often progress is told.
const PROGRESS_EVERY: Duration = Duration::from_millis(200);

/// How much was read, and how much of it was there already.
#[derive(Debug, Default)]
pub struct TreeCounters {
    /// Regular files.
    pub files: AtomicU64,
    /// Bytes of content, checked.
    pub bytes: AtomicU64,
    /// Bytes fetched from storage.
    pub fetched: AtomicU64,
    /// Bytes found in place by a delta restore.
    pub kept: AtomicU64,
}

/// What goes where.
pub(crate) struct TreeRead<'a> {
    pub context: &'a Context,
    pub manifest: &'a Manifest,
    /// Where content goes; `None`: it is checked and dropped.
    pub output: Option<FileOutput>,
    pub workers: usize,
    pub stage: &'static str,
}

/// What all worker threads share.
pub(crate) struct TreeShared {
    pub context: Context,
    pub backup: BackupId,
    pub output: Option<FileOutput>,
    pub meta: MetaReader,
    pub reader: FrameReader,
    pub handle: Handle,
    pub failure: Failure,
    pub counters: Arc<TreeCounters>,
    /// Bytes fetched at once at most.
    pub fetch_limit: u64,
    pub stage: &'static str,
    pub page_size: usize,
}

impl TreeRead<'_> {
    /// Reads everything. The first failure stops all parts.
    pub async fn run(self) -> Result<Arc<TreeCounters>, EngineError> {
        let context = self.context;
        let handle = Handle::current();
        let reader = context.store.reader().await.map_err(EngineError::repo("cannot read the repository"))?;
        let local = context.repo.target().capabilities().local;
        let threads = threads(self.workers.max(1), local, self.output.is_some());
        let shared = Arc::new(TreeShared {
            context: context.clone(),
            backup: self.manifest.head.id,
            output: self.output,
            meta: MetaReader::new(context.repo.clone(), reader.clone(), handle.clone()),
            reader,
            handle: handle.clone(),
            failure: Failure::default(),
            counters: Arc::new(TreeCounters::default()),
            fetch_limit: if local { 1 << 20 } else { 4 << 20 },
            stage: self.stage,
            page_size: self.manifest.head.cluster.page_size as usize,
        });
        let (sender, receiver) = std::sync::mpsc::sync_channel(JOB_QUEUE);
        let receiver = Arc::new(Mutex::new(receiver));
        let mut running = Vec::new();
        for _ in 0..threads {
            let (shared, jobs) = (shared.clone(), receiver.clone());
            running.push(handle.spawn_blocking(move || work(&shared, &jobs)));
        }
        drop(receiver);
        let producing = {
            let shared = shared.clone();
            let shards = self.manifest.body.shards.clone();
            let lanes = threads;
            handle.spawn_blocking(move || {
                let produced = Producer::new(&shared, sender, lanes).run(&shards);
                if let Err(error) = produced {
                    shared.failure.set(error);
                }
            })
        };
        running.push(producing);
        for part in running {
            if part.await.is_err() {
                shared.failure.set(EngineError::Bug { what: "a part of the reading panicked".into() });
            }
        }
        match shared.failure.take() {
            Some(error) => Err(error),
            None => Ok(shared.counters.clone()),
        }
    }
}

/// More threads than workers wait at the same time: for the answers of a store that is far away, or
/// for the disk when they write past the page cache.
fn threads(workers: usize, local: bool, writes: bool) -> usize {
    match (local, writes) {
        (false, _) => workers.max(FAR_THREADS),
        (true, true) => workers * 2,
        (true, false) => workers,
    }
}

fn work(shared: &TreeShared, jobs: &Mutex<Receiver<Job>>) {
    let mut worker = stretch::TreeWorker::new();
    loop {
        let job = jobs.lock().ok().and_then(|queue| queue.recv().ok());
        let Some(job) = job else { break };
        if let Err(error) = shared.context.cancel.check() {
            shared.failure.set(error);
        }
        // After a failure jobs are only drained, so that the producer does not wait for room.
        if shared.failure.is_set() {
            continue;
        }
        if let Err(error) = worker.run(shared, job) {
            shared.failure.set(error);
        }
    }
}

/// A large file with stretches still to hand out.
struct Lane {
    file: Option<Arc<OutFile>>,
    entry: Arc<FileEntry>,
    next: usize,
}

/// Walks the file table and hands out jobs.
struct Producer<'a> {
    shared: &'a TreeShared,
    jobs: SyncSender<Job>,
    opener: FrameOpener,
    /// Large files whose stretches are handed out in turn: two workers on one file would wait for
    /// each other at the file's inode lock.
    lanes: Vec<Lane>,
    max_lanes: usize,
    inline: Vec<FileEntry>,
    told: Instant,
}

impl<'a> Producer<'a> {
    fn new(shared: &'a TreeShared, jobs: SyncSender<Job>, max_lanes: usize) -> Self {
        let told = Instant::now();
        let opener = FrameOpener::new();
        Producer { shared, jobs, opener, lanes: Vec::new(), max_lanes, inline: Vec::new(), told }
    }

    fn run(mut self, shards: &[dr_storage::format::ShardRef]) -> Result<(), EngineError> {
        for shard in shards {
            let entries = self.shared.meta.shard(&mut self.opener, shard)?;
            // Slices of one frame lie apart in the table when some of them are older.
            let mut slices: HashMap<FrameRef, Vec<FileEntry>> = HashMap::new();
            let mut order = Vec::new();
            for entry in entries {
                if self.shared.failure.is_set() {
                    return Ok(());
                }
                self.visit(entry, &mut slices, &mut order)?;
            }
            for frame in order {
                let files = slices.remove(&frame).unwrap_or_default();
                self.send(Job::Slices { frame, files })?;
            }
        }
        while !self.lanes.is_empty() {
            self.round()?;
        }
        self.flush_inline()?;
        self.tell();
        Ok(())
    }

    fn visit(
        &mut self,
        entry: FileEntry,
        slices: &mut HashMap<FrameRef, Vec<FileEntry>>,
        order: &mut Vec<FrameRef>,
    ) -> Result<(), EngineError> {
        if !dr_core::path::is_contained(&entry.path) {
            let what = format!("the file table has a path that leaves the directory: {:?}", entry.path);
            return Err(EngineError::Invalid {
                what,
                hint: "The backup is damaged; restore another.".into(),
            });
        }
        if let EntryKind::Directory | EntryKind::Link(_) = &entry.kind {
            return self.shared.output.as_ref().map_or(Ok(()), |output| output.make(&entry));
        }
        self.shared.counters.files.fetch_add(1, Ordering::Relaxed);
        match &entry.content {
            Content::None | Content::Inline(_) => {
                self.inline.push(entry);
                if self.inline.len() >= INLINE_BATCH {
                    self.flush_inline()?;
                }
            }
            Content::Slice { frame, .. } => {
                let frame = *frame;
                let files = slices.entry(frame).or_insert_with(|| {
                    order.push(frame);
                    Vec::new()
                });
                files.push(entry);
            }
            Content::Stretches { .. } => {
                let file = self.shared.output.as_ref().map(|output| output.open(&entry)).transpose()?;
                self.lanes.push(Lane { file: file.map(Arc::new), entry: Arc::new(entry), next: 0 });
                while self.lanes.len() >= self.max_lanes.max(2) && !self.shared.failure.is_set() {
                    self.round()?;
                }
            }
        }
        Ok(())
    }

    /// Hands out the next stretch of each open file.
    fn round(&mut self) -> Result<(), EngineError> {
        let mut jobs = Vec::with_capacity(self.lanes.len());
        for lane in &mut self.lanes {
            if let Content::Stretches { maps, .. } = &lane.entry.content
                && let Some(map) = maps.get(lane.next)
            {
                let (file, entry, index) = (lane.file.clone(), lane.entry.clone(), lane.next);
                jobs.push(Job::Stretch { file, entry, index, map: *map });
                lane.next += 1;
            } else {
                lane.next = usize::MAX;
            }
        }
        self.lanes.retain(|lane| lane.next != usize::MAX);
        for job in jobs {
            self.send(job)?;
        }
        Ok(())
    }

    fn flush_inline(&mut self) -> Result<(), EngineError> {
        if self.inline.is_empty() {
            return Ok(());
        }
        let files = std::mem::take(&mut self.inline);
        self.send(Job::Inline(files))
    }

    fn send(&mut self, job: Job) -> Result<(), EngineError> {
        if self.told.elapsed() >= PROGRESS_EVERY {
            self.told = Instant::now();
            self.tell();
        }
        self.jobs.send(job).map_err(|_| EngineError::Cancelled)
    }

    fn tell(&self) {
        let done = self.shared.counters.bytes.load(Ordering::Relaxed);
        self.shared.context.events.emit(Event::Progress { stage: self.shared.stage, done, note: None });
    }
}

/// Reads every byte of a backup back and checks it against its digests, without writing anything.
///
/// Needs the reading key. The first damage found ends it, with the file and the place.
pub async fn read_back(
    context: &Context,
    manifest: &Manifest,
    workers: usize,
) -> Result<Arc<TreeCounters>, EngineError> {
    TreeRead { context, manifest, output: None, workers, stage: "read" }.run().await
}
