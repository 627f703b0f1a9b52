//! The walk: files and the parent's table in step; what is unchanged is taken over, the rest
//! becomes tasks.

use std::sync::atomic::Ordering;
use std::sync::mpsc::SyncSender;
use std::sync::{Arc, Barrier};
use std::time::{Duration, Instant};

use dr_core::event::Event;
use dr_core::port::{EventSink, FileKind, SourceError, SourceFile};
use dr_storage::format::{BadPageRecord, Content, EXTENT_LEN, EntryKind, FileEntry, STRETCH_LEN};

use super::COPY;
use super::parent::{ParentCursor, is_unchanged};
use super::task::{Before, Counters, News, Task};
use crate::context::Cancel;
use crate::error::EngineError;
use crate::failure::Failure;

/// Entries between the walk and the table at most: bounds memory when a large file is slow.
const MAX_AHEAD: u64 = 65_536;

/// Small files read by one task at most.
const MAX_BUNDLE_FILES: usize = 512;

/// How often progress is told.
const PROGRESS_EVERY: Duration = Duration::from_millis(200);

/// How often the walk looks whether there is room again.
const PAUSE: Duration = Duration::from_micros(200);

/// When an interruptible backup records how far it is.
#[derive(Clone, Copy, Debug)]
pub(super) struct PointRule {
    pub every: Duration,
    pub every_bytes: u64,
}

/// The walking side of a backup.
pub(super) struct Walk<'a> {
    pub files: Box<dyn Iterator<Item = Result<SourceFile, SourceError>> + Send>,
    pub cursor: ParentCursor,
    pub host: String,
    pub trust_stat: bool,
    pub now_ns: i64,
    pub workers: usize,
    pub points: PointRule,
    pub tasks: SyncSender<Task>,
    pub news: SyncSender<News>,
    pub failure: &'a Failure,
    pub counters: &'a Counters,
    pub events: &'a dyn EventSink,
    pub cancel: &'a Cancel,
}

struct Bundled {
    files: Vec<(u64, SourceFile, Before)>,
    bytes: u64,
}

impl Walk<'_> {
    /// Walks to the end, or until some part fails.
    pub fn run(mut self) -> Result<(), EngineError> {
        let mut bundled = Bundled { files: Vec::new(), bytes: 0 };
        let mut told = Instant::now();
        let mut point_at = Instant::now();
        let mut point_bytes = 0;
        while let Some(file) = self.files.next() {
            self.cancel.check()?;
            if self.failure.is_set() {
                break;
            }
            let file = file.map_err(EngineError::source("cannot walk the data directory"))?;
            let number = self.counters.numbered.fetch_add(1, Ordering::Relaxed);
            self.visit(number, file, &mut bundled)?;
            self.wait_for_room();
            if told.elapsed() >= PROGRESS_EVERY {
                told = Instant::now();
                self.tell();
            }
            let read = self.counters.bytes_read.load(Ordering::Relaxed);
            if point_at.elapsed() >= self.points.every || read - point_bytes >= self.points.every_bytes {
                self.flush_bundle(&mut bundled)?;
                self.point()?;
                point_at = Instant::now();
                point_bytes = read;
            }
        }
        self.flush_bundle(&mut bundled)?;
        self.drain();
        self.tell();
        Ok(())
    }

    fn visit(&mut self, number: u64, file: SourceFile, bundled: &mut Bundled) -> Result<(), EngineError> {
        let before = self.cursor.find(&file.path)?;
        let kind = match &file.kind {
            FileKind::Regular => None,
            FileKind::Directory => Some(EntryKind::Directory),
            FileKind::Link(target) => Some(EntryKind::Link(target.clone())),
        };
        if let Some(kind) = kind {
            let entry = FileEntry {
                path: file.path,
                kind,
                mode: file.stat.mode,
                size: 0,
                stat: None,
                content: Content::None,
            };
            return self.send(News::Ready { number, entry, bad: Vec::new() });
        }
        if let Some((entry, origin)) = &before
            && self.trust_stat
            && is_unchanged(&file, entry, origin, &self.host, self.now_ns)
        {
            let bad = origin.bad.get(&file.path).cloned().unwrap_or_default();
            return self.take_over(number, entry.clone(), bad);
        }
        if file.stat.size < EXTENT_LEN as u64 {
            bundled.bytes += file.stat.size;
            bundled.files.push((number, file, before));
            if bundled.bytes >= EXTENT_LEN as u64 || bundled.files.len() >= MAX_BUNDLE_FILES {
                self.flush_bundle(bundled)?;
            }
            return Ok(());
        }
        let units = file.stat.size.div_ceil(STRETCH_LEN as u64) as u32;
        let file = Arc::new(file);
        self.send(News::Begin { number, file: file.clone(), units })?;
        let before = Arc::new(before);
        for unit in 0..units {
            if self.failure.is_set() {
                break;
            }
            self.task(Task::Stretch { number, unit, file: file.clone(), before: before.clone() })?;
            self.tell_sometimes(unit);
        }
        Ok(())
    }

    fn take_over(&self, number: u64, entry: FileEntry, bad: Vec<BadPageRecord>) -> Result<(), EngineError> {
        Counters::add(&self.counters.bytes_done, entry.size);
        self.send(News::Ready { number, entry, bad })
    }

    fn flush_bundle(&self, bundled: &mut Bundled) -> Result<(), EngineError> {
        bundled.bytes = 0;
        if bundled.files.is_empty() {
            return Ok(());
        }
        self.task(Task::Bundle(std::mem::take(&mut bundled.files)))
    }

    fn send(&self, news: News) -> Result<(), EngineError> {
        self.news.send(news).map_err(|_| EngineError::Cancelled)
    }

    fn task(&self, task: Task) -> Result<(), EngineError> {
        self.tasks.send(task).map_err(|_| EngineError::Cancelled)
    }

    /// Waits while too many entries are under way.
    fn wait_for_room(&self) {
        while self.ahead() > MAX_AHEAD && !self.failure.is_set() {
            std::thread::sleep(PAUSE);
        }
    }

    /// Waits until everything walked so far is in the table.
    fn drain(&self) {
        let mut told = Instant::now();
        while self.ahead() > 0 && !self.failure.is_set() {
            std::thread::sleep(PAUSE);
            if told.elapsed() >= PROGRESS_EVERY {
                told = Instant::now();
                self.tell();
            }
        }
    }

    fn ahead(&self) -> u64 {
        let numbered = self.counters.numbered.load(Ordering::Relaxed);
        numbered.saturating_sub(self.counters.collected.load(Ordering::Relaxed))
    }

    /// Brings everything stored so far to rest and has it recorded.
    fn point(&self) -> Result<(), EngineError> {
        self.drain();
        if self.failure.is_set() {
            return Ok(());
        }
        let barrier = Arc::new(Barrier::new(self.workers + 1));
        for _ in 0..self.workers {
            self.task(Task::Flush(barrier.clone()))?;
        }
        barrier.wait();
        let (answer, answered) = std::sync::mpsc::sync_channel(1);
        self.send(News::Point(answer))?;
        // No answer: the collector failed, and has said why.
        let _ = answered.recv();
        Ok(())
    }

    fn tell(&self) {
        let done = self.counters.bytes_done.load(Ordering::Relaxed);
        self.events.emit(Event::Progress { stage: COPY, done, note: None });
    }

    fn tell_sometimes(&self, unit: u32) {
        if unit % 4 == 3 {
            self.tell();
        }
    }
}
