//! The one place that names concrete adapters together.

use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::sync::Arc;
use std::time::{Duration, Instant};

use dr_core::port::{Clock, DatabaseSource, EventSink, Instance, KeyProvider, StorageError, StorageTarget};
use dr_core::{SegmentSize, SystemId, Timestamp};
use dr_engine::wal::Archive;
use dr_engine::{Cancel, Context};
use dr_pg::{
    InstanceOptions, LocalInstance, LocalSource, LocalSourceOptions, PgWal, PrimaryServer, StandbyPolicy,
    StreamSource, StreamSourceOptions,
};
use dr_storage::keys::{AgeKey, FileKey, HostKey};
use dr_storage::target::{DirectoryOptions, DirectoryTarget, RetryPolicy, Retrying};
use dr_storage::{Access, ClusterIdentity, Repository};

use crate::check::Check;
use crate::config::{Settings, Sources};
use crate::error::AgentError;
use crate::resident::{Load, Plan};
use crate::supervise::{Policy, Supervised};

/// The clock of this host.
#[derive(Clone, Copy, Debug, Default)]
pub struct HostClock;

impl Clock for HostClock {
    fn now(&self) -> Timestamp {
        // tidy: allow(wall-clock): this is the clock
        Timestamp::now()
    }
}

/// The name of this host.
pub fn host_name() -> String {
    std::fs::read_to_string("/proc/sys/kernel/hostname")
        .map_or_else(|_| "unknown".into(), |n| n.trim().to_owned())
}

/// The address of a repository, in parts.
enum Address {
    Directory(PathBuf),
    S3 { bucket: String, prefix: String },
}

fn address(url: &str) -> Result<Address, AgentError> {
    let invalid = |reason: &str| AgentError::Storage {
        source: StorageError::Invalid { target: crate::config::shown_url(url), reason: reason.to_owned() },
    };
    if let Some(rest) = url.strip_prefix("s3://") {
        let (bucket, prefix) = rest.split_once('/').unwrap_or((rest, ""));
        if bucket.is_empty() {
            return Err(invalid("it names no bucket"));
        }
        let prefix = prefix.trim_matches('/').to_owned();
        return Ok(Address::S3 { bucket: bucket.to_owned(), prefix });
    }
    let path = url.strip_prefix("file://").unwrap_or(url);
    if path.starts_with('/') {
        return Ok(Address::Directory(PathBuf::from(path)));
    }
    Err(invalid("it is not an absolute path, file:///path or s3://bucket/prefix"))
}

/// The storage that the settings name. `create`: make a directory that is not there.
pub fn target(settings: &Settings, create: bool) -> Result<Arc<dyn StorageTarget>, AgentError> {
    let url = settings.needed("repository.url", "this command")?;
    let inner: Arc<dyn StorageTarget> = match address(url)? {
        Address::Directory(path) => {
            let options = DirectoryOptions { create, ..DirectoryOptions::default() };
            Arc::new(DirectoryTarget::open(path, options).map_err(|source| AgentError::Storage { source })?)
        }
        Address::S3 { bucket, prefix } => s3(settings, bucket, prefix)?,
    };
    Ok(Arc::new(Retrying::new(inner, RetryPolicy::default())))
}

#[cfg(feature = "s3")]
fn s3(settings: &Settings, bucket: String, prefix: String) -> Result<Arc<dyn StorageTarget>, AgentError> {
    use dr_storage::target::s3::{S3Config, S3Target};
    let config = S3Config {
        bucket,
        prefix,
        endpoint: settings.text("repository.endpoint").map(str::to_owned),
        region: settings.text("repository.region").map(str::to_owned),
        path_style: settings.flag("repository.path_style"),
        allow_http: settings.flag("repository.allow_http"),
        ca_file: settings.path("repository.ca_file"),
        access_key: secret(settings, "repository.access_key")?,
        secret_key: secret(settings, "repository.secret_key")?,
        session_token: secret(settings, "repository.session_token")?,
    };
    Ok(Arc::new(S3Target::open(config).map_err(|source| AgentError::Storage { source })?))
}

#[cfg(not(feature = "s3"))]
fn s3(_: &Settings, bucket: String, _: String) -> Result<Arc<dyn StorageTarget>, AgentError> {
    let reason = "this program was built without S3".to_owned();
    Err(AgentError::Storage {
        source: StorageError::Unsupported { target: format!("s3://{bucket}"), reason },
    })
}

