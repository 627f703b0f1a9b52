//! Disposable PostgreSQL servers.

use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

/// The user that servers run as when the tests run as root, which PostgreSQL refuses.
const SERVER_USER: &str = "postgres";

/// No program of a test runs longer.
const PROGRAM_LIMIT: Duration = Duration::from_secs(120);

/// WAL is archived within this time.
const ARCHIVE_LIMIT: Duration = Duration::from_secs(30);

/// A directory that every user may enter, removed with everything in it.
#[derive(Debug)]
pub struct Scratch(tempfile::TempDir);

impl Scratch {
    /// A new directory, owned by the user that servers run as.
    pub fn new() -> Self {
        let base = std::env::var_os("DR_TEST_TMP").map_or_else(|| PathBuf::from("/tmp"), PathBuf::from);
        let dir = tempfile::Builder::new().prefix("dr-test-").tempdir_in(base).unwrap();
        std::fs::set_permissions(dir.path(), std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
        if let Some((uid, gid)) = server_ids() {
            std::os::unix::fs::chown(dir.path(), Some(uid), Some(gid)).unwrap();
        }
        Scratch(dir)
    }

    /// Its path.
    pub fn path(&self) -> &Path {
        self.0.path()
    }
}

impl Default for Scratch {
    fn default() -> Self {
        Self::new()
    }
}

/// User and group of the server's user, when this process is root.
pub fn server_ids() -> Option<(u32, u32)> {
    if !rustix::process::geteuid().is_root() {
        return None;
    }
    let users = std::fs::read_to_string("/etc/passwd").unwrap();
    users.lines().find_map(|line| {
        let fields: Vec<&str> = line.split(':').collect();
        (fields[0] == SERVER_USER).then(|| (fields[2].parse().unwrap(), fields[3].parse().unwrap()))
    })
}

/// A command that runs as the server's user, reads nothing and is ended with its parent's patience.
pub fn command(program: impl AsRef<Path>) -> Command {
    let mut command = Command::new(program.as_ref());
    command.stdin(Stdio::null()).env_remove("PGDATA").env("LC_ALL", "C");
    // `dr` looks for the programs of a major version along PATH too.
    let places = ["DR_TEST_PG_BIN", "DR_TEST_PG_UPGRADE", "PATH"].map(std::env::var_os);
    let places: Vec<PathBuf> =
        places.iter().flatten().flat_map(|value| std::env::split_paths(value).collect::<Vec<_>>()).collect();
    command.env("PATH", std::env::join_paths(places).unwrap());
    if let Some((uid, gid)) = server_ids() {
        command.uid(uid).gid(gid).env("HOME", "/tmp");
    }
    command.process_group(0);
    command
}

/// Runs a command to its end, or kills its whole group after the limit.
///
/// Output goes through files: a server that a program leaves behind cannot hold a pipe.
pub fn run(command: &mut Command) -> Output {
    let out = tempfile::tempfile().unwrap();
    let err = tempfile::tempfile().unwrap();
    command.stdout(out.try_clone().unwrap()).stderr(err.try_clone().unwrap());
    let mut child = command.spawn().unwrap_or_else(|error| panic!("{command:?}: {error}"));
    let began = Instant::now();
    let status = loop {
        match child.try_wait().unwrap() {
            Some(status) => break status,
            None if began.elapsed() > PROGRAM_LIMIT => {
                let group = rustix::process::Pid::from_child(&child);
                let _ = rustix::process::kill_process_group(group, rustix::process::Signal::KILL);
                panic!("{command:?} did not end within {PROGRAM_LIMIT:?}");
            }
            None => std::thread::sleep(Duration::from_millis(5)),
        }
    };
    Output { status, stdout: read_back(out), stderr: read_back(err) }
}

fn read_back(mut file: std::fs::File) -> Vec<u8> {
    use std::io::{Read, Seek};
    let mut bytes = Vec::new();
    file.rewind().unwrap();
    file.read_to_end(&mut bytes).unwrap();
    bytes
}

/// Runs a command that must succeed, and answers what it printed.
pub fn ok(command: &mut Command) -> String {
    let output = run(command);
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(
        output.status.success(),
        "{command:?} failed ({}):\n{text}{}",
        output.status,
        String::from_utf8_lossy(&output.stderr)
    );
    text
}

/// The directory of the server's programs; `DR_TEST_PG_BIN` chooses another version.
pub fn bin_dir() -> PathBuf {
    if let Some(dir) = std::env::var_os("DR_TEST_PG_BIN") {
        return PathBuf::from(dir);
    }
    let mut dirs: Vec<PathBuf> = std::fs::read_dir("/usr/lib/postgresql")
        .into_iter()
        .flatten()
        .flatten()
        .map(|entry| entry.path().join("bin"))
        .filter(|dir| dir.join("postgres").is_file())
        .collect();
    dirs.sort();
    dirs.pop().expect("PostgreSQL's server programs are installed (cargo xtask test installs them)")
}

/// The directories of the programs of several major versions, the oldest first: what
/// `DR_TEST_PG_UPGRADE` lists, as `PATH` does.
pub fn upgrade_path() -> Vec<PathBuf> {
    std::env::var_os("DR_TEST_PG_UPGRADE")
        .map(|value| std::env::split_paths(&value).collect())
        .unwrap_or_default()
}

/// A server of its own, on a private socket.
#[derive(Debug)]
pub struct TestCluster {
    /// The directory of its programs.
    pub bin: PathBuf,
    /// The data directory.
    pub data: PathBuf,
    /// The directory of its socket.
    pub socket_dir: PathBuf,
    /// Its port, which names the socket.
    pub port: u16,
}

static PORT: AtomicU32 = AtomicU32::new(0);

impl TestCluster {
    /// Makes a cluster with checksums below `base`. It is not started.
    pub fn create(base: &Path, name: &str) -> Self {
        Self::create_with(&bin_dir(), base, name)
    }

