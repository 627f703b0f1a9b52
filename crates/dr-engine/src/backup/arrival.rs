//! Files that arrive with their content, in the order of the server that sends them.
//!
//! The content of a stretch goes into a buffer that is lent to a worker and comes back when the
//! worker is done; there is one buffer more than workers, so that one fills while all others are
//! compressed. Small files carry their bytes with them, at most a bundle's.

use std::io;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, SyncSender};
use std::time::Instant;

use dr_core::port::{FileKind, FileOpener, FileReader, FileStat, FileStream, SourceError, SourceFile};
use dr_storage::format::{Content, EXTENT_LEN, EntryKind, FileEntry, STRETCH_LEN};

use super::parent::ParentIndex;
use super::task::{News, Small, Task};
use super::walk::Feeder;
use crate::error::EngineError;
use crate::failure::Failure;

/// Content lent to a worker.
pub(super) struct Lent {
    bytes: Vec<u8>,
    /// Where the buffer goes back to; `None`: it is not shared.
    home: Option<SyncSender<Vec<u8>>>,
}

impl Drop for Lent {
    fn drop(&mut self) {
        if let Some(home) = &self.home {
            // Nobody waits for buffers after the last file.
            let _ = home.try_send(std::mem::take(&mut self.bytes));
        }
    }
}

impl Lent {
    /// Reads the content as a file's, which it is from `offset` on. A second look at a place is where
    /// the file is: what arrived cannot have changed.
    pub fn reader(self, file: &SourceFile, offset: u64, again: FileOpener) -> GivenReader {
        GivenReader { content: self, path: file.path.clone(), stat: file.stat, offset, again }
    }
}

/// See [`Lent::reader`].
pub(super) struct GivenReader {
    content: Lent,
    path: String,
    stat: FileStat,
    offset: u64,
    again: FileOpener,
}

impl FileReader for GivenReader {
    fn read_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<usize> {
        let Some(from) = offset.checked_sub(self.offset) else { return Ok(0) };
        let rest = self.content.bytes.get(from as usize..).unwrap_or_default();
        let len = rest.len().min(buffer.len());
        buffer[..len].copy_from_slice(&rest[..len]);
        Ok(len)
    }

    fn stat(&self) -> io::Result<FileStat> {
        Ok(self.stat)
    }

    fn look_again(&self, buffer: &mut [u8], offset: u64) -> io::Result<usize> {
        let file = (self.again)(&self.path).map_err(io::Error::other)?;
        file.ok_or(io::ErrorKind::NotFound)?.look_again(buffer, offset)
    }

    fn is_live(&self) -> bool {
        false
    }
}

/// The buffers that are lent: as many as are free, and the way home for those that are not.
struct Buffers {
    home: SyncSender<Vec<u8>>,
    free: Receiver<Vec<u8>>,
}

impl Buffers {
    fn new(count: usize) -> Self {
        let (home, free) = std::sync::mpsc::sync_channel(count);
        for _ in 0..count {
            let _ = home.try_send(Vec::new());
        }
        Buffers { home, free }
    }

    /// Waits for a free one. A worker that failed gives its buffer back all the same.
    fn take(&self) -> Result<Vec<u8>, EngineError> {
        self.free.recv().map_err(|_| EngineError::Cancelled)
    }

    fn lend(&self, bytes: Vec<u8>) -> Lent {
        Lent { bytes, home: Some(self.home.clone()) }
    }
}

/// Takes files as they arrive and makes tasks of them.
pub(super) struct Arrival<'a> {
    pub stream: Box<dyn FileStream>,
    pub parents: ParentIndex,
    pub feeder: Feeder<'a>,
    pub failure: Arc<Failure>,
}

