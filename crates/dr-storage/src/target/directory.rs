//! A target in a directory: a local disk or NFS.
//!
//! An object is a file of the same name. `create`: write to a temporary name in the same
//! directory → sync the file → rename without replacing → sync the directory, and each directory
//! that was made on the way. A crash leaves at most a temporary file, which no listing shows; or the
//! object itself, named and not yet synced: whoever finds a name taken syncs it before saying so.

use std::collections::VecDeque;
use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::ops::Range;
use std::os::unix::fs::{DirBuilderExt, FileExt, MetadataExt, OpenOptionsExt, chown, fchown};
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

/// A step on the disk. The order of some is what durability rests on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DiskStep {
    /// A directory is made.
    MakeDirectory,
    /// The directory that holds a new one is synced.
    SyncNewDirectory,
    /// A temporary file is made.
    Open,
    /// A piece is written.
    Write,
    /// The file is synced.
    SyncFile,
    /// The file gets its name.
    Rename,
    /// It has its name; a fault here is an answer that was lost, as on a network file system.
    Renamed,
    /// The directory is synced.
    SyncDirectory,
    /// A file that was there before is synced, with its directories.
    SyncExisting,
    /// An object is read.
    Read,
    /// A directory is listed.
    List,
}

/// Sees each step before it is done, and may let it fail: for tests.
pub trait DiskProbe: Send + Sync + std::fmt::Debug {
    /// An error is what the operating system would answer.
    fn step(&self, step: DiskStep) -> io::Result<()>;
}

#[derive(Debug)]
struct Inner {
    root: PathBuf,
    sync: bool,
    poisoned: AtomicBool,
    counter: AtomicU64,
    probe: Option<Arc<dyn DiskProbe>>,
    /// Whom the superuser works for here: what it makes is made over to them, or a single job of its
    /// would lock the server's user out of its own repository.
    owner: Option<(u32, u32)>,
}

/// A target in a directory. Cloning is cheap.
#[derive(Clone, Debug)]
pub struct DirectoryTarget {
    inner: Arc<Inner>,
}

impl DirectoryTarget {
    /// Opens a directory as a target.
    pub fn open(root: impl Into<PathBuf>, options: DirectoryOptions) -> Result<Self, StorageError> {
        Self::open_probed(root, options, None)
    }

