//! What was backed up is what is restored, after any edits, and at a bounded cost.
#![allow(clippy::unwrap_used, missing_docs)]

mod common;

use common::*;
use dr_storage::format::{BackupStatus, EXTENT_LEN, STRETCH_LEN};
use dr_testkit::sim::{BAD, PAGE, Random, SimCluster, TORN};

/// Small, inline, empty, large, sparse and odd files.
fn populate(cluster: &SimCluster, random: &mut Random) {
    cluster.put("PG_VERSION", b"15\n".to_vec());
    cluster.put("base/5/1", Vec::new());
    cluster.put("base/5/2", random.bytes(PAGE * 3));
    cluster.put_relation("base/5/100", 5 * EXTENT_LEN / PAGE + 3, random);
    cluster.put_relation("base/5/101", (STRETCH_LEN + EXTENT_LEN) / PAGE, random);
    let mut sparse = vec![0; 4 * EXTENT_LEN];
    sparse[EXTENT_LEN * 2 + 17] = 1;
    cluster.put("base/5/102", sparse);
    cluster.put("pg_xact/0000", random.bytes(EXTENT_LEN + 100));
    cluster.put("weird%name", b"x".to_vec());
}

fn mutate(cluster: &SimCluster, random: &mut Random) {
    for _ in 0..random.below(12) + 1 {
        let files: Vec<String> =
            cluster.content().keys().filter(|f| f.starts_with("base/")).cloned().collect();
        let path = &files[random.below(files.len() as u64) as usize];
        let pages = cluster.content()[path].len() / PAGE;
        match random.below(8) {
            0 => cluster.edit(path, |c| c.truncate(c.len() / 2 / PAGE * PAGE)),
            1 => {
                let len = PAGE * (random.below(70) as usize);
                let more = random.bytes(len);
                cluster.edit(path, |c| c.extend_from_slice(&more));
            }
            2 => {
                let (name, len) = (200 + random.below(20), random.below(600_000) as usize / PAGE * PAGE);
                let content = random.bytes(len);
                cluster.put(&format!("base/5/{name}"), content);
            }
            3 if files.len() > 4 => cluster.remove(path),
            4 => cluster.edit(path, |c| c.fill(0)),
            _ if pages > 0 => {
                for _ in 0..random.below(40) {
                    cluster.touch_page(path, random.below(pages as u64) as usize, random);
                }
            }
            _ => {}
        }
    }
}

