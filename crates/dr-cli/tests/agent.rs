//! The resident agent as its user meets it: the real program, its socket, its signals.
#![allow(clippy::unwrap_used, missing_docs)]

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::os::unix::net::UnixDatagram;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use serde_json::{Value, json};

/// How long a test waits for what must happen.
const LIMIT: Duration = Duration::from_secs(30);
/// The signals that are sent (signal(7)).
const HUP: i32 = 1;
const KILL: i32 = 9;
const TERM: i32 = 15;

/// A directory with a configuration, a repository without encryption and a server that is not there.
struct Place(tempfile::TempDir);

impl Place {
    fn make() -> Self {
        let place = Place(tempfile::tempdir().unwrap());
        std::fs::create_dir(place.at("repo")).unwrap();
        let descriptor = json!({
            "format": 1, "features_required": [], "id": "00112233445566778899aabbccddeeff", "extent": 262144,
            "suite": "none", "compression_level": 1, "key_epoch": 1, "public_key": "",
            "created": "2026-01-01T00:00:00Z",
        });
        std::fs::write(place.at("repo/repo.json"), descriptor.to_string()).unwrap();
        place.configure("", "");
        place
    }

    fn at(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    /// Writes the configuration; `connection` stands for the server, `more` goes into [agent].
    fn configure(&self, connection: &str, more: &str) {
        let base = self.0.path().display();
        let connection = if connection.is_empty() { format!("host={base}") } else { connection.to_owned() };
        let text = format!(
            "[repository]\nurl = '{base}/repo'\n[cluster]\nconnection = '{connection}'\n\
             [agent]\nsocket = '{base}/agent.sock'\n{more}\n"
        );
        std::fs::write(self.at("dr.toml"), text).unwrap();
    }

    fn command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_dr"));
        command.env_clear().env("PATH", "/usr/bin:/bin").current_dir(self.0.path()).stdin(Stdio::null());
        // Any port: what the tests of the file do not say.
        if arguments.get(1) == Some(&"run") {
            command.env("DR__AGENT__LISTEN", "127.0.0.1:0");
        }
        command.args(["--config", "dr.toml"]).args(arguments);
        command
    }

    fn dr(&self, arguments: &[&str]) -> Output {
        self.command(arguments).output().unwrap()
    }

    /// The result of a command as JSON.
    fn ask(&self, arguments: &[&str]) -> Value {
        let output = self.dr(&[arguments, &["--json"]].concat());
        assert!(output.status.success(), "{arguments:?}: {output:?}");
        let document: Value = serde_json::from_slice(&output.stdout).unwrap();
        assert_eq!(document["command"], arguments.join(" "));
        document["result"].clone()
    }

    fn start(&self) -> Agent {
        self.start_with(|_| {})
    }

    fn start_with(&self, change: impl FnOnce(&mut Command)) -> Agent {
        let log = std::fs::File::create(self.at("log")).unwrap();
        let mut command = self.command(&["agent", "run"]);
        change(&mut command);
        let child = command.stdout(log.try_clone().unwrap()).stderr(log).spawn().unwrap();
        let agent = Agent { child, log: self.at("log") };
        until("the agent runs", || agent.said("the agent runs"));
        agent
    }
}

/// The agent as a process; it does not outlive its test.
struct Agent {
    child: Child,
    log: PathBuf,
}

impl Agent {
    fn signal(&self, number: i32) {
        let pid = self.child.id().to_string();
        assert!(Command::new("kill").args([format!("-{number}"), pid]).status().unwrap().success());
    }

    fn log(&self) -> String {
        std::fs::read_to_string(&self.log).unwrap()
    }

    fn said(&self, words: &str) -> bool {
        self.log().contains(words)
    }

    fn runs(&mut self) -> bool {
        self.child.try_wait().unwrap().is_none()
    }

    /// Its exit code, within the limit.
    fn exit(&mut self) -> Option<i32> {
        let end = Instant::now() + LIMIT;
        loop {
            if let Some(status) = self.child.try_wait().unwrap() {
                return status.code();
            }
            assert!(Instant::now() < end, "the agent does not end: {}", self.log());
            std::thread::sleep(Duration::from_millis(10));
        }
    }
}

