//! `LocalSource` on real servers.
#![allow(clippy::unwrap_used, missing_docs)]

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::process::{Child, Stdio};
use std::time::{Duration, Instant};

use dr_core::Classified;
use dr_core::port::{DatabaseSource, FileKind, Finding, RelationEntry, SourceError, Verdict};
use dr_pg::{LocalSource, LocalSourceOptions, StandbyPolicy};
use dr_testkit::pg::{Scratch, TestCluster, bin_dir, command, ok, sql};
use futures_util::TryStreamExt;
use futures_util::stream::BoxStream;

fn source(conninfo: &str) -> LocalSource {
    LocalSource::new(LocalSourceOptions {
        conninfo: conninfo.to_owned(),
        data_directory: None,
        standby: StandbyPolicy::Never,
    })
}

fn open(settings: &[&str]) -> (Scratch, TestCluster) {
    let scratch = Scratch::new();
    let cluster = TestCluster::create(scratch.path(), "data");
    cluster.configure(settings);
    cluster.start();
    (scratch, cluster)
}

/// A whole listing, which is sorted.
async fn listed(rows: BoxStream<'_, Result<RelationEntry, SourceError>>) -> Vec<RelationEntry> {
    let rows: Vec<RelationEntry> = rows.try_collect().await.unwrap();
    let key = |row: &RelationEntry| (row.database.clone(), row.schema.clone(), row.name.clone());
    assert!(rows.is_sorted_by_key(key), "a listing is not sorted");
    rows
}

/// Runs statements one by one: some cannot share a transaction.
fn each(conninfo: &str, statements: &[&str]) {
    statements.iter().for_each(|statement| {
        sql(conninfo, statement);
    });
}

/// A client that stays in a session after a statement, until it is dropped.
struct Client(Child);

impl Client {
    fn stay(cluster: &TestCluster, statement: &str) -> Self {
        let mut psql = command(bin_dir().join("psql"));
        psql.args(["-X", "-q", "-c", statement, "-c", "SELECT pg_sleep(60)"]).arg(cluster.conninfo());
        let client = Client(psql.stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap());
        let began = Instant::now();
        while cluster.sql("SELECT count(*) FROM pg_stat_activity WHERE query LIKE 'SELECT pg_sleep%'") == "0"
        {
            assert!(began.elapsed() < Duration::from_secs(20));
            std::thread::sleep(Duration::from_millis(20));
        }
        client
    }
}

impl Drop for Client {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Everything below a directory that is not a directory, with its size.
fn files_below(root: &Path, dir: &Path, out: &mut BTreeMap<String, u64>) {
    for entry in std::fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        let meta = std::fs::metadata(&path).unwrap();
        if meta.is_dir() {
            files_below(root, &path, out);
        } else {
            out.insert(path.strip_prefix(root).unwrap().to_str().unwrap().to_owned(), meta.len());
        }
    }
}

