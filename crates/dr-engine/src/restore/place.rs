//! The directory that receives a restore: its mark, its labels, its last file.

use std::fs::{self, File, OpenOptions, Permissions};
use std::io::{self, Write};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};

use dr_core::SystemId;
use dr_core::guard::Guard;
use dr_core::port::{HostFile, Instance};
use dr_storage::format::Manifest;
use dr_storage::{FrameOpener, Repository};
use serde::{Deserialize, Serialize};

use super::RestorePlan;
use crate::context::Context;
use crate::error::EngineError;
use crate::meta::MetaReader;

/// The mark of a restore under way; removed when `pg_control` is in place.
pub const MARKER: &str = "dr-restore.json";

/// The mark before it is whole: what a crash in the first moment leaves, and nobody else makes.
const MARKER_DRAFT: &str = "dr-restore.json.new";

const CONTROL: &str = "global/pg_control";

#[derive(Debug, Serialize, Deserialize)]
struct Mark {
    system_id: SystemId,
    backup: dr_core::BackupId,
}

/// What is in a directory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Occupied {
    /// Nothing, or no directory yet.
    Empty,
    /// A cluster, or a restore of it under way.
    Cluster(SystemId),
    /// Something else.
    Foreign,
}

/// Whether a directory is missing or empty. `lost+found` of a new file system does not count, nor
/// does the draft of a mark: nothing else was done before the mark is whole.
pub(super) fn is_empty(path: &Path) -> Result<bool, EngineError> {
    match fs::read_dir(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(true),
        Err(error) => Err(EngineError::file("look into", path)(error)),
        Ok(entries) => {
            for entry in entries {
                let entry = entry.map_err(EngineError::file("look into", path))?;
                let name = entry.file_name();
                if name != "lost+found" && name != MARKER_DRAFT {
                    return Ok(false);
                }
            }
            Ok(true)
        }
    }
}

/// What is in the target directory.
pub(super) fn occupied(instance: &dyn Instance, path: &Path) -> Result<Occupied, EngineError> {
    if is_empty(path)? {
        return Ok(Occupied::Empty);
    }
    if let Ok(text) = fs::read(path.join(MARKER))
        && let Ok(mark) = serde_json::from_slice::<Mark>(&text)
    {
        return Ok(Occupied::Cluster(mark.system_id));
    }
    match instance.control(path) {
        Ok(control) => Ok(Occupied::Cluster(control.system_id)),
        Err(_) => Ok(Occupied::Foreign),
    }
}

/// New places of tablespaces; those not named keep their old ones.
pub(super) fn map_tablespaces(
    manifest: &Manifest,
    asked: &[(String, PathBuf)],
) -> Result<Vec<(u32, PathBuf)>, EngineError> {
    let known = &manifest.body.tablespaces;
    let matches = |t: &dr_core::port::TablespaceFacts, old: &str| {
        t.oid.to_string() == old || t.name == old || t.location == old.trim_end_matches('/')
    };
    for (old, new) in asked {
        if !known.iter().any(|t| matches(t, old)) {
            let names: Vec<String> = known.iter().map(|t| format!("{} ({})", t.name, t.location)).collect();
            let what = format!("the backup has no tablespace {old:?}");
            let hint = if names.is_empty() {
                "It has no tablespaces outside the data directory.".to_owned()
            } else {
                format!("It has: {}.", names.join(", "))
            };
            return Err(EngineError::Invalid { what, hint });
        }
        if !new.is_absolute() {
            let what = format!("the new place of tablespace {old:?} is not an absolute path");
            return Err(EngineError::Invalid { what, hint: "Give --tablespace OLD=/new/path.".into() });
        }
    }
    Ok(known
        .iter()
        .map(|t| {
            let new = asked.iter().find(|(old, _)| matches(t, old)).map(|(_, new)| new.clone());
            (t.oid, new.unwrap_or_else(|| PathBuf::from(&t.location)))
        })
        .collect())
}

