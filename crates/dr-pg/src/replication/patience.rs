//! How long a server may be silent.

use std::time::Duration;

/// How long each kind of wait may last before the server counts as gone.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Patience {
    /// For the answer to a command that only looks something up.
    pub command: Duration,
    /// For the start of a backup: it waits for a checkpoint, which a busy server spreads over its
    /// interval.
    pub checkpoint: Duration,
    /// Between two bytes of a backup: the server itself has no time-out for one.
    pub backup: Duration,
    /// Between two messages of a stream of WAL: a server sends a keepalive after half of
    /// `wal_sender_timeout` (60 s by default) without a word from here.
    pub stream: Duration,
    /// For the socket to take what is sent.
    pub send: Duration,
}

impl Default for Patience {
    fn default() -> Self {
        Patience {
            command: Duration::from_secs(60),
            checkpoint: Duration::from_secs(3600),
            backup: Duration::from_secs(300),
            stream: Duration::from_secs(120),
            send: Duration::from_secs(60),
        }
    }
}

impl Patience {
    /// The same limit for every wait.
    pub fn of(limit: Duration) -> Self {
        Patience { command: limit, checkpoint: limit, backup: limit, stream: limit, send: limit }
    }
}
