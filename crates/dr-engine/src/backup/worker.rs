//! The workers: read, check, compare, store.

use std::sync::mpsc::{Receiver, SyncSender};
use std::sync::{Arc, Mutex};

use dr_core::port::{FileOpener, FileReader, SourceFile};
use dr_storage::format::{
    BadPageRecord, Content, Digest, EXTENT_LEN, EntryKind, FileEntry, FrameRef, INLINE_LEN, STRETCH_LEN,
    StatMark, StretchMap,
};
use dr_storage::{FrameOpener, PackKind, PackWriter};

use super::stretch::{ParentStretch, StretchInput, Worker, read_full};
use super::task::{Before, Counters, News, Small, Task};
use crate::context::Cancel;
use crate::error::EngineError;
use crate::failure::Failure;
use crate::meta::MetaReader;
use crate::pace::Pace;

/// Patched extents go whole when old patches are this much of a stretch's base frames (percent),
/// as long as the backup's allowance lasts …
const REBASE_SOFT_PERCENT: u64 = 35;
/// … and always from here on, so that no restore reads more than 1.5 times a fresh backup.
const REBASE_HARD_PERCENT: u64 = 45;

/// A stretch whose patches come to more than this is stored again without them at once.
const REBASE_LIMIT_PERCENT: u64 = 49;

/// What all workers share.
pub(super) struct Shared {
    pub open: FileOpener,
    pub meta: Arc<MetaReader>,
    pub failure: Arc<Failure>,
    pub counters: Arc<Counters>,
    pub cancel: Cancel,
    pub pace: Pace,
    /// Bytes that may still be stored anew only to shorten old patches.
    pub rebase_allowance: std::sync::atomic::AtomicI64,
}

/// One worker thread: takes tasks until there are none.
pub(super) fn run(
    mut worker: Worker,
    mut opener: FrameOpener,
    shared: &Shared,
    tasks: &Mutex<Receiver<Task>>,
    news: &SyncSender<News>,
) {
    let mut open_file: Option<(u64, Option<Box<dyn FileReader>>)> = None;
    loop {
        let task = tasks.lock().ok().and_then(|queue| queue.recv().ok());
        let Some(task) = task else { break };
        if let Err(error) = shared.cancel.check() {
            shared.failure.set(error);
        }
        let result = match task {
            Task::Flush(barrier) => {
                let flushed = worker.pack.flush().map_err(EngineError::repo("cannot store a pack"));
                barrier.wait();
                flushed
            }
            // After a failure tasks are only drained, so that nobody waits for room in the queue.
            _ if shared.failure.is_set() => Ok(()),
            Task::Bundle(files) => copy_bundle(&mut worker, shared, files, news),
            Task::Stretch { number, unit, file, before, content } => {
                let unit = Unit { number, unit, file: &file, before: &before };
                match content {
                    Some(content) => {
                        let offset = u64::from(unit.unit) * STRETCH_LEN as u64;
                        let reader = content.reader(&file, offset, shared.open.clone());
                        copy_unit(&mut worker, &mut opener, shared, &unit, Some(&reader), news)
                    }
                    None => opened(&mut open_file, shared, number, &file.path)
                        .and_then(|reader| copy_unit(&mut worker, &mut opener, shared, &unit, reader, news)),
                }
            }
        };
        if let Err(error) = result {
            shared.failure.set(error);
        }
    }
    if let Err(error) = worker.pack.flush() {
        shared.failure.set(EngineError::repo("cannot store a pack")(error));
    }
}

/// The file of a stretch, kept open from one stretch to the next; `None`: it vanished.
fn opened<'a>(
    open_file: &'a mut Option<(u64, Option<Box<dyn FileReader>>)>,
    shared: &Shared,
    number: u64,
    path: &str,
) -> Result<Option<&'a dyn FileReader>, EngineError> {
    if open_file.as_ref().is_none_or(|(n, _)| *n != number) {
        let reader = (shared.open)(path).map_err(EngineError::source(format!("cannot read {path}")))?;
        *open_file = Some((number, reader));
    }
    Ok(open_file.as_ref().and_then(|(_, reader)| reader.as_deref()))
}

struct Unit<'a> {
    number: u64,
    unit: u32,
    file: &'a SourceFile,
    before: &'a Before,
}

