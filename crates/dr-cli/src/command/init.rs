//! `dr init`: a repository, its keys, and a commented configuration.

use std::io::Write;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use dr_agent::{AgentError, wire};
use dr_core::port::{DatabaseSource, Key, KeyProvider, StorageError, StorageTarget};
use dr_core::{Classified, Timestamp};
use dr_engine::EngineError;
use dr_storage::keys::{AgeKey, FileKey};
use dr_storage::{InitSpec, RepoError, Repository};
use serde::Serialize;

use super::Session;
use crate::args::Init;
use crate::error::CliError;
use crate::output;

/// A server and how it is reached.
struct Found {
    conninfo: String,
    data_directory: PathBuf,
    system_id: dr_core::SystemId,
    version_num: u32,
}

#[derive(Serialize)]
struct Made {
    config: PathBuf,
    repository: String,
    key_file: Option<PathBuf>,
    host_key_file: Option<PathBuf>,
    system_id: dr_core::SystemId,
    archive_command: String,
    planned_only: bool,
}

pub(super) async fn run(session: &Session, args: Init) -> Result<u8, CliError> {
    let url = session.settings.needed("repository.url", "dr init")?.to_owned();
    let config = absolute(&args.output);
    let found = find(session, &args).await?;
    let key_file = (!args.no_encryption)
        .then(|| args.new_key.clone().unwrap_or_else(|| config.with_file_name("dr.key")))
        .map(|path| absolute(&path));
    let host_key_file = args.new_host_key.as_deref().map(absolute);
    for path in [Some(&config), key_file.as_ref(), host_key_file.as_ref()].into_iter().flatten() {
        if path.exists() {
            let what = format!("{} exists already", path.display());
            return Err(CliError::usage(what, "Nothing was changed. Choose another name, or move it away."));
        }
    }
    let made = Made {
        archive_command: archive_command(&config),
        config,
        repository: url,
        key_file,
        host_key_file,
        system_id: found.system_id,
        planned_only: args.plan,
    };
    if !args.plan {
        make(session, &args, &made, &found).await?;
    }
    output::result(session.global.json, "init", &made, || show(&made, &found));
    Ok(0)
}

fn absolute(path: &Path) -> PathBuf {
    std::path::absolute(path).unwrap_or_else(|_| path.to_owned())
}

/// The server that was named, or the only one that answers on this host.
async fn find(session: &Session, args: &Init) -> Result<Found, CliError> {
    let asked = args.connection.clone().or_else(|| {
        let written = session.settings.values().get("cluster.connection");
        written.filter(|w| w.origin != "default").map(|w| w.value.clone())
    });
    let tries = match asked {
        Some(conninfo) => vec![conninfo],
        None => wire::find_servers(),
    };
    let mut found = Vec::new();
    let mut failure = None;
    for conninfo in tries {
        let source = wire::source_at(&conninfo);
        match source.describe().await {
            Ok(cluster) => found.push(Found {
                conninfo,
                data_directory: PathBuf::from(cluster.data_directory),
                system_id: cluster.system_id,
                version_num: cluster.version_num,
            }),
            Err(error) => failure = Some(error),
        }
    }
    match (found.len(), failure) {
        (1, _) => Ok(found.remove(0)),
        (0, Some(error)) => Err(EngineError::source("cannot look at the server")(error).into()),
        (0, None) => Err(CliError::usage(
            "no running PostgreSQL server was found on this host",
            "Start it, or name it with --connection 'host=… port=… user=…'.",
        )),
        _ => {
            let list = found.iter().map(|f| f.conninfo.clone()).collect::<Vec<_>>().join("; ");
            Err(CliError::usage(format!("several servers answer: {list}"), "Choose one with --connection."))
        }
    }
}

