//! WAL in and out of the archive: never a lie.
#![allow(clippy::unwrap_used, missing_docs)]

mod common;

use std::path::{Path, PathBuf};
use std::sync::Arc;

use common::*;
use dr_core::{Classified, ErrorClass, SegmentSize, SystemId};
use dr_engine::wal::{Archive, FetchOutcome};
use dr_storage::Repository;
use dr_testkit::faults::{Fault, FaultyTarget};

/// Segments of 1 MiB keep the tests quick.
fn size() -> SegmentSize {
    SegmentSize::try_from(1 << 20).unwrap()
}

const SYSTEM: SystemId = SystemId(77);

fn archive(repo: &Repository) -> Archive<'static> {
    Archive {
        store: repo.cluster(SYSTEM).wal(size()),
        format: &AnyWal,
        system_id: SYSTEM,
        segment_size: size(),
    }
}

fn segment(dir: &Path, name: &str, fill: u8) -> PathBuf {
    let path = dir.join(name);
    std::fs::write(&path, vec![fill; size().bytes() as usize]).unwrap();
    path
}

const ONE: &str = "000000010000000000000001";
const TWO: &str = "000000010000000000000002";
const FIVE: &str = "000000010000000000000005";

#[tokio::test]
async fn push_is_idempotent_and_refuses_other_content_under_the_same_name() {
    let bench = Bench::new().await;
    let archive = archive(&bench.repo().await);
    let dir = tempfile::tempdir().unwrap();
    let path = segment(dir.path(), ONE, 1);
    assert!(!archive.push(&path).await.unwrap().was_stored);
    assert!(archive.push(&path).await.unwrap().was_stored);
    let other = segment(dir.path(), ONE, 2);
    let error = archive.push(&other).await.unwrap_err();
    assert_eq!((error.class(), error.code()), (ErrorClass::Fenced, "repo-fenced"));
    let out = dir.path().join("out");
    archive.fetch(ONE, &out).await.unwrap();
    assert!(std::fs::read(&out).unwrap().iter().all(|b| *b == 1), "the first content stays");
}

#[tokio::test]
async fn a_cut_segment_is_not_stored() {
    let bench = Bench::new().await;
    let archive = archive(&bench.repo().await);
    let dir = tempfile::tempdir().unwrap();
    let path = segment(dir.path(), ONE, 1);
    std::fs::OpenOptions::new().write(true).open(&path).unwrap().set_len(1000).unwrap();
    assert_eq!(archive.push(&path).await.unwrap_err().code(), "wal-bad-length");
    assert_eq!(archive.push(&dir.path().join("nonsense")).await.unwrap_err().code(), "wal-bad-name");
    assert_eq!(archive.fetch(ONE, &dir.path().join("o")).await.unwrap(), FetchOutcome::Absent);
}

#[tokio::test]
async fn absence_is_answered_only_beyond_the_frontier() {
    let bench = Bench::new().await;
    let archive = archive(&bench.repo().await);
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("out");
    for name in [ONE, FIVE] {
        archive.push(&segment(dir.path(), name, 3)).await.unwrap();
    }
    // A hole is not the end of WAL.
    let hole = archive.fetch(TWO, &out).await;
    assert!(hole.is_err(), "a hole was told as the end: {hole:?}");
    assert_eq!(archive.fetch("000000010000000000000006", &out).await.unwrap(), FetchOutcome::Absent);
    assert_eq!(archive.fetch("000000020000000000000006", &out).await.unwrap(), FetchOutcome::Absent);
    assert_eq!(archive.fetch("00000002.history", &out).await.unwrap(), FetchOutcome::Absent);
    assert!(!out.exists());
}

