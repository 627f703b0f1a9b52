//! The commands, one file each.

mod agent;
mod backup;
mod check;
mod config;
mod docs;
mod init;
mod jobs;
mod key;
mod list;
mod restore;
mod show;
mod standby;
mod verify;
mod wal;

use std::sync::Arc;

use dr_agent::config::Sources;
use dr_agent::{Settings, wire};
use dr_core::Classified;
use dr_core::port::EventSink;
use dr_engine::{Cancel, Context};
use dr_storage::{ClusterIdentity, Repository};

use crate::args::{Agent, Cli, Command, Global, Wal};
use crate::error::CliError;
use crate::progress::Progress;
use crate::{FETCH_FAILED, log, output, paint};

pub use docs::reference;

/// What every command is given.
pub(crate) struct Session {
    pub global: Global,
    pub settings: Settings,
    pub cancel: Cancel,
}

impl Session {
    fn new(global: Global) -> Result<Self, CliError> {
        let settings = Settings::load(&sources(&global)?)?;
        for (name, written) in settings.shown().iter().filter(|(_, written)| written.origin != "default") {
            tracing::debug!("{name} = {:?}, written in {}", written.value, written.origin);
        }
        Ok(Session { global, settings, cancel: Cancel::default() })
    }

    pub async fn repository(&self) -> Result<Repository, CliError> {
        let repo = wire::repository(&self.settings).await?;
        tracing::info!("the repository is {}", repo.target().location());
        Ok(repo)
    }

    pub async fn cluster(&self, repo: &Repository) -> Result<ClusterIdentity, CliError> {
        let cluster = wire::choose_cluster(&self.settings, repo, self.global.cluster.as_deref()).await?;
        tracing::info!("the cluster is {} ({})", cluster.label, cluster.system_id);
        Ok(cluster)
    }

    pub fn events(&self) -> Arc<dyn EventSink> {
        Arc::new(Progress::new(self.global.quiet))
    }

    pub fn context(&self, repo: &Repository, cluster: &ClusterIdentity) -> Context {
        wire::context(repo, cluster.system_id, &cluster.label, self.events(), self.cancel.clone())
    }

    pub fn workers(&self, setting: &'static str) -> usize {
        let cores = std::thread::available_parallelism().map_or(2, |n| n.get().min(8));
        self.settings.number(setting).map_or(cores, |n| (n as usize).clamp(1, 256))
    }
}

/// The variables that are settings. Others are nobody's business, whatever bytes they hold.
fn environment() -> Result<Vec<(String, String)>, CliError> {
    let own = std::env::vars_os().filter(|(name, _)| name.as_encoded_bytes().starts_with(b"DR__"));
    own.map(|(name, value)| {
        let text = name.to_string_lossy().into_owned();
        let wrong = || CliError::usage(format!("the variable {text} is not UTF-8"), "Write it as UTF-8.");
        Ok((name.into_string().map_err(|_| wrong())?, value.into_string().map_err(|_| wrong())?))
    })
    .collect()
}

/// Flags that stand for settings.
fn sources(global: &Global) -> Result<Sources, CliError> {
    let mut flags = Vec::new();
    for pair in &global.set {
        let (name, value) = pair.split_once('=').ok_or_else(|| {
            CliError::usage(format!("--set {pair} has no value"), "Write --set section.key=value.")
        })?;
        flags.push((name.trim().to_owned(), value.to_owned(), "--set".to_owned()));
    }
    let mut flag = |setting: &str, value: Option<String>, flag: &str| {
        if let Some(value) = value {
            flags.push((setting.to_owned(), value, flag.to_owned()));
        }
    };
    let absolute =
        |path: &std::path::Path| std::path::absolute(path).unwrap_or(path.to_owned()).display().to_string();
    flag("repository.url", global.repo.clone(), "--repo");
    flag("encryption.key_file", global.key_file.as_deref().map(absolute), "--key-file");
    flag("encryption.host_key_file", global.host_key_file.as_deref().map(absolute), "--host-key-file");
    if global.host_key_file.is_some() {
        flag("encryption.key_file", Some(String::new()), "--host-key-file");
    }
    Ok(Sources { file: global.config.clone(), environment: environment()?, flags })
}

