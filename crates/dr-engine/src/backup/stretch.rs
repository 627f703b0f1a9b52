//! One stretch of a file: read once, checked, compared with the parent, stored where it differs.

use std::time::Duration;

use dr_core::Lsn;
use dr_core::guard::Guard;
use dr_core::port::{BadPage, FileReader, PageChecker};
use dr_storage::format::{BadMark, EXTENT_LEN, ExtentEntry, FrameRef, PatchedPage, STRETCH_LEN, StretchMap};
use dr_storage::{PackWriter, Repository};

use crate::error::EngineError;

/// Waits before a page with a wrong checksum is read again: a page that is being written is whole
/// within milliseconds, and a page that is wrong stays wrong.
const REREAD_WAITS_MS: [u64; 5] = [10, 20, 40, 80, 160];

/// An extent is stored whole again when more than this share of its pages would be patched.
const MAX_PATCHED_SHARE: (usize, usize) = (1, 2);

/// … or when it would be put together from more than this many patch frames.
const MAX_PATCH_FRAMES: usize = 8;

/// Fingerprints are written anew when more than this share of them would be overrides.
const MAX_OVERRIDE_SHARE: (usize, usize) = (1, 8);

/// The parent's view of a stretch.
pub(super) struct ParentStretch<'a> {
    pub map: &'a StretchMap,
    /// The parent backup's start: a page changed since then has a later LSN.
    pub start: Lsn,
    /// Reads the parent's page fingerprints; `None` when they are lost, which costs space only.
    pub prints: &'a dyn Fn(&StretchMap) -> Result<Option<Vec<u64>>, EngineError>,
    /// Whether the bytes of old patches have outgrown their use and patched extents go whole.
    pub rebase: bool,
}

/// What is to be read, and how.
pub(super) struct StretchInput<'a> {
    pub reader: &'a dyn FileReader,
    pub path: &'a str,
    /// Where the stretch begins in the file.
    pub offset: u64,
    /// Bytes to read, at most [`STRETCH_LEN`].
    pub len: usize,
    /// For a relation file: the block number of the stretch's first page.
    pub first_block: Option<u32>,
    pub parent: Option<ParentStretch<'a>>,
}

/// What became of it.
pub(super) struct StretchOutput {
    pub map: StretchMap,
    /// Fingerprints to be stored as a new block; `None`: the map's reference and overrides stand.
    pub prints: Option<Vec<u64>>,
    /// Whether the map differs from the parent's.
    pub changed: bool,
    /// Bytes really read: fewer than asked when the file shrank.
    pub len: usize,
    /// Pages that were torn while being read; replay writes them whole.
    pub torn: u64,
}

/// The buffers of one worker, reused for every stretch.
pub(super) struct Worker {
    pub repo: Repository,
    pub pages: std::sync::Arc<dyn PageChecker>,
    /// The LSN at which this backup began.
    pub start: Lsn,
    pub pack: PackWriter,
    pub(super) extent: Vec<u8>,
    gathered: Vec<u8>,
    /// Where each gathered page belongs: page index in the stretch.
    gathered_pages: Vec<u16>,
    extent_prints: Vec<u64>,
    pub(super) bad: Vec<BadPage>,
}

impl Worker {
    pub fn new(
        repo: Repository,
        pages: std::sync::Arc<dyn PageChecker>,
        start: Lsn,
        pack: PackWriter,
    ) -> Self {
        Worker {
            repo,
            pages,
            start,
            pack,
            extent: vec![0; EXTENT_LEN],
            gathered: Vec::with_capacity(EXTENT_LEN),
            gathered_pages: Vec::new(),
            extent_prints: Vec::new(),
            bad: Vec::new(),
        }
    }

    /// Reads the stretch extent by extent and stores what the parent does not have.
    pub fn copy_stretch(&mut self, input: &StretchInput<'_>) -> Result<StretchOutput, EngineError> {
        let page_size = self.pages.page_size();
        let mut build = MapBuild::new(input.parent.as_ref(), page_size);
        let mut at = 0;
        while at < input.len {
            let want = EXTENT_LEN.min(input.len - at);
            let got = read_full(input.reader, &mut self.extent[..want], input.offset + at as u64)
                .map_err(EngineError::file("read", input.path))?;
            // A relation grows by whole pages; half a page is an extension under way.
            let got = if input.first_block.is_some() { got - got % page_size } else { got };
            if got == 0 {
                break;
            }
            let torn = self.check_pages(input, at, got)?;
            build.torn += torn;
            self.copy_extent(input, &mut build, at, got)?;
            at += got;
            if got < want {
                break;
            }
        }
        self.flush_gathered(&mut build)?;
        Ok(build.finish(at, input.parent.as_ref()))
    }