    /// The same with the programs of another version.
    pub fn create_with(bin: &Path, base: &Path, name: &str) -> Self {
        Self::create_as(bin, base, name, &[])
    }

    /// A server for hundreds of backups: WAL in segments of 1 MiB, which nobody archives, and nothing
    /// that writes by itself. It is started, and has no database but `postgres`.
    pub fn start_small(base: &Path, name: &str) -> Self {
        let cluster = Self::create_as(&bin_dir(), base, name, &["--wal-segsize=1"]);
        cluster.configure(&[
            "archive_mode = off",
            "autovacuum = off",
            "max_wal_size = 64MB",
            "min_wal_size = 8MB",
            "max_wal_senders = 40",
            "wal_sender_timeout = 0",
        ]);
        cluster.start();
        cluster.sql("UPDATE pg_database SET datistemplate = false");
        cluster.sql("DROP DATABASE template0");
        cluster.sql("DROP DATABASE template1");
        cluster
    }

    fn create_as(bin: &Path, base: &Path, name: &str, arguments: &[&str]) -> Self {
        let data = base.join(name);
        let mut initdb = command(bin.join("initdb"));
        ok(initdb
            .args(["-N", "-k", "-A", "trust", "-U", "postgres", "--locale=C", "-E", "UTF8"])
            .args(arguments)
            .arg("-D")
            .arg(&data));
        // Below 32,768, where the kernel takes the ports of clients from (and of proxies).
        let port =
            20_000 + (std::process::id() % 12_000) as u16 + PORT.fetch_add(1, Ordering::Relaxed) as u16;
        let cluster = TestCluster { bin: bin.to_owned(), data, socket_dir: base.to_owned(), port };
        cluster.configure(&[
            "fsync = off",
            "listen_addresses = ''",
            &format!("unix_socket_directories = '{}'", base.display()),
            &format!("port = {port}"),
            "archive_mode = on",
            "archive_command = 'false'",
            "log_min_messages = warning",
            "max_wal_size = 256MB",
        ]);
        cluster
    }

    /// Adds lines to postgresql.conf.
    pub fn configure(&self, lines: &[&str]) {
        use std::io::Write;
        let path = self.data.join("postgresql.conf");
        let mut file = std::fs::OpenOptions::new().append(true).open(path).unwrap();
        lines.iter().for_each(|line| writeln!(file, "{line}").unwrap());
    }

    /// Starts the server and waits until it answers.
    pub fn start(&self) {
        let log = self.socket_dir.join(format!("{}.log", self.port));
        let mut pg_ctl = command(self.bin.join("pg_ctl"));
        ok(pg_ctl.args(["start", "-w", "-t", "60", "-D"]).arg(&self.data).arg("-l").arg(log));
    }

    /// Starts the server with its configuration elsewhere, as Debian does, and an unusual limit.
    pub fn start_with_config(&self, etc: &Path) {
        let log = self.socket_dir.join(format!("{}.log", self.port));
        let files = ["config_file=postgresql.conf", "hba_file=pg_hba.conf", "ident_file=pg_ident.conf"];
        let place = |pair: &str| {
            let (name, file) = pair.split_once('=').unwrap();
            format!("-c {name}={}", etc.join(file).display())
        };
        let mut options: Vec<String> = files.iter().map(|pair| place(pair)).collect();
        options.push("-c max_connections=123".into());
        let mut pg_ctl = command(self.bin.join("pg_ctl"));
        pg_ctl.args(["start", "-w", "-t", "60", "-D"]).arg(&self.data).arg("-l").arg(log);
        ok(pg_ctl.arg("-o").arg(options.join(" ")));
    }

    /// Stops the server; `mode` as pg_ctl has it.
    pub fn stop(&self, mode: &str) {
        let mut pg_ctl = command(self.bin.join("pg_ctl"));
        run(pg_ctl.args(["stop", "-w", "-t", "60", "-m", mode, "-D"]).arg(&self.data));
    }

