//! A target in a directory: a local disk or NFS.
//!
//! An object is a file of the same name. `create`: write to a temporary name in the same
//! directory → sync the file → rename without replacing → sync the directory, and each directory
//! that was made on the way. A crash leaves at most a temporary file, which no listing shows.

use std::collections::VecDeque;
use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::ops::Range;
use std::os::unix::fs::{DirBuilderExt, FileExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use async_trait::async_trait;
use bytes::Bytes;
use dr_core::Timestamp;
use dr_core::guard::Guard;
use dr_core::port::{Capabilities, Key, ObjectInfo, Payload, StorageError, StorageTarget};
use futures_util::StreamExt;
use futures_util::stream::{self, BoxStream};
use rustix::fs::{CWD, RenameFlags, renameat_with};

use crate::os;

/// Marks temporary files; no key can hold this character.
const TEMPORARY: &str = "~dr";

/// Bytes after which the kernel is asked to begin writing.
const EARLY: u64 = 4 << 20;

/// How a directory is used.
#[derive(Clone, Copy, Debug)]
pub struct DirectoryOptions {
    /// Make the directory when it is not there.
    pub create: bool,
    /// Sync before success is reported. Only scratch repositories of benches go without.
    pub sync: bool,
}

impl Default for DirectoryOptions {
    fn default() -> Self {
        DirectoryOptions { create: false, sync: true }
    }
}

/// Steps whose order the durability rests on, recorded in tests.
type Trace = std::sync::Mutex<Vec<String>>;

#[derive(Debug)]
struct Inner {
    root: PathBuf,
    sync: bool,
    poisoned: AtomicBool,
    counter: AtomicU64,
    trace: Option<Trace>,
    /// Test hook: the next file sync fails.
    fail_sync: AtomicBool,
}

/// A target in a directory. Cloning is cheap.
#[derive(Clone, Debug)]
pub struct DirectoryTarget {
    inner: Arc<Inner>,
}

impl DirectoryTarget {
    /// Opens a directory as a target.
    pub fn open(root: impl Into<PathBuf>, options: DirectoryOptions) -> Result<Self, StorageError> {
        Self::with_trace(root.into(), options, None)
    }

    fn with_trace(
        root: PathBuf,
        options: DirectoryOptions,
        trace: Option<Trace>,
    ) -> Result<Self, StorageError> {
        let target = root.display().to_string();
        if !root.is_absolute() {
            return Err(StorageError::Invalid { target, reason: "the path must be absolute".into() });
        }
        if options.create {
            fs::DirBuilder::new().recursive(true).mode(0o750).create(&root).map_err(|error| {
                StorageError::Invalid {
                    target: target.clone(),
                    reason: format!("cannot be created: {error}"),
                }
            })?;
        }
        match fs::metadata(&root) {
            Ok(meta) if meta.is_dir() => {}
            Ok(_) => return Err(StorageError::Invalid { target, reason: "it is not a directory".into() }),
            Err(error) => return Err(StorageError::Invalid { target, reason: error.to_string() }),
        }
        let inner = Inner {
            root,
            sync: options.sync,
            poisoned: AtomicBool::new(false),
            counter: AtomicU64::new(0),
            trace,
            fail_sync: AtomicBool::new(false),
        };
        Ok(DirectoryTarget { inner: Arc::new(inner) })
    }

    async fn blocking<T: Send + 'static>(
        &self,
        operation: &'static str,
        key: &Key,
        work: impl FnOnce(&Inner) -> Result<T, Failed> + Send + 'static,
    ) -> Result<T, StorageError> {
        let inner = self.inner.clone();
        let done = tokio::task::spawn_blocking(move || work(&inner)).await;
        let place = self.location();
        match done {
            Ok(result) => result.map_err(|failed| failed.explain(operation, key.to_string(), place)),
            Err(error) => Err(StorageError::Indeterminate {
                operation,
                key: key.to_string(),
                target: place,
                source: Box::new(error),
            }),
        }
    }
}

/// Why a step failed, before the object is named.
enum Failed {
    Io(io::Error),
    Exists,
    Poisoned,
    Short { size: u64, needed: u64 },
}

impl From<io::Error> for Failed {
    fn from(error: io::Error) -> Self {
        Failed::Io(error)
    }
}

