//! The whole way on a real PostgreSQL server, as an operator goes it.
#![allow(clippy::unwrap_used, missing_docs)]

use std::path::{Path, PathBuf};
use std::process::Output;
use std::time::{Duration, Instant};

use dr_testkit::pg::{
    Scratch, TestCluster, archive_all, bin_dir, command, conninfo_of, dump_digest, ok, run, sql, stop_server,
};

/// A server that archives with `dr`, and a place for everything.
struct Shop {
    cluster: TestCluster,
    scratch: Scratch,
    dr: PathBuf,
}

impl Drop for Shop {
    fn drop(&mut self) {
        for entry in std::fs::read_dir(self.scratch.path()).into_iter().flatten().flatten() {
            stop_server(&entry.path());
        }
    }
}

impl Shop {
    fn open() -> Self {
        Self::open_with(&[])
    }

    fn open_with(settings: &[&str]) -> Self {
        let scratch = Scratch::new();
        let base = scratch.path().to_owned();
        // The server's user may not be able to enter the place where the tests are built.
        let dr = base.join("dr");
        std::fs::copy(env!("CARGO_BIN_EXE_dr"), &dr).unwrap();
        std::fs::set_permissions(&dr, std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
        let cluster = TestCluster::create(&base, "data");
        cluster.configure(settings);
        cluster.configure(&[&format!(
            "archive_command = '{} --config {}/dr.toml wal push %p'",
            dr.display(),
            base.display()
        )]);
        cluster.start();
        let shop = Shop { cluster, scratch, dr };
        shop.dr_ok(&[
            "init",
            "--repo",
            &shop.at("repo"),
            "--connection",
            &shop.cluster.conninfo(),
            "--output",
            &shop.at("dr.toml"),
            "--new-key",
            &shop.at("dr.key"),
            "--new-host-key",
            &shop.at("host.key"),
        ]);
        shop
    }

    fn at(&self, name: &str) -> String {
        self.scratch.path().join(name).display().to_string()
    }

    fn dr(&self, arguments: &[&str]) -> Output {
        let mut command = command(&self.dr);
        command.current_dir(self.scratch.path()).args(arguments);
        run(&mut command)
    }

    fn dr_ok(&self, arguments: &[&str]) -> String {
        let mut command = command(&self.dr);
        ok(command.current_dir(self.scratch.path()).args(arguments))
    }

    /// Runs with the configuration file.
    fn job(&self, arguments: &[&str]) -> String {
        let config = self.at("dr.toml");
        self.dr_ok(&[&["--config", &config], arguments].concat())
    }

    /// Restores with nothing but the address and the key, starts, and answers the connection.
    fn restore(&self, name: &str, arguments: &[&str]) -> String {
        let (repo, key, to) = (self.at("repo"), self.at("dr.key"), self.at(name));
        let fixed =
            ["--config", "/dev/null", "--repo", &repo, "--key-file", &key, "restore", "--to", &to, "--start"];
        self.dr_ok(&[&fixed[..], arguments].concat());
        conninfo_of(Path::new(&to))
    }

    /// Closes the current WAL segment and waits until it is archived.
    fn archive_all(&self) {
        archive_all(&self.cluster.conninfo());
    }
}

fn json(text: &str) -> serde_json::Value {
    serde_json::from_str(text).unwrap_or_else(|error| panic!("{error}: {text}"))
}

#[test]
fn a_dropped_table_comes_back_at_the_moment_before() {
    let shop = Shop::open();
    shop.cluster.load_tenants(3, 500);
    shop.job(&["check"]);
    shop.job(&["backup"]);
    shop.cluster.sql(
        "INSERT INTO tenant_2.orders SELECT g, 1, now(), 1, 'late' FROM generate_series(10001, 10100) g",
    );
    let before = dump_digest(&shop.cluster.conninfo());
    let lsn = shop.cluster.sql("SELECT pg_current_wal_insert_lsn()");
    let xid = shop.cluster.sql("BEGIN; SELECT pg_current_xact_id(); CREATE TABLE marker (); COMMIT");
    let marked = dump_digest(&shop.cluster.conninfo());
    shop.cluster.sql("SELECT pg_create_restore_point('before the mistake')");
    std::thread::sleep(Duration::from_millis(30));
    let time = shop.cluster.sql("SELECT now()");
    std::thread::sleep(Duration::from_millis(30));
    shop.cluster.sql("DROP TABLE tenant_2.orders");
    let dropped = dump_digest(&shop.cluster.conninfo());
    shop.archive_all();
    assert_ne!(before, dropped);
    let cases: [(&str, &[&str], &str); 6] = [
        ("by-time", &["--time", &time], &marked),
        ("by-name", &["--name", "before the mistake"], &marked),
        ("by-xid", &["--xid", &xid], &marked),
        ("before-xid", &["--xid", &xid, "--exclusive"], &before),
        ("by-lsn", &["--lsn", &lsn], &before),
        ("latest", &["--latest"], &dropped),
    ];
    for (name, target, expected) in cases {
        let connection = shop.restore(name, target);
        assert_eq!(dump_digest(&connection), *expected, "{name}");
        assert_eq!(sql(&connection, "SELECT pg_is_in_recovery()"), "f", "{name}");
        assert_eq!(sql(&connection, "SHOW archive_mode"), "off", "{name}");
        stop_server(Path::new(&shop.at(name)));
    }
    let jobs = json(&shop.job(&["jobs", "--json"]));
    assert_eq!(jobs["result"].as_array().unwrap().len(), 7);
}

/// An oracle: a raw copy of the stopped cluster, replayed by PostgreSQL alone, has the same content.
#[test]
fn a_restored_cluster_equals_a_plain_copy_and_passes_amcheck() {
    let shop = Shop::open();
    shop.cluster.load_tenants(2, 2000);
    shop.job(&["backup"]);
    shop.cluster.sql("UPDATE tenant_1.orders SET note = note || 'x' WHERE id % 3 = 0; DELETE FROM tenant_2.payments WHERE id % 5 = 0");
    shop.job(&["backup"]);
    shop.cluster.sql("VACUUM");
    shop.cluster
        .sql("INSERT INTO tenant_1.inventory SELECT g, 1, 'n' FROM generate_series(100000, 103000) g");
    shop.archive_all();
    shop.cluster.stop("fast");
    ok(command("/bin/cp").args(["-a", &shop.at("data"), &shop.at("oracle")]));
    let connection = shop.restore("restored", &["--latest"]);
    let restored = dump_digest(&connection);
    let part = |name: &str| connection.split(' ').find_map(|p| p.strip_prefix(name)).unwrap().to_owned();
    let mut amcheck = command(bin_dir().join("pg_amcheck"));
    amcheck.args(["--all", "--install-missing", "--heapallindexed", "--parent-check", "-U", "postgres"]);
    ok(amcheck.args(["-h", &part("host="), "-p", &part("port=")]));
    stop_server(Path::new(&shop.at("restored")));
    let mut pg_ctl = command(bin_dir().join("pg_ctl"));
    let oracle = shop.at("oracle");
    ok(pg_ctl.args([
        "start",
        "-w",
        "-D",
        &oracle,
        "-l",
        &shop.at("oracle.log"),
        "-o",
        "-c archive_mode=off",
    ]));
    assert_eq!(restored, dump_digest(&conninfo_of(Path::new(&oracle))));
    stop_server(Path::new(&oracle));
    let mut checksums = command(bin_dir().join("pg_checksums"));
    // `stop_server` stops at once; a start and an orderly stop make the directory consistent first.
    let restored_dir = shop.at("restored");
    ok(command(bin_dir().join("pg_ctl")).args(["start", "-w", "-D", &restored_dir, "-l", &shop.at("r.log")]));
    ok(command(bin_dir().join("pg_ctl")).args(["stop", "-w", "-m", "fast", "-D", &restored_dir]));
    ok(checksums.args(["--check", "-D", &restored_dir]));
}

#[test]
fn tablespaces_move_and_timelines_are_followed() {
    let shop = Shop::open();
    let (old, new) = (shop.at("space"), shop.at("moved"));
    ok(command("/bin/mkdir").arg(&old));
    shop.cluster.sql(&format!("CREATE TABLESPACE fast LOCATION '{old}'"));
    shop.cluster.sql("CREATE TABLE spaced TABLESPACE fast AS SELECT g FROM generate_series(1, 50000) g");
    shop.job(&["backup"]);
    shop.cluster.sql("INSERT INTO spaced SELECT g FROM generate_series(50001, 60000) g");
    let digest = dump_digest(&shop.cluster.conninfo());
    shop.archive_all();
    // The old place is taken: nothing is overwritten.
    let (repo, key, to) = (shop.at("repo"), shop.at("dr.key"), shop.at("second"));
    let refused = shop.dr(&["--repo", &repo, "--key-file", &key, "restore", "--to", &to, "--json"]);
    assert_eq!(json(&String::from_utf8_lossy(&refused.stdout))["error"]["code"], "job-not-empty");
    let map = format!("fast={new}");
    let connection = shop.restore("second", &["--tablespace", &map, "--archive-mode", "keep"]);
    let moved =
        sql(&connection, "SELECT pg_tablespace_location(oid) FROM pg_tablespace WHERE spcname = 'fast'");
    assert_eq!(moved, new);
    assert_eq!(sql(&connection, "SELECT count(*) FROM spaced"), "60000");
    assert_eq!(dump_digest(&connection).replace(&new, &old).len(), digest.len());
    // The second server archives on its own timeline; a restore follows it.
    sql(&connection, "CREATE TABLE on_timeline_two AS SELECT 1 AS a");
    archive_all(&connection);
    let third = format!("fast={}", shop.at("third-space"));
    let connection = shop.restore("third", &["--tablespace", &third]);
    assert_eq!(sql(&connection, "SELECT a FROM on_timeline_two"), "1");
    assert_eq!(sql(&connection, "SELECT timeline_id FROM pg_control_checkpoint()"), "3");
    let fourth = format!("fast={}", shop.at("fourth-space"));
    let connection = shop.restore("fourth", &["--tablespace", &fourth, "--timeline", "1"]);
    assert_eq!(sql(&connection, "SELECT to_regclass('on_timeline_two') IS NULL"), "t");
}

#[test]
fn a_delta_restore_turns_a_stopped_cluster_back() {
    let shop = Shop::open();
    shop.cluster.load_tenants(2, 3000);
    shop.job(&["backup"]);
    let digest = dump_digest(&shop.cluster.conninfo());
    let lsn = shop.cluster.sql("SELECT pg_current_wal_insert_lsn()");
    shop.cluster.sql("DROP SCHEMA tenant_1 CASCADE");
    shop.archive_all();
    let to = shop.at("data");
    let config = shop.at("dr.toml");
    let running = shop
        .dr(&["--config", &config, "restore", "--to", &to, "--lsn", &lsn, "--delta", "--start", "--json"]);
    assert_eq!(json(&String::from_utf8_lossy(&running.stdout))["error"]["code"], "job-not-ours");
    shop.cluster.stop("fast");
    let done = json(&shop.job(&["restore", "--to", &to, "--lsn", &lsn, "--delta", "--start", "--json"]));
    assert!(done["result"]["bytes_kept"].as_u64() > done["result"]["bytes_fetched"].as_u64());
    assert_eq!(dump_digest(&conninfo_of(Path::new(&to))), digest);
}

#[test]
fn a_backup_killed_at_any_moment_leaves_nothing_listed_and_the_next_one_works() {
    let shop = Shop::open();
    shop.cluster.load_tenants(2, 20_000);
    let config = shop.at("dr.toml");
    let mut killed = 0;
    for wait_ms in [5, 20, 40, 80, 120, 160, 240] {
        let mut child = command(&shop.dr);
        child.current_dir(shop.scratch.path()).args(["--config", &config, "--quiet", "backup", "--full"]);
        child.stdout(std::process::Stdio::null()).stderr(std::process::Stdio::null());
        let mut child = child.spawn().unwrap();
        std::thread::sleep(Duration::from_millis(wait_ms));
        let finished = child.try_wait().unwrap().is_some();
        let _ = child.kill();
        child.wait().unwrap();
        killed += u32::from(!finished);
        // Whatever is listed is whole.
        let verified = shop.dr(&["--config", &config, "verify", "--all", "--json"]);
        let report = json(&String::from_utf8_lossy(&verified.stdout));
        let listed = json(&shop.job(&["list", "--json"]));
        if listed["result"]
            .as_array()
            .is_some_and(|l| !l.is_empty() && !l[0]["backups"].as_array().unwrap().is_empty())
        {
            assert!(verified.status.success(), "{report}");
        }
    }
    assert!(killed >= 3, "{killed}");
    shop.job(&["backup"]);
    shop.archive_all();
    let connection = shop.restore("restored", &["--latest"]);
    assert_eq!(dump_digest(&connection), dump_digest(&shop.cluster.conninfo()));
}

#[test]
fn two_backups_at_once_and_two_writers_are_told_apart() {
    let shop = Shop::open_with(&["max_wal_senders = 4"]);
    shop.cluster.load_tenants(1, 100);
    // A session that holds the lock of a backup under way.
    let mut holder = command(bin_dir().join("psql"));
    holder.args(["-X", "-q", "-c", "SELECT pg_advisory_lock(25714, 25185)", "-c", "SELECT pg_sleep(30)"]);
    holder
        .arg(shop.cluster.conninfo())
        .stdout(std::process::Stdio::null())
        .stderr(std::process::Stdio::null());
    let mut holder = holder.spawn().unwrap();
    let began = Instant::now();
    while shop.cluster.sql("SELECT count(*) FROM pg_locks WHERE locktype = 'advisory'") != "1" {
        assert!(began.elapsed() < Duration::from_secs(10));
        std::thread::sleep(Duration::from_millis(20));
    }
    let config = shop.at("dr.toml");
    let busy = shop.dr(&["--config", &config, "backup", "--json"]);
    let _ = holder.kill();
    holder.wait().unwrap();
    shop.cluster.sql("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE query LIKE '%pg_sleep%' AND pid <> pg_backend_pid()");
    assert_eq!(json(&String::from_utf8_lossy(&busy.stdout))["error"]["code"], "source-busy");
    shop.job(&["backup"]);
    shop.archive_all();
    // A clone of the server promotes itself and writes the names of the first one.
    let wal = shop.cluster.sql("SELECT last_archived_wal FROM pg_stat_archiver");
    let path = shop.scratch.path().join("data/pg_wal").join(&wal);
    let mut bytes = std::fs::read(&path).unwrap();
    // In the last record, which says so: beyond it there are only pages that nobody wrote.
    let at = bytes.windows(7).position(|window| window == b"the end").unwrap();
    bytes[at] ^= 1;
    let clone = shop.scratch.path().join("clone");
    std::fs::create_dir(&clone).unwrap();
    std::fs::write(clone.join(&wal), bytes).unwrap();
    let fenced = shop.dr(&["--config", &config, "wal", "push", &clone.join(&wal).display().to_string()]);
    assert_eq!(fenced.status.code(), Some(12), "{}", String::from_utf8_lossy(&fenced.stderr));
    // Pushing the true one again is fine.
    shop.job(&["wal", "push", &path.display().to_string()]);
}

#[test]
fn fetch_has_three_exits() {
    let shop = Shop::open();
    shop.archive_all();
    let (repo, key, out) = (shop.at("repo"), shop.at("dr.key"), shop.at("fetched"));
    let data = shop.scratch.path().join("data");
    let fetch = |repo: &str, name: &str| {
        let mut fetch = command(&shop.dr);
        fetch.current_dir(&data).args(["--repo", repo, "--key-file", &key, "wal", "fetch", name, &out]);
        run(&mut fetch).status.code()
    };
    let last = shop.cluster.sql("SELECT last_archived_wal FROM pg_stat_archiver");
    assert_eq!(fetch(&repo, &last), Some(0));
    assert_eq!(std::fs::read(&out).unwrap(), std::fs::read(data.join("pg_wal").join(&last)).unwrap());
    assert_eq!(fetch(&repo, "0000000100000000000000F0"), Some(1));
    assert_eq!(fetch(&repo, "00000009.history"), Some(1));
    assert_eq!(fetch("/nonexistent", &last), Some(200));
    assert_eq!(fetch(&repo, "nonsense"), Some(200));
    assert_eq!(shop.dr(&["wal", "fetch", "--no-such-flag"]).status.code(), Some(200));
    assert_eq!(shop.dr(&["--set", "x=1", "wal", "fetch", &last, &out]).status.code(), Some(200));
}

#[test]
fn a_full_disk_is_told_and_what_was_there_stays() {
    let Some((uid, _)) = dr_testkit::pg::server_ids() else {
        eprintln!("not root: no small file system can be mounted");
        return;
    };
    let shop = Shop::open();
    shop.cluster.load_tenants(1, 20_000);
    shop.job(&["backup"]);
    let small = shop.at("small");
    std::fs::create_dir(&small).unwrap();
    let options = format!("size=2m,uid={uid},mode=755");
    let mounted =
        run(std::process::Command::new("mount").args(["-t", "tmpfs", "-o", &options, "tmpfs", &small]));
    if !mounted.status.success() {
        eprintln!("no tmpfs can be mounted here");
        return;
    }
    let outcome = std::panic::catch_unwind(|| {
        let (repo, key) = (format!("{small}/repo"), shop.at("second.key"));
        shop.dr_ok(&[
            "init",
            "--repo",
            &repo,
            "--connection",
            &shop.cluster.conninfo(),
            "--output",
            &shop.at("second.toml"),
            "--new-key",
            &key,
        ]);
        let second = shop.at("second.toml");
        let full = shop.dr(&["--config", &second, "--set", "backup.wal_timeout=2s", "backup", "--json"]);
        let error = json(&String::from_utf8_lossy(&full.stdout));
        assert_eq!(error["error"]["class"], "exhausted", "{error}");
        assert_eq!(full.status.code(), Some(18));
        let to = format!("{small}/restored");
        let config = shop.at("dr.toml");
        let full = shop.dr(&["--config", &config, "restore", "--to", &to, "--json"]);
        assert_eq!(json(&String::from_utf8_lossy(&full.stdout))["error"]["code"], "job-preflight");
        assert!(!Path::new(&to).exists(), "refused before a byte moved");
    });
    run(std::process::Command::new("umount").args(["-l", &small]));
    outcome.unwrap_or_else(|panic| std::panic::resume_unwind(panic));
    shop.job(&["verify", "--all"]);
}

/// The way out: a short script and this repository's documentation restore a backup and its WAL.
#[test]
fn a_backup_and_its_wal_are_restored_without_dr() {
    let python = std::env::var("DR_TEST_PYTHON").unwrap_or_else(|_| "python3".into());
    let ready =
        std::process::Command::new(&python).args(["-c", "import cryptography, zstandard, blake3"]).output();
    if !ready.is_ok_and(|output| output.status.success()) {
        assert!(std::env::var("DR_TEST_PYTHON").is_err(), "{python} lacks cryptography, zstandard or blake3");
        eprintln!("no Python with cryptography, zstandard and blake3: `cargo xtask test` makes one");
        return;
    }
    let shop = Shop::open();
    shop.cluster.load_tenants(2, 3000);
    shop.job(&["backup"]);
    shop.cluster.sql("UPDATE tenant_1.orders SET note = 'changed' WHERE id % 50 = 0");
    shop.job(&["backup"]);
    shop.cluster
        .sql("INSERT INTO tenant_2.payments SELECT g, g, 1, 'late' FROM generate_series(50000, 50100) g");
    let digest = dump_digest(&shop.cluster.conninfo());
    let lsn = shop.cluster.sql("SELECT pg_current_wal_insert_lsn()");
    shop.archive_all();
    let listed = json(&shop.job(&["list", "--json"]));
    let newest = listed["result"][0]["backups"][1]["id"].as_str().unwrap();
    let system = listed["result"][0]["cluster"]["system_id"].as_str().unwrap();
    let script = shop.at("restore.py");
    std::fs::copy(concat!(env!("CARGO_MANIFEST_DIR"), "/../../tools/restore.py"), &script).unwrap();
    let (repo, key, to, wal) =
        (shop.at("repo"), shop.at("dr.key"), shop.at("by-script"), shop.at("by-script-wal"));
    let script = |arguments: &[&str]| {
        // The interpreter may lie where only this process may enter.
        let mut command = std::process::Command::new(&python);
        command.args([&script, "--repo", &repo, "--key", &key]).args(arguments);
        ok(command.stdin(std::process::Stdio::null()))
    };
    assert!(script(&["list"]).contains(newest));
    script(&["restore", newest, &to]);
    script(&["wal", system, &wal]);
    let settings = format!(
        "restore_command = 'cp {wal}/%f %p'\nrecovery_target_lsn = '{lsn}'\nrecovery_target_action = promote\narchive_mode = off\n"
    );
    let conf = Path::new(&to).join("postgresql.auto.conf");
    std::fs::write(&conf, settings).unwrap();
    std::fs::write(Path::new(&to).join("recovery.signal"), "").unwrap();
    if let Some((uid, gid)) = dr_testkit::pg::server_ids() {
        ok(std::process::Command::new("chown").args(["-R", &format!("{uid}:{gid}"), &to, &wal]));
    }
    // The copy has the port of the first server, which is gone on the day that this is for.
    shop.cluster.stop("immediate");
    let mut pg_ctl = command(bin_dir().join("pg_ctl"));
    ok(pg_ctl.args(["start", "-w", "-D", &to, "-l", &shop.at("script.log")]));
    let connection = conninfo_of(Path::new(&to));
    let began = Instant::now();
    while sql(&connection, "SELECT pg_is_in_recovery()") != "f" {
        assert!(began.elapsed() < Duration::from_secs(30));
        std::thread::sleep(Duration::from_millis(50));
    }
    assert_eq!(dump_digest(&connection), digest);
}

/// The runbook `docs/runbooks/beside-pgbackrest.md`, where pgBackRest is installed.
#[test]
fn a_trial_beside_pgbackrest_archives_and_restores_from_both() {
    let other = std::env::var("DR_TEST_PGBACKREST").unwrap_or_else(|_| "/usr/bin/pgbackrest".into());
    if !Path::new(&other).exists() {
        eprintln!("pgBackRest is not installed");
        return;
    }
    let shop = Shop::open();
    let conf = format!(
        "[global]\nrepo1-path={0}/other\nlog-level-file=off\nlog-level-console=error\nlock-path={0}/lock\nstart-fast=y\n\
         [main]\npg1-path={0}/data\npg1-port={1}\npg1-socket-path={0}\npg1-user=postgres\n",
        shop.scratch.path().display(),
        shop.cluster.port
    );
    std::fs::write(shop.at("other.conf"), conf).unwrap();
    let tool = |arguments: &[&str]| {
        let mut command = command(&other);
        ok(command.arg(format!("--config={}", shop.at("other.conf"))).arg("--stanza=main").args(arguments))
    };
    let first = shop.cluster.sql("SHOW archive_command");
    let both = format!("{other} --config={} --stanza=main archive-push %p && {first}", shop.at("other.conf"));
    tool(&["stanza-create"]);
    shop.cluster.sql(&format!("ALTER SYSTEM SET archive_command = '{both}'"));
    shop.cluster.sql("SELECT pg_reload_conf()");
    shop.cluster.load_tenants(1, 1000);
    tool(&["backup"]);
    shop.job(&["backup"]);
    shop.cluster.sql("DELETE FROM tenant_1.orders WHERE id > 500");
    let digest = dump_digest(&shop.cluster.conninfo());
    shop.archive_all();
    let connection = shop.restore("trial", &["--latest"]);
    assert_eq!(dump_digest(&connection), digest);
    assert!(tool(&["info"]).contains("status: ok"));
}

#[test]
fn files_outside_the_data_directory_are_kept_and_offered() {
    let shop = Shop::open();
    shop.cluster.stop("fast");
    let etc = shop.scratch.path().join("etc");
    std::fs::create_dir(&etc).unwrap();
    for name in ["postgresql.conf", "pg_hba.conf", "pg_ident.conf"] {
        std::fs::rename(shop.scratch.path().join("data").join(name), etc.join(name)).unwrap();
    }
    shop.cluster.start_with_config(&etc);
    shop.job(&["backup"]);
    shop.archive_all();
    let host = shop.at("host-files");
    let connection = shop.restore("restored", &["--latest", "--host-files", &host]);
    let kept = Path::new(&host).join(etc.strip_prefix("/").unwrap()).join("pg_hba.conf");
    assert_eq!(std::fs::read(kept).unwrap(), std::fs::read(etc.join("pg_hba.conf")).unwrap());
    // Without its configuration the copy runs with the limits that recovery needs.
    assert_eq!(sql(&connection, "SHOW max_connections"), "123");
}

/// A standby that polls the archive stays a standby at the end of what is archived, through an outage
/// too, and replays what comes later.
#[test]
fn a_standby_that_polls_is_not_promoted_by_an_outage() {
    let shop = Shop::open();
    shop.cluster.load_tenants(1, 500);
    shop.job(&["backup"]);
    shop.archive_all();
    let (repo, key, to) = (shop.at("repo"), shop.at("dr.key"), shop.at("standby"));
    shop.dr_ok(&["--config", "/dev/null", "--repo", &repo, "--key-file", &key, "restore", "--to", &to]);
    let standby = Path::new(&to);
    std::fs::rename(standby.join("recovery.signal"), standby.join("standby.signal")).unwrap();
    let port = shop.cluster.port + 400;
    let options = format!("-c port={port} -c wal_retrieve_retry_interval=200ms");
    let mut pg_ctl = command(bin_dir().join("pg_ctl"));
    ok(pg_ctl.args(["start", "-w", "-D", &to, "-l", &shop.at("standby.log"), "-o", &options]));
    let connection = conninfo_of(standby);
    let wait_for = |query: &str, answer: &str| {
        let began = Instant::now();
        while sql(&connection, query) != answer {
            assert!(began.elapsed() < Duration::from_secs(30), "{query} is not {answer}");
            std::thread::sleep(Duration::from_millis(100));
        }
    };
    // The archive goes away: exit 200 ends the server rather than the recovery.
    shop.cluster.sql("CREATE TABLE later AS SELECT 7 AS a");
    shop.archive_all();
    wait_for("SELECT to_regclass('later') IS NOT NULL", "t");
    assert_eq!(sql(&connection, "SELECT pg_is_in_recovery()"), "t");
    std::fs::rename(&repo, shop.at("away")).unwrap();
    std::thread::sleep(Duration::from_millis(800));
    let log = std::fs::read_to_string(shop.at("standby.log")).unwrap();
    assert!(!log.contains("archive recovery complete") && !log.contains("selected new timeline"), "{log}");
    std::fs::rename(shop.at("away"), &repo).unwrap();
    if !standby.join("postmaster.pid").exists() {
        ok(command(bin_dir().join("pg_ctl")).args([
            "start",
            "-w",
            "-D",
            &to,
            "-l",
            &shop.at("standby.log"),
            "-o",
            &options,
        ]));
    }
    shop.cluster.sql("CREATE TABLE latest AS SELECT 8 AS a");
    shop.archive_all();
    wait_for("SELECT to_regclass('latest') IS NOT NULL", "t");
    assert_eq!(sql(&connection, "SELECT pg_is_in_recovery()"), "t");
}

#[test]
fn a_signal_stops_a_backup_at_a_safe_point() {
    let shop = Shop::open();
    shop.cluster.load_tenants(2, 60_000);
    let config = shop.at("dr.toml");
    let mut child = command(&shop.dr);
    child.current_dir(shop.scratch.path()).args(["--config", &config, "--quiet", "backup", "--full"]);
    child.stdout(std::process::Stdio::null()).stderr(std::process::Stdio::null());
    let mut child = child.spawn().unwrap();
    std::thread::sleep(Duration::from_millis(60));
    ok(command("/bin/kill").args(["-TERM", &child.id().to_string()]));
    let status = child.wait().unwrap();
    assert!([Some(19), Some(0)].contains(&status.code()), "{status}");
    shop.job(&["backup"]);
    shop.job(&["verify", "--all"]);
}

#[test]
fn a_restore_killed_at_any_moment_cannot_start_and_is_continued() {
    let shop = Shop::open();
    shop.cluster.load_tenants(2, 30_000);
    shop.job(&["backup"]);
    shop.archive_all();
    let digest = dump_digest(&shop.cluster.conninfo());
    let (repo, key) = (shop.at("repo"), shop.at("dr.key"));
    let mut killed = 0;
    for (number, wait_ms) in [0, 5, 20, 60, 130].into_iter().enumerate() {
        let to = shop.at(&format!("killed-{number}"));
        let fixed =
            ["--config", "/dev/null", "--repo", &repo, "--key-file", &key, "--quiet", "restore", "--to", &to];
        let mut child = command(&shop.dr);
        child.args(fixed).stdout(std::process::Stdio::null()).stderr(std::process::Stdio::null());
        let mut child = child.spawn().unwrap();
        // However busy the machine is: the moment counts from the directory's mark on.
        let began = Instant::now();
        while !Path::new(&to).join("dr-restore.json").exists() && child.try_wait().unwrap().is_none() {
            assert!(began.elapsed() < Duration::from_secs(30), "the restore never began");
            std::thread::sleep(Duration::from_millis(1));
        }
        std::thread::sleep(Duration::from_millis(wait_ms));
        let finished = child.try_wait().unwrap().is_some();
        let _ = child.kill();
        child.wait().unwrap();
        let marked = Path::new(&to).join("dr-restore.json").exists();
        if !finished && marked {
            killed += 1;
            let control = Path::new(&to).join("global/pg_control").exists();
            let mut start = command(bin_dir().join("pg_ctl"));
            let started = run(start.args(["start", "-W", "-D", &to, "-l", &shop.at("never.log")]));
            std::thread::sleep(Duration::from_millis(100));
            assert!(control || !Path::new(&to).join("postmaster.pid").exists(), "{started:?}");
        }
        // The same command with --delta goes on, wherever it was stopped.
        if !Path::new(&to).join("postmaster.pid").exists() {
            shop.dr_ok(&[&fixed[..], &["--delta", "--start"]].concat());
            assert_eq!(dump_digest(&conninfo_of(Path::new(&to))), digest, "killed after {wait_ms} ms");
        }
        stop_server(Path::new(&to));
    }
    assert!(killed >= 1, "{killed}");
}

#[test]
fn a_push_killed_at_any_moment_is_repeated_and_nothing_is_lost() {
    let shop = Shop::open();
    shop.cluster.load_tenants(1, 20_000);
    shop.archive_all();
    let (repo, config) = (shop.at("repo"), shop.at("dr.toml"));
    let wal = shop.cluster.sql("SELECT last_archived_wal FROM pg_stat_archiver");
    let path = shop.scratch.path().join("data/pg_wal").join(&wal).display().to_string();
    let stored = ok(command("/usr/bin/find").args([&repo, "-name", &wal])).trim().to_owned();
    for wait_ms in [1, 4, 8, 15, 25, 40] {
        std::fs::remove_file(&stored).unwrap();
        let mut child = command(&shop.dr);
        child.args(["--config", &config, "wal", "push", &path]);
        let mut child = child.stderr(std::process::Stdio::null()).spawn().unwrap();
        std::thread::sleep(Duration::from_millis(wait_ms));
        let _ = child.kill();
        child.wait().unwrap();
        // Whole or absent; the next try succeeds either way.
        shop.job(&["wal", "push", &path]);
        let out = shop.at("fetched");
        shop.job(&["wal", "fetch", &wal, &out]);
        assert!(std::fs::read(&out).unwrap() == std::fs::read(&path).unwrap(), "killed after {wait_ms} ms");
    }
}

/// Every file below a data directory that does not differ from one backup to the next.
fn content_of(root: &Path) -> std::collections::BTreeMap<String, Vec<u8>> {
    // Written at the end of a backup, by the restore, or by the server while it runs.
    const OWN: [&str; 5] =
        ["backup_label", "tablespace_map", "global/pg_control", "postgresql.auto.conf", "recovery.signal"];
    fn walk(root: &Path, dir: &Path, out: &mut std::collections::BTreeMap<String, Vec<u8>>) {
        for entry in std::fs::read_dir(dir).unwrap() {
            let path = entry.unwrap().path();
            let name = path.strip_prefix(root).unwrap().display().to_string();
            if path.is_dir() {
                out.insert(format!("{name}/"), Vec::new());
                walk(root, &path, out);
            } else if !OWN.contains(&name.as_str()) {
                out.insert(name, std::fs::read(&path).unwrap());
            }
        }
    }
    let mut out = std::collections::BTreeMap::new();
    walk(root, root, &mut out);
    out
}

#[test]
fn files_and_stream_give_the_same_cluster_and_share_what_is_stored() {
    let shop = Shop::open_with(&["autovacuum = off"]);
    let space = shop.scratch.path().join("space");
    std::fs::create_dir(&space).unwrap();
    if let Some((uid, gid)) = dr_testkit::pg::server_ids() {
        std::os::unix::fs::chown(&space, Some(uid), Some(gid)).unwrap();
    }
    shop.cluster.load_tenants(3, 4000);
    shop.cluster.sql(&format!("CREATE TABLESPACE fast LOCATION '{}'", space.display()));
    shop.cluster.sql(
        "CREATE TABLE events TABLESPACE fast AS SELECT g, md5(g::text) FROM generate_series(1, 50000) g",
    );
    shop.cluster.sql("CREATE UNLOGGED TABLE scratch AS SELECT 1");
    shop.cluster.sql("VACUUM FREEZE");
    shop.cluster.sql("CHECKPOINT");
    let backup =
        |source: &str| json(&shop.job(&["--json", "backup", "--source", source]))["result"]["backup"].clone();
    let first = backup("files");
    let second = backup("stream");
    assert_eq!((&first["files"], &first["bytes"]), (&second["files"], &second["bytes"]));
    let stored = |backup: &serde_json::Value| backup["stored_bytes"].as_u64().unwrap();
    assert!(stored(&second) * 20 < stored(&first), "{} of {}", stored(&second), stored(&first));

    let restored = |backup: &serde_json::Value, name: &str| {
        let (to, space) = (shop.at(name), shop.at(&format!("{name}-space")));
        let id = backup["id"].as_str().unwrap();
        let moved = format!("fast={space}");
        shop.job(&["restore", "--to", &to, "--backup", id, "--immediate", "--tablespace", &moved]);
        content_of(Path::new(&to))
    };
    let (files, stream) = (restored(&first, "from-files"), restored(&second, "from-stream"));
    assert_eq!(files.keys().collect::<Vec<_>>(), stream.keys().collect::<Vec<_>>());
    for (name, content) in &files {
        assert!(stream[name] == *content, "{name} differs");
    }
    assert!(
        files.keys().any(|name| name.starts_with("pg_tblspc/") && name.contains("/PG_")),
        "the tablespace is there"
    );

    // A change is found in either direction, and the result is the cluster.
    shop.cluster.sql("UPDATE tenant_2.orders SET note = 'changed' WHERE id % 100 = 0");
    let third = backup("stream");
    assert!(stored(&third) * 3 < stored(&first), "{} of {}", stored(&third), stored(&first));
    shop.cluster.sql(
        "INSERT INTO tenant_1.orders SELECT g, 1, now(), 1, 'more' FROM generate_series(90001, 90100) g",
    );
    backup("files");
    // The tablespace lies elsewhere afterwards, so rows are compared and not the whole dump.
    let rows = "SELECT md5(string_agg(o::text, ',' ORDER BY o.id)) || (SELECT md5(string_agg(e::text, ',' ORDER BY e.g)) \
                FROM events e) FROM (SELECT * FROM tenant_1.orders UNION ALL SELECT * FROM tenant_2.orders) o";
    let before = shop.cluster.sql(rows);
    shop.archive_all();
    let moved = format!("fast={}", shop.at("latest-space"));
    let connection = shop.restore("latest", &["--tablespace", &moved]);
    assert_eq!(sql(&connection, rows), before);
}

#[test]
fn a_first_backup_over_the_stream_restores_to_the_cluster() {
    let shop = Shop::open();
    shop.cluster.load_tenants(2, 30_000);
    let check = shop.job(&["--set", "backup.source=stream", "check"]);
    assert!(check.contains("replication connection works"), "{check}");
    let report = shop.job(&["backup", "--source", "stream"]);
    assert!(report.contains("is durable"), "{report}");
    let digest = dump_digest(&shop.cluster.conninfo());
    shop.archive_all();
    let connection = shop.restore("copy", &[]);
    assert_eq!(dump_digest(&connection), digest);
    let wrong = shop.dr(&["--config", &shop.at("dr.toml"), "backup", "--source", "tape"]);
    assert_eq!(wrong.status.code(), Some(2));
    let wrong = shop.dr(&["--config", &shop.at("dr.toml"), "--set", "backup.source=tape", "backup"]);
    assert!(String::from_utf8_lossy(&wrong.stderr).contains("files, stream"));
}

#[test]
fn each_action_at_the_target_is_done_proven_and_told() {
    let shop = Shop::open();
    shop.cluster.load_tenants(1, 200);
    shop.job(&["backup"]);
    shop.cluster.sql("CREATE TABLE marker ()");
    let lsn = shop.cluster.sql("SELECT pg_current_wal_insert_lsn()");
    shop.cluster.sql("DROP TABLE marker");
    shop.archive_all();
    let restored = |name: &str, action: &str| {
        let (to, config) = (shop.at(name), shop.at("dr.toml"));
        shop.dr_ok(&[
            "--config", &config, "--json", "restore", "--to", &to, "--start", "--lsn", &lsn, "--action",
            action,
        ])
    };
    let reached = |text: &str| json(text)["result"]["reached"].clone();

    let paused = reached(&restored("paused", "pause"));
    assert_eq!((&paused["promoted"], &paused["running"]), (&false.into(), &true.into()), "{paused}");
    let connection = paused["connection"].as_str().unwrap();
    assert_eq!(sql(connection, "SELECT count(*) FROM pg_class WHERE relname = 'marker'"), "1");
    assert_eq!(sql(connection, "SELECT pg_is_in_recovery()"), "t");

    let promoted = reached(&restored("promoted", "promote"));
    assert_eq!((&promoted["promoted"], &promoted["timeline"]), (&true.into(), &2.into()), "{promoted}");

    let stopped = reached(&restored("stopped", "shutdown"));
    assert_eq!(
        (&stopped["running"], &stopped["connection"]),
        (&false.into(), &serde_json::Value::Null),
        "{stopped}"
    );
    assert!(!Path::new(&shop.at("stopped")).join("postmaster.pid").exists());
    let text =
        shop.job(&["restore", "--to", &shop.at("told"), "--start", "--lsn", &lsn, "--action", "pause"]);
    let mut misspelt = command(&shop.dr);
    misspelt.env("TZ", "Europe/Berlln").args(["--config", &shop.at("dr.toml"), "restore", "--plan"]);
    let misspelt = run(misspelt.args(["--to", &shop.at("tz"), "--time", "2020-01-01 10:00"]));
    let words = String::from_utf8_lossy(&misspelt.stderr);
    assert!(misspelt.status.code() == Some(16) && words.contains("Berlln"), "{words}");
    assert!(text.contains("psql \"host=") && text.contains("pg_wal_replay_resume"), "{text}");
}

#[test]
fn a_backup_leaves_no_error_in_the_servers_log() {
    let shop = Shop::open_with(&["log_min_messages = error"]);
    for source in ["files", "stream"] {
        shop.job(&["--set", &format!("backup.source={source}"), "check"]);
        shop.job(&["backup", "--source", source]);
    }
    let log =
        std::fs::read_to_string(shop.scratch.path().join(format!("{}.log", shop.cluster.port))).unwrap();
    let errors: Vec<&str> =
        log.lines().filter(|line| line.contains("ERROR:") || line.contains("FATAL:")).collect();
    assert!(errors.is_empty(), "{errors:#?}");
}

#[test]
fn a_cluster_that_nobody_has_is_an_error_and_not_an_empty_list() {
    let shop = Shop::open();
    shop.job(&["backup"]);
    let config = shop.at("dr.toml");
    let typo = shop.dr(&["--config", &config, "--cluster", "mian", "list"]);
    assert_eq!(typo.status.code(), Some(16), "{}", String::from_utf8_lossy(&typo.stderr));
    assert!(String::from_utf8_lossy(&typo.stderr).contains("main"));
    // A full disk behind a redirect is told; a reader that went away is not an error.
    let list = format!("{} --config {config} list", shop.dr.display());
    let full = run(command("/bin/sh").args(["-c", &format!("{list} > /dev/full")]));
    assert_eq!(full.status.code(), Some(18), "{}", String::from_utf8_lossy(&full.stderr));
    let gone = run(command("/bin/bash").args(["-c", &format!("set -o pipefail; {list} | true")]));
    assert!(gone.status.success(), "{}", String::from_utf8_lossy(&gone.stderr));
}

/// Closes WAL segments of the primary every now and then while something runs, as archive_timeout
/// does on a busy server.
fn while_wal_is_closed<T>(shop: &Shop, work: impl FnOnce() -> T) -> T {
    let done = std::sync::atomic::AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while !done.load(std::sync::atomic::Ordering::Relaxed) {
                shop.cluster.sql("SELECT pg_switch_wal()");
                std::thread::sleep(Duration::from_millis(300));
            }
        });
        let result = std::panic::catch_unwind(std::panic::AssertUnwindSafe(work));
        done.store(true, std::sync::atomic::Ordering::Relaxed);
        result.unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    })
}