/// Key first, then the repository, then the configuration: a crash leaves no repository without key.
async fn make(session: &Session, args: &Init, made: &Made, found: &Found) -> Result<(), CliError> {
    let key = |source| CliError::from(AgentError::Key { source });
    let mut providers: Vec<Arc<dyn KeyProvider>> = Vec::new();
    for recipient in args.age_recipient.iter().filter(|_| !args.no_encryption) {
        providers.push(Arc::new(AgeKey::recipient(recipient).map_err(key)?));
    }
    let target = wire::target(&session.settings, true)?;
    let findings =
        dr_storage::probe(target.as_ref()).await.map_err(EngineError::storage("cannot use this storage"))?;
    let bad: Vec<_> = findings.into_iter().filter(|f| f.verdict == dr_core::port::Verdict::Bad).collect();
    if !bad.is_empty() {
        return Err(EngineError::Preflight { findings: bad }.into());
    }
    if let Some(path) = &made.key_file {
        let file = FileKey::generate();
        file.write(path).map_err(key)?;
        providers.insert(0, Arc::new(file));
    }
    let spec = InitSpec {
        encrypted: !args.no_encryption,
        compression_level: args.compression_level,
        created: now(),
    };
    let initialised = Repository::init(target.clone(), spec, &providers).await;
    let (_, host) = match initialised {
        Ok(made) => made,
        Err(error) => return Err(not_made(error, target.as_ref(), made.key_file.as_deref()).await),
    };
    if let Some(path) = &made.host_key_file {
        host.write(path).map_err(key)?;
    }
    write_config(session, args, made, found)
}

/// A new key that opens nothing is not left behind; one that may be the only key of a repository is.
async fn not_made(error: RepoError, target: &dyn StorageTarget, key_file: Option<&Path>) -> CliError {
    let doing = "cannot make the repository";
    match key_file {
        None => EngineError::repo(doing)(error).into(),
        Some(path) if opens_nothing(&error, target).await => {
            let _ = std::fs::remove_file(path);
            EngineError::repo(doing)(error).into()
        }
        Some(path) => {
            let kept = format!(
                "cannot tell whether the repository was made; the new key {} is kept, for it may be the only one",
                path.display()
            );
            EngineError::repo(kept)(error).into()
        }
    }
}

/// Whether a key is certainly no key of a repository: the one that is there is somebody else's, or
/// there is none after an error that leaves no doubt.
async fn opens_nothing(error: &RepoError, target: &dyn StorageTarget) -> bool {
    if matches!(error, RepoError::RepositoryExists { .. }) {
        return true;
    }
    let Ok(descriptor) = Key::new("repo.json") else { return false };
    !error.class().is_retryable()
        && matches!(target.head(&descriptor).await, Err(StorageError::NotFound { .. }))
}

fn now() -> Timestamp {
    use dr_core::port::Clock;
    wire::HostClock.now()
}

fn write_config(session: &Session, args: &Init, made: &Made, found: &Found) -> Result<(), CliError> {
    let failed = |source| CliError::Output { path: made.config.display().to_string(), source };
    let text = config_text(session, args, made, found);
    let mut options = std::fs::OpenOptions::new();
    let mut file = options.write(true).create_new(true).mode(0o640).open(&made.config).map_err(failed)?;
    file.write_all(text.as_bytes()).and_then(|()| file.sync_all()).map_err(failed)
}

fn config_text(session: &Session, args: &Init, made: &Made, found: &Found) -> String {
    let quoted = |text: &str| format!("{:?}", text);
    let mut text = format!(
        "# dr, for cluster {} (PostgreSQL {}).\n# Each setting: docs/reference/config.md. Check with: dr --config {} check\n\n",
        found.system_id,
        found.version_num / 10_000,
        for_shell(&made.config)
    );
    text.push_str("[cluster]\n# What people call it; several clusters can share a repository.\n");
    text.push_str(&format!("label = {}\n", quoted(&args.label)));
    text.push_str(&format!("connection = {}\n", quoted(&found.conninfo)));
    text.push_str(&format!("data_directory = {}\n", quoted(&found.data_directory.display().to_string())));
    text.push_str("\n[repository]\n");
    for (name, written) in
        session.settings.values().iter().filter(|(name, _)| name.starts_with("repository."))
    {
        if written.origin != "default" && !written.value.is_empty() {
            let key = name.trim_start_matches("repository.");
            let bare = matches!(written.value.as_str(), "true" | "false");
            let value = if bare { written.value.clone() } else { quoted(&written.value) };
            text.push_str(&format!("{key} = {value}\n"));
        }
    }
    text.push_str("\n[encryption]\n");
    match (&made.key_file, &made.host_key_file) {
        (None, _) => text.push_str("# The repository is not encrypted.\n"),
        (Some(key), host) => {
            text.push_str(
                "# Keep a copy of the key file away from this host: without it no backup can be read.\n",
            );
            text.push_str(&format!("key_file = {}\n", quoted(&key.display().to_string())));
            if let Some(host) = host {
                text.push_str("# A host that must not read backups uses this key in place of key_file:\n");
                text.push_str(&format!("# host_key_file = {}\n", quoted(&host.display().to_string())));
            }
        }
    }
    text.push_str("\n[backup]\n# workers = 2\n# fast_checkpoint = true\n# wal_timeout = \"60s\"\n");
    text.push_str("\n[restore]\n# workers = 2\n# stall_limit = \"10min\"\n");
    text
}

