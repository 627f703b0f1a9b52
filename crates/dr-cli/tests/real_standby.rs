//! Standbys of every temperature: made, proven, read from, promoted, rebuilt.
#![allow(clippy::unwrap_used, missing_docs)]

mod common;

use std::path::Path;
use std::time::{Duration, Instant};

use common::{Shop, json};
use dr_testkit::pg::{archive_all, bin_dir, command, conninfo_of, dump_digest, ok, run, sql, stop_server};

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

/// Makes a hot standby of the shop's server in `hot`, and answers its connection.
fn hot_standby(shop: &Shop) -> String {
    let (to, port) = (shop.at("hot"), format!("port={}", shop.cluster.port + 1));
    shop.job(&["standby", "create", "--to", &to, "--name", "hot one", "--server-setting", &port]);
    conninfo_of(Path::new(&to))
}

/// Settings of a job that speaks with another server than the configured one.
fn at_server<'a>(connection: &'a str, data: &'a str) -> [String; 4] {
    let set = |name: &str, value: &str| format!("{name}={value}");
    [
        "--set".into(),
        set("cluster.connection", connection),
        "--set".into(),
        set("cluster.data_directory", data),
    ]
}

fn job_at(shop: &Shop, connection: &str, data: &str, arguments: &[&str]) -> String {
    let settings = at_server(connection, data);
    let settings: Vec<&str> = settings.iter().map(String::as_str).collect();
    shop.job(&[&settings[..], arguments].concat())
}

#[test]
fn slow_a_hot_standby_is_planned_made_shown_and_follows() {
    let shop = Shop::open_with(&["max_slot_wal_keep_size = 1GB"]);
    shop.job(&["backup"]);
    shop.cluster.sql("CREATE TABLE later AS SELECT generate_series(1, 1000) g");
    let (to, port) = (shop.at("hot"), format!("port={}", shop.cluster.port + 1));
    let create = ["standby", "create", "--to", &to, "--name", "hot one", "--server-setting", &port];
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
    assert_eq!(
        (&status["slots"][0]["name"], &status["slots"][0]["active"]),
        (&"hot_one".into(), &true.into())
    );
    assert!(status["local"]["lag_commits"].is_u64(), "{status}");
    let text = shop.job(&["standby", "status", "--to", &to]);
    assert!(text.contains("hot one") && text.contains("streaming"), "{text}");
    let again = shop.dr(&[&["--config", &shop.at("dr.toml")], &create[..]].concat());
    let words = String::from_utf8_lossy(&again.stderr);
    assert!(words.contains("not empty"), "{words}");
}

#[test]
fn slow_backups_are_read_from_a_standby_when_that_is_wanted_and_not_otherwise() {
    let shop = Shop::open();
    shop.cluster.load_tenants(2, 2000);
    shop.job(&["backup"]);
    let (standby, to) = (hot_standby(&shop), shop.at("hot"));
    let elsewhere = format!("cluster.connection={standby}");
    let refused =
        shop.dr(&["--config", &shop.at("dr.toml"), "--set", &elsewhere, "backup", "--source", "stream"]);
    let words = String::from_utf8_lossy(&refused.stderr);
    assert!(words.contains("backup.standby"), "{words}");
    for source in ["stream", "files"] {
        shop.cluster.sql("UPDATE tenant_1.orders SET note = note || 'x' WHERE id % 7 = 0");
        let backup = ["--json", "--set", "backup.standby=only", "backup", "--source", source];
        let report = while_wal_is_closed(&shop, || job_at(&shop, &standby, &to, &backup));
        let backup = json(&report)["result"]["backup"].clone();
        let (in_recovery, status) = (&backup["cluster"]["in_recovery"], &backup["status"]);
        assert_eq!((in_recovery, status), (&true.into(), &"complete".into()), "{source}");
        let digest = dump_digest(&shop.cluster.conninfo());
        shop.archive_all();
        let name = format!("from-standby-{source}");
        let copy = shop.restore(&name, &["--backup", backup["id"].as_str().unwrap()]);
        assert_eq!(dump_digest(&copy), digest, "{source}");
        stop_server(Path::new(&shop.at(&name)));
    }
}

#[test]
fn slow_a_standby_takes_over_whole_and_the_old_primary_is_rebuilt_behind_it_with_what_differs() {
    // The catalogues and what is read first on the new primary differ; this does not.
    let shop = Shop::open_with(&["autovacuum = off"]);
    shop.cluster.load_tenants(2, 20_000);
    let rows = "SELECT g, repeat(md5(g::text), 8) FROM generate_series(1, 150000) g";
    shop.cluster.sql(&format!("CREATE TABLE ledger AS {rows}"));
    shop.cluster.sql("VACUUM FREEZE ledger");
    shop.job(&["backup"]);
    let (standby, to) = (hot_standby(&shop), shop.at("hot"));
    shop.cluster.stop("fast");
    promote(&to);
    sql(&standby, "CREATE TABLE later AS SELECT generate_series(1, 100) g");
    let part = |name: &str| standby.split(' ').find_map(|p| p.strip_prefix(name)).unwrap().to_owned();
    let mut amcheck = command(bin_dir().join("pg_amcheck"));
    amcheck.args(["--all", "--install-missing", "-U", "postgres"]);
    ok(amcheck.args(["-h", &part("host="), "-p", &part("port=")]));

    archive_all(&standby);
    job_at(&shop, &standby, &to, &["backup"]);
    let (old, port) = (shop.at("data"), format!("port={}", shop.cluster.port));
    let create =
        ["--json", "standby", "create", "--to", &old, "--delta", "--name", "old", "--server-setting", &port];
    let rebuilt = json(&job_at(&shop, &standby, &old, &create))["result"].clone();
    assert!(rebuilt["proof"]["replayed"].is_string(), "{rebuilt}");
    let (kept, bytes) = (rebuilt["bytes_kept"].as_u64().unwrap(), rebuilt["bytes"].as_u64().unwrap());
    assert!(kept * 10 > bytes * 9, "{kept} of {bytes} were kept");
    until(&shop.cluster.conninfo(), "SELECT pg_is_in_recovery() AND count(*) = 100 FROM later", "t");
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
