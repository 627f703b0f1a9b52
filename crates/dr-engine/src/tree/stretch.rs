//! One reading worker: fetch, open, put together, check, pass on.

use std::collections::HashMap;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use bytes::Bytes;
use dr_core::BackupId;
use dr_core::guard::Guard;
use dr_storage::format::{Content, Digest, EXTENT_LEN, FileEntry, FrameRef, MapRef, STRETCH_LEN, StretchMap};
use dr_storage::os::PageBuffer;
use dr_storage::{FrameOpener, PackKind, SessionView};

use super::TreeShared;
use super::job::Job;
use super::output::{OutFile, inline_content};
use crate::error::EngineError;

/// Frames this close to each other in a pack are fetched together. Less than a usual frame: what
/// lies between is dead, and reading it would make old backups dear.
const MAX_GAP: u64 = 48 << 10;

/// The buffers of one worker, reused for every job.
pub(super) struct TreeWorker {
    opener: FrameOpener,
    frame: PageBuffer,
    extent: PageBuffer,
    local: Vec<u8>,
}

/// Part of a stretch's work: the map, where it lies, and which extents are wanted.
struct Stretch<'a> {
    map: &'a StretchMap,
    offset: u64,
    path: &'a str,
    page_size: usize,
    wanted: Vec<bool>,
}

impl TreeWorker {
    pub fn new() -> Self {
        TreeWorker {
            opener: FrameOpener::new(),
            frame: PageBuffer::default(),
            extent: PageBuffer::default(),
            local: Vec::new(),
        }
    }

    pub fn run(&mut self, shared: &TreeShared, job: Job) -> Result<(), EngineError> {
        match job {
            Job::Inline(files) => {
                files.iter().try_for_each(|entry| pass_on(shared, entry, inline_content(entry)))
            }
            Job::Slices { frame, files } => self.slices(shared, &frame, &files),
            Job::Stretch { file, entry, index, map } => {
                self.stretch(shared, file.as_deref(), &entry, index, &map)
            }
        }
    }

    fn slices(
        &mut self,
        shared: &TreeShared,
        frame: &FrameRef,
        files: &[FileEntry],
    ) -> Result<(), EngineError> {
        let doing = || format!("cannot read {}", files.first().map_or("", |f| f.path.as_str()));
        let session = session(shared, frame.session, &doing)?;
        let range = u64::from(frame.offset)..u64::from(frame.offset) + u64::from(frame.stored);
        let sealed = fetch(shared, frame.session, frame.seq, range, &doing)?;
        self.open(&session, frame, &sealed, &doing)?;
        for entry in files {
            let Content::Slice { offset, len, digest, .. } = &entry.content else { continue };
            let from = *offset as usize;
            let content =
                self.frame.get(from..from + *len as usize).ok_or_else(|| mismatch(shared, &entry.path, 0))?;
            check(shared, content, digest, &entry.path, 0)?;
            pass_on(shared, entry, content)?;
        }
        Ok(())
    }

    fn stretch(
        &mut self,
        shared: &TreeShared,
        file: Option<&OutFile>,
        entry: &FileEntry,
        index: usize,
        reference: &MapRef,
    ) -> Result<(), EngineError> {
        let map = shared.meta.map(&mut self.opener, reference, &entry.path)?;
        let offset = index as u64 * STRETCH_LEN as u64;
        if offset + u64::from(map.raw_len) > entry.size {
            return Err(mismatch(shared, &entry.path, offset));
        }
        let wanted = self.wanted(shared, file, &map, offset)?;
        let page_size = shared.page_size;
        let stretch = Stretch { map: &map, offset, path: &entry.path, page_size, wanted };
        let patches = self.patches(shared, &stretch)?;
        self.extents(shared, file, &stretch, &patches)?;
        if let Some(file) = file {
            file.write_back_early(offset, u64::from(map.raw_len));
        }
        Ok(())
    }

