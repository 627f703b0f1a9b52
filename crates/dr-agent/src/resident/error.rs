//! Why the resident agent does not run, or does not do what it is asked.

use std::net::SocketAddr;
use std::ops::RangeInclusive;
use std::time::Duration;

use dr_core::{Classified, ErrorClass};
use thiserror::Error;

use crate::supervise::SuperviseError;

/// Why the resident agent does not run, or does not do what it is asked.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum ResidentError {
    /// Another agent has the socket.
    #[error("an agent runs already, on the socket {socket}")]
    Running {
        /// The socket.
        socket: String,
    },
    /// The socket cannot be made.
    #[error("the socket {socket} cannot be made: {what}")]
    Socket {
        /// The socket.
        socket: String,
        /// What is wrong.
        what: String,
        /// Why.
        source: std::io::Error,
    },
    /// The address for HTTP cannot be listened on.
    #[error("agent.listen = {address} cannot be listened on")]
    Listen {
        /// The address.
        address: SocketAddr,
        /// Why.
        source: std::io::Error,
    },
    /// Nobody answers.
    #[error("no agent answers on the socket {socket}")]
    NoAgent {
        /// The socket.
        socket: String,
        /// Why.
        source: std::io::Error,
    },
    /// Somebody is there and does not answer.
    #[error("the agent on {socket} did not answer within {} s", limit.as_secs())]
    Late {
        /// The socket.
        socket: String,
        /// How long it was waited for.
        limit: Duration,
    },
    /// What answers does not speak the protocol.
    #[error("what answers on {socket} is no agent, or its answer was cut off: {reason}")]
    Answer {
        /// The socket.
        socket: String,
        /// What is wrong with the answer.
        reason: String,
    },
    /// The agent answers in another version.
    #[error(
        "the agent on {socket} speaks version {theirs} of the protocol; this dr {} speaks {}",
        crate::VERSION,
        range(ours)
    )]
    AgentVersion {
        /// The socket.
        socket: String,
        /// What it speaks.
        theirs: u64,
        /// What this program speaks.
        ours: RangeInclusive<u32>,
    },
    /// The asker speaks a version that this agent no longer speaks.
    #[error(
        "you speak version {theirs} of the protocol; this agent, dr {}, speaks {}",
        crate::VERSION,
        range(ours)
    )]
    AskerTooOld {
        /// What the asker speaks.
        theirs: u32,
        /// What this program speaks.
        ours: RangeInclusive<u32>,
    },
    /// A request that this agent does not know.
    #[error(
        "this agent, dr {}, does not know the request {name:?}; it speaks {} of the protocol and knows {}",
        crate::VERSION,
        range(ours),
        crate::protocol::REQUESTS.join(", ")
    )]
    UnknownRequest {
        /// Its name.
        name: String,
        /// What this program speaks.
        ours: RangeInclusive<u32>,
    },
    /// What is no request.
    #[error("the request cannot be read: {reason}")]
    Request {
        /// What is wrong with it.
        reason: String,
    },
    /// More askers than the agent serves at once.
    #[error("the agent serves {limit} askers already")]
    Busy {
        /// How many it serves.
        limit: usize,
    },
    /// The agent said no; or what it said no with.
    #[error("{message}")]
    Refused {
        /// The class of its error.
        class: ErrorClass,
        /// The code of its error.
        code: String,
        /// What it said.
        message: String,
        /// Its way out.
        hint: Option<String>,
    },
    /// The configuration took too long to read.
    #[error("reading the configuration took more than {} s", limit.as_secs())]
    LoadLate {
        /// How long it may take.
        limit: Duration,
    },
    /// It stops, and changes nothing any more.
    #[error("the agent is stopping")]
    Stopping,
    /// It still runs after it was asked to stop.
    #[error("the agent on {socket} still runs {} s after it was asked to stop", limit.as_secs())]
    StillRuns {
        /// The socket.
        socket: String,
        /// How long it was waited for.
        limit: Duration,
    },
    /// Tasks did not reach their safe point.
    #[error("the agent has stopped, but these tasks did not reach a safe point and were cut off: {}", tasks.join(", "))]
    Cut {
        /// Their names.
        tasks: Vec<String>,
    },
    /// A defect.
    #[error("{what}")]
    Bug {
        /// What happened.
        what: String,
    },
}

