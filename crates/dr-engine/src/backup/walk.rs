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
use super::task::{Counters, News, Small, Task};
use crate::context::Cancel;
use crate::error::EngineError;
use crate::failure::Failure;

/// Entries between the walk and the table at most: bounds memory when a large file is slow.
const MAX_AHEAD: u64 = 65_536;

/// Small files read by one task at most.
pub(super) const MAX_BUNDLE_FILES: usize = 512;

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

/// What hands work to the workers and news to the collector, and keeps the pace.
pub(super) struct Feeder<'a> {
    pub workers: usize,
    pub points: PointRule,
    pub tasks: SyncSender<Task>,
    pub news: SyncSender<News>,
    pub failure: &'a Failure,
    pub counters: &'a Counters,
    pub events: &'a dyn EventSink,
    pub cancel: &'a Cancel,
    pub told: Instant,
    pub point_at: Instant,
    pub point_bytes: u64,
}

impl Feeder<'_> {
    /// The number of the next file.
    pub fn number(&self) -> u64 {
        self.counters.numbered.fetch_add(1, Ordering::Relaxed)
    }

    pub fn send(&self, news: News) -> Result<(), EngineError> {
        self.news.send(news).map_err(|_| EngineError::Cancelled)
    }

    pub fn task(&self, task: Task) -> Result<(), EngineError> {
        self.tasks.send(task).map_err(|_| EngineError::Cancelled)
    }

    /// Hands a bundle of small files over and empties it.
    pub fn bundle(&self, files: &mut Vec<Small>) -> Result<(), EngineError> {
        if files.is_empty() {
            return Ok(());
        }
        self.task(Task::Bundle(std::mem::take(files)))
    }

    /// After each file: waits while too many are under way, tells progress, and has a point
    /// recorded when it is time, for which `flush` hands over what is collected.
    pub fn keep_pace(
        &mut self,
        flush: impl FnOnce(&Self) -> Result<(), EngineError>,
    ) -> Result<(), EngineError> {
        while self.ahead() > MAX_AHEAD && !self.failure.is_set() {
            std::thread::sleep(PAUSE);
        }
        if self.told.elapsed() >= PROGRESS_EVERY {
            self.told = Instant::now();
            self.tell();
        }
        let read = self.counters.bytes_read.load(Ordering::Relaxed);
        if self.point_at.elapsed() >= self.points.every || read - self.point_bytes >= self.points.every_bytes
        {
            flush(self)?;
            self.point()?;
            self.point_at = Instant::now();
            self.point_bytes = read;
        }
        Ok(())
    }

    /// Waits until everything is in the table.
    pub fn finish(&self) {
        self.drain();
        self.tell();
    }

    fn drain(&self) {
        let mut told = Instant::now();
        while self.ahead() > 0 && !self.failure.is_set() {
            std::thread::sleep(PAUSE);
            self.tell_sometimes(&mut told);
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

    /// Tells progress when it was not told lately.
    pub fn tell_sometimes(&self, told: &mut Instant) {
        if told.elapsed() >= PROGRESS_EVERY {
            *told = Instant::now();
            self.tell();
        }
    }
}

/// The walking side of a backup.
pub(super) struct Walk<'a> {
    pub files: Box<dyn Iterator<Item = Result<SourceFile, SourceError>> + Send>,
    pub cursor: ParentCursor,
    pub host: String,
    pub trust_stat: bool,
    pub now_ns: i64,
    pub feeder: Feeder<'a>,
}

struct Bundled {
    files: Vec<Small>,
    bytes: u64,
}

impl Walk<'_> {
    /// Walks to the end, or until some part fails.
    pub fn run(mut self) -> Result<(), EngineError> {
        let mut bundled = Bundled { files: Vec::new(), bytes: 0 };
        while let Some(file) = self.files.next() {
            self.feeder.cancel.check()?;
            if self.feeder.failure.is_set() {
                break;
            }
            let file = file.map_err(EngineError::source("cannot walk the data directory"))?;
            let number = self.feeder.number();
            self.visit(number, file, &mut bundled)?;
            self.feeder.keep_pace(|feeder| {
                bundled.bytes = 0;
                feeder.bundle(&mut bundled.files)
            })?;
        }
        self.feeder.bundle(&mut bundled.files)?;
        self.feeder.finish();
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
            return self.feeder.send(News::Ready { number, entry, bad: Vec::new() });
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
            bundled.files.push(Small { number, file, before, content: None });
            if bundled.bytes >= EXTENT_LEN as u64 || bundled.files.len() >= MAX_BUNDLE_FILES {
                bundled.bytes = 0;
                self.feeder.bundle(&mut bundled.files)?;
            }
            return Ok(());
        }
        let units = file.stat.size.div_ceil(STRETCH_LEN as u64) as u32;
        let file = Arc::new(file);
        self.feeder.send(News::Begin { number, file: file.clone(), units })?;
        let before = Arc::new(before);
        let mut told = Instant::now();
        for unit in 0..units {
            if self.feeder.failure.is_set() {
                break;
            }
            let (file, before) = (file.clone(), before.clone());
            self.feeder.task(Task::Stretch { number, unit, file, before, content: None })?;
            self.feeder.tell_sometimes(&mut told);
        }
        Ok(())
    }

    fn take_over(&self, number: u64, entry: FileEntry, bad: Vec<BadPageRecord>) -> Result<(), EngineError> {
        Counters::add(&self.feeder.counters.bytes_done, entry.size);
        self.feeder.send(News::Ready { number, entry, bad })
    }
}
