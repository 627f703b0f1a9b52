//! Backups over the replication connection, beside those from files.
#![allow(clippy::unwrap_used, missing_docs)]

mod common;

use std::path::Path;

use common::{Shop, json};
use dr_testkit::pg::{command, dump_digest, ok, sql};

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
    // What a server has that was restored itself.
    let socket = shop.cluster.data.join("dr-socket");
    ok(command("/bin/mkdir").arg(&socket));
    ok(command("/bin/touch").arg(socket.join("hba")));
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
    assert!(!files.keys().any(|name| name.contains("dr-socket")));
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
    let plan = shop.job(&["backup", "--source", "stream", "--plan"]);
    assert!(plan.contains("the replication connection"), "{plan}");
    let plan = json(&shop.job(&["--json", "backup", "--plan"]));
    assert_eq!(plan["result"]["source"], "files", "{plan}");
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