    /// The extents that are not yet in place.
    fn wanted(
        &mut self,
        shared: &TreeShared,
        file: Option<&OutFile>,
        map: &StretchMap,
        offset: u64,
    ) -> Result<Vec<bool>, EngineError> {
        let mut wanted = vec![true; map.extents.len()];
        let Some(file) = file.filter(|f| f.existing > 0) else { return Ok(wanted) };
        for (index, extent) in map.extents.iter().enumerate() {
            let len = map.extent_len(index);
            self.local.resize(len, 0);
            let at = offset + (index * EXTENT_LEN) as u64;
            let got = file.read_existing(at, &mut self.local)?;
            if got == len && shared.context.repo.digest(&self.local) == extent.digest {
                wanted[index] = false;
                shared.counters.kept.fetch_add(len as u64, Ordering::Relaxed);
                shared.counters.bytes.fetch_add(len as u64, Ordering::Relaxed);
            }
        }
        Ok(wanted)
    }

    /// Opens the patch frames of the wanted extents: page in stretch → (frame, place in it).
    fn patches(&mut self, shared: &TreeShared, stretch: &Stretch<'_>) -> Result<Patches, EngineError> {
        let map = stretch.map;
        let mut patches = Patches::default();
        let wanted = map.patched.iter().filter(|p| {
            let extent = p.page as usize * stretch.page_size / EXTENT_LEN;
            stretch.wanted.get(extent).copied().unwrap_or(false)
        });
        let mut needed: Vec<u32> = Vec::new();
        for patch in wanted {
            patches.places.push((patch.page, patch.frame, patch.index));
            needed.push(patch.frame);
        }
        needed.sort_unstable();
        needed.dedup();
        let frames: Vec<(u32, FrameRef)> =
            needed.iter().filter_map(|n| map.frames.get(*n as usize).map(|f| (*n, *f))).collect();
        self.for_each_frame(shared, stretch.path, frames, |worker, number| {
            patches.frames.insert(number, worker.frame.to_vec());
            Ok(())
        })?;
        Ok(patches)
    }

    /// Puts the wanted extents together and passes them on.
    fn extents(
        &mut self,
        shared: &TreeShared,
        file: Option<&OutFile>,
        stretch: &Stretch<'_>,
        patches: &Patches,
    ) -> Result<(), EngineError> {
        let map = stretch.map;
        let mut frames = Vec::new();
        for (index, extent) in map.extents.iter().enumerate().filter(|(i, _)| stretch.wanted[*i]) {
            match extent.base {
                Some(base) => {
                    let frame = map
                        .frames
                        .get(base as usize)
                        .ok_or_else(|| mismatch(shared, stretch.path, stretch.offset))?;
                    frames.push((index as u32, *frame));
                }
                None => {
                    self.extent.clear();
                    self.finish(shared, file, stretch, patches, index, true)?;
                }
            }
        }
        self.for_each_frame(shared, stretch.path, frames, |worker, index| {
            std::mem::swap(&mut worker.frame, &mut worker.extent);
            worker.finish(shared, file, stretch, patches, index as usize, false)
        })
    }

    /// `self.extent` has the base bytes: lays the patches over them, checks, passes on.
    fn finish(
        &mut self,
        shared: &TreeShared,
        file: Option<&OutFile>,
        stretch: &Stretch<'_>,
        patches: &Patches,
        index: usize,
        zeros: bool,
    ) -> Result<(), EngineError> {
        let len = stretch.map.extent_len(index);
        let at = stretch.offset + (index * EXTENT_LEN) as u64;
        self.extent.extend_with_zeros(len);
        let patched = patches.lay_over(&mut self.extent, index, stretch.page_size);
        if patched.is_none() {
            return Err(mismatch(shared, stretch.path, at));
        }
        check(shared, &self.extent, &stretch.map.extents[index].digest, stretch.path, at)?;
        shared.counters.bytes.fetch_add(len as u64, Ordering::Relaxed);
        match file {
            // A hole in a new file reads as zeros already.
            Some(file) if zeros && file.existing == 0 => Ok(()),
            Some(file) => file.write(at, &self.extent),
            None => Ok(()),
        }
    }

    /// Opens a frame into `self.frame`.
    fn open(
        &mut self,
        session: &SessionView,
        frame: &FrameRef,
        sealed: &[u8],
        doing: &dyn Fn() -> String,
    ) -> Result<(), EngineError> {
        self.opener
            .open_aligned(session, PackKind::Data, frame, sealed, &mut self.frame)
            .map_err(EngineError::repo(doing()))
    }

