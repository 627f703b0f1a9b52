//! Ending what another connection is doing (`CancelRequest`, manual, "Message Formats").

use bytes::Bytes;
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use super::error::ReplicationError;
use crate::conn::{ConnInfo, Endpoint, link};

/// 1234 and 5678.
const CANCEL_REQUEST: u32 = 80_877_102;

/// What a server needs to end a command of another connection.
#[derive(Clone, Debug)]
pub(super) struct CancelKey {
    pub endpoint: Endpoint,
    pub process: u32,
    /// Four bytes, and up to 256 from protocol 3.2 on.
    pub secret: Bytes,
}

/// Ends the command that a connection is busy with, such as a backup. It can be kept by whoever may
/// want to end it, and used at any time; where nothing runs nothing happens.
#[derive(Clone)]
pub struct Canceller {
    info: ConnInfo,
    key: CancelKey,
    encrypted: bool,
}

impl std::fmt::Debug for Canceller {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Canceller").field("server", &self.server()).finish_non_exhaustive()
    }
}

impl Canceller {
    pub(super) fn new(info: ConnInfo, key: CancelKey, encrypted: bool) -> Self {
        Canceller { info, key, encrypted }
    }

    fn server(&self) -> String {
        self.key.endpoint.to_string()
    }

    /// Asks the server over a connection of its own. `Ok` means that it was asked: the command ends
    /// with SQLSTATE 57014, unless it was over before. A server that cannot get rid of what it sends
    /// looks only when the client reads again.
    pub async fn cancel(&self) -> Result<(), ReplicationError> {
        let unreachable = |reason: String| ReplicationError::Unreachable { server: self.server(), reason };
        let opened = link(&self.info, &self.key.endpoint, !self.encrypted).await;
        let mut link = opened.map_err(|error| unreachable(error.to_string()))?;
        let secret = &self.key.secret;
        let mut out = Vec::with_capacity(12 + secret.len());
        out.extend_from_slice(&(12 + secret.len() as u32).to_be_bytes());
        out.extend_from_slice(&CANCEL_REQUEST.to_be_bytes());
        out.extend_from_slice(&self.key.process.to_be_bytes());
        out.extend_from_slice(secret);
        let sent = async {
            link.stream.write_all(&out).await?;
            link.stream.flush().await?;
            // The server closes when it has passed the request on.
            link.stream.read(&mut [0; 1]).await
        };
        let limit = self.info.connect_limit;
        match tokio::time::timeout(limit, sent).await {
            Ok(Ok(_)) => Ok(()),
            // It closes without the words that TLS ends with.
            Ok(Err(error)) if error.kind() == std::io::ErrorKind::UnexpectedEof => Ok(()),
            Ok(Err(error)) => Err(unreachable(error.to_string())),
            Err(_) => {
                let (server, doing) = (self.server(), "take a request to cancel".to_owned());
                Err(ReplicationError::Late { server, doing, limit })
            }
        }
    }
}
