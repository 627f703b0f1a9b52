//! The archives of a base backup as files, one after the other.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use bytes::{Buf, Bytes};
use dr_core::path::encode;
use dr_core::port::{FileKind, FileStat, FileStream, SourceError, SourceFile, TablespaceFacts};
use tokio::runtime::Handle;

use super::Ended;
use crate::replication::{BackupEvent, BaseBackup, TarEntry, TarEvent, TarKind, TarReader};
use crate::walk::{EMPTY_DIRS, is_left_out};

/// The largest of the files that are kept aside; a tablespace map has a line a tablespace.
const MAX_ASIDE: u64 = 16 << 20;

/// How often a wait looks whether the job is over.
const ASK_EVERY: Duration = Duration::from_millis(200);

/// Files that belong to the manifest, not to the table.
const ASIDE: [&str; 3] = ["backup_label", "tablespace_map", "global/pg_control"];

/// The files of a backup under way.
pub(super) struct ArrivingFiles {
    backup: Option<BaseBackup>,
    server: String,
    handle: Handle,
    /// Links of tablespaces, which the server does not send beside a tablespace map.
    links: Vec<SourceFile>,
    /// Archive names of tablespaces and the path that their entries are below.
    places: BTreeMap<String, String>,
    place: String,
    tar: TarReader,
    /// Content of the current entry that arrived and was not read.
    content: Bytes,
    /// Bytes of it that are still to arrive.
    missing: u64,
    aside: BTreeMap<&'static str, Vec<u8>>,
    interrupted: Box<dyn Fn() -> bool + Send>,
    ended: Arc<Mutex<Option<Ended>>>,
}

impl ArrivingFiles {
    pub fn new(
        backup: BaseBackup,
        tablespaces: &[TablespaceFacts],
        handle: Handle,
        ended: Arc<Mutex<Option<Ended>>>,
    ) -> Self {
        let path = |space: &TablespaceFacts| format!("pg_tblspc/{}", space.oid);
        let link = |space: &TablespaceFacts| SourceFile {
            path: path(space),
            kind: FileKind::Link(encode(space.location.as_bytes())),
            stat: FileStat { mode: 0o777, ..FileStat::default() },
        };
        ArrivingFiles {
            server: backup.server().to_owned(),
            backup: Some(backup),
            handle,
            links: tablespaces.iter().map(link).collect(),
            places: tablespaces.iter().map(|s| (format!("{}.tar", s.oid), path(s))).collect(),
            place: String::new(),
            tar: TarReader::new(),
            content: Bytes::new(),
            missing: 0,
            aside: BTreeMap::new(),
            interrupted: Box::new(|| false),
            ended,
        }
    }

    fn broken(&self, reason: impl ToString) -> SourceError {
        SourceError::Query {
            server: self.server.clone(),
            operation: "send a backup that can be read".into(),
            source: reason.to_string().into(),
        }
    }

    /// The next event of the archives; `None` at the end of the backup.
    fn event(&mut self) -> Result<Option<TarEvent>, SourceError> {
        loop {
            if let Some(event) = self.tar.next().map_err(|error| self.broken(error))? {
                return Ok(Some(event));
            }
            let Some(backup) = self.backup.as_mut() else { return Ok(None) };
            match self.handle.block_on(next(backup, &self.server, self.interrupted.as_ref()))? {
                Some(BackupEvent::Data(bytes)) => self.tar.push(bytes),
                Some(BackupEvent::Archive(archive)) => {
                    if !self.place_is_done() {
                        return Err(self.broken("an archive begins before the last one ended"));
                    }
                    self.tar = TarReader::new();
                    self.place = match self.places.get(&archive.name) {
                        Some(place) => place.clone(),
                        None if archive.name == "base.tar" => String::new(),
                        None => {
                            return Err(
                                self.broken(format!("an archive {:?} of nothing known", archive.name))
                            );
                        }
                    };
                }
                Some(BackupEvent::Progress(_)) => {}
                Some(BackupEvent::Manifest) => return Err(self.broken("a manifest that was not asked for")),
                None => self.end()?,
            }
        }
    }

    fn place_is_done(&self) -> bool {
        self.tar.is_complete() || self.tar.is_unused()
    }

    fn end(&mut self) -> Result<(), SourceError> {
        if !self.tar.is_complete() {
            return Err(self.broken("the last archive has no end"));
        }
        let Some((end, _)) = self.backup.take().and_then(BaseBackup::finish) else {
            return Err(self.broken("no end position"));
        };
        let mut aside = |name: &str| self.aside.remove(name).unwrap_or_default();
        let ended = Ended {
            end,
            backup_label: aside("backup_label"),
            tablespace_map: aside("tablespace_map"),
            control: aside("global/pg_control"),
        };
        if let Ok(mut slot) = self.ended.lock() {
            *slot = Some(ended);
        }
        Ok(())
    }

