//! A disposable PostgreSQL server on a private socket, run by a user that PostgreSQL accepts.

use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use crate::child::{self, Mark};
use crate::environment;

/// Who runs the server: us, or `postgres` when we are root.
#[derive(Clone)]
pub struct User {
    /// Numeric user.
    pub uid: u32,
    /// Numeric group.
    pub gid: u32,
    drop_to: bool,
}

impl User {
    /// The user to run servers as.
    pub fn of_server() -> Result<User, String> {
        let drop_to = environment::is_root();
        let id = |flag: &str| -> Result<u32, String> {
            let mut command = Command::new("id");
            command.arg(flag);
            if drop_to {
                command.arg("postgres");
            }
            let text = child::output(&mut command)?;
            text.trim().parse().map_err(|error| format!("id {flag}: {error}"))
        };
        Ok(User { uid: id("-u")?, gid: id("-g")?, drop_to })
    }

    /// A command that this user runs.
    pub fn command(&self, program: &Path) -> Command {
        let mut command = Command::new(program);
        command.stdin(Stdio::null()).current_dir("/");
        if self.drop_to {
            command.uid(self.uid).gid(self.gid);
        }
        command
    }
}

/// A data directory with its server.
pub struct Server {
    /// The directory of the server's programs.
    pub bin: PathBuf,
    /// Who runs it.
    pub user: User,
    /// The data directory.
    pub data: PathBuf,
    /// The directory of its socket.
    pub sockets: PathBuf,
    /// Its port, which only names the socket.
    pub port: u16,
}

const SETTINGS: &str = "
listen_addresses = ''
shared_buffers = 64MB
max_wal_size = 256MB
wal_level = replica
archive_mode = on
archive_timeout = 10s
log_min_messages = warning
timezone = 'UTC'
";

impl Server {
    /// Makes the data directory.
    pub fn init(&self) -> Result<(), String> {
        let mut initdb = self.program("initdb");
        initdb.arg("-D").arg(&self.data).args(["--auth=trust", "--username=postgres", "--data-checksums"]);
        initdb.args(["--no-locale", "--encoding=UTF8", "--no-sync"]);
        child::output(&mut initdb)?;
        let file = self.data.join("postgresql.conf");
        let mut text =
            std::fs::read_to_string(&file).map_err(|error| format!("{}: {error}", file.display()))?;
        text.push_str(SETTINGS);
        // Until there is a repository WAL waits in pg_wal.
        text.push_str("archive_command = 'false'\n");
        text.push_str(&format!("unix_socket_directories = '{}'\n", self.sockets.display()));
        std::fs::write(&file, text).map_err(|error| format!("{}: {error}", file.display()))
    }

    /// Starts the server and waits until it answers. Its output goes to `log` alone.
    pub fn start(&self, log: &Path, mark: &Mark) -> Result<(), String> {
        std::fs::write(log, "").map_err(|error| error.to_string())?;
        std::os::unix::fs::chown(log, Some(self.user.uid), Some(self.user.gid))
            .map_err(|error| error.to_string())?;
        let mut start = self.program("pg_ctl");
        mark.put_on(&mut start);
        start.args(["start", "-w", "-s", "-t", "60"]).arg("-D").arg(&self.data).arg("-l").arg(log);
        let status =
            start.stdout(Stdio::null()).stderr(Stdio::null()).status().map_err(|error| error.to_string())?;
        if status.success() {
            Ok(())
        } else {
            Err(format!("the server did not start\n{}", child::last_lines(log, 20)))
        }
    }

    /// Stops the server.
    pub fn stop(&self) -> Result<(), String> {
        let mut stop = self.program("pg_ctl");
        child::output(stop.args(["stop", "-w", "-s", "-m", "fast", "-t", "60"]).arg("-D").arg(&self.data))
            .map(drop)
    }

