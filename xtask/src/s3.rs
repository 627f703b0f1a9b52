//! A real S3 server for the tests, from the distribution's packages (`xtask/env/s3-up.sh`).

use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use crate::environment::{self, root};

/// A server that runs until this is dropped.
pub struct Server {
    folder: PathBuf,
    port: u16,
}

impl Server {
    /// Starts a server with its data below `scratch`.
    pub fn start(scratch: &Path) -> Result<Server, String> {
        let (monitor, port) = (free_port()?, free_port()?);
        let server = Server { folder: scratch.join("s3"), port };
        let mut up = Command::new("bash");
        up.arg(root().join("xtask/env/s3-up.sh")).arg(environment::cache().join("s3-server"));
        up.arg(&server.folder).args([monitor.to_string(), port.to_string()]);
        environment::run("s3-up", Duration::from_secs(300), up)
            .map_err(|error| format!("no S3 server; --no-s3 leaves it out\n{error}"))?;
        Ok(server)
    }

    /// What tests look for.
    pub fn variables(&self) -> [(&'static str, String); 4] {
        [
            ("DR_TEST_S3_ENDPOINT", format!("http://127.0.0.1:{}", self.port)),
            ("DR_TEST_S3_BUCKET", "dr-test".to_owned()),
            ("DR_TEST_S3_KEY", "testkey".to_owned()),
            ("DR_TEST_S3_SECRET", "testsecret".to_owned()),
        ]
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let mut down = Command::new("bash");
        down.arg(root().join("xtask/env/s3-down.sh")).arg(&self.folder);
        if let Err(error) = environment::run("s3-down", Duration::from_secs(60), down) {
            eprintln!("{error}");
        }
    }
}

/// A port that nobody listens on, below the range from which the kernel gives ports to clients:
/// the monitor must find its own free however long the others have been talking.
fn free_port() -> Result<u16, String> {
    let first = 20_000 + (std::process::id() % 10_000) as u16;
    let free = |port: &u16| TcpListener::bind(("127.0.0.1", *port)).is_ok();
    let mut ports = first..first + 2_000;
    static TAKEN: std::sync::atomic::AtomicU16 = std::sync::atomic::AtomicU16::new(0);
    let skip = TAKEN.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
    ports
        .nth(usize::from(skip) * 100)
        .filter(free)
        .or_else(|| ports.find(free))
        .ok_or_else(|| "no free port".into())
}
