//! A network that fails on purpose, before a PostgreSQL server.
//!
//! A [`Proxy`] listens on a port or a socket of its own and passes on what is said. It counts the
//! messages of either side, so that a sweep first counts and then acts at each of them: after the
//! nth, or in its middle. Encrypted connections can only be cut after a number of bytes.

mod framing;

use std::io;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use bytes::BytesMut;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream, UnixListener, UnixStream};
use tokio::sync::watch;

use framing::{Framer, Phase, Piece};
pub use framing::{Session, Side};

/// Bytes read at once.
const CHUNK: usize = 128 << 10;

/// A throttled direction passes a part of its rate so often.
const TICK: Duration = Duration::from_millis(20);

/// How long a side that was told of the end may take to see it.
const GOODBYE: Duration = Duration::from_secs(1);

/// Where the server is.
#[derive(Clone, Debug)]
pub enum Upstream {
    /// Behind TCP.
    Tcp(SocketAddr),
    /// Behind a socket's file.
    Unix(PathBuf),
}

/// Where in a direction something happens.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Place {
    /// Right after so many whole messages.
    After(u64),
    /// Half way through the message after so many whole ones.
    Within(u64),
    /// After so many bytes.
    Byte(u64),
}

/// What happens there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Act {
    /// Nothing passes for a while, once.
    Delay(Duration),
    /// From there on only so many bytes a second pass.
    Throttle(u64),
    /// Nothing passes any more, either way, and the connection stays open.
    BlackHole,
    /// Both sides get a reset (on a unix socket: the end, as there is no reset).
    Reset,
    /// Both sides get the end.
    Close,
}

/// What happens to connections that begin from now on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Fault {
    /// Only to sessions of this kind; `None`: to any. What kind a session is shows in the client's
    /// first words, which come after the server's answer to a question for TLS.
    pub session: Option<Session>,
    /// In which direction it is counted.
    pub side: Side,
    /// Where.
    pub place: Place,
    /// What.
    pub act: Act,
}

/// What passed in one connection.
#[derive(Clone, Debug, Default)]
pub struct Seen {
    /// What kind of session it is.
    pub session: Session,
    /// Whole messages from the client, and bytes.
    pub frontend: (u64, u64),
    /// Whole messages from the server, and bytes.
    pub backend: (u64, u64),
    /// Tags of the server's messages, in order.
    pub tags: Vec<u8>,
    /// Whether the fault came about.
    pub hit: bool,
}

/// A proxy that runs until it is dropped, which ends its connections.
#[derive(Debug)]
pub struct Proxy {
    shared: Arc<Shared>,
    address: Address,
    thread: Option<std::thread::JoinHandle<()>>,
}

#[derive(Debug)]
enum Address {
    Tcp(SocketAddr),
    Unix(PathBuf, u16),
}

#[derive(Debug)]
struct Shared {
    upstream: Upstream,
    fault: Mutex<Option<Fault>>,
    seen: Mutex<Vec<Arc<Mutex<Seen>>>>,
    open: AtomicU64,
    /// Counts how often everything was hung up; `u64::MAX`: for good.
    hung_up: watch::Sender<u64>,
}

impl Proxy {
    /// Listens on a free port of the loopback.
    pub fn tcp(upstream: Upstream) -> Self {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        listener.set_nonblocking(true).unwrap();
        let address = Address::Tcp(listener.local_addr().unwrap());
        Self::run(upstream, address, async move |shared: Arc<Shared>| {
            let listener = TcpListener::from_std(listener).unwrap();
            while let Ok((stream, _)) = listener.accept().await {
                let _ = stream.set_nodelay(true);
                tokio::spawn(serve(Socket::Tcp(stream), shared.clone()));
            }
        })
    }

