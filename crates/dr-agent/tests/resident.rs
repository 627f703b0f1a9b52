//! The resident agent in this process: reload, readiness, HTTP, metrics, and what systemd is told.
#![allow(clippy::unwrap_used, missing_docs)]

mod common;
mod exposition;

use std::io::{Read, Write};
use std::net::TcpStream;
use std::os::unix::net::UnixDatagram;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use common::{Agent, Does, LIMIT, http, raw, task};
use dr_agent::protocol::{Client, Request};
use dr_agent::resident::{
    HTTP_CONNECTIONS, HTTP_HEAD_LIMIT, HTTP_HEAD_TIME, HTTP_TIME, Notifier, ResidentError,
};
use dr_agent::supervise::{Policy, Supervised, Task, TaskContext, TaskError};
use serde_json::{Value, json};

#[tokio::test]
async fn metrics_are_what_a_strict_reader_takes() {
    let agent = Agent::start(vec![task("a", Does::Well), task("b\"\\\n", Does::Fail)]).await;
    agent.until("b was started again", |status| status["tasks"][1]["restarts"].as_u64() > Some(2)).await;
    agent.control.reload().await.unwrap();
    agent.change(|wanted| wanted.broken = true);
    agent.control.reload().await.unwrap_err();
    let (code, head, body) = http(agent.http(), "GET /metrics").await;
    assert_eq!(code, 200);
    assert!(head.contains("content-type: text/plain; version=0.0.4; charset=utf-8"), "{head}");
    let samples = exposition::read(&body).unwrap_or_else(|fault| panic!("{fault}\n{body}"));
    let value = |name: &str| samples.get(name).copied().unwrap_or_else(|| panic!("{name}: {samples:?}"));
    assert_eq!(value("dr_agent_task_up{task=\"a\"}"), 1.0);
    assert!(value("dr_agent_task_restarts_total{task=\"b\\\"\\\\\\n\"}") > 2.0);
    assert_eq!(value("dr_agent_config_reloads_total{result=\"applied\"}"), 1.0);
    assert_eq!(value("dr_agent_config_reloads_total{result=\"refused\"}"), 1.0);
    assert_eq!(value("dr_agent_ready"), 0.0);
    assert_eq!(value(&format!("dr_build_info{{version=\"{}\"}}", dr_agent::VERSION)), 1.0);
    assert!(value("dr_agent_start_time_seconds") > 1.7e9);
    agent.stop().await;
}

#[tokio::test]
async fn health_is_that_the_loop_lives_and_readiness_that_all_required_tasks_do() {
    let agent = Agent::start(vec![task("good", Does::Well), task("bad", Does::Fail)]).await;
    agent.until("it is not ready", |status| status["ready"] == false).await;
    assert_eq!(http(agent.http(), "GET /healthz").await.0, 200);
    let (code, _, body) = http(agent.http(), "GET /readyz").await;
    let body: Value = serde_json::from_str(&body).unwrap();
    assert_eq!((code, &body["ready"]), (503, &false.into()));
    assert_eq!(body["not_ready"][0]["what"], "task bad");
    assert!(body["not_ready"][0]["why"].as_str().unwrap().contains("planted"), "{body}");
    agent.change(|wanted| wanted.tasks = vec![task("good", Does::Well), task("bad", Does::Well)]);
    agent.control.reload().await.unwrap();
    let (code, _, body) = http(agent.http(), "GET /readyz").await;
    assert_eq!((code, body.as_str()), (200, "{\"not_ready\":[],\"ready\":true}\n"));
    agent.stop().await;
}

#[tokio::test]
async fn http_answers_only_what_it_has() {
    let agent = Agent::start(vec![]).await;
    assert_eq!(http(agent.http(), "GET /").await.0, 404);
    assert_eq!(http(agent.http(), "POST /metrics").await.0, 405);
    let (code, head, body) = http(agent.http(), "HEAD /metrics").await;
    assert_eq!((code, body.as_str()), (200, ""));
    assert!(head.contains("connection: close"), "{head}");
    agent.stop().await;
}

