//! Backups over a replication connection that is cut, of a process that is killed, into a disk that
//! is full: what they end in, and what they leave.
#![allow(clippy::unwrap_used, missing_docs)]

mod common;

use std::path::Path;
use std::process::{Child, Stdio};
use std::time::{Duration, Instant};

use common::{Shop, json};
use dr_testkit::pg::{command, dump_digest, ok, run};
use dr_testkit::proxy::{Act, Fault, Place, Proxy, Session, Side, Upstream};

/// A cut is seen, and the server is rid of a client, so fast on a busy machine too.
const LIMIT: Duration = Duration::from_secs(30);

/// A shop whose backups come through a proxy.
struct Line {
    shop: Shop,
    proxy: Proxy,
}

impl Line {
    fn open() -> Self {
        let shop = Shop::open_with(&["autovacuum = off"]);
        shop.cluster.load_tenants(2, 20_000);
        let proxy = Proxy::tcp(Upstream::Unix(shop.cluster.socket()));
        Line { shop, proxy }
    }

    fn arguments(&self) -> Vec<String> {
        let connection = format!("cluster.connection={}", self.proxy.conninfo());
        let config = self.shop.at("dr.toml");
        ["--config", &config, "--set", &connection, "--json", "backup", "--source", "stream"]
            .map(String::from)
            .to_vec()
    }

    /// Backs up through the proxy; answers the exit code and what was said.
    fn back_up(&self) -> (i32, serde_json::Value) {
        let arguments = self.arguments();
        let output = self.shop.dr(&arguments.iter().map(String::as_str).collect::<Vec<_>>());
        let said = json(&String::from_utf8_lossy(&output.stdout));
        (output.status.code().unwrap(), said)
    }

    /// Begins one that is not waited for.
    fn begin_with(&self, arguments: &[&str]) -> Child {
        let mut child = command(&self.shop.dr);
        child.current_dir(self.shop.scratch.path()).args(arguments).args(self.arguments());
        child.stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap()
    }

    /// How many backups are listed.
    fn listed(&self) -> usize {
        let listed = json(&self.shop.job(&["list", "--json"]));
        let clusters = listed["result"].as_array().unwrap();
        clusters.iter().map(|cluster| cluster["backups"].as_array().unwrap().len()).sum()
    }