    /// Listens on a socket in `dir`, as a server with that port would.
    pub fn unix(dir: &Path, port: u16, upstream: Upstream) -> Self {
        let path = dir.join(format!(".s.PGSQL.{port}"));
        let listener = std::os::unix::net::UnixListener::bind(&path).unwrap();
        listener.set_nonblocking(true).unwrap();
        // Whoever the tests' programs run as.
        std::fs::set_permissions(&path, std::os::unix::fs::PermissionsExt::from_mode(0o777)).unwrap();
        Self::run(upstream, Address::Unix(dir.to_owned(), port), async move |shared: Arc<Shared>| {
            let listener = UnixListener::from_std(listener).unwrap();
            while let Ok((stream, _)) = listener.accept().await {
                tokio::spawn(serve(Socket::Unix(stream), shared.clone()));
            }
        })
    }

    fn run(
        upstream: Upstream,
        address: Address,
        accept: impl AsyncFnOnce(Arc<Shared>) + Send + 'static,
    ) -> Self {
        let shared = Arc::new(Shared {
            upstream,
            fault: Mutex::default(),
            seen: Mutex::default(),
            open: AtomicU64::new(0),
            hung_up: watch::Sender::new(0),
        });
        let inner = shared.clone();
        let thread = std::thread::spawn(move || {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
            runtime.block_on(async {
                let mut end = inner.hung_up.subscribe();
                tokio::select! {
                    () = accept(inner.clone()) => {}
                    _ = end.wait_for(|count| *count == u64::MAX) => {}
                }
            });
        });
        Proxy { shared, address, thread: Some(thread) }
    }

    /// The connection string of the server behind it.
    pub fn conninfo(&self) -> String {
        match &self.address {
            Address::Tcp(address) => {
                format!("host={} port={} user=postgres dbname=postgres", address.ip(), address.port())
            }
            Address::Unix(dir, port) => {
                format!("host={} port={port} user=postgres dbname=postgres", dir.display())
            }
        }
    }

    /// The port that it listens on.
    pub fn port(&self) -> u16 {
        match &self.address {
            Address::Tcp(address) => address.port(),
            Address::Unix(_, port) => *port,
        }
    }

    /// What happens to connections that begin from now on; forgets what was seen.
    pub fn set(&self, fault: Option<Fault>) {
        *self.shared.fault.lock().unwrap() = fault;
        self.shared.seen.lock().unwrap().clear();
    }

    /// Ends all connections, black holes too, as a network does that came back.
    pub fn hang_up(&self) {
        self.shared.hung_up.send_modify(|count| *count += 1);
    }

    /// What passed in each connection since the last [`set`](Self::set), in their order.
    pub fn seen(&self) -> Vec<Seen> {
        let seen = self.shared.seen.lock().unwrap();
        seen.iter().map(|one| one.lock().unwrap().clone()).collect()
    }

    /// How many connections are open.
    pub fn open(&self) -> u64 {
        self.shared.open.load(Ordering::Relaxed)
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        self.shared.hung_up.send_replace(u64::MAX);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
        if let Address::Unix(dir, port) = &self.address {
            let _ = std::fs::remove_file(dir.join(format!(".s.PGSQL.{port}")));
        }
    }
}

type Reader<'a> = Box<dyn AsyncRead + Send + Unpin + 'a>;
type Writer<'a> = Box<dyn AsyncWrite + Send + Unpin + 'a>;

enum Socket {
    Tcp(TcpStream),
    Unix(UnixStream),
}

impl Socket {
    async fn connect(upstream: &Upstream) -> io::Result<Socket> {
        match upstream {
            Upstream::Tcp(address) => {
                let stream = TcpStream::connect(address).await?;
                stream.set_nodelay(true)?;
                Ok(Socket::Tcp(stream))
            }
            Upstream::Unix(path) => Ok(Socket::Unix(UnixStream::connect(path).await?)),
        }
    }

    fn split(&mut self) -> (Reader<'_>, Writer<'_>) {
        match self {
            Socket::Tcp(stream) => {
                let (read, write) = stream.split();
                (Box::new(read), Box::new(write))
            }
            Socket::Unix(stream) => {
                let (read, write) = stream.split();
                (Box::new(read), Box::new(write))
            }
        }
    }

