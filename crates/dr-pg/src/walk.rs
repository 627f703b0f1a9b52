//! The files of a cluster, in order, one directory in memory at a time.
//!
//! What is left out is what `pg_basebackup` leaves out (`src/backend/backup/basebackup.c`,
//! `excludeFiles`, `excludeDirContents`), because PostgreSQL makes it anew.

use std::ffi::OsStr;
use std::fs::{self, Metadata};
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use dr_core::path::encode;
use dr_core::port::{FileKind, FileStat, SourceError, SourceFile};

/// Directories that are kept empty.
pub(crate) const EMPTY_DIRS: [&str; 8] = [
    "pg_dynshmem",
    "pg_notify",
    "pg_replslot",
    "pg_serial",
    "pg_snapshots",
    "pg_stat_tmp",
    "pg_subtrans",
    "pg_wal",
];

/// Files of the data directory itself that are left out.
const ROOT_FILES: [&str; 12] = [
    "backup_label",
    "backup_label.old",
    "tablespace_map",
    "tablespace_map.old",
    "backup_manifest",
    "postgresql.auto.conf.tmp",
    "current_logfiles",
    "current_logfiles.tmp",
    "postmaster.pid",
    "postmaster.opts",
    "recovery.signal",
    "standby.signal",
];

/// Walks a data directory in the order of `dr_core::path::compare`.
#[derive(Debug)]
pub struct TreeWalk {
    root: PathBuf,
    /// Directories under way, each with its sorted names that are still to come.
    open: Vec<OpenDir>,
    started: bool,
    /// An empty `pg_wal/archive_status` follows `pg_wal`.
    extra: Option<SourceFile>,
    /// The cluster's directory in each tablespace; `None`: all are taken.
    version_dir: Option<String>,
}

#[derive(Debug)]
struct OpenDir {
    /// Path below the root, encoded; empty for the root.
    path: String,
    names: Names,
    /// Main files of unlogged relations here are left out: `(file number)` of init forks.
    unlogged: Vec<u64>,
}

/// Names of one directory in one piece of memory: 6 million names cost their bytes and four more
/// each.
#[derive(Debug, Default)]
struct Names {
    bytes: Vec<u8>,
    ends: Vec<u32>,
    order: Vec<u32>,
    next: usize,
}

impl Names {
    fn push(&mut self, name: &[u8]) {
        self.bytes.extend_from_slice(name);
        self.ends.push(self.bytes.len() as u32);
    }

    fn get(&self, index: usize) -> &[u8] {
        let start = if index == 0 { 0 } else { self.ends[index - 1] as usize };
        &self.bytes[start..self.ends[index] as usize]
    }

    fn sort(&mut self) {
        let mut order: Vec<u32> = (0..self.ends.len() as u32).collect();
        // Encoded names decide, as they do for the walk's order.
        order.sort_unstable_by(|a, b| {
            let (a, b) = (self.get(*a as usize), self.get(*b as usize));
            if a.is_ascii() && b.is_ascii() && !a.contains(&b'%') && !b.contains(&b'%') {
                a.cmp(b)
            } else {
                encode(a).cmp(&encode(b))
            }
        });
        self.order = order;
    }

    fn next(&mut self) -> Option<Vec<u8>> {
        let index = *self.order.get(self.next)?;
        self.next += 1;
        Some(self.get(index as usize).to_vec())
    }
}

impl TreeWalk {
    /// A walk over the data directory at `root`.
    pub fn new(root: &Path) -> Self {
        TreeWalk { root: root.to_owned(), open: Vec::new(), started: false, extra: None, version_dir: None }
    }

    /// Takes of each tablespace only the directory of this major version and catalogue version
    /// (`TABLESPACE_VERSION_DIRECTORY` in `relpath.h`): an upgrade leaves the old cluster's beside it.
    pub fn of_version(mut self, major: u32, catalog_version: u32) -> Self {
        self.version_dir = Some(format!("PG_{major}_{catalog_version}"));
        self
    }

    fn place(&self, path: &str) -> PathBuf {
        self.root.join(OsStr::from_bytes(&dr_core::path::decode(path)))
    }

