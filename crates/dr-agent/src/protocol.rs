//! What the agent and those who ask it say to each other: one JSON object a line, over a socket.
//!
//! Described to the byte in `docs/formats/agent-protocol-v1.md`. During a rolling upgrade either end
//! may be the older one. So: fields that are not known are passed over, a request that is not known
//! is answered with what is, the name of a request never changes its meaning, and the answer says in
//! which version it is written: the asker's, if the agent still speaks it.

mod client;

use std::ops::RangeInclusive;
use std::time::Duration;

use dr_core::ErrorClass;
use serde::Deserialize;
use serde_json::{Value, json};

pub use client::Client;

use crate::resident::ResidentError;
use crate::supervise::TaskError;

/// The versions that this program speaks, as an agent and as a client.
pub const VERSIONS: RangeInclusive<u32> = 1..=1;
/// The requests that this program knows.
pub const REQUESTS: &[&str] = &["status", "reload", "stop"];

/// The longest request, in bytes with its end of line.
pub const REQUEST_LIMIT: usize = 64 << 10;
/// The longest answer that a client takes, in bytes with its end of line.
pub const ANSWER_LIMIT: usize = 4 << 20;
/// How many connections are served at once; one more is answered with an error.
pub const CONNECTIONS: usize = 32;
/// How long a connection may be silent before its request is complete.
pub const REQUEST_TIME: Duration = Duration::from_secs(10);
/// How long an asker may take to read its answer.
pub const ANSWER_TIME: Duration = Duration::from_secs(10);
/// How many requests one connection may make.
pub const REQUESTS_A_CONNECTION: u32 = 1000;
/// How long a reload may take.
pub const RELOAD_TIME: Duration = Duration::from_secs(60);

/// What is asked for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Request {
    /// How are you?
    Status,
    /// Read the configuration anew.
    Reload,
    /// Stop at the next safe point, or at once.
    Stop {
        /// At once.
        now: bool,
    },
}

/// A request as it is written. What is missing has its default; what is not known is passed over.
#[derive(Deserialize)]
struct Line {
    #[serde(default)]
    dr_agent: u32,
    #[serde(default)]
    request: String,
    #[serde(default)]
    now: bool,
}

/// A line of an asker: the version to answer in, and the request or why it cannot be answered.
pub fn read_request(line: &[u8], speaks: &RangeInclusive<u32>) -> (u32, Result<Request, ResidentError>) {
    let newest = *speaks.end();
    let line: Line = match serde_json::from_slice(line) {
        Ok(line) => line,
        Err(error) => return (newest, Err(ResidentError::Request { reason: what(&error) })),
    };
    if line.dr_agent < *speaks.start() {
        return (newest, Err(ResidentError::AskerTooOld { theirs: line.dr_agent, ours: speaks.clone() }));
    }
    let version = line.dr_agent.min(newest);
    let request = match line.request.as_str() {
        "status" => Request::Status,
        "reload" => Request::Reload,
        "stop" => Request::Stop { now: line.now },
        "" => return (version, Err(ResidentError::Request { reason: "it names no request".into() })),
        other => {
            let name: String = other.chars().take(60).collect();
            return (version, Err(ResidentError::UnknownRequest { name, ours: speaks.clone() }));
        }
    };
    (version, Ok(request))
}

/// What is wrong with a line, without what is written there: serde's own words repeat values.
fn what(error: &serde_json::Error) -> String {
    let wrong = match error.classify() {
        serde_json::error::Category::Data => "a field has the wrong type, or it is no object",
        _ => "it is no JSON",
    };
    format!("{wrong} (column {})", error.column())
}

/// An answer as a line.
pub fn write_answer(version: u32, answer: Result<Value, &ResidentError>) -> String {
    let document = match answer {
        Ok(value) => json!({ "dr_agent": version, "ok": value }),
        Err(error) => {
            let told = match error {
                // An error of the configuration that was refused is told as itself.
                ResidentError::Refused { class, code, message, hint } => {
                    json!({ "class": class, "code": code, "message": message, "hint": hint })
                }
                error => json!(TaskError::of(error)),
            };
            json!({ "dr_agent": version, "error": told, "speaks": speaks() })
        }
    };
    format!("{document}\n")
}

/// What this program speaks, for answers.
pub fn speaks() -> Value {
    json!({ "lowest": VERSIONS.start(), "newest": VERSIONS.end(), "requests": REQUESTS })
}

/// A request as a line.
pub fn write_request(request: &Request) -> String {
    let version = VERSIONS.end();
    let document = match request {
        Request::Status => json!({ "dr_agent": version, "request": "status" }),
        Request::Reload => json!({ "dr_agent": version, "request": "reload" }),
        Request::Stop { now } => json!({ "dr_agent": version, "request": "stop", "now": now }),
    };
    format!("{document}\n")
}