/// The line for postgresql.conf, with absolute paths: the server has another working directory.
fn archive_command(config: &Path) -> String {
    let program = std::env::current_exe().unwrap_or_else(|_| PathBuf::from("dr"));
    let word = |path: &Path| super::restore::quote(&path.display().to_string());
    format!("{} --config {} wal push %p", word(&program), word(config))
}

/// A path as one word for a person's shell.
fn for_shell(path: &Path) -> String {
    super::restore::quote(&path.display().to_string()).replace("%%", "%")
}

fn show(made: &Made, found: &Found) -> String {
    let done = if made.planned_only { "would be made" } else { "is made" };
    let mut text = format!(
        "The repository {} {done} for cluster {} (PostgreSQL {} in {}).\n  configuration  {}\n",
        made.repository,
        found.system_id,
        found.version_num / 10_000,
        found.data_directory.display(),
        made.config.display()
    );
    if let Some(path) = &made.key_file {
        text.push_str(&format!(
            "  key            {}  (copy it to a safe place: nothing can be restored without it)\n",
            path.display()
        ));
    }
    if let Some(path) = &made.host_key_file {
        text.push_str(&format!("  host key       {}\n", path.display()));
    }
    text.push_str(&format!(
        "\nNext, in psql:\n  ALTER SYSTEM SET archive_mode = on;\n  ALTER SYSTEM SET archive_command = '{}';\n  ALTER SYSTEM SET archive_timeout = '60s';\nrestart the server, then:\n  dr --config {1} check\n  dr --config {1} backup\n",
        made.archive_command.replace('\'', "''"),
        for_shell(&made.config)
    ));
    text
}

#[cfg(test)]
mod tests {
    use dr_storage::target::MemoryTarget;

    use super::*;

    fn failed(source: StorageError) -> RepoError {
        RepoError::Storage { source }
    }

    fn key() -> String {
        "repo.json".into()
    }

    #[tokio::test]
    async fn a_key_that_may_open_a_repository_is_never_deleted() {
        let dir = tempfile::tempdir().expect("a directory");
        let path = dir.path().join("dr.key");
        let (empty, made) = (MemoryTarget::new(), MemoryTarget::new());
        let descriptor = Key::new("repo.json").expect("a key");
        made.create(&descriptor, b"{}".to_vec().into()).await.expect("an object");
        let why = || -> Box<dyn std::error::Error + Send + Sync> { "no answer".into() };
        let (operation, target) = ("create", || "t".to_owned());
        let denied =
            || failed(StorageError::Denied { operation, key: key(), target: target(), source: why() });
        let unsure =
            || failed(StorageError::Indeterminate { operation, key: key(), target: target(), source: why() });
        let busy =
            || failed(StorageError::Unavailable { operation, key: key(), target: target(), source: why() });
        let others = || RepoError::RepositoryExists { location: "t".into() };
        for (name, error, target, kept) in [
            ("denied, and nothing there", denied(), &empty, false),
            ("denied, and it is there", denied(), &made, true),
            ("no answer", unsure(), &empty, true),
            ("busy", busy(), &empty, true),
            ("another repository", others(), &made, false),
        ] {
            std::fs::write(&path, "a key").expect("a file");
            let told = not_made(error, target, Some(&path)).await.to_string();
            assert_eq!(path.exists(), kept, "{name}");
            assert_eq!(told.contains("is kept") && told.contains("dr.key"), kept, "{name}: {told}");
        }
    }
}