    /// The same, each step on the disk seen by a probe.
    pub fn open_probed(
        root: impl Into<PathBuf>,
        options: DirectoryOptions,
        probe: Option<Arc<dyn DiskProbe>>,
    ) -> Result<Self, StorageError> {
        let root = root.into();
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
        let owner = match fs::metadata(&root) {
            Ok(meta) if meta.is_dir() => os::is_superuser().then_some((meta.uid(), meta.gid())),
            Ok(_) => return Err(StorageError::Invalid { target, reason: "it is not a directory".into() }),
            Err(error) => return Err(StorageError::Invalid { target, reason: error.to_string() }),
        };
        let inner = Inner {
            root,
            sync: options.sync,
            poisoned: AtomicBool::new(false),
            counter: AtomicU64::new(0),
            probe,
            owner,
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
            // It panicked or was cut short: nobody can say how far it came.
            Err(error) => {
                self.inner.poisoned.store(true, Ordering::Release);
                let (key, source) = (key.to_string(), Box::new(error));
                Err(StorageError::Unavailable { operation, key, target: place, source })
            }
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

    fn step(&self, step: DiskStep) -> io::Result<()> {
        self.probe.as_ref().map_or(Ok(()), |probe| probe.step(step))
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
            return self.settle(&place);
        }
        self.make_parents(parent)?;
        let number = self.counter.fetch_add(1, Ordering::Relaxed);
        let temporary = parent.join(format!("{TEMPORARY}-{}-{number}", std::process::id()));
        let result = self.write_and_rename(&temporary, &place, parent, payload);
        if result.is_err() {
            let _ = fs::remove_file(&temporary);
        }
        match result {
            Err(Failed::Exists) => self.settle(&place),
            other => other,
        }
    }

    /// Says that a name is taken, once what has it is durable: whoever put it there may have died
    /// before its directory was synced, and equal content is as good as stored to the caller.
    fn settle(&self, place: &Path) -> Result<(), Failed> {
        if self.is_durable() {
            let sync = || {
                self.step(DiskStep::SyncExisting)?;
                File::open(place)?.sync_data()?;
                let mut above = place.ancestors().skip(1).take_while(|dir| dir.starts_with(&self.root));
                above.try_for_each(os::sync_directory)
            };
            self.synced(sync())?;
        }
        Err(Failed::Exists)
    }

    fn is_durable(&self) -> bool {
        self.sync && Guard::DurableBeforeOk.holds()
    }

    fn write_and_rename(
        &self,
        temporary: &Path,
        place: &Path,
        parent: &Path,
        payload: &Payload,
    ) -> Result<(), Failed> {
        let durable = self.is_durable();
        self.step(DiskStep::Open)?;
        let mut file = OpenOptions::new().write(true).create_new(true).mode(0o640).open(temporary)?;
        if let Some((user, group)) = self.owner {
            // An NFS server may not let the superuser do that; there it is nobody special anyway.
            let _ = fchown(&file, Some(user), Some(group));
        }
        let (mut written, mut begun) = (0, 0);
        for piece in payload.pieces() {
            self.step(DiskStep::Write)?;
            file.write_all(piece)?;
            written += piece.len() as u64;
            if durable && written - begun >= EARLY {
                os::write_back_early(&file, begun, written - begun);
                begun = written;
            }
        }
        if durable {
            self.synced(self.step(DiskStep::SyncFile).and_then(|()| file.sync_data()))?;
        }
        let renamed =
            self.step(DiskStep::Rename).map_err(Failed::Io).and_then(|()| rename_new(temporary, place));
        let renamed = renamed.and_then(|()| Ok(self.step(DiskStep::Renamed)?));
        match renamed {
            Err(Failed::Io(error)) => self.ask_after(&file, place, error)?,
            other => other?,
        }
        if durable {
            self.synced(self.step(DiskStep::SyncDirectory).and_then(|()| os::sync_directory(parent)))?;
        }
        // Another writer's failed sync may have hit this file too.
        self.check_poison()
    }

    /// Whether a rename happened that was answered with an error: a network file system may lose the
    /// answer. The file itself tells. Where it does not, nobody could say what is durable here.
    fn ask_after(&self, file: &File, place: &Path, error: io::Error) -> Result<(), Failed> {
        let identity = |meta: fs::Metadata| (meta.dev(), meta.ino());
        match (file.metadata().map(identity), fs::symlink_metadata(place).map(identity)) {
            (Ok(ours), Ok(there)) if ours == there => Ok(()),
            (Ok(_), Ok(_)) => Err(Failed::Exists),
            (_, Err(missing)) if missing.kind() == io::ErrorKind::NotFound => Err(Failed::Io(error)),
            _ => self.synced(Err(error)),
        }
    }

    /// Makes missing directories, each synced into its parent.
    fn make_parents(&self, dir: &Path) -> Result<(), Failed> {
        if dir.is_dir() {
            return Ok(());
        }
        if let Some(parent) = dir.parent() {
            self.make_parents(parent)?;
            self.step(DiskStep::MakeDirectory)?;
            match fs::DirBuilder::new().mode(0o750).create(dir) {
                Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
                Ok(()) => {
                    if let Some((user, group)) = self.owner {
                        let _ = chown(dir, Some(user), Some(group));
                    }
                }
                other => other?,
            }
            if self.sync {
                let step = self.step(DiskStep::SyncNewDirectory);
                self.synced(step.and_then(|()| os::sync_directory(parent)))?;
            }
        }
        Ok(())
    }

    fn get(&self, key: &Key, range: Option<Range<u64>>) -> Result<Bytes, Failed> {
        self.step(DiskStep::Read)?;
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
        self.step(DiskStep::List)?;
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
            link_new(from, to)
        }
        Err(errno) => Err(errno.into()),
    }
}

