//! `dr init`: a repository, its keys, and a commented configuration.

use std::io::Write;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use dr_agent::{AgentError, wire};
use dr_core::Timestamp;
use dr_core::port::{DatabaseSource, KeyProvider};
use dr_engine::EngineError;
use dr_storage::keys::{AgeKey, FileKey};
use dr_storage::{InitSpec, Repository};
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
    let initialised = Repository::init(target, spec, &providers).await;
    let (_, host) = match initialised {
        Ok(made) => made,
        Err(error) => {
            // The key opens nothing and is not left behind; unless the repository may be there all
            // the same, and this its only key.
            if !dr_core::Classified::class(&error).is_retryable() {
                made.key_file.iter().for_each(|path| drop(std::fs::remove_file(path)));
            }
            return Err(EngineError::repo("cannot make the repository")(error).into());
        }
    };
    if let Some(path) = &made.host_key_file {
        host.write(path).map_err(key)?;
    }
    write_config(session, args, made, found)
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
        made.config.display()
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
        super::restore::quote(&made.config.display().to_string()).replace("%%", "%")
    ));
    text
}