#[tokio::test]
async fn the_files_are_those_that_pg_basebackup_takes() {
    let (scratch, cluster) = open(&["archive_command = 'true'"]);
    let space = scratch.path().join("space");
    ok(command("/bin/mkdir").arg(&space));
    cluster.sql(&format!("CREATE TABLESPACE spaced LOCATION '{}'", space.display()));
    cluster.sql(
        "CREATE TABLE far TABLESPACE spaced AS SELECT g FROM generate_series(1, 5000) g;
         CREATE UNLOGGED TABLE unlogged AS SELECT g FROM generate_series(1, 5000) g;
         CREATE UNLOGGED TABLE unlogged_far TABLESPACE spaced AS SELECT g FROM generate_series(1, 5000) g;
         CREATE INDEX ON unlogged (g); CREATE TABLE kept (a int, b text);",
    );
    each(
        &cluster.conninfo(),
        &["VACUUM unlogged", "SELECT pg_create_physical_replication_slot('a_slot', true)"],
    );
    let _client =
        Client::stay(&cluster, "CREATE TEMP TABLE temporary AS SELECT g FROM generate_series(1, 5000) g");
    for litter in [
        "base/pgsql_tmp/pgsql_tmp1.0",
        "postgresql.auto.conf.tmp",
        "pg_stat_tmp/x",
        "pg_notify/y",
        "own_file",
        "own_dir/a b%",
    ] {
        let place = cluster.data.join(litter);
        std::fs::create_dir_all(place.parent().unwrap()).unwrap();
        std::fs::write(&place, litter).unwrap();
    }
    // Left by an upgrade: another cluster's.
    std::fs::create_dir_all(space.join("PG_14_202107181/5")).unwrap();
    std::fs::write(space.join("PG_14_202107181/5/16384"), "old").unwrap();
    if let Some((uid, gid)) = dr_testkit::pg::server_ids() {
        let owner = format!("{uid}:{gid}");
        ok(std::process::Command::new("chown").args(["-R", &owner]).arg(&cluster.data).arg(&space));
    }
    cluster.sql("CHECKPOINT");

    let (copy, copied_space) = (scratch.path().join("copy"), scratch.path().join("copied-space"));
    let mut backup = command(bin_dir().join("pg_basebackup"));
    backup.args(["-c", "fast", "-X", "none", "-d", &cluster.conninfo(), "-D"]).arg(&copy);
    ok(backup.arg(format!("--tablespace-mapping={}={}", space.display(), copied_space.display())));
    let mut expected = BTreeMap::new();
    files_below(&copy, &copy, &mut expected);
    for own in ["backup_label", "tablespace_map", "backup_manifest", "global/pg_control"] {
        expected.remove(own);
    }

    let session = source(&cluster.conninfo()).begin("test", true).await.unwrap();
    let walked: Vec<_> = session.files().map(Result::unwrap).collect();
    assert!(walked.is_sorted_by(|a, b| dr_core::path::compare(&a.path, &b.path).is_lt()));
    let mut taken = BTreeMap::new();
    for file in &walked {
        if file.kind == FileKind::Regular {
            let path = String::from_utf8(dr_core::path::decode(&file.path)).unwrap();
            taken.insert(path, file.stat.size);
        }
    }
    // Written anew by every session that starts.
    expected.retain(|path, _| !path.contains("pg_internal.init"));
    let names = |map: &BTreeMap<String, u64>| map.keys().cloned().collect::<BTreeSet<_>>();
    let (theirs, ours) = (names(&expected), names(&taken));
    assert_eq!(theirs.difference(&ours).collect::<Vec<_>>(), Vec::<&String>::new(), "only pg_basebackup");
    assert_eq!(ours.difference(&theirs).collect::<Vec<_>>(), Vec::<&String>::new(), "only here");
    let link = walked.iter().find(|file| matches!(&file.kind, FileKind::Link(_))).unwrap();
    assert_eq!(link.kind, FileKind::Link(space.display().to_string()));
    let (stop, control) = session.finish().await.unwrap();
    assert!(stop.backup_label.starts_with("START WAL LOCATION: ") && !stop.tablespace_map.is_empty());
    assert_eq!(control.len(), 8192);
}

#[tokio::test]
async fn a_role_with_the_grants_that_check_names_takes_a_backup() {
    let (_scratch, cluster) = open(&[]);
    each(
        &cluster.conninfo(),
        &[
            "CREATE ROLE backup LOGIN",
            "CREATE DATABASE closed",
            "REVOKE CONNECT ON DATABASE closed FROM PUBLIC",
        ],
    );
    let conninfo = cluster.conninfo().replace("user=postgres", "user=backup");
    let find =
        |findings: &[Finding], check: &str| findings.iter().find(|f| f.check == check).cloned().unwrap();
    let findings = source(&conninfo).check().await.unwrap();
    let lacking = find(&findings, "privileges");
    assert_eq!(lacking.verdict, Verdict::Bad);
    assert_eq!(find(&findings, "data-directory").verdict, Verdict::Bad);
    let refused = source(&conninfo).begin("test", true).await.err().unwrap();
    assert_eq!(refused.code(), "source-denied", "{refused}");

    cluster.sql(&lacking.fix);
    let findings = source(&conninfo).check().await.unwrap();
    for check in ["privileges", "data-directory", "role", "version", "wal-level", "clock", "data-checksums"] {
        assert_eq!(find(&findings, check).verdict, Verdict::Good, "{check}");
    }
    assert!(find(&findings, "databases").detail.contains("closed"));
    assert_eq!(find(&findings, "archive-command").verdict, Verdict::Warning);
    assert_eq!(find(&findings, "archive-timeout").verdict, Verdict::Warning);
    let mut session = source(&conninfo).begin("test", true).await.unwrap();
    let relations = listed(session.relations()).await;
    assert!(relations.iter().any(|r| r.database == "postgres" && r.name == "pg_class"));
    assert!(relations.iter().all(|r| r.database != "closed"));
    session.tablespaces().await.unwrap();
    session.host_files().await.unwrap();
    session.host_needs().await.unwrap();
    let start = session.start().clone();
    let (stop, _) = session.finish().await.unwrap();
    assert!(stop.lsn > start.lsn && stop.time >= start.time);
}

