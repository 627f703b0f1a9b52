//! The replication client over a connection that is cut: at every message, and within them.
#![allow(clippy::unwrap_used, missing_docs)]

mod common;

use std::collections::VecDeque;
use std::path::Path;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use common::{options, own, unpack};
use dr_core::error::{Classified, ErrorClass};
use dr_core::port::{DatabaseSource, SourceError};
use dr_core::{Lsn, Timeline, Timestamp};
use dr_pg::replication::{
    Patience, ReplicationClient, ReplicationError, ReplicationMode, StreamEvent, WalStream,
};
use dr_pg::{ConnInfo, StandbyPolicy, StreamSource, StreamSourceOptions};
use dr_testkit::pg::{Scratch, TestCluster, bin_dir, command, ok};
use dr_testkit::proxy::{Act, Fault, Place, Proxy, Session, Side, Upstream};

/// A healthy server answers well within it, on a busy machine too.
const PATIENCE: Duration = Duration::from_secs(20);

/// How long a black hole is waited at: after it has begun nothing will come.
const SHORT: Duration = Duration::from_millis(300);

/// A server sees the end of a client so fast.
const GONE_LIMIT: Duration = Duration::from_secs(10);

/// Connections that are cut at once.
const AT_ONCE: usize = 8;

fn proxy_of(cluster: &TestCluster) -> Proxy {
    Proxy::tcp(Upstream::Unix(cluster.socket()))
}

fn patience_for(fault: Option<Fault>) -> Duration {
    match fault {
        Some(Fault { act: Act::BlackHole, .. }) => SHORT,
        _ => PATIENCE,
    }
}

async fn connect(proxy: &Proxy, name: &str, limit: Duration) -> Result<ReplicationClient, ReplicationError> {
    let mut info = ConnInfo::parse(&format!("{} application_name={name}", proxy.conninfo())).unwrap();
    info.connect_limit = limit;
    let client = ReplicationClient::connect(&info, ReplicationMode::Physical).await?;
    Ok(client.with_patience(Patience::of(limit)))
}

/// Takes a whole backup and throws it away.
async fn back_up(proxy: &Proxy, name: &str, limit: Duration) -> Result<u64, ReplicationError> {
    let client = connect(proxy, name, limit).await?;
    let (_, mut backup) = client.base_backup(&options(false)).await?;
    let mut events = 0;
    while backup.next().await?.is_some() {
        events += 1;
    }
    assert!(backup.finish().is_some());
    Ok(events)
}

/// What every cut must end in: an error that tells what to do and passes.
fn assert_passes(error: &ReplicationError, fault: Fault) {
    assert_eq!(error.class(), ErrorClass::Transient, "{fault:?}: {error}");
    let codes = ["replication-unreachable", "replication-late"];
    assert!(codes.contains(&error.code()), "{fault:?}: {} {error}", error.code());
    assert!(error.hint().is_some(), "{fault:?}: {error}");
}

/// Asks the server without the proxy.
struct Asker(ReplicationClient);

impl Asker {
    async fn of(cluster: &TestCluster) -> Self {
        let info = ConnInfo::parse(&format!("{} application_name=asker", cluster.conninfo())).unwrap();
        Asker(ReplicationClient::connect(&info, ReplicationMode::Database).await.unwrap())
    }

    async fn ask(&mut self, query: &str) -> String {
        self.0.rows("ask", query).await.unwrap()[0][0].clone().unwrap_or_default()
    }