/// A secret by its reference. The value never enters a message.
#[cfg_attr(not(feature = "s3"), allow(dead_code))]
fn secret(settings: &Settings, name: &'static str) -> Result<Option<String>, AgentError> {
    let Some(reference) = settings.text(name) else { return Ok(None) };
    let bad = |reason: String| AgentError::BadValue {
        origin: settings.values().get(name).map(|w| w.origin.clone()).unwrap_or_default(),
        key: name,
        value: reference.to_owned(),
        reason,
    };
    let value = match reference.split_once(':') {
        Some(("file", path)) => std::fs::read_to_string(path).map_err(|error| bad(error.to_string()))?,
        Some(("env", variable)) => {
            // Says whether it is not set or not UTF-8, and never what it holds.
            std::env::var(variable).map_err(|error| match error {
                std::env::VarError::NotPresent => bad("the variable is not set".into()),
                std::env::VarError::NotUnicode(_) => bad("the variable is not UTF-8".into()),
            })?
        }
        Some(("exec", command)) => answer_of(command, SECRET_LIMIT).map_err(bad)?,
        _ => return Err(bad("it is not file:PATH, env:NAME or exec:COMMAND".into())),
    };
    Ok(Some(value.trim().to_owned()))
}

/// How long a command that prints a secret may take.
const SECRET_LIMIT: Duration = Duration::from_secs(30);

/// The longest secret, in bytes.
const SECRET_LEN: u64 = 64 << 10;

/// How often a command is asked whether it has ended.
const SECRET_POLL: Duration = Duration::from_millis(10);

/// What a command prints, within a limit that holds until it has ended: one that closes its output
/// and goes on is late too. It and its children are ended when it is late or prints too much.
fn answer_of(command: &str, limit: Duration) -> Result<String, String> {
    use std::os::unix::process::CommandExt;
    let end = Instant::now() + limit;
    let mut child = std::process::Command::new("/bin/sh")
        .args(["-c", command])
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .process_group(0)
        .spawn()
        .map_err(|error| error.to_string())?;
    let answer =
        output_of(&mut child, end).and_then(|text| Ok((text, status_of(&mut child, end)?))).map_err(|why| {
            why.unwrap_or_else(|| format!("the command did not end within {} s", limit.as_secs()))
        });
    if answer.is_err() {
        let group = rustix::process::Pid::from_child(&child);
        let _ = rustix::process::kill_process_group(group, rustix::process::Signal::KILL);
        let _ = child.wait();
    }
    let (text, status) = answer?;
    if !status.success() {
        return Err(format!("the command failed: {status}"));
    }
    String::from_utf8(text).map_err(|_| "the command gave no text".into())
}

/// All that a child prints; `None` as the reason when it is late.
fn output_of(child: &mut std::process::Child, end: Instant) -> Result<Vec<u8>, Option<String>> {
    let (send, answered) = std::sync::mpsc::sync_channel(1);
    let out = child.stdout.take().ok_or_else(|| Some("the command has no output".to_owned()))?;
    std::thread::spawn(move || {
        let _ = send.send(bounded(out));
    });
    let text = answered.recv_timeout(end.saturating_duration_since(Instant::now())).map_err(|_| None)?;
    let text = text.map_err(|error| Some(error.to_string()))?;
    if text.len() as u64 > SECRET_LEN {
        return Err(Some(format!("the command gave more than {}", dr_core::size::bytes(SECRET_LEN))));
    }
    Ok(text)
}

/// What is read, up to one byte more than a secret may have.
fn bounded(from: impl std::io::Read) -> std::io::Result<Vec<u8>> {
    use std::io::Read;
    let mut text = Vec::new();
    from.take(SECRET_LEN + 1).read_to_end(&mut text)?;
    Ok(text)
}

/// How a child ended; `None` as the reason when it is late.
fn status_of(
    child: &mut std::process::Child,
    end: Instant,
) -> Result<std::process::ExitStatus, Option<String>> {
    loop {
        match child.try_wait().map_err(|error| Some(error.to_string()))? {
            Some(status) => return Ok(status),
            None if Instant::now() >= end => return Err(None),
            None => std::thread::sleep(SECRET_POLL),
        }
    }
}

/// The best key that the settings give: reading key, age identity, host key, none.
pub fn access(settings: &Settings) -> Result<Access, AgentError> {
    let key = |source| AgentError::Key { source };
    if let Some(path) = settings.path("encryption.key_file") {
        return Ok(Access::Key(Arc::new(FileKey::read(&path).map_err(key)?)));
    }
    if let Some(path) = settings.path("encryption.age_identity_file") {
        return Ok(Access::Key(Arc::new(AgeKey::read_identity(&path).map_err(key)?)));
    }
    if let Some(path) = settings.path("encryption.host_key_file") {
        return Ok(Access::Host(HostKey::read(&path).map_err(key)?));
    }
    Ok(Access::ListOnly)
}

