//! A directory whose disk, or whose network, fails: nothing acknowledged is lost, nothing half-made
//! is listed, and the next run works.
#![allow(clippy::unwrap_used, missing_docs)]

mod common;

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use common::*;
use dr_core::port::{Key, KeyProvider, StorageTarget};
use dr_core::{Classified, Timeline, WalName, WalSegment};
use dr_engine::wal::Archive;
use dr_storage::keys::FileKey;
use dr_storage::target::{DirectoryOptions, DirectoryTarget, DiskProbe, DiskStep, RetryPolicy, Retrying};
use dr_storage::{Access, InitSpec, Repository};
use dr_testkit::faults::{DiskError, FaultyDisk};
use dr_testkit::sim::{PAGE, Random, SimCluster, TickingClock, context};

const PATIENCE: RetryPolicy = RetryPolicy { attempts: 3, first_wait: Duration::from_micros(50) };

/// A repository in a directory as the command line opens it.
struct Place {
    dir: tempfile::TempDir,
    key: Arc<FileKey>,
}

fn target(dir: &Path, disk: Option<Arc<FaultyDisk>>) -> Arc<dyn StorageTarget> {
    // Synced as always: it is the steps that count.
    let options = DirectoryOptions { create: true, ..DirectoryOptions::default() };
    let probe = disk.map(|disk| disk as Arc<dyn DiskProbe>);
    let target = DirectoryTarget::open_probed(dir, options, probe).unwrap();
    Arc::new(Retrying::new(Arc::new(target), PATIENCE))
}

/// Syncs are counted, not waited for: in memory where there is such a place.
fn memory() -> tempfile::TempDir {
    tempfile::tempdir_in("/dev/shm").or_else(|_| tempfile::tempdir()).unwrap()
}

impl Place {
    async fn new() -> Self {
        let place = Place { dir: memory(), key: Arc::new(FileKey::generate()) };
        let spec =
            InitSpec { encrypted: true, compression_level: 1, created: dr_core::Timestamp::UNIX_EPOCH };
        let key: Arc<dyn KeyProvider> = place.key.clone();
        let made = Repository::init(target(place.dir.path(), None), spec, std::slice::from_ref(&key)).await;
        made.unwrap();
        place
    }

    async fn repo(&self, disk: Option<Arc<FaultyDisk>>) -> Result<Repository, dr_storage::RepoError> {
        Repository::open(target(self.dir.path(), disk), Access::Key(self.key.clone())).await
    }

    fn copy(&self) -> Self {
        let dir = memory();
        for (name, content) in tree(self.dir.path()) {
            let place = dir.path().join(name);
            std::fs::create_dir_all(place.parent().unwrap()).unwrap();
            std::fs::write(place, content).unwrap();
        }
        Place { dir, key: self.key.clone() }
    }
}

fn cluster() -> (SimCluster, Random) {
    let mut random = Random::new(43);
    let cluster = SimCluster::new(9);
    cluster.put("PG_VERSION", b"15\n".to_vec());
    cluster.put_relation("base/5/100", 34, &mut random);
    cluster.put("base/5/3", random.bytes(2 * PAGE));
    (cluster, random)
}

/// Backs up over a disk, and answers whether that was acknowledged.
async fn back_up_over(place: &Place, cluster: &SimCluster, disk: Arc<FaultyDisk>) -> bool {
    let Ok(repo) = place.repo(Some(disk)).await else { return false };
    let context = context(&repo, cluster, Arc::<TickingClock>::default());
    match dr_engine::backup::plan(&context, cluster, &options()).await {
        Ok(plan) => dr_engine::backup::apply(&context, cluster, &plan).await.is_ok(),
        Err(_) => false,
    }
}