/// A standby that polls asks for a segment while it is being archived: neither the end nor a hole.
#[tokio::test]
async fn a_segment_that_arrives_between_two_looks_is_delivered() {
    let bench = Bench::new().await;
    let dir = tempfile::tempdir().unwrap();
    let history = dir.path().join("00000002.history");
    std::fs::write(&history, "1\t0/300000\tx\n").unwrap();
    let pushed = archive(&bench.repo().await);
    pushed.push(&segment(dir.path(), ONE, 3)).await.unwrap();
    pushed.push(&history).await.unwrap();
    let out = dir.path().join("out");
    let mut met = 0;
    for name in [ONE, "00000002.history"] {
        for at in 0..8 {
            let late = Arc::new(FaultyTarget::new(bench.target.clone(), at, 1, Fault::NotYet));
            let Ok(repo) = bench.repo_over(late.clone()).await else { continue };
            let opened = late.calls();
            let fetched = archive(&repo).fetch(name, &out).await;
            assert!(matches!(fetched, Ok(FetchOutcome::Delivered { .. })), "{name} at {at}: {fetched:?}");
            met += u32::from(opened <= at && at < late.calls());
        }
    }
    assert!(met >= 2, "no look was early");
}

#[tokio::test]
async fn an_outage_never_looks_like_the_end_of_wal() {
    let bench = Bench::new().await;
    let dir = tempfile::tempdir().unwrap();
    archive(&bench.repo().await).push(&segment(dir.path(), ONE, 3)).await.unwrap();
    for fault in [Fault::Denied, Fault::Unavailable, Fault::LostBefore, Fault::WrongBytes] {
        for at in 0..6 {
            let faulty = Arc::new(FaultyTarget::new(bench.target.clone(), at, 1, fault));
            let Ok(repo) = bench.repo_over(faulty.clone()).await else { continue };
            let out = dir.path().join("out");
            let fetched = archive(&repo).fetch(ONE, &out).await;
            let whole = std::fs::read(&out)
                .is_ok_and(|b| b.len() as u64 == size().bytes() && b.iter().all(|b| *b == 3));
            match fetched {
                Ok(FetchOutcome::Absent) => panic!("{fault:?} at call {at} looked like the end of WAL"),
                Ok(_) => assert!(whole),
                Err(_) => assert!(!out.exists(), "{fault:?} at call {at} handed over a part"),
            }
            let _ = std::fs::remove_file(&out);
        }
    }
}

#[tokio::test]
async fn damaged_wal_is_never_handed_over() {
    let bench = Bench::new().await;
    let dir = tempfile::tempdir().unwrap();
    let archive = archive(&bench.repo().await);
    archive.push(&segment(dir.path(), ONE, 3)).await.unwrap();
    let key = bench.target.snapshot().keys().find(|k| k.as_str().ends_with(ONE)).unwrap().clone();
    let len = bench.target.snapshot()[&key].len();
    let out = dir.path().join("out");
    for at in (0..len).step_by(7) {
        bench.target.tamper(&key, |bytes| bytes[at] ^= 1);
        let fetched = archive.fetch(ONE, &out).await;
        assert!(fetched.is_err(), "a flipped bit at {at} of {len} was handed over");
        assert!(!out.exists());
        bench.target.tamper(&key, |bytes| bytes[at] ^= 1);
        let _ = std::fs::remove_file(&out);
    }
}

#[tokio::test]
async fn histories_labels_and_partials_are_kept_and_given_back() {
    let bench = Bench::new().await;
    let dir = tempfile::tempdir().unwrap();
    let archive = archive(&bench.repo().await);
    let history = dir.path().join("00000002.history");
    std::fs::write(&history, "1\t0/300000\tx\n").unwrap();
    let label = dir.path().join(format!("{ONE}.00000028.backup"));
    std::fs::write(&label, "START WAL LOCATION: 0/100028\n").unwrap();
    let partial = segment(dir.path(), &format!("{TWO}.partial"), 9);
    for path in [&history, &label, &partial] {
        archive.push(path).await.unwrap();
        archive.push(path).await.unwrap();
    }
    let out = dir.path().join("out");
    for path in [&history, &label] {
        archive.fetch(path.file_name().unwrap().to_str().unwrap(), &out).await.unwrap();
        assert_eq!(std::fs::read(&out).unwrap(), std::fs::read(path).unwrap());
    }
    // A recovery to the end of the old timeline gets the incomplete segment under its plain name.
    let fetched = archive.fetch(TWO, &out).await.unwrap();
    assert!(matches!(fetched, FetchOutcome::Delivered { partial: true, .. }));
    assert_eq!(std::fs::read(&out).unwrap(), std::fs::read(&partial).unwrap());
}
