//! The agent beside a real server: its check sees the server go and come back, and keeps out of a
//! backup's way.
#![allow(clippy::unwrap_used, missing_docs)]

mod common;

use std::fs::File;
use std::io::Write;
use std::process::Child;
use std::time::{Duration, Instant};

use common::{Shop, json};
use dr_testkit::pg::command;
use serde_json::Value;

const LIMIT: Duration = Duration::from_secs(60);

struct Agent<'a> {
    shop: &'a Shop,
    child: Child,
}

impl Drop for Agent<'_> {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl<'a> Agent<'a> {
    fn start(shop: &'a Shop) -> Self {
        let mut file = File::options().append(true).open(shop.at("dr.toml")).unwrap();
        let socket = shop.at("agent.sock");
        let text = format!("\n[agent]\nsocket = '{socket}'\nlisten = ''\ncheck_interval = '1s'\n");
        file.write_all(text.as_bytes()).unwrap();
        let log = File::create(shop.at("agent.log")).unwrap();
        let mut run = command(&shop.dr);
        run.current_dir(shop.scratch.path()).args(["--config", &shop.at("dr.toml"), "agent", "run"]);
        let child = run.stdout(log.try_clone().unwrap()).stderr(log).spawn().unwrap();
        Agent { shop, child }
    }

    fn log(&self) -> String {
        std::fs::read_to_string(self.shop.at("agent.log")).unwrap()
    }

    /// Waits until a round of the check that ended after `since` finds what it should.
    fn until(&self, what: &str, holds: impl Fn(&[Value]) -> bool) {
        let end = Instant::now() + LIMIT;
        let mut last = Value::Null;
        while Instant::now() < end {
            let output = self.shop.dr(&["--config", &self.shop.at("dr.toml"), "agent", "status", "--json"]);
            if output.status.success() {
                last = json(&String::from_utf8(output.stdout).unwrap())["result"].clone();
                let findings = last["tasks"][0]["detail"]["findings"].as_array();
                if findings.is_some_and(|findings| holds(findings)) {
                    return;
                }
            }
            std::thread::sleep(Duration::from_millis(100));
        }
        panic!("{what}: {last:#}\n{}", self.log());
    }
}

fn bad(findings: &[Value]) -> Vec<&str> {
    let bad = findings.iter().filter(|finding| finding["verdict"] == "bad");
    bad.map(|finding| finding["check"].as_str().unwrap()).collect()
}

#[test]
fn the_check_sees_the_server_go_and_come_back_and_backups_go_on_beside_it() {
    let shop = Shop::open();
    let mut agent = Agent::start(&shop);
    let good = |findings: &[Value]| findings.len() > 5 && bad(findings).is_empty();
    agent.until("all is well", good);
    shop.job(&["backup"]);
    shop.job(&["backup"]);
    agent.until("all is well after backups", good);
    shop.cluster.stop("fast");
    agent.until("the server is gone", |findings| bad(findings) == ["server"]);
    shop.cluster.start();
    agent.until("all is well again", good);
    let status = json(&shop.job(&["agent", "status", "--json"]))["result"].clone();
    assert_eq!((&status["ready"], &status["tasks"][0]["restarts"]), (&true.into(), &0.into()));
    let probes = std::fs::read_dir(shop.at("repo/dr-probe")).map(|entries| entries.count()).unwrap_or(0);
    assert!(probes <= 1, "what the check writes is removed: {probes}");
    shop.job(&["agent", "stop"]);
    assert_eq!(agent.child.wait().unwrap().code(), Some(0), "{}", agent.log());
}
