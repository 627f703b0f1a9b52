//! Where restored content goes: files below one directory.

use std::fs::{self, File, OpenOptions, Permissions};
use std::io;
use std::os::unix::fs::{DirBuilderExt, FileExt, OpenOptionsExt, PermissionsExt, symlink};
use std::path::{Path, PathBuf};

use dr_core::path::decode;
use dr_storage::format::{Content, EntryKind, FileEntry};
use dr_storage::os::DirectFile;

use crate::error::EngineError;

/// Permissions while a file is written; its own are set when it is opened.
const PRIVATE: u32 = 0o600;

/// A directory that receives a backup.
#[derive(Clone, Debug)]
pub(crate) struct FileOutput {
    /// The data directory.
    pub root: PathBuf,
    /// Whether files may exist and are then changed only where they differ.
    pub delta: bool,
    /// New places of tablespaces, by oid.
    pub tablespaces: Vec<(u32, PathBuf)>,
}

/// A file being restored.
#[derive(Debug)]
pub(crate) struct OutFile {
    pub file: File,
    /// The same file, written past the page cache; not for small files, and not for delta, which
    /// reads what was there through the cache.
    direct: Option<DirectFile>,
    pub path: PathBuf,
    /// Bytes that were there before (delta only).
    pub existing: u64,
}

impl FileOutput {
    /// The place of an entry on this host.
    pub fn place(&self, path: &str) -> PathBuf {
        use std::os::unix::ffi::OsStrExt;
        self.root.join(std::ffi::OsStr::from_bytes(&decode(path)))
    }

    /// Makes a directory or a link.
    pub fn make(&self, entry: &FileEntry) -> Result<(), EngineError> {
        let place = self.place(&entry.path);
        match &entry.kind {
            EntryKind::Link(target) => self.make_link(entry, &place, target),
            _ => make_directory(&place, entry.mode),
        }
    }

    fn make_link(&self, entry: &FileEntry, place: &Path, target: &str) -> Result<(), EngineError> {
        let oid = entry.path.strip_prefix("pg_tblspc/").and_then(|rest| rest.parse::<u32>().ok());
        let mapped =
            oid.and_then(|oid| self.tablespaces.iter().find(|(o, _)| *o == oid)).map(|(_, p)| p.clone());
        let target = mapped.unwrap_or_else(|| PathBuf::from(target));
        if oid.is_some() {
            make_directory(&target, 0o700)?;
        }
        match fs::read_link(place) {
            Ok(found) if found == target => return Ok(()),
            Ok(_) if self.delta => fs::remove_file(place).map_err(EngineError::file("replace", place))?,
            _ => {}
        }
        symlink(&target, place).map_err(EngineError::file("link", place))
    }

    /// Opens a file for its content, with its final length and permissions. A new file is made
    /// sparse: extents of zeros are never written.
    pub fn open(&self, entry: &FileEntry) -> Result<OutFile, EngineError> {
        let path = self.place(&entry.path);
        let mut options = OpenOptions::new();
        options.read(true).write(true).mode(PRIVATE);
        if self.delta {
            options.create(true);
        } else {
            options.create_new(true);
        }
        let file = options.open(&path).map_err(EngineError::file("create", &path))?;
        let existing =
            if self.delta { file.metadata().map_err(EngineError::file("look at", &path))?.len() } else { 0 };
        if existing != entry.size {
            file.set_len(entry.size).map_err(EngineError::file("size", &path))?;
        }
        if entry.mode != PRIVATE || self.delta {
            file.set_permissions(Permissions::from_mode(entry.mode))
                .map_err(EngineError::file("set the mode of", &path))?;
        }
        let large = matches!(entry.content, Content::Stretches { .. });
        let direct = if large && !self.delta { DirectFile::open(&path) } else { None };
        Ok(OutFile { file, direct, path, existing: existing.min(entry.size) })
    }

    /// Writes a whole small file.
    pub fn write(&self, entry: &FileEntry, content: &[u8]) -> Result<bool, EngineError> {
        let out = self.open(entry)?;
        if self.delta && out.existing == entry.size && out.holds(0, content)? {
            return Ok(false);
        }
        out.write(0, content)?;
        Ok(true)
    }
}

impl OutFile {
    /// Writes content at its place.
    pub fn write(&self, offset: u64, content: &[u8]) -> Result<(), EngineError> {
        let done = match &self.direct {
            Some(direct) => {
                direct.write_at(offset, content).map_err(EngineError::file("write", &self.path))?
            }
            None => 0,
        };
        self.file
            .write_all_at(&content[done..], offset + done as u64)
            .map_err(EngineError::file("write", &self.path))
    }

    /// Has the kernel begin to write a range to disk, if it lies in the page cache.
    pub fn write_back_early(&self, offset: u64, len: u64) {
        if self.direct.is_none() {
            dr_storage::os::write_back_early(&self.file, offset, len);
        }
    }

    /// Reads what was there before into `buffer`; answers how much there was.
    pub fn read_existing(&self, offset: u64, buffer: &mut [u8]) -> Result<usize, EngineError> {
        if offset >= self.existing {
            return Ok(0);
        }
        let want = buffer.len().min((self.existing - offset) as usize);
        let mut got = 0;
        while got < want {
            match self.file.read_at(&mut buffer[got..want], offset + got as u64) {
                Ok(0) => break,
                Ok(n) => got += n,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(EngineError::file("read", &self.path)(error)),
            }
        }
        Ok(got)
    }

    fn holds(&self, offset: u64, content: &[u8]) -> Result<bool, EngineError> {
        let mut buffer = vec![0; content.len()];
        Ok(self.read_existing(offset, &mut buffer)? == content.len() && buffer == content)
    }
}

/// Makes a directory with its parents' permissions left alone.
fn make_directory(place: &Path, mode: u32) -> Result<(), EngineError> {
    match fs::DirBuilder::new().mode(mode).create(place) {
        Ok(()) => {}
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists && place.is_dir() => {}
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            fs::DirBuilder::new()
                .recursive(true)
                .mode(mode)
                .create(place)
                .map_err(EngineError::file("create", place))?;
        }
        Err(error) => return Err(EngineError::file("create", place)(error)),
    }
    fs::set_permissions(place, Permissions::from_mode(mode))
        .map_err(EngineError::file("set the mode of", place))
}

/// The content of an entry that needs no fetch.
pub(super) fn inline_content(entry: &FileEntry) -> &[u8] {
    match &entry.content {
        Content::Inline(bytes) => bytes,
        _ => &[],
    }
}