    /// Checks the pages just read, reads wrong ones again, and leaves those that stay wrong in
    /// `self.bad`. Answers how many were torn.
    pub(super) fn check_pages(
        &mut self,
        input: &StretchInput<'_>,
        at: usize,
        got: usize,
    ) -> Result<u64, EngineError> {
        self.bad.clear();
        let Some(stretch_block) = input.first_block else { return Ok(0) };
        let page_size = self.pages.page_size();
        let first = stretch_block + (at / page_size) as u32;
        self.pages.check(&self.extent[..got], first, &mut self.bad);
        if self.bad.is_empty() || !Guard::PageCheck.holds() {
            self.bad.clear();
            return Ok(0);
        }
        let suspects = std::mem::take(&mut self.bad);
        let mut torn = 0;
        for suspect in suspects {
            let from = suspect.index as usize * page_size;
            match self.reread(input, at + from, from, first + suspect.index)? {
                // It was being written when it arrived, so its image is in the WAL.
                None if !input.reader.is_live() => torn += 1,
                None => {}
                // A page written since the backup began will be written whole by replay, because
                // full-page images are forced while a backup runs.
                Some(_) if self.pages.page_lsn(&self.extent[from..from + page_size]) >= self.start => {
                    torn += 1
                }
                Some(bad) => self.bad.push(BadPage { index: suspect.index, ..bad }),
            }
        }
        Ok(torn)
    }

    /// Reads one page again until its checksum is right; `Some` when it stays wrong.
    fn reread(
        &mut self,
        input: &StretchInput<'_>,
        stretch_at: usize,
        extent_at: usize,
        block: u32,
    ) -> Result<Option<BadPage>, EngineError> {
        let page_size = self.pages.page_size();
        let mut verdict = Vec::new();
        self.pages.check(&self.extent[extent_at..extent_at + page_size], block, &mut verdict);
        let mut page = vec![0; page_size];
        for wait in REREAD_WAITS_MS {
            std::thread::sleep(Duration::from_millis(wait));
            match input.reader.look_again(&mut page, input.offset + stretch_at as u64) {
                Ok(got) if got < page_size => continue,
                Ok(_) => {}
                // Who may not look again has what arrived.
                Err(_) if !input.reader.is_live() => break,
                Err(error) => return Err(EngineError::file("read again", input.path)(error)),
            }
            verdict.clear();
            self.pages.check(&page, block, &mut verdict);
            if input.reader.is_live() {
                self.extent[extent_at..extent_at + page_size].copy_from_slice(&page);
            }
            if verdict.is_empty() {
                return Ok(None);
            }
        }
        Ok(verdict.pop())
    }

    fn copy_extent(
        &mut self,
        input: &StretchInput<'_>,
        build: &mut MapBuild,
        at: usize,
        got: usize,
    ) -> Result<(), EngineError> {
        let page_size = self.pages.page_size();
        let index = at / EXTENT_LEN;
        let first_page = (at / page_size) as u16;
        let raw = &self.extent[..got];
        let digest = self.repo.digest_with_prints(raw, page_size, &mut self.extent_prints);
        build.prints.extend_from_slice(&self.extent_prints);
        for bad in &self.bad {
            build.map.bad.push(BadMark {
                page: first_page + bad.index as u16,
                found: bad.found,
                expected: bad.expected,
            });
        }
        let parent = input.parent.as_ref();
        let before = parent.and_then(|p| p.map.extents.get(index));
        if let (Some(before), Some(parent)) = (before, parent)
            && before.digest == digest
            && parent.map.extent_len(index) == got
            && !(parent.rebase && has_patches(parent.map, first_page, self.extent_prints.len()))
        {
            build.take_over(parent.map, index, first_page, self.extent_prints.len());
            return Ok(());
        }
        build.changed = true;
        if raw.iter().all(|b| *b == 0) {
            build.map.extents.push(ExtentEntry { digest, base: None });
            return Ok(());
        }
        if let Some(parent) = parent.filter(|_| before.is_some())
            && let Some(pages) = self.changed_pages(parent, build, first_page, got)?
            && build.patches_fit(parent, index, first_page, self.extent_prints.len(), &pages)
        {
            build.keep_base(parent.map, index, first_page, self.extent_prints.len(), &pages, digest);
            return self.gather(build, first_page, got, &pages);
        }
        let frame =
            self.pack.append(&self.extent[..got]).map_err(EngineError::repo(store_doing(input.path)))?;
        let base = build.frame_index(frame);
        build.map.extents.push(ExtentEntry { digest, base: Some(base) });
        Ok(())
    }

