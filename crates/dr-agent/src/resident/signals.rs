//! What signals ask of the agent.

use tokio::signal::unix::{Signal, SignalKind, signal};

use super::Control;
use super::error::ResidentError;

/// The signals that the agent obeys, from now on: none of them ends the process any more.
#[derive(Debug)]
pub struct Signals {
    term: Signal,
    int: Signal,
    hup: Signal,
}

impl Signals {
    /// Begins to listen; before the agent starts, so that no signal can meet a process that does not.
    pub fn listen() -> Result<Self, ResidentError> {
        let listen = |kind| {
            signal(kind).map_err(|error| ResidentError::Bug {
                what: format!("signals cannot be listened for: {error}"),
            })
        };
        Ok(Signals {
            term: listen(SignalKind::terminate())?,
            int: listen(SignalKind::interrupt())?,
            hup: listen(SignalKind::hangup())?,
        })
    }

    /// Returns when SIGTERM or SIGINT comes.
    pub async fn stop_asked(&mut self) {
        tokio::select! {
            _ = self.term.recv() => {}
            _ = self.int.recv() => {}
        }
    }

    /// Obeys for as long as the agent runs: the first SIGTERM or SIGINT asks it to stop, the second
    /// cuts off what still runs; SIGHUP reloads. Returns only when the agent does not even answer the
    /// second: the process has to end without it.
    pub async fn obey(mut self, control: Control) -> ResidentError {
        let mut stops = 0;
        loop {
            tokio::select! {
                _ = self.term.recv() => stops += 1,
                _ = self.int.recv() => stops += 1,
                _ = self.hup.recv() => {
                    let control = control.clone();
                    // Beside this loop, which must hear the next signal. It logs how it went.
                    tokio::spawn(async move { drop(control.reload().await) });
                    continue;
                }
            }
            match control.stop(stops > 1).await {
                Ok(()) | Err(ResidentError::Stopping) => {}
                Err(error) if stops > 1 => return error,
                Err(error) => tracing::error!("the agent cannot be stopped: {error}; once more ends it"),
            }
        }
    }
}
