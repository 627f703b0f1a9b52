//! Asks an agent.

use std::path::{Path, PathBuf};
use std::time::Duration;

use serde_json::Value;
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::UnixStream;

use super::{ANSWER_LIMIT, RELOAD_TIME, Request, read_answer, write_request};
use crate::resident::ResidentError;

/// How long an agent may take to answer what needs no work.
const ANSWER_WAIT: Duration = Duration::from_secs(15);

/// Asks the agent behind a socket; each request is a connection of its own.
#[derive(Clone, Debug)]
pub struct Client {
    socket: PathBuf,
}

impl Client {
    /// Of the agent behind this socket.
    pub fn new(socket: impl Into<PathBuf>) -> Self {
        Client { socket: socket.into() }
    }

    /// Where it asks.
    pub fn socket(&self) -> &Path {
        &self.socket
    }

    /// The answer to a request.
    pub async fn ask(&self, request: &Request) -> Result<Value, ResidentError> {
        let place = self.socket.display().to_string();
        let limit = match request {
            Request::Reload => RELOAD_TIME + ANSWER_WAIT,
            _ => ANSWER_WAIT,
        };
        let line = tokio::time::timeout(limit, self.exchange(&write_request(request)))
            .await
            .map_err(|_| ResidentError::Late { socket: place.clone(), limit })??;
        read_answer(&line, &place)
    }

    async fn exchange(&self, request: &str) -> Result<Vec<u8>, ResidentError> {
        let failed = |source| ResidentError::NoAgent { socket: self.socket.display().to_string(), source };
        let mut stream = UnixStream::connect(&self.socket).await.map_err(failed)?;
        stream.write_all(request.as_bytes()).await.map_err(failed)?;
        let mut line = Vec::new();
        let mut bounded = BufReader::new(stream).take(ANSWER_LIMIT as u64);
        bounded.read_until(b'\n', &mut line).await.map_err(failed)?;
        if line.last() != Some(&b'\n') {
            let reason = if line.len() >= ANSWER_LIMIT {
                format!("it is longer than {}", dr_core::size::bytes(ANSWER_LIMIT as u64))
            } else {
                "it ended in the middle".to_owned()
            };
            return Err(ResidentError::Answer { socket: self.socket.display().to_string(), reason });
        }
        Ok(line)
    }
}
