//! The socket: who has it, and the connections on it.
//!
//! An agent holds the lock of `<socket>.lock` for as long as its process lives, however it ends, so
//! that a socket whose lock is free belongs to a dead one and is replaced. Two agents that start at
//! the same moment meet at the lock, not at the socket.

use std::fs::{File, OpenOptions, TryLockError};
use std::io::{Error, ErrorKind};
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};

use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::{UnixListener, UnixStream};
use tokio::task::JoinSet;
use tokio::time::timeout;

use super::error::ResidentError;
use super::{ACCEPT_PAUSE, Control, Served, Stopped};
use crate::protocol::{
    ANSWER_TIME, CONNECTIONS, REQUEST_LIMIT, REQUEST_TIME, REQUESTS_A_CONNECTION, VERSIONS, read_request,
    write_answer,
};

/// Who may ask: the agent's user and group.
const MODE: u32 = 0o660;

/// A socket that is this agent's own, until it is dropped.
#[derive(Debug)]
pub(super) struct Place {
    path: PathBuf,
    /// Before the lock, so that the socket is removed while it is still held.
    _socket: Removed,
    _lock: File,
}

/// A name that is removed when this is dropped.
#[derive(Debug)]
struct Removed(PathBuf);

impl Drop for Removed {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.0);
    }
}

impl Place {
    /// Takes a socket, in place of a dead agent's.
    pub fn take(path: &Path) -> Result<(Place, UnixListener), ResidentError> {
        let failed = |what: &str, source: Error| ResidentError::Socket {
            socket: path.display().to_string(),
            what: what.to_owned(),
            source,
        };
        let lock = lock(path)?;
        match std::fs::symlink_metadata(path) {
            Err(error) if error.kind() == ErrorKind::NotFound => {}
            Err(error) => return Err(failed("it cannot be looked at", error)),
            Ok(meta) if !meta.file_type().is_socket() => {
                return Err(failed("there is something else of this name", ErrorKind::AlreadyExists.into()));
            }
            Ok(_) => {
                // Whoever answers without holding the lock is not ours to push aside.
                if std::os::unix::net::UnixStream::connect(path).is_ok() {
                    return Err(ResidentError::Running { socket: path.display().to_string() });
                }
                std::fs::remove_file(path)
                    .map_err(|error| failed("a dead agent's socket cannot be removed", error))?;
            }
        }
        let listener = UnixListener::bind(path).map_err(|error| failed("binding failed", error))?;
        let place = Place { path: path.to_owned(), _socket: Removed(path.to_owned()), _lock: lock };
        // Connecting takes the right to write, which a usual umask gives to the owner alone.
        std::fs::set_permissions(path, std::fs::Permissions::from_mode(MODE))
            .map_err(|error| failed("its mode cannot be set", error))?;
        Ok((place, listener))
    }

    pub fn path(&self) -> &Path {
        &self.path
    }
}

fn lock(socket: &Path) -> Result<File, ResidentError> {
    let mut path = socket.as_os_str().to_owned();
    path.push(".lock");
    let failed = |source: Error| ResidentError::Socket {
        socket: socket.display().to_string(),
        what: format!("its lock {} cannot be taken", Path::new(&path).display()),
        source,
    };
    let file = OpenOptions::new()
        .create(true)
        .truncate(false)
        .write(true)
        .mode(0o600)
        .open(&path)
        .map_err(failed)?;
    match file.try_lock() {
        Ok(()) => Ok(file),
        Err(TryLockError::WouldBlock) => Err(ResidentError::Running { socket: socket.display().to_string() }),
        Err(TryLockError::Error(error)) => Err(failed(error)),
    }
}

/// Answers whoever connects, until it is stopped.
pub(super) fn serve(listener: UnixListener, control: Control) -> Served {
    Served::begin(|stopped| accept(listener, control, stopped))
}

async fn accept(listener: UnixListener, control: Control, stopped: Stopped) {
    let mut connections = JoinSet::new();
    loop {
        tokio::select! {
            () = stopped.asked() => break,
            Some(_) = connections.join_next() => {}
            accepted = listener.accept() => match accepted {
                Ok((stream, _)) if connections.len() >= CONNECTIONS => {
                    let busy = ResidentError::Busy { limit: CONNECTIONS };
                    let line = write_answer(*VERSIONS.end(), Err(&busy));
                    // It fits into any socket's buffer; who does not read it is not waited for.
                    let _ = stream.try_write(line.as_bytes());
                }
                Ok((stream, _)) => {
                    connections.spawn(connection(stream, control.clone(), stopped.clone()));
                }
                Err(error) => {
                    tracing::warn!("the agent's socket takes no connection: {error}");
                    tokio::time::sleep(ACCEPT_PAUSE).await;
                }
            },
        }
    }
    // Answers under way, such as that of the reload that moved the socket.
    let _ = timeout(ANSWER_TIME, async { while connections.join_next().await.is_some() {} }).await;
}