/// Makes a standby a primary, and waits until it takes connections: pg_ctl waits for less.
fn promote(data: &str) {
    ok(command(bin_dir().join("pg_ctl")).args(["promote", "-w", "-D", data]));
    let (connection, began) = (conninfo_of(Path::new(data)), Instant::now());
    let ask = || run(command(bin_dir().join("psql")).args(["-X", "-q", "-c", "SELECT 1"]).arg(&connection));
    while !ask().status.success() {
        assert!(began.elapsed() < Duration::from_secs(30), "{data} takes no connections after its promotion");
        std::thread::sleep(Duration::from_millis(50));
    }
}

/// Waits until a query on a server gives this answer.
fn until(connection: &str, query: &str, answer: &str) {
    let began = Instant::now();
    while sql(connection, query) != answer {
        assert!(began.elapsed() < Duration::from_secs(30), "{query} never gave {answer}");
        std::thread::sleep(Duration::from_millis(50));
    }
}

#[test]
fn slow_a_hot_standby_follows_is_shown_promoted_and_whole_and_the_old_primary_is_rebuilt_behind_it() {
    let shop = Shop::open_with(&["max_slot_wal_keep_size = 1GB", "wal_keep_size = 0"]);
    shop.cluster.load_tenants(2, 2000);
    shop.job(&["backup"]);
    shop.cluster.sql("CREATE TABLE later AS SELECT generate_series(1, 1000) g");
    let port = shop.cluster.port + 1;
    let (to, set) = (shop.at("hot"), format!("port={port}"));
    let create = ["standby", "create", "--to", &to, "--name", "hot one", "--server-setting", &set];
    let plan = shop.job(&[&create[..], &["--plan"]].concat());
    assert!(plan.contains("Nothing was changed") && plan.contains("hot_one"), "{plan}");
    assert!(!Path::new(&to).exists());
    let text = shop.job(&create);
    assert!(text.contains("replayed the mark") && text.contains("answers queries"), "{text}");
    let standby = conninfo_of(Path::new(&to));
    assert_eq!(sql(&standby, "SELECT pg_is_in_recovery(), count(*) FROM later"), "t|1000");

    shop.cluster.sql("INSERT INTO later SELECT generate_series(1001, 2000)");
    until(&standby, "SELECT count(*) FROM later", "2000");
    let check = shop.job(&["check"]);
    assert!(check.contains("1 replication slots, none of which keeps too much WAL"), "{check}");
    let status = json(&shop.job(&["--json", "standby", "status", "--to", &to]))["result"].clone();
    assert_eq!(status["standbys"][0]["name"], "hot one", "{status}");
    assert_eq!(status["slots"][0]["name"], "hot_one");
    assert_eq!(status["slots"][0]["active"], true);
    assert!(status["local"]["lag_commits"].is_u64(), "{status}");
    let text = shop.job(&["standby", "status", "--to", &to]);
    assert!(text.contains("hot one") && text.contains("streaming"), "{text}");
    let again = shop.dr(&[&["--config", &shop.at("dr.toml")], &create[..]].concat());
    assert!(
        String::from_utf8_lossy(&again.stderr).contains("not empty"),
        "{}",
        String::from_utf8_lossy(&again.stderr)
    );

    // Backups can be read from it, when that is wanted and not otherwise.
    let at_standby = format!("cluster.connection={standby}");
    let refused =
        shop.dr(&["--config", &shop.at("dr.toml"), "--set", &at_standby, "backup", "--source", "stream"]);
    assert!(String::from_utf8_lossy(&refused.stderr).contains("backup.standby"), "{refused:?}");
    for source in ["stream", "files"] {
        shop.cluster.sql("UPDATE tenant_1.orders SET note = note || 'x' WHERE id % 7 = 0");
        let report = while_wal_is_closed(&shop, || {
            shop.job(&[
                "--json",
                "--set",
                &at_standby,
                "--set",
                &format!("cluster.data_directory={to}"),
                "--set",
                "backup.standby=only",
                "backup",
                "--source",
                source,
            ])
        });
        let backup = json(&report)["result"]["backup"].clone();
        assert_eq!(
            (&backup["cluster"]["in_recovery"], &backup["status"]),
            (&true.into(), &"complete".into())
        );
        let digest = dump_digest(&shop.cluster.conninfo());
        shop.archive_all();
        let copy =
            shop.restore(&format!("from-standby-{source}"), &["--backup", backup["id"].as_str().unwrap()]);
        assert_eq!(dump_digest(&copy), digest, "{source}");
        stop_server(Path::new(&shop.at(&format!("from-standby-{source}"))));
    }

    shop.cluster.sql("SELECT pg_create_physical_replication_slot('forgotten', true)");
    shop.job(&["backup"]);
    assert!(shop.job(&["show"]).contains("forgotten"));
    shop.cluster.sql("INSERT INTO later SELECT 0 WHERE false; SELECT pg_logical_emit_message(true, 'x', repeat('y', 9999))");
    assert!(shop.job(&["check"]).contains("nobody reads slot forgotten"));
    let plan = shop.job(&["restore", "--to", &shop.at("planned"), "--plan"]);
    assert!(plan.contains("forgotten (physical)"), "{plan}");

    // The primary is lost; the standby takes over and is whole.
    shop.cluster.stop("fast");
    promote(&to);
    sql(&standby, "INSERT INTO later VALUES (2001)");
    let part = |name: &str| standby.split(' ').find_map(|p| p.strip_prefix(name)).unwrap().to_owned();
    let mut amcheck = command(bin_dir().join("pg_amcheck"));
    amcheck.args([
        "--all",
        "--install-missing",
        "-U",
        "postgres",
        "-h",
        &part("host="),
        "-p",
        &part("port="),
    ]);
    ok(&mut amcheck);

    // The old primary is rebuilt behind it, by the same command: only what differs is fetched.
    archive_all(&standby);
    shop.job(&[
        "--set",
        &format!("cluster.connection={standby}"),
        "--set",
        &format!("cluster.data_directory={to}"),
        "backup",
    ]);
    let old = shop.at("data");
    let rebuilt = shop.job(&[
        "--json",
        "--set",
        &format!("cluster.connection={standby}"),
        "standby",
        "create",
        "--to",
        &old,
        "--delta",
        "--name",
        "old",
        "--server-setting",
        &format!("port={}", shop.cluster.port),
    ]);
    assert!(json(&rebuilt)["result"]["proof"]["replayed"].is_string(), "{rebuilt}");
    until(&shop.cluster.conninfo(), "SELECT pg_is_in_recovery() AND count(*) = 2001 FROM later", "t");
}