fn range(versions: &RangeInclusive<u32>) -> String {
    match (versions.start(), versions.end()) {
        (lowest, newest) if lowest == newest => format!("version {newest}"),
        (lowest, newest) => format!("versions {lowest} to {newest}"),
    }
}

impl From<SuperviseError> for ResidentError {
    fn from(error: SuperviseError) -> Self {
        match error {
            SuperviseError::Stopping => ResidentError::Stopping,
            other => ResidentError::Bug { what: other.to_string() },
        }
    }
}

fn of_io(source: &std::io::Error) -> ErrorClass {
    match source.kind() {
        std::io::ErrorKind::NotFound | std::io::ErrorKind::ConnectionRefused => ErrorClass::Missing,
        std::io::ErrorKind::PermissionDenied => ErrorClass::Denied,
        std::io::ErrorKind::AddrInUse => ErrorClass::Fenced,
        std::io::ErrorKind::StorageFull => ErrorClass::Exhausted,
        std::io::ErrorKind::InvalidInput | std::io::ErrorKind::AddrNotAvailable => ErrorClass::Invalid,
        std::io::ErrorKind::AlreadyExists | std::io::ErrorKind::NotADirectory => ErrorClass::Invalid,
        _ => ErrorClass::Transient,
    }
}

impl Classified for ResidentError {
    fn class(&self) -> ErrorClass {
        match self {
            ResidentError::Running { .. } => ErrorClass::Fenced,
            ResidentError::Socket { source, .. }
            | ResidentError::Listen { source, .. }
            | ResidentError::NoAgent { source, .. } => of_io(source),
            ResidentError::Late { .. }
            | ResidentError::LoadLate { .. }
            | ResidentError::Busy { .. }
            | ResidentError::Stopping
            | ResidentError::StillRuns { .. } => ErrorClass::Transient,
            ResidentError::Answer { .. } => ErrorClass::Corrupt,
            ResidentError::AgentVersion { .. }
            | ResidentError::AskerTooOld { .. }
            | ResidentError::UnknownRequest { .. } => ErrorClass::Unsupported,
            ResidentError::Request { .. } => ErrorClass::Invalid,
            ResidentError::Refused { class, .. } => *class,
            ResidentError::Cut { .. } => ErrorClass::Cancelled,
            ResidentError::Bug { .. } => ErrorClass::Bug,
        }
    }