    /// Waits until the query answers 0.
    async fn wait_for_none(&mut self, query: &str) {
        let began = Instant::now();
        while self.ask(query).await != "0" {
            assert!(began.elapsed() < GONE_LIMIT, "{query}");
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }

    async fn assert_nothing_is_left(&mut self) {
        let senders = "SELECT count(*) FROM pg_stat_activity WHERE backend_type = 'walsender' AND application_name <> 'asker'";
        self.wait_for_none(senders).await;
        let replicas = "SELECT count(*) FROM pg_stat_replication WHERE application_name <> 'asker'";
        self.wait_for_none(replicas).await;
        self.wait_for_none("SELECT count(*) FROM pg_locks WHERE locktype = 'advisory'").await;
        assert_eq!(self.ask("SELECT count(*) FROM pg_replication_slots").await, "0");
    }
}

/// Whether everything was said before a fault came: a file more or less moves the end by a message.
fn is_over(proxy: &Proxy, session: Session) -> bool {
    let mut seen = proxy.seen().into_iter().filter(|seen| seen.session == session);
    seen.any(|seen| seen.tags.contains(&b'c') && seen.tags.last() == Some(&b'Z'))
}

/// All of the first and of the last `edge` numbers below `total`, and every so many between.
fn edges_and_sample(total: u64, edge: u64, sample: u64) -> Vec<u64> {
    let step = (total.saturating_sub(2 * edge) / sample).max(1);
    (0..total).filter(|at| *at < edge || total - at <= edge || at % step == 0).collect()
}

/// Runs cuts, several at once, each over a proxy of its own.
async fn sweep(cluster: &TestCluster, faults: Vec<Fault>) -> usize {
    let todo = Arc::new(Mutex::new(faults.into_iter().enumerate().collect::<VecDeque<_>>()));
    let hits = Arc::new(AtomicUsize::new(0));
    let mut workers = Vec::new();
    for _ in 0..AT_ONCE {
        let (todo, hits, proxy, mut asker) =
            (todo.clone(), hits.clone(), proxy_of(cluster), Asker::of(cluster).await);
        workers.push(tokio::spawn(async move {
            loop {
                let Some((number, fault)) = todo.lock().unwrap().pop_front() else { return };
                proxy.set(Some(fault));
                let limit = patience_for(Some(fault));
                let (name, began) = (format!("cut{number}"), Instant::now());
                let outcome = back_up(&proxy, &name, limit).await;
                assert!(began.elapsed() < limit + Duration::from_secs(5), "{fault:?}: {:?}", began.elapsed());
                if outcome.is_ok() && is_over(&proxy, Session::Replication) {
                    continue;
                }
                // What is short for a black hole may be short for a busy machine before it.
                if !proxy.seen().first().is_some_and(|seen| seen.hit) {
                    let late = outcome.as_ref().is_err_and(|error| error.code() == "replication-late");
                    assert!(late, "{fault:?} did not come about: {outcome:?}");
                    continue;
                }
                assert_passes(&outcome.expect_err(&format!("{fault:?}")), fault);
                proxy.hang_up();
                let mine = format!("SELECT count(*) FROM pg_stat_activity WHERE application_name = '{name}'");
                asker.wait_for_none(&mine).await;
                hits.fetch_add(1, Ordering::Relaxed);
            }
        }));
    }
    for worker in workers {
        worker.await.unwrap();
    }
    hits.load(Ordering::Relaxed)
}

fn with_tablespace(cluster: &TestCluster, base: &Path) {
    let space = base.join("space");
    std::fs::create_dir(&space).unwrap();
    own(&space);
    cluster.sql(&format!("CREATE TABLESPACE s1 LOCATION '{}'", space.display()));
    cluster.sql("CREATE TABLE t TABLESPACE s1 AS SELECT g, md5(g::text) FROM generate_series(1, 2000) g");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn slow_a_backup_that_is_cut_at_any_message_is_no_success_and_leaves_nothing_on_the_server() {
    let scratch = Scratch::new();
    let cluster = TestCluster::start_small(scratch.path(), "sweep");
    with_tablespace(&cluster, scratch.path());
    let proxy = proxy_of(&cluster);
    back_up(&proxy, "count", PATIENCE).await.unwrap();
    proxy.set(None);
    back_up(&proxy, "count", PATIENCE).await.unwrap();
    let seen = proxy.seen().remove(0);
    assert_eq!(seen.session, Session::Replication);
    let (backend, frontend) = (seen.backend.0, seen.frontend.0);
    let mut faults = Vec::new();
    let mut add = |side, place, act| {
        faults.push(Fault { session: None, side, place, act });
    };
    // The last message says that the backup is over: after it there is nothing to cut.
    // Every boundary; those at either end and a sample of the others in each way, and within messages.
    let thorough = edges_and_sample(backend, 60, 20);
    for at in 0..backend {
        let acts = [Act::Reset, Act::Close, Act::BlackHole];
        if thorough.contains(&at) {
            acts.iter().for_each(|act| add(Side::Backend, Place::After(at), *act));
            add(Side::Backend, Place::Within(at), acts[at as usize % 3]);
        } else {
            add(Side::Backend, Place::After(at), acts[at as usize % 2]);
        }
    }
    for at in 0..frontend {
        for act in [Act::Reset, Act::Close, Act::BlackHole] {
            add(Side::Frontend, Place::After(at), act);
            add(Side::Frontend, Place::Within(at), act);
        }
    }
    let planned = faults.len();
    let began = Instant::now();
    let hits = sweep(&cluster, faults).await;
    println!("{hits} of {planned} cuts in {backend} messages, {:?}", began.elapsed());
    assert!(hits * 20 >= planned * 19, "{hits} of {planned} cuts came about");
    let mut asker = Asker::of(&cluster).await;
    asker.assert_nothing_is_left().await;
    // The network is well again.
    proxy.set(None);
    let root = scratch.path().join("copy");
    let client = connect(&proxy, "healed", PATIENCE).await.unwrap();
    unpack(client, &options(false), &root).await;
    own(&root);
    ok(command(bin_dir().join("pg_verifybackup")).args(["--no-parse-wal"]).arg(root.join("data")));
    asker.assert_nothing_is_left().await;
}

/// Takes a backup by the port that jobs use, and throws its files away.
async fn read_all(source: &StreamSource) -> Result<u64, SourceError> {
    let mut session = source.begin("cut", true).await?;
    let mut stream = session.stream().unwrap();
    let reading = tokio::task::spawn_blocking(move || {
        let (mut files, mut buffer) = (0, vec![0; 64 << 10]);
        while stream.next_file()?.is_some() {
            while stream.read(&mut buffer)? > 0 {}
            files += 1;
        }
        Ok::<u64, SourceError>(files)
    });
    let files = reading.await.unwrap()?;
    session.finish().await?;
    Ok(files)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_source_whose_stream_is_cut_or_silent_fails_within_its_limit() {
    let scratch = Scratch::new();
    let cluster = TestCluster::start_small(scratch.path(), "source");
    with_tablespace(&cluster, scratch.path());
    let proxy = proxy_of(&cluster);
    let (conninfo, standby) = (proxy.conninfo() + " sslmode=disable", StandbyPolicy::Never);
    let source = StreamSource::new(StreamSourceOptions { conninfo, max_rate: None, standby });
    read_all(&source).await.unwrap();
    proxy.set(None);
    let files = read_all(&source).await.unwrap();
    assert!(files > 300, "{files}");
    let messages = proxy.seen().iter().map(|seen| seen.backend.0).max().unwrap();
    let mut asker = Asker::of(&cluster).await;
    for at in edges_and_sample(messages, 4, 8) {
        for (place, act) in [
            (Place::After(at), Act::Reset),
            (Place::Within(at), Act::Close),
            (Place::After(at), Act::BlackHole),
        ] {
            // While it connects another limit holds, which is given in whole seconds.
            if act == Act::BlackHole && at < 20 {
                continue;
            }
            let fault = Fault { session: Some(Session::Replication), side: Side::Backend, place, act };
            proxy.set(Some(fault));
            let limit = patience_for(Some(fault));
            let began = Instant::now();
            let outcome = read_all(&source.clone().with_patience(Patience::of(limit))).await;
            if outcome.is_ok() && is_over(&proxy, Session::Replication) {
                continue;
            }
            let error = outcome.expect_err(&format!("{fault:?}"));
            assert!(began.elapsed() < limit + Duration::from_secs(10), "{fault:?}: {:?}", began.elapsed());
            assert_eq!(error.class(), ErrorClass::Transient, "{fault:?}: {error}");
            assert!(error.hint().is_some());
            proxy.hang_up();
            asker.assert_nothing_is_left().await;
        }
    }
    // A pause that is longer than the source waits at once, and shorter than its limit, is nothing.
    for at in messages - 7..messages {
        let act = Act::Delay(Duration::from_millis(450));
        let fault =
            Fault { session: Some(Session::Replication), side: Side::Backend, place: Place::After(at), act };
        proxy.set(Some(fault));
        assert_eq!(read_all(&source).await.unwrap(), files, "{fault:?}");
        assert!(proxy.seen().iter().any(|seen| seen.hit), "{fault:?}");
    }
}

/// A segment of the small cluster.
const SEGMENT: u64 = 1 << 20;

/// What was received of one timeline, all of it, from a place on.
struct Received {
    timeline: Timeline,
    from: Lsn,
    bytes: Vec<u8>,
}

impl Received {
    fn new(timeline: Timeline, from: Lsn) -> Self {
        Received { timeline, from, bytes: Vec::new() }
    }

    fn position(&self) -> Lsn {
        Lsn(self.from.0 + self.bytes.len() as u64)
    }

    /// Goes on from where it is until `end`, the end of the timeline or a failure.
    async fn go_on(&mut self, client: ReplicationClient, end: Lsn) -> Result<WalStream, ReplicationError> {
        let mut stream = client.stream(None, self.position(), self.timeline).await?;
        while stream.position() < end {
            let event = stream.next().await;
            if let Ok(StreamEvent::Wal { at, data, .. }) = &event {
                assert_eq!(*at, self.position(), "it goes on where it was");
                self.bytes.extend_from_slice(data);
            }
            assert_eq!(
                stream.position(),
                self.position(),
                "what was received is what is told, after a failure too"
            );
            if event? == StreamEvent::EndOfTimeline {
                break;
            }
            let at = self.position();
            stream.report(at, at, at, Timestamp::now(), false).await?;
        }
        Ok(stream)
    }

    /// The server's own files have the same bytes.
    fn assert_same_as_in(&self, data: &Path) {
        let (mut at, mut rest) = (self.from.0, &self.bytes[..]);
        while !rest.is_empty() {
            let (number, offset) = (at / SEGMENT, (at % SEGMENT) as usize);
            let per_log = (1 << 32) / SEGMENT;
            let name = format!("{:08X}{:08X}{:08X}", self.timeline.0, number / per_log, number % per_log);
            let file = std::fs::read(data.join("pg_wal").join(&name)).unwrap();
            let len = rest.len().min(file.len() - offset);
            assert!(rest[..len] == file[offset..offset + len], "{name} differs");
            (at, rest) = (at + len as u64, &rest[len..]);
        }
    }
}

/// Writes WAL, a record or several each few milliseconds, until it is told to end.
async fn write_wal(cluster: &TestCluster, over: Arc<AtomicUsize>) {
    let mut asker = Asker::of(cluster).await;
    for number in 0.. {
        if over.load(Ordering::Relaxed) > 0 {
            return;
        }
        let len = [20, 3_000, 9_000, 40_000][number % 4];
        asker
            .ask(&format!(
                "SELECT pg_logical_emit_message(true, 'cuts', repeat(md5({number}::text), {len} / 32))"
            ))
            .await;
        tokio::time::sleep(Duration::from_millis(4)).await;
    }
}

/// The flushed end of WAL.
async fn flushed(asker: &mut Asker) -> Lsn {
    asker.ask("SELECT pg_current_wal_flush_lsn()").await.parse().unwrap()
}

/// Streams through one cut after the other, each time from where the last one left off.
async fn stream_through(proxy: Proxy, mut received: Received, faults: Vec<Fault>) -> (Received, usize) {
    let mut hits = 0;
    for fault in faults {
        proxy.set(Some(fault));
        let limit = patience_for(Some(fault));
        let began = Instant::now();
        let outcome = match connect(&proxy, "stream", limit).await {
            Ok(client) => received.go_on(client, Lsn(u64::MAX)).await,
            Err(error) => Err(error),
        };
        assert_passes(&outcome.expect_err("there is always more WAL"), fault);
        // Silence is waited for once in each part of a connection.
        assert!(began.elapsed() < limit * 2 + Duration::from_secs(10), "{fault:?}: {:?}", began.elapsed());
        hits += usize::from(proxy.seen().first().is_some_and(|seen| seen.hit));
        proxy.hang_up();
    }
    (received, hits)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn wal_is_whole_and_contiguous_however_often_its_stream_is_cut() {
    let scratch = Scratch::new();
    let cluster = TestCluster::start_small(scratch.path(), "wal");
    cluster.configure(&["wal_keep_size = 4GB"]);
    cluster.sql("SELECT pg_reload_conf()");
    let mut asker = Asker::of(&cluster).await;
    let from = Lsn(flushed(&mut asker).await.0 / SEGMENT * SEGMENT);
    let proxy = proxy_of(&cluster);
    connect(&proxy, "count", PATIENCE).await.unwrap();
    let greeting = proxy.seen()[0].backend.0;
    let over = Arc::new(AtomicUsize::new(0));
    let writer = write_wal(&cluster, over.clone());
    let sweeps = async {
        let (mut sweeps, mut planned) = (Vec::new(), 0);
        let faults = |side, count: u64, part: u64, acts: &[Act]| {
            let of = |at: u64| acts[at as usize % acts.len()];
            let places = (0..count).filter(|at| at % 6 == part);
            places
                .flat_map(|at| [Place::After(at), Place::Within(at)].map(|place| (place, of(at))))
                .map(|(place, act)| Fault { session: None, side, place, act })
                .collect::<Vec<_>>()
        };
        for part in 0..6 {
            for acts in [&[Act::Reset, Act::Close][..], &[Act::Close, Act::Reset], &[Act::BlackHole]] {
                let mut todo = faults(Side::Backend, greeting + 40, part, acts);
                todo.extend(faults(Side::Frontend, 12, part, acts));
                planned += todo.len();
                let received = Received::new(Timeline(1), from);
                sweeps.push(tokio::spawn(stream_through(proxy_of(&cluster), received, todo)));
            }
        }
        let mut done = Vec::new();
        for sweep in sweeps {
            done.push(sweep.await.unwrap());
        }
        over.store(1, Ordering::Relaxed);
        (done, planned)
    };
    let ((done, planned), ()) = tokio::join!(sweeps, writer);
    let end = flushed(&mut asker).await;
    let hits: usize = done.iter().map(|(_, hits)| hits).sum();
    for (mut received, _) in done {
        let client = connect(&proxy, "healed", PATIENCE).await.unwrap();
        let stream = received.go_on(client, end).await.unwrap();
        assert_eq!(stream.end().await.unwrap().next, None);
        assert_eq!(received.position(), end);
        received.assert_same_as_in(&cluster.data);
    }
    println!("{hits} of {planned} cuts, {} bytes of WAL", end.0 - from.0);
    assert!(hits * 20 >= planned * 19, "{hits} of {planned} cuts came about");
    asker.assert_nothing_is_left().await;
}

/// Makes a server that was promoted, or never was anything else, a standby that reads its own WAL.
fn make_standby(cluster: &TestCluster) {
    cluster.stop("fast");
    let signal = cluster.data.join("standby.signal");
    std::fs::write(&signal, "").unwrap();
    own(&signal);
    cluster.start();
}

/// How a timeline ended for a client: what it received, and what follows.
async fn to_its_end(
    proxy: &Proxy,
    received: &mut Received,
    limit: Duration,
) -> Result<(Timeline, Lsn), ReplicationError> {
    let client = connect(proxy, "switch", limit).await?;
    let stream = received.go_on(client, Lsn(u64::MAX)).await?;
    let ended = stream.end().await?;
    let next = ended.next.expect("a timeline follows");
    // The connection is good for the next timeline.
    let mut client = ended.client;
    assert_eq!(client.identify().await?.timeline, next.0);
    Ok(next)
}

/// Streams while the standby is promoted. Answers how the client saw it.
async fn promote_while_streaming(
    cluster: &TestCluster,
    proxy: &Proxy,
    received: &mut Received,
    limit: Duration,
) -> Result<(Timeline, Lsn), ReplicationError> {
    let promotion = async {
        tokio::time::sleep(Duration::from_millis(100)).await;
        let conninfo = cluster.conninfo();
        let promote = move || dr_testkit::pg::sql(&conninfo, "SELECT pg_promote()");
        assert_eq!(tokio::task::spawn_blocking(promote).await.unwrap(), "t");
    };
    tokio::join!(to_its_end(proxy, received, limit), promotion).0
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn slow_a_switch_of_the_timeline_is_followed_however_it_is_cut() {
    let scratch = Scratch::new();
    let cluster = TestCluster::start_small(scratch.path(), "switch");
    cluster.configure(&["wal_keep_size = 4GB", "hot_standby = on"]);
    let proxy = proxy_of(&cluster);
    let (mut timeline, mut messages, mut cuts) = (Timeline(1), None, 0);
    let acts = [Act::Reset, Act::Close, Act::BlackHole];
    // Each round promotes; from the second on, the connection is cut where the timeline ended in the
    // first: before, at and after the message that says so.
    for round in 0..7_u64 {
        cluster.sql("SELECT pg_logical_emit_message(true, 'cuts', repeat('x', 300000))");
        let from: Lsn = cluster.sql("SELECT pg_current_wal_flush_lsn()").parse().unwrap();
        let mut received = Received::new(timeline, Lsn(from.0 / SEGMENT * SEGMENT));
        make_standby(&cluster);
        let fault = messages.map(|end: u64| Fault {
            session: None,
            side: Side::Backend,
            place: [Place::After(end - 3 + round), Place::Within(end - 3 + round)][round as usize % 2],
            act: acts[round as usize % 3],
        });
        proxy.set(fault);
        // Its promotion is awaited too, so silence must not be short.
        let limit = fault.map_or(PATIENCE, |_| Duration::from_secs(2));
        let outcome = promote_while_streaming(&cluster, &proxy, &mut received, limit).await;
        let seen = proxy.seen().remove(0);
        match (outcome, fault) {
            (Ok(next), _) => assert_eq!(next.0, Timeline(timeline.0 + 1)),
            (Err(error), Some(fault)) => assert_passes(&error, fault),
            (Err(error), None) => panic!("{error}"),
        }
        if messages.is_none() {
            let end = seen.tags.iter().position(|tag| *tag == b'c').unwrap();
            messages = Some(end as u64);
        }
        cuts += u64::from(seen.hit);
        proxy.hang_up();
        proxy.set(None);
        // Whatever was lost: it goes on from there, and then on the timeline that follows.
        let (next, switch) = to_its_end(&proxy, &mut received, PATIENCE).await.unwrap();
        assert_eq!((next, switch), (Timeline(timeline.0 + 1), received.position()));
        received.assert_same_as_in(&cluster.data);
        if round == 1 {
            every_cut_of_an_ended_timeline(&cluster, &received, switch).await;
        }
        cluster.sql("SELECT pg_logical_emit_message(true, 'cuts', repeat('y', 100000))");
        let end: Lsn = cluster.sql("SELECT pg_current_wal_flush_lsn()").parse().unwrap();
        let mut after = Received::new(next, switch);
        let client = connect(&proxy, "after", PATIENCE).await.unwrap();
        drop(after.go_on(client, end).await.unwrap());
        after.assert_same_as_in(&cluster.data);
        timeline = next;
    }
    assert!(cuts >= 5, "{cuts} of 6 promotions were cut");
    Asker::of(&cluster).await.assert_nothing_is_left().await;
}

/// The same messages as at a promotion, as often as is wanted: the server sends the rest of a
/// timeline that has ended, says so, and tells which one follows.
async fn every_cut_of_an_ended_timeline(cluster: &TestCluster, whole: &Received, switch: Lsn) {
    let from = Lsn(switch.0 - SEGMENT / 4);
    let proxy = proxy_of(cluster);
    let mut received = Received::new(whole.timeline, from);
    to_its_end(&proxy, &mut received, PATIENCE).await.unwrap();
    // After the last message of the stream's end comes the answer to another command.
    let seen = proxy.seen().remove(0);
    let first = seen.tags.iter().position(|tag| *tag == b'W').unwrap() as u64;
    let last = first + seen.tags[first as usize..].iter().position(|tag| *tag == b'Z').unwrap() as u64;
    for at in first..=last {
        for place in [Place::After(at), Place::Within(at)] {
            for act in [Act::Reset, Act::Close, Act::BlackHole] {
                if act == Act::BlackHole && place == Place::Within(at) {
                    continue;
                }
                let fault = Fault { session: None, side: Side::Backend, place, act };
                proxy.set(Some(fault));
                let mut received = Received::new(whole.timeline, from);
                let outcome = to_its_end(&proxy, &mut received, patience_for(Some(fault))).await;
                assert_passes(&outcome.expect_err(&format!("{fault:?}")), fault);
                proxy.hang_up();
                proxy.set(None);
                let (next, at) = to_its_end(&proxy, &mut received, PATIENCE).await.unwrap();
                assert_eq!((next, at, received.position()), (Timeline(whole.timeline.0 + 1), switch, switch));
                received.assert_same_as_in(&cluster.data);
            }
        }
    }
}
