//! How fast content passes through: compression by level and frame size, sealed and not, WAL, dumps.
#![allow(missing_docs, clippy::unwrap_used)]

use std::hint::black_box;
use std::sync::Arc;

use async_compression::tokio::bufread::{GzipEncoder, ZstdEncoder};
use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use dr_benches::Rows;
use dr_core::port::{KeyProvider, PageChecker};
use dr_core::{BackupId, SegmentSize, SystemId, Timeline, Timestamp, WalName, WalSegment};
use dr_pg::PgPages;
use dr_storage::format::{EXTENT_LEN, SessionBegin};
use dr_storage::keys::FileKey;
use dr_storage::target::MemoryTarget;
use dr_storage::{InitSpec, PackKind, Repository};
use tokio::io::AsyncReadExt;

const LEN: usize = 16 << 20;

async fn repository(encrypted: bool, compression_level: i32) -> Repository {
    let keys: Vec<Arc<dyn KeyProvider>> = vec![Arc::new(FileKey::generate())];
    let spec = InitSpec { encrypted, compression_level, created: Timestamp::UNIX_EPOCH };
    Repository::init(Arc::new(MemoryTarget::new()), spec, &keys).await.unwrap().0
}

/// Frames into packs, as a backup writes them: compress, seal, digest the pack.
fn packs(c: &mut Criterion) {
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let _inside = runtime.enter();
    let content = Rows::new(1).heap(LEN);
    let mut group = c.benchmark_group("pack");
    group.throughput(Throughput::Bytes(LEN as u64)).sample_size(10);
    for (encrypted, level, frame) in [
        (true, 1, EXTENT_LEN),
        (false, 1, EXTENT_LEN),
        (true, -1, EXTENT_LEN),
        (true, 2, EXTENT_LEN),
        (true, 3, EXTENT_LEN),
        (true, 1, 64 << 10),
        (true, 1, 1 << 20),
    ] {
        let repo = runtime.block_on(repository(encrypted, level));
        let store = repo.cluster(SystemId(1));
        let begin = SessionBegin { host: "bench".into(), note: String::new(), parent: None };
        let session =
            runtime.block_on(store.begin_session(BackupId::new(Timestamp::UNIX_EPOCH, 1), begin)).unwrap();
        let sealed = if encrypted { "sealed" } else { "clear" };
        let name = format!("{sealed}, level {level}, {} KiB", frame >> 10);
        group.bench_function(name, |b| {
            b.iter(|| {
                let mut writer = session.pack_writer(PackKind::Data);
                for piece in content.chunks(frame) {
                    black_box(writer.append(piece).unwrap());
                }
            });
        });
    }
    group.finish();
}

/// Digest and page fingerprints, and page checksums: what reading costs beside compression.
fn reading(c: &mut Criterion) {
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let repo = runtime.block_on(repository(true, 1));
    let content = Rows::new(2).heap(LEN);
    let pages = PgPages::new(8192, 131_072, true);
    let mut group = c.benchmark_group("reading");
    group.throughput(Throughput::Bytes(LEN as u64)).sample_size(20);
    group.bench_function("digest and fingerprints", |b| {
        let mut prints = Vec::new();
        b.iter(|| {
            content.chunks(EXTENT_LEN).for_each(|e| {
                black_box(repo.digest_with_prints(e, 8192, &mut prints));
            })
        });
    });
    group.bench_function("digest alone", |b| {
        b.iter(|| {
            content.chunks(EXTENT_LEN).for_each(|e| {
                black_box(repo.digest(e));
            })
        });
    });
    group.bench_function("page checksums", |b| {
        let mut bad = Vec::new();
        b.iter(|| {
            bad.clear();
            pages.check(&content, 0, &mut bad);
            black_box(bad.len())
        });
    });
    group.finish();
}

/// A WAL segment, encoded.
fn wal(c: &mut Criterion) {
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let repo = runtime.block_on(repository(true, 1));
    let wal = repo.cluster(SystemId(1)).wal(SegmentSize::DEFAULT);
    let content = Rows::new(3).heap(LEN);
    let segment = WalSegment { timeline: Timeline(1), number: 1 };
    let mut group = c.benchmark_group("wal");
    group.throughput(Throughput::Bytes(LEN as u64)).sample_size(10);
    group.bench_function("encode a segment", |b| {
        b.iter(|| {
            let mut encoder = wal.encoder(&WalName::Segment(segment)).unwrap();
            content.chunks(EXTENT_LEN).for_each(|piece| encoder.feed(piece).unwrap());
            black_box(encoder.finish(segment.end(SegmentSize::DEFAULT)).unwrap())
        });
    });
    group.finish();
}

/// Foreign formats: dump streams through async-compression.
fn dumps(c: &mut Criterion) {
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let content = Rows::new(4).dump(LEN);
    let mut group = c.benchmark_group("dump stream");
    group.throughput(Throughput::Bytes(LEN as u64)).sample_size(10);
    for codec in ["zstd", "gzip"] {
        group.bench_with_input(BenchmarkId::from_parameter(codec), &content, |b, content| {
            b.to_async(&runtime).iter(|| async {
                let mut out = Vec::with_capacity(LEN / 2);
                match codec {
                    "zstd" => ZstdEncoder::new(&content[..]).read_to_end(&mut out).await.unwrap(),
                    _ => GzipEncoder::new(&content[..]).read_to_end(&mut out).await.unwrap(),
                };
                black_box(out.len())
            });
        });
    }
    group.finish();
}

criterion_group!(benches, packs, reading, wal, dumps);
criterion_main!(benches);
