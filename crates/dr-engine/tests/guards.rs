//! Guards that stand behind other guards: each is looked at alone, so that it is missed when gone.
#![allow(clippy::unwrap_used, missing_docs)]

mod common;

use std::sync::Arc;

use common::*;
use dr_core::port::{Key, StorageTarget};
use dr_core::{Classified, ErrorClass, Timestamp, WalName};
use dr_storage::target::{MemoryTarget, RetryPolicy, Retrying};
use dr_storage::{InitSpec, Repository};
use dr_testkit::faults::{Fault, FaultyTarget};
use dr_testkit::sim::{PAGE, Random, SimCluster, context};

fn cluster() -> SimCluster {
    let mut random = Random::new(7);
    let cluster = SimCluster::new(9);
    cluster.put("PG_VERSION", b"15\n".to_vec());
    cluster.put_relation("base/5/100", 40, &mut random);
    // Random content is stored as it is, so that a flipped bit does not already fail to decompress.
    cluster.put("base/5/3", (0..64 * PAGE / 8).flat_map(|_| random.next().to_le_bytes()).collect());
    cluster
}

fn key_with(target: &MemoryTarget, part: &str) -> Key {
    target.snapshot().keys().find(|key| key.as_str().contains(part)).unwrap().clone()
}

/// The whole chain of an error, as one text.
fn words(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut next = error.source();
    while let Some(cause) = next {
        text.push_str(&format!(": {cause}"));
        next = cause.source();
    }
    text
}

#[tokio::test(flavor = "multi_thread")]
async fn a_frame_whose_tag_is_wrong_is_not_opened() {
    let cluster = cluster();
    let bench = Bench::new().await;
    let context = bench.context(&cluster).await;
    back_up(&context, &cluster, &options()).await.unwrap();
    let pack = key_with(&bench.target, "/pack/");
    let middle = bench.target.snapshot()[&pack].len() / 2;
    bench.target.tamper(&pack, |bytes| bytes[middle] ^= 4);
    let dir = tempfile::tempdir().unwrap();
    let error = restore_to(&context, &restore_options(&dir.path().join("r"))).await.unwrap_err();
    assert!(words(&error).contains("seal does not verify"), "{}", words(&error));
}

#[tokio::test(flavor = "multi_thread")]
async fn content_that_differs_from_its_digest_is_not_restored_even_without_encryption() {
    let cluster = cluster();
    let target = Arc::new(MemoryTarget::new());
    let spec = InitSpec { encrypted: false, compression_level: 1, created: Timestamp::UNIX_EPOCH };
    let (repo, _) = Repository::init(target.clone(), spec, &[]).await.unwrap();
    let context = context(&repo, &cluster, Arc::<dr_testkit::sim::TickingClock>::default());
    back_up(&context, &cluster, &options()).await.unwrap();
    // Somewhere in the random file: its last bytes tell where it is.
    let content = cluster.content()["base/5/3"].clone();
    let mark = &content[content.len() - 16..];
    let found = target.snapshot().into_iter().find_map(|(key, stored)| {
        let at = stored.windows(16).position(|bytes| bytes == mark)?;
        Some((key, at))
    });
    let (pack, at) = found.expect("random content is stored as it is");
    target.tamper(&pack, |bytes| bytes[at] ^= 1);
    let dir = tempfile::tempdir().unwrap();
    let restored = restore_to(&context, &restore_options(&dir.path().join("r"))).await;
    assert_eq!(restored.map(drop).unwrap_err().class(), ErrorClass::Corrupt);
}

fn retrying(inner: Arc<dyn StorageTarget>) -> Retrying {
    let first_wait = std::time::Duration::from_millis(1);
    Retrying::new(inner, RetryPolicy { attempts: 3, first_wait })
}

#[tokio::test]
async fn a_put_that_timed_out_is_asked_about() {
    let inner = Arc::new(MemoryTarget::new());
    for (round, fault) in [Fault::DoneButLost, Fault::LostBefore].into_iter().enumerate() {
        let key = Key::new(format!("a/{round}")).unwrap();
        let faulty = Arc::new(FaultyTarget::new(inner.clone(), 0, 1, fault));
        retrying(faulty).create(&key, b"ours".to_vec().into()).await.unwrap();
        assert_eq!(&inner.get(&key, None).await.unwrap()[..], b"ours");
    }
}

#[tokio::test]
async fn a_put_that_timed_out_beside_other_content_is_refused() {
    let inner = Arc::new(MemoryTarget::new());
    let key = Key::new("a/b").unwrap();
    inner.create(&key, b"theirs".to_vec().into()).await.unwrap();
    let faulty = Arc::new(FaultyTarget::new(inner.clone(), 0, 1, Fault::LostBefore));
    let error = retrying(faulty).create(&key, b"ours".to_vec().into()).await.unwrap_err();
    assert_eq!(error.class(), ErrorClass::Fenced);
    assert_eq!(&inner.get(&key, None).await.unwrap()[..], b"theirs");
}

#[tokio::test]
async fn a_repository_that_needs_more_than_we_know_is_refused() {
    for (from, to) in
        [("\"features_required\":[]", "\"features_required\":[\"folds\"]"), ("\"format\":1", "\"format\":2")]
    {
        let bench = Bench::new().await;
        let key = Key::new("repo.json").unwrap();
        bench.target.tamper(&key, |bytes| {
            let text = String::from_utf8(bytes.clone()).unwrap();
            let compact: String = text.split_whitespace().collect();
            assert!(compact.contains(from), "{compact}");
            *bytes = compact.replace(from, to).into_bytes();
        });
        let error = bench.repo_over(bench.target.clone()).await.map(drop).unwrap_err();
        assert_eq!(error.class(), ErrorClass::Unsupported, "{error}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_fetch_that_fails_leaves_what_was_there() {
    let cluster = cluster();
    let bench = Bench::new().await;
    let context = bench.context(&cluster).await;
    cluster.archive(&context.store).await;
    let size = dr_core::SegmentSize::DEFAULT;
    let wal = context.store.wal(size);
    let stored = wal.segments(dr_core::Timeline(1)).await.unwrap().remove(0);
    let name = WalName::Segment(stored.segment).file_name(size);
    let key = key_with(&bench.target, &name);
    let last = bench.target.snapshot()[&key].len() - 1;
    bench.target.tamper(&key, |bytes| bytes[last] ^= 1);
    let dir = tempfile::tempdir().unwrap();
    let destination = dir.path().join("RECOVERYXLOG");
    std::fs::write(&destination, b"earlier").unwrap();
    let archive = dr_engine::wal::Archive {
        store: wal,
        format: &NoFormat,
        system_id: dr_core::SystemId(9),
        segment_size: size,
    };
    assert!(archive.fetch(&name, &destination).await.is_err());
    assert_eq!(std::fs::read(&destination).unwrap(), b"earlier");
}

/// Fetching needs no format.
#[derive(Debug)]
struct NoFormat;

impl dr_core::port::WalFormat for NoFormat {
    fn inspect(
        &self,
        name: &WalName,
        _: dr_core::SegmentSize,
        _: dr_core::SystemId,
    ) -> Result<Box<dyn dr_core::port::SegmentInspector>, dr_core::port::WalFault> {
        Err(dr_core::port::WalFault::BadName { name: format!("{name:?}") })
    }
}