    /// The server that `dr restore --start` started on another directory: its own lock file says
    /// where it listens (lines 4 and 5 of `postmaster.pid`, `src/include/utils/pidfile.h`).
    pub fn other(&self, data: &Path) -> Result<Server, String> {
        let file = data.join("postmaster.pid");
        let text = std::fs::read_to_string(&file).map_err(|error| format!("{}: {error}", file.display()))?;
        let mut lines = text.lines().skip(3);
        let port = lines.next().and_then(|line| line.trim().parse().ok());
        let (Some(port), Some(sockets)) = (port, lines.next()) else {
            return Err(format!("{} does not say where the server listens", file.display()));
        };
        let sockets = PathBuf::from(sockets.trim());
        Ok(Server { bin: self.bin.clone(), user: self.user.clone(), data: data.to_owned(), sockets, port })
    }

    /// How to reach it.
    pub fn conninfo(&self) -> String {
        format!("host={} port={} user=postgres dbname=postgres", self.sockets.display(), self.port)
    }

    /// Runs statements and returns what they print, trimmed.
    pub fn sql(&self, statements: &str) -> Result<String, String> {
        let mut psql = self.psql();
        psql.args(["-v", "ON_ERROR_STOP=1", "-q"]);
        // Each -c is sent on its own, so that BEGIN … COMMIT is a block and not one message.
        if statements.contains("$make$") {
            psql.args(["-c", statements]);
        } else {
            for statement in statements.split(";\n").filter(|statement| !statement.trim().is_empty()) {
                psql.args(["-c", statement]);
            }
        }
        child::output(&mut psql).map(|text| text.trim().to_owned())
    }

    fn psql(&self) -> Command {
        let mut psql = self.program("psql");
        psql.args(["-X", "-A", "-t", "-d", &self.conninfo()]);
        psql
    }

    /// Closes the current WAL file and names it. Something is written first: at the very beginning
    /// of a file there would be nothing to close.
    pub fn close_segment(&self) -> Result<String, String> {
        let last = "SELECT pg_walfile_name(pg_logical_emit_message(false, 'demo', 'the end'))";
        let last = self.sql(last)?;
        self.sql("SELECT pg_switch_wal()")?;
        Ok(last)
    }

    /// Waits until this WAL file is archived.
    pub fn wait_archived(&self, file: &str, patience: Duration) -> Result<(), String> {
        let started = Instant::now();
        while started.elapsed() < patience {
            let query =
                format!("SELECT coalesce(last_archived_wal >= '{file}', false) FROM pg_stat_archiver");
            if self.sql(&query)? == "t" {
                return Ok(());
            }
            std::thread::sleep(Duration::from_millis(100));
        }
        Err(format!("{file} was not archived within {} s", patience.as_secs()))
    }

    /// Two sessions that run a psql script in the background until this process ends.
    pub fn load(&self, script: &Path, mark: &Mark) -> Result<Load, String> {
        let mut sessions = Vec::new();
        for _ in 0..2 {
            let mut psql = self.psql();
            psql.arg("-q").arg("-f").arg(script).stdout(Stdio::null()).stderr(Stdio::null());
            mark.put_on(&mut psql);
            sessions.push(psql.spawn().map_err(|error| format!("cannot start psql: {error}"))?);
        }
        Ok(Load { sessions })
    }

    fn program(&self, name: &str) -> Command {
        let here = self.bin.join(name);
        // psql may be installed apart from the server.
        self.user.command(if here.exists() { &here } else { Path::new(name) })
    }
}

/// Sessions that sell.
pub struct Load {
    sessions: Vec<std::process::Child>,
}

impl Load {
    /// Ends the load; an error if a session had stopped before.
    pub fn check(mut self) -> Result<(), String> {
        for session in &mut self.sessions {
            if let Ok(Some(status)) = session.try_wait() {
                return Err(format!("a session of the load ended early: {status}"));
            }
        }
        Ok(())
    }
}

impl Drop for Load {
    fn drop(&mut self) {
        for session in &mut self.sessions {
            let _ = session.kill();
            let _ = session.wait();
        }
    }
}