/// A multi-tenant server lets owners do as they like with their own databases.
#[tokio::test]
async fn no_database_owner_can_lead_a_backup_astray_or_stop_it() {
    let (_scratch, cluster) = open(&[]);
    each(
        &cluster.conninfo(),
        &[
            "CREATE DATABASE tenant",
            "CREATE DATABASE half",
            "CREATE DATABASE bytes ENCODING 'SQL_ASCII' TEMPLATE template0",
        ],
    );
    let inside = |name: &str| cluster.conninfo().replace("dbname=postgres", &format!("dbname={name}"));
    sql(
        &inside("tenant"),
        "CREATE SCHEMA evil; CREATE TABLE evil.seen (what text); CREATE TABLE evil.big (a int, b text); CREATE INDEX big_b ON evil.big (b);
         CREATE FUNCTION evil.pg_relation_filenode(oid) RETURNS oid LANGUAGE sql AS
           $$INSERT INTO evil.seen VALUES (current_user) RETURNING 1::oid$$;
         CREATE FUNCTION evil.different(text, text) RETURNS boolean LANGUAGE sql AS
           $$INSERT INTO evil.seen VALUES (current_user) RETURNING true$$;
         CREATE OPERATOR evil.<> (LEFTARG = text, RIGHTARG = text, FUNCTION = evil.different);
         ALTER DATABASE tenant SET search_path = evil, pg_catalog;
         ALTER DATABASE tenant SET statement_timeout = '1ms'",
    );
    sql(
        &inside("bytes"),
        "SET client_encoding = 'SQL_ASCII'; DO $$BEGIN EXECUTE E'CREATE TABLE \"caf\\351 \\\\ x\" (a int)'; END$$",
    );
    // As an interrupted DROP DATABASE leaves it.
    cluster.sql("UPDATE pg_database SET datconnlimit = -2 WHERE datname = 'half'");
    let mut session = source(&cluster.conninfo()).begin("test", true).await.unwrap();
    let relations = listed(session.relations()).await;
    let of = |database: &str| relations.iter().filter(|r| r.database == database).collect::<Vec<_>>();
    let big = of("tenant").into_iter().find(|r| r.name == "big").unwrap();
    assert_ne!(big.filenode, 1);
    let index = of("tenant").into_iter().find(|r| r.name == "big_b").unwrap();
    assert_eq!((index.owner_oid, index.kind), (big.oid, 'i'));
    assert!(
        of("bytes").iter().any(|r| r.name.starts_with("caf") && r.name.ends_with(r" \ x")),
        "{:?}",
        of("bytes").last()
    );
    assert!(of("half").is_empty() && !of("template1").is_empty());
    session.host_needs().await.unwrap();
    session.finish().await.unwrap();
    assert_eq!(sql(&inside("tenant"), "SET statement_timeout = 0; SELECT count(*) FROM evil.seen"), "0");
}

#[tokio::test]
async fn every_relation_is_found_in_the_file_that_the_catalogue_names() {
    let (scratch, cluster) = open(&[]);
    let space = scratch.path().join("space");
    ok(command("/bin/mkdir").arg(&space));
    cluster.sql(&format!("CREATE TABLESPACE spaced LOCATION '{}'", space.display()));
    cluster.load_tenants(2, 200);
    each(
        &cluster.conninfo(),
        &[
            "CREATE DATABASE other TABLESPACE spaced",
            "CREATE TABLE here (a text) TABLESPACE spaced",
            "VACUUM FULL pg_class",
        ],
    );
    let mut session = source(&cluster.conninfo()).begin("test", true).await.unwrap();
    let files: BTreeSet<String> = session.files().map(|file| file.unwrap().path).collect();
    let relations = listed(session.relations()).await;
    assert!(relations.len() > 300);
    for relation in &relations {
        let dir = match (relation.database_oid, relation.tablespace_oid) {
            (0, 1664) => "global".to_owned(),
            (database, 1663) => format!("base/{database}"),
            (database, tablespace) => {
                let version = std::fs::read_dir(&space).unwrap().next().unwrap().unwrap().file_name();
                format!("pg_tblspc/{tablespace}/{}/{database}", version.to_str().unwrap())
            }
        };
        assert!(files.contains(&format!("{dir}/{}", relation.filenode)), "{relation:?} is not in {dir}");
    }
    let toast = relations
        .iter()
        .find(|r| r.kind == 't' && relations.iter().any(|o| o.oid == r.owner_oid && o.name == "here"));
    assert!(toast.is_some(), "a toast table knows its table");
    let spaces = session.tablespaces().await.unwrap();
    assert_eq!((spaces[0].name.as_str(), spaces[0].location.as_str()), ("spaced", space.to_str().unwrap()));
    assert!(session.size_estimate().await.unwrap().unwrap() > 1 << 20);
}