impl From<rustix::io::Errno> for Failed {
    fn from(errno: rustix::io::Errno) -> Self {
        Failed::Io(errno.into())
    }
}

impl Failed {
    fn explain(self, operation: &'static str, key: String, target: String) -> StorageError {
        let error = match self {
            Failed::Exists => return StorageError::AlreadyExists { key, target },
            Failed::Poisoned => return StorageError::Poisoned { target },
            Failed::Short { size, needed } => return StorageError::Truncated { key, target, size, needed },
            Failed::Io(error) => error,
        };
        let kind = error.kind();
        let source = Box::new(error);
        match kind {
            io::ErrorKind::NotFound => StorageError::NotFound { key, target },
            io::ErrorKind::PermissionDenied | io::ErrorKind::ReadOnlyFilesystem => {
                StorageError::Denied { operation, key, target, source }
            }
            io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => {
                StorageError::Full { operation, key, target, source }
            }
            _ => StorageError::Unavailable { operation, key, target, source },
        }
    }
}

impl Inner {
    fn path(&self, key: &Key) -> PathBuf {
        self.root.join(key.as_str())
    }

    fn note(&self, step: impl FnOnce() -> String) {
        if let Some(trace) = &self.trace
            && let Ok(mut trace) = trace.lock()
        {
            trace.push(step());
        }
    }

    fn check_poison(&self) -> Result<(), Failed> {
        if self.poisoned.load(Ordering::Acquire) && Guard::PoisonAfterSyncFailure.holds() {
            return Err(Failed::Poisoned);
        }
        Ok(())
    }

    /// A sync that failed may have lost data of earlier writes too: nothing is trusted after it.
    fn synced(&self, result: io::Result<()>) -> Result<(), Failed> {
        result.map_err(|error| {
            self.poisoned.store(true, Ordering::Release);
            Failed::Io(error)
        })
    }

    fn create(&self, key: &Key, payload: &Payload) -> Result<(), Failed> {
        self.check_poison()?;
        let place = self.path(key);
        let parent = place.parent().unwrap_or(&self.root);
        // A cheap look saves writing what cannot be put in place; the rename decides.
        if Guard::CreateOnly.holds() && place.symlink_metadata().is_ok() {
            return Err(Failed::Exists);
        }
        self.make_parents(parent)?;
        let number = self.counter.fetch_add(1, Ordering::Relaxed);
        let temporary = parent.join(format!("{TEMPORARY}-{}-{number}", std::process::id()));
        let result = self.write_and_rename(&temporary, &place, parent, payload);
        if result.is_err() {
            let _ = fs::remove_file(&temporary);
        }
        result
    }

    fn write_and_rename(
        &self,
        temporary: &Path,
        place: &Path,
        parent: &Path,
        payload: &Payload,
    ) -> Result<(), Failed> {
        let durable = self.sync && Guard::DurableBeforeOk.holds();
        let mut file = OpenOptions::new().write(true).create_new(true).mode(0o640).open(temporary)?;
        let (mut written, mut begun) = (0, 0);
        for piece in payload.pieces() {
            file.write_all(piece)?;
            written += piece.len() as u64;
            if durable && written - begun >= EARLY {
                os::write_back_early(&file, begun, written - begun);
                begun = written;
            }
        }
        if durable {
            self.note(|| "sync file".into());
            self.synced(self.sync_file(&file))?;
        }
        drop(file);
        self.note(|| "rename".into());
        rename_new(temporary, place)?;
        if durable {
            self.note(|| "sync directory".into());
            self.synced(os::sync_directory(parent))?;
        }
        // Another writer's failed sync may have hit this file too.
        self.check_poison()
    }

    fn sync_file(&self, file: &File) -> io::Result<()> {
        if self.fail_sync.swap(false, Ordering::Relaxed) {
            return Err(io::Error::other("an input/output error (planted)"));
        }
        file.sync_data()
    }

    /// Makes missing directories, each synced into its parent.
    fn make_parents(&self, dir: &Path) -> Result<(), Failed> {
        if dir.is_dir() {
            return Ok(());
        }
        if let Some(parent) = dir.parent() {
            self.make_parents(parent)?;
            match fs::DirBuilder::new().mode(0o750).create(dir) {
                Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
                other => other?,
            }
            if self.sync {
                self.note(|| "sync new directory".into());
                self.synced(os::sync_directory(parent))?;
            }
        }
        Ok(())
    }

