//! An agent with planted tasks in this process, and ways to ask it without its own client.
#![allow(dead_code, clippy::unwrap_used, missing_docs)]

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use dr_agent::AgentError;
use dr_agent::resident::{Control, Notifier, Plan, Resident, Summary};
use dr_agent::supervise::{Policy, Supervised, Task, TaskContext, TaskError};
use dr_agent::wire::HostClock;
use serde_json::Value;

/// How long a test waits for what must happen.
pub const LIMIT: Duration = Duration::from_secs(20);

/// What a planted task does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Does {
    /// It runs until it is asked to stop.
    Well,
    /// It fails at once, each time.
    Fail,
    /// It does not hear that it should stop.
    Deaf,
}

pub struct Planted(pub &'static str, pub Does);

#[async_trait::async_trait]
impl Task for Planted {
    fn name(&self) -> &str {
        self.0
    }

    async fn run(&self, context: TaskContext) -> Result<(), TaskError> {
        match self.1 {
            Does::Fail => return Err(TaskError::bug("planted")),
            Does::Deaf => std::future::pending().await,
            Does::Well => context.stop_requested().await,
        }
        Ok(())
    }
}

pub fn task(name: &'static str, does: Does) -> Supervised {
    let wait = Duration::from_millis(10);
    let policy = Policy { first_wait: wait, longest_wait: wait, ..Policy::permanent() };
    Supervised::new(Arc::new(Planted(name, does)), policy).made_of(format!("{does:?}"))
}

/// A configuration that a test changes.
#[derive(Clone)]
pub struct Wanted {
    pub socket: PathBuf,
    pub listen: Option<SocketAddr>,
    pub stop_timeout: Duration,
    pub tasks: Vec<Supervised>,
    pub broken: bool,
}

/// An agent that runs in this process.
pub struct Agent {
    pub dir: tempfile::TempDir,
    pub wanted: Arc<Mutex<Wanted>>,
    pub control: Control,
    pub running: tokio::task::JoinHandle<Result<Summary, AgentError>>,
}

impl Agent {
    pub async fn start(tasks: Vec<Supervised>) -> Self {
        Self::start_told(tasks, Notifier::default()).await
    }

    pub async fn start_told(tasks: Vec<Supervised>, notifier: Notifier) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let wanted = Wanted {
            socket: dir.path().join("agent.sock"),
            listen: Some("127.0.0.1:0".parse().unwrap()),
            stop_timeout: LIMIT,
            tasks,
            broken: false,
        };
        let wanted = Arc::new(Mutex::new(wanted));
        let seen = wanted.clone();
        let load = move || {
            let wanted = seen.lock().unwrap().clone();
            if wanted.broken {
                return Err(AgentError::Missing { key: "planted.key", needed_for: "the test" });
            }
            let Wanted { socket, listen, stop_timeout, tasks, .. } = wanted;
            Ok(Plan { socket, listen, stop_timeout, tasks })
        };
        let resident = Resident::start(Arc::new(load), Arc::new(HostClock), notifier).await.unwrap();
        let control = resident.control();
        Agent { dir, wanted, control, running: tokio::spawn(resident.run()) }
    }

    pub fn socket(&self) -> PathBuf {
        self.wanted.lock().unwrap().socket.clone()
    }

    pub fn http(&self) -> SocketAddr {
        self.control.status()["listen"].as_str().unwrap().parse().unwrap()
    }

    pub fn change(&self, change: impl FnOnce(&mut Wanted)) {
        change(&mut self.wanted.lock().unwrap());
    }

    /// Waits until its status is as it should be.
    pub async fn until(&self, what: &str, holds: impl Fn(&Value) -> bool) {
        let end = Instant::now() + LIMIT;
        while !holds(&self.control.status()) {
            assert!(Instant::now() < end, "{what}: {:#}", self.control.status());
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }

    pub async fn ended(self) -> Result<Summary, AgentError> {
        tokio::time::timeout(LIMIT, self.running).await.unwrap().unwrap()
    }

    pub async fn stop(self) {
        self.control.stop(false).await.unwrap();
        self.ended().await.unwrap();
    }
}

/// Sends bytes and reads one line; `None` when the other end closes without one.
pub async fn raw(socket: &Path, request: impl Into<Vec<u8>>) -> Option<Value> {
    let (socket, request) = (socket.to_owned(), request.into());
    tokio::task::spawn_blocking(move || {
        let mut stream = UnixStream::connect(socket).unwrap();
        stream.set_read_timeout(Some(LIMIT)).unwrap();
        // The other end may refuse before it has read everything.
        let _ = stream.write_all(&request);
        let mut line = String::new();
        let got = BufReader::new(stream).read_line(&mut line);
        match got {
            Ok(0) | Err(_) => None,
            Ok(_) => Some(serde_json::from_str(&line).unwrap()),
        }
    })
    .await
    .unwrap()
}

/// Asks over HTTP; answers the code, the head and the body.
pub async fn http(address: SocketAddr, request: &str) -> (u16, String, String) {
    let request = format!("{request} HTTP/1.1\r\nHost: test\r\n\r\n");
    tokio::task::spawn_blocking(move || {
        let mut stream = TcpStream::connect(address).unwrap();
        stream.set_read_timeout(Some(LIMIT)).unwrap();
        stream.write_all(request.as_bytes()).unwrap();
        let mut text = String::new();
        stream.read_to_string(&mut text).unwrap();
        let (head, body) = text.split_once("\r\n\r\n").unwrap();
        let code = head.split(' ').nth(1).unwrap().parse().unwrap();
        (code, head.to_ascii_lowercase(), body.to_owned())
    })
    .await
    .unwrap()
}