#[tokio::test]
async fn time_outs_of_the_server_do_not_end_a_backup() {
    let (_scratch, cluster) =
        open(&["statement_timeout = '100ms'", "idle_session_timeout = '200ms'", "lock_timeout = '10ms'"]);
    let session = source(&cluster.conninfo()).begin("test", false).await.unwrap();
    tokio::time::sleep(Duration::from_millis(700)).await;
    session.finish().await.unwrap();
}

#[tokio::test]
async fn one_backup_at_a_time_and_a_dropped_one_leaves_nothing() {
    let (_scratch, cluster) = open(&[]);
    let source = source(&cluster.conninfo());
    let first = source.begin("first", true).await.unwrap();
    let refused = source.begin("second", true).await.err().unwrap();
    assert!(matches!(refused, SourceError::Busy { .. }), "{refused}");
    drop(first);
    let began = Instant::now();
    let third = loop {
        match source.begin("third", true).await {
            Ok(session) => break session,
            Err(error) => assert!(began.elapsed() < Duration::from_secs(10), "{error}"),
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    };
    third.finish().await.unwrap();
}

#[tokio::test]
async fn a_server_that_goes_away_is_an_error_and_not_the_end_of_a_backup() {
    let (_scratch, cluster) = open(&[]);
    let session = source(&cluster.conninfo()).begin("test", true).await.unwrap();
    cluster.stop("immediate");
    assert!(session.finish().await.is_err());
    cluster.start();
    let gone = source("host=/nonexistent port=1 user=postgres").describe().await.unwrap_err();
    assert_eq!(gone.code(), "source-unreachable", "{gone}");
    let wrong = source("nonsense").describe().await.unwrap_err();
    assert_eq!(wrong.code(), "source-invalid", "{wrong}");
    let nobody = cluster.conninfo().replace("user=postgres", "user=nobody_known");
    let denied = source(&nobody).describe().await.unwrap_err();
    assert_eq!(denied.code(), "source-denied", "{denied}");
}

#[tokio::test]
async fn the_data_directory_must_be_the_servers() {
    let (scratch, cluster) = open(&[]);
    let other = TestCluster::create(scratch.path(), "other");
    let at = |data: PathBuf| {
        LocalSource::new(LocalSourceOptions {
            conninfo: cluster.conninfo(),
            data_directory: Some(data),
            standby: StandbyPolicy::Never,
        })
    };
    let refused = at(other.data.clone()).begin("test", true).await.err().unwrap();
    assert!(matches!(refused, SourceError::OtherCluster { .. }), "{refused}");
    let findings = at(other.data.clone()).check().await.unwrap();
    assert!(findings.iter().any(|f| f.check == "data-directory" && f.verdict == Verdict::Bad));
    let facts = at(cluster.data.clone()).describe().await.unwrap();
    assert!(facts.checksums && !facts.in_recovery);
    assert_eq!((facts.page_size, facts.segment_size.bytes(), facts.timeline.0), (8192, 16 << 20, 1));
    let found = dr_pg::inspect(&cluster.conninfo()).await.unwrap();
    assert_eq!((found.system_id, found.data_directory), (facts.system_id, cluster.data.clone()));
}

#[tokio::test]
async fn what_the_cluster_needs_of_a_host_is_told() {
    let (_scratch, cluster) = open(&["shared_preload_libraries = 'pg_stat_statements'"]);
    cluster.sql("CREATE EXTENSION amcheck; CREATE COLLATION german (provider = icu, locale = 'de'); CREATE TABLE sorted (a text COLLATE german)");
    let mut session = source(&cluster.conninfo()).begin("test", true).await.unwrap();
    let needs = session.host_needs().await.unwrap();
    assert_eq!(needs.libraries, ["amcheck", "pg_stat_statements"]);
    assert!(
        needs.collations.iter().any(|(name, version)| name == "icu:de" && !version.is_empty()),
        "{needs:?}"
    );
    assert_eq!(needs.architecture, std::env::consts::ARCH);
}