    /// Brings content of the current entry; `false` at its end.
    fn more(&mut self) -> Result<bool, SourceError> {
        if self.missing == 0 {
            return Ok(false);
        }
        match self.event()? {
            Some(TarEvent::Data(bytes)) => {
                self.missing -= bytes.len() as u64;
                self.content = bytes;
                Ok(true)
            }
            _ => Err(self.broken("a file ends too early")),
        }
    }

    /// Keeps a file that belongs to the manifest.
    fn keep_aside(&mut self, name: &'static str) -> Result<(), SourceError> {
        if self.missing > MAX_ASIDE {
            return Err(self.broken(format!("{name} has {} bytes", self.missing)));
        }
        let mut bytes = Vec::new();
        while self.more()? {
            bytes.extend_from_slice(&std::mem::take(&mut self.content));
        }
        self.aside.insert(name, bytes);
        Ok(())
    }

    fn skip(&mut self) -> Result<(), SourceError> {
        self.content.clear();
        while self.more()? {
            self.content.clear();
        }
        Ok(())
    }
}

/// The next event of the backup, or an error when the job is over.
async fn next(
    backup: &mut BaseBackup,
    server: &str,
    interrupted: &(dyn Fn() -> bool + Send),
) -> Result<Option<BackupEvent>, SourceError> {
    let began = tokio::time::Instant::now();
    let limit = backup.patience().backup;
    loop {
        tokio::select! {
            biased;
            event = backup.next() => return Ok(event?),
            () = tokio::time::sleep(ASK_EVERY) => {}
        }
        if interrupted() {
            let source = "the job was ended".into();
            return Err(SourceError::Query { server: server.to_owned(), operation: "go on".into(), source });
        }
        // Asking begins a new wait each time, so the limit of the whole is kept here.
        if began.elapsed() >= limit {
            let source = format!("no byte arrived for {} s", limit.as_secs_f32()).into();
            let operation = "send a backup".into();
            return Err(SourceError::Query { server: server.to_owned(), operation, source });
        }
    }
}

impl FileStream for ArrivingFiles {
    fn interrupt_when(&mut self, asked: Box<dyn Fn() -> bool + Send>) {
        self.interrupted = asked;
    }

    fn next_file(&mut self) -> Result<Option<SourceFile>, SourceError> {
        if let Some(link) = self.links.pop() {
            return Ok(Some(link));
        }
        loop {
            self.skip()?;
            let entry = match self.event()? {
                None => return Ok(None),
                Some(TarEvent::Entry(entry)) => entry,
                Some(TarEvent::End) => continue,
                Some(TarEvent::Data(_)) => return Err(self.broken("content without a file")),
            };
            self.missing = entry.size;
            let path = match self.place.as_str() {
                "" => encode(&entry.path),
                place => format!("{place}/{}", encode(&entry.path)),
            };
            if let Some(name) = ASIDE.iter().find(|name| **name == path) {
                self.keep_aside(name)?;
            } else if let Some(file) = wanted(path, entry) {
                return Ok(Some(file));
            }
        }
    }

    fn read(&mut self, buffer: &mut [u8]) -> Result<usize, SourceError> {
        if self.content.is_empty() && !self.more()? {
            return Ok(0);
        }
        let len = buffer.len().min(self.content.len());
        self.content.copy_to_slice(&mut buffer[..len]);
        Ok(len)
    }
}

/// The file, unless it is one that the walk over a local directory leaves out too.
fn wanted(path: String, entry: TarEntry) -> Option<SourceFile> {
    let (dir, name) = path.rsplit_once('/').unwrap_or(("", &path));
    let below_empty =
        EMPTY_DIRS.iter().any(|empty| path.starts_with(empty) && path[empty.len()..].starts_with('/'));
    if is_left_out(dir, name, &[]) || (below_empty && path != "pg_wal/archive_status") {
        return None;
    }
    let kind = match entry.kind {
        TarKind::File => FileKind::Regular,
        TarKind::Directory => FileKind::Directory,
        // The directory's links were made from the list of tablespaces.
        TarKind::Link(_) => return None,
    };
    let size = if kind == FileKind::Regular { entry.size } else { 0 };
    let stat = FileStat { size, mode: entry.mode, ..FileStat::default() };
    Some(SourceFile { path, kind, stat })
}
