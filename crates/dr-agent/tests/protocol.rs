//! Old and new askers, old and new agents, and those who do not behave, over a real socket.
#![allow(clippy::unwrap_used, missing_docs)]

mod common;

use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::time::{Duration, Instant};

use common::{Agent, Does, LIMIT, raw, task};
use dr_agent::protocol::{ANSWER_LIMIT, CONNECTIONS, Client, REQUEST_LIMIT, REQUEST_TIME, REQUESTS, Request};
use dr_agent::resident::ResidentError;
use dr_core::{Classified, ErrorClass};

async fn agent() -> Agent {
    Agent::start(vec![task("a", Does::Well)]).await
}

#[tokio::test]
async fn an_old_client_with_fields_missing_is_understood() {
    let agent = agent().await;
    let answer = raw(&agent.socket(), "{\"dr_agent\":1,\"request\":\"status\"}\n").await.unwrap();
    assert_eq!(answer["dr_agent"], 1);
    assert_eq!(answer["ok"]["tasks"][0]["name"], "a");
    // `now` is missing: the careful meaning.
    let answer = raw(&agent.socket(), "{\"dr_agent\":1,\"request\":\"stop\"}\n").await.unwrap();
    assert_eq!(answer["ok"]["now"], false);
    agent.ended().await.unwrap();
}

#[tokio::test]
async fn a_client_older_than_all_that_the_agent_speaks_is_told_so_and_nothing_is_done() {
    let agent = agent().await;
    for line in ["{\"dr_agent\":0,\"request\":\"stop\"}\n", "{\"request\":\"stop\"}\n"] {
        let answer = raw(&agent.socket(), line).await.unwrap();
        let error = &answer["error"];
        assert_eq!((&error["class"], &error["code"]), (&"unsupported".into(), &"agent-version".into()));
        assert_eq!(answer["speaks"]["lowest"], 1);
        assert!(error["hint"].as_str().unwrap().contains("started from"));
    }
    assert_eq!(agent.control.status()["phase"], "running");
    agent.stop().await;
}

#[tokio::test]
async fn a_newer_client_is_answered_in_the_agents_version_and_its_new_fields_are_passed_over() {
    let agent = agent().await;
    let line = "{\"dr_agent\":2,\"request\":\"status\",\"since\":{\"new\":[1]},\"trace\":\"x\"}\n";
    let answer = raw(&agent.socket(), line).await.unwrap();
    assert_eq!((&answer["dr_agent"], &answer["ok"]["ready"]), (&1.into(), &true.into()));
    agent.stop().await;
}

#[tokio::test]
async fn a_request_that_only_a_newer_agent_knows_is_answered_with_what_this_one_speaks() {
    let agent = agent().await;
    for request in ["{\"dr_agent\":2,\"request\":\"backup\"}\n", "{\"dr_agent\":1,\"request\":\"backup\"}\n"]
    {
        let answer = raw(&agent.socket(), request).await.unwrap();
        assert_eq!(answer["dr_agent"], 1);
        let error = &answer["error"];
        assert_eq!((&error["class"], &error["code"]), (&"unsupported".into(), &"agent-unsupported".into()));
        let message = error["message"].as_str().unwrap();
        assert!(REQUESTS.iter().all(|name| message.contains(name)), "{message}");
        assert_eq!(answer["speaks"]["requests"], serde_json::json!(REQUESTS));
    }
    agent.stop().await;
}

#[tokio::test]
async fn several_requests_may_use_one_connection_and_a_bad_one_does_not_end_it() {
    let agent = agent().await;
    let socket = agent.socket();
    tokio::task::spawn_blocking(move || {
        let stream = UnixStream::connect(socket).unwrap();
        stream.set_read_timeout(Some(LIMIT)).unwrap();
        let mut lines = BufReader::new(&stream).lines();
        for (request, has) in [
            ("nonsense", "agent-request"),
            ("{\"dr_agent\":1,\"request\":\"status\"}", "\"ok\""),
            ("{\"dr_agent\":1}", "agent-request"),
            ("{\"dr_agent\":1,\"request\":\"status\"}", "\"ok\""),
        ] {
            (&stream).write_all(format!("{request}\n").as_bytes()).unwrap();
            let line = lines.next().unwrap().unwrap();
            assert!(line.contains(has), "{request}: {line}");
        }
    })
    .await
    .unwrap();
    agent.stop().await;
}

#[tokio::test]
async fn a_request_over_the_limit_or_cut_off_is_refused_and_the_agent_goes_on() {
    let agent = agent().await;
    let long = raw(&agent.socket(), vec![b'x'; REQUEST_LIMIT + 1]).await.unwrap();
    assert!(long["error"]["message"].as_str().unwrap().contains("longer"), "{long}");
    // The longest one that is allowed: blanks are no fault in JSON.
    let mut longest = b"{\"dr_agent\":1,\"request\":\"status\"}".to_vec();
    longest.resize(REQUEST_LIMIT - 1, b' ');
    longest.push(b'\n');
    assert_eq!(raw(&agent.socket(), longest).await.unwrap()["ok"]["ready"], true);
    let socket = agent.socket();
    let cut = tokio::task::spawn_blocking(move || {
        let mut stream = UnixStream::connect(socket).unwrap();
        stream.set_read_timeout(Some(LIMIT)).unwrap();
        stream.write_all(b"{\"dr_agent\":1,\"request\":\"stop\"}").unwrap();
        stream.shutdown(std::net::Shutdown::Write).unwrap();
        let mut text = String::new();
        stream.read_to_string(&mut text).unwrap();
        text
    });
    assert!(cut.await.unwrap().contains("in the middle"), "half a request is none");
    assert_eq!(agent.control.status()["phase"], "running");
    agent.stop().await;
}