fn copy_unit(
    worker: &mut Worker,
    opener: &mut FrameOpener,
    shared: &Shared,
    unit: &Unit<'_>,
    reader: Option<&dyn FileReader>,
    news: &SyncSender<News>,
) -> Result<(), EngineError> {
    let path = &unit.file.path;
    let offset = u64::from(unit.unit) * STRETCH_LEN as u64;
    let len = (unit.file.stat.size - offset).min(STRETCH_LEN as u64) as usize;
    let page_size = worker.pages.page_size();
    let first_block = worker.pages.first_block(path).map(|first| first + (offset / page_size as u64) as u32);
    let reference = match unit.before {
        Some((FileEntry { content: Content::Stretches { maps, .. }, .. }, _)) => maps.get(unit.unit as usize),
        _ => None,
    };
    let map = reference.map(|r| shared.meta.map(opener, r, path)).transpose()?;
    let opener = std::cell::RefCell::new(opener);
    let prints = |map: &StretchMap| load_prints(shared, &mut opener.borrow_mut(), map, path);
    let parent = match (&map, unit.before) {
        (Some(map), Some((_, origin))) => Some(ParentStretch {
            map,
            start: origin.start,
            prints: &prints,
            rebase: wants_rebase(shared, map),
        }),
        _ => None,
    };
    let output = match reader {
        Some(reader) => {
            let mut input = StretchInput { reader, path, offset, len, first_block, parent };
            let mut output = worker.copy_stretch(&input)?;
            if let Some(parent) = &mut input.parent
                && !parent.rebase
                && patch_percent(&output.map) > REBASE_LIMIT_PERCENT
            {
                // So many pages changed at once that the patches would make restores dear: what
                // was just stored as patches is given up.
                parent.rebase = true;
                output = worker.copy_stretch(&input)?;
            }
            output
        }
        // It vanished: an empty stretch; the collector drops the file.
        None => return send(news, News::Vanished { number: unit.number }),
    };
    Counters::add(&shared.counters.bytes_read, output.len as u64);
    shared.pace.account(output.len as u64, &shared.cancel)?;
    Counters::add(&shared.counters.bytes_done, len as u64);
    Counters::add(&shared.counters.torn, output.torn);
    let reference = if output.changed { None } else { reference.cloned() };
    let output = Box::new(output);
    send(news, News::Unit { number: unit.number, unit: unit.unit, output, reference, first_block })
}

fn send(news: &SyncSender<News>, message: News) -> Result<(), EngineError> {
    // The collector only goes away after a failure of its own, which is then the error to tell.
    news.send(message).map_err(|_| EngineError::Cancelled)
}

/// The parent's fingerprints with their overrides; lost ones cost space, not safety.
fn load_prints(
    shared: &Shared,
    opener: &mut FrameOpener,
    map: &StretchMap,
    path: &str,
) -> Result<Option<Vec<u64>>, EngineError> {
    let Some(reference) = &map.prints else { return Ok(None) };
    let Ok(bytes) = shared.meta.frame(opener, PackKind::Page, &reference.frame, path) else {
        return Ok(None);
    };
    let mut prints: Vec<u64> =
        bytes.chunks_exact(8).map(|c| u64::from_le_bytes(c.try_into().unwrap_or_default())).collect();
    for (page, print) in &reference.overrides {
        let page = *page as usize;
        if page >= prints.len() {
            prints.resize(page + 1, 0);
        }
        prints[page] = *print;
    }
    Ok(Some(prints))
}

/// Whether old patches have outgrown their use in this stretch.
fn wants_rebase(shared: &Shared, map: &StretchMap) -> bool {
    let percent = patch_percent(map);
    if percent >= REBASE_HARD_PERCENT {
        return true;
    }
    let order = std::sync::atomic::Ordering::Relaxed;
    percent >= REBASE_SOFT_PERCENT && shared.rebase_allowance.fetch_sub(i64::from(map.raw_len), order) > 0
}

/// Stored bytes of the patch frames as a share of those of the base frames.
fn patch_percent(map: &StretchMap) -> u64 {
    let mut is_base = vec![false; map.frames.len()];
    for base in map.extents.iter().filter_map(|extent| extent.base) {
        is_base[base as usize] = true;
    }
    let (mut base, mut patches) = (1u64, 0u64);
    for (frame, is_base) in map.frames.iter().zip(is_base) {
        if is_base { base += u64::from(frame.stored) } else { patches += u64::from(frame.stored) }
    }
    patches * 100 / base
}