    fn get(&self, key: &Key, range: Option<Range<u64>>) -> Result<Bytes, Failed> {
        let file = File::open(self.path(key))?;
        let size = file.metadata()?.len();
        let range = range.unwrap_or(0..size);
        if range.end > size || range.start > range.end {
            return Err(Failed::Short { size, needed: range.end });
        }
        let mut bytes = vec![0; (range.end - range.start) as usize];
        file.read_exact_at(&mut bytes, range.start)?;
        Ok(bytes.into())
    }

    fn info(&self, key: Key) -> Result<ObjectInfo, Failed> {
        let meta = fs::metadata(self.path(&key))?;
        let modified =
            Timestamp::new(meta.mtime(), meta.mtime_nsec() as i32).unwrap_or(Timestamp::UNIX_EPOCH);
        Ok(ObjectInfo { key, size: meta.len(), modified })
    }

    /// Names in one directory, sorted; temporary files and foreign names left out.
    fn names(&self, dir: &str) -> Result<Vec<(String, bool)>, Failed> {
        let entries = match fs::read_dir(self.root.join(dir)) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
            other => other?,
        };
        let mut names = Vec::new();
        for entry in entries {
            let entry = entry?;
            let Ok(name) = entry.file_name().into_string() else { continue };
            if !name.starts_with(TEMPORARY) {
                names.push((name, entry.file_type()?.is_dir()));
            }
        }
        // Order of whole keys: a directory sorts as its name and the slash that follows.
        names.sort_by_cached_key(|(name, is_dir)| if *is_dir { format!("{name}/") } else { name.clone() });
        Ok(names)
    }
}

/// Renames without replacing: atomic, and refused when the name exists.
fn rename_new(from: &Path, to: &Path) -> Result<(), Failed> {
    if !Guard::CreateOnly.holds() {
        // tidy: allow(rename): what this guard prevents
        return Ok(rustix::fs::rename(from, to)?);
    }
    match renameat_with(CWD, from, CWD, to, RenameFlags::NOREPLACE) {
        Ok(()) => Ok(()),
        Err(rustix::io::Errno::EXIST) => Err(Failed::Exists),
        // NFS and some others do not know the flag: a hard link refuses an existing name too.
        Err(rustix::io::Errno::INVAL | rustix::io::Errno::NOSYS | rustix::io::Errno::OPNOTSUPP) => {
            match fs::hard_link(from, to) {
                Ok(()) => Ok(fs::remove_file(from)?),
                Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Err(Failed::Exists),
                Err(error) => Err(error.into()),
            }
        }
        Err(errno) => Err(errno.into()),
    }
}

#[async_trait]
impl StorageTarget for DirectoryTarget {
    fn location(&self) -> String {
        self.inner.root.display().to_string()
    }

    fn capabilities(&self) -> Capabilities {
        Capabilities { create_only: true, local: true }
    }

    async fn create(&self, key: &Key, payload: Payload) -> Result<(), StorageError> {
        let object = key.clone();
        self.blocking("create", key, move |inner| inner.create(&object, &payload)).await
    }

    async fn get(&self, key: &Key, range: Option<Range<u64>>) -> Result<Bytes, StorageError> {
        let object = key.clone();
        self.blocking("read", key, move |inner| inner.get(&object, range)).await
    }

    async fn head(&self, key: &Key) -> Result<ObjectInfo, StorageError> {
        let object = key.clone();
        self.blocking("look at", key, move |inner| inner.info(object)).await
    }

    fn list<'a>(
        &'a self,
        prefix: &'a str,
        after: Option<&'a Key>,
    ) -> BoxStream<'a, Result<ObjectInfo, StorageError>> {
        // A stack of directories under way: memory is bounded by the names along one path.
        let state = ListState { open: VecDeque::from([Pending::Directory(prefix.to_owned())]) };
        stream::try_unfold(state, move |mut state| async move {
            while let Some(next) = state.open.pop_front() {
                match next {
                    Pending::Directory(dir) => state.enter(self, dir, after).await?,
                    Pending::Object(key) => {
                        let object = key.clone();
                        let found = self.blocking("look at", &key, move |inner| inner.info(object)).await;
                        match found {
                            Ok(info) => return Ok(Some((info, state))),
                            // Deleted between listing and look.
                            Err(StorageError::NotFound { .. }) => {}
                            Err(error) => return Err(error),
                        }
                    }
                }
            }
            Ok(None)
        })
        .boxed()
    }

    async fn list_parts(&self, prefix: &str) -> Result<Vec<String>, StorageError> {
        let dir = prefix.to_owned();
        let names = self.names(dir).await?;
        let mut parts: Vec<String> = names.into_iter().map(|(name, _)| name).collect();
        parts.sort_unstable();
        Ok(parts)
    }

    async fn delete(&self, key: &Key) -> Result<(), StorageError> {
        let object = key.clone();
        self.blocking("delete", key, move |inner| match fs::remove_file(inner.path(&object)) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
            other => Ok(other?),
        })
        .await
    }
}