/// A key provider for one more slot: a recipient `age1…`, or a new key file at a path.
pub fn new_key(age_recipient: Option<&str>, file: Option<&Path>) -> Result<Arc<dyn KeyProvider>, AgentError> {
    let key = |source| AgentError::Key { source };
    match (age_recipient, file) {
        (Some(recipient), _) => Ok(Arc::new(AgeKey::recipient(recipient).map_err(key)?)),
        (None, Some(path)) => {
            let file = FileKey::generate();
            file.write(path).map_err(key)?;
            Ok(Arc::new(file))
        }
        (None, None) => Err(AgentError::Missing { key: "encryption.key_file", needed_for: "a new key" }),
    }
}

/// Opens the repository.
pub async fn repository(settings: &Settings) -> Result<Repository, AgentError> {
    let access = access(settings)?;
    Repository::open(target(settings, false)?, access).await.map_err(|source| AgentError::Repo { source })
}

/// The server that the settings name, its files read here or streamed.
pub fn source(settings: &Settings) -> Box<dyn DatabaseSource> {
    let conninfo = settings.text("cluster.connection").unwrap_or_default().to_owned();
    let standby = match settings.text("backup.standby") {
        Some("prefer") => StandbyPolicy::Prefer,
        Some("only") => StandbyPolicy::Only,
        _ => StandbyPolicy::Never,
    };
    if settings.text("backup.source") == Some("stream") {
        let max_rate = settings.optional_bytes("backup.max_rate");
        return Box::new(StreamSource::new(StreamSourceOptions { conninfo, max_rate, standby }));
    }
    let data_directory = settings.path("cluster.data_directory");
    Box::new(LocalSource::new(LocalSourceOptions { conninfo, data_directory, standby }))
}

/// The server that standbys follow.
pub fn primary(settings: &Settings) -> PrimaryServer {
    PrimaryServer::new(settings.text("cluster.connection").unwrap_or_default())
}

/// A server of a standby's own, asked the same questions.
pub fn primary_at(conninfo: &str) -> PrimaryServer {
    PrimaryServer::new(conninfo)
}

/// A server behind a connection string.
pub fn source_at(conninfo: &str) -> LocalSource {
    LocalSource::new(LocalSourceOptions {
        conninfo: conninfo.to_owned(),
        data_directory: None,
        standby: StandbyPolicy::Never,
    })
}

/// Connection strings of the servers that have a socket on this host.
pub fn find_servers() -> Vec<String> {
    dr_pg::find_servers()
}

/// Servers on restored directories.
pub fn instance(settings: &Settings) -> LocalInstance {
    LocalInstance::new(InstanceOptions { bin_dir: settings.path("cluster.bin_dir"), role: None })
}

/// Which cluster a command is about: asked for, the server's own, or the only one there is.
pub async fn choose_cluster(
    settings: &Settings,
    repo: &Repository,
    asked: Option<&str>,
) -> Result<ClusterIdentity, AgentError> {
    let clusters = repo.clusters().await.map_err(|source| AgentError::Repo { source })?;
    let names =
        || clusters.iter().map(|c| format!("{} ({})", c.label, c.system_id)).collect::<Vec<_>>().join(", ");
    let which = |what: String| AgentError::WhichCluster { what };
    if let Some(asked) = asked {
        let fitting: Vec<_> =
            clusters.iter().filter(|c| c.system_id.to_string() == asked || c.label == asked).collect();
        return match fitting[..] {
            [one] => Ok(one.clone()),
            [] if clusters.is_empty() => {
                Err(which(format!("the repository has no cluster {asked:?}, and no other one yet")))
            }
            [] => Err(which(format!("the repository has no cluster {asked:?}; it has: {}", names()))),
            _ => Err(which(format!("several clusters are called {asked:?}: {}", names()))),
        };
    }
    if let Some(data) = settings.path("cluster.data_directory")
        && let Ok(control) = dr_pg::control::read(&data)
        && let Some(own) = clusters.iter().find(|c| c.system_id == control.system_id)
    {
        return Ok(own.clone());
    }
    match &clusters[..] {
        [one] => Ok(one.clone()),
        [] => Err(which("the repository has no cluster yet: take a first backup".into())),
        _ => Err(which(format!("the repository has several clusters: {}", names()))),
    }
}

