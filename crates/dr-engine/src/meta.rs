//! Metadata frames for worker threads: read ahead in windows, kept for a while.

use std::collections::VecDeque;
use std::sync::Mutex;

use bytes::Bytes;
use dr_core::BackupId;
use dr_core::guard::Guard;
use dr_storage::format::{Digest, FileEntry, FrameRef, MapRef, Shard, ShardRef, StretchMap};
use dr_storage::{FrameOpener, FrameReader, PackKind, Repository};
use tokio::runtime::Handle;

use crate::error::EngineError;

/// Bytes read at once: maps of neighbouring stretches lie side by side.
const WINDOW: u64 = 1 << 20;

/// Windows kept: enough for the parents of a few files that are read at the same time.
const WINDOWS: usize = 16;

/// Reads maps, tables and fingerprints; usable from blocking threads.
#[derive(Debug)]
pub(crate) struct MetaReader {
    repo: Repository,
    reader: FrameReader,
    handle: Handle,
    windows: Mutex<VecDeque<(WindowKey, Bytes)>>,
}

type WindowKey = (u8, BackupId, u32, u64);

impl MetaReader {
    pub fn new(repo: Repository, reader: FrameReader, handle: Handle) -> Self {
        MetaReader { repo, reader, handle, windows: Mutex::new(VecDeque::new()) }
    }

    /// A map, checked against the digest that its parent has of it.
    pub fn map(
        &self,
        opener: &mut FrameOpener,
        reference: &MapRef,
        of: &str,
    ) -> Result<StretchMap, EngineError> {
        let bytes = self.frame(opener, PackKind::Meta, &reference.frame, of)?;
        self.check(&bytes, &reference.digest, of)?;
        StretchMap::decode(&bytes).map_err(EngineError::repo(format!("cannot read the map of {of}")))
    }

    /// The entries of a part of a file table, checked against its digest.
    pub fn shard(
        &self,
        opener: &mut FrameOpener,
        reference: &ShardRef,
    ) -> Result<Vec<FileEntry>, EngineError> {
        let of = "the file table";
        let bytes = self.frame(opener, PackKind::Meta, &reference.frame, of)?;
        self.check(&bytes, &reference.digest, of)?;
        Shard::decode(&bytes).map_err(EngineError::repo("cannot read the file table"))
    }

    fn check(&self, bytes: &[u8], digest: &Digest, of: &str) -> Result<(), EngineError> {
        if Guard::MetadataDigest.holds() && self.repo.digest(bytes) != *digest {
            let error = dr_storage::RepoError::metadata_mismatch(of);
            return Err(EngineError::repo(format!("cannot trust the metadata of {of}"))(error));
        }
        Ok(())
    }

    /// One frame of metadata or fingerprints.
    pub fn frame(
        &self,
        opener: &mut FrameOpener,
        kind: PackKind,
        frame: &FrameRef,
        of: &str,
    ) -> Result<Vec<u8>, EngineError> {
        let doing = || format!("cannot read the metadata of {of}");
        let session =
            self.handle.block_on(self.reader.session(frame.session)).map_err(EngineError::repo(doing()))?;
        let sealed = self.sealed(kind, frame).map_err(EngineError::repo(doing()))?;
        let mut out = Vec::new();
        opener.open(&session, kind, frame, &sealed, &mut out).map_err(EngineError::repo(doing()))?;
        Ok(out)
    }

    fn sealed(&self, kind: PackKind, frame: &FrameRef) -> Result<Bytes, dr_storage::RepoError> {
        let (start, end) = (u64::from(frame.offset), u64::from(frame.offset) + u64::from(frame.stored));
        let window = start / WINDOW;
        if end > (window + 1) * WINDOW {
            // It crosses a border: read it alone.
            return self.handle.block_on(self.reader.range(kind, frame.session, frame.seq, start..end));
        }
        let key = (kind as u8, frame.session, frame.seq, window);
        let cut =
            |bytes: &Bytes| bytes.slice((start % WINDOW) as usize..(start % WINDOW + (end - start)) as usize);
        if let Ok(windows) = self.windows.lock()
            && let Some((_, bytes)) = windows.iter().find(|(k, _)| *k == key)
            && bytes.len() as u64 >= start % WINDOW + (end - start)
        {
            return Ok(cut(bytes));
        }
        let session = self.handle.block_on(self.reader.session(frame.session))?;
        let pack = session.pack_len(kind, frame.seq)?;
        let range = window * WINDOW..((window + 1) * WINDOW).min(pack);
        if range.end < end {
            return self.handle.block_on(self.reader.range(kind, frame.session, frame.seq, start..end));
        }
        let bytes = self.handle.block_on(self.reader.range(kind, frame.session, frame.seq, range))?;
        let piece = cut(&bytes);
        if let Ok(mut windows) = self.windows.lock() {
            windows.push_front((key, bytes));
            windows.truncate(WINDOWS);
        }
        Ok(piece)
    }
}