impl Drop for Agent {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn until(what: &str, holds: impl Fn() -> bool) {
    let end = Instant::now() + LIMIT;
    while !holds() {
        assert!(Instant::now() < end, "{what}");
        std::thread::sleep(Duration::from_millis(10));
    }
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

fn http(address: &str, path: &str) -> (u16, String) {
    let mut stream = TcpStream::connect(address).unwrap();
    stream.set_read_timeout(Some(LIMIT)).unwrap();
    stream.write_all(format!("GET {path} HTTP/1.1\r\nHost: test\r\n\r\n").as_bytes()).unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    let (head, body) = answer.split_once("\r\n\r\n").unwrap();
    (head.split(' ').nth(1).unwrap().parse().unwrap(), body.to_owned())
}

/// A server that takes connections and says nothing for a while, or for ever.
fn mute_server(silence: Option<Duration>) -> String {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    std::thread::spawn(move || {
        let mut held = Vec::new();
        for stream in listener.incoming() {
            match silence {
                Some(silence) => std::thread::sleep(silence),
                None => held.push(stream),
            }
        }
    });
    format!("host=127.0.0.1 port={port} sslmode=disable connect_timeout=600")
}

fn check_of(status: &Value) -> &Value {
    &status["tasks"][0]
}

#[test]
fn it_runs_is_asked_and_stops_and_every_command_speaks_json() {
    let place = Place::make();
    let mut agent = place.start();
    until("the check ran", || check_of(&place.ask(&["agent", "status"]))["detail"]["verdict"] == "bad");
    let status = place.ask(&["agent", "status"]);
    assert_eq!((&status["ready"], &status["phase"]), (&true.into(), &"running".into()));
    assert_eq!(status["pid"], agent.child.id());
    let findings = check_of(&status)["detail"]["findings"].as_array().unwrap();
    let found: Vec<&str> = findings.iter().map(|finding| finding["check"].as_str().unwrap()).collect();
    assert!(["server", "storage-writable", "keys"].iter().all(|check| found.contains(check)), "{found:?}");

    let address = status["listen"].as_str().unwrap();
    assert_eq!(http(address, "/healthz").0, 200);
    assert_eq!(http(address, "/readyz").0, 200);
    let metrics = http(address, "/metrics").1;
    assert!(metrics.contains("\ndr_check_findings{verdict=\"bad\"} 1\n"), "{metrics}");

    let people = text(&place.dr(&["agent", "status"]).stdout);
    assert!(people.starts_with("ready  dr ") && people.contains("check: bad: server"), "{people}");
    assert!(people.contains("Is PostgreSQL running"), "the way out: {people}");
    assert_eq!(place.ask(&["agent", "reload"])["tasks"]["kept"], json!(["check"]));
    assert_eq!(place.ask(&["agent", "stop"])["pid"], agent.child.id());
    assert_eq!(agent.exit(), Some(0));
    assert!(!place.at("agent.sock").exists());
    let output = place.dr(&["agent", "status"]);
    assert_eq!(output.status.code(), Some(13));
    assert!(text(&output.stderr).contains("systemctl start dr-agent"), "{output:?}");
}

#[test]
fn the_command_itself_ends_with_json_too() {
    let place = Place::make();
    let mut agent = place.start_with(|command| {
        command.arg("--json");
    });
    agent.signal(TERM);
    assert_eq!(agent.exit(), Some(0));
    let log = agent.log();
    let document: Value = serde_json::from_str(&log[log.find('{').unwrap()..]).unwrap();
    assert_eq!((&document["command"], &document["result"]["reloads"]), (&"agent run".into(), &0.into()));
}

#[test]
fn after_kill_9_the_next_one_takes_the_dead_ones_socket() {
    let place = Place::make();
    let mut agent = place.start();
    agent.signal(KILL);
    agent.exit();
    assert!(place.at("agent.sock").exists(), "it was left behind");
    let mut next = place.start();
    assert_eq!(place.ask(&["agent", "status"])["pid"], next.child.id());
    next.signal(TERM);
    assert_eq!(next.exit(), Some(0));
}

#[test]
fn a_second_agent_on_one_socket_is_refused_and_the_first_lives_on() {
    let place = Place::make();
    let mut agent = place.start();
    let second = place.dr(&["agent", "run"]);
    assert_eq!(second.status.code(), Some(12), "{second:?}");
    let said = text(&second.stderr);
    assert!(said.contains("an agent runs already") && said.contains("agent-running"), "{said}");
    assert!(agent.runs());
    assert_eq!(place.ask(&["agent", "status"])["pid"], agent.child.id());
}

#[test]
fn of_agents_that_start_at_the_same_moment_one_wins() {
    let place = Place::make();
    // A dead one's socket, which both want to replace.
    drop(std::os::unix::net::UnixListener::bind(place.at("agent.sock")).unwrap());
    let start = |_| place.command(&["agent", "run"]).stderr(Stdio::null()).spawn().unwrap();
    let mut all: Vec<Child> = (0..6).map(start).collect();
    until("one answers", || place.dr(&["agent", "status"]).status.success());
    until("the others gave up", || {
        let alive = |child: &Child| Path::new(&format!("/proc/{}/exe", child.id())).read_link().is_ok();
        all.iter().filter(|child| alive(child)).count() == 1
    });
    place.ask(&["agent", "stop"]);
    let mut codes: Vec<Option<i32>> = all.iter_mut().map(|child| child.wait().unwrap().code()).collect();
    codes.sort();
    assert_eq!(codes, [&[Some(0)][..], &[Some(12); 5]].concat());
}

#[test]
fn a_signal_lets_a_running_task_reach_its_safe_point() {
    let place = Place::make();
    place.configure(&mute_server(Some(Duration::from_secs(2))), "");
    let mut agent = place.start();
    std::thread::sleep(Duration::from_millis(300));
    assert_eq!(check_of(&place.ask(&["agent", "status"]))["detail"], Value::Null, "the check is at work");
    agent.signal(TERM);
    until("it drains", || place.dr(&["agent", "status"]).stdout.starts_with(b"NOT READY"));
    assert_eq!(agent.exit(), Some(0), "{}", agent.log());
    assert!(agent.said("the check's verdict is"), "it went to its end: {}", agent.log());
}

#[test]
fn what_does_not_reach_its_safe_point_in_time_is_cut_off_and_told() {
    let place = Place::make();
    place.configure(&mute_server(None), "stop_timeout = '500ms'");
    let mut agent = place.start();
    std::thread::sleep(Duration::from_millis(300));
    agent.signal(TERM);
    assert_eq!(agent.exit(), Some(19));
    assert!(agent.said("were cut off: check") && agent.said("agent-stop-cut"), "{}", agent.log());
}

#[test]
fn a_second_signal_does_not_wait() {
    let place = Place::make();
    place.configure(&mute_server(None), "stop_timeout = '1h'");
    let mut agent = place.start();
    std::thread::sleep(Duration::from_millis(300));
    agent.signal(TERM);
    until("it drains", || agent.said("the agent stops"));
    std::thread::sleep(Duration::from_millis(200));
    assert!(agent.runs());
    agent.signal(TERM);
    assert_eq!(agent.exit(), Some(19));
}

#[test]
fn stop_now_does_not_wait_and_stop_tells_when_it_still_runs() {
    let place = Place::make();
    place.configure(&mute_server(None), "stop_timeout = '1h'");
    let mut agent = place.start();
    std::thread::sleep(Duration::from_millis(300));
    let late = place.dr(&["agent", "stop", "--timeout", "300ms"]);
    assert_eq!(late.status.code(), Some(10), "{late:?}");
    assert!(text(&late.stderr).contains("dr agent stop --now"), "{late:?}");
    let now = place.dr(&["agent", "stop", "--now"]);
    assert!(now.status.success(), "{now:?}");
    assert_eq!(agent.exit(), Some(19));
}

#[test]
fn a_broken_file_is_refused_with_its_error_and_the_old_settings_stay() {
    let place = Place::make();
    let mut agent = place.start();
    let address = place.ask(&["agent", "status"])["listen"].as_str().unwrap().to_owned();
    let socket = place.at("agent.sock").display().to_string();
    for (broken, code) in [("x = [", "config-syntax"), ("x = 1", "config-unknown-key")] {
        place.configure("", broken);
        let output = place.dr(&["agent", "reload", "--socket", &socket]);
        assert_eq!(output.status.code(), Some(16), "{output:?}");
        let said = text(&output.stderr);
        assert!(said.contains("dr.toml") && said.contains(code), "{said}");
    }
    place.configure("", "check_interval = '10ms'");
    let output = place.dr(&["agent", "reload"]);
    assert!(text(&output.stderr).contains("at least 1 s"), "{output:?}");
    let (status, body) = http(&address, "/readyz");
    assert!(status == 503 && body.contains("the last reload was refused"), "{body}");
    let metrics = http(&address, "/metrics").1;
    assert!(metrics.contains("dr_agent_config_reloads_total{result=\"refused\"} 3\n"), "{metrics}");

    // Mended, with something else for the check: it alone is started anew, and not as a failure.
    place.configure("", "check_interval = '2min'");
    assert_eq!(place.ask(&["agent", "reload"])["tasks"]["restarted"], json!(["check"]));
    assert_eq!(http(&address, "/readyz").0, 200);
    let status = place.ask(&["agent", "status"]);
    assert_eq!(check_of(&status)["restarts"], 0);
    // Another limit for stopping is nobody's but the supervisor's.
    place.configure("", "check_interval = '2min'\nstop_timeout = '7s'");
    agent.signal(HUP);
    until("it was reloaded", || place.ask(&["agent", "status"])["configuration"]["reloads"] == 2);
    assert_eq!(place.ask(&["agent", "status"])["stop_timeout_seconds"], 7.0);
    assert!(agent.said("\"kept\":[\"check\"]") && agent.runs());
}

#[test]
fn a_reload_with_a_file_that_cannot_be_read_asks_the_agent_of_the_flags() {
    let place = Place::make();
    let _agent = place.start();
    place.configure("", "x = [");
    let setting = format!("agent.socket={}", place.at("agent.sock").display());
    let output = place.dr(&["agent", "reload", "--set", &setting]);
    let said = text(&output.stderr);
    assert!(said.contains("warning:") && said.contains("error:") && said.contains("config-syntax"), "{said}");
}

#[test]
fn a_port_that_is_taken_is_told_with_the_way_out() {
    let place = Place::make();
    let taken = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = taken.local_addr().unwrap().to_string();
    let output = place.command(&["agent", "run"]).env("DR__AGENT__LISTEN", &address).output().unwrap();
    assert_eq!(output.status.code(), Some(12), "{output:?}");
    let said = text(&output.stderr);
    for words in [&address[..], "ss -ltnp", "Set agent.listen", "agent-listen"] {
        assert!(said.contains(words), "{words}: {said}");
    }
    assert!(!place.at("agent.sock").exists(), "nothing is left behind");
    // Without HTTP it runs beside whoever has the port.
    let mut agent = place.start_with(|command| {
        command.env("DR__AGENT__LISTEN", "");
    });
    assert_eq!(place.ask(&["agent", "status"])["listen"], Value::Null);
    agent.signal(TERM);
    assert_eq!(agent.exit(), Some(0));
}

#[test]
fn a_socket_directory_that_is_not_there_is_told_with_the_way_out() {
    let place = Place::make();
    let socket = place.at("none/agent.sock").display().to_string();
    let output = place.command(&["agent", "run"]).env("DR__AGENT__SOCKET", &socket).output().unwrap();
    assert_eq!(output.status.code(), Some(13), "{output:?}");
    let said = text(&output.stderr);
    for words in [&socket[..], "RuntimeDirectory=dr", "install -d", "agent-socket"] {
        assert!(said.contains(words), "{words}: {said}");
    }
}

#[test]
fn a_configuration_that_could_never_work_does_not_start() {
    let place = Place::make();
    for (flag, code) in [
        ("repository.url=ftp://x", "storage-invalid"),
        ("repository.url=", "config-missing"),
        ("agent.listen=everywhere", "config-bad-value"),
        ("encryption.key_file=/nonexistent/key", "key-unreadable"),
    ] {
        let output = place.dr(&["agent", "run", "--set", flag]);
        assert!(!output.status.success() && text(&output.stderr).contains(code), "{flag}: {output:?}");
    }
}

#[test]
fn systemd_is_told_of_start_life_reload_and_stop() {
    let place = Place::make();
    let server = UnixDatagram::bind(place.at("notify")).unwrap();
    server.set_read_timeout(Some(LIMIT)).unwrap();
    let next = || {
        let mut text = [0; 2000];
        let length = server.recv(&mut text).unwrap();
        String::from_utf8_lossy(&text[..length]).into_owned()
    };
    let next_state = || loop {
        match next() {
            text if text.starts_with("STATUS=") || text == "WATCHDOG=1" => {}
            text => return text,
        }
    };
    let notify = place.at("notify");
    let mut agent = place.start_with(|command| {
        command.env("NOTIFY_SOCKET", &notify).env("WATCHDOG_USEC", "400000");
    });
    assert_eq!(next(), "READY=1");
    let (mut lives, mut ready) = (false, false);
    while !(lives && ready) {
        let text = next();
        (lives, ready) = (lives || text == "WATCHDOG=1", ready || text.starts_with("STATUS=ready"));
    }
    agent.signal(HUP);
    assert!(next_state().starts_with("RELOADING=1\nMONOTONIC_USEC="));
    assert_eq!(next_state(), "READY=1");
    agent.signal(TERM);
    assert_eq!(next_state(), "STOPPING=1\nEXTEND_TIMEOUT_USEC=75000000");
    assert_eq!(agent.exit(), Some(0));
}

#[test]
fn a_watchdog_of_another_process_is_not_fed() {
    let place = Place::make();
    let server = UnixDatagram::bind(place.at("notify")).unwrap();
    server.set_read_timeout(Some(Duration::from_millis(600))).unwrap();
    let notify = place.at("notify");
    let _agent = place.start_with(|command| {
        command.env("NOTIFY_SOCKET", &notify).env("WATCHDOG_USEC", "100000").env("WATCHDOG_PID", "1");
    });
    let mut text = [0; 2000];
    while let Ok(length) = server.recv(&mut text) {
        assert_ne!(&text[..length], b"WATCHDOG=1");
    }
}

/// The value of a key in the unit that is packaged.
fn of_unit(key: &str) -> String {
    let unit = concat!(env!("CARGO_MANIFEST_DIR"), "/../../packaging/systemd/dr-agent.service");
    let text = std::fs::read_to_string(unit).unwrap();
    let line = text.lines().find_map(|line| line.strip_prefix(&format!("{key}=")));
    line.unwrap_or_else(|| panic!("{key} is not in {unit}")).to_owned()
}

#[test]
fn the_unit_fits_the_program() {
    let place = Place::make();
    for key in ["ExecStart", "ExecReload"] {
        let line = of_unit(key);
        let words: Vec<&str> = line.split(' ').collect();
        assert_eq!(words[0], "/usr/bin/dr");
        assert!(place.dr(&[&words[1..], &["--help"]].concat()).status.success(), "{line}");
    }
    std::fs::write(place.at("dr.toml"), "").unwrap();
    let settings: Value = serde_json::from_slice(&place.dr(&["config", "show", "--json"]).stdout).unwrap();
    let default = |name: &str| settings["result"][name]["value"].as_str().unwrap().to_owned();
    assert_eq!(default("agent.socket"), format!("/run/{}/agent.sock", of_unit("RuntimeDirectory")));
    let cut = dr_core::ErrorClass::Cancelled.exit_code();
    assert_eq!(of_unit("RestartPreventExitStatus"), cut.to_string());
    let agents = dr_core::size::parse_duration(&default("agent.stop_timeout")).unwrap();
    let systemds = Duration::from_secs(of_unit("TimeoutStopSec").parse().unwrap());
    assert!(systemds >= agents + Duration::from_secs(20), "the agent itself cuts off, and tells what");
}