    /// Lets the other side see a reset: data that was sent and not read is lost, as in life.
    fn reset(self) {
        if let Socket::Tcp(stream) = self {
            let _ = stream.set_zero_linger();
        }
    }

    /// Lets the other side see the end after everything that was sent. Closing alone would reset the
    /// connection if something was still unread here.
    async fn close(mut self) {
        let (mut read, mut write) = self.split();
        let _ = write.shutdown().await;
        let rest = async { while matches!(read.read(&mut [0; 4096]).await, Ok(1..)) {} };
        let _ = tokio::time::timeout(GOODBYE, rest).await;
    }
}

/// Lowers the count of open connections however a connection ends.
struct Open(Arc<Shared>);

impl Drop for Open {
    fn drop(&mut self) {
        self.0.open.fetch_sub(1, Ordering::Relaxed);
    }
}

async fn serve(mut client: Socket, shared: Arc<Shared>) {
    shared.open.fetch_add(1, Ordering::Relaxed);
    let _open = Open(shared.clone());
    let mut hung_up = shared.hung_up.subscribe();
    let fault = *shared.fault.lock().unwrap();
    let seen = Arc::new(Mutex::new(Seen::default()));
    shared.seen.lock().unwrap().push(seen.clone());
    let Ok(mut server) = Socket::connect(&shared.upstream).await else { return };
    let state = State { phase: Mutex::new(Phase::Opening), seen, fault };
    let act = tokio::select! {
        act = both(&mut client, &mut server, &state) => act,
        _ = hung_up.changed() => Some(Act::Reset),
    };
    match act {
        Some(Act::BlackHole) => {
            let _ = hung_up.changed().await;
            client.reset();
            server.reset();
        }
        Some(Act::Reset) => {
            client.reset();
            server.reset();
        }
        _ => {
            // A server that sends does not read, and would send all the rest to one that waits.
            drop(server);
            client.close().await;
        }
    }
}

/// Passes on until both directions are at their end, or a fault ends it.
async fn both(client: &mut Socket, server: &mut Socket, state: &State) -> Option<Act> {
    let (from_client, to_client) = client.split();
    let (from_server, to_server) = server.split();
    let up = state.pump(Side::Frontend, from_client, to_server);
    let down = state.pump(Side::Backend, from_server, to_client);
    tokio::pin!(up, down);
    let (first, rest): (_, std::pin::Pin<&mut (dyn Future<Output = io::Result<Option<Act>>> + Send)>) = tokio::select! {
        end = &mut up => (end, down),
        end = &mut down => (end, up),
    };
    match first {
        Ok(None) => rest.await.unwrap_or(Some(Act::Close)),
        Ok(act) => act,
        Err(_) => Some(Act::Close),
    }
}

/// What both directions of a connection share.
struct State {
    phase: Mutex<Phase>,
    seen: Arc<Mutex<Seen>>,
    fault: Option<Fault>,
}

/// Counts what passed in one direction.
#[derive(Clone, Copy, Default)]
struct Passed {
    messages: u64,
    bytes: u64,
}

impl State {
    /// Passes on what one side says. `Ok(None)`: it is at its end, which was passed on too.
    async fn pump(&self, side: Side, mut from: Reader<'_>, mut to: Writer<'_>) -> io::Result<Option<Act>> {
        let mut framer = Framer::new(side);
        let (mut held, mut out) = (BytesMut::new(), BytesMut::new());
        let (mut passed, mut rate) = (Passed::default(), None);
        let mut due = self.fault.filter(|fault| fault.side == side);
        if let Some(act) = self.due_at_once(&mut due)
            && let Some(last) = endure(act, &mut rate).await
        {
            return Ok(Some(last));
        }
        loop {
            held.reserve(CHUNK);
            if from.read_buf(&mut held).await? == 0 {
                send(&mut to, &held, rate).await?;
                to.shutdown().await?;
                return Ok(None);
            }
            while let Some((piece, tag)) = self.next(&mut framer, &held) {
                let mut bytes = held.split_to(piece.len);
                let at = due.filter(|fault| self.concerns(fault)).and_then(|f| place(f.place, passed, piece));
                passed.bytes += piece.len as u64;
                passed.messages += u64::from(piece.ends());
                if let Some(at) = at {
                    out.extend_from_slice(&bytes.split_to(at));
                    send(&mut to, &out.split(), rate).await?;
                    let act = due.take().map(|fault| fault.act);
                    // After a message means that it passed.
                    let whole = bytes.is_empty();
                    self.note(side, passed, tag.filter(|_| whole && piece.ends()), true);
                    if let Some(last) = endure(act.unwrap_or(Act::Close), &mut rate).await {
                        return Ok(Some(last));
                    }
                    if whole {
                        continue;
                    }
                }
                out.extend_from_slice(&bytes);
                self.note(side, passed, tag.filter(|_| piece.ends()), false);
            }
            send(&mut to, &out.split(), rate).await?;
        }
    }