async fn connection(stream: UnixStream, control: Control, stopped: Stopped) {
    let (read, mut write) = stream.into_split();
    let mut read = BufReader::new(read);
    for _ in 0..REQUESTS_A_CONNECTION {
        let mut line = Vec::new();
        let mut bounded = (&mut read).take(REQUEST_LIMIT as u64);
        let got = tokio::select! {
            () = stopped.asked() => return,
            got = timeout(REQUEST_TIME, bounded.read_until(b'\n', &mut line)) => got,
        };
        let (answer, last) = match got {
            Ok(Ok(0)) | Ok(Err(_)) => return,
            Ok(Ok(_)) if line.last() == Some(&b'\n') => (answer(&line, &control).await, false),
            Ok(Ok(_)) if line.len() >= REQUEST_LIMIT => (refuse("it is longer than a request may be"), true),
            Ok(Ok(_)) => (refuse("it ended in the middle: a request ends with a line feed"), true),
            Err(_) => (refuse("it did not come in time"), true),
        };
        if !matches!(timeout(ANSWER_TIME, write.write_all(answer.as_bytes())).await, Ok(Ok(()))) || last {
            return;
        }
    }
}

fn refuse(reason: &str) -> String {
    write_answer(*VERSIONS.end(), Err(&ResidentError::Request { reason: reason.to_owned() }))
}

async fn answer(line: &[u8], control: &Control) -> String {
    let (version, request) = read_request(line, &VERSIONS);
    let answer = match request {
        Ok(request) => control.answer(request).await,
        Err(error) => Err(error),
    };
    write_answer(version, answer.as_ref().map(Clone::clone))
}

#[cfg(test)]
mod tests {
    use super::*;
    use dr_core::{Classified, ErrorClass};

    fn refused(path: &Path) -> ResidentError {
        Place::take(path).map(|_| ()).expect_err("it cannot be taken")
    }

    #[tokio::test]
    async fn a_socket_of_a_living_agent_is_refused_and_a_dead_ones_replaced() {
        let dir = tempfile::tempdir().expect("a directory");
        let path = dir.path().join("a.sock");
        let (living, listener) = Place::take(&path).expect("a socket");
        assert_eq!(std::fs::metadata(&path).expect("it is there").permissions().mode() & 0o777, MODE);
        assert!(matches!(refused(&path), ResidentError::Running { .. }));
        drop((living, listener));
        assert!(!path.exists(), "an orderly end removes it");
        drop(std::os::unix::net::UnixListener::bind(&path).expect("left behind"));
        assert!(path.exists());
        Place::take(&path).expect("a dead one's is replaced");
    }

    #[tokio::test]
    async fn who_has_the_lock_has_the_socket_even_before_it_is_there() {
        let dir = tempfile::tempdir().expect("a directory");
        let path = dir.path().join("a.sock");
        let starting = lock(&path).expect("the lock of one that starts");
        drop(std::os::unix::net::UnixListener::bind(&path).expect("a dead one's"));
        assert!(matches!(refused(&path), ResidentError::Running { .. }));
        assert!(path.exists(), "nothing was removed under the other's hands");
        drop(starting);
        Place::take(&path).expect("the lock goes with its holder");
    }

    #[tokio::test]
    async fn one_who_answers_without_the_lock_is_not_pushed_aside() {
        let dir = tempfile::tempdir().expect("a directory");
        let path = dir.path().join("a.sock");
        let _other = std::os::unix::net::UnixListener::bind(&path).expect("somebody else's");
        assert!(matches!(refused(&path), ResidentError::Running { .. }));
        assert!(path.exists());
    }

    #[tokio::test]
    async fn what_cannot_be_a_socket_is_refused_with_the_way_out_and_nothing_is_removed() {
        let dir = tempfile::tempdir().expect("a directory");
        let file = dir.path().join("file");
        std::fs::write(&file, "precious").expect("a file");
        let error = refused(&file);
        assert_eq!((error.class(), error.code()), (ErrorClass::Invalid, "agent-socket"));
        assert_eq!(std::fs::read_to_string(&file).expect("still there"), "precious");
        let error = refused(&dir.path().join("none/a.sock"));
        assert_eq!(error.class(), ErrorClass::Missing);
        assert!(error.hint().expect("the way out").contains("RuntimeDirectory"));
        let error = refused(&dir.path().join("x".repeat(120)));
        assert!(error.hint().expect("the way out").contains("107"), "{error:?}");
    }
}
