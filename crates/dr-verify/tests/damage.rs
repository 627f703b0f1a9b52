//! Verification sees every planted fault, and says nothing of a whole repository.
#![allow(clippy::unwrap_used, missing_docs)]

use std::sync::Arc;
use std::time::Duration;

use dr_core::port::{Key, StorageTarget};
use dr_engine::Context;
use dr_engine::backup::{self, BackupOptions};
use dr_storage::keys::FileKey;
use dr_storage::target::MemoryTarget;
use dr_storage::{Access, InitSpec, Repository};
use dr_testkit::sim::{Random, SimCluster, TickingClock, archive_segment, context};
use dr_verify::{Level, VerifyOptions, VerifyReport, verify};

struct Kept {
    target: Arc<MemoryTarget>,
    key: FileKey,
    cluster: SimCluster,
}

impl Kept {
    /// A repository with two backups, the second one of changes.
    async fn new() -> Self {
        let target = Arc::new(MemoryTarget::new());
        let key = FileKey::generate();
        let spec =
            InitSpec { encrypted: true, compression_level: 1, created: dr_core::Timestamp::UNIX_EPOCH };
        Repository::init(target.clone(), spec, &[Arc::new(key.clone())]).await.unwrap();
        let mut random = Random::new(3);
        let cluster = SimCluster::new(21);
        cluster.put_relation("base/5/100", 60, &mut random);
        cluster.put("base/5/3", random.bytes(20_000));
        let kept = Kept { target, key, cluster };
        kept.back_up().await;
        kept.cluster.touch_page("base/5/100", 9, &mut random);
        kept.back_up().await;
        kept
    }

    async fn back_up(&self) {
        let context = self.context(Access::Key(Arc::new(self.key.clone()))).await;
        self.cluster.archive(&context.store).await;
        let options =
            BackupOptions { workers: 1, wal_timeout: Duration::from_millis(1), ..BackupOptions::default() };
        let plan = backup::plan(&context, &self.cluster, &options).await.unwrap();
        backup::apply(&context, &self.cluster, &plan).await.unwrap();
    }

    async fn context(&self, access: Access) -> Context {
        let repo = Repository::open(self.target.clone(), access).await.unwrap();
        context(&repo, &self.cluster, Arc::new(TickingClock::default()))
    }

    /// A copy whose objects can be damaged.
    fn copy(&self) -> Self {
        let target = Arc::new(MemoryTarget::from_snapshot(self.target.snapshot()));
        Kept { target, key: self.key.clone(), cluster: self.cluster.clone() }
    }

    async fn verify(&self, level: Level) -> Result<VerifyReport, dr_engine::EngineError> {
        let context = self.context(Access::Key(Arc::new(self.key.clone()))).await;
        verify(&context, &VerifyOptions { backups: Vec::new(), all: true, level, workers: 1 }).await
    }

