//! A backup of a part of 10 TB and six million files, and a second one after a change of 1 %: time,
//! memory, and what was stored, as one line of JSON. `cargo xtask scale` runs it.
//!
//! The cluster is pretended and content is not kept (`dr_testkit::scale`), so what is measured is
//! the backup itself. Each part is a process of its own: a peak of memory is a process's.

use std::error::Error;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use dr_core::Timestamp;
use dr_core::port::{KeyProvider, NoEvents};
use dr_engine::backup::{self, BackupOptions};
use dr_engine::{Cancel, Context};
use dr_storage::keys::FileKey;
use dr_storage::target::{DirectoryOptions, DirectoryTarget};
use dr_storage::{Access, InitSpec, Repository};
use dr_testkit::scale::{CountingTarget, Scale, ScaleCluster};
use dr_testkit::sim::{TickingClock, archive_segment};
use serde_json::json;

type Outcome<T> = Result<T, Box<dyn Error>>;

const USAGE: &str = "usage: scale DIRECTORY BYTES FILES RELATIONS";

fn main() -> Outcome<()> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [directory, numbers @ ..] = &arguments[..] else { return Err(USAGE.into()) };
    let numbers = numbers.iter().map(|number| number.parse()).collect::<Result<Vec<u64>, _>>()?;
    let [bytes, files, relations] = numbers[..] else { return Err(USAGE.into()) };
    let scale = Scale { bytes, files, relations };
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build()?;
    println!("{}", runtime.block_on(measure(directory.into(), scale))?);
    Ok(())
}

async fn measure(directory: PathBuf, scale: Scale) -> Outcome<serde_json::Value> {
    let options = DirectoryOptions { create: true, sync: false };
    let target = Arc::new(CountingTarget::over(Arc::new(DirectoryTarget::open(directory, options)?)));
    let key: Arc<dyn KeyProvider> = Arc::new(FileKey::generate());
    let spec = InitSpec { encrypted: true, compression_level: 1, created: Timestamp::UNIX_EPOCH };
    Repository::init(target.clone(), spec, std::slice::from_ref(&key)).await?;
    let repo = Repository::open(target.clone(), Access::Key(key)).await?;
    let context = Context {
        store: repo.cluster(ScaleCluster::SYSTEM),
        repo,
        events: Arc::new(NoEvents),
        clock: Arc::new(TickingClock::default()),
        label: "scale".into(),
        host: "localhost".into(),
        cancel: Cancel::default(),
    };
    archive_segment(&context.store, 1, 1).await;
    let first = ScaleCluster::new(scale);
    let runs =
        [back_up(&context, &first, &target).await?, back_up(&context, &first.changed(), &target).await?];
    Ok(json!({ "bytes": scale.bytes, "files": scale.files, "relations": scale.relations, "runs": runs }))
}

async fn back_up(
    context: &Context,
    cluster: &ScaleCluster,
    target: &CountingTarget,
) -> Outcome<serde_json::Value> {
    let options =
        BackupOptions { workers: 2, wal_timeout: Duration::from_secs(1), ..BackupOptions::default() };
    let before = target.stored();
    reset_peak()?;
    let began = Instant::now();
    let plan = backup::plan(context, cluster, &options).await?;
    let report = backup::apply(context, cluster, &plan).await?;
    let took = began.elapsed();
    let (objects, stored) = target.stored();
    if report.backup.files != cluster.scale.files {
        return Err(format!("{} of {} files", report.backup.files, cluster.scale.files).into());
    }
    Ok(json!({
        "seconds": took.as_secs_f64(),
        "read": report.backup.read_bytes,
        "objects": objects - before.0,
        "stored": stored - before.1,
        "peak_mib": peak()? >> 10,
    }))
}

/// Lets the kernel count the peak of this process's memory anew (`proc(5)`, `clear_refs`).
fn reset_peak() -> Outcome<()> {
    Ok(std::fs::write("/proc/self/clear_refs", "5")?)
}

/// The peak since then, in KiB.
fn peak() -> Outcome<u64> {
    let status = std::fs::read_to_string("/proc/self/status")?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).ok_or("no VmHWM")?;
    Ok(line.trim().trim_end_matches(" kB").parse()?)
}
