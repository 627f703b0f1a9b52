//! The replication client against real servers.
#![allow(clippy::unwrap_used, missing_docs)]

mod common;

use std::time::Duration;

use common::{options, own, unpack};
use dr_core::error::{Classified, ErrorClass};
use dr_core::{Lsn, Timeline, Timestamp};
use dr_pg::ConnInfo;
use dr_pg::replication::{ReplicationClient, ReplicationError, ReplicationMode, StreamEvent};
use dr_testkit::pg::{Scratch, TestCluster, bin_dir, command, ok, run};
use dr_testkit::proxy::{Act, Fault, Place, Proxy, Side, Upstream};

const LIMIT: Duration = Duration::from_secs(60);

async fn connect(conninfo: &str) -> Result<ReplicationClient, ReplicationError> {
    ReplicationClient::connect(&ConnInfo::parse(conninfo).unwrap(), ReplicationMode::Physical).await
}

/// A server that also listens on loopback, with TLS and a password rule.
fn tls_cluster(scratch: &Scratch) -> (TestCluster, u16) {
    let cluster = TestCluster::create(scratch.path(), "tls");
    let at = |name: &str| cluster.data.join(name);
    let openssl = |line: &str, subject: &[&str]| {
        ok(command("openssl").args(line.split(' ')).args(subject).current_dir(&cluster.data));
    };
    let key = "-newkey rsa:2048 -nodes -days 2";
    openssl(&format!("req -x509 {key} -keyout ca.key -out ca.crt"), &["-subj", "/CN=test authority"]);
    openssl(
        &format!("req -x509 {key} -keyout other.key -out other.crt"),
        &["-subj", "/CN=another authority"],
    );
    openssl("req -newkey rsa:2048 -nodes -keyout server.key -out server.csr", &["-subj", "/CN=localhost"]);
    std::fs::write(at("san.cnf"), "subjectAltName=DNS:localhost").unwrap();
    let sign =
        "x509 -req -in server.csr -CA ca.crt -CAkey ca.key -CAcreateserial -out server.crt -days 2 -sha384";
    openssl(sign, &["-extfile", "san.cnf"]);
    let port = cluster.port;
    cluster.configure(&[
        "ssl = on",
        "listen_addresses = '127.0.0.1'",
        "password_encryption = 'scram-sha-256'",
    ]);
    std::fs::write(
        at("pg_hba.conf"),
        "local all all trust\nlocal replication all trust\n\
         hostssl replication scram 127.0.0.1/32 scram-sha-256\nhostnossl replication nossl 127.0.0.1/32 scram-sha-256\n\
         hostssl all scram 127.0.0.1/32 scram-sha-256\n",
    )
    .unwrap();
    cluster.start();
    for role in ["scram", "nossl"] {
        cluster.sql(&format!("CREATE ROLE {role} LOGIN REPLICATION PASSWORD 'pa:ss'"));
    }
    (cluster, port)
}

#[tokio::test]
async fn passwords_and_certificates_are_checked_as_far_as_was_asked() {
    let scratch = Scratch::new();
    let (cluster, port) = tls_cluster(&scratch);
    let ca = cluster.data.join("ca.crt").display().to_string();
    let other = cluster.data.join("other.crt").display().to_string();
    let base = format!("hostaddr=127.0.0.1 port={port} user=scram password=pa:ss connect_timeout=10");

    let good = [
        format!("host=localhost {base} sslmode=verify-full sslrootcert={ca} channel_binding=require"),
        format!("host=elsewhere {base} sslmode=verify-ca sslrootcert={ca}"),
        format!("host=elsewhere {base} sslmode=require channel_binding=disable"),
        format!("host=localhost {base} sslmode=prefer"),
        format!(
            "host=localhost {base} sslmode=verify-full sslrootcert={ca} ssl_min_protocol_version=TLSv1.3"
        ),
        // The server's rules let this role in only with TLS.
        format!("host=localhost {base} sslmode=allow"),
    ];
    for conninfo in &good {
        let mut client = connect(conninfo).await.unwrap_or_else(|error| panic!("{conninfo}: {error}"));
        assert!(client.is_encrypted(), "{conninfo}");
        client.identify().await.unwrap();
    }
    let plain = format!("host=localhost hostaddr=127.0.0.1 port={port} user=nossl password=pa:ss");
    assert!(
        !connect(&format!("{plain} sslmode=prefer")).await.unwrap().is_encrypted(),
        "the second way in is taken"
    );

    let bad = [
        (format!("host=elsewhere {base} sslmode=verify-full sslrootcert={ca}"), "handshake"),
        (format!("host=localhost {base} sslmode=verify-full sslrootcert={other}"), "handshake"),
        (format!("host=localhost {base} sslmode=verify-ca sslrootcert={other}"), "handshake"),
        (format!("host=localhost {base} sslmode=disable"), "28000"),
        (format!("host=localhost hostaddr=127.0.0.1 port={port} user=scram password=wrong"), "28P01"),
        (format!("host=localhost hostaddr=127.0.0.1 port={port} user=scram passfile=/nowhere"), "password"),
        (format!("{plain} sslmode=disable channel_binding=require"), "channel"),
    ];
    for (conninfo, word) in &bad {
        let error = connect(conninfo).await.expect_err(conninfo);
        assert_eq!(error.class(), ErrorClass::Denied, "{conninfo}: {error}");
        assert!(error.to_string().contains(word), "{conninfo}: {error}");
        assert!(!error.to_string().contains("pa:ss"));
    }
}