    fn code(&self) -> &'static str {
        match self {
            ResidentError::Running { .. } => "agent-running",
            ResidentError::Socket { .. } => "agent-socket",
            ResidentError::Listen { .. } => "agent-listen",
            ResidentError::NoAgent { .. } => "agent-unreachable",
            ResidentError::Late { .. } | ResidentError::LoadLate { .. } => "agent-late",
            ResidentError::Answer { .. } => "agent-protocol",
            ResidentError::AgentVersion { .. } | ResidentError::AskerTooOld { .. } => "agent-version",
            ResidentError::UnknownRequest { .. } => "agent-unsupported",
            ResidentError::Request { .. } => "agent-request",
            ResidentError::Busy { .. } => "agent-busy",
            ResidentError::Refused { .. } => "agent-refused",
            ResidentError::Stopping => "agent-stopping",
            ResidentError::StillRuns { .. } => "agent-still-runs",
            ResidentError::Cut { .. } => "agent-stop-cut",
            ResidentError::Bug { .. } => "agent-bug",
        }
    }

    fn hint(&self) -> Option<String> {
        Some(match self {
            ResidentError::Running { .. } => {
                "Ask it with `dr agent status`, end it with `dr agent stop`; or give this one another agent.socket and agent.listen.".into()
            }
            ResidentError::Socket { source, .. } => socket_hint(source),
            ResidentError::Listen { source, .. } => listen_hint(source),
            ResidentError::NoAgent { source, .. } => match source.kind() {
                std::io::ErrorKind::PermissionDenied => {
                    "The socket is open to the agent's user and group: ask as one of them.".into()
                }
                _ => "Start it: `systemctl start dr-agent`, or `dr agent run`. If it runs elsewhere, name its socket with --socket or agent.socket.".into(),
            },
            ResidentError::Late { .. } => "Look into its log; `systemctl restart dr-agent` starts it anew.".into(),
            ResidentError::LoadLate { .. } => {
                "Something that the configuration refers to does not answer: a command after exec:, or a file on a store that hangs.".into()
            }
            ResidentError::Answer { .. } => "Name the agent's own socket with --socket or agent.socket.".into(),
            ResidentError::AgentVersion { theirs, ours, .. } if *theirs < u64::from(*ours.start()) => {
                "The agent is older. Restart the agent with this dr: `systemctl restart dr-agent`.".into()
            }
            ResidentError::AgentVersion { .. } => {
                "The agent is newer. Ask it with the newer dr that it was started from (`dr --version` tells which this is).".into()
            }
            ResidentError::AskerTooOld { .. } => {
                "Ask with the dr that the agent was started from; until then it goes on as it is.".into()
            }
            ResidentError::UnknownRequest { .. } => {
                "If the asker is newer: restart the agent with the same dr (`systemctl restart dr-agent`).".into()
            }
            ResidentError::Request { .. } => "docs/formats/agent-protocol-v1.md describes requests.".into(),
            ResidentError::Busy { .. } => "Ask again; find out who holds connections to its socket.".into(),
            ResidentError::Refused { hint, .. } => return hint.clone(),
            ResidentError::Stopping => "Wait until it has stopped, and start it again.".into(),
            ResidentError::StillRuns { .. } => {
                "`dr agent status` shows what it waits for; `dr agent stop --now` cuts that off.".into()
            }
            ResidentError::Cut { .. } => {
                "What they left is what a crash leaves: nothing is damaged. Give them more time with agent.stop_timeout.".into()
            }
            ResidentError::Bug { .. } => "Report it with the agent's log.".into(),
        })
    }
}

fn socket_hint(source: &std::io::Error) -> String {
    match source.kind() {
        std::io::ErrorKind::NotFound => {
            "Its directory is not there. The unit dr-agent.service makes /run/dr (RuntimeDirectory=dr); by hand: `install -d -o postgres /run/dr`. Or set agent.socket to a path in a directory of yours."
        }
        std::io::ErrorKind::PermissionDenied => {
            "This user may not write there: run the agent as the user whose directory it is, or set agent.socket to a path in a directory of yours."
        }
        std::io::ErrorKind::AlreadyExists => {
            "Something else has this name, and it is not removed. Set agent.socket to another path."
        }
        std::io::ErrorKind::InvalidInput => {
            "The path of a socket has at most 107 bytes: set agent.socket to a shorter one."
        }
        _ => "Set agent.socket to a path where this user may make a socket.",
    }
    .to_owned()
}

fn listen_hint(source: &std::io::Error) -> String {
    match source.kind() {
        std::io::ErrorKind::AddrInUse => {
            "Another program listens there (`ss -ltnp` names it). Set agent.listen to another port, or to \"\" to do without."
        }
        std::io::ErrorKind::PermissionDenied => {
            "A port below 1024 needs a privilege: set agent.listen to a higher one."
        }
        _ => "Set agent.listen to an address of this host, or to \"\" to do without.",
    }
    .to_owned()
}
