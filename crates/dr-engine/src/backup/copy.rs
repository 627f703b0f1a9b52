//! The copying stage: walk or stream, workers, collector, each on threads of their own.

use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::sync::{Arc, Mutex};
use std::time::Instant;

use dr_core::port::{BackupSession, FileStream, SourceError, SourceFile};
use dr_storage::format::{Point, WalkMark};
use dr_storage::{FrameOpener, PackKind, SessionWriter};
use tokio::runtime::Handle;
use tokio::task::JoinHandle;

use super::arrival::Arrival;
use super::collect::{Collected, Collector, Order};
use super::parent::{Origin, ParentCursor, ParentIndex, known_shards};
use super::plan::BackupPlan;
use super::stretch::Worker;
use super::task::{self, Counters};
use super::walk::{Feeder, PointRule, Walk};
use super::worker::{self, Shared};
use crate::context::Context;
use crate::error::EngineError;
use crate::failure::Failure;
use crate::meta::MetaReader;
use crate::pace::Pace;

/// Tasks that wait for a worker at most.
const TASK_QUEUE: usize = 16;
/// News that wait for the collector at most.
const NEWS_QUEUE: usize = 256;
/// Bytes stored anew in one backup only to shorten old patches: this share of the cluster.
const REBASE_SHARE: u64 = 10;

/// The copying stage.
pub(super) struct Copy<'a> {
    pub context: &'a Context,
    pub plan: &'a BackupPlan,
    pub session: &'a SessionWriter,
    pub origins: Vec<Arc<Origin>>,
    pub walk: &'a WalkMark,
    pub counters: &'a Arc<Counters>,
    pub total: Option<u64>,
}

impl Copy<'_> {
    /// Runs the walk, the workers and the collector on blocking threads.
    pub async fn run(
        &self,
        pg: &dyn BackupSession,
        stream: Option<Box<dyn FileStream>>,
    ) -> Result<Collected, EngineError> {
        let context = self.context;
        let handle = Handle::current();
        let reader = context.store.reader().await.map_err(EngineError::repo("cannot read the repository"))?;
        let meta = Arc::new(MetaReader::new(context.repo.clone(), reader, handle.clone()));
        let failure = Arc::new(Failure::default());
        let allowance = self.total.unwrap_or(0) / REBASE_SHARE;
        let shared = Arc::new(Shared {
            open: pg.opener(),
            meta: meta.clone(),
            failure: failure.clone(),
            counters: self.counters.clone(),
            cancel: context.cancel.clone(),
            pace: Pace::new(self.plan.options.max_rate),
            rebase_allowance: (allowance as i64).into(),
        });
        let (task_sender, task_receiver) = sync_channel(TASK_QUEUE);
        let (news_sender, news_receiver) = sync_channel(NEWS_QUEUE);
        let task_receiver = Arc::new(Mutex::new(task_receiver));
        let mut running = self.spawn_workers(pg, &handle, &shared, &task_receiver, &news_sender);
        drop(task_receiver);
        let collector = Collector::new(
            context.repo.clone(),
            self.session.pack_writer(PackKind::Meta),
            self.session.pack_writer(PackKind::Page),
            known_shards(&self.origins),
            self.counters.clone(),
            if stream.is_some() { Order::Arrival } else { Order::Table },
        );
        let mut points = PointWriter::new(self, pg, handle.clone());
        let collecting = {
            let failure = failure.clone();
            handle.spawn_blocking(move || {
                collector.run(&news_receiver, &failure, &mut |collected| points.put(collected))
            })
        };
        let feeding = self.feeding(meta, &failure, task_sender, news_sender);
        let walking = match stream {
            Some(stream) => handle.spawn_blocking(move || feeding.receive(stream)),
            None => {
                let (files, host) = (pg.files(), pg.host());
                let trust_stat = pg.stat_is_trusted() && !self.plan.options.read_all;
                let now_ns = self.walk.began_ns;
                handle.spawn_blocking(move || feeding.walk(files, host, trust_stat, now_ns))
            }
        };
        running.insert(0, walking);
        for part in running {
            join(part, &failure).await;
        }
        let collected = collecting.await.map_err(|_| panicked("the collector"))?;
        match failure.take() {
            Some(error) => Err(error),
            None => collected,
        }
    }
}