#[tokio::test]
async fn a_bad_configuration_is_refused_with_its_error_and_changes_nothing() {
    let agent = Agent::start(vec![task("a", Does::Well)]).await;
    let client = Client::new(agent.socket());
    agent.change(|wanted| (wanted.broken, wanted.tasks) = (true, vec![]));
    match client.ask(&Request::Reload).await {
        Err(ResidentError::Refused { code, message, .. }) => {
            assert_eq!(code, "config-missing");
            assert!(message.contains("planted.key"), "{message}");
        }
        other => panic!("{other:?}"),
    }
    let status = client.ask(&Request::Status).await.unwrap();
    assert_eq!(status["tasks"][0]["state"], "running");
    assert_eq!(status["not_ready"][0]["what"], "configuration");
    assert_eq!(status["configuration"]["last_error"]["code"], "config-missing");
    agent.change(|wanted| (wanted.broken, wanted.tasks) = (false, vec![task("a", Does::Well)]));
    let answer = client.ask(&Request::Reload).await.unwrap();
    assert_eq!(answer["tasks"]["kept"], json!(["a"]));
    assert_eq!(client.ask(&Request::Status).await.unwrap()["ready"], true);
    agent.stop().await;
}

#[tokio::test]
async fn a_socket_or_a_port_that_is_taken_refuses_the_whole_reload() {
    let agent = Agent::start(vec![task("a", Does::Well)]).await;
    let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let (old, moved) = (agent.socket(), agent.dir.path().join("moved.sock"));
    agent.change(|wanted| {
        wanted.socket = moved.clone();
        wanted.listen = Some(taken.local_addr().unwrap());
        wanted.tasks = vec![];
    });
    match agent.control.reload().await {
        Err(ResidentError::Refused { code, .. }) => assert_eq!(code, "agent-listen"),
        other => panic!("{other:?}"),
    }
    assert!(!moved.exists(), "what was taken for the new configuration is let go");
    let status = Client::new(&old).ask(&Request::Status).await.unwrap();
    assert_eq!(status["tasks"][0]["state"], "running");
    agent.change(|wanted| wanted.socket = agent.dir.path().join("none/a.sock"));
    match agent.control.reload().await {
        Err(ResidentError::Refused { code, .. }) => assert_eq!(code, "agent-socket"),
        other => panic!("{other:?}"),
    }
    agent.stop().await;
}

