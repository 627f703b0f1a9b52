//! Recovery through `LocalInstance` alone, on real servers.
#![allow(clippy::unwrap_used, missing_docs)]

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use dr_core::port::{
    ClusterError, HostNeeds, Instance, RecoveryEnd, RecoverySpec, RecoveryTarget, RunState, TargetAction,
};
use dr_core::{Timeline, Timestamp};
use dr_pg::{InstanceOptions, LocalInstance};
use dr_testkit::pg::{
    Scratch, TestCluster, archive_all, bin_dir, command, conninfo_of, ok, sql, stop_server,
};

/// A server with an archive that is a plain directory, and a base backup of it.
struct Source {
    cluster: TestCluster,
    scratch: Scratch,
}

impl Drop for Source {
    fn drop(&mut self) {
        for entry in std::fs::read_dir(self.scratch.path()).into_iter().flatten().flatten() {
            stop_server(&entry.path());
        }
    }
}

impl Source {
    fn open() -> Self {
        let scratch = Scratch::new();
        let cluster = TestCluster::create(scratch.path(), "data");
        let archive = scratch.path().join("archive");
        ok(command("/bin/mkdir").arg(&archive));
        cluster.configure(&[&format!("archive_command = 'cp %p {}/%f'", archive.display())]);
        cluster.start();
        cluster.sql("CREATE TABLE marks (name text)");
        Source { cluster, scratch }
    }

    fn at(&self, name: &str) -> PathBuf {
        self.scratch.path().join(name)
    }

    /// A copy as `pg_basebackup` makes it: its `pg_control` is in place, and returned.
    fn base_backup(&self, name: &str) -> (PathBuf, Vec<u8>) {
        let to = self.at(name);
        let mut backup = command(bin_dir().join("pg_basebackup"));
        ok(backup.args(["-c", "fast", "-X", "none", "-d", &self.cluster.conninfo(), "-D"]).arg(&to));
        let control = std::fs::read(to.join("global/pg_control")).unwrap();
        (to, control)
    }

    fn mark(&self, name: &str) {
        self.cluster.sql(&format!("INSERT INTO marks VALUES ('{name}')"));
    }

    fn archive_all(&self) {
        archive_all(&self.cluster.conninfo());
    }

    fn spec(&self, target: RecoveryTarget) -> RecoverySpec {
        RecoverySpec {
            target,
            inclusive: true,
            timeline: Timeline(1),
            action: TargetAction::Promote,
            restore_command: format!("cp {}/%f %p", self.at("archive").display()),
            settings: vec![("archive_mode".into(), "off".into())],
            standby: None,
        }
    }
}

fn major() -> u32 {
    let text = ok(command(bin_dir().join("postgres")).arg("--version"));
    text.split_once(") ").unwrap().1.split('.').next().unwrap().trim().parse().unwrap()
}

fn instance() -> LocalInstance {
    LocalInstance::new(InstanceOptions { bin_dir: Some(bin_dir()), role: None })
}