#[tokio::test]
async fn a_password_file_and_a_list_of_hosts_lead_to_the_server() {
    let scratch = Scratch::new();
    let (_cluster, port) = tls_cluster(&scratch);
    let passfile = scratch.path().join("pgpass");
    std::fs::write(&passfile, format!("localhost:{port}:replication:scram:pa\\:ss\n")).unwrap();
    std::fs::set_permissions(&passfile, std::os::unix::fs::PermissionsExt::from_mode(0o600)).unwrap();
    // Nobody listens on port 1; the second host answers.
    let conninfo = format!(
        "host=localhost,localhost hostaddr=127.0.0.1,127.0.0.1 port=1,{port} user=scram passfile={}",
        passfile.display()
    );
    let mut client = connect(&conninfo).await.unwrap();
    assert!(client.server().ends_with(&format!(":{port}")));
    client.identify().await.unwrap();
    let standby = connect(&format!("{conninfo} target_session_attrs=standby")).await.unwrap_err();
    assert!(standby.to_string().contains("target_session_attrs"), "{standby}");
    connect(&format!("{conninfo} target_session_attrs=primary")).await.unwrap();
    assert_eq!(connect("host=/nowhere user=x").await.unwrap_err().class(), ErrorClass::Transient);
}

#[tokio::test]
async fn a_server_looks_soon_whether_its_client_is_still_there() {
    let scratch = Scratch::new();
    let (_cluster, port) = tls_cluster(&scratch);
    let base = format!("host=localhost hostaddr=127.0.0.1 port={port} user=scram password=pa:ss");
    let mut client = connect(&base).await.unwrap();
    assert_eq!(client.show("tcp_keepalives_idle").await.unwrap(), "30");
    assert_eq!(client.show("tcp_keepalives_count").await.unwrap(), "3");
    let mut client = connect(&format!("{base} options='-c tcp_keepalives_idle=77'")).await.unwrap();
    assert_eq!(client.show("tcp_keepalives_idle").await.unwrap(), "77");
}

#[tokio::test]
async fn the_server_tells_what_it_is_and_keeps_slots() {
    let scratch = Scratch::new();
    let cluster = TestCluster::create(scratch.path(), "facts");
    cluster.start();
    let mut client = connect(&cluster.conninfo()).await.unwrap();
    let identity = client.identify().await.unwrap();
    assert_eq!(
        identity.system_id.0.to_string(),
        cluster.sql("SELECT system_identifier FROM pg_control_system()")
    );
    assert_eq!(identity.timeline, Timeline(1));
    assert_eq!(client.show("wal_segment_size").await.unwrap(), "16MB");
    assert_eq!(
        client.major().to_string(),
        cluster.sql("SELECT current_setting('server_version_num')::int / 10000")
    );

    assert_eq!(
        client.timeline_history(Timeline(1)).await.unwrap(),
        None,
        "the first timeline has no history"
    );
    assert_eq!(client.read_slot("none").await.unwrap(), None);
    client.create_slot("dr \"x", false).await.unwrap_err();
    client.create_slot("dr_slot", false).await.unwrap();
    let slot = client.read_slot("dr_slot").await.unwrap().unwrap();
    assert_eq!(slot.timeline, Some(Timeline(1)));
    assert!(slot.restart.unwrap() <= identity.flushed);
    let again = client.create_slot("dr_slot", false).await.unwrap_err();
    assert_eq!((again.class(), again.sqlstate()), (ErrorClass::Fenced, Some("42710")));
    // An error leaves the connection usable.
    client.drop_slot("dr_slot").await.unwrap();
    let gone = client.drop_slot("dr_slot").await.unwrap_err();
    assert_eq!(gone.class(), ErrorClass::Missing);
    // SQL does not run on a physical connection; it does on one with a database.
    client.rows("ask", "SELECT 1").await.unwrap_err();
    let info = ConnInfo::parse(&cluster.conninfo()).unwrap();
    let mut client = ReplicationClient::connect(&info, ReplicationMode::Database).await.unwrap();
    assert_eq!(client.rows("ask", "SELECT 41 + 1, NULL").await.unwrap(), [[Some("42".to_owned()), None]]);
}