impl Arrival<'_> {
    /// Runs to the end of the stream, or until some part fails.
    pub fn run(mut self) -> Result<(), EngineError> {
        let (cancel, failure) = (self.feeder.cancel.clone(), self.failure.clone());
        self.stream.interrupt_when(Box::new(move || cancel.is_cancelled() || failure.is_set()));
        let buffers = Buffers::new(self.feeder.workers + 1);
        let mut bundle = Vec::new();
        let mut bundled = 0;
        while let Some(file) = self.next_file()? {
            self.feeder.cancel.check()?;
            if self.feeder.failure.is_set() {
                break;
            }
            let number = self.feeder.number();
            let small = file.kind == FileKind::Regular && file.stat.size < EXTENT_LEN as u64;
            if small {
                let content = Lent { bytes: self.take(file.stat.size as usize, Vec::new())?, home: None };
                let before = self.parents.find(&file.path)?;
                bundled += content.bytes.len();
                bundle.push(Small { number, file, before, content: Some(content) });
                if bundled >= EXTENT_LEN || bundle.len() >= super::walk::MAX_BUNDLE_FILES {
                    bundled = 0;
                    self.feeder.task(Task::Bundle(std::mem::take(&mut bundle)))?;
                }
            } else {
                self.visit(number, file, &buffers)?;
            }
            self.feeder.keep_pace(|feeder| {
                bundled = 0;
                feeder.bundle(&mut bundle)
            })?;
        }
        self.feeder.bundle(&mut bundle)?;
        self.feeder.finish();
        Ok(())
    }

    fn next_file(&mut self) -> Result<Option<SourceFile>, EngineError> {
        self.stream.next_file().map_err(|error| self.received(error))
    }

    /// A wait that was ended because the job was is no fault of the server.
    fn received(&self, error: SourceError) -> EngineError {
        match self.feeder.cancel.check() {
            Err(cancelled) => cancelled,
            Ok(()) => EngineError::source("cannot receive the cluster's files")(error),
        }
    }

    /// A directory, a link or a large file.
    fn visit(&mut self, number: u64, file: SourceFile, buffers: &Buffers) -> Result<(), EngineError> {
        let kind = match &file.kind {
            FileKind::Regular => return self.large(number, file, buffers),
            FileKind::Directory => EntryKind::Directory,
            FileKind::Link(target) => EntryKind::Link(target.clone()),
        };
        let (path, mode) = (file.path, file.stat.mode);
        let entry = FileEntry { path, kind, mode, size: 0, stat: None, content: Content::None };
        self.feeder.send(News::Ready { number, entry, bad: Vec::new() })
    }

    fn large(&mut self, number: u64, file: SourceFile, buffers: &Buffers) -> Result<(), EngineError> {
        let before = Arc::new(self.parents.find(&file.path)?);
        let units = file.stat.size.div_ceil(STRETCH_LEN as u64) as u32;
        let file = Arc::new(file);
        self.feeder.send(News::Begin { number, file: file.clone(), units })?;
        let mut told = Instant::now();
        for unit in 0..units {
            if self.feeder.failure.is_set() {
                break;
            }
            let offset = u64::from(unit) * STRETCH_LEN as u64;
            let len = (file.stat.size - offset).min(STRETCH_LEN as u64) as usize;
            let bytes = self.take(len, buffers.take()?)?;
            let content = Some(buffers.lend(bytes));
            let (file, before) = (file.clone(), before.clone());
            self.feeder.task(Task::Stretch { number, unit, file, before, content })?;
            self.feeder.tell_sometimes(&mut told);
        }
        Ok(())
    }

    /// The next `len` bytes of the current file.
    fn take(&mut self, len: usize, mut buffer: Vec<u8>) -> Result<Vec<u8>, EngineError> {
        buffer.resize(len, 0);
        let mut got = 0;
        while got < len {
            match self.stream.read(&mut buffer[got..]) {
                Ok(0) => break,
                Ok(n) => got += n,
                Err(error) => return Err(self.received(error)),
            }
        }
        buffer.truncate(got);
        Ok(buffer)
    }
}