    fn enter(&mut self, path: String) -> Result<(), SourceError> {
        let place = self.place(&path);
        let mut names = Names::default();
        let mut unlogged = Vec::new();
        let entries = match fs::read_dir(&place) {
            Ok(entries) => entries,
            // A database was dropped meanwhile.
            Err(error) if error.kind() == io::ErrorKind::NotFound && !path.is_empty() => return Ok(()),
            Err(source) => return Err(file_error("look into", &place, source)),
        };
        for entry in entries {
            let entry = entry.map_err(|source| file_error("look into", &place, source))?;
            let name = entry.file_name();
            if let Some(node) =
                name.to_str().and_then(|n| n.strip_suffix("_init")).and_then(|n| n.parse().ok())
            {
                unlogged.push(node);
            }
            names.push(name.as_bytes());
        }
        names.sort();
        unlogged.sort_unstable();
        self.open.push(OpenDir { path, names, unlogged });
        Ok(())
    }

    fn step(&mut self) -> Option<Result<SourceFile, SourceError>> {
        if let Some(extra) = self.extra.take() {
            return Some(Ok(extra));
        }
        if !self.started {
            self.started = true;
            if let Err(error) = self.enter(String::new()) {
                return Some(Err(error));
            }
        }
        loop {
            let dir = self.open.last_mut()?;
            let Some(name) = dir.names.next() else {
                self.open.pop();
                continue;
            };
            let encoded = encode(&name);
            let path = if dir.path.is_empty() { encoded.clone() } else { format!("{}/{encoded}", dir.path) };
            let other_version = is_tablespace(&dir.path)
                && self.version_dir.as_ref().is_some_and(|version| *version != encoded);
            if other_version || is_left_out(&dir.path, &encoded, &dir.unlogged) {
                continue;
            }
            match self.visit(path) {
                Ok(Some(file)) => return Some(Ok(file)),
                Ok(None) => {}
                Err(error) => return Some(Err(error)),
            }
        }
    }

    fn visit(&mut self, path: String) -> Result<Option<SourceFile>, SourceError> {
        let place = self.place(&path);
        let meta = match fs::symlink_metadata(&place) {
            Ok(meta) => meta,
            // It vanished after its name was read: dropped relations do.
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(source) => return Err(file_error("look at", &place, source)),
        };
        if meta.is_symlink() {
            return self.link(path, &place);
        }
        if meta.is_dir() {
            return self.directory(path, &meta).map(Some);
        }
        // Sockets, devices and pipes are not part of a cluster.
        Ok(meta.is_file().then(|| SourceFile { path, kind: FileKind::Regular, stat: stat_of(&meta) }))
    }

    fn directory(&mut self, path: String, meta: &Metadata) -> Result<SourceFile, SourceError> {
        let stat = FileStat { mode: meta.mode() & 0o7777, ..FileStat::default() };
        let file = SourceFile { path: path.clone(), kind: FileKind::Directory, stat };
        if path == "pg_wal" {
            let path = "pg_wal/archive_status".to_owned();
            self.extra = Some(SourceFile { path, kind: FileKind::Directory, stat });
        } else if !EMPTY_DIRS.contains(&path.as_str()) {
            self.enter(path)?;
        }
        Ok(file)
    }

    /// A tablespace's link is kept and followed; `pg_wal` kept elsewhere becomes a directory;
    /// any other link is followed as what it points to.
    fn link(&mut self, path: String, place: &Path) -> Result<Option<SourceFile>, SourceError> {
        let meta = match fs::metadata(place) {
            Ok(meta) => meta,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(source) => return Err(file_error("look at", place, source)),
        };
        if path.starts_with("pg_tblspc/") && meta.is_dir() {
            let target = fs::read_link(place).map_err(|source| file_error("read the link", place, source))?;
            let target = encode(target.as_os_str().as_bytes());
            self.enter(path.clone())?;
            let stat = FileStat { mode: 0o777, ..FileStat::default() };
            return Ok(Some(SourceFile { path, kind: FileKind::Link(target), stat }));
        }
        if meta.is_dir() {
            return self.directory(path, &meta).map(Some);
        }
        Ok(meta.is_file().then(|| SourceFile { path, kind: FileKind::Regular, stat: stat_of(&meta) }))
    }
}

impl Iterator for TreeWalk {
    type Item = Result<SourceFile, SourceError>;

    fn next(&mut self) -> Option<Self::Item> {
        self.step()
    }
}