#[tokio::test]
async fn a_base_backup_with_tablespaces_passes_the_servers_own_verification() {
    let scratch = Scratch::new();
    let cluster = TestCluster::create(scratch.path(), "base");
    cluster.start();
    let space = scratch.path().join("space");
    std::fs::create_dir(&space).unwrap();
    own(&space);
    cluster.sql(&format!("CREATE TABLESPACE s1 LOCATION '{}'", space.display()));
    cluster.sql("CREATE TABLE t TABLESPACE s1 AS SELECT g, md5(g::text) FROM generate_series(1, 20000) g");
    let root = scratch.path().join("copy");
    let client = connect(&cluster.conninfo()).await.unwrap();
    let (manifest, mut client, _) = unpack(client, &options(false), &root).await;
    assert!(manifest.starts_with(b"{"));
    client.identify().await.expect("the connection is usable after a backup");
    own(&root);
    ok(command(bin_dir().join("pg_verifybackup")).args(["--no-parse-wal"]).arg(root.join("data")));
    // Shown failing once: a changed byte is seen.
    let file = root.join("data/PG_VERSION");
    let text = std::fs::read(&file).unwrap();
    std::fs::write(&file, [b"9", &text[1..]].concat()).unwrap();
    assert!(
        !run(command(bin_dir().join("pg_verifybackup")).args(["--no-parse-wal"]).arg(root.join("data")))
            .status
            .success()
    );
}

#[tokio::test]
async fn an_incremental_backup_sends_only_what_changed() {
    let scratch = Scratch::new();
    let cluster = TestCluster::create(scratch.path(), "incr");
    cluster.start();
    let mut client = connect(&cluster.conninfo()).await.unwrap();
    if client.major() < 17 {
        let error = client.upload_manifest(b"{}").await.unwrap_err();
        assert_eq!(error.class(), ErrorClass::Unsupported);
        return;
    }
    cluster.sql("ALTER SYSTEM SET summarize_wal = on");
    cluster.sql("SELECT pg_reload_conf()");
    cluster.sql("CREATE TABLE t AS SELECT g, md5(g::text) FROM generate_series(1, 100000) g");
    cluster.sql("VACUUM FREEZE t");
    let (manifest, client, full) = unpack(client, &options(false), &scratch.path().join("full")).await;
    cluster.sql("UPDATE t SET md5 = 'x' WHERE g = 5");
    let mut client = client;
    let wrong = client.upload_manifest(b"{ nonsense").await.unwrap_err();
    assert!(wrong.sqlstate().is_some(), "{wrong}");
    client.upload_manifest(&manifest).await.expect("an error leaves the connection usable");
    let (_, _, changed) = unpack(client, &options(true), &scratch.path().join("incremental")).await;
    assert!(changed * 3 < full, "{changed} of {full} bytes were sent");
    let roots = [scratch.path().join("full/data"), scratch.path().join("incremental/data")];
    own(&scratch.path().join("full"));
    own(&scratch.path().join("incremental"));
    let combined = scratch.path().join("combined");
    ok(command(bin_dir().join("pg_combinebackup")).args(&roots).arg("-o").arg(&combined));
    ok(command(bin_dir().join("pg_verifybackup")).args(["--no-parse-wal"]).arg(&combined));
}

