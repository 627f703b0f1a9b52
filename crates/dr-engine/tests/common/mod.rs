//! What the engine's tests share.
#![allow(dead_code, clippy::unwrap_used, missing_docs)]

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use dr_core::port::{RecoveryTarget, StorageTarget};
use dr_engine::backup::{self, BackupOptions, BackupReport};
use dr_engine::restore::{self, RestoreOptions, RestoreReport, TimelineChoice};
use dr_engine::{Context, EngineError};
use dr_storage::keys::FileKey;
use dr_storage::target::MemoryTarget;
use dr_storage::{Access, InitSpec, Repository};
use dr_testkit::instance::FakeInstance;
use dr_testkit::sim::{SimCluster, TickingClock, context};

pub struct Bench {
    pub target: Arc<MemoryTarget>,
    pub key: FileKey,
    pub clock: Arc<TickingClock>,
}

impl Bench {
    pub async fn new() -> Self {
        let target = Arc::new(MemoryTarget::new());
        let key = FileKey::generate();
        let spec =
            InitSpec { encrypted: true, compression_level: 1, created: dr_core::Timestamp::UNIX_EPOCH };
        Repository::init(target.clone(), spec, &[Arc::new(key.clone())]).await.unwrap();
        Bench { target, key, clock: Arc::default() }
    }

    pub async fn repo(&self) -> Repository {
        self.repo_over(self.target.clone()).await.unwrap()
    }

    pub async fn repo_over(
        &self,
        target: Arc<dyn StorageTarget>,
    ) -> Result<Repository, dr_storage::RepoError> {
        Repository::open(target, Access::Key(Arc::new(self.key.clone()))).await
    }

    pub async fn context(&self, cluster: &SimCluster) -> Context {
        context(&self.repo().await, cluster, self.clock.clone())
    }

    /// A bench whose repository is a copy of this one.
    pub fn copy(&self) -> Bench {
        let target = Arc::new(MemoryTarget::from_snapshot(self.target.snapshot()));
        Bench { target, key: self.key.clone(), clock: self.clock.clone() }
    }
}

pub fn options() -> BackupOptions {
    BackupOptions { workers: 2, wal_timeout: Duration::from_millis(1), ..BackupOptions::default() }
}

pub async fn back_up(
    context: &Context,
    cluster: &SimCluster,
    options: &BackupOptions,
) -> Result<BackupReport, EngineError> {
    cluster.archive(&context.store).await;
    let plan = backup::plan(context, cluster, options).await?;
    backup::apply(context, cluster, &plan).await
}

/// How many backups are listed; each is read back, every byte.
pub async fn whole_backups(context: &Context) -> usize {
    let heads = context.store.heads().await.unwrap();
    for head in &heads {
        let manifest = context.store.manifest(head.id).await.unwrap();
        dr_engine::read_back(context, &manifest, 1).await.unwrap_or_else(|e| panic!("{}: {e:?}", head.id));
    }
    heads.len()
}

pub fn restore_options(to: &Path) -> RestoreOptions {
    RestoreOptions {
        target: RecoveryTarget::Immediate,
        timeline: TimelineChoice::Current,
        sync: false,
        stall_limit: Duration::from_secs(5),
        ..RestoreOptions::new(to, "dr wal fetch %f %p")
    }
}

pub async fn restore_to(context: &Context, options: &RestoreOptions) -> Result<RestoreReport, EngineError> {
    let instance = FakeInstance::new();
    let plan = restore::plan(context, &instance, options).await?;
    restore::apply(context, &instance, &plan).await
}

/// All files below a directory, without what a restore adds.
pub fn tree(root: &Path) -> BTreeMap<String, Vec<u8>> {
    fn walk(root: &Path, dir: &Path, out: &mut BTreeMap<String, Vec<u8>>) {
        for entry in std::fs::read_dir(dir).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                walk(root, &path, out);
            } else {
                let name = path.strip_prefix(root).unwrap().to_str().unwrap().to_owned();
                out.insert(name, std::fs::read(&path).unwrap());
            }
        }
    }
    let mut out = BTreeMap::new();
    walk(root, root, &mut out);
    for added in ["backup_label", "recovery.signal", "global/pg_control"] {
        out.remove(added);
    }
    out
}

pub fn assert_same(found: &BTreeMap<String, Vec<u8>>, expected: &BTreeMap<String, Vec<u8>>) {
    let names = |map: &BTreeMap<String, Vec<u8>>| map.keys().cloned().collect::<Vec<_>>();
    assert_eq!(names(found), names(expected));
    for (path, content) in expected {
        assert!(found[path] == *content, "{path} differs");
    }
}

/// Accepts everything: the format has tests of its own in dr-pg.
#[derive(Debug)]
pub struct AnyWal;

struct AnyInspector(dr_core::port::SegmentFacts);

impl dr_core::port::SegmentInspector for AnyInspector {
    fn feed(&mut self, _: &[u8]) -> Result<(), dr_core::port::WalFault> {
        Ok(())
    }

    fn finish(self: Box<Self>) -> Result<dr_core::port::SegmentFacts, dr_core::port::WalFault> {
        Ok(self.0)
    }
}

impl dr_core::port::WalFormat for AnyWal {
    fn inspect(
        &self,
        _: &dr_core::WalName,
        size: dr_core::SegmentSize,
        expected: dr_core::SystemId,
    ) -> Result<Box<dyn dr_core::port::SegmentInspector>, dr_core::port::WalFault> {
        Ok(Box::new(AnyInspector(dr_core::port::SegmentFacts {
            system_id: expected,
            timeline: dr_core::Timeline(1),
            size,
            filled_to: dr_core::Lsn(1),
        })))
    }
}