/// Whether `pg_basebackup` leaves this out.
pub(crate) fn is_left_out(dir: &str, name: &str, unlogged: &[u64]) -> bool {
    if name.starts_with("pgsql_tmp") || name.starts_with("pg_internal.init") {
        return true;
    }
    match dir {
        "" => {
            ROOT_FILES.contains(&name) || name == "dr-restore.json" || name == crate::instance::sockets::NAME
        }
        // The stream gives a directory's files on their own.
        dir if dir.split('/').next() == Some(crate::instance::sockets::NAME) => true,
        "global" => name == "pg_control" || name == "pg_control.dr",
        _ if dir.starts_with("base/") || (dir.starts_with("pg_tblspc/") && dir.contains("/PG_")) => {
            is_temporary(name) || is_unlogged(name, unlogged)
        }
        _ => false,
    }
}

/// Whether this is `pg_tblspc/<oid>`.
fn is_tablespace(dir: &str) -> bool {
    dir.strip_prefix("pg_tblspc/").is_some_and(|oid| !oid.contains('/'))
}

/// Temporary relations: `t<backend>_<file>` with any fork or segment.
fn is_temporary(name: &str) -> bool {
    let Some((backend, rest)) = name.strip_prefix('t').and_then(|rest| rest.split_once('_')) else {
        return false;
    };
    let digits = |text: &str| !text.is_empty() && text.bytes().all(|b| b.is_ascii_digit());
    let node = rest.find(|c: char| !c.is_ascii_digit()).map_or(rest, |at| &rest[..at]);
    digits(backend) && digits(node)
}

/// Forks of an unlogged relation other than its init fork: they are emptied at recovery.
fn is_unlogged(name: &str, unlogged: &[u64]) -> bool {
    let end = name.find(|c: char| !c.is_ascii_digit()).unwrap_or(name.len());
    let Ok(node) = name[..end].parse::<u64>() else { return false };
    let rest = &name[end..];
    let fork = rest.split('.').next().unwrap_or("");
    matches!(fork, "" | "_fsm" | "_vm") && unlogged.binary_search(&node).is_ok()
}

pub(crate) fn stat_of(meta: &Metadata) -> FileStat {
    FileStat {
        size: meta.size(),
        mode: meta.mode() & 0o7777,
        mtime_ns: meta.mtime() * 1_000_000_000 + meta.mtime_nsec(),
        ctime_ns: meta.ctime() * 1_000_000_000 + meta.ctime_nsec(),
        inode: meta.ino(),
        device: meta.dev(),
    }
}

pub(crate) fn file_error(operation: &'static str, path: &Path, source: io::Error) -> SourceError {
    SourceError::File { operation, path: path.display().to_string(), source }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_walk_is_ordered_and_leaves_out_what_postgresql_makes_anew() {
        let dir = tempfile::tempdir().expect("a directory");
        for path in [
            "PG_VERSION",
            "base/1/10",
            "base/1/2",
            "base/1/t3_55",
            "base/1/t3_55_fsm.1",
            "base/1/70",
            "base/1/70_init",
            "base/1/70_vm",
            "base/1/70.1",
            "base/1/7",
            "base/1/pg_internal.init",
            "base/pgsql_tmp/x",
            "base/1-x",
            "global/pg_control",
            "global/1262",
            "pg_wal/000000010000000000000001",
            "pg_notify/0000",
            "postmaster.pid",
            "backup_label",
            "recovery.signal",
            "dr-socket/hba",
            "pg_logical/snapshots/x",
        ] {
            let place = dir.path().join(path);
            fs::create_dir_all(place.parent().expect("a parent")).expect("a directory");
            fs::write(place, path).expect("a file");
        }
        let walked: Vec<String> = TreeWalk::new(dir.path()).map(|file| file.expect("a file").path).collect();
        let expected = [
            "PG_VERSION",
            "base",
            "base/1",
            "base/1/10",
            "base/1/2",
            "base/1/7",
            "base/1/70_init",
            "base/1-x",
            "global",
            "global/1262",
            "pg_logical",
            "pg_logical/snapshots",
            "pg_logical/snapshots/x",
            "pg_notify",
            "pg_wal",
            "pg_wal/archive_status",
        ];
        assert_eq!(walked, expected);
        assert!(is_left_out("dr-socket", "hba", &[]) && is_left_out("dr-socket/x", "y", &[]));
        assert!(!is_left_out("dr-socket2", "hba", &[]) && !is_left_out("base/dr-socket", "hba", &[]));
        assert!(walked.is_sorted_by(|a, b| dr_core::path::compare(a, b).is_lt()));
    }
}