/// Every backup of a series restores to what the cluster was when it was taken.
async fn series(seed: u64, backups: usize, trust_stat: bool) {
    let mut random = Random::new(seed);
    let mut cluster = SimCluster::new(700 + seed);
    cluster.trust_stat = trust_stat;
    populate(&cluster, &mut random);
    let bench = Bench::new().await;
    let context = bench.context(&cluster).await;
    let mut taken = Vec::new();
    for _ in 0..backups {
        let report = back_up(&context, &cluster, &options()).await.unwrap();
        taken.push((report.backup.id, cluster.content()));
        mutate(&cluster, &mut random);
    }
    let dir = tempfile::tempdir().unwrap();
    for (number, (id, expected)) in taken.iter().enumerate() {
        let to = dir.path().join(number.to_string());
        let options = dr_engine::restore::RestoreOptions { backup: Some(*id), ..restore_options(&to) };
        restore_to(&context, &options).await.unwrap();
        assert_same(&tree(&to), expected);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn every_backup_of_a_series_of_random_edits_restores_to_its_moment() {
    for seed in 1..4 {
        series(seed, 6, true).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn trusting_time_stamps_or_not_gives_the_same_content() {
    series(9, 4, false).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn slow_long_series_of_random_edits_restore() {
    let cases: u64 = std::env::var("DR_TEST_SERIES").ok().and_then(|n| n.parse().ok()).unwrap_or(3);
    for seed in 100..100 + cases {
        series(seed, 30, seed % 2 == 0).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_unchanged_cluster_stores_no_content_again() {
    let mut random = Random::new(5);
    let cluster = SimCluster::new(1);
    populate(&cluster, &mut random);
    let bench = Bench::new().await;
    let context = bench.context(&cluster).await;
    let first = back_up(&context, &cluster, &options()).await.unwrap();
    let second = back_up(&context, &cluster, &options()).await.unwrap();
    assert_eq!(second.backup.read_bytes, 0, "unchanged files are not read");
    assert!(second.backup.stored_bytes < 20_000, "{}", second.backup.stored_bytes);
    let read = dr_engine::backup::BackupOptions { read_all: true, ..options() };
    let third = back_up(&context, &cluster, &read).await.unwrap();
    assert_eq!(third.backup.read_bytes, first.backup.read_bytes);
    assert!(third.backup.stored_bytes < 20_000, "{}", third.backup.stored_bytes);
}

/// 1 % of pages, scattered or in a run, ten backups in a row: what is stored stays near the
/// compressed changed pages, and the tenth restores nearly as cheaply as a fresh one.
#[tokio::test(flavor = "multi_thread")]
async fn scattered_changes_cost_their_pages_and_the_tenth_restores_like_the_first() {
    for run in [1, 16] {
        let mut random = Random::new(run);
        let cluster = SimCluster::new(2);
        let pages = 2 * STRETCH_LEN / PAGE;
        cluster.put_relation("base/5/100", pages, &mut random);
        let bench = Bench::new().await;
        let context = bench.context(&cluster).await;
        let first = back_up(&context, &cluster, &options()).await.unwrap();
        let page_stored = first.backup.stored_bytes as f64 / pages as f64;
        for number in 0..9 {
            let changed = pages / 100;
            for _ in 0..changed / run as usize {
                let at = random.below((pages - run as usize) as u64) as usize;
                (0..run as usize).for_each(|k| cluster.touch_page("base/5/100", at + k, &mut random));
            }
            let report = back_up(&context, &cluster, &options()).await.unwrap();
            let stored = report.backup.stored_bytes as f64;
            // Two maps, a table and the catalogue are 8 KB a stretch and 8 KB in all.
            let limit = 1.5 * page_stored * changed as f64 + 3.0 * 8192.0;
            assert!(stored <= limit, "backup {number}, runs of {run}: stored {stored}, limit {limit}");
        }
        let dir = tempfile::tempdir().unwrap();
        let tenth = restore_to(&context, &restore_options(&dir.path().join("tenth"))).await.unwrap();
        assert_same(&tree(&dir.path().join("tenth")), &cluster.content());
        let full = dr_engine::backup::BackupOptions { full: true, ..options() };
        back_up(&context, &cluster, &full).await.unwrap();
        let fresh = restore_to(&context, &restore_options(&dir.path().join("fresh"))).await.unwrap();
        let ratio = tenth.bytes_fetched as f64 / fresh.bytes_fetched as f64;
        assert!(ratio <= 1.5, "the tenth reads {ratio} times a fresh one");
    }
}

/// Old patches are replaced before they make restores dear.
#[tokio::test(flavor = "multi_thread")]
async fn slow_sixty_backups_never_read_more_than_half_again() {
    let mut random = Random::new(77);
    let cluster = SimCluster::new(3);
    let pages = STRETCH_LEN / PAGE;
    cluster.put_relation("base/5/100", pages, &mut random);
    let bench = Bench::new().await;
    let context = bench.context(&cluster).await;
    let first = back_up(&context, &cluster, &options()).await.unwrap();
    let dir = tempfile::tempdir().unwrap();
    for number in 0..60 {
        for _ in 0..pages / 50 {
            cluster.touch_page("base/5/100", random.below(pages as u64) as usize, &mut random);
        }
        back_up(&context, &cluster, &options()).await.unwrap();
        if number % 5 == 4 {
            let to = dir.path().join(number.to_string());
            let report = restore_to(&context, &restore_options(&to)).await.unwrap();
            assert_same(&tree(&to), &cluster.content());
            let ratio = report.bytes_fetched as f64 / first.backup.stored_bytes as f64;
            assert!(ratio <= 1.55, "after {number} backups a restore reads {ratio} times a fresh one");
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_bad_page_degrades_the_backup_and_stays_marked_until_it_is_good() {
    let mut random = Random::new(6);
    let cluster = SimCluster::new(4);
    cluster.put_relation("base/5/100", 100, &mut random);
    cluster.put_relation("base/5/7", 3, &mut random);
    cluster.edit("base/5/100", |c| c[40 * PAGE..40 * PAGE + 8].copy_from_slice(BAD));
    cluster.edit("base/5/7", |c| c[PAGE..PAGE + 8].copy_from_slice(BAD));
    let bench = Bench::new().await;
    let context = bench.context(&cluster).await;
    let first = back_up(&context, &cluster, &options()).await.unwrap();
    assert_eq!(first.backup.status, BackupStatus::Degraded);
    let places: Vec<_> =
        first.bad_pages.iter().map(|b| (b.path.as_str(), b.block, b.relation.as_deref())).collect();
    assert_eq!(places, [("base/5/100", 40, Some("pos.tenant_1.orders")), ("base/5/7", 1, None)]);
    // Not read again, still known.
    let second = back_up(&context, &cluster, &options()).await.unwrap();
    assert_eq!((second.backup.status, second.bad_pages.len()), (BackupStatus::Degraded, 2));
    cluster.touch_page("base/5/100", 40, &mut random);
    cluster.touch_page("base/5/7", 1, &mut random);
    let third = back_up(&context, &cluster, &options()).await.unwrap();
    assert_eq!((third.backup.status, third.bad_pages.len()), (BackupStatus::Complete, 0));
}

#[tokio::test(flavor = "multi_thread")]
async fn an_interrupted_backup_is_continued_without_sending_again() {
    let mut random = Random::new(8);
    let cluster = SimCluster::new(5);
    // More files than the queue of tasks holds: the walk is not at its end when points are due.
    for file in 0..80 {
        cluster.put_relation(&format!("base/5/{}", 100 + file), 40, &mut random);
    }
    let bench = Bench::new().await;
    let context = bench.context(&cluster).await;
    let total: u64 = cluster.content().values().map(|c| c.len() as u64).sum();
    cluster.fail_after(Some(total * 3 / 4));
    let points = dr_engine::backup::BackupOptions { point_every_bytes: total / 6, ..options() };
    back_up(&context, &cluster, &points).await.unwrap_err();
    assert!(context.store.heads().await.unwrap().is_empty(), "nothing half-made is listed");
    cluster.fail_after(None);
    let plan = dr_engine::backup::plan(&context, &cluster, &points).await.unwrap();
    assert!(plan.continues.is_some());
    let second = back_up(&context, &cluster, &points).await.unwrap();
    assert!(second.backup.read_bytes < total * 2 / 3, "read {} of {total} again", second.backup.read_bytes);
    let dir = tempfile::tempdir().unwrap();
    restore_to(&context, &restore_options(&dir.path().join("r"))).await.unwrap();
    assert_same(&tree(&dir.path().join("r")), &cluster.content());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_delta_restore_fetches_only_what_differs() {
    let mut random = Random::new(10);
    let cluster = SimCluster::new(6);
    populate(&cluster, &mut random);
    let bench = Bench::new().await;
    let context = bench.context(&cluster).await;
    back_up(&context, &cluster, &options()).await.unwrap();
    let dir = tempfile::tempdir().unwrap();
    let to = dir.path().join("r");
    let fresh = restore_to(&context, &restore_options(&to)).await.unwrap();
    std::fs::write(to.join("base/5/stray"), b"x").unwrap();
    std::fs::remove_file(to.join("base/5/2")).unwrap();
    let mut damaged = std::fs::read(to.join("base/5/101")).unwrap();
    damaged[3 * EXTENT_LEN + 5] ^= 1;
    damaged.truncate(damaged.len() - PAGE);
    std::fs::write(to.join("base/5/101"), damaged).unwrap();
    let delta = dr_engine::restore::RestoreOptions { delta: true, ..restore_options(&to) };
    let report = restore_to(&context, &delta).await.unwrap();
    assert_same(&tree(&to), &cluster.content());
    assert!(report.bytes_kept > report.bytes / 2);
    assert!(
        report.bytes_fetched < fresh.bytes_fetched / 3,
        "{} of {}",
        report.bytes_fetched,
        fresh.bytes_fetched
    );
}

/// A page that was caught while it was written is whole after replay: it does not degrade a backup.
#[tokio::test(flavor = "multi_thread")]
async fn a_torn_page_is_counted_and_does_not_degrade_the_backup() {
    let mut random = Random::new(12);
    let cluster = SimCluster::new(7);
    cluster.put_relation("base/5/100", 100, &mut random);
    cluster.edit("base/5/100", |c| c[40 * PAGE..40 * PAGE + 8].copy_from_slice(TORN));
    let bench = Bench::new().await;
    let context = bench.context(&cluster).await;
    let report = back_up(&context, &cluster, &options()).await.unwrap();
    assert_eq!((report.backup.status, report.backup.torn_pages), (BackupStatus::Complete, 1));
}
