//! Files that arrive in the server's order give the same backups as files that are listed.
#![allow(clippy::unwrap_used, missing_docs)]

mod common;

use common::*;
use dr_engine::backup::BackupOptions;
use dr_storage::format::{BackupStatus, EXTENT_LEN, STRETCH_LEN};
use dr_testkit::sim::{BAD, PAGE, Random, SimCluster};

fn cluster(seed: u64, random: &mut Random) -> SimCluster {
    let mut cluster = SimCluster::new(seed);
    cluster.streamed = true;
    cluster.put("PG_VERSION", b"15\n".to_vec());
    cluster.put("base/5/1", Vec::new());
    cluster.put("base/5/2", random.bytes(PAGE * 3));
    cluster.put_relation("base/5/100", 5 * EXTENT_LEN / PAGE + 3, random);
    cluster.put_relation("base/5/101", (STRETCH_LEN + EXTENT_LEN) / PAGE, random);
    cluster.put("pg_xact/0000", random.bytes(EXTENT_LEN + 100));
    for number in 0..300 {
        cluster.put(&format!("misc/7/{number}"), random.bytes(number * 40));
    }
    cluster
}

#[tokio::test(flavor = "multi_thread")]
async fn streamed_and_listed_backups_in_turn_restore_each_to_its_moment() {
    let mut random = Random::new(3);
    let mut cluster = cluster(31, &mut random);
    let bench = Bench::new().await;
    let context = bench.context(&cluster).await;
    let mut taken = Vec::new();
    for number in 0..8 {
        cluster.streamed = number % 3 != 1;
        let report = back_up(&context, &cluster, &options()).await.unwrap();
        taken.push((report.backup.id, report.backup.stored_bytes, cluster.content()));
        cluster.touch_page("base/5/101", random.below(2000) as usize, &mut random);
        cluster.put(&format!("misc/7/{}", 400 + number), random.bytes(1000));
        cluster.remove(&format!("misc/7/{number}"));
    }
    for (_, stored, _) in &taken[1..] {
        assert!(*stored * 20 < taken[0].1, "{stored} of {}: only what changed is stored", taken[0].1);
    }
    let dir = tempfile::tempdir().unwrap();
    for (number, (id, _, expected)) in taken.iter().enumerate() {
        let to = dir.path().join(number.to_string());
        let options = dr_engine::restore::RestoreOptions { backup: Some(*id), ..restore_options(&to) };
        restore_to(&context, &options).await.unwrap();
        assert_same(&tree(&to), expected);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_broken_stream_lists_nothing_and_what_was_stored_is_taken_over() {
    let mut random = Random::new(4);
    let mut cluster = cluster(32, &mut random);
    let bench = Bench::new().await;
    let context = bench.context(&cluster).await;
    let points = BackupOptions { point_every_bytes: 200_000, ..options() };
    let whole: u64 = cluster.content().values().map(|content| content.len() as u64).sum();
    cluster.fail_after(Some(whole - 1000));
    let error = back_up(&context, &cluster, &points).await.unwrap_err();
    assert!(dr_engine::chain(&error).contains("the stream broke"), "{error}");
    assert!(context.store.catalogue().await.unwrap().heads.is_empty(), "nothing half-made is listed");
    cluster.fail_after(None);
    let stored = |report: &dr_engine::backup::BackupReport| report.backup.stored_bytes;
    // Either source goes on from what the broken one had stored.
    for streamed in [true, false] {
        cluster.streamed = streamed;
        let bench = bench.copy();
        let context = bench.context(&cluster).await;
        let report = back_up(&context, &cluster, &points).await.unwrap();
        let compressed = whole / 4;
        if streamed {
            assert!(stored(&report) < compressed / 2, "{} of about {compressed}", stored(&report));
        }
        let dir = tempfile::tempdir().unwrap();
        let to = dir.path().join("copy");
        restore_to(&context, &restore_options(&to)).await.unwrap();
        assert_same(&tree(&to), &cluster.content());
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_page_that_was_being_written_is_stored_as_it_came_and_one_that_is_bad_degrades() {
    let mut random = Random::new(6);
    let cluster = cluster(33, &mut random);
    let bench = Bench::new().await;
    let context = bench.context(&cluster).await;
    // Wrong in the stream, right when it is looked at again: its image is in the WAL of the backup.
    // What is there now may be newer than the backup's end and must not get into it.
    cluster.tear_in_stream("base/5/100", 7);
    cluster.tear_in_stream("base/5/2", 1);
    let report = back_up(&context, &cluster, &options()).await.unwrap();
    assert_eq!((report.backup.status, report.backup.torn_pages), (BackupStatus::Complete, 2));
    let dir = tempfile::tempdir().unwrap();
    let to = dir.path().join("copy");
    restore_to(&context, &restore_options(&to)).await.unwrap();
    let restored = tree(&to);
    for (path, page) in [("base/5/100", 7), ("base/5/2", 1)] {
        assert_eq!(&restored[path][page * PAGE..page * PAGE + 8], BAD, "{path} is stored as it came");
    }
    cluster.edit("base/5/101", |content| content[PAGE..PAGE + 8].copy_from_slice(BAD));
    let report = back_up(&context, &cluster, &options()).await.unwrap();
    assert_eq!((report.backup.status, report.bad_pages.len()), (BackupStatus::Degraded, 1));
    assert_eq!((report.bad_pages[0].path.as_str(), report.bad_pages[0].block), ("base/5/101", 1));
}