#[tokio::test]
async fn one_connection_too_many_is_told_so_and_a_free_place_is_taken_again() {
    let agent = agent().await;
    let socket = agent.socket();
    let connect = || UnixStream::connect(&socket).unwrap();
    let mut held: Vec<UnixStream> = (0..CONNECTIONS).map(|_| connect()).collect();
    let error = Client::new(&socket).ask(&Request::Status).await.expect_err("it is full");
    let busy = matches!(&error, ResidentError::Refused { code, .. } if code == "agent-busy");
    // The end may be there before the request was sent.
    assert!(busy || matches!(error, ResidentError::NoAgent { .. }), "{error:?}");
    held.pop();
    let end = Instant::now() + LIMIT;
    while Client::new(&socket).ask(&Request::Status).await.is_err() {
        assert!(Instant::now() < end, "no place became free");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    drop(held);
    agent.stop().await;
}

#[tokio::test]
async fn slow_a_silent_connection_is_closed_after_its_time() {
    let agent = agent().await;
    let began = Instant::now();
    let answer = raw(&agent.socket(), "{\"dr_agent\":1,").await.unwrap();
    assert!(answer["error"]["message"].as_str().unwrap().contains("in time"), "{answer}");
    assert!(began.elapsed() >= REQUEST_TIME && began.elapsed() < REQUEST_TIME + LIMIT);
    agent.stop().await;
}

/// An agent of another version: reads a line and answers with another.
fn pretend(answer: Vec<u8>) -> (tempfile::TempDir, Client, std::thread::JoinHandle<String>) {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("a.sock");
    let listener = UnixListener::bind(&path).unwrap();
    let serving = std::thread::spawn(move || {
        let (mut stream, _) = listener.accept().unwrap();
        let mut line = String::new();
        BufReader::new(stream.try_clone().unwrap()).read_line(&mut line).unwrap();
        let _ = stream.write_all(&answer);
        line
    });
    (dir, Client::new(path), serving)
}

async fn refused(answer: &str) -> ResidentError {
    let (_dir, client, serving) = pretend(answer.into());
    let error = client.ask(&Request::Status).await.expect_err("it is no answer to take");
    serving.join().unwrap();
    error
}

#[tokio::test]
async fn a_client_that_meets_an_agent_of_another_version_says_so_and_how_to_go_on() {
    let newer = refused("{\"dr_agent\":2,\"ok\":{\"ready\":\"very\"}}\n").await;
    assert_eq!((newer.code(), newer.class()), ("agent-version", ErrorClass::Unsupported));
    assert!(newer.to_string().contains("speaks version 2"), "{newer}");
    assert!(newer.hint().unwrap().contains("newer dr"));
    let older = refused("{\"dr_agent\":0,\"ok\":{}}\n").await;
    assert!(older.hint().unwrap().contains("systemctl restart dr-agent"), "{older:?}");
    let told = "{\"dr_agent\":2,\"error\":{\"class\":\"unsupported\",\"code\":\"agent-version\",\"message\":\"m\",\"hint\":\"h\"}}\n";
    match refused(told).await {
        ResidentError::Refused { message, hint, .. } => {
            assert_eq!((message.as_str(), hint.as_deref()), ("m", Some("h")));
        }
        other => panic!("{other:?}"),
    }
}

#[tokio::test]
async fn what_is_no_agent_is_told_as_that() {
    for answer in ["", "SSH-2.0-OpenSSH\r\n", "{\"dr_agent\":1,\"ok\":", "[1]\n"] {
        let error = refused(answer).await;
        // A socket may also be reset before its answer was read.
        assert!(["agent-protocol", "agent-unreachable"].contains(&error.code()), "{answer:?}: {error:?}");
    }
    let error = refused(&"x".repeat(ANSWER_LIMIT + 1)).await;
    assert!(error.to_string().contains("longer than"), "{error}");
}

#[tokio::test]
async fn a_client_sends_its_version_and_nothing_that_an_old_agent_must_know() {
    let (_dir, client, serving) = pretend(b"{\"dr_agent\":1,\"ok\":{\"added\":\"later\"}}\n".to_vec());
    assert_eq!(client.ask(&Request::Status).await.unwrap()["added"], "later");
    assert_eq!(serving.join().unwrap(), "{\"dr_agent\":1,\"request\":\"status\"}\n");
}

#[tokio::test]
async fn where_no_agent_is_the_way_to_start_one_is_told() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("a.sock");
    let error = Client::new(&path).ask(&Request::Status).await.expect_err("nobody");
    assert_eq!((error.code(), error.class()), ("agent-unreachable", ErrorClass::Missing));
    assert!(error.hint().unwrap().contains("systemctl start dr-agent"));
    drop(UnixListener::bind(&path).unwrap());
    let error = Client::new(&path).ask(&Request::Status).await.expect_err("a dead one");
    assert_eq!(error.class(), ErrorClass::Missing);
}
