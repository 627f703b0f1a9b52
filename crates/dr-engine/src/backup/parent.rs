//! The backup before this one, walked in step with the files.

use std::cmp::Ordering;
use std::collections::{HashMap, VecDeque};
use std::sync::Arc;

use dr_core::Lsn;
use dr_core::path;
use dr_core::port::{FileStat, SourceFile};
use dr_storage::FrameOpener;
use dr_storage::format::{BadPageRecord, CataloguePart, Digest, FileEntry, ShardRef};

use crate::error::EngineError;
use crate::meta::MetaReader;

/// A file that changed this close to the moment at which its state was taken may change again
/// without a new time stamp (the racy rule of git; file systems keep coarse times).
const RACY_NS: i64 = 2_000_000_000;

/// A table of files that were backed up before, and when.
#[derive(Debug)]
pub(super) struct Origin {
    /// LSN at which that backup began.
    pub start: Lsn,
    /// Identity of the host whose file states it has.
    pub host: String,
    /// When its walk began, by that host's clock, in nanoseconds since 1970.
    pub walk_began_ns: i64,
    /// Its bad pages, by file.
    pub bad: HashMap<String, Vec<BadPageRecord>>,
    /// Its file table.
    pub shards: Vec<ShardRef>,
    /// Its relation catalogue.
    pub catalogue: Vec<CataloguePart>,
    /// Only entries up to this path count; later ones were not reached.
    pub up_to: Option<String>,
}

/// The parts of tables that may be referenced again when they come out the same.
pub(super) fn known_shards(origins: &[Arc<Origin>]) -> HashMap<Digest, ShardRef> {
    let shards = origins.iter().flat_map(|o| o.shards.iter());
    shards.map(|shard| (shard.digest, shard.clone())).collect()
}

/// Walks the parent's table in file order beside the source's files.
pub(super) struct ParentCursor {
    meta: Arc<MetaReader>,
    opener: FrameOpener,
    origins: VecDeque<Arc<Origin>>,
    next_shard: usize,
    entries: std::vec::IntoIter<FileEntry>,
    peeked: Option<FileEntry>,
    /// Entries up to this path were given by an earlier origin.
    after: Option<String>,
}

impl ParentCursor {
    /// A cursor over an interrupted backup's part (first) and the last complete backup.
    pub fn new(meta: Arc<MetaReader>, opener: FrameOpener, origins: Vec<Arc<Origin>>) -> Self {
        ParentCursor {
            meta,
            opener,
            origins: origins.into(),
            next_shard: 0,
            entries: Vec::new().into_iter(),
            peeked: None,
            after: None,
        }
    }

    /// The parent's entry for `path`. Paths are asked for in order.
    pub fn find(&mut self, path: &str) -> Result<Option<(FileEntry, Arc<Origin>)>, EngineError> {
        loop {
            if self.peeked.is_none() {
                self.peeked = self.read_next()?;
            }
            let (Some(entry), Some(origin)) = (&self.peeked, self.origins.front()) else { return Ok(None) };
            match path::compare(&entry.path, path) {
                Ordering::Less => self.peeked = None,
                Ordering::Greater => return Ok(None),
                Ordering::Equal => {
                    let origin = origin.clone();
                    return Ok(self.peeked.take().map(|entry| (entry, origin)));
                }
            }
        }
    }

    fn read_next(&mut self) -> Result<Option<FileEntry>, EngineError> {
        loop {
            let Some(origin) = self.origins.front().cloned() else { return Ok(None) };
            match self.entries.next() {
                Some(entry) if origin.up_to.as_deref().is_some_and(|end| later(&entry.path, end)) => {
                    self.leave_origin(&origin);
                }
                Some(entry) if self.after.as_deref().is_some_and(|after| !later(&entry.path, after)) => {}
                Some(entry) => return Ok(Some(entry)),
                None if self.next_shard < origin.shards.len() => {
                    let shard = &origin.shards[self.next_shard];
                    self.next_shard += 1;
                    self.entries = self.meta.shard(&mut self.opener, shard)?.into_iter();
                }
                None => self.leave_origin(&origin),
            }
        }
    }

    fn leave_origin(&mut self, origin: &Origin) {
        self.after = origin.up_to.clone();
        self.origins.pop_front();
        self.next_shard = 0;
        self.entries = Vec::new().into_iter();
    }
}

/// Parts of tables that are kept: entries that arrive together lie together in the table.
const KEPT_SHARDS: usize = 8;

/// The parent's table for files that arrive in any order.
pub(super) struct ParentIndex {
    meta: Arc<MetaReader>,
    opener: FrameOpener,
    origins: Vec<Arc<Origin>>,
    kept: VecDeque<((usize, usize), Arc<Vec<FileEntry>>)>,
}

impl ParentIndex {
    /// The tables of an interrupted backup (first) and of the last complete one.
    pub fn new(meta: Arc<MetaReader>, opener: FrameOpener, origins: Vec<Arc<Origin>>) -> Self {
        ParentIndex { meta, opener, origins, kept: VecDeque::new() }
    }

    /// The parent's entry for `path`.
    pub fn find(&mut self, path: &str) -> Result<Option<(FileEntry, Arc<Origin>)>, EngineError> {
        for index in 0..self.origins.len() {
            let origin = self.origins[index].clone();
            // The last part that begins at the path or before it.
            let after = origin.shards.partition_point(|shard| !later(&shard.first_path, path));
            let Some(shard) = after.checked_sub(1) else { continue };
            let entries = self.entries(index, shard, &origin)?;
            if let Ok(at) = entries.binary_search_by(|entry| path::compare(&entry.path, path)) {
                return Ok(Some((entries[at].clone(), origin)));
            }
        }
        Ok(None)
    }

    fn entries(
        &mut self,
        origin: usize,
        shard: usize,
        of: &Origin,
    ) -> Result<Arc<Vec<FileEntry>>, EngineError> {
        let wanted = (origin, shard);
        if let Some(at) = self.kept.iter().position(|(key, _)| *key == wanted)
            && let Some(found) = self.kept.remove(at)
        {
            let entries = found.1.clone();
            self.kept.push_front(found);
            return Ok(entries);
        }
        let entries = Arc::new(self.meta.shard(&mut self.opener, &of.shards[shard])?);
        self.kept.push_front((wanted, entries.clone()));
        self.kept.truncate(KEPT_SHARDS);
        Ok(entries)
    }
}

fn later(path: &str, than: &str) -> bool {
    path::compare(path, than) == Ordering::Greater
}

/// Whether the file is certainly what the parent saw: the same state on the same host, and old
/// enough then that a later change must have left a new time stamp.
pub(super) fn is_unchanged(
    file: &SourceFile,
    entry: &FileEntry,
    origin: &Origin,
    host: &str,
    now_ns: i64,
) -> bool {
    let FileStat { size, mode, mtime_ns, ctime_ns, inode, device } = file.stat;
    let Some(mark) = &entry.stat else { return false };
    let same = entry.size == size
        && entry.mode == mode
        && (mark.mtime_ns, mark.ctime_ns, mark.inode, mark.device) == (mtime_ns, ctime_ns, inode, device);
    let settled = mtime_ns.max(ctime_ns) < origin.walk_began_ns.saturating_sub(RACY_NS);
    same && settled && origin.host == host && now_ns >= origin.walk_began_ns
}