#[tokio::test]
async fn streamed_wal_is_what_the_server_wrote() {
    let scratch = Scratch::new();
    let cluster = TestCluster::create(scratch.path(), "stream");
    cluster.configure(&["wal_sender_timeout = 5s"]);
    cluster.start();
    let mut client = connect(&cluster.conninfo()).await.unwrap();
    client.create_slot("s", true).await.unwrap();
    let from = client.read_slot("s").await.unwrap().unwrap().restart.unwrap();
    let from = Lsn(from.0 & !(16 * 1024 * 1024 - 1));
    let mut stream = client.stream(Some("s"), from, Timeline(1)).await.unwrap();
    cluster.sql("CREATE TABLE t AS SELECT g, md5(g::text) FROM generate_series(1, 100000) g");
    let segment = cluster.sql("SELECT pg_walfile_name(pg_current_wal_lsn())");
    let end: Lsn = cluster.sql("SELECT pg_switch_wal()").parse().unwrap();
    let mut received = Vec::new();
    while stream.position() < end {
        match tokio::time::timeout(LIMIT, stream.next()).await.unwrap().unwrap() {
            StreamEvent::Wal { data, .. } => received.extend_from_slice(&data),
            StreamEvent::Keepalive { .. } => {}
            StreamEvent::EndOfTimeline => panic!("the timeline goes on"),
        }
        let at = stream.position();
        stream.report(at, at, at, Timestamp::now(), false).await.unwrap();
    }
    let path = cluster.data.join("pg_wal").join(&segment);
    let number = u64::from_str_radix(&segment[16..], 16).unwrap();
    let start = (number << 24) - from.0;
    let len = (end.0 - (number << 24)) as usize;
    let file = std::fs::read(path).unwrap();
    assert_eq!(received[start as usize..start as usize + len], file[..len]);
    let ended = stream.end().await.unwrap();
    assert_eq!(ended.next, None);
    let mut client = ended.client;
    client.identify().await.expect("the connection is usable after the stream");
    // WAL that is not there is an error of the server, by its code.
    let mut ahead = client.stream(None, Lsn(0x10_0000_0000_0000), Timeline(1)).await.unwrap();
    let error = ahead.next().await.unwrap_err();
    assert!(error.sqlstate().is_some(), "{error}");
    let client = connect(&cluster.conninfo()).await.unwrap();
    // No cluster has the segment before its first.
    let mut gone = client.stream(None, Lsn(0x10000), Timeline(1)).await.unwrap();
    let error = gone.next().await.unwrap_err();
    assert_eq!((error.class(), error.sqlstate()), (ErrorClass::Missing, Some("58P01")));
}

/// Whether a session of that name is busy.
fn is_busy(cluster: &TestCluster, name: &str) -> bool {
    let query = format!(
        "SELECT count(*) FROM pg_stat_activity WHERE application_name = '{name}' AND state = 'active'"
    );
    cluster.sql(&query) != "0"
}