    /// The pages of the extent that differ from the parent's, by fingerprint or by LSN; `None`
    /// when the parent's fingerprints are not to be had.
    fn changed_pages(
        &self,
        parent: &ParentStretch<'_>,
        build: &mut MapBuild,
        first_page: u16,
        got: usize,
    ) -> Result<Option<Vec<u16>>, EngineError> {
        if build.parent_prints.is_none() {
            build.parent_prints = Some((parent.prints)(parent.map)?);
        }
        let Some(Some(prints)) = &build.parent_prints else { return Ok(None) };
        let page_size = self.pages.page_size();
        let changed = self.extent_prints.iter().enumerate().filter(|(k, print)| {
            let before = prints.get(first_page as usize + k);
            let page = &self.extent[k * page_size..got.min((k + 1) * page_size)];
            before != Some(print) || (page.len() == page_size && self.pages.page_lsn(page) >= parent.start)
        });
        Ok(Some(changed.map(|(k, _)| first_page + k as u16).collect()))
    }

    /// Puts changed pages beside those of other extents, into frames of their own.
    fn gather(
        &mut self,
        build: &mut MapBuild,
        first_page: u16,
        got: usize,
        pages: &[u16],
    ) -> Result<(), EngineError> {
        let page_size = self.pages.page_size();
        for page in pages {
            let from = (page - first_page) as usize * page_size;
            self.gathered.extend_from_slice(&self.extent[from..got.min(from + page_size)]);
            // A last, incomplete page takes a whole place, so that places are found by counting.
            self.gathered.resize(self.gathered.len().next_multiple_of(page_size), 0);
            self.gathered_pages.push(*page);
            if self.gathered.len() + page_size > EXTENT_LEN {
                self.flush_gathered(build)?;
            }
        }
        Ok(())
    }

    fn flush_gathered(&mut self, build: &mut MapBuild) -> Result<(), EngineError> {
        if self.gathered.is_empty() {
            return Ok(());
        }
        let frame =
            self.pack.append(&self.gathered).map_err(EngineError::repo("cannot store changed pages"))?;
        let frame = build.frame_index(frame);
        for (index, page) in self.gathered_pages.drain(..).enumerate() {
            build.map.patched.push(PatchedPage { page, frame, index: index as u16 });
        }
        self.gathered.clear();
        Ok(())
    }
}

fn store_doing(path: &str) -> String {
    format!("cannot store {path}")
}

/// Reads until the buffer is full or the file ends.
pub(super) fn read_full(reader: &dyn FileReader, buffer: &mut [u8], offset: u64) -> std::io::Result<usize> {
    let mut got = 0;
    while got < buffer.len() {
        match reader.read_at(&mut buffer[got..], offset + got as u64)? {
            0 => break,
            n => got += n,
        }
    }
    Ok(got)
}

/// A map that grows extent by extent.
struct MapBuild {
    map: StretchMap,
    prints: Vec<u64>,
    /// The parent's fingerprints: not asked for yet, lost, or there.
    parent_prints: Option<Option<Vec<u64>>>,
    changed: bool,
    torn: u64,
}

impl MapBuild {
    fn new(parent: Option<&ParentStretch<'_>>, page_size: usize) -> Self {
        MapBuild {
            map: StretchMap::default(),
            prints: Vec::with_capacity(STRETCH_LEN / page_size),
            parent_prints: None,
            changed: parent.is_none(),
            torn: 0,
        }
    }

    fn frame_index(&mut self, frame: FrameRef) -> u32 {
        // Stretches have few frames, and the one wanted is nearly always the last.
        let found = self.map.frames.iter().rposition(|f| *f == frame);
        found.unwrap_or_else(|| {
            self.map.frames.push(frame);
            self.map.frames.len() - 1
        }) as u32
    }