    /// Fetches frames in as few ranges as sensible and opens each into `self.frame`.
    fn for_each_frame(
        &mut self,
        shared: &TreeShared,
        path: &str,
        mut frames: Vec<(u32, FrameRef)>,
        mut each: impl FnMut(&mut Self, u32) -> Result<(), EngineError>,
    ) -> Result<(), EngineError> {
        let doing = || format!("cannot read {path}");
        frames.sort_unstable_by_key(|(_, f)| (f.session, f.seq, f.offset));
        let mut rest = &frames[..];
        while let Some((_, first)) = rest.first() {
            let start = u64::from(first.offset);
            let mut end = start + u64::from(first.stored);
            let joined = rest.iter().take_while(|(_, f)| {
                // Sorted by pack and offset: within the pack, offsets only rise.
                if (f.session, f.seq) != (first.session, first.seq) {
                    return false;
                }
                let (from, to) = (u64::from(f.offset), u64::from(f.offset) + u64::from(f.stored));
                let near =
                    from <= end + MAX_GAP && to - start <= shared.fetch_limit.max(u64::from(first.stored));
                if near {
                    end = end.max(to);
                }
                near
            });
            let joined = joined.count().max(1);
            let sealed = fetch(shared, first.session, first.seq, start..end, &doing)?;
            let session = session(shared, first.session, &doing)?;
            for (number, frame) in &rest[..joined] {
                let from = (u64::from(frame.offset) - start) as usize;
                let piece = &sealed[from..from + frame.stored as usize];
                self.open(&session, frame, piece, &doing)?;
                each(self, *number)?;
            }
            rest = &rest[joined..];
        }
        Ok(())
    }
}

/// Patch frames of a stretch, opened.
#[derive(Default)]
struct Patches {
    places: Vec<(u16, u32, u16)>,
    frames: HashMap<u32, Vec<u8>>,
}

impl Patches {
    /// Copies the patched pages of one extent into it; `None` when a place is not in its frame.
    fn lay_over(&self, extent: &mut [u8], index: usize, page_size: usize) -> Option<()> {
        let first = index * EXTENT_LEN / page_size;
        let pages = EXTENT_LEN / page_size;
        for (page, frame, place) in &self.places {
            let Some(at) = (*page as usize).checked_sub(first).filter(|at| *at < pages) else { continue };
            let to = at * page_size;
            let raw = self.frames.get(frame)?;
            let from = *place as usize * page_size;
            // The last page of a file may be cut.
            let len = page_size.min(extent.len().checked_sub(to)?);
            extent[to..to + len].copy_from_slice(raw.get(from..from + len)?);
        }
        Some(())
    }
}

fn session(
    shared: &TreeShared,
    id: BackupId,
    doing: &dyn Fn() -> String,
) -> Result<Arc<SessionView>, EngineError> {
    shared.handle.block_on(shared.reader.session(id)).map_err(EngineError::repo(doing()))
}

fn fetch(
    shared: &TreeShared,
    session: BackupId,
    seq: u32,
    range: Range<u64>,
    doing: &dyn Fn() -> String,
) -> Result<Bytes, EngineError> {
    shared.counters.fetched.fetch_add(range.end - range.start, Ordering::Relaxed);
    let fetched = shared.handle.block_on(shared.reader.range(PackKind::Data, session, seq, range));
    fetched.map_err(EngineError::repo(doing()))
}

/// Checks content against the digest that the backup recorded.
fn check(
    shared: &TreeShared,
    content: &[u8],
    digest: &Digest,
    path: &str,
    offset: u64,
) -> Result<(), EngineError> {
    if Guard::ContentDigest.holds() && shared.context.repo.digest(content) != *digest {
        return Err(mismatch(shared, path, offset));
    }
    Ok(())
}

fn mismatch(shared: &TreeShared, path: &str, offset: u64) -> EngineError {
    EngineError::ContentMismatch { path: path.to_owned(), offset, backup: shared.backup }
}

/// Passes a whole small file on.
fn pass_on(shared: &TreeShared, entry: &FileEntry, content: &[u8]) -> Result<(), EngineError> {
    let len = content.len() as u64;
    if len != entry.size {
        return Err(mismatch(shared, &entry.path, 0));
    }
    shared.counters.bytes.fetch_add(len, Ordering::Relaxed);
    if let Some(output) = &shared.output
        && !output.write(entry, content)?
    {
        shared.counters.kept.fetch_add(len, Ordering::Relaxed);
    }
    Ok(())
}