#[tokio::test]
async fn socket_and_address_move_with_a_reload_that_is_answered_on_the_old_socket() {
    let agent = Agent::start(vec![task("a", Does::Well)]).await;
    let (old, old_http, moved) = (agent.socket(), agent.http(), agent.dir.path().join("moved.sock"));
    agent.change(|wanted| (wanted.socket, wanted.listen) = (moved.clone(), None));
    let answer = Client::new(&old).ask(&Request::Reload).await.unwrap();
    assert_eq!(answer["tasks"]["kept"], json!(["a"]));
    assert!(!old.exists());
    let status = Client::new(&moved).ask(&Request::Status).await.unwrap();
    assert_eq!((&status["listen"], &status["socket"]), (&Value::Null, &json!(moved)));
    let end = Instant::now() + LIMIT;
    while std::net::TcpStream::connect(old_http).is_ok() {
        assert!(Instant::now() < end, "the old address is let go");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    agent.stop().await;
    assert!(!moved.exists());
}

#[tokio::test]
async fn an_address_that_did_not_change_is_kept_even_when_the_system_chose_its_port() {
    let agent = Agent::start(vec![]).await;
    let before = agent.http();
    agent.control.reload().await.unwrap();
    assert_eq!(agent.http(), before);
    agent.stop().await;
}

#[tokio::test]
async fn while_it_stops_it_says_what_it_waits_for_and_a_second_request_cuts_that_off() {
    let agent = Agent::start(vec![task("deaf", Does::Deaf), task("a", Does::Well)]).await;
    let client = Client::new(agent.socket());
    client.ask(&Request::Stop { now: false }).await.unwrap();
    agent.until("one is left", |status| status["tasks"][0]["state"] == "ended").await;
    let status = client.ask(&Request::Status).await.unwrap();
    assert_eq!((&status["phase"], &status["ready"]), (&"draining".into(), &false.into()));
    assert_eq!(status["tasks"][1]["state"], "stopping");
    assert_eq!(http(agent.http(), "GET /readyz").await.0, 503);
    match client.ask(&Request::Reload).await {
        Err(ResidentError::Refused { code, .. }) => assert_eq!(code, "agent-stopping"),
        other => panic!("{other:?}"),
    }
    client.ask(&Request::Stop { now: true }).await.unwrap();
    let error = agent.ended().await.expect_err("it was no orderly stop");
    assert!(error.to_string().contains("deaf"), "{error}");
    assert_eq!(dr_core::Classified::code(&error), "agent-stop-cut");
}

#[tokio::test]
async fn a_task_that_does_not_stop_is_cut_off_after_the_configured_time() {
    let agent = Agent::start(vec![task("deaf", Does::Deaf)]).await;
    agent.change(|wanted| wanted.stop_timeout = Duration::from_millis(200));
    agent.control.reload().await.unwrap();
    raw(&agent.socket(), "{\"dr_agent\":1,\"request\":\"stop\"}\n").await.unwrap();
    let began = Instant::now();
    assert!(agent.ended().await.is_err());
    assert!(began.elapsed() < LIMIT);
}

#[tokio::test]
async fn http_has_limits_for_heads_and_connections() {
    let agent = Agent::start(vec![]).await;
    let (code, ..) = http(agent.http(), &format!("GET /{}", "x".repeat(HTTP_HEAD_LIMIT))).await;
    assert!(code == 431 || code == 414, "{code}");
    let held: Vec<TcpStream> =
        (0..HTTP_CONNECTIONS).map(|_| TcpStream::connect(agent.http()).unwrap()).collect();
    let mut one_more = TcpStream::connect(agent.http()).unwrap();
    one_more.set_read_timeout(Some(LIMIT)).unwrap();
    let closed = tokio::task::spawn_blocking(move || one_more.read(&mut [0]));
    // Closed, or reset where the request was on its way.
    assert!(!matches!(closed.await.unwrap(), Ok(count) if count > 0));
    drop(held);
    let end = Instant::now() + LIMIT;
    while !answers(agent.http()).await {
        assert!(Instant::now() < end, "no place became free");
    }
    agent.stop().await;
}

async fn answers(address: std::net::SocketAddr) -> bool {
    let ask = move || {
        let mut stream = TcpStream::connect(address)?;
        stream.set_read_timeout(Some(LIMIT))?;
        stream.write_all(b"GET /healthz HTTP/1.1\r\nHost: test\r\n\r\n")?;
        let mut text = String::new();
        stream.read_to_string(&mut text)?;
        Ok::<_, std::io::Error>(text.starts_with("HTTP/1.1 200"))
    };
    tokio::task::spawn_blocking(ask).await.unwrap().unwrap_or(false)
}

#[tokio::test]
async fn slow_an_http_client_that_does_not_finish_its_request_is_let_go() {
    let agent = Agent::start(vec![]).await;
    let mut slow = TcpStream::connect(agent.http()).unwrap();
    slow.set_read_timeout(Some(LIMIT)).unwrap();
    slow.write_all(b"GET /metrics HTTP/1.1\r\nHost:").unwrap();
    let began = Instant::now();
    let got = tokio::task::spawn_blocking(move || slow.read_to_end(&mut Vec::new()));
    assert!(got.await.unwrap().is_ok(), "it is closed, not reset");
    let took = began.elapsed();
    assert!(took >= HTTP_HEAD_TIME - Duration::from_millis(100) && took < HTTP_TIME, "{took:?}");
    agent.stop().await;
}

/// A task whose name takes its time, so that whoever asks for it hangs: the supervisor's loop.
struct Sticky;

static STICKS: AtomicBool = AtomicBool::new(false);

#[async_trait::async_trait]
impl Task for Sticky {
    fn name(&self) -> &str {
        while STICKS.load(Ordering::SeqCst) {
            std::thread::sleep(Duration::from_millis(10));
        }
        "sticky"
    }

    async fn run(&self, context: TaskContext) -> Result<(), TaskError> {
        context.stop_requested().await;
        Ok(())
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 6)]
async fn while_the_loop_hangs_the_watchdog_is_not_fed_and_health_is_bad() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("notify");
    let server = UnixDatagram::bind(&path).unwrap();
    server.set_read_timeout(Some(LIMIT)).unwrap();
    let notifier = Notifier::to(path.to_str().unwrap(), Some(Duration::from_millis(100)));
    let sticky = Supervised::new(Arc::new(Sticky), Policy::permanent());
    let agent = Agent::start_told(vec![sticky], notifier).await;
    while told(&server) != "WATCHDOG=1" {}
    STICKS.store(true, Ordering::SeqCst);
    // The loop asks for the name of the one task; nobody before it does.
    let control = agent.control.clone();
    let reload = tokio::spawn(async move { control.reload().await });
    // What was on its way when the loop began to hang.
    tokio::time::sleep(Duration::from_millis(300)).await;
    server.set_nonblocking(true).unwrap();
    while server.recv(&mut [0; 1000]).is_ok() {}
    tokio::time::sleep(Duration::from_millis(500)).await;
    let mut text = [0; 1000];
    while let Ok(length) = server.recv(&mut text) {
        assert_ne!(&text[..length], b"WATCHDOG=1", "the loop hangs");
    }
    assert_eq!(http(agent.http(), "GET /healthz").await.0, 503);
    STICKS.store(false, Ordering::SeqCst);
    let _ = reload.await.unwrap();
    server.set_nonblocking(false).unwrap();
    while told(&server) != "WATCHDOG=1" {}
    agent.stop().await;
}