    /// Takes an unchanged extent over as the parent has it.
    fn take_over(&mut self, parent: &StretchMap, index: usize, first_page: u16, pages: usize) {
        let before = &parent.extents[index];
        let base = before.base.map(|b| self.frame_index(parent.frames[b as usize]));
        self.map.extents.push(ExtentEntry { digest: before.digest, base });
        self.keep_patches(parent, first_page, pages, &[]);
    }

    fn keep_patches(&mut self, parent: &StretchMap, first_page: u16, pages: usize, replaced: &[u16]) {
        for patch in
            patches_of(parent, first_page, pages).filter(|p| replaced.binary_search(&p.page).is_err())
        {
            let frame = self.frame_index(parent.frames[patch.frame as usize]);
            self.map.patched.push(PatchedPage { frame, ..*patch });
        }
    }

    /// Whether the extent stays cheap to read with these pages patched too.
    fn patches_fit(
        &self,
        parent: &ParentStretch<'_>,
        index: usize,
        first_page: u16,
        pages: usize,
        changed: &[u16],
    ) -> bool {
        let kept: Vec<_> = patches_of(parent.map, first_page, pages)
            .filter(|p| changed.binary_search(&p.page).is_err())
            .collect();
        if parent.map.extents[index].base.is_none() || (parent.rebase && !kept.is_empty()) {
            return false;
        }
        let mut frames: Vec<u32> = kept.iter().map(|p| p.frame).collect();
        frames.sort_unstable();
        frames.dedup();
        let (share, of) = MAX_PATCHED_SHARE;
        (kept.len() + changed.len()) * of <= pages * share && frames.len() < MAX_PATCH_FRAMES
    }

    /// Keeps the parent's base frame and those of its patches that are not replaced now.
    fn keep_base(
        &mut self,
        parent: &StretchMap,
        index: usize,
        first_page: u16,
        pages: usize,
        changed: &[u16],
        digest: dr_storage::format::Digest,
    ) {
        let base = parent.extents[index].base.map(|b| self.frame_index(parent.frames[b as usize]));
        self.map.extents.push(ExtentEntry { digest, base });
        self.keep_patches(parent, first_page, pages, changed);
    }

    fn finish(mut self, len: usize, parent: Option<&ParentStretch<'_>>) -> StretchOutput {
        self.map.raw_len = len as u32;
        self.map.patched.sort_unstable_by_key(|p| p.page);
        let same_marks = parent.is_some_and(|p| p.map.bad == self.map.bad && p.map.raw_len as usize == len);
        let changed = self.changed || !same_marks;
        let prints = if changed { self.fingerprints(parent) } else { None };
        StretchOutput { map: self.map, prints, changed, len, torn: self.torn }
    }

    /// Keeps the parent's block of fingerprints with overrides while they are few; else asks for a
    /// new block.
    fn fingerprints(&mut self, parent: Option<&ParentStretch<'_>>) -> Option<Vec<u64>> {
        let all = std::mem::take(&mut self.prints);
        let reference = parent.and_then(|p| p.map.prints.as_ref());
        if let (Some(reference), Some(Some(before))) = (reference, &self.parent_prints) {
            let mut overrides = reference.overrides.clone();
            overrides.retain(|(page, _)| {
                (*page as usize) < all.len() && before.get(*page as usize) == all.get(*page as usize)
            });
            let differing = all.iter().enumerate().filter(|(k, print)| before.get(*k) != Some(*print));
            overrides.extend(differing.map(|(k, print)| (k as u16, *print)));
            let (share, of) = MAX_OVERRIDE_SHARE;
            if overrides.len() * of <= all.len() * share {
                overrides.sort_unstable_by_key(|(page, _)| *page);
                self.map.prints = Some(dr_storage::format::PrintsRef { frame: reference.frame, overrides });
                return None;
            }
        }
        Some(all)
    }
}

fn has_patches(parent: &StretchMap, first_page: u16, pages: usize) -> bool {
    patches_of(parent, first_page, pages).next().is_some()
}

/// The parent's patches of the pages of one extent; they are sorted by page.
fn patches_of(parent: &StretchMap, first_page: u16, pages: usize) -> impl Iterator<Item = &PatchedPage> {
    let from = parent.patched.partition_point(|p| p.page < first_page);
    parent.patched[from..].iter().take_while(move |p| (p.page as usize) < first_page as usize + pages)
}