/// Everything that a job is given.
pub fn context(
    repo: &Repository,
    system_id: SystemId,
    label: &str,
    events: Arc<dyn EventSink>,
    cancel: Cancel,
) -> Context {
    Context {
        repo: repo.clone(),
        store: repo.cluster(system_id),
        events,
        clock: Arc::new(HostClock),
        label: label.to_owned(),
        host: host_name(),
        cancel,
    }
}

/// The archive of the cluster whose data directory this is: what `archive_command` and
/// `restore_command` run in. `asked` overrides, for a directory without `pg_control`.
pub async fn archive(
    settings: &Settings,
    repo: &Repository,
    asked: Option<&str>,
) -> Result<Archive<'static>, AgentError> {
    static FORMAT: PgWal = PgWal;
    let (system_id, segment_size) = match own_cluster(settings) {
        Some(own) => own,
        None => {
            let identity = choose_cluster(settings, repo, asked).await?;
            (identity.system_id, identity.segment_size)
        }
    };
    let store = repo.cluster(system_id).wal(segment_size);
    Ok(Archive { store, format: &FORMAT, system_id, segment_size })
}

/// The cluster of the working directory, or else of the configured data directory.
fn own_cluster(settings: &Settings) -> Option<(SystemId, SegmentSize)> {
    let here = std::env::current_dir().ok();
    let places = [here, settings.path("cluster.data_directory")];
    places.into_iter().flatten().find_map(|place| {
        let control = LocalInstance::default().control(&place).ok()?;
        Some((control.system_id, control.segment_size))
    })
}

/// Reads the configuration of the resident agent from these sources, and makes its plan.
pub fn resident(sources: Sources) -> Load {
    Arc::new(move || plan(&Settings::load(&sources)?))
}

/// How often `dr check` may be run at most.
const LEAST_CHECK_INTERVAL: Duration = Duration::from_secs(1);

/// What the agent is to do. What is wrong with the settings is found here; a server or a store that
/// is down is not, since that is what the agent is there to see.
fn plan(settings: &Settings) -> Result<Plan, AgentError> {
    well_formed(settings)?;
    let every = settings.duration_from("agent.check_interval", LEAST_CHECK_INTERVAL)?;
    let check = Check::new(settings.clone(), every, Arc::new(HostClock));
    let made_of = settings.made_of(&["cluster.", "repository.", "encryption.", "backup.", "agent.check_"]);
    Ok(Plan {
        socket: settings.needed("agent.socket", "the agent")?.into(),
        listen: settings.address("agent.listen"),
        stop_timeout: settings.duration("agent.stop_timeout"),
        tasks: vec![Supervised::new(Arc::new(check), Policy::permanent()).made_of(made_of)],
    })
}

/// Whether the settings could work: an address that can be one, keys and secrets that can be read.
fn well_formed(settings: &Settings) -> Result<(), AgentError> {
    access(settings)?;
    match address(settings.needed("repository.url", "the agent")?)? {
        Address::Directory(_) => Ok(()),
        Address::S3 { bucket, prefix } => s3(settings, bucket, prefix).map(drop),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_command_for_a_secret_has_an_end() {
        assert_eq!(answer_of("echo secret", SECRET_LIMIT).as_deref(), Ok("secret\n"));
        assert!(answer_of("exit 3", SECRET_LIMIT).is_err_and(|why| why.contains('3')));
        let began = std::time::Instant::now();
        // The child of the shell holds the pipe; it goes too.
        let late = answer_of("sleep 60 & sleep 60", Duration::from_millis(200));
        assert!(late.is_err_and(|why| why.contains("did not end")));
        // Closed output is no end.
        let late = answer_of("exec >&-; sleep 60", Duration::from_millis(200));
        assert!(late.is_err_and(|why| why.contains("did not end")));
        assert!(began.elapsed() < Duration::from_secs(20));
    }

    #[test]
    fn a_command_for_a_secret_cannot_fill_the_memory() {
        let long = vec![b'y'; 1 << 20];
        let mut rest = &long[..];
        assert_eq!(bounded(&mut rest).map(|text| text.len() as u64).ok(), Some(SECRET_LEN + 1));
        assert_eq!((long.len() - rest.len()) as u64, SECRET_LEN + 1, "no more is read than is judged");
        let began = Instant::now();
        let endless = answer_of("yes", SECRET_LIMIT);
        assert!(endless.is_err_and(|why| why.contains("more than 64.0 KiB")));
        assert!(began.elapsed() < Duration::from_secs(20));
    }
}
