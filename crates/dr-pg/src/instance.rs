//! Servers on restored directories.

mod log;
mod options;
mod settings;
pub(crate) mod sockets;

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use async_trait::async_trait;
use dr_core::port::{
    ClusterError, ControlFacts, HostFacts, HostNeeds, Instance, InstanceStatus, RecoveryEnd, RecoverySpec,
    RunState,
};
use dr_core::{Lsn, Timeline, Timestamp, WalSegment};

use crate::control;
use crate::process::{command_as_owner, find_bin_dir, major_of, user};
use crate::sql::Sql;

/// The server's log while it recovers, in the data directory.
const LOG: &str = "dr-recovery.log";

const STOP_LIMIT: Duration = Duration::from_secs(120);
const STATUS_LIMIT: Duration = Duration::from_secs(5);

/// How servers are found and spoken to.
#[derive(Clone, Debug, Default)]
pub struct InstanceOptions {
    /// Where the server's programs are; `None`: the usual places.
    pub bin_dir: Option<PathBuf>,
    /// The database role to ask with; `None`: the usual ones.
    pub role: Option<String>,
}

/// Servers on directories of this host.
#[derive(Clone, Debug, Default)]
pub struct LocalInstance {
    options: InstanceOptions,
}

/// What `postmaster.pid` says (`src/include/utils/pidfile.h`).
struct PidFile {
    pid: u32,
    port: u16,
    socket_dir: String,
    status: String,
}

impl LocalInstance {
    /// Servers with these options.
    pub fn new(options: InstanceOptions) -> Self {
        LocalInstance { options }
    }

    fn bin_dir(&self, major: u32) -> Result<PathBuf, ClusterError> {
        let configured = self.options.bin_dir.clone().filter(|dir| major_of(dir) == Some(major));
        configured.or_else(|| find_bin_dir(Some(major))).ok_or(ClusterError::NoPrograms { major })
    }

    fn pid_file(&self, data: &Path) -> Option<PidFile> {
        let text = std::fs::read_to_string(data.join("postmaster.pid")).ok()?;
        let lines: Vec<&str> = text.lines().collect();
        let pid: u32 = lines.first()?.trim().parse().ok()?;
        // A file left by a crash names a process that is gone, or that is no server.
        let command = std::fs::read_to_string(format!("/proc/{pid}/comm")).ok()?;
        // The number may have come to another cluster's server since: a server stays in its data
        // directory (ChangeToDataDir in miscinit.c). Another user's link cannot be read; then the
        // file is believed.
        let elsewhere = std::fs::read_link(format!("/proc/{pid}/cwd"))
            .is_ok_and(|place| std::fs::canonicalize(data).is_ok_and(|data| data != place));
        (command.starts_with("postgres") && !elsewhere).then(|| PidFile {
            pid,
            port: lines.get(3).and_then(|l| l.trim().parse().ok()).unwrap_or(5432),
            socket_dir: lines.get(4).map(|l| l.trim().to_owned()).unwrap_or_default(),
            status: lines.get(7).map(|l| l.trim().to_owned()).unwrap_or_default(),
        })
    }

    async fn ask(&self, file: &PidFile) -> Option<InstanceStatus> {
        let own = user(rustix::process::geteuid().as_raw()).map(|(name, _)| name);
        let roles = [self.options.role.clone(), Some("postgres".to_owned()), own];
        for role in roles.into_iter().flatten() {
            let Ok(sql) = Sql::connect(&conninfo(file, &role), None).await else { continue };
            let query = "SELECT pg_is_in_recovery(), \
                 (CASE WHEN pg_is_in_recovery() THEN pg_last_wal_replay_lsn() ELSE pg_current_wal_lsn() END)::text, \
                 (extract(epoch FROM pg_last_xact_replay_timestamp()) * 1000000)::int8, \
                 CASE WHEN pg_is_in_recovery() THEN pg_get_wal_replay_pause_state() ELSE '' END, \
                 (SELECT timeline_id FROM pg_control_checkpoint())";
            let Ok(row) = sql.row("tell how far it is", query, STATUS_LIMIT).await else { continue };
            let (recovering, pause): (bool, String) = (row.get(0), row.get(3));
            let state = match (recovering, pause.as_str()) {
                (false, _) => RunState::Primary,
                (true, "paused") => RunState::Paused,
                (true, _) => RunState::Recovering,
            };
            return Some(InstanceStatus {
                state,
                lsn: row.get::<_, Option<String>>(1).and_then(|text| text.parse().ok()),
                last_commit: row.get::<_, Option<i64>>(2).and_then(|t| Timestamp::from_microsecond(t).ok()),
                timeline: Some(Timeline(row.get::<_, i32>(4) as u32)),
            });
        }
        None
    }
}

/// The timeline and the start of the segment that the startup process is at: everything before it
/// is replayed.
fn replaying(file: &PidFile, data: &Path) -> Option<(Timeline, Lsn)> {
    let size = control::read(data).ok()?.segment_size;
    let children = std::fs::read_to_string(format!("/proc/{0}/task/{0}/children", file.pid)).ok()?;
    children.split_whitespace().find_map(|child| {
        let title = std::fs::read(format!("/proc/{child}/cmdline")).ok()?;
        let title = String::from_utf8_lossy(&title);
        let segment = WalSegment::parse(segment_in_title(&title)?, size)?;
        Some((segment.timeline, segment.start(size)))
    })
}