/// Reads small files one after the other and stores the changed ones side by side.
fn copy_bundle(
    worker: &mut Worker,
    shared: &Shared,
    files: Vec<Small>,
    news: &SyncSender<News>,
) -> Result<(), EngineError> {
    let mut bundle = Bundle::default();
    for Small { number, file, before, content } in files {
        let opened = match content {
            Some(content) => {
                Some(Box::new(content.reader(&file, 0, shared.open.clone())) as Box<dyn FileReader>)
            }
            None => (shared.open)(&file.path)
                .map_err(EngineError::source(format!("cannot read {}", file.path)))?,
        };
        let Some(reader) = opened else {
            send(news, News::Vanished { number })?;
            continue;
        };
        if file.stat.size >= EXTENT_LEN as u64 || grew(reader.as_ref()) {
            copy_grown(worker, shared, number, file, reader.as_ref(), news)?;
            continue;
        }
        let (len, bad, torn) = worker.read_small(reader.as_ref(), &file.path)?;
        let content = &worker.extent[..len];
        Counters::add(&shared.counters.bytes_read, len as u64);
        shared.pace.account(len as u64, &shared.cancel)?;
        Counters::add(&shared.counters.bytes_done, file.stat.size);
        Counters::add(&shared.counters.torn, torn);
        let mut entry = entry_of(&file, content.len() as u64);
        if content.len() <= INLINE_LEN {
            entry.content = Content::Inline(content.to_vec());
            send(news, News::Ready { number, entry, bad })?;
            continue;
        }
        let digest = worker.repo.digest(content);
        if let Some((FileEntry { content: Content::Slice { frame, offset, len, digest: before }, .. }, _)) =
            &before
            && *before == digest
            && *len as usize == content.len()
        {
            entry.content = Content::Slice { frame: *frame, offset: *offset, len: *len, digest };
            send(news, News::Ready { number, entry, bad })?;
            continue;
        }
        if bundle.bytes.len() + len > EXTENT_LEN {
            bundle.flush(&mut worker.pack, news)?;
        }
        bundle.add(number, entry, bad, &worker.extent[..len], digest);
    }
    bundle.flush(&mut worker.pack, news)
}

fn grew(reader: &dyn FileReader) -> bool {
    reader.stat().is_ok_and(|stat| stat.size >= EXTENT_LEN as u64)
}

/// A file that was small when it was listed and is not any more.
fn copy_grown(
    worker: &mut Worker,
    shared: &Shared,
    number: u64,
    mut file: SourceFile,
    reader: &dyn FileReader,
    news: &SyncSender<News>,
) -> Result<(), EngineError> {
    file.stat = reader.stat().map_err(EngineError::file("look at", &file.path))?;
    let units = file.stat.size.div_ceil(STRETCH_LEN as u64) as u32;
    let file = Arc::new(file);
    send(news, News::Begin { number, file: file.clone(), units })?;
    let mut opener = FrameOpener::new();
    for unit in 0..units {
        let unit = Unit { number, unit, file: &file, before: &None };
        copy_unit(worker, &mut opener, shared, &unit, Some(reader), news)?;
    }
    Ok(())
}

/// The table entry of a listed file, without content yet.
pub(super) fn entry_of(file: &SourceFile, size: u64) -> FileEntry {
    let stat = &file.stat;
    let mark =
        StatMark { mtime_ns: stat.mtime_ns, ctime_ns: stat.ctime_ns, inode: stat.inode, device: stat.device };
    FileEntry {
        path: file.path.clone(),
        kind: EntryKind::Regular,
        mode: stat.mode,
        size,
        // The state belongs to the content only if the file still had the size it was listed with.
        stat: (size == stat.size).then_some(mark),
        content: Content::None,
    }
}

/// Small files that share a frame.
#[derive(Default)]
struct Bundle {
    bytes: Vec<u8>,
    waiting: Vec<(u64, FileEntry, Vec<BadPageRecord>, u32, Digest)>,
}

impl Bundle {
    fn add(
        &mut self,
        number: u64,
        entry: FileEntry,
        bad: Vec<BadPageRecord>,
        content: &[u8],
        digest: Digest,
    ) {
        self.waiting.push((number, entry, bad, self.bytes.len() as u32, digest));
        self.bytes.extend_from_slice(content);
    }

    fn flush(&mut self, pack: &mut PackWriter, news: &SyncSender<News>) -> Result<(), EngineError> {
        if self.waiting.is_empty() {
            return Ok(());
        }
        let doing = "cannot store small files";
        let frame: FrameRef = pack.append(&self.bytes).map_err(EngineError::repo(doing))?;
        self.bytes.clear();
        for (number, mut entry, bad, offset, digest) in self.waiting.drain(..) {
            entry.content = Content::Slice { frame, offset, len: entry.size as u32, digest };
            send(news, News::Ready { number, entry, bad })?;
        }
        Ok(())
    }
}

impl Worker {
    /// Reads a file smaller than an extent into `self.extent`, and checks its pages when it is a
    /// relation's. Answers its length, its bad pages and how many pages were torn.
    fn read_small(
        &mut self,
        reader: &dyn FileReader,
        path: &str,
    ) -> Result<(usize, Vec<BadPageRecord>, u64), EngineError> {
        let first_block = self.pages.first_block(path);
        let mut got = read_full(reader, &mut self.extent[..], 0).map_err(EngineError::file("read", path))?;
        if first_block.is_some() {
            got -= got % self.pages.page_size();
        }
        let input = StretchInput { reader, path, offset: 0, len: got, first_block, parent: None };
        let torn = self.check_pages(&input, 0, got)?;
        let first = first_block.unwrap_or(0);
        let bad = self.bad.iter().map(|bad| BadPageRecord {
            path: path.to_owned(),
            block: first + bad.index,
            found: bad.found,
            expected: bad.expected,
        });
        Ok((got, bad.collect(), torn))
    }
}