#[test]
fn slow_warm_and_cold_standbys_follow_the_archive() {
    let shop = Shop::open();
    shop.cluster.load_tenants(1, 500);
    shop.job(&["backup"]);
    shop.cluster.sql("CREATE TABLE later AS SELECT generate_series(1, 1000) g");
    let port = format!("port={}", shop.cluster.port + 1);
    let warm = shop.at("warm");
    let create = ["standby", "create", "--temperature", "warm", "--to", &warm, "--server-setting", &port];
    // It is promoted below while its primary lives: its WAL must not get into the archive.
    let text = shop.job(&[&create[..], &["--server-setting", "archive_mode=off"]].concat());
    assert!(text.contains("takes no connections"), "{text}");
    assert_eq!(
        shop.cluster.sql("SELECT count(*) FROM pg_replication_slots"),
        "0",
        "an archive needs no slot"
    );
    promote(&warm);
    assert_eq!(sql(&conninfo_of(Path::new(&warm)), "SELECT count(*) FROM later"), "1000");
    stop_server(Path::new(&warm));

    let cold = shop.at("cold");
    let text = shop.job(&["standby", "create", "--temperature", "cold", "--to", &cold]);
    assert!(text.contains("standby refresh"), "{text}");
    assert!(!Path::new(&cold).join("postmaster.pid").exists());
    shop.cluster.sql("INSERT INTO later SELECT generate_series(1001, 1500)");
    let before =
        json(&shop.job(&["--json", "standby", "status", "--to", &cold]))["result"]["local"]["lag_bytes"]
            .clone();
    let report = shop.job(&["--json", "standby", "refresh", "--to", &cold]);
    let canary = json(&report)["result"]["proof"]["canary"]["lsn"].clone();
    assert!(canary.is_string(), "{report}");
    let after =
        json(&shop.job(&["--json", "standby", "status", "--to", &cold]))["result"]["local"]["lag_bytes"]
            .clone();
    assert!(after.as_u64().unwrap() < before.as_u64().unwrap(), "{before} {after}");
    // Two primaries that archive into one place are noticed: the same position on another timeline
    // proves nothing.
    let second = shop.at("second");
    shop.job(&["standby", "create", "--temperature", "warm", "--to", &second, "--server-setting", &port]);
    promote(&second);
    archive_all(&conninfo_of(Path::new(&second)));
    stop_server(Path::new(&second));
    let config = shop.at("dr.toml");
    let split = shop.dr(&["--config", &config, "standby", "refresh", "--to", &cold]);
    let words = String::from_utf8_lossy(&split.stderr);
    assert!(words.contains("another server was promoted"), "{words}");
    std::fs::remove_file(Path::new(&cold).join("standby.signal")).unwrap();
    let refused = shop.dr(&["--config", &config, "standby", "refresh", "--to", &cold]);
    assert!(String::from_utf8_lossy(&refused.stderr).contains("standby.signal"));
}