    fn next(&self, framer: &mut Framer, held: &[u8]) -> Option<(Piece, Option<u8>)> {
        let mut session = self.seen.lock().unwrap().session;
        let piece = framer.next(held, &mut self.phase.lock().unwrap(), &mut session)?;
        self.seen.lock().unwrap().session = session;
        let tag = piece.total.and_then(|_| held.first().copied());
        Some((piece, tag))
    }

    fn concerns(&self, fault: &Fault) -> bool {
        fault.session.is_none_or(|session| session == self.seen.lock().unwrap().session)
    }

    /// A fault before the first word; nobody knows yet what kind of session it will be.
    fn due_at_once(&self, due: &mut Option<Fault>) -> Option<Act> {
        let now = due.filter(|fault| matches!(fault.place, Place::After(0) | Place::Byte(0)));
        let act = now.filter(|fault| self.concerns(fault)).map(|fault| fault.act)?;
        *due = None;
        self.seen.lock().unwrap().hit = true;
        Some(act)
    }

    fn note(&self, side: Side, passed: Passed, tag: Option<u8>, hit: bool) {
        let mut seen = self.seen.lock().unwrap();
        seen.hit |= hit;
        let count = match side {
            Side::Frontend => &mut seen.frontend,
            Side::Backend => &mut seen.backend,
        };
        *count = (passed.messages, passed.bytes);
        if side == Side::Backend {
            seen.tags.extend(tag);
        }
    }
}

/// Where in a piece the place is, in bytes of it. After a message means at its very end.
fn place(place: Place, passed: Passed, piece: Piece) -> Option<usize> {
    match place {
        // When the first byte comes, if it had to be known what kind of session it is.
        Place::After(0) | Place::Byte(0) => (passed.bytes == 0).then_some(0),
        Place::After(count) => (piece.ends() && passed.messages + 1 == count).then_some(piece.len),
        Place::Within(count) => {
            let half = (piece.total? / 2).max(1);
            let here = piece.offset < half && half <= piece.offset + piece.len;
            (passed.messages == count && here).then(|| half - piece.offset)
        }
        Place::Byte(count) => (passed.bytes < count && count <= passed.bytes + piece.len as u64)
            .then(|| (count - passed.bytes) as usize),
    }
}

/// Does what can be gone on from; answers what cannot.
async fn endure(act: Act, rate: &mut Option<u64>) -> Option<Act> {
    match act {
        Act::Delay(time) => tokio::time::sleep(time).await,
        Act::Throttle(bytes) => *rate = Some(bytes),
        last => return Some(last),
    }
    None
}

async fn send(to: &mut Writer<'_>, bytes: &[u8], rate: Option<u64>) -> io::Result<()> {
    let Some(rate) = rate else { return to.write_all(bytes).await };
    let part = (rate * TICK.as_millis() as u64 / 1000).max(1) as usize;
    for part in bytes.chunks(part) {
        to.write_all(part).await?;
        tokio::time::sleep(TICK).await;
    }
    Ok(())
}

#[cfg(test)]
mod tests;