/// Runs a command and answers its exit code.
pub(crate) fn run(cli: Cli) -> u8 {
    let name = name_of(&cli.command);
    let json = cli.global.json;
    let fetching = matches!(cli.command, Command::Wal(Wal::Fetch { .. }));
    let in_server = matches!(cli.command, Command::Wal(_));
    paint::choose(cli.global.color);
    let resident = matches!(cli.command, Command::Agent(Agent::Run));
    log::listen(cli.global.verbose, cli.global.quiet, resident);
    let ended = dispatch(cli).and_then(|code| match output::failure() {
        None => Ok(code),
        Some(source) => Err(CliError::Stdout { source }),
    });
    match ended {
        Ok(code) => code,
        Err(error) => {
            if in_server && (!json || matches!(error, CliError::Stdout { .. })) {
                use std::io::Write;
                let _ = std::io::stderr().lock().write_all(output::one_line(&error).as_bytes());
            } else {
                // Where output cannot go, an error as JSON cannot go either.
                output::error(json && !matches!(error, CliError::Stdout { .. }), name, &error);
            }
            if fetching { FETCH_FAILED } else { error.class().exit_code() }
        }
    }
}

fn name_of(command: &Command) -> &'static str {
    match command {
        Command::Init(_) => "init",
        Command::Check => "check",
        Command::Backup(_) => "backup",
        Command::List => "list",
        Command::Show(_) => "show",
        Command::Standby(crate::args::Standby::Create(_)) => "standby create",
        Command::Standby(crate::args::Standby::Refresh { .. }) => "standby refresh",
        Command::Standby(crate::args::Standby::Status { .. }) => "standby status",
        Command::Wal(Wal::Push { .. }) => "wal push",
        Command::Wal(Wal::Fetch { .. }) => "wal fetch",
        Command::Restore(_) => "restore",
        Command::Verify(_) => "verify",
        Command::Jobs(_) => "jobs",
        Command::Agent(Agent::Run) => "agent run",
        Command::Agent(Agent::Status(_)) => "agent status",
        Command::Agent(Agent::Reload(_)) => "agent reload",
        Command::Agent(Agent::Stop { .. }) => "agent stop",
        Command::Config(_) => "config",
        Command::Key(_) => "key",
        Command::Completions { .. } => "completions",
        Command::Man { .. } => "man",
        Command::Reference { .. } => "reference",
    }
}

fn dispatch(cli: Cli) -> Result<u8, CliError> {
    match cli.command {
        Command::Completions { shell } => return docs::completions(shell),
        Command::Man { dir } => return docs::man(&dir),
        Command::Reference { what } => return docs::print_reference(&what),
        Command::Agent(command) => return agent::run(&cli.global, command),
        _ => {}
    }
    let mut global = cli.global;
    if let Command::Backup(args) = &cli.command {
        global.set.extend(args.source.iter().map(|source| format!("backup.source={source}")));
    }
    let session = Session::new(global)?;
    let runtime = runtime(&cli.command)?;
    runtime.block_on(async {
        let cancel = session.cancel.clone();
        if !matches!(cli.command, Command::Wal(_)) {
            tokio::spawn(watch_signals(cancel));
        }
        match cli.command {
            Command::Init(args) => init::run(&session, args).await,
            Command::Check => check::run(&session).await,
            Command::Backup(args) => backup::run(&session, args).await,
            Command::List => list::run(&session).await,
            Command::Show(args) => show::run(&session, args).await,
            Command::Standby(args) => standby::run(&session, args).await,
            Command::Wal(Wal::Push { path }) => wal::push(&session, &path).await,
            Command::Wal(Wal::Fetch { name, destination }) => wal::fetch(&session, &name, &destination).await,
            Command::Restore(args) => restore::run(&session, *args).await,
            Command::Verify(args) => verify::run(&session, args).await,
            Command::Jobs(args) => jobs::run(&session, args).await,
            Command::Config(args) => config::run(&session, args),
            Command::Key(args) => key::run(&session, args).await,
            Command::Agent(_)
            | Command::Completions { .. }
            | Command::Man { .. }
            | Command::Reference { .. } => Ok(0),
        }
    })
}

/// One thread for what PostgreSQL waits for, so that it starts at once; more for jobs.
fn runtime(command: &Command) -> Result<tokio::runtime::Runtime, CliError> {
    let mut builder = match command {
        Command::Wal(_) => tokio::runtime::Builder::new_current_thread(),
        _ => tokio::runtime::Builder::new_multi_thread(),
    };
    builder.enable_all().build().map_err(|source| CliError::Output { path: "the runtime".into(), source })
}

/// The first signal asks the job to stop at its next safe point; the second ends the process.
async fn watch_signals(cancel: Cancel) {
    use tokio::signal::unix::{SignalKind, signal};
    let (Ok(mut term), Ok(mut int)) = (signal(SignalKind::terminate()), signal(SignalKind::interrupt()))
    else {
        return;
    };
    for round in 0.. {
        tokio::select! {
            _ = term.recv() => {}
            _ = int.recv() => {}
        }
        if round > 0 {
            std::process::exit(130);
        }
        cancel.cancel();
        crate::progress::line("stopping at the next safe point; once more to stop at once");
    }
}