#[test]
fn slow_a_standby_that_cannot_follow_is_not_called_one_and_leaves_no_slot() {
    let shop = Shop::open();
    shop.job(&["backup"]);
    // Nobody is let in for replication, and nothing is archived any more.
    std::fs::write(
        shop.cluster.data.join("pg_hba.conf"),
        "local all all trust\nlocal replication all reject\n",
    )
    .unwrap();
    shop.cluster.sql("ALTER SYSTEM SET archive_command = '/bin/false'");
    shop.cluster.sql("SELECT pg_reload_conf()");
    let (to, config) = (shop.at("deaf"), shop.at("dr.toml"));
    let port = format!("port={}", shop.cluster.port + 1);
    let failed = shop.dr(&[
        "--config",
        &config,
        "standby",
        "create",
        "--to",
        &to,
        "--server-setting",
        &port,
        "--timeout",
        "3s",
    ]);
    assert_eq!(failed.status.code(), Some(10));
    let words = String::from_utf8_lossy(&failed.stderr);
    assert!(words.contains("did not prove that it follows") && words.contains("pg_hba.conf"), "{words}");
    assert_eq!(shop.cluster.sql("SELECT count(*) FROM pg_replication_slots"), "0");
    assert!(!Path::new(&to).join("postmaster.pid").exists(), "it was stopped");
    // What the primary lacks stops it before a byte moves.
    shop.cluster.sql("ALTER SYSTEM SET max_wal_senders = 0");
    shop.cluster.stop("fast");
    shop.cluster.start();
    let refused = shop.dr(&["--config", &config, "standby", "create", "--to", &shop.at("other")]);
    assert!(String::from_utf8_lossy(&refused.stderr).contains("max_wal_senders"));
    assert!(!Path::new(&shop.at("other")).exists());
}
