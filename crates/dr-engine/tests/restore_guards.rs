//! A restore refuses before it touches, and proves what it reached.
#![allow(clippy::unwrap_used, missing_docs)]

mod common;

use std::path::Path;

use common::*;
use dr_core::port::{HostFacts, InstanceStatus, RecoveryEnd, RecoveryTarget, RunState};
use dr_core::{Classified, Lsn, Timeline};
use dr_engine::restore::{self, RestoreOptions};
use dr_engine::{Context, EngineError};
use dr_testkit::instance::{FakeInstance, control_bytes};
use dr_testkit::sim::{Random, SimCluster, archive_segment};

async fn ready() -> (Bench, SimCluster, Context, tempfile::TempDir) {
    let mut random = Random::new(1);
    let cluster = SimCluster::new(11);
    cluster.put_relation("base/5/100", 40, &mut random);
    let bench = Bench::new().await;
    let context = bench.context(&cluster).await;
    back_up(&context, &cluster, &options()).await.unwrap();
    (bench, cluster, context, tempfile::tempdir().unwrap())
}

async fn run(
    context: &Context,
    instance: &FakeInstance,
    options: &RestoreOptions,
) -> Result<(), EngineError> {
    let plan = restore::plan(context, instance, options).await?;
    restore::apply(context, instance, &plan).await.map(|_| ())
}

