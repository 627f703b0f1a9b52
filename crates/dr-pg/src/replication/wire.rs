//! Framed messages over a stream, with a limit on each wait.

use std::io;
use std::time::Duration;

use bytes::{Buf, BytesMut};
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use super::error::ReplicationError;
use super::messages::{self, HEADER, Message};
use super::patience::Patience;
use crate::conn::Stream;

/// The longest message that is taken, in bytes. Servers send at most 128 KiB of WAL and 40 KiB of
/// a backup at once; a longer length is a broken stream, not a reason to ask for memory.
pub const MAX_MESSAGE: usize = 16 << 20;

/// Bytes asked of the socket at once.
const READ_SIZE: usize = 256 << 10;

pub(super) struct Wire {
    stream: Stream,
    inbox: BytesMut,
    pub server: String,
    pub patience: Patience,
    /// A message was cut off while it was sent: nothing can follow it.
    broken: bool,
}

impl Wire {
    pub fn new(stream: Stream, server: String) -> Self {
        Wire { stream, inbox: BytesMut::new(), server, patience: Patience::default(), broken: false }
    }

    /// Sends bytes, whole. Not cancel-safe: dropped half way, the connection is at its end, and
    /// later calls say so.
    pub async fn send(&mut self, bytes: &[u8]) -> Result<(), ReplicationError> {
        if self.broken {
            return Err(self.lost("an earlier message was cut off"));
        }
        self.broken = true;
        let limit = self.patience.send;
        let sent = tokio::time::timeout(limit, async {
            self.stream.write_all(bytes).await?;
            self.stream.flush().await
        });
        match sent.await {
            Ok(Ok(())) => self.broken = false,
            Ok(Err(error)) => return Err(self.lost(error)),
            Err(_) => return Err(self.late("take a message", limit)),
        }
        Ok(())
    }

    /// The next message; notices are logged and passed over. `limit` bounds the silence before it.
    ///
    /// Cancel safety: nothing is lost when this is dropped.
    pub async fn receive(&mut self, doing: &str, limit: Duration) -> Result<Message, ReplicationError> {
        loop {
            match self.take()? {
                Some(Message::Notice(said)) => {
                    tracing::info!(server = %self.server, code = %said.code, "{}", said.message);
                }
                Some(Message::ParameterStatus(..) | Message::Other(_)) => {}
                Some(message) => return Ok(message),
                None => self.fill(doing, limit).await?,
            }
        }
    }

    /// The next message of an answer that needs no thought.
    pub async fn receive_soon(&mut self, doing: &str) -> Result<Message, ReplicationError> {
        self.receive(doing, self.patience.command).await
    }

    /// The next message of any kind; for the handshake.
    pub async fn receive_any(&mut self, doing: &str, limit: Duration) -> Result<Message, ReplicationError> {
        loop {
            match self.take()? {
                Some(message) => return Ok(message),
                None => self.fill(doing, limit).await?,
            }
        }
    }

    /// A whole message from the buffer.
    fn take(&mut self) -> Result<Option<Message>, ReplicationError> {
        if self.inbox.len() < HEADER {
            return Ok(None);
        }
        let tag = self.inbox[0];
        let len = u32::from_be_bytes([self.inbox[1], self.inbox[2], self.inbox[3], self.inbox[4]]) as usize;
        if !(4..=MAX_MESSAGE).contains(&len) {
            return Err(self.protocol(format!("a message {:?} of {len} bytes", char::from(tag))));
        }
        if self.inbox.len() <= len {
            return Ok(None);
        }
        let mut frame = self.inbox.split_to(len + 1);
        frame.advance(HEADER);
        messages::parse(tag, frame.freeze()).map(Some).map_err(|reason| self.protocol(reason))
    }

    async fn fill(&mut self, doing: &str, limit: Duration) -> Result<(), ReplicationError> {
        self.inbox.reserve(READ_SIZE);
        match tokio::time::timeout(limit, self.stream.read_buf(&mut self.inbox)).await {
            Ok(Ok(0)) => Err(self.lost("the server closed the connection")),
            Ok(Ok(_)) => Ok(()),
            Ok(Err(error)) if error.kind() == io::ErrorKind::Interrupted => Ok(()),
            Ok(Err(error)) => Err(self.lost(error)),
            Err(_) => Err(self.late(doing, limit)),
        }
    }

    pub fn lost(&self, reason: impl ToString) -> ReplicationError {
        ReplicationError::Unreachable { server: self.server.clone(), reason: reason.to_string() }
    }

    pub fn late(&self, doing: &str, limit: Duration) -> ReplicationError {
        ReplicationError::Late { server: self.server.clone(), doing: doing.to_owned(), limit }
    }

    pub fn protocol(&self, reason: impl Into<String>) -> ReplicationError {
        ReplicationError::Protocol { server: self.server.clone(), reason: reason.into() }
    }

    /// The error for a message that does not belong here.
    pub fn unexpected(&self, doing: &str, message: &Message) -> ReplicationError {
        match message {
            Message::Error(said) => self.said(doing, said),
            other => self.protocol(format!("an unexpected answer when asked to {doing}: {}", name(other))),
        }
    }

    pub fn said(&self, doing: &str, said: &messages::ServerSaid) -> ReplicationError {
        ReplicationError::Server {
            server: self.server.clone(),
            doing: doing.to_owned(),
            code: said.code.clone(),
            message: said.message.clone(),
        }
    }
}

/// A message without its content, which may be long or secret.
fn name(message: &Message) -> String {
    let text = format!("{message:?}");
    text.split(['(', ' ']).next().unwrap_or_default().to_owned()
}