    /// The server has no session of a backup, no slot and no lock of one.
    fn assert_nothing_is_left(&self) {
        let none = "SELECT (SELECT count(*) FROM pg_stat_activity WHERE application_name = 'dr') \
             + (SELECT count(*) FROM pg_stat_activity WHERE backend_type = 'walsender') \
             + (SELECT count(*) FROM pg_locks WHERE locktype = 'advisory') \
             + (SELECT count(*) FROM pg_replication_slots)";
        let began = Instant::now();
        while self.shop.cluster.sql(none) != "0" {
            assert!(began.elapsed() < LIMIT, "{}", self.shop.cluster.sql("SELECT * FROM pg_stat_activity"));
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    /// Messages of the server in the sessions of one healthy backup, of each kind at most.
    fn count(&self) -> (u64, u64) {
        self.proxy.set(None);
        assert_eq!(self.back_up().0, 0);
        let seen = self.proxy.seen();
        let most =
            |kind| seen.iter().filter(|seen| seen.session == kind).map(|seen| seen.backend.0).max().unwrap();
        (most(Session::Replication), most(Session::Sql))
    }

    /// Whether the server had said all when the connection of the backup was cut.
    fn was_cut_after_the_end(&self) -> bool {
        let over = |tags: &[u8]| tags.contains(&b'c') && tags.last() == Some(&b'Z');
        self.proxy.seen().iter().any(|seen| seen.hit && over(&seen.tags))
    }

    /// Waits until the fault came about in some connection.
    fn wait_until_hit(&self) {
        let began = Instant::now();
        while !self.proxy.seen().iter().any(|seen| seen.hit) {
            assert!(began.elapsed() < LIMIT, "the fault never came about");
            std::thread::sleep(Duration::from_millis(2));
        }
    }

    /// A backup over the healed connection works, and restores to what is there.
    fn assert_next_one_restores(&self, name: &str) {
        self.proxy.hang_up();
        self.proxy.set(None);
        self.assert_nothing_is_left();
        let before = self.listed();
        let (code, said) = self.back_up();
        assert_eq!(code, 0, "{said}");
        assert_eq!(self.listed(), before + 1);
        self.shop.job(&["verify", "--all"]);
        self.shop.archive_all();
        let connection = self.shop.restore(name, &["--latest"]);
        assert_eq!(dump_digest(&connection), dump_digest(&self.shop.cluster.conninfo()));
    }
}

fn backend(session: Session, place: Place, act: Act) -> Fault {
    Fault { session: Some(session), side: Side::Backend, place, act }
}

#[test]
fn slow_a_streamed_backup_whose_connection_is_cut_lists_nothing_and_the_next_one_restores() {
    let line = Line::open();
    let (messages, queries) = line.count();
    let mut listed = line.listed();
    let mut faults = Vec::new();
    // From the first word (after the answer that there is no TLS) to the last message, which says that
    // the backup is over.
    for (number, part) in [0, 3, 100, 300, 500, 700, 900, 990, 998].into_iter().enumerate() {
        let at = (messages * part / 1000).max(2);
        let place = if number % 2 == 0 { Place::After(at) } else { Place::Within(at) };
        faults.push(backend(Session::Replication, place, [Act::Close, Act::Reset][number / 2 % 2]));
    }
    faults.push(backend(Session::Replication, Place::After(messages - 1), Act::Reset));
    faults.push(backend(Session::Replication, Place::Within(messages - 1), Act::Close));
    // The session that holds the lock and tells the facts.
    for (number, part) in [0, 1, 40, 80, 95].into_iter().enumerate() {
        let at = queries * part / 100;
        faults.push(backend(Session::Sql, Place::After(at.max(2)), [Act::Reset, Act::Close][number % 2]));
    }
    for fault in faults {
        line.proxy.set(Some(fault));
        let began = Instant::now();
        let (code, said) = line.back_up();
        assert!(line.proxy.seen().iter().any(|seen| seen.hit), "{fault:?} did not come about: {said}");
        assert!(began.elapsed() < LIMIT, "{fault:?}: {:?}", began.elapsed());
        if line.was_cut_after_the_end() {
            // There were fewer messages than in the backup that was counted: nothing was lost.
            assert_eq!(code, 0, "{fault:?}: {said}");
            let last = matches!(fault.place, Place::After(at) if at + 10 > messages);
            assert!(last, "{fault:?}: only the last ones may be too late");
            listed += 1;
            continue;
        }
        let error = &said["error"];
        assert_eq!(error["class"], "transient", "{fault:?}: {said}");
        assert!(error["code"].is_string() && error["hint"].is_string(), "{fault:?}: {said}");
        assert_ne!(code, 0);
        line.assert_nothing_is_left();
        assert_eq!(line.listed(), listed, "{fault:?}");
    }
    line.assert_next_one_restores("healed");
}

#[test]
fn slow_a_streamed_backup_that_is_killed_or_told_to_stop_lists_nothing_even_in_a_black_hole() {
    let line = Line::open();
    let (messages, queries) = line.count();
    let listed = line.listed();
    let mut places: Vec<(Session, u64)> =
        [1, 20, 300, 700, 999].map(|part| (Session::Replication, messages * part / 1000)).to_vec();
    places.extend([3, 60, 95].map(|part| (Session::Sql, (queries * part / 100).max(1))));
    for (session, at) in places {
        for signal in ["-KILL", "-TERM"] {
            line.proxy.set(Some(backend(session, Place::After(at), Act::BlackHole)));
            let mut child = line.begin_with(&[]);
            line.wait_until_hit();
            std::thread::sleep(Duration::from_millis(30));
            ok(command("/bin/kill").args([signal, &child.id().to_string()]));
            let began = Instant::now();
            let status = loop {
                if let Some(status) = child.try_wait().unwrap() {
                    break status;
                }
                if began.elapsed() > Duration::from_secs(5) {
                    let _ = child.kill();
                    child.wait().unwrap();
                    panic!("{signal} at message {at} of {session:?}: it does not end");
                }
                std::thread::sleep(Duration::from_millis(5));
            };
            let expected = if signal == "-TERM" { Some(19) } else { None };
            assert_eq!(status.code(), expected, "{signal} at message {at} of {session:?}");
            // What the kernel of a server does when nobody answers any more.
            line.proxy.hang_up();
            line.assert_nothing_is_left();
            assert_eq!(line.listed(), listed);
        }
    }
    // Where the network is well the server is rid of it at once.
    line.proxy.set(None);
    let mut child = line.begin_with(&["--set", "backup.max_rate=2MiB"]);
    let began = Instant::now();
    while !line.proxy.seen().iter().any(|seen| seen.session == Session::Replication && seen.backend.0 > 100) {
        assert!(began.elapsed() < LIMIT, "it never began");
        std::thread::sleep(Duration::from_millis(10));
    }
    ok(command("/bin/kill").args(["-TERM", &child.id().to_string()]));
    assert_eq!(child.wait().unwrap().code(), Some(19));
    line.assert_nothing_is_left();
    assert_eq!(line.listed(), listed);
    line.assert_next_one_restores("after-signals");
}

/// A file system of so many bytes over a directory, until it is dropped.
struct Small<'a>(&'a str);

impl<'a> Small<'a> {
    fn mount(dir: &'a str, bytes: u64) -> Option<Self> {
        let (uid, gid) = dr_testkit::pg::server_ids()?;
        let options = format!("size={bytes},uid={uid},gid={gid},mode=755");
        let mounted =
            run(std::process::Command::new("mount").args(["-t", "tmpfs", "-o", &options, "tmpfs", dir]));
        mounted.status.success().then_some(Small(dir))
    }