fn put(path: &Path, content: &[u8]) {
    std::fs::create_dir_all(path.parent().unwrap()).unwrap();
    std::fs::write(path, content).unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_directory_that_is_not_empty_is_refused_and_left_alone() {
    let (_bench, _cluster, context, dir) = ready().await;
    let to = dir.path().join("r");
    put(&to.join("precious"), b"data");
    let error = run(&context, &FakeInstance::new(), &restore_options(&to)).await.unwrap_err();
    assert_eq!(error.code(), "job-not-empty");
    assert_eq!(std::fs::read(to.join("precious")).unwrap(), b"data");
    assert_eq!(std::fs::read_dir(&to).unwrap().count(), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_delta_restore_refuses_another_cluster_a_foreign_directory_and_a_running_server() {
    let (_bench, cluster, context, dir) = ready().await;
    let to = dir.path().join("r");
    let delta = RestoreOptions { delta: true, ..restore_options(&to) };
    put(&to.join("precious"), b"data");
    let error = run(&context, &FakeInstance::new(), &delta).await.unwrap_err();
    assert_eq!(error.code(), "job-not-ours");
    put(&to.join("global/pg_control"), &control_bytes(dr_core::SystemId(999)));
    let error = run(&context, &FakeInstance::new(), &delta).await.unwrap_err();
    assert_eq!(error.code(), "job-not-ours");
    put(&to.join("global/pg_control"), &control_bytes(cluster.system_id));
    let running = FakeInstance { already_running: true, ..FakeInstance::new() };
    let error = run(&context, &running, &delta).await.unwrap_err();
    assert_eq!(error.code(), "job-not-ours");
    assert_eq!(std::fs::read(to.join("precious")).unwrap(), b"data");
    run(&context, &FakeInstance::new(), &delta).await.unwrap();
    assert_same(&tree(&to), &cluster.content());
}

#[tokio::test(flavor = "multi_thread")]
async fn an_interrupted_restore_has_no_pg_control_and_is_continued() {
    let (bench, cluster, context, dir) = ready().await;
    let to = dir.path().join("r");
    let data = bench.target.snapshot().keys().find(|k| k.as_str().contains("/pack/")).unwrap().clone();
    let whole = bench.target.snapshot()[&data].to_vec();
    bench.target.tamper(&data, |bytes| bytes[5000] ^= 1);
    let error = run(&context, &FakeInstance::new(), &restore_options(&to)).await.unwrap_err();
    assert_eq!(error.class(), dr_core::ErrorClass::Corrupt);
    assert!(to.exists() && !to.join("global/pg_control").exists(), "an interrupted restore must not start");
    assert!(to.join(restore::MARKER).exists());
    bench.target.tamper(&data, |bytes| *bytes = whole.clone());
    let delta = RestoreOptions { delta: true, ..restore_options(&to) };
    run(&context, &FakeInstance::new(), &delta).await.unwrap();
    assert_same(&tree(&to), &cluster.content());
    assert!(to.join("global/pg_control").exists() && !to.join(restore::MARKER).exists());
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_crash_in_the_first_moment_leaves_does_not_lock_the_directory() {
    let (_bench, cluster, context, dir) = ready().await;
    let to = dir.path().join("r");
    // The draft of the mark, cut: nothing else was done before the mark is whole.
    put(&to.join("dr-restore.json.new"), b"{\"sys");
    put(&dir.path().join("other/dr-restore.json.new"), b"");
    put(&dir.path().join("other/precious"), b"data");
    let refused = run(&context, &FakeInstance::new(), &restore_options(&dir.path().join("other"))).await;
    assert_eq!(refused.unwrap_err().code(), "job-not-empty");
    for delta in [true, false] {
        let options = RestoreOptions { delta, ..restore_options(&to) };
        run(&context, &FakeInstance::new(), &options).await.unwrap();
        assert_same(&tree(&to), &cluster.content());
        std::fs::remove_dir_all(&to).unwrap();
        put(&to.join("dr-restore.json.new"), b"");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_gap_in_wal_is_refused_before_a_byte_moves() {
    let (bench, cluster, context, dir) = ready().await;
    let last = cluster.lsn().0 >> 24;
    archive_segment(&context.store, 1, last + 2).await;
    let to = dir.path().join("r");
    let latest = RestoreOptions { target: RecoveryTarget::Latest, ..restore_options(&to) };
    let error = run(&context, &FakeInstance::new(), &latest).await.unwrap_err();
    assert_eq!(error.code(), "job-wal-gap");
    assert!(!to.exists());
    run(&context, &FakeInstance::new(), &restore_options(&to)).await.unwrap();
    drop(bench);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_target_before_the_backup_is_refused() {
    let (_bench, _cluster, context, dir) = ready().await;
    let early = RestoreOptions {
        target: RecoveryTarget::Lsn { lsn: Lsn(1) },
        ..restore_options(&dir.path().join("r"))
    };
    let error = run(&context, &FakeInstance::new(), &early).await.unwrap_err();
    assert_eq!(error.code(), "job-target-before-backup");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_host_that_cannot_run_the_cluster_is_refused_before_a_byte_moves() {
    let (_bench, _cluster, context, dir) = ready().await;
    let to = dir.path().join("r");
    let good = FakeInstance::new().host;
    for host in [
        HostFacts { architecture: "other".into(), ..good.clone() },
        HostFacts { major: None, ..good.clone() },
        HostFacts { missing_libraries: vec!["postgis".into()], ..good.clone() },
    ] {
        let instance = FakeInstance { host, ..FakeInstance::new() };
        let options = RestoreOptions { start: true, ..restore_options(&to) };
        let error = restore::plan(&context, &instance, &options).await.unwrap_err();
        assert_eq!(error.code(), "job-preflight");
    }
    assert!(!to.exists());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_restore_that_does_not_fit_is_refused() {
    let (_bench, cluster, context, _dir) = ready().await;
    // A small file system of its own: the one of /dev/shm is a tmpfs; claim a size that cannot fit.
    let mut huge = context.store.heads().await.unwrap().pop().unwrap();
    huge.bytes = u64::MAX / 4;
    drop(cluster);
    let dir = tempfile::tempdir().unwrap();
    let findings = restore::check_space(huge.bytes, &restore_options(&dir.path().join("r")), &[]).unwrap();
    assert_eq!(findings[0].verdict, dr_core::port::Verdict::Bad);
    assert!(restore::stops(&findings[0]), "a lack of space stops a restore");
}

async fn reach(target: RecoveryTarget, end: RecoveryEnd, status: InstanceStatus) -> Result<(), EngineError> {
    let (_bench, cluster, context, dir) = ready().await;
    for number in 2..4 {
        archive_segment(&context.store, 1, number).await;
    }
    drop(cluster);
    let instance = FakeInstance { end, running: status, ..FakeInstance::new() };
    let to = dir.path().join("r");
    // Tests may run as root; the plan's own refusal of root is not what is tested here.
    let options = RestoreOptions { target, ..restore_options(&to) };
    let mut plan = restore::plan(&context, &instance, &options).await?;
    plan.options.start = true;
    restore::apply(&context, &instance, &plan).await.map(|_| ())
}

fn primary(lsn: u64) -> InstanceStatus {
    InstanceStatus {
        state: RunState::Primary,
        lsn: Some(Lsn(lsn)),
        last_commit: None,
        timeline: Some(Timeline(2)),
    }
}

fn ended(stopped_at_target: bool) -> RecoveryEnd {
    RecoveryEnd {
        stopped_at_target,
        lsn: Some(Lsn(0x0200_0000)),
        new_timeline: Some(Timeline(2)),
        ..RecoveryEnd::default()
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_recovery_that_missed_its_target_is_a_failure() {
    let target = || RecoveryTarget::Lsn { lsn: Lsn(0x0200_0000) };
    reach(target(), ended(true), primary(0x0200_0000)).await.unwrap();
    let missed = reach(target(), ended(false), primary(0x0200_0000)).await.unwrap_err();
    assert_eq!(missed.code(), "job-target-not-reached");
    let failed = RecoveryEnd { failed: true, ..ended(false) };
    let stopped = InstanceStatus { state: RunState::Stopped, lsn: None, last_commit: None, timeline: None };
    let missed = reach(target(), failed, stopped).await.unwrap_err();
    assert_eq!(missed.code(), "job-target-not-reached");
    // "Latest" that ends before the backup is consistent.
    let short = RecoveryEnd { lsn: Some(Lsn(1)), ..ended(false) };
    let missed = reach(RecoveryTarget::Latest, short, primary(1)).await.unwrap_err();
    assert_eq!(missed.code(), "job-target-not-reached");
}
