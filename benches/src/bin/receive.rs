//! Receives a base backup and throws it away: bytes, seconds, processor seconds and the peak of
//! memory of the client alone, as one line of JSON. `benches/stream.py` runs it.
//!
//! With `files` the backup is read by the port that jobs use, so taken apart into files too.

use std::error::Error;
use std::time::Instant;

use dr_core::port::DatabaseSource;
use dr_pg::replication::{BackupEvent, BaseBackupOptions, ReplicationClient, ReplicationMode};
use dr_pg::{ConnInfo, StandbyPolicy, StreamSource, StreamSourceOptions};
use serde_json::json;

type Outcome<T> = Result<T, Box<dyn Error + Send + Sync>>;

const USAGE: &str = "usage: receive archives|files CONNECTION";

fn main() -> Outcome<()> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [how, conninfo] = &arguments[..] else { return Err(USAGE.into()) };
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build()?;
    let began = Instant::now();
    let bytes = match how.as_str() {
        "archives" => runtime.block_on(archives(conninfo))?,
        "files" => runtime.block_on(files(conninfo))?,
        _ => return Err(USAGE.into()),
    };
    let seconds = began.elapsed().as_secs_f64();
    println!("{}", json!({ "bytes": bytes, "seconds": seconds, "peak_mib": peak()? >> 10 }));
    Ok(())
}

/// The archives as they come.
async fn archives(conninfo: &str) -> Outcome<u64> {
    let client = ReplicationClient::connect(&ConnInfo::parse(conninfo)?, ReplicationMode::Physical).await?;
    let options = BaseBackupOptions {
        label: "receive".into(),
        fast_checkpoint: true,
        max_rate: None,
        manifest: false,
        incremental: false,
    };
    let (_, mut backup) = client.base_backup(&options).await?;
    let mut bytes = 0;
    while let Some(event) = backup.next().await? {
        if let BackupEvent::Data(data) = event {
            bytes += data.len() as u64;
        }
    }
    backup.finish().ok_or("the backup has no end")?;
    Ok(bytes)
}

/// The files in them.
async fn files(conninfo: &str) -> Outcome<u64> {
    let source = StreamSource::new(StreamSourceOptions {
        conninfo: conninfo.to_owned(),
        max_rate: None,
        standby: StandbyPolicy::Prefer,
    });
    let mut session = source.begin("receive", true).await?;
    let mut stream = session.stream().ok_or("no stream")?;
    let reading = tokio::task::spawn_blocking(move || {
        let (mut bytes, mut buffer) = (0, vec![0; 1 << 20]);
        while stream.next_file()?.is_some() {
            loop {
                match stream.read(&mut buffer)? {
                    0 => break,
                    len => bytes += len as u64,
                }
            }
        }
        Ok::<u64, dr_core::port::SourceError>(bytes)
    });
    let bytes = reading.await??;
    session.finish().await?;
    Ok(bytes)
}

/// The peak of this process's memory, in KiB (`proc(5)`).
fn peak() -> Outcome<u64> {
    let status = std::fs::read_to_string("/proc/self/status")?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).ok_or("no VmHWM")?;
    Ok(line.trim().trim_end_matches(" kB").parse()?)
}