impl DirectoryTarget {
    async fn names(&self, dir: String) -> Result<Vec<(String, bool)>, StorageError> {
        let inner = self.inner.clone();
        let shown = dir.clone();
        let done = tokio::task::spawn_blocking(move || inner.names(&dir)).await;
        match done {
            Ok(result) => result.map_err(|failed| failed.explain("list", shown, self.location())),
            Err(error) => Err(StorageError::Unavailable {
                operation: "list",
                key: shown,
                target: self.location(),
                source: Box::new(error),
            }),
        }
    }
}

enum Pending {
    Directory(String),
    Object(Key),
}

struct ListState {
    open: VecDeque<Pending>,
}

impl ListState {
    /// Puts a directory's content before everything that is pending.
    async fn enter(
        &mut self,
        target: &DirectoryTarget,
        dir: String,
        after: Option<&Key>,
    ) -> Result<(), StorageError> {
        let names = target.names(dir.clone()).await?;
        for (name, is_dir) in names.into_iter().rev() {
            let path = format!("{dir}{name}");
            if is_dir {
                let path = format!("{path}/");
                // A whole directory before the mark is not opened.
                let behind =
                    after.is_some_and(|a| path.as_str() < a.as_str() && !a.as_str().starts_with(&path));
                if !behind {
                    self.open.push_front(Pending::Directory(path));
                }
            } else if let Ok(key) = Key::new(path)
                && after.is_none_or(|a| key > *a)
            {
                self.open.push_front(Pending::Object(key));
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn traced() -> (tempfile::TempDir, DirectoryTarget) {
        let dir = tempfile::tempdir().expect("a directory");
        let options = DirectoryOptions::default();
        let target = DirectoryTarget::with_trace(dir.path().to_owned(), options, Some(Trace::default()));
        (dir, target.expect("a target"))
    }

    fn key(name: &str) -> Key {
        Key::new(name).expect("a key")
    }

    #[tokio::test]
    async fn success_is_reported_after_file_and_directories_are_synced() {
        let (_dir, target) = traced();
        target.create(&key("a/b"), b"x".to_vec().into()).await.expect("a create");
        let trace = target.inner.trace.as_ref().expect("a trace").lock().expect("a lock").clone();
        assert_eq!(trace, ["sync new directory", "sync file", "rename", "sync directory"]);
    }

    #[tokio::test]
    async fn after_a_failed_sync_no_success_is_reported() {
        let (_dir, target) = traced();
        target.inner.fail_sync.store(true, Ordering::Relaxed);
        assert!(target.create(&key("a"), b"x".to_vec().into()).await.is_err());
        assert!(matches!(
            target.create(&key("b"), b"x".to_vec().into()).await,
            Err(StorageError::Poisoned { .. })
        ));
        assert!(matches!(target.head(&key("a")).await, Err(StorageError::NotFound { .. })));
    }

    #[tokio::test]
    async fn temporary_files_are_never_listed() {
        let (dir, target) = traced();
        target.create(&key("a/b"), b"x".to_vec().into()).await.expect("a create");
        fs::write(dir.path().join(format!("a/{TEMPORARY}-1-1")), b"left by a crash").expect("a write");
        let listed: Vec<_> = target.list("", None).collect().await;
        assert_eq!(listed.len(), 1);
    }

    #[tokio::test]
    async fn a_wrong_address_is_refused_with_its_reason() {
        for path in ["relative", "/nonexistent/place"] {
            let opened = DirectoryTarget::open(path, DirectoryOptions::default());
            assert!(matches!(opened, Err(StorageError::Invalid { .. })), "{path}");
        }
    }
}
