//! `docs/runbooks/pg-upgrade.md`, on real servers of several major versions.
//!
//! `DR_TEST_PG_UPGRADE` lists the directories of their programs, the oldest first, and
//! `DR_TEST_PG_BIN` has the newest client programs: `cargo xtask test` fetches what is missing.
#![allow(clippy::unwrap_used, missing_docs)]

use std::path::{Path, PathBuf};

use dr_testkit::pg::{
    Scratch, TestCluster, archive_all, command, conninfo_of, dump_digest, ok, sql, stop_server, upgrade_path,
};
use serde_json::Value;

/// A place with `dr`, its repository and the clusters of one upgrade.
struct Place {
    scratch: Scratch,
}

impl Drop for Place {
    fn drop(&mut self) {
        for entry in std::fs::read_dir(self.scratch.path()).into_iter().flatten().flatten() {
            stop_server(&entry.path());
        }
    }
}

impl Place {
    fn new() -> Self {
        let place = Place { scratch: Scratch::new() };
        let dr = place.path("dr");
        std::fs::copy(env!("CARGO_BIN_EXE_dr"), &dr).unwrap();
        std::fs::set_permissions(&dr, std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
        place
    }

    fn path(&self, name: &str) -> PathBuf {
        self.scratch.path().join(name)
    }

    fn at(&self, name: &str) -> String {
        self.path(name).display().to_string()
    }

    fn dr(&self, arguments: &[&str]) -> Value {
        let mut command = command(self.path("dr"));
        let text = ok(command.current_dir(self.scratch.path()).args(arguments).arg("--json"));
        serde_json::from_str(&text).unwrap_or_else(|error| panic!("{error}: {text}"))
    }

    fn job(&self, arguments: &[&str]) -> Value {
        self.dr(&[&["--config", &self.at("dr.toml")], arguments].concat())["result"].clone()
    }

    /// A cluster that archives with `dr`, and is not started.
    fn cluster(&self, bin: &Path, name: &str) -> TestCluster {
        let cluster = TestCluster::create_with(bin, self.scratch.path(), name);
        cluster.configure(&[&format!(
            "archive_command = '{} --config {} wal push %p'",
            self.at("dr"),
            self.at("dr.toml")
        )]);
        cluster
    }

    /// Restores with the repository and the key alone, and answers the connection.
    fn restore(&self, system_id: &str, to: &str) -> String {
        let (repo, key, to) = (self.at("repo"), self.at("dr.key"), self.at(to));
        let place = ["--config", "/dev/null", "--repo", &repo, "--key-file", &key, "--cluster", system_id];
        self.dr(&[&place[..], &["restore", "--to", &to, "--latest", "--start"]].concat());
        conninfo_of(Path::new(&to))
    }

    /// The cluster of a repository that `dr list` shows under this identity.
    fn listed(&self, system_id: &str) -> Value {
        let all = self.job(&["list"]);
        let of = |c: &&Value| c["cluster"]["system_id"] == system_id;
        all.as_array().unwrap().iter().find(of).unwrap_or_else(|| panic!("{system_id}: {all}")).clone()
    }
}

fn system_id(conninfo: &str) -> String {
    sql(conninfo, "SELECT system_identifier FROM pg_control_system()")
}

fn major(conninfo: &str) -> String {
    sql(conninfo, "SELECT current_setting('server_version_num')::int / 10000")
}

/// Lets programs of different age work together, as no operator should need to: minor releases from
/// 17.12 on mark columns with `pg_attver`, which releases of 18 from before do not know and refuse.
/// The runbook says to take the newest minor release of both; the packages at hand may not be.
fn forget_marks(old: &TestCluster, new: &TestCluster) {
    let known = std::fs::read(new.bin.join("postgres")).unwrap().windows(9).any(|name| name == b"pg_attver");
    if !known {
        let marked = "attoptions::text LIKE '%pg_attver%'";
        old.sql(&format!("UPDATE pg_attribute SET attoptions = NULL WHERE {marked}"));
    }
}

/// Steps 4 to 6 of the runbook.
fn upgrade(place: &Place, old: &TestCluster, new: &TestCluster, options: &[&str]) {
    let mut tool = command(new.bin.join("pg_upgrade"));
    tool.current_dir(place.scratch.path()).args(["-U", "postgres", "-s", &place.at("")]);
    tool.arg("-b").arg(&old.bin).arg("-B").arg(&new.bin).arg("-d").arg(&old.data).arg("-D").arg(&new.data);
    ok(tool.args(options));
    let config = std::fs::read_to_string(place.path("dr.toml")).unwrap();
    let moved = config
        .replace(&old.data.display().to_string(), &new.data.display().to_string())
        .replace(&format!("port={}", old.port), &format!("port={}", new.port));
    assert_ne!(config, moved);
    std::fs::write(place.path("dr.toml"), moved).unwrap();
    new.start();
}

fn upgrade_and_prove(from: &Path, to: &Path) {
    let place = Place::new();
    let old = place.cluster(from, "old");
    old.start();
    let (repo, connection) = (place.at("repo"), old.conninfo());
    let output = ["--output", &place.at("dr.toml"), "--new-key", &place.at("dr.key")].map(str::to_owned);
    let init = ["--repo", &repo, "init", "--connection", &connection];
    place.dr(&[&init[..], &output.each_ref().map(String::as_str)].concat());
    old.load_tenants(2, 2000);
    place.job(&["backup"]);
    old.sql("UPDATE tenant_1.orders SET note = 'before the upgrade' WHERE id % 3 = 0");
    let new = place.cluster(to, "new");
    forget_marks(&old, &new);
    let before = dump_digest(&old.conninfo());
    let old_id = system_id(&old.conninfo());
    archive_all(&old.conninfo());
    old.stop("fast");

    upgrade(&place, &old, &new, &["-O", "-c archive_mode=off"]);
    let new_id = system_id(&new.conninfo());
    assert_ne!(new_id, old_id, "pg_upgrade fills a cluster of its own");
    new.sql("UPDATE tenant_2.orders SET note = 'after the upgrade' WHERE id % 3 = 0");

    // The first backup compares itself with nothing, the next one with the first.
    assert_eq!(place.job(&["backup", "--plan"])["parent"], Value::Null);
    let first = place.job(&["backup"])["backup"].clone();
    assert_eq!(first["parent"], Value::Null, "{first}");
    assert!(first["read_bytes"].as_u64() >= first["bytes"].as_u64(), "all of it is read: {first}");
    new.sql("DELETE FROM tenant_2.payments WHERE id % 7 = 0");
    let second = place.job(&["backup"])["backup"].clone();
    assert_eq!(second["parent"], first["id"]);
    archive_all(&new.conninfo());
    let after = dump_digest(&new.conninfo());

    // Both histories are whole, side by side.
    for (id, backups) in [(&old_id, 1), (&new_id, 2)] {
        let listed = place.listed(id);
        assert_eq!(listed["backups"].as_array().unwrap().len(), backups, "{listed}");
        let wal = listed["wal"].as_array().unwrap();
        let whole = |t: &Value| t["missing"].as_array().unwrap().is_empty();
        assert!(wal.len() == 1 && whole(&wal[0]), "a hole in the WAL of {id}: {listed}");
        place.job(&["verify", "--all", "--cluster", id]);
    }
    let names = |id: &str, which: &str| place.listed(id)["wal"][0][which].as_str().unwrap().to_owned();
    assert!(names(&new_id, "first") > names(&old_id, "last"), "pg_upgrade goes on behind the old WAL");
    new.stop("fast");
    for (id, version, digest) in [(&old_id, from, &before), (&new_id, to, &after)] {
        let connection = place.restore(id, &format!("restored-{id}"));
        assert!(version.ends_with(Path::new(&major(&connection)).join("bin")), "{version:?}");
        assert_eq!(system_id(&connection), *id);
        assert_eq!(dump_digest(&connection), *digest, "{version:?}");
        stop_server(&place.path(&format!("restored-{id}")));
    }
}

#[test]
fn an_upgraded_cluster_begins_a_history_of_its_own_and_the_old_one_stays_restorable() {
    let versions = upgrade_path();
    if versions.is_empty() {
        eprintln!("no programs of several major versions: DR_TEST_PG_UPGRADE is not set");
        return;
    }
    assert!(versions.len() > 1, "one version is no upgrade: {versions:?}");
    for pair in versions.windows(2) {
        upgrade_and_prove(&pair[0], &pair[1]);
    }
}