impl Copy<'_> {
    fn spawn_workers(
        &self,
        pg: &dyn BackupSession,
        handle: &Handle,
        shared: &Arc<Shared>,
        tasks: &Arc<Mutex<Receiver<task::Task>>>,
        news: &SyncSender<task::News>,
    ) -> Vec<JoinHandle<()>> {
        let spawn = |_| {
            let pack = self.session.pack_writer(PackKind::Data);
            let worker = Worker::new(self.context.repo.clone(), pg.pages(), pg.start().lsn, pack);
            let (shared, tasks, news) = (shared.clone(), tasks.clone(), news.clone());
            handle.spawn_blocking(move || worker::run(worker, FrameOpener::new(), &shared, &tasks, &news))
        };
        (0..self.plan.options.workers.max(1)).map(spawn).collect()
    }

    fn feeding(
        &self,
        meta: Arc<MetaReader>,
        failure: &Arc<Failure>,
        tasks: SyncSender<task::Task>,
        news: SyncSender<task::News>,
    ) -> Feeding {
        let options = &self.plan.options;
        Feeding {
            meta,
            origins: self.origins.clone(),
            workers: options.workers.max(1),
            points: PointRule { every: options.point_every, every_bytes: options.point_every_bytes },
            tasks,
            news,
            failure: failure.clone(),
            counters: self.counters.clone(),
            context: self.context.clone(),
        }
    }
}

/// Owned parts of what feeds the workers, so that it can run on another thread.
struct Feeding {
    meta: Arc<MetaReader>,
    origins: Vec<Arc<Origin>>,
    workers: usize,
    points: PointRule,
    tasks: SyncSender<task::Task>,
    news: SyncSender<task::News>,
    failure: Arc<Failure>,
    counters: Arc<Counters>,
    context: Context,
}

impl Feeding {
    /// Walks the listed files beside the parent's table.
    fn walk(
        self,
        files: Box<dyn Iterator<Item = Result<SourceFile, SourceError>> + Send>,
        host: String,
        trust_stat: bool,
        now_ns: i64,
    ) {
        let cursor = ParentCursor::new(self.meta.clone(), FrameOpener::new(), self.origins.clone());
        self.run(|feeder| Walk { files, cursor, host, trust_stat, now_ns, feeder }.run());
    }

    /// Takes the files as they arrive.
    fn receive(self, stream: Box<dyn FileStream>) {
        let parents = ParentIndex::new(self.meta.clone(), FrameOpener::new(), self.origins.clone());
        let failure = self.failure.clone();
        self.run(|feeder| Arrival { stream, parents, feeder, failure }.run());
    }

    fn run(self, feed: impl FnOnce(Feeder<'_>) -> Result<(), EngineError>) {
        let now = Instant::now();
        let result = feed(Feeder {
            workers: self.workers,
            points: self.points,
            tasks: self.tasks,
            news: self.news,
            failure: &self.failure,
            counters: &self.counters,
            events: self.context.events.as_ref(),
            cancel: &self.context.cancel,
            told: now,
            point_at: now,
            point_bytes: 0,
        });
        if let Err(error) = result {
            self.failure.set(error);
        }
    }
}

async fn join(part: JoinHandle<()>, failure: &Failure) {
    if part.await.is_err() {
        failure.set(panicked("a part of the copy"));
    }
}

pub(super) fn panicked(what: &str) -> EngineError {
    EngineError::Bug { what: format!("{what} panicked") }
}

/// Puts points, numbered from 1.
struct PointWriter {
    session: SessionWriter,
    handle: Handle,
    start: dr_core::port::BackupStart,
    walk: WalkMark,
    number: u32,
}

impl PointWriter {
    fn new(copy: &Copy<'_>, pg: &dyn BackupSession, handle: Handle) -> Self {
        PointWriter {
            session: copy.session.clone(),
            handle,
            start: pg.start().clone(),
            walk: copy.walk.clone(),
            number: 0,
        }
    }

    fn put(&mut self, collected: &Collected) -> Result<(), EngineError> {
        let Some(last_path) = collected.last_path.clone() else { return Ok(()) };
        self.number += 1;
        let point = Point {
            start: self.start.clone(),
            walk: self.walk.clone(),
            shards: collected.shards.clone(),
            sessions: collected.sessions.iter().copied().collect(),
            bad_pages: collected.bad.clone(),
            last_path,
            packs: Vec::new(),
        };
        let doing = "cannot record how far the backup is";
        self.handle.block_on(self.session.put_point(self.number, &point)).map_err(EngineError::repo(doing))
    }
}
