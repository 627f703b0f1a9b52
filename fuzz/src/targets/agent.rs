//! What an agent and those who ask it read from each other.

use dr_agent::protocol::{Request, VERSIONS, read_answer, read_request, write_answer, write_request};

use crate::{Answer, Target};

pub(super) fn targets() -> Vec<Target> {
    vec![request(), answer()]
}

/// Lines of whoever may connect to the socket. Whatever they are, the answer is one line that says
/// in which version it is written.
fn request() -> Target {
    let known = [Request::Status, Request::Reload, Request::Stop { now: true }];
    let mut seeds: Vec<Vec<u8>> = known.iter().map(|request| write_request(request).into_bytes()).collect();
    seeds.push(br#"{"dr_agent":7,"request":"status","since":[1,{"a":null}]}"#.to_vec());
    Target::new("agent-request", seeds, |bytes| {
        let (version, request) = read_request(bytes, &VERSIONS);
        assert!(VERSIONS.contains(&version), "it answers in a version that it speaks");
        let line = match &request {
            Ok(_) => write_answer(version, Ok(true.into())),
            Err(error) => write_answer(version, Err(error)),
        };
        assert!(line.ends_with('\n') && line.matches('\n').count() == 1, "an answer is one line");
        assert_eq!(read_answer(line.as_bytes(), "here").is_ok(), request.is_ok());
        request.map(drop).into()
    })
}

/// Lines of an agent of any version.
fn answer() -> Target {
    let seeds = [
        r#"{"dr_agent":1,"ok":{"ready":true,"tasks":[{"name":"check","state":"running"}]}}"#,
        r#"{"dr_agent":1,"ok":null}"#,
    ];
    let seeds = seeds.iter().map(|seed| seed.as_bytes().to_vec()).collect();
    Target::new("agent-answer", seeds, |bytes| match read_answer(bytes, "here") {
        Ok(_) => Answer::Taken,
        Err(error) => {
            assert!(!dr_core::Classified::code(&error).is_empty());
            Answer::Refused(error.to_string())
        }
    })
}