/// Makes and marks the directory. In delta mode `pg_control` goes first, so that no server starts
/// on a half-changed directory.
pub(super) fn begin(plan: &RestorePlan) -> Result<(), EngineError> {
    let root = &plan.options.to;
    fs::DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(root)
        .map_err(EngineError::file("create", root))?;
    // PostgreSQL refuses a data directory that others may enter.
    fs::set_permissions(root, Permissions::from_mode(0o700))
        .map_err(EngineError::file("set the mode of", root))?;
    let mark = Mark { system_id: plan.backup.cluster.system_id, backup: plan.backup.id };
    let draft = root.join(MARKER_DRAFT);
    write_synced(&draft, &serde_json::to_vec(&mark).unwrap_or_default(), 0o600)?;
    // tidy: allow(rename): synced before and after; an older mark is of the same cluster
    rustix::fs::rename(&draft, root.join(MARKER))
        .map_err(|errno| EngineError::file("rename", &draft)(io::Error::from(errno)))?;
    sync_dir(root)?;
    let control = root.join(CONTROL);
    if plan.options.delta && control.exists() {
        fs::remove_file(&control).map_err(EngineError::file("remove", &control))?;
        sync_dir(&root.join("global"))?;
    }
    if !Guard::ControlLast.holds() {
        put_control(plan)?;
    }
    Ok(())
}

fn write_synced(path: &Path, content: &[u8], mode: u32) -> Result<(), EngineError> {
    let mut file = OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(true)
        .mode(mode)
        .open(path)
        .map_err(EngineError::file("create", path))?;
    file.write_all(content).and_then(|()| file.sync_all()).map_err(EngineError::file("write", path))
}

fn sync_dir(path: &Path) -> Result<(), EngineError> {
    dr_storage::os::sync_directory(path).map_err(EngineError::file("sync", path))
}

/// Writes the labels that PostgreSQL gave at the end of the backup.
pub(super) fn write_labels(plan: &RestorePlan) -> Result<(), EngineError> {
    let body = &plan.manifest.body;
    let root = &plan.options.to;
    write_synced(&root.join("backup_label"), body.backup_label.as_bytes(), 0o600)?;
    if !body.tablespace_map.is_empty() {
        let map: String = plan
            .tablespaces
            .iter()
            .map(|(oid, path)| format!("{oid} {}\n", escape(&path.display().to_string())))
            .collect();
        write_synced(&root.join("tablespace_map"), map.as_bytes(), 0o600)?;
    }
    Ok(())
}

/// Line ends and backslashes of a path are escaped in `tablespace_map` (`xlogbackup.c`).
fn escape(path: &str) -> String {
    path.replace('\\', "\\\\").replace('\n', "\\\n").replace('\r', "\\\r")
}

/// Syncs everything, then puts `pg_control` in place and removes the mark.
pub(super) fn commit(plan: &RestorePlan) -> Result<(), EngineError> {
    let root = &plan.options.to;
    if plan.options.sync {
        for place in std::iter::once(root).chain(plan.tablespaces.iter().map(|(_, path)| path)) {
            let dir = File::open(place).map_err(EngineError::file("open", place))?;
            dr_storage::os::sync_filesystem(&dir).map_err(EngineError::file("sync", place))?;
        }
    }
    put_control(plan)?;
    let marker = root.join(MARKER);
    fs::remove_file(&marker).map_err(EngineError::file("remove", &marker))?;
    sync_dir(root)
}

fn put_control(plan: &RestorePlan) -> Result<(), EngineError> {
    let root = &plan.options.to;
    let dir = root.join("global");
    if !dir.exists() {
        fs::DirBuilder::new().mode(0o700).create(&dir).map_err(EngineError::file("create", &dir))?;
    }
    let control = root.join(CONTROL);
    let temporary = root.join("global/pg_control.dr");
    write_synced(&temporary, &plan.manifest.body.pg_control, 0o600)?;
    // The place is free: a new directory, or `begin` removed it.
    // tidy: allow(rename): synced before and after
    rustix::fs::rename(&temporary, &control)
        .map_err(|errno| EngineError::file("rename", &temporary)(io::Error::from(errno)))?;
    sync_dir(&dir)
}