fn told(server: &UnixDatagram) -> String {
    let mut text = [0; 1000];
    let length = server.recv(&mut text).unwrap();
    String::from_utf8_lossy(&text[..length]).into_owned()
}

/// The next datagram but for those about health and words for people.
fn next_state(server: &UnixDatagram) -> String {
    loop {
        let text = told(server);
        if !text.starts_with("STATUS=") && text != "WATCHDOG=1" {
            return text;
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn systemd_is_told_each_state_in_order_and_that_the_loop_lives() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("notify");
    let server = UnixDatagram::bind(&path).unwrap();
    server.set_read_timeout(Some(LIMIT)).unwrap();
    let notifier = Notifier::to(path.to_str().unwrap(), Some(Duration::from_millis(200)));
    let agent = Agent::start_told(vec![task("a", Does::Well)], notifier).await;
    assert_eq!(told(&server), "READY=1");
    let began = Instant::now();
    let mut beats = 0;
    while beats < 5 {
        beats += u32::from(told(&server) == "WATCHDOG=1");
    }
    assert!(began.elapsed() >= Duration::from_millis(350), "twice in its time, not more");
    agent.control.reload().await.unwrap();
    assert!(next_state(&server).starts_with("RELOADING=1\nMONOTONIC_USEC="));
    assert_eq!(next_state(&server), "READY=1");
    agent.stop().await;
    assert_eq!(next_state(&server), "STOPPING=1\nEXTEND_TIMEOUT_USEC=35000000", "20 s and a margin");
}
