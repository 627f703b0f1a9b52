//! How fast objects become durable: a directory, and S3 when DR_TEST_S3_ENDPOINT names a server.
#![allow(missing_docs, clippy::unwrap_used)]

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use bytes::Bytes;
use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use dr_benches::Rows;
use dr_core::port::{Key, Payload, StorageTarget};
use dr_storage::target::s3::{S3Config, S3Target};
use dr_storage::target::{DirectoryOptions, DirectoryTarget};

const PACK: usize = 32 << 20;

static NUMBER: AtomicU64 = AtomicU64::new(0);

fn payload() -> Payload {
    let piece = Bytes::from(Rows::new(5).heap(4 << 20));
    Payload::new(vec![piece; PACK / (4 << 20)])
}

async fn put(target: &dyn StorageTarget, payload: Payload) {
    let key = Key::new(format!("bench/{}", NUMBER.fetch_add(1, Ordering::Relaxed))).unwrap();
    target.create(&key, payload).await.unwrap();
    target.delete(&key).await.unwrap();
}

fn upload(c: &mut Criterion) {
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let dir = tempfile::tempdir().unwrap();
    let mut targets: Vec<(&str, Arc<dyn StorageTarget>)> = Vec::new();
    for (name, sync) in [("directory, synced", true), ("directory, not synced", false)] {
        let options = DirectoryOptions { create: true, sync };
        targets.push((name, Arc::new(DirectoryTarget::open(dir.path().join(name), options).unwrap())));
    }
    let get = |name: &str| std::env::var(format!("DR_TEST_S3_{name}")).ok();
    if let Some(endpoint) = get("ENDPOINT") {
        let config = S3Config {
            bucket: get("BUCKET").unwrap(),
            prefix: "bench".into(),
            endpoint: Some(endpoint),
            path_style: true,
            allow_http: true,
            access_key: get("KEY"),
            secret_key: get("SECRET"),
            ..S3Config::default()
        };
        targets.push(("S3", S3Target::open(config).unwrap().shared()));
    }
    let mut group = c.benchmark_group("upload of a 32 MiB pack");
    group.throughput(Throughput::Bytes(PACK as u64)).sample_size(10);
    for (name, target) in targets {
        let payload = payload();
        group.bench_function(name, |b| {
            b.to_async(&runtime).iter(|| put(target.as_ref(), payload.clone()));
        });
    }
    group.finish();
}

criterion_group!(benches, upload);
criterion_main!(benches);