async fn wait_until(what: &str, mut holds: impl FnMut() -> bool) {
    let began = std::time::Instant::now();
    while !holds() {
        assert!(began.elapsed() < LIMIT, "{what}");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_request_to_cancel_ends_a_statement_and_a_backup_on_the_server_with_and_without_tls() {
    let scratch = Scratch::new();
    let (cluster, port) = tls_cluster(&scratch);
    let tls =
        format!("host=localhost hostaddr=127.0.0.1 port={port} user=scram password=pa:ss sslmode=require");
    for (number, base) in [cluster.conninfo(), format!("{tls} dbname=postgres")].iter().enumerate() {
        let name = format!("cancelled{number}");
        let info = ConnInfo::parse(&format!("{base} application_name={name}")).unwrap();
        let mut client = ReplicationClient::connect(&info, ReplicationMode::Database).await.unwrap();
        assert_eq!(client.is_encrypted(), number == 1);
        let canceller = client.canceller().unwrap();
        let statement = tokio::spawn(async move {
            let outcome = client.rows("sleep", "SELECT pg_sleep(300)").await;
            (outcome, client)
        });
        wait_until("the statement runs", || is_busy(&cluster, &name)).await;
        canceller.cancel().await.unwrap();
        let (outcome, mut client) = statement.await.unwrap();
        let error = outcome.unwrap_err();
        assert_eq!((error.class(), error.sqlstate()), (ErrorClass::Transient, Some("57014")));
        wait_until("the statement ended", || !is_busy(&cluster, &name)).await;
        // Where nothing runs it changes nothing, and the connection is good for more.
        canceller.cancel().await.unwrap();
        assert_eq!(client.rows("ask", "SELECT 1").await.unwrap()[0][0].as_deref(), Some("1"));

        // So slow that it would take minutes.
        let slow = dr_pg::replication::BaseBackupOptions { max_rate: Some(64), ..options(false) };
        let (_, mut backup) = client.base_backup(&slow).await.unwrap();
        backup.next().await.unwrap();
        assert!(is_busy(&cluster, &name));
        canceller.cancel().await.unwrap();
        let error = loop {
            match tokio::time::timeout(LIMIT, backup.next()).await.unwrap() {
                Ok(event) => assert!(event.is_some(), "it is not over"),
                Err(error) => break error,
            }
        };
        assert_eq!((error.class(), error.sqlstate()), (ErrorClass::Transient, Some("57014")));
        wait_until("the backup ended", || !is_busy(&cluster, &name)).await;
    }
}

#[tokio::test]
async fn a_tls_handshake_that_is_cut_passes_and_one_that_is_refused_does_not() {
    let scratch = Scratch::new();
    let (cluster, port) = tls_cluster(&scratch);
    let proxy = Proxy::tcp(Upstream::Tcp(([127, 0, 0, 1], port).into()));
    let ca = cluster.data.join("ca.crt").display().to_string();
    let base = format!(
        "host=localhost hostaddr=127.0.0.1 port={} user=scram password=pa:ss connect_timeout=10 sslmode=verify-full",
        proxy.port()
    );
    let good = format!("{base} sslrootcert={ca}");
    assert!(connect(&good).await.unwrap().is_encrypted());
    let (sent, received) = (proxy.seen()[0].frontend.1, proxy.seen()[0].backend.1);
    let mut cuts = 0;
    for (side, total) in [(Side::Frontend, sent), (Side::Backend, received)] {
        // The last of it is said when the connection is dropped.
        for byte in (0..total * 9 / 10).step_by(total as usize / 30) {
            let act = if cuts % 2 == 0 { Act::Reset } else { Act::Close };
            proxy.set(Some(Fault { session: None, side, place: Place::Byte(byte), act }));
            let error = connect(&good).await.expect_err("it was cut");
            assert_eq!(error.class(), ErrorClass::Transient, "{side:?} {byte}: {error}");
            assert_eq!(error.code(), "replication-unreachable", "{side:?} {byte}: {error}");
            cuts += 1;
        }
    }
    assert!(cuts >= 50, "{cuts}");
    proxy.set(None);
    let other = cluster.data.join("other.crt").display().to_string();
    let error = connect(&format!("{base} sslrootcert={other}")).await.unwrap_err();
    assert_eq!(error.class(), ErrorClass::Denied, "{error}");
}

#[tokio::test]
async fn direct_tls_works_from_17_on_and_is_explained_before() {
    let scratch = Scratch::new();
    let (cluster, port) = tls_cluster(&scratch);
    let ca = cluster.data.join("ca.crt").display().to_string();
    let proxy = Proxy::tcp(Upstream::Tcp(([127, 0, 0, 1], port).into()));
    let base = format!(
        "host=localhost hostaddr=127.0.0.1 port={} user=scram password=pa:ss sslnegotiation=direct",
        proxy.port()
    );
    let direct = format!("{base} sslmode=verify-full sslrootcert={ca} channel_binding=require");
    let major = connect(&cluster.conninfo()).await.unwrap().major();
    if major < 17 {
        let error = connect(&direct).await.unwrap_err();
        assert!(error.to_string().contains("older than 17"), "{error}");
        eprintln!("PostgreSQL {major} has no direct TLS: set DR_TEST_PG_BIN to one of 17 or later");
        return;
    }
    let mut client = connect(&direct).await.unwrap();
    assert!(client.is_encrypted());
    client.identify().await.unwrap();
    // SQL takes the same way.
    let source = dr_pg::StreamSource::new(dr_pg::StreamSourceOptions {
        conninfo: format!("{direct} dbname=postgres"),
        max_rate: None,
        standby: dr_pg::StandbyPolicy::Never,
    });
    let described = dr_core::port::DatabaseSource::describe(&source).await.unwrap();
    assert_eq!(described.version_num / 10_000, major);
    // No question came before the handshake: nothing could be told apart.
    let seen = &proxy.seen()[0];
    assert_eq!((seen.frontend.0, seen.backend.0), (0, 0), "{seen:?}");
    let canceller = client.canceller().unwrap();
    canceller.cancel().await.unwrap();
    client.identify().await.unwrap();
    let other = cluster.data.join("other.crt").display().to_string();
    let error = connect(&format!("{base} sslmode=verify-ca sslrootcert={other}")).await.unwrap_err();
    assert_eq!(error.class(), ErrorClass::Denied, "{error}");
    // Whoever speaks TLS and does not answer "postgresql" is somebody else.
    let mut web = command("openssl");
    web.args(["s_server", "-quiet", "-cert", "server.crt", "-key", "server.key", "-accept"]);
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let mut web = web.arg(listener.to_string()).current_dir(&cluster.data).spawn().unwrap();
    wait_until("it listens", || std::net::TcpStream::connect(("127.0.0.1", listener)).is_ok()).await;
    let elsewhere = direct.replace(&format!("port={}", proxy.port()), &format!("port={listener}"));
    let error = connect(&elsewhere).await.unwrap_err();
    let _ = web.kill();
    web.wait().unwrap();
    assert_eq!(error.class(), ErrorClass::Denied, "{error}");
    assert!(error.to_string().contains("direct TLS"), "{error}");
}