    fn keys(&self, kinds: &[&str]) -> Vec<Key> {
        let wanted =
            |key: &Key| kinds.iter().any(|kind| key.as_str().contains(&format!("cluster/21/{kind}")));
        self.target.snapshot().into_keys().filter(wanted).collect()
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_whole_repository_is_whole_at_every_level() {
    let kept = Kept::new().await;
    for level in [Level::Metadata, Level::Packs, Level::Content] {
        let report = kept.verify(level).await.unwrap();
        assert!(report.is_whole(), "{level:?}: {report:?}");
        assert_eq!(report.backups.len(), 2);
    }
    let content = kept.verify(Level::Content).await.unwrap();
    assert!(content.backups.iter().all(|b| b.content_bytes > 500_000));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_flipped_bit_anywhere_in_a_pack_is_seen_without_a_reading_key() {
    let kept = Kept::new().await;
    let host = Repository::open(kept.target.clone(), Access::Key(Arc::new(kept.key.clone())))
        .await
        .unwrap()
        .host_key()
        .unwrap();
    let keys = kept.keys(&["pack/", "meta/", "page/"]);
    assert!(keys.len() >= 6, "{keys:?}");
    for key in keys {
        let len = kept.target.head(&key).await.unwrap().size as usize;
        for at in [0, 9, len / 3, len / 2, len - 1] {
            let own = kept.copy();
            own.target.tamper(&key, |bytes| bytes[at] ^= 4);
            let context = own.context(Access::Host(host.clone())).await;
            let options = VerifyOptions { backups: Vec::new(), all: true, level: Level::Packs, workers: 1 };
            // A damaged map or table may stop the look at once; that is seen too.
            let whole = verify(&context, &options).await.is_ok_and(|report| report.is_whole());
            assert!(!whole, "{key}: a flipped bit at {at} of {len} went unseen");
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn missing_cut_and_damaged_objects_are_seen() {
    let kept = Kept::new().await;
    for key in kept.keys(&["pack/", "meta/", "manifest/", "wal/", "session/"]) {
        // What a session began with, and points of backups that are committed, are not needed any more.
        if key.as_str().ends_with("/begin") || key.as_str().contains("/point-") {
            continue;
        }
        let own = kept.copy();
        own.target.delete(&key).await.unwrap();
        let report = own.verify(Level::Content).await;
        let fewer = report.as_ref().is_ok_and(|r| r.backups.len() < 2);
        // A removed manifest is a backup that does not exist; everything else is damage.
        assert!(fewer || !report.is_ok_and(|r| r.is_whole()), "{key} is missing and was not missed");
        let own = kept.copy();
        own.target.tamper(&key, |bytes| bytes.truncate(bytes.len() / 2));
        assert!(
            !own.verify(Level::Content).await.is_ok_and(|r| r.is_whole()),
            "{key} is cut and was not seen"
        );
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_hole_in_the_wal_after_a_backup_is_told() {
    let kept = Kept::new().await;
    let context = kept.context(Access::Key(Arc::new(kept.key.clone()))).await;
    archive_segment(&context.store, 1, 4).await;
    let report = kept.verify(Level::Metadata).await.unwrap();
    assert_eq!(report.wal_gaps, ["000000010000000000000002", "000000010000000000000003"]);
    assert!(!report.is_whole());
}

#[tokio::test(flavor = "multi_thread")]
async fn an_unreadable_manifest_is_damage_of_its_backup_and_hides_no_other() {
    let kept = Kept::new().await;
    let manifests = kept.keys(&["manifest/"]);
    assert_eq!(manifests.len(), 2, "{manifests:?}");
    type Damage = fn(&mut Vec<u8>);
    let damages: [Damage; 3] = [|bytes| bytes.clear(), |bytes| bytes.truncate(20), |bytes| bytes[2] ^= 1];
    for (number, key) in manifests.iter().enumerate() {
        let id = key.as_str().rsplit('/').next().unwrap();
        for damage in damages {
            for level in [Level::Metadata, Level::Packs, Level::Content] {
                let own = kept.copy();
                own.target.tamper(key, damage);
                let report = own.verify(level).await.unwrap();
                assert!(!report.is_whole(), "{key} at {level:?}");
                assert_eq!(report.backups.len(), 2, "{report:?}");
                let (damaged, other): (Vec<_>, Vec<_>) =
                    report.backups.iter().partition(|b| b.id.to_string() == id);
                assert_eq!(damaged[0].problems[0].place, format!("manifest/{id}"), "{report:?}");
                assert!(other[0].problems.is_empty() && other[0].packs > 0, "{report:?}");
            }
            // A look at the other backup alone tells of it too: it may be the newest.
            let own = kept.copy();
            own.target.tamper(key, damage);
            let other = manifests[1 - number].as_str().rsplit('/').next().unwrap().parse().unwrap();
            let context = own.context(Access::Key(Arc::new(own.key.clone()))).await;
            let options =
                VerifyOptions { backups: vec![other], all: false, level: Level::Metadata, workers: 1 };
            let report = verify(&context, &options).await.unwrap();
            assert!(!report.is_whole() && report.backups.len() == 2, "{report:?}");
        }
    }
}
