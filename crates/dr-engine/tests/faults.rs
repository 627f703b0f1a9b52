//! Whatever storage does, nothing acknowledged is lost and nothing half-made is listed.
#![allow(clippy::unwrap_used, missing_docs)]

mod common;

use std::sync::Arc;

use common::*;
use dr_core::port::{Key, StorageTarget};
use dr_core::{Classified, ErrorClass, Timeline};
use dr_engine::restore::{RestoreOptions, RestorePlan, TimelineChoice};
use dr_storage::target::MemoryTarget;
use dr_testkit::faults::{Fault, FaultyTarget};
use dr_testkit::instance::FakeInstance;
use dr_testkit::sim::{PAGE, Random, SimCluster, context, relation};

fn small_cluster() -> (SimCluster, Random) {
    let mut random = Random::new(42);
    let cluster = SimCluster::new(9);
    cluster.put("PG_VERSION", b"15\n".to_vec());
    cluster.put_relation("base/5/100", 40, &mut random);
    cluster.put("base/5/3", random.bytes(2 * PAGE));
    (cluster, random)
}

/// Every listed backup can be read back, every byte.
async fn assert_closed(bench: &Bench, cluster: &SimCluster) -> usize {
    whole_backups(&bench.context(cluster).await).await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_fault_at_any_storage_call_of_a_backup_leaves_only_whole_backups() {
    let (cluster, mut random) = small_cluster();
    let bench = Bench::new().await;
    let first = bench.context(&cluster).await;
    back_up(&first, &cluster, &options()).await.unwrap();
    cluster.touch_page("base/5/100", 7, &mut random);
    cluster.archive(&first.store).await;
    let counting = Arc::new(FaultyTarget::counting(bench.copy().target.clone()));
    let repo = bench.repo_over(counting.clone()).await.unwrap();
    let counted = context(&repo, &cluster, bench.clock.clone());
    let plan = dr_engine::backup::plan(&counted, &cluster, &options()).await.unwrap();
    dr_engine::backup::apply(&counted, &cluster, &plan).await.unwrap();
    let calls = counting.calls();
    assert!(calls > 20, "{calls}");
    let mut acknowledged = 0;
    for at in 0..calls {
        for fault in Fault::ALL {
            let own = bench.copy();
            let faulty = Arc::new(FaultyTarget::new(own.target.clone(), at, 1, fault));
            let Ok(repo) = own.repo_over(faulty).await else { continue };
            let context = context(&repo, &cluster, bench.clock.clone());
            let done = match dr_engine::backup::plan(&context, &cluster, &options()).await {
                Ok(plan) => dr_engine::backup::apply(&context, &cluster, &plan).await,
                Err(error) => Err(error),
            };
            let listed = assert_closed(&own, &cluster).await;
            if done.is_ok() {
                acknowledged += 1;
                assert_eq!(listed, 2, "call {at}, {fault:?}: acknowledged and not listed");
            }
            let again = back_up(&own.context(&cluster).await, &cluster, &options()).await;
            assert!(again.is_ok(), "call {at}, {fault:?}: the next backup fails: {again:?}");
        }
    }
    assert!(acknowledged > 0);
}

/// Keys of one object of each kind, with its kind's name.
fn kinds(target: &MemoryTarget) -> Vec<(String, Key)> {
    let mut found = std::collections::BTreeMap::new();
    for key in target.snapshot().keys() {
        let parts: Vec<&str> = key.as_str().split('/').collect();
        let kind = match parts[..] {
            ["cluster", _, "session", _, last] => format!("session {}", last.split('-').next().unwrap()),
            ["cluster", _, kind, ..] => kind.to_owned(),
            [kind, ..] => kind.to_owned(),
            [] => continue,
        };
        // What only tells, and what only saves space, is not needed by a restore.
        let catalogue = kind == "meta" && !key.as_str().contains("/000000-");
        if !catalogue && !["job", "session begin", "page"].contains(&kind.as_str()) {
            found.insert(kind, key.clone());
        }
    }
    found.into_iter().collect()
}

async fn restores(bench: &Bench, cluster: &SimCluster) -> Result<(), ErrorClass> {
    let repo = bench.repo().await;
    let context = context(&repo, cluster, bench.clock.clone());
    let dir = tempfile::tempdir().unwrap();
    let to = dir.path().join("r");
    restore_to(&context, &restore_options(&to)).await.map_err(|error| error.class())?;
    assert_same(&tree(&to), &cluster.content());
    // The WAL of the range is what the server would fetch next.
    let wal = context.store.wal(dr_core::SegmentSize::DEFAULT);
    for stored in wal.segments(dr_core::Timeline(1)).await.map_err(|e| e.class())? {
        let name = dr_core::WalName::Segment(stored.segment);
        wal.fetch(&name, &mut std::io::sink()).await.map_err(|e| e.class())?;
    }
    // A restore of everything needs no names; one of a tenant will.
    for head in context.store.heads().await.map_err(|e| e.class())? {
        let manifest = context.store.manifest(head.id).await.map_err(|e| e.class())?;
        let rows = dr_engine::catalogue::read(&context.store, &manifest).await.map_err(|e| e.class())?;
        assert_eq!(rows, [relation("tenant_1", "orders", 100)]);
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn damage_to_any_kind_of_object_is_detected_and_never_restored_silently() {
    let (cluster, mut random) = small_cluster();
    let bench = Bench::new().await;
    let context = bench.context(&cluster).await;
    back_up(&context, &cluster, &options()).await.unwrap();
    cluster.touch_page("base/5/100", 3, &mut random);
    back_up(&context, &cluster, &options()).await.unwrap();
    restores(&bench, &cluster).await.unwrap();
    let kinds = kinds(&bench.target);
    let names: Vec<&str> = kinds.iter().map(|(kind, _)| kind.as_str()).collect();
    for needed in ["manifest", "meta", "pack", "wal", "session packs", "session dek", "key", "repo.json"] {
        assert!(names.contains(&needed), "{needed} is not among {names:?}");
    }
    for (kind, key) in &kinds {
        let len = bench.target.head(key).await.unwrap().size as usize;
        let positions: Vec<usize> = (0..len).step_by((len / 40).max(1)).collect();
        for at in positions {
            let own = bench.copy();
            own.target.tamper(key, |bytes| bytes[at] ^= 0x10);
            let outcome = try_restore(&own, &cluster).await;
            // A restore needs neither the header nor the end of a pack; `dr verify` sees them.
            let unread = ["pack", "meta"].contains(&kind.as_str()) && (at < 64 || at >= len - 8);
            let harmless = unread || kind == "identity.json";
            assert!(outcome.is_err() || harmless, "{kind}: a flipped bit at {at} of {len} went unnoticed");
        }
        for cut in [0, len / 2, len - 1] {
            let own = bench.copy();
            own.target.tamper(key, |bytes| bytes.truncate(cut));
            let outcome = try_restore(&own, &cluster).await;
            let unread = ["pack", "meta"].contains(&kind.as_str()) && cut == len - 1;
            assert!(
                outcome.is_err() || unread || kind == "identity.json",
                "{kind}: cut to {cut} of {len} went unnoticed"
            );
        }
    }
}

/// Opens and restores; a repository that does not open is detected damage too.
async fn try_restore(bench: &Bench, cluster: &SimCluster) -> Result<(), ErrorClass> {
    match bench.repo_over(bench.target.clone()).await {
        Ok(_) => restores(bench, cluster).await,
        Err(error) => Err(error.class()),
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn objects_of_another_cluster_or_in_anothers_place_are_refused() {
    let (cluster, mut random) = small_cluster();
    let other = SimCluster::new(10);
    other.put_relation("base/5/100", 40, &mut random);
    let bench = Bench::new().await;
    back_up(&bench.context(&cluster).await, &cluster, &options()).await.unwrap();
    back_up(&bench.context(&other).await, &other, &options()).await.unwrap();
    let objects = bench.target.snapshot();
    let mut swapped = 0;
    for (key, _) in objects.iter().filter(|(k, _)| k.as_str().starts_with("cluster/9/")) {
        let kind = key.as_str().split('/').nth(2).unwrap();
        let twin = objects.iter().find(|(k, _)| k.as_str().starts_with(&format!("cluster/10/{kind}/")));
        let Some((_, bytes)) = twin.filter(|_| ["manifest", "meta", "pack", "wal"].contains(&kind)) else {
            continue;
        };
        let own = bench.copy();
        own.target.tamper(key, |content| *content = bytes.to_vec());
        assert!(try_restore(&own, &cluster).await.is_err(), "{key} of another cluster was taken");
        swapped += 1;
    }
    assert!(swapped >= 4, "{swapped}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_backup_whose_wal_is_not_archived_is_not_committed() {
    let (cluster, _) = small_cluster();
    let bench = Bench::new().await;
    let context = bench.context(&cluster).await;
    let plan = dr_engine::backup::plan(&context, &cluster, &options()).await.unwrap();
    let error = dr_engine::backup::apply(&context, &cluster, &plan).await.unwrap_err();
    assert_eq!(error.code(), "job-wal-not-archived");
    assert!(context.store.heads().await.unwrap().is_empty());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_host_key_backs_up_and_lists_but_reads_no_content() {
    let (cluster, mut random) = small_cluster();
    let bench = Bench::new().await;
    let host = bench.repo().await.host_key().unwrap();
    let repo =
        dr_storage::Repository::open(bench.target.clone(), dr_storage::Access::Host(host)).await.unwrap();
    let writer = context(&repo, &cluster, bench.clock.clone());
    back_up(&writer, &cluster, &options()).await.unwrap();
    cluster.touch_page("base/5/100", 5, &mut random);
    let second = back_up(&writer, &cluster, &options()).await.unwrap();
    assert!(second.backup.stored_bytes < 40_000, "increments need no reading key");
    let dir = tempfile::tempdir().unwrap();
    let denied = restore_to(&writer, &restore_options(&dir.path().join("r"))).await.unwrap_err();
    assert_eq!((denied.class(), denied.code()), (ErrorClass::Denied, "key-absent"));
    let wal = writer.store.wal(dr_core::SegmentSize::DEFAULT);
    let name = dr_core::WalName::Segment(dr_core::WalSegment { timeline: dr_core::Timeline(1), number: 1 });
    assert_eq!(wal.fetch(&name, &mut std::io::sink()).await.unwrap_err().code(), "key-absent");
    restores(&bench, &cluster).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_cancelled_backup_leaves_nothing_listed() {
    let (cluster, _) = small_cluster();
    let bench = Bench::new().await;
    let context = bench.context(&cluster).await;
    let plan = dr_engine::backup::plan(&context, &cluster, &options()).await.unwrap();
    context.cancel.cancel();
    let error = dr_engine::backup::apply(&context, &cluster, &plan).await.unwrap_err();
    assert_eq!(error.class(), ErrorClass::Cancelled);
    assert!(context.store.heads().await.unwrap().is_empty());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_damaged_manifest_hides_no_other_backup_and_stops_no_new_one() {
    let (cluster, mut random) = small_cluster();
    let bench = Bench::new().await;
    let context = bench.context(&cluster).await;
    let mut ids = Vec::new();
    for page in 0..3 {
        ids.push(back_up(&context, &cluster, &options()).await.unwrap().backup.id);
        cluster.touch_page("base/5/100", page, &mut random);
    }
    let manifest = |id| Key::new(format!("cluster/{}/manifest/{id}", cluster.system_id)).unwrap();
    // The first one's head and the last one's seal.
    bench.target.tamper(&manifest(ids[0]), |bytes| bytes[80] ^= 0x80);
    bench.target.tamper(&manifest(ids[2]), |bytes| *bytes.last_mut().unwrap() ^= 1);
    let catalogue = context.store.catalogue().await.unwrap();
    assert_eq!(catalogue.heads.iter().map(|head| head.id).collect::<Vec<_>>(), ids[1..]);
    assert_eq!(catalogue.unreadable.iter().map(|(id, _)| *id).collect::<Vec<_>>(), ids[..1]);
    assert!(context.store.heads().await.is_err());

    let dir = tempfile::tempdir().unwrap();
    let named = dr_engine::restore::RestoreOptions {
        backup: Some(ids[1]),
        ..restore_options(&dir.path().join("named"))
    };
    let instance = dr_testkit::instance::FakeInstance::new();
    let plan = dr_engine::restore::plan(&context, &instance, &named).await.unwrap();
    assert!(
        plan.findings
            .iter()
            .any(|f| f.check == "backup-unreadable" && f.detail.contains(&ids[0].to_string()))
    );
    restore_to(&context, &named).await.unwrap();
    // Where nothing is replayed, which backup is the newest matters.
    let newest = restore_options(&dir.path().join("newest"));
    assert_eq!(restore_to(&context, &newest).await.map(drop).unwrap_err().class(), ErrorClass::Corrupt);

    cluster.archive(&context.store).await;
    let plan = dr_engine::backup::plan(&context, &cluster, &options()).await.unwrap();
    assert_eq!(plan.parent, Some(ids[1]), "a damaged backup is not built upon");
    assert_eq!(plan.findings.iter().filter(|f| f.check == "backup-unreadable").count(), 2);
    let fresh = dr_engine::backup::apply(&context, &cluster, &plan).await.unwrap().backup.id;
    let named = dr_engine::restore::RestoreOptions {
        backup: Some(fresh),
        ..restore_options(&dir.path().join("fresh"))
    };
    restore_to(&context, &named).await.unwrap();
    assert_same(&tree(&dir.path().join("fresh")), &cluster.content());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_damaged_history_stops_only_the_restores_that_need_it() {
    let (cluster, _) = small_cluster();
    let bench = Bench::new().await;
    let context = bench.context(&cluster).await;
    back_up(&context, &cluster, &options()).await.unwrap();
    let two = dr_core::WalName::History(Timeline(2));
    let wal = context.store.wal(dr_core::SegmentSize::DEFAULT);
    wal.store_small(&two, b"1\t7F/0\tno recovery target specified\n").await.unwrap();
    let plan = async |timeline| {
        let dir = tempfile::tempdir().unwrap();
        let options = RestoreOptions { timeline, ..restore_options(&dir.path().join("r")) };
        let planned = dr_engine::restore::plan(&context, &FakeInstance::new(), &options).await;
        let told = |p: RestorePlan| p.findings.iter().any(|f| f.check == "timeline-history");
        planned.map(|plan| (plan.timeline, told(plan))).map_err(|error| error.class())
    };
    assert_eq!(plan(TimelineChoice::Latest).await, Ok((Timeline(2), false)));
    let key = bench.target.snapshot().keys().find(|k| k.as_str().ends_with("2.history")).unwrap().clone();
    bench.target.tamper(&key, |bytes| bytes[200] ^= 1);
    assert_eq!(plan(TimelineChoice::Current).await, Ok((Timeline(1), true)));
    assert_eq!(plan(TimelineChoice::Number(Timeline(1))).await, Ok((Timeline(1), true)));
    assert_eq!(plan(TimelineChoice::Number(Timeline(2))).await, Err(ErrorClass::Corrupt));
    assert_eq!(plan(TimelineChoice::Latest).await, Err(ErrorClass::Corrupt), "it may be the newest");
}