    fn resize(&self, bytes: u64) {
        let options = format!("remount,size={bytes}");
        ok(std::process::Command::new("mount").args(["-o", &options, self.0]));
    }
}

impl Drop for Small<'_> {
    fn drop(&mut self) {
        run(std::process::Command::new("umount").args(["-l", self.0]));
    }
}

#[test]
fn slow_a_streamed_backup_into_a_full_disk_is_told_and_the_next_one_works() {
    let line = Line::open();
    line.shop.job(&["backup"]);
    line.shop.archive_all();
    let (repo, aside) = (line.shop.at("repo"), line.shop.at("aside"));
    let used = |dir: &str| {
        ok(command("/usr/bin/du").args(["-s", "--block-size=1", dir]))
            .split('\t')
            .next()
            .unwrap()
            .parse::<u64>()
            .unwrap()
    };
    std::fs::rename(&repo, &aside).unwrap();
    std::fs::create_dir(&repo).unwrap();
    let size = used(&aside) + (1 << 20);
    let Some(small) = Small::mount(&repo, size) else {
        eprintln!("no small file system can be mounted here (not root?)");
        return;
    };
    ok(command("/bin/cp").args(["-a", &format!("{aside}/."), &repo]));
    let listed = line.listed();
    line.shop.cluster.load_tenants_as("late", 2, 40_000);
    let (code, said) = line.back_up();
    assert_eq!((said["error"]["class"].as_str(), code), (Some("exhausted"), 18), "{said}");
    assert!(said["error"]["hint"].is_string(), "{said}");
    line.assert_nothing_is_left();
    assert_eq!(line.listed(), listed);
    line.shop.job(&["verify", "--all"]);
    // Room again: PostgreSQL archives what it kept, and the next backup works.
    small.resize(1 << 30);
    line.assert_next_one_restores("after-full");
    assert!(Path::new(&repo).exists());
}