/// Delta: removes what the backup does not have, below the data directory and the tablespaces.
///
/// Logs and other files that PostgreSQL leaves out of backups go too: the directory becomes the
/// backup's. The mark stays.
pub(super) async fn remove_foreign(context: &Context, plan: &RestorePlan) -> Result<(), EngineError> {
    let reader = context.store.reader().await.map_err(EngineError::repo("cannot read the repository"))?;
    let handle = tokio::runtime::Handle::current();
    let meta = MetaReader::new(context.repo.clone(), reader, handle.clone());
    let shards = plan.manifest.body.shards.clone();
    let (root, repo) = (plan.options.to.clone(), context.repo.clone());
    let removal = handle.spawn_blocking(move || {
        let mut opener = FrameOpener::new();
        let mut kept = Kept::new(repo, &root, shards.iter().map(|shard| shard.count as usize).sum());
        for shard in &shards {
            meta.shard(&mut opener, shard)?.iter().for_each(|entry| kept.add(&entry.path));
        }
        kept.marks.sort_unstable();
        kept.remove_others(&root)
    });
    removal.await.map_err(|_| EngineError::Bug { what: "removing old files panicked".into() })?
}

/// The paths that stay, by the first eight bytes of their keyed digests: six million take 48 MB. That
/// a foreign file looks like one of so many is less likely than one in 10^12, and it would stay.
struct Kept<'a> {
    repo: Repository,
    root: &'a Path,
    marks: Vec<u64>,
}

impl<'a> Kept<'a> {
    fn new(repo: Repository, root: &'a Path, count: usize) -> Self {
        let mut kept = Kept { repo, root, marks: Vec::with_capacity(count + 1) };
        kept.add(MARKER);
        kept
    }

    fn mark(&self, path: &[u8]) -> u64 {
        let [a, b, c, d, e, f, g, h, ..] = self.repo.digest(path).0;
        u64::from_le_bytes([a, b, c, d, e, f, g, h])
    }

    fn add(&mut self, path: &str) {
        self.marks.push(self.mark(&dr_core::path::decode(path)));
    }

    fn has(&self, path: &Path) -> bool {
        let below = path.strip_prefix(self.root).unwrap_or(path);
        self.marks.binary_search(&self.mark(below.as_os_str().as_bytes())).is_ok()
    }

    fn remove_others(&self, dir: &Path) -> Result<(), EngineError> {
        for entry in fs::read_dir(dir).map_err(EngineError::file("look into", dir))? {
            let entry = entry.map_err(EngineError::file("look into", dir))?;
            let path = entry.path();
            let kind = entry.file_type().map_err(EngineError::file("look at", &path))?;
            if self.has(&path) {
                // A tablespace's link is followed: its files belong to the cluster.
                if kind.is_dir() || (kind.is_symlink() && path.is_dir() && dir.ends_with("pg_tblspc")) {
                    self.remove_others(&path)?;
                }
            } else if kind.is_dir() {
                fs::remove_dir_all(&path).map_err(EngineError::file("remove", &path))?;
            } else {
                fs::remove_file(&path).map_err(EngineError::file("remove", &path))?;
            }
        }
        Ok(())
    }
}

/// Writes a file of the server below `dir`, under its whole old path.
pub(super) fn write_host_file(dir: &Path, file: &HostFile) -> Result<(), EngineError> {
    let Some(content) = &file.content else { return Ok(()) };
    let relative = file.path.trim_start_matches('/');
    if !dr_core::path::is_contained(relative) {
        let what = format!("{:?} is not a path that can be restored", file.path);
        return Err(EngineError::Invalid { what, hint: "The backup is damaged; restore another.".into() });
    }
    let place = dir.join(relative);
    if let Some(parent) = place.parent() {
        fs::DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(parent)
            .map_err(EngineError::file("create", parent))?;
    }
    write_synced(&place, content, file.mode & 0o777)
}