/// `postgres: main: startup recovering 000000010000000000000005`, or `… waiting for …`.
fn segment_in_title(title: &str) -> Option<&str> {
    let (_, activity) = title.split_once("startup ")?;
    let name = activity.strip_prefix("recovering ").or_else(|| activity.strip_prefix("waiting for "))?;
    name.get(..24)
}

/// A server's own connection string. The host is quoted: it may be a path with a space.
fn conninfo(file: &PidFile, role: &str) -> String {
    let quoted = |text: &str| text.replace('\\', "\\\\").replace('\'', "\\'");
    let plain = |text: &str| !text.is_empty() && !text.contains([' ', '\'', '\\']);
    let word = |text: &str| if plain(text) { text.to_owned() } else { format!("'{}'", quoted(text)) };
    format!("host={} port={} user={} dbname=postgres", word(&file.socket_dir), file.port, word(role))
}

fn absolute(path: &Path) -> PathBuf {
    std::path::absolute(path).unwrap_or_else(|_| path.to_owned())
}

#[async_trait]
impl Instance for LocalInstance {
    fn control(&self, data: &Path) -> Result<ControlFacts, ClusterError> {
        control::read(data)
    }

    fn parse_control(&self, bytes: &[u8]) -> Result<ControlFacts, ClusterError> {
        control::parse(bytes, "pg_control")
    }

    fn major(&self, data: &Path) -> Result<u32, ClusterError> {
        let path = data.join("PG_VERSION");
        let file = path.display().to_string();
        let text = std::fs::read_to_string(&path).map_err(|source| ClusterError::File {
            operation: "read",
            path: file.clone(),
            source,
        })?;
        let number = text.trim().parse();
        number.map_err(|_| ClusterError::Damaged { path: file, reason: "it holds no version".into() })
    }

    fn prepare_recovery(&self, data: &Path, control: &[u8], spec: &RecoverySpec) -> Result<(), ClusterError> {
        settings::write(data, control, spec)
    }

    fn host_facts(&self, needs: &HostNeeds) -> HostFacts {
        let bin_dir = self.bin_dir(needs.major).ok();
        let library_dir = bin_dir.as_deref().and_then(library_dir);
        let missing = |name: &&String| {
            let file = format!("{}.so", name.trim_end_matches(".so"));
            let place = if name.starts_with('/') {
                Some(PathBuf::from(&file))
            } else {
                library_dir.as_ref().map(|d| d.join(&file))
            };
            place.is_none_or(|place| !place.exists())
        };
        let (here, locales) = (libc_version(), locales());
        // Only the server itself can tell versions of other providers.
        let differing = needs.collations.iter().filter_map(|(name, then)| {
            let locale = name.strip_prefix("libc:")?;
            let missing = locales.as_ref().is_some_and(|known| !known.contains(&plain_locale(locale)));
            let now = if missing { String::new() } else { here.clone() };
            (*then != now).then(|| (name.clone(), then.clone(), now))
        });
        HostFacts {
            major: bin_dir.as_ref().map(|_| needs.major),
            bin_dir: bin_dir.as_ref().map(|dir| dir.display().to_string()),
            architecture: rustix::system::uname().machine().to_string_lossy().into_owned(),
            missing_libraries: needs.libraries.iter().filter(missing).cloned().collect(),
            differing_collations: differing.collect(),
        }
    }

    async fn start(&self, data: &Path, major: u32, public: bool) -> Result<(), ClusterError> {
        let bin_dir = self.bin_dir(major)?;
        let absolute = absolute(data);
        let data = absolute.as_path();
        let file = |operation, path: &Path| {
            let path = path.display().to_string();
            move |source| ClusterError::File { operation, path, source }
        };
        let log = data.join(LOG);
        let _ = std::fs::remove_file(&log);
        let temporary = std::env::temp_dir();
        let sockets = sockets::place(data, &temporary);
        if !public {
            sockets::sweep(&temporary);
            sockets::make(&sockets, data, &temporary).map_err(file("create", &sockets))?;
        }
        let options = options::server_options(data, (!public).then_some(sockets.as_path()));
        let mut command = command_as_owner(&bin_dir.join("pg_ctl"), data).map_err(file("look at", data))?;
        // pg_ctl puts its paths into a shell's double quotes as they are, where `$` and `"` mean
        // something (`start_postmaster` in pg_ctl.c): so it runs inside and is given none.
        command.current_dir(data).args(["start", "-D", ".", "-l", LOG, "-W", "-s", "-o"]).arg(options);
        // The server must not hold a pipe of ours: whoever waits for its end would wait for ever.
        command.stdout(Stdio::null()).stderr(Stdio::null());
        let status = tokio::task::spawn_blocking(move || command.status()).await;
        let failed = |reason: String| ClusterError::Program {
            program: "pg_ctl start".into(),
            data: data.display().to_string(),
            reason,
        };
        match status {
            Ok(Ok(status)) if status.success() => self.wait_for_process(data, &log).await,
            Ok(Ok(status)) => Err(failed(format!("{status}; {}", log::last_words(&log)))),
            Ok(Err(error)) => Err(failed(error.to_string())),
            Err(error) => Err(failed(error.to_string())),
        }
    }

