//! Backups and restores over a store that is far away, beside the same store near by: time and
//! ratio, as lines of text.
//!
//! The store keeps its objects in memory; each call waits for the latency and for its bytes at the
//! rate of one connection (`dr_testkit::far`). What is measured is how much of the waiting is hidden.

use std::error::Error;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use dr_core::Timestamp;
use dr_core::port::{KeyProvider, RecoveryTarget, StorageTarget};
use dr_engine::backup::{self, BackupOptions};
use dr_engine::restore::{self, RestoreOptions};
use dr_engine::{Context, read_back};
use dr_storage::keys::FileKey;
use dr_storage::target::MemoryTarget;
use dr_storage::{Access, InitSpec, Repository};
use dr_testkit::far::FarTarget;
use dr_testkit::instance::FakeInstance;
use dr_testkit::sim::{PAGE, Random, SimCluster, TickingClock, context};

type Outcome<T> = Result<T, Box<dyn Error>>;

/// Relations of 64 MiB, and small files beside them.
const RELATIONS: usize = 16;
const RELATION_PAGES: usize = (64 << 20) / PAGE;
const SMALL_FILES: usize = 20_000;

/// What one connection to an object store gives.
const RATE: u64 = 100_000_000;

const LATENCY: Duration = Duration::from_millis(50);

/// The two are measured in turn so often.
const ROUNDS: usize = 3;

const STEPS: [&str; 5] =
    ["full backup", "second, 1 % scattered", "restore of the second", "restore, delta", "verify"];

fn main() -> Outcome<()> {
    let directory = std::env::args().nth(1).ok_or("usage: far DIRECTORY")?;
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build()?;
    for round in 1..=ROUNDS {
        let place = Path::new(&directory).join(round.to_string());
        let near = runtime.block_on(measure(&place, None))?;
        let far = runtime.block_on(measure(&place, Some(LATENCY)))?;
        for (name, (near, far)) in STEPS.into_iter().zip(near.into_iter().zip(far)) {
            let [seconds, beside] = [far.seconds, near.seconds];
            let ratio = seconds / beside;
            println!(
                "{name:22} {beside:5.2} s near, {seconds:5.2} s far, ratio {ratio:.2}, {} calls",
                far.calls
            );
        }
    }
    Ok(())
}

/// What a step took.
struct Taken {
    seconds: f64,
    calls: u64,
}

async fn measure(place: &Path, latency: Option<Duration>) -> Outcome<Vec<Taken>> {
    let near: Arc<dyn StorageTarget> = Arc::new(MemoryTarget::new());
    let far = Arc::new(FarTarget::new(near.clone(), latency.unwrap_or_default(), RATE));
    let target = latency.map_or(near, |_| far.clone() as Arc<dyn StorageTarget>);
    let key: Arc<dyn KeyProvider> = Arc::new(FileKey::generate());
    let spec = InitSpec { encrypted: true, compression_level: 1, created: Timestamp::UNIX_EPOCH };
    Repository::init(target.clone(), spec, std::slice::from_ref(&key)).await?;
    let repo = Repository::open(target, Access::Key(key)).await?;
    let mut random = Random::new(7);
    let cluster = SimCluster::new(7);
    cluster.put("PG_VERSION", b"15\n".to_vec());
    for number in 0..RELATIONS {
        cluster.put_relation(&relation(number), RELATION_PAGES, &mut random);
    }
    for number in 0..SMALL_FILES {
        cluster.put(&format!("base/6/{number}"), random.bytes(1000));
    }
    let context = context(&repo, &cluster, Arc::<TickingClock>::default());
    let mut taken = Vec::new();
    let mut calls = far.calls();
    let mut note = |seconds: f64| {
        taken.push(Taken { seconds, calls: far.calls() - calls });
        calls = far.calls();
    };
    note(back_up(&context, &cluster).await?);
    for _ in 0..RELATIONS * RELATION_PAGES / 100 {
        let file = relation(random.below(RELATIONS as u64) as usize);
        cluster.touch_page(&file, random.below(RELATION_PAGES as u64) as usize, &mut random);
    }
    note(back_up(&context, &cluster).await?);
    note(restored(&context, place, false).await?);
    note(restored(&context, place, true).await?);
    let newest = context.store.heads().await?.last().ok_or("no backup")?.id;
    let manifest = context.store.manifest(newest).await?;
    let began = Instant::now();
    read_back(&context, &manifest, 2).await?;
    note(began.elapsed().as_secs_f64());
    std::fs::remove_dir_all(place)?;
    Ok(taken)
}

fn relation(number: usize) -> String {
    format!("base/5/{}", 100 + number)
}

async fn back_up(context: &Context, cluster: &SimCluster) -> Outcome<f64> {
    cluster.archive(&context.store).await;
    let options =
        BackupOptions { workers: 2, wal_timeout: Duration::from_secs(1), ..BackupOptions::default() };
    let began = Instant::now();
    let plan = backup::plan(context, cluster, &options).await?;
    backup::apply(context, cluster, &plan).await?;
    Ok(began.elapsed().as_secs_f64())
}

async fn restored(context: &Context, to: &Path, delta: bool) -> Outcome<f64> {
    let options = RestoreOptions {
        target: RecoveryTarget::Immediate,
        delta,
        sync: false,
        ..RestoreOptions::new(to, "dr wal fetch %f %p")
    };
    let instance = FakeInstance::new();
    let began = Instant::now();
    let plan = restore::plan(context, &instance, &options).await?;
    restore::apply(context, &instance, &plan).await?;
    Ok(began.elapsed().as_secs_f64())
}