    /// The file of its socket.
    pub fn socket(&self) -> PathBuf {
        self.socket_dir.join(format!(".s.PGSQL.{}", self.port))
    }

    /// The connection string.
    pub fn conninfo(&self) -> String {
        conninfo(&self.socket_dir, self.port)
    }

    /// Runs SQL and answers its rows.
    pub fn sql(&self, query: &str) -> String {
        sql(&self.conninfo(), query)
    }

    /// Loads the tables of `tenants` tenants, a schema each, with `rows` orders each.
    pub fn load_tenants(&self, tenants: u32, rows: u32) {
        self.load_tenants_as("tenant", tenants, rows);
    }

    /// The same with schemas that begin with another word.
    pub fn load_tenants_as(&self, word: &str, tenants: u32, rows: u32) {
        for tenant in 1..=tenants {
            let schema = format!("{word}_{tenant}");
            self.sql(&format!(
                "CREATE SCHEMA {schema}; SET search_path = {schema};
                 CREATE TABLE customers (id int PRIMARY KEY, name text, email text);
                 CREATE TABLE inventory (sku int PRIMARY KEY, quantity int, description text);
                 CREATE TABLE orders (id int PRIMARY KEY, customer int, at timestamptz DEFAULT now(), total numeric, note text);
                 CREATE TABLE payments (id int PRIMARY KEY, order_id int, amount numeric, method text);
                 INSERT INTO customers SELECT g, md5(g::text), md5(g::text) || '@example.com' FROM generate_series(1, {rows} / 10) g;
                 INSERT INTO inventory SELECT g, g % 100, md5(g::text || 'sku') FROM generate_series(1, {rows} / 10) g;
                 INSERT INTO orders SELECT g, g % 100, now(), g * 1.25, md5(g::text || 'order') FROM generate_series(1, {rows}) g;
                 INSERT INTO payments SELECT g, g, g * 1.25, 'card' FROM generate_series(1, {rows}) g;"
            ));
        }
    }
}

impl Drop for TestCluster {
    fn drop(&mut self) {
        stop_server(&self.data);
    }
}

/// Stops whatever server runs on a directory.
pub fn stop_server(data: &Path) {
    if data.join("postmaster.pid").exists() {
        let mut pg_ctl = command(bin_dir().join("pg_ctl"));
        run(pg_ctl.args(["stop", "-w", "-t", "30", "-m", "immediate", "-D"]).arg(data));
    }
}

fn conninfo(socket_dir: &Path, port: u16) -> String {
    format!("host={} port={port} user=postgres dbname=postgres", socket_dir.display())
}

/// The connection string of the server that runs on a directory, from its pid file.
pub fn conninfo_of(data: &Path) -> String {
    let text = std::fs::read_to_string(data.join("postmaster.pid")).expect("a running server");
    let lines: Vec<&str> = text.lines().collect();
    conninfo(Path::new(lines[4].trim()), lines[3].trim().parse().unwrap())
}

/// Runs SQL and answers its rows.
pub fn sql(conninfo: &str, query: &str) -> String {
    let mut psql = command(bin_dir().join("psql"));
    ok(psql.args(["-X", "-q", "-A", "-t", "-v", "ON_ERROR_STOP=1", "-c", query]).arg(conninfo))
        .trim()
        .to_owned()
}

/// Closes the current WAL segment of a server and waits until it is archived.
pub fn archive_all(conninfo: &str) {
    // At the very beginning of a segment there would be nothing to switch from: PostgreSQL to 16
    // then names the segment before, later ones the one that nobody closes.
    let name = sql(conninfo, "SELECT pg_walfile_name(pg_logical_emit_message(false, 'test', 'the end'))");
    sql(conninfo, "SELECT pg_switch_wal()");
    let done = format!("SELECT coalesce(last_archived_wal >= '{name}', false) FROM pg_stat_archiver");
    let began = Instant::now();
    while sql(conninfo, &done) != "t" {
        assert!(began.elapsed() < ARCHIVE_LIMIT, "WAL {name} was not archived");
        std::thread::sleep(Duration::from_millis(50));
    }
}

/// A digest of everything that pg_dumpall shows: equal digests mean equal content.
pub fn dump_digest(conninfo: &str) -> String {
    let mut dump = command(bin_dir().join("pg_dumpall"));
    let text = ok(dump.args(["--no-sync", "-d"]).arg(conninfo));
    // Newer versions write a random key into the first lines.
    let lines =
        text.lines().filter(|line| !line.starts_with("\\restrict") && !line.starts_with("\\unrestrict"));
    let mut hash = std::hash::DefaultHasher::new();
    let mut count = 0;
    for line in lines {
        std::hash::Hash::hash(line, &mut hash);
        count += 1;
    }
    format!("{count} lines {:016x}", std::hash::Hasher::finish(&hash))
}