/// How many backups are listed; each can be read back, every byte.
async fn whole(place: &Place, cluster: &SimCluster) -> usize {
    let repo = place.repo(None).await.unwrap();
    whole_backups(&context(&repo, cluster, Arc::<TickingClock>::default())).await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_disk_fault_at_any_step_of_a_backup_leaves_only_whole_backups() {
    let (cluster, mut random) = cluster();
    let place = Place::new().await;
    let repo = place.repo(None).await.unwrap();
    let sound = context(&repo, &cluster, Arc::<TickingClock>::default());
    back_up(&sound, &cluster, &options()).await.unwrap();
    cluster.touch_page("base/5/100", 7, &mut random);
    cluster.archive(&sound.store).await;
    let counting = Arc::new(FaultyDisk::counting());
    assert!(back_up_over(&place.copy(), &cluster, counting.clone()).await);
    let steps = counting.steps();
    assert!(steps > 60, "{steps}");
    let mut outcomes: BTreeMap<String, (u32, u32)> = BTreeMap::new();
    for at in 0..steps {
        // Each step meets one kind of error, and all kinds meet each kind of step.
        let error = DiskError::ALL[(at % 4) as usize];
        let own = place.copy();
        let disk = Arc::new(FaultyDisk::new(at, error));
        let done = back_up_over(&own, &cluster, disk.clone()).await;
        let Some(hit) = disk.hit() else { continue };
        let outcome = outcomes.entry(format!("{hit:?}")).or_default();
        *(if done { &mut outcome.0 } else { &mut outcome.1 }) += 1;
        let listed = whole(&own, &cluster).await;
        assert!(!done || listed == 2, "step {at}, {hit:?}, {error:?}: acknowledged and not listed");
        let again = back_up_over(&own, &cluster, Arc::new(FaultyDisk::counting())).await;
        assert!(again, "step {at}, {hit:?}, {error:?}: the next backup fails");
    }
    let told = |step: DiskStep| outcomes.get(&format!("{step:?}")).copied().unwrap_or_default();
    for step in [DiskStep::SyncFile, DiskStep::SyncDirectory] {
        let (done, failed) = told(step);
        // The receipt is put behind the commit, and a backup stands without it.
        assert!(done <= 1 && failed > 3, "no success after a sync that failed: {outcomes:?}");
    }
    assert_eq!(told(DiskStep::Renamed).1, 0, "a lost answer is asked about: {outcomes:?}");
    for step in [DiskStep::Renamed, DiskStep::Write, DiskStep::Read] {
        assert!(told(step).0 > 0, "what passes is tried again: {outcomes:?}");
    }
}

/// PostgreSQL asks again after each failure, in a new process.
#[tokio::test(flavor = "multi_thread")]
async fn a_push_is_acknowledged_once_its_segment_is_durable_whatever_failed_before() {
    let (cluster, _) = cluster();
    let size = dr_core::SegmentSize::try_from(1 << 20).unwrap();
    let segment = WalSegment { timeline: Timeline(1), number: 5 };
    let source = tempfile::tempdir().unwrap();
    let path = source.path().join(segment.file_name(size));
    std::fs::write(&path, vec![7; 1 << 20]).unwrap();
    let place = Place::new().await;
    let push = async |own: &Place, disk: Option<Arc<FaultyDisk>>| {
        let repo = own.repo(disk).await?;
        let store = repo.cluster(cluster.system_id).wal(size);
        let format = AnyWal;
        let archive = Archive { store, format: &format, system_id: cluster.system_id, segment_size: size };
        archive.push(&path).await.map_err(|error| dr_storage::RepoError::Bug { what: format!("{error:?}") })
    };
    let counting = Arc::new(FaultyDisk::counting());
    push(&place.copy(), Some(counting.clone())).await.unwrap();
    let mut failed = 0;
    for at in 0..counting.steps() {
        for error in DiskError::ALL {
            let own = place.copy();
            let disk = Arc::new(FaultyDisk::new(at, error));
            let first = push(&own, Some(disk.clone())).await;
            let hit = disk.hit().unwrap();
            if matches!(hit, DiskStep::SyncFile | DiskStep::SyncDirectory | DiskStep::SyncNewDirectory) {
                assert!(first.is_err(), "step {at}, {hit:?}: acknowledged after a sync that failed");
            }
            failed += u32::from(first.is_err());
            let again = push(&own, None).await.unwrap_or_else(|e| panic!("step {at}, {hit:?}: {e}"));
            assert_eq!(again.bytes, 1 << 20);
            let repo = own.repo(None).await.unwrap();
            let mut out = Vec::new();
            let store = repo.cluster(cluster.system_id).wal(size);
            store.fetch(&WalName::Segment(segment), &mut out).await.unwrap();
            assert!(out == vec![7; 1 << 20], "step {at}, {hit:?}");
        }
    }
    assert!(failed > 10, "{failed}");
}

#[tokio::test]
async fn a_disk_error_is_told_as_what_it_is() {
    let key = Key::new("a/b").unwrap();
    for (error, class) in [
        (DiskError::Io, dr_core::ErrorClass::Transient),
        (DiskError::Stale, dr_core::ErrorClass::Transient),
        (DiskError::TimedOut, dr_core::ErrorClass::Transient),
        (DiskError::Full, dr_core::ErrorClass::Exhausted),
    ] {
        let dir = tempfile::tempdir().unwrap();
        let disk = Arc::new(FaultyDisk::new(0, error));
        let options = DirectoryOptions::default();
        let bare = DirectoryTarget::open_probed(dir.path(), options, Some(disk.clone())).unwrap();
        let told = bare.create(&key, b"x".to_vec().into()).await.unwrap_err();
        assert_eq!((told.class(), disk.hit()), (class, Some(DiskStep::MakeDirectory)), "{told:?}");
        assert!(told.to_string().contains("a/b") && told.hint().is_some(), "{told}");
    }
}
