//! Programs that embed dr's libraries. Each begins with what it shows; run one with
//! `cargo run --package dr-examples --bin NAME`. Most make their own disposable server, so they need
//! PostgreSQL's programs and a user that is not root.
//!
//! What the programs share is here: a repository in a directory, and the two commands that
//! PostgreSQL runs to archive and to fetch WAL. A program of yours has its own of both.

use std::error::Error;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use dr_core::port::{Clock, NoEvents};
use dr_core::{SegmentSize, SystemId, Timestamp};
use dr_engine::wal::{Archive, FetchOutcome};
use dr_engine::{Cancel, Context};
use dr_pg::PgWal;
use dr_storage::keys::FileKey;
use dr_storage::target::{DirectoryOptions, DirectoryTarget, RetryPolicy, Retrying};
use dr_storage::{Access, InitSpec, Repository};
use dr_testkit::pg::{Scratch, TestCluster};

/// Any error: these are programs.
pub type Result<T> = std::result::Result<T, Box<dyn Error + Send + Sync>>;

/// The clock of this host.
#[derive(Debug)]
pub struct HostClock;

impl Clock for HostClock {
    fn now(&self) -> Timestamp {
        Timestamp::now()
    }
}

/// A repository in a directory, encrypted to a key file beside it.
#[derive(Clone, Debug)]
pub struct Place(PathBuf);

impl Place {
    /// Below this directory.
    pub fn below(base: &Path) -> Self {
        Place(base.to_owned())
    }

    /// Makes the repository and its key.
    pub async fn init(&self) -> Result<Repository> {
        let key = FileKey::generate();
        key.write(&self.0.join("example.key"))?;
        let target = DirectoryTarget::open(
            self.0.join("repository"),
            DirectoryOptions { create: true, ..DirectoryOptions::default() },
        )?;
        let spec = InitSpec { encrypted: true, compression_level: 1, created: HostClock.now() };
        let (repository, _host_key) = Repository::init(Arc::new(target), spec, &[Arc::new(key)]).await?;
        Ok(repository)
    }

    /// Opens it with its key.
    pub async fn open(&self) -> Result<Repository> {
        let key = FileKey::read(&self.0.join("example.key"))?;
        let target = DirectoryTarget::open(self.0.join("repository"), DirectoryOptions::default())?;
        let target = Retrying::new(Arc::new(target), RetryPolicy::default());
        Ok(Repository::open(Arc::new(target), Access::Key(Arc::new(key))).await?)
    }

    /// This program as PostgreSQL's `archive_command` or `restore_command`.
    pub fn wal_command(&self, verb: &str, system_id: SystemId, arguments: &str) -> Result<String> {
        let program = std::env::current_exe()?;
        Ok(format!("{} {verb} {} {system_id} {arguments}", program.display(), self.0.display()))
    }
}

/// What every job is given.
pub fn context(repository: &Repository, system_id: SystemId) -> Context {
    Context {
        repo: repository.clone(),
        store: repository.cluster(system_id),
        events: Arc::new(NoEvents),
        clock: Arc::new(HostClock),
        label: "example".into(),
        host: "localhost".into(),
        cancel: Cancel::default(),
    }
}

/// A disposable server that archives its WAL into the repository by running this very program.
pub async fn shop(scratch: &Scratch, place: &Place) -> Result<(TestCluster, Repository)> {
    let repository = place.init().await?;
    let cluster = TestCluster::create(scratch.path(), "production");
    let system_id = dr_pg::control::read(&cluster.data)?.system_id;
    let command = place.wal_command("wal-push", system_id, "%p")?;
    cluster.configure(&[&format!("archive_command = '{command}'")]);
    cluster.start();
    Ok((cluster, repository))
}

/// When PostgreSQL runs this program to archive or fetch WAL, does that and returns the exit code.
pub async fn wal_verb() -> Option<i32> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [verb, base, system_id, rest @ ..] = &arguments[..] else { return None };
    let done = match (verb.as_str(), rest) {
        ("wal-push", [path]) => push(base, system_id, path).await,
        ("wal-fetch", [name, destination]) => fetch(base, system_id, name, destination).await,
        _ => return None,
    };
    // 200: "stop", where PostgreSQL would take anything up to 125 for "there is no more WAL".
    Some(done.unwrap_or_else(|error| {
        eprintln!("{verb}: {error}");
        200
    }))
}

async fn archive(base: &str, system_id: &str) -> Result<Archive<'static>> {
    static FORMAT: PgWal = PgWal;
    let system_id: SystemId = system_id.parse()?;
    let repository = Place::below(Path::new(base)).open().await?;
    let segment_size = SegmentSize::DEFAULT;
    let store = repository.cluster(system_id).wal(segment_size);
    Ok(Archive { store, format: &FORMAT, system_id, segment_size })
}

async fn push(base: &str, system_id: &str, path: &str) -> Result<i32> {
    archive(base, system_id).await?.push(Path::new(path)).await?;
    Ok(0)
}

async fn fetch(base: &str, system_id: &str, name: &str, destination: &str) -> Result<i32> {
    let outcome = archive(base, system_id).await?.fetch(name, Path::new(destination)).await?;
    Ok(if outcome == FetchOutcome::Absent { 1 } else { 0 })
}