/// Starts on `data` and waits until recovery has ended one way or the other.
async fn recover(data: &Path) -> (RunState, RecoveryEnd) {
    let instance = instance();
    instance.start(data, major(), false).await.unwrap();
    let began = Instant::now();
    loop {
        let state = instance.status(data).await.unwrap().state;
        if [RunState::Primary, RunState::Paused, RunState::Stopped].contains(&state) {
            return (state, instance.recovery_end(data).unwrap());
        }
        assert!(began.elapsed() < Duration::from_secs(60), "recovery does not end: {state:?}");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

fn marks(data: &Path) -> String {
    sql(&conninfo_of(data), "SELECT coalesce(string_agg(name, ',' ORDER BY name), '') FROM marks")
}

#[tokio::test]
async fn each_kind_of_target_is_reached_and_the_log_says_so() {
    let source = Source::open();
    let (data, control) = source.base_backup("copy");
    source.mark("a");
    let lsn = source.cluster.sql("SELECT pg_current_wal_insert_lsn()").parse().unwrap();
    source.mark("b");
    let time: Timestamp = source
        .cluster
        .sql("SELECT to_char(now() AT TIME ZONE 'UTC', 'YYYY-MM-DD\"T\"HH24:MI:SS.US\"Z\"')")
        .parse()
        .unwrap();
    std::thread::sleep(Duration::from_millis(20));
    let xid = source
        .cluster
        .sql("BEGIN; SELECT pg_current_xact_id(); INSERT INTO marks VALUES ('c'); COMMIT")
        .parse()
        .unwrap();
    source.cluster.sql(r"SELECT pg_create_restore_point('it''s a \ point')");
    source.mark("d");
    source.archive_all();
    source.cluster.stop("fast");
    let name = r"it's a \ point".to_owned();
    let cases = [
        (RecoveryTarget::Lsn { lsn }, TargetAction::Promote, "a"),
        (RecoveryTarget::Time { time }, TargetAction::Promote, "a,b"),
        (RecoveryTarget::Xid { xid }, TargetAction::Promote, "a,b,c"),
        (RecoveryTarget::Name { name: name.clone() }, TargetAction::Promote, "a,b,c"),
        (RecoveryTarget::Name { name }, TargetAction::Pause, "a,b,c"),
        (RecoveryTarget::Immediate, TargetAction::Promote, ""),
        (RecoveryTarget::Latest, TargetAction::Promote, "a,b,c,d"),
    ];
    for (number, (target, action, expected)) in cases.into_iter().enumerate() {
        let to = source.at(&format!("to-{number}"));
        ok(command("/bin/cp").arg("-a").arg(&data).arg(&to));
        let spec = RecoverySpec { action, ..source.spec(target.clone()) };
        instance().prepare_recovery(&to, &control, &spec).unwrap();
        instance().prepare_recovery(&to, &control, &spec).unwrap();
        let (state, end) = recover(&to).await;
        let paused = action == TargetAction::Pause;
        assert_eq!(state, if paused { RunState::Paused } else { RunState::Primary }, "{target:?}: {end:?}");
        assert_eq!(end.stopped_at_target, target != RecoveryTarget::Latest, "{target:?}: {end:?}");
        assert!(!end.failed && end.lsn.is_some() != paused, "{target:?}: {end:?}");
        assert_eq!(end.new_timeline, (!paused).then_some(Timeline(2)), "{target:?}");
        assert_eq!(marks(&to), expected, "{target:?}");
        instance().stop(&to).await.unwrap();
        assert_eq!(instance().status(&to).await.unwrap().state, RunState::Stopped);
        assert!(instance().control(&to).unwrap().is_shut_down);
    }
}

/// The configuration of a cluster that was recovered by hand before, shares its settings with a
/// standby, archives and reports in its own way: nothing of it may lead this recovery.
#[tokio::test]
async fn settings_of_an_earlier_life_neither_lead_the_recovery_nor_reach_outside() {
    let source = Source::open();
    let (data, control) = source.base_backup("copy");
    source.mark("a");
    let lsn = source.cluster.sql("SELECT pg_current_wal_insert_lsn()").parse().unwrap();
    source.mark("b");
    source.archive_all();
    let outside = source.at("outside");
    let conf = format!(
        "recovery_target_time = '2020-01-01'\nrecovery_target_action = shutdown\nrecovery_min_apply_delay = '1h'\n\
         recovery_end_command = 'touch {0}'\narchive_cleanup_command = 'touch {0}'\nexternal_pid_file = '{0}'\n\
         data_directory = '{1}'\nlog_error_verbosity = verbose\nlog_line_prefix = '%m:  '\n\
         synchronous_standby_names = 'other'\nhuge_pages = on\n",
        outside.display(),
        source.cluster.data.display()
    );
    for (name, target, expected) in
        [("by-lsn", RecoveryTarget::Lsn { lsn }, "a"), ("latest", RecoveryTarget::Latest, "a,b")]
    {
        let to = source.at(name);
        ok(command("/bin/cp").arg("-a").arg(&data).arg(&to));
        let file = to.join("postgresql.conf");
        std::fs::write(&file, std::fs::read_to_string(&file).unwrap() + &conf).unwrap();
        instance().prepare_recovery(&to, &control, &source.spec(target)).unwrap();
        let (state, end) = recover(&to).await;
        assert_eq!(state, RunState::Primary, "{name}: {end:?}");
        assert_eq!(end.stopped_at_target, name == "by-lsn", "{name}: {end:?}");
        assert_eq!(marks(&to), expected, "{name}");
        sql(&conninfo_of(&to), "INSERT INTO marks VALUES ('written')");
        assert!(!outside.exists(), "{name}: the copy touched something outside");
        instance().stop(&to).await.unwrap();
    }
    assert_eq!(source.cluster.sql("SELECT count(*) FROM marks"), "2", "the first server still serves");
}

#[tokio::test]
async fn a_target_beyond_the_wal_is_a_failure_in_the_servers_own_words() {
    let source = Source::open();
    let (to, control) = source.base_backup("copy");
    source.archive_all();
    let spec = source.spec(RecoveryTarget::Name { name: "never made".into() });
    instance().prepare_recovery(&to, &control, &spec).unwrap();
    let (state, end) = recover(&to).await;
    assert_eq!(state, RunState::Stopped, "{end:?}");
    assert!(end.failed && !end.stopped_at_target, "{end:?}");
    assert!(end.evidence.iter().any(|line| line.contains("before configured recovery target")), "{end:?}");
}

#[tokio::test]
async fn a_stale_pid_file_names_no_server() {
    let source = Source::open();
    let (to, _) = source.base_backup("copy");
    // After a crash of the host the number belongs to another cluster's server.
    std::fs::copy(source.cluster.data.join("postmaster.pid"), to.join("postmaster.pid")).unwrap();
    assert_eq!(instance().status(&to).await.unwrap().state, RunState::Stopped);
    assert_eq!(instance().status(&source.cluster.data).await.unwrap().state, RunState::Primary);
    std::fs::remove_file(to.join("postmaster.pid")).unwrap();
}

#[tokio::test]
async fn pg_control_is_read_as_postgresql_reads_it_and_damage_is_refused() {
    let source = Source::open();
    source.cluster.stop("fast");
    let text = ok(command(bin_dir().join("pg_controldata")).arg(&source.cluster.data));
    let field = |name: &str| {
        text.lines()
            .find_map(|l| l.strip_prefix(name))
            .unwrap_or_else(|| panic!("{name} in {text}"))
            .trim()
            .to_owned()
    };
    let facts = instance().control(&source.cluster.data).unwrap();
    assert_eq!(facts.system_id.to_string(), field("Database system identifier:"));
    assert_eq!(facts.control_version.to_string(), field("pg_control version number:"));
    assert_eq!(facts.catalog_version.to_string(), field("Catalog version number:"));
    assert_eq!(facts.state, field("Database cluster state:"));
    assert_eq!(facts.redo.to_string(), field("Latest checkpoint's REDO location:"));
    assert_eq!(facts.timeline.to_string(), field("Latest checkpoint's TimeLineID:"));
    assert_eq!(facts.min_recovery_end.to_string(), field("Minimum recovery ending location:"));
    assert_eq!(facts.page_size.to_string(), field("Database block size:"));
    assert_eq!(facts.relation_segment_pages.to_string(), field("Blocks per segment of large relation:"));
    assert_eq!(facts.segment_size.bytes().to_string(), field("Bytes per WAL segment:"));
    assert!(facts.checksums && facts.is_shut_down);

    let bytes = std::fs::read(source.cluster.data.join("global/pg_control")).unwrap();
    for bit in 0..288 * 8 {
        let mut changed = bytes.clone();
        changed[bit / 8] ^= 1 << (bit % 8);
        let refused = instance().parse_control(&changed).unwrap_err();
        // The version decides where the checksum is, and is told first.
        let unknown = matches!(refused, ClusterError::Unsupported { .. }) && (64..96).contains(&bit);
        assert!(unknown || matches!(refused, ClusterError::Damaged { .. }), "bit {bit}: {refused}");
    }
}

#[test]
fn a_host_tells_what_it_lacks() {
    let needs = HostNeeds {
        major: major(),
        architecture: String::new(),
        libraries: vec!["plpgsql".into(), "no_such_library".into()],
        collations: vec![("libc:en_US.UTF-8".into(), "0.1".into()), ("icu:de".into(), "1.2.3".into())],
    };
    let facts = instance().host_facts(&needs);
    assert_eq!(facts.missing_libraries, ["no_such_library"]);
    assert_eq!(facts.differing_collations.len(), 1, "{facts:?}");
    let none = instance().host_facts(&HostNeeds { major: 9, ..needs });
    assert_eq!((none.bin_dir, none.major), (None, None));
}

#[tokio::test]
async fn a_server_that_cannot_start_says_why() {
    let source = Source::open();
    let (to, control) = source.base_backup("copy");
    let spec = RecoverySpec {
        settings: vec![("shared_preload_libraries".into(), "no_such_library".into())],
        ..source.spec(RecoveryTarget::Latest)
    };
    instance().prepare_recovery(&to, &control, &spec).unwrap();
    let state = match instance().start(&to, major(), false).await {
        Ok(()) => recover(&to).await.1.evidence.join(" "),
        Err(error) => error.to_string(),
    };
    assert!(state.contains("no_such_library"), "{state}");
}

/// The directory of the private server's socket.
fn socket_dir(data: &Path) -> PathBuf {
    let text = std::fs::read_to_string(data.join("postmaster.pid")).unwrap();
    PathBuf::from(text.lines().nth(4).unwrap())
}

#[tokio::test]
async fn a_private_socket_goes_away_with_its_copy_whoever_stops_the_server() {
    use std::os::unix::fs::MetadataExt;
    let source = Source::open();
    let (data, control) = source.base_backup("copy");
    source.archive_all();
    source.cluster.stop("fast");
    let long = format!("{}/{}", "d".repeat(60), "e".repeat(60));
    ok(command("/bin/mkdir").arg(source.at(&long).parent().unwrap()));
    for (name, inside) in [("plain", true), ("with a space", false), (&long, false)] {
        let to = source.at(name);
        ok(command("/bin/cp").arg("-a").arg(&data).arg(&to));
        instance().prepare_recovery(&to, &control, &source.spec(RecoveryTarget::Latest)).unwrap();
        assert_eq!(recover(&to).await.0, RunState::Primary, "{name}");
        let sockets = socket_dir(&to);
        assert_eq!(sockets.starts_with(&to), inside, "{}", sockets.display());
        assert_eq!(sockets.metadata().unwrap().mode() & 0o777, 0o700);
        let connection = instance().connection(&to).unwrap();
        assert_eq!(sql(&connection, "SELECT 1"), "1");
        stop_server(&to);
        // It serves the copy again, as it is.
        assert_eq!(recover(&to).await.0, RunState::Primary, "{name}");
        assert_eq!(socket_dir(&to), sockets);
        stop_server(&to);
        assert!(sockets.exists());
        std::fs::remove_dir_all(&to).unwrap();
        if !inside {
            // The next start of any copy cleans up.
            let other = source.at("other");
            ok(command("/bin/cp").arg("-a").arg(&data).arg(&other));
            instance().prepare_recovery(&other, &control, &source.spec(RecoveryTarget::Latest)).unwrap();
            assert_eq!(recover(&other).await.0, RunState::Primary);
            instance().stop(&other).await.unwrap();
            assert!(!other.join("dr-socket").exists(), "a stop by dr leaves nothing in the copy");
            std::fs::remove_dir_all(&other).unwrap();
        }
        assert!(!sockets.exists(), "{}", sockets.display());
    }
}