/// The same by a second name, and the first one removed.
fn link_new(from: &Path, to: &Path) -> Result<(), Failed> {
    let same = || {
        let (ours, there) = (fs::metadata(from).ok()?, fs::metadata(to).ok()?);
        Some((ours.dev(), ours.ino()) == (there.dev(), there.ino()))
    };
    match fs::hard_link(from, to) {
        // A link that was made and whose answer was lost is asked for again by the kernel, and then
        // exists (link(2), "BUGS").
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists && same() == Some(true) => {}
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => return Err(Failed::Exists),
        other => other?,
    }
    // Left behind it is a temporary file, which no listing shows.
    let _ = fs::remove_file(from);
    Ok(())
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

    use std::sync::Mutex;

    /// Records steps; one kind of step fails once.
    #[derive(Debug, Default)]
    struct Trace {
        steps: Mutex<Vec<DiskStep>>,
        fails: Mutex<Option<DiskStep>>,
    }

    impl DiskProbe for Trace {
        fn step(&self, step: DiskStep) -> io::Result<()> {
            self.steps.lock().expect("a lock").push(step);
            let mut fails = self.fails.lock().expect("a lock");
            match *fails {
                Some(planted) if planted == step => {
                    *fails = None;
                    Err(io::Error::other("an input/output error (planted)"))
                }
                _ => Ok(()),
            }
        }
    }

    impl Trace {
        fn take(&self) -> Vec<DiskStep> {
            std::mem::take(&mut self.steps.lock().expect("a lock"))
        }
    }

    fn over(dir: &Path, fails: Option<DiskStep>) -> (Arc<Trace>, DirectoryTarget) {
        let trace = Arc::new(Trace { fails: Mutex::new(fails), ..Trace::default() });
        let target = DirectoryTarget::open_probed(dir, DirectoryOptions::default(), Some(trace.clone()));
        (trace, target.expect("a target"))
    }

    fn traced() -> (tempfile::TempDir, Arc<Trace>, DirectoryTarget) {
        let dir = tempfile::tempdir().expect("a directory");
        let (trace, target) = over(dir.path(), None);
        (dir, trace, target)
    }

    fn key(name: &str) -> Key {
        Key::new(name).expect("a key")
    }

    #[tokio::test]
    async fn success_is_reported_after_file_and_directories_are_synced() {
        use DiskStep::*;
        let (_dir, trace, target) = traced();
        target.create(&key("a/b"), b"x".to_vec().into()).await.expect("a create");
        let durable =
            [MakeDirectory, SyncNewDirectory, Open, Write, SyncFile, Rename, Renamed, SyncDirectory];
        assert_eq!(trace.take(), durable);
    }

    /// A process that died between the rename and the sync leaves a name that a crash may take back.
    #[tokio::test]
    async fn a_name_is_taken_only_by_what_is_durable() {
        let dir = tempfile::tempdir().expect("a directory");
        let (_, died) = over(dir.path(), Some(DiskStep::SyncDirectory));
        assert!(died.create(&key("a/b"), b"x".to_vec().into()).await.is_err());
        let (trace, next) = over(dir.path(), None);
        let taken = next.create(&key("a/b"), b"x".to_vec().into()).await;
        assert!(matches!(taken, Err(StorageError::AlreadyExists { .. })), "{taken:?}");
        assert_eq!(trace.take(), [DiskStep::SyncExisting]);
        let (_, unlucky) = over(dir.path(), Some(DiskStep::SyncExisting));
        let unknown = unlucky.create(&key("a/b"), b"x".to_vec().into()).await;
        assert!(matches!(unknown, Err(StorageError::Unavailable { .. })), "{unknown:?}");
    }

    #[tokio::test]
    async fn a_rename_whose_answer_was_lost_is_asked_about() {
        let (dir, _, _) = traced();
        let (trace, target) = over(dir.path(), Some(DiskStep::Renamed));
        target.create(&key("a"), b"x".to_vec().into()).await.expect("it is in place");
        assert_eq!(trace.take().last(), Some(&DiskStep::SyncDirectory), "and synced as ever");
        let (_, target) = over(dir.path(), Some(DiskStep::Rename));
        let failed = target.create(&key("b"), b"x".to_vec().into()).await;
        assert!(matches!(failed, Err(StorageError::Unavailable { .. })), "{failed:?}");
        assert!(matches!(target.head(&key("b")).await, Err(StorageError::NotFound { .. })));
    }

    #[test]
    fn a_second_name_is_refused_where_the_first_is_taken_and_a_repeated_link_is_ours() {
        let dir = tempfile::tempdir().expect("a directory");
        let (from, to) = (dir.path().join("from"), dir.path().join("to"));
        fs::write(&from, b"new").expect("a write");
        fs::hard_link(&from, &to).expect("a link whose answer was lost");
        assert!(link_new(&from, &to).is_ok() && !from.exists());
        fs::write(&from, b"other").expect("a write");
        assert!(matches!(link_new(&from, &to), Err(Failed::Exists)));
        assert_eq!(fs::read(&to).expect("a read"), b"new");
    }

    /// As when an administrator verifies a repository that the server's user writes to.
    #[tokio::test]
    async fn what_the_superuser_makes_belongs_to_the_repositorys_owner() {
        if !os::is_superuser() {
            eprintln!("skipped: this is not the superuser");
            return;
        }
        let dir = tempfile::tempdir().expect("a directory");
        chown(dir.path(), Some(65_534), Some(65_533)).expect("another owner");
        let target = DirectoryTarget::open(dir.path(), DirectoryOptions::default()).expect("a target");
        target.create(&key("a/b/c"), b"x".to_vec().into()).await.expect("a create");
        for made in ["a", "a/b", "a/b/c"] {
            let meta = fs::metadata(dir.path().join(made)).expect("it is there");
            assert_eq!((meta.uid(), meta.gid()), (65_534, 65_533), "{made}");
        }
    }

    #[tokio::test]
    async fn after_a_failed_sync_no_success_is_reported() {
        let (dir, _, _) = traced();
        let (_, target) = over(dir.path(), Some(DiskStep::SyncFile));
        assert!(target.create(&key("a"), b"x".to_vec().into()).await.is_err());
        assert!(matches!(
            target.create(&key("b"), b"x".to_vec().into()).await,
            Err(StorageError::Poisoned { .. })
        ));
        assert!(matches!(target.head(&key("a")).await, Err(StorageError::NotFound { .. })));
    }

    #[tokio::test]
    async fn temporary_files_are_never_listed() {
        let (dir, _, target) = traced();
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