/// An answer's content. `place` is where it came from, for messages.
pub fn read_answer(line: &[u8], place: &str) -> Result<Value, ResidentError> {
    let socket = || place.to_owned();
    let bad = |reason: String| ResidentError::Answer { socket: socket(), reason };
    let document: Value = serde_json::from_slice(line).map_err(|error| bad(what(&error)))?;
    let version = document.get("dr_agent").and_then(Value::as_u64);
    let version = version.ok_or_else(|| bad("it has no dr_agent, the version".into()))?;
    // An error has one shape in all versions, so that any two can tell each other this much.
    if let Some(error) = document.get("error") {
        let text = |name: &str| error.get(name).and_then(Value::as_str).map(str::to_owned);
        let class = error.get("class").cloned().and_then(|class| serde_json::from_value(class).ok());
        return Err(ResidentError::Refused {
            // A class that only a newer agent knows.
            class: class.unwrap_or(ErrorClass::Unsupported),
            code: text("code").unwrap_or_else(|| "agent-refused".into()),
            message: text("message").ok_or_else(|| bad("its error has no message".into()))?,
            hint: text("hint"),
        });
    }
    if !u32::try_from(version).is_ok_and(|version| VERSIONS.contains(&version)) {
        return Err(ResidentError::AgentVersion { socket: socket(), theirs: version, ours: VERSIONS });
    }
    document.get("ok").cloned().ok_or_else(|| bad("it has neither ok nor error".into()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use dr_core::Classified;

    fn asked(line: &str, speaks: RangeInclusive<u32>) -> (u32, Result<Request, (&'static str, String)>) {
        let (version, request) = read_request(line.as_bytes(), &speaks);
        (version, request.map_err(|error| (error.code(), error.to_string())))
    }

    #[test]
    fn an_old_client_is_answered_in_its_own_version_while_the_agent_still_speaks_it() {
        let line = r#"{"dr_agent":1,"request":"stop"}"#;
        assert_eq!(asked(line, 1..=3), (1, Ok(Request::Stop { now: false })));
        let (version, refused) = asked(line, 2..=3);
        let (code, text) = refused.expect_err("it is too old");
        assert_eq!((version, code), (3, "agent-version"));
        assert!(text.contains("version 1") && text.contains("2 to 3"), "{text}");
        let (version, refused) = asked(r#"{"request":"status"}"#, 1..=1);
        assert_eq!((version, refused.expect_err("no version").0), (1, "agent-version"));
    }

    #[test]
    fn a_newer_client_is_answered_in_the_newest_version_that_the_agent_speaks() {
        let line = r#"{"dr_agent":2,"request":"status","colour":["new"],"now":false}"#;
        assert_eq!(asked(line, 1..=1), (1, Ok(Request::Status)));
        let (version, refused) = asked(r#"{"dr_agent":2,"request":"dance"}"#, 1..=1);
        let (code, text) = refused.expect_err("it is not known");
        assert_eq!((version, code), (1, "agent-unsupported"));
        assert!(REQUESTS.iter().all(|name| text.contains(name)), "{text}");
    }

    #[test]
    fn every_request_is_read_as_it_was_written() {
        let stops = [true, false].map(|now| Request::Stop { now });
        for request in [&[Request::Status, Request::Reload][..], &stops].concat() {
            let line = write_request(&request);
            assert!(REQUESTS.iter().any(|name| line.contains(name)));
            let (version, read) = read_request(line.as_bytes(), &VERSIONS);
            assert_eq!((version, read.ok()), (*VERSIONS.end(), Some(request)));
        }
    }

    #[test]
    fn what_is_no_request_is_answered_without_repeating_it() {
        for line in ["", "hunter2", "[]", "{}", r#"{"dr_agent":"hunter2"}"#, r#"{"dr_agent":-1}"#] {
            let (version, request) = read_request(line.as_bytes(), &VERSIONS);
            let told = write_answer(version, Err(&request.expect_err("it is none")));
            assert!(told.contains(r#""dr_agent":1"#) && !told.contains("hunter2"), "{told}");
        }
    }

    #[test]
    fn an_answer_of_another_version_says_how_to_go_on() {
        for version in [0, 2, u64::MAX] {
            let line = json!({ "dr_agent": version, "ok": {} }).to_string();
            let error = read_answer(line.as_bytes(), "/run/x").expect_err("another version");
            assert_eq!((error.code(), error.class()), ("agent-version", ErrorClass::Unsupported));
            assert!(error.to_string().contains(&format!("version {version}")), "{error}");
            let hint = error.hint().expect("the way out");
            assert!(hint.contains(if version == 0 { "Restart the agent" } else { "newer dr" }), "{hint}");
        }
    }

    #[test]
    fn an_error_is_understood_whatever_the_version_and_the_class() {
        let line =
            r#"{"dr_agent":9,"error":{"class":"tired","code":"x-y","message":"no","hint":"sleep","new":1}}"#;
        match read_answer(line.as_bytes(), "/run/x") {
            Err(ResidentError::Refused { class, code, message, hint }) => {
                assert_eq!((class, code.as_str(), message.as_str()), (ErrorClass::Unsupported, "x-y", "no"));
                assert_eq!(hint.as_deref(), Some("sleep"));
            }
            other => panic!("{other:?}"),
        }
        for line in ["", "[]", "{}", r#"{"dr_agent":1}"#, r#"{"dr_agent":1,"error":{}}"#] {
            let error = read_answer(line.as_bytes(), "/run/x").expect_err("no answer");
            assert_eq!(error.code(), "agent-protocol", "{line}");
        }
    }
}