    async fn status(&self, data: &Path) -> Result<InstanceStatus, ClusterError> {
        let unknown = |state| InstanceStatus { state, lsn: None, last_commit: None, timeline: None };
        let Some(file) = self.pid_file(data) else { return Ok(unknown(RunState::Stopped)) };
        if file.status == "starting" || file.socket_dir.is_empty() {
            return Ok(unknown(RunState::Starting));
        }
        let replaying = replaying(&file, data);
        if let Some(mut status) = self.ask(&file).await {
            // pg_control has the timeline of the last restart point only.
            if let Some(segment) = replaying.filter(|_| status.state == RunState::Recovering) {
                status.timeline = Some(segment.0);
            }
            return Ok(status);
        }
        // A warm standby takes no connections ("standby" in its pid file, miscadmin.h); the title of
        // its startup process tells the segment that it replays or waits for.
        let following = file.status == "standby";
        let state = if following { RunState::Recovering } else { RunState::Starting };
        let segment = replaying.filter(|_| following);
        let (timeline, lsn) = (segment.map(|s| s.0), segment.map(|s| s.1));
        Ok(InstanceStatus { timeline, lsn, ..unknown(state) })
    }

    fn connection(&self, data: &Path) -> Option<String> {
        let file = self.pid_file(data).filter(|file| !file.socket_dir.is_empty())?;
        let role = self.options.role.as_deref().unwrap_or("postgres");
        Some(conninfo(&file, role))
    }

    fn recovery_end(&self, data: &Path) -> Result<RecoveryEnd, ClusterError> {
        log::recovery_end(data, &data.join(LOG))
    }

    async fn stop(&self, data: &Path) -> Result<(), ClusterError> {
        let Some(file) = self.pid_file(data) else { return Ok(()) };
        let pid = rustix::process::Pid::from_raw(file.pid as i32);
        let failed = |reason: String| ClusterError::Program {
            program: "the server".into(),
            data: data.display().to_string(),
            reason,
        };
        let pid = pid.ok_or_else(|| failed("its process number is wrong".into()))?;
        // SIGINT: fast shutdown, as `pg_ctl stop -m fast`.
        rustix::process::kill_process(pid, rustix::process::Signal::INT)
            .map_err(|e| failed(e.to_string()))?;
        let began = Instant::now();
        while self.pid_file(data).is_some() {
            if began.elapsed() > STOP_LIMIT {
                return Err(failed(format!("it did not stop within {} s", STOP_LIMIT.as_secs())));
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        sockets::remove(&absolute(data), &std::env::temp_dir());
        Ok(())
    }
}

impl LocalInstance {
    /// The process writes its pid file at once, or says why not and ends.
    async fn wait_for_process(&self, data: &Path, log: &Path) -> Result<(), ClusterError> {
        let began = Instant::now();
        while began.elapsed() < STATUS_LIMIT {
            if self.pid_file(data).is_some() || !log::last_words(log).is_empty() {
                return Ok(());
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        Ok(())
    }
}

/// Where loadable libraries are: `pg_config` tells, and the usual place is beside `bin`.
fn library_dir(bin_dir: &Path) -> Option<PathBuf> {
    let output =
        Command::new(bin_dir.join("pg_config")).arg("--pkglibdir").stdin(Stdio::null()).output().ok();
    let told = output.filter(|o| o.status.success()).and_then(|o| String::from_utf8(o.stdout).ok());
    let usual = bin_dir.parent().map(|dir| dir.join("lib"));
    told.map(|text| PathBuf::from(text.trim())).filter(|dir| dir.is_dir()).or(usual)
}

/// The locales of this host; `None` when that cannot be told.
fn locales() -> Option<BTreeSet<String>> {
    let output = Command::new("locale").arg("-a").stdin(Stdio::null()).output().ok()?;
    let text = String::from_utf8_lossy(&output.stdout);
    Some(text.lines().map(plain_locale).collect())
}

/// A locale's name as the C library compares it: `en_US.UTF-8` is `en_US.utf8`.
fn plain_locale(name: &str) -> String {
    let (language, encoding) = name.trim().split_once('.').unwrap_or((name.trim(), ""));
    let encoding: String = encoding.chars().filter(|c| *c != '-').collect();
    format!("{language}.{}", encoding.to_ascii_lowercase())
}

/// The version of the C library's collations, as PostgreSQL records it (`pg_locale.c`).
fn libc_version() -> String {
    let output = Command::new("getconf").arg("GNU_LIBC_VERSION").stdin(Stdio::null()).output();
    let text = output.ok().and_then(|o| String::from_utf8(o.stdout).ok()).unwrap_or_default();
    text.trim().trim_start_matches("glibc ").to_owned()
}
