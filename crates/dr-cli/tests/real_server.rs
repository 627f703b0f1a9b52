//! The whole way on a real PostgreSQL server, as an operator goes it.
#![allow(clippy::unwrap_used, missing_docs)]

mod common;

use std::path::Path;
use std::time::{Duration, Instant};

use common::{Shop, json};
use dr_testkit::pg::{
    Scratch, TestCluster, archive_all, bin_dir, command, conninfo_of, dump_digest, ok, run, sql, stop_server,
};

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

/// The runbook `docs/runbooks/beside-pgbackrest.md`, with the pgBackRest that `DR_TEST_PGBACKREST` names.
#[test]
fn a_trial_beside_pgbackrest_archives_and_restores_from_both() {
    let Ok(other) = std::env::var("DR_TEST_PGBACKREST") else {
        eprintln!("skipped: DR_TEST_PGBACKREST names no pgBackRest");
        return;
    };
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
fn a_cluster_that_nobody_has_is_an_error_and_not_an_empty_list() {
    let shop = Shop::open();
    shop.job(&["backup"]);
    let config = shop.at("dr.toml");
    let typo = shop.dr(&["--config", &config, "--cluster", "mian", "list"]);
    assert_eq!(typo.status.code(), Some(16), "{}", String::from_utf8_lossy(&typo.stderr));
    assert!(String::from_utf8_lossy(&typo.stderr).contains("main"));
    let stranger =
        format!("cluster.connection={}", shop.cluster.conninfo().replace("user=postgres", "user=me"));
    let refused = shop.dr(&["--config", &config, "--set", &stranger, "backup"]);
    assert_eq!(refused.status.code(), Some(15), "{}", String::from_utf8_lossy(&refused.stderr));
    let words = String::from_utf8_lossy(&refused.stderr);
    assert!(words.contains("role \"me\" does not exist") && words.contains("Without user="), "{words}");
    // A full disk behind a redirect is told; a reader that went away is not an error.
    let list = format!("{} --config {config} list", shop.dr.display());
    let full = run(command("/bin/sh").args(["-c", &format!("{list} > /dev/full")]));
    assert_eq!(full.status.code(), Some(18), "{}", String::from_utf8_lossy(&full.stderr));
    let gone = run(command("/bin/bash").args(["-c", &format!("set -o pipefail; {list} | true")]));
    assert!(gone.status.success(), "{}", String::from_utf8_lossy(&gone.stderr));
}

/// What `dr init` proposes is pasted into psql and a shell as it stands.
#[test]
fn the_proposed_commands_work_in_a_place_with_any_name() {
    let scratch = Scratch::new();
    let odd = scratch.path().join(r#"it's 50%p "of\a b$HOME"#);
    ok(command("/bin/mkdir").arg(&odd));
    let dr = odd.join("dr");
    std::fs::copy(env!("CARGO_BIN_EXE_dr"), &dr).unwrap();
    std::fs::set_permissions(&dr, std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
    let cluster = TestCluster::create(scratch.path(), "data");
    cluster.start();
    let at = |name: &str| odd.join(name).display().to_string();
    let init =
        ["init", "--repo", &at("repo"), "--connection", &cluster.conninfo(), "--output", &at("dr.toml")];
    let proposed = ok(command(&dr).args(init));
    let lines = |start: &str| -> Vec<String> {
        proposed.lines().map(|line| line.trim().to_owned()).filter(|line| line.starts_with(start)).collect()
    };
    assert_eq!(lines("ALTER SYSTEM").len(), 3, "{proposed}");
    // The third would close segments by the clock, while the test closes them itself.
    lines("ALTER SYSTEM").iter().take(2).for_each(|line| drop(cluster.sql(line)));
    cluster.sql("SELECT pg_reload_conf()");
    archive_all(&cluster.conninfo());

    let commands = lines("dr --config");
    assert_eq!(commands.len(), 2, "{proposed}");
    let written = std::fs::read_to_string(odd.join("dr.toml")).unwrap();
    let comment = written.lines().find_map(|line| line.split_once("Check with: ")).unwrap().1.to_owned();
    for line in commands.iter().chain([&comment]) {
        // The program is found by its name, as after an installation.
        let mut shell = command("/bin/sh");
        ok(shell.env("PATH", format!("{}:/usr/bin:/bin", odd.display())).args(["-c", line]));
    }
    // The restore_command carries the same names.
    let digest = dump_digest(&cluster.conninfo());
    archive_all(&cluster.conninfo());
    let to = odd.join("copy");
    ok(command(&dr).args(["--config", &at("dr.toml"), "restore", "--start", "--to"]).arg(&to));
    assert_eq!(dump_digest(&conninfo_of(&to)), digest);
    stop_server(&to);
}

#[test]
fn a_warning_of_the_libraries_is_told_and_only_once() {
    let shop = Shop::open();
    let file = shop.at("passwords");
    std::fs::write(&file, "*:*:*:*:hunter2\n").unwrap();
    std::fs::set_permissions(&file, std::os::unix::fs::PermissionsExt::from_mode(0o644)).unwrap();
    let connection = format!("cluster.connection={} passfile={file}", shop.cluster.conninfo());
    let output = shop.dr(&["--config", &shop.at("dr.toml"), "-vv", "--set", &connection, "check"]);
    let told = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success() && told.matches("debug: connected").count() > 1, "{told}");
    assert_eq!(told.matches("warning: the password file is not used").count(), 1, "{told}");
    assert!(!told.contains("hunter2"), "{told}");
}

#[test]
fn slots_are_watched_in_the_check_and_told_with_each_backup_and_before_a_restore() {
    let shop = Shop::open();
    shop.cluster.sql("SELECT pg_create_physical_replication_slot('forgotten', true)");
    shop.job(&["backup"]);
    assert!(shop.job(&["show"]).contains("forgotten"));
    shop.cluster.sql("SELECT pg_logical_emit_message(true, 'x', repeat('y', 9999))");
    assert!(shop.job(&["check"]).contains("nobody reads slot forgotten"));
    let plan = shop.job(&["restore", "--to", &shop.at("planned"), "--plan"]);
    assert!(plan.contains("forgotten (physical)"), "{plan}");
}
