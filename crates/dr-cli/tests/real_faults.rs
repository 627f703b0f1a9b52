//! What kills, fills and confuses a job on a real server, and what it leaves.
#![allow(clippy::unwrap_used, missing_docs)]

mod common;

use std::path::Path;
use std::time::{Duration, Instant};

use common::{Shop, json};
use dr_testkit::pg::{bin_dir, command, conninfo_of, dump_digest, ok, run, sql, stop_server};

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
