//! A byte stream to one server: socket, keep-alive, TLS.

use std::io;
use std::net::SocketAddr;
use std::os::fd::AsFd;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use thiserror::Error;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, ReadBuf};
use tokio::net::{TcpStream, UnixStream};
use tokio_postgres::tls::{ChannelBinding, TlsConnect, TlsStream};
use tokio_rustls::rustls::pki_types::ServerName;
use tokio_rustls::{TlsConnector, rustls};

use super::info::{ConnInfo, Endpoint, Host};
use super::tls::{self, Negotiation, TlsMode};

/// Seconds of silence after which TCP asks whether the other side is there. A backup may be silent
/// for long, and `BASE_BACKUP` has no time-out of its own.
const KEEPALIVE_IDLE: Duration = Duration::from_secs(30);

/// What a server is asked to do likewise (nothing on a unix socket): its system's own time is two
/// hours, for which the session of a client that vanished would keep the lock of its backup. Not
/// `tcp_user_timeout`: a client that waits for its repository takes nothing either.
pub(crate) const SERVER_KEEPALIVE: &str =
    "-c tcp_keepalives_idle=30 -c tcp_keepalives_interval=10 -c tcp_keepalives_count=3";

/// Unacknowledged bytes are given up after this time.
const USER_TIMEOUT: Duration = Duration::from_secs(60);

/// `SSLRequest` (manual, "Message Formats"): its length, and 1234 and 5679.
const SSL_REQUEST: [u8; 8] = [0, 0, 0, 8, 0x04, 0xD2, 0x16, 0x2F];

/// Bytes both ways.
pub(crate) trait Duplex: AsyncRead + AsyncWrite + Unpin + Send + Sync {}
impl<T: AsyncRead + AsyncWrite + Unpin + Send + Sync> Duplex for T {}

/// A stream to a server, with what SCRAM binds to: the certificate's digest.
pub(crate) struct Stream {
    inner: Box<dyn Duplex>,
    end_point: Option<Vec<u8>>,
}

/// Gives a stream that is encrypted already to a library that would begin TLS itself.
pub(crate) struct AsItIs;

impl TlsConnect<Stream> for AsItIs {
    type Stream = Stream;
    type Error = std::convert::Infallible;
    type Future = std::future::Ready<Result<Stream, Self::Error>>;

    fn connect(self, stream: Stream) -> Self::Future {
        std::future::ready(Ok(stream))
    }
}

impl TlsStream for Stream {
    fn channel_binding(&self) -> ChannelBinding {
        self.end_point.clone().map_or_else(ChannelBinding::none, ChannelBinding::tls_server_end_point)
    }
}

impl Stream {
    /// The digest of the server's certificate, for channel binding.
    pub fn end_point(&self) -> Option<&[u8]> {
        self.end_point.as_deref()
    }
}

impl AsyncRead for Stream {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.inner).poll_read(cx, buf)
    }
}

impl AsyncWrite for Stream {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.inner).poll_write(cx, buf)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.inner).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.inner).poll_shutdown(cx)
    }
}

/// A stream that is open, before a word of the protocol was said.
pub(crate) struct Link {
    pub stream: Stream,
    /// Whether TLS is on.
    pub encrypted: bool,
}

/// Why there is no stream.
#[derive(Debug, Error)]
pub(crate) enum LinkError {
    /// Nobody answers, or the network does not let through.
    #[error("{0}")]
    Unreachable(String),
    /// TLS cannot be had as asked.
    #[error("{0}")]
    Tls(String),
}

/// Opens a stream to an endpoint within the connection's limit. `plain`: without TLS.
///
/// Cancel safety: a dropped attempt closes its socket.
pub(crate) async fn link(info: &ConnInfo, endpoint: &Endpoint, plain: bool) -> Result<Link, LinkError> {
    let limit = info.connect_limit;
    match tokio::time::timeout(limit, open(info, endpoint, plain)).await {
        Ok(answer) => answer,
        Err(_) => Err(LinkError::Unreachable(format!("no answer within {} s", limit.as_secs_f32()))),
    }
}

async fn open(info: &ConnInfo, endpoint: &Endpoint, plain: bool) -> Result<Link, LinkError> {
    let (name, address) = match &endpoint.host {
        Host::Unix(dir) => {
            let path = dir.join(format!(".s.PGSQL.{}", endpoint.port));
            let stream = UnixStream::connect(&path).await;
            let stream =
                stream.map_err(|error| LinkError::Unreachable(format!("{}: {error}", path.display())))?;
            return Ok(Link { stream: plain_stream(stream), encrypted: false });
        }
        Host::Tcp { name, address } => (name, address.as_deref().unwrap_or(name)),
    };
    let stream = tcp(address, endpoint.port).await?;
    tune(info, &stream).map_err(|error| LinkError::Unreachable(error.to_string()))?;
    if plain {
        return Ok(Link { stream: plain_stream(stream), encrypted: false });
    }
    secure(info, name, stream).await
}

fn plain_stream(stream: impl Duplex + 'static) -> Stream {
    Stream { inner: Box::new(stream), end_point: None }
}

/// Tries each address of a name.
async fn tcp(host: &str, port: u16) -> Result<TcpStream, LinkError> {
    let host = host.trim_matches(['[', ']']);
    let addresses = tokio::net::lookup_host((host, port))
        .await
        .map_err(|error| LinkError::Unreachable(format!("{host} cannot be resolved: {error}")))?;
    let mut last = format!("{host} has no address");
    for address in addresses {
        match TcpStream::connect(address).await {
            Ok(stream) => return Ok(stream),
            Err(error) => last = refused(address, &error),
        }
    }
    Err(LinkError::Unreachable(last))
}

fn refused(address: SocketAddr, error: &io::Error) -> String {
    format!("{address}: {error}")
}

fn tune(info: &ConnInfo, stream: &TcpStream) -> io::Result<()> {
    use rustix::net::sockopt;
    stream.set_nodelay(true)?;
    let fd = stream.as_fd();
    sockopt::set_socket_keepalive(fd, true)?;
    let idle = info.keepalive_idle.unwrap_or(KEEPALIVE_IDLE);
    sockopt::set_tcp_keepidle(fd, idle)?;
    sockopt::set_tcp_keepintvl(fd, (idle / 3).max(Duration::from_secs(1)))?;
    sockopt::set_tcp_keepcnt(fd, 3)?;
    let unacknowledged = info.user_timeout.unwrap_or(USER_TIMEOUT).as_millis();
    Ok(sockopt::set_tcp_user_timeout(fd, u32::try_from(unacknowledged).unwrap_or(u32::MAX))?)
}

async fn secure(info: &ConnInfo, name: &str, mut stream: TcpStream) -> Result<Link, LinkError> {
    let options = &info.tls;
    if options.mode == TlsMode::Disable {
        return Ok(Link { stream: plain_stream(stream), encrypted: false });
    }
    if options.negotiation == Negotiation::Postgres && !is_offered(&mut stream).await? {
        if options.mode.is_demanded() {
            return Err(LinkError::Tls(format!(
                "the server has no TLS, and sslmode={} asks for it",
                options.mode.word()
            )));
        }
        return Ok(Link { stream: plain_stream(stream), encrypted: false });
    }
    let config = tls::client(options).map_err(LinkError::Tls)?;
    let server_name = ServerName::try_from(name.to_owned())
        .map_err(|_| LinkError::Tls(format!("{name:?} is no name that a certificate can have")))?;
    let stream = TlsConnector::from(Arc::new(config))
        .connect(server_name, stream)
        .await
        .map_err(|error| handshake_failed(&error, options.negotiation))?;
    let session = stream.get_ref().1;
    if options.negotiation == Negotiation::Direct && session.alpn_protocol().is_none() {
        return Err(LinkError::Tls(
            "the server does not speak PostgreSQL over direct TLS (it is older than 17, or something else)"
                .into(),
        ));
    }
    let certificate = session.peer_certificates().and_then(<[_]>::first);
    let end_point = certificate.and_then(|certificate| tls::end_point(certificate));
    Ok(Link { stream: Stream { inner: Box::new(stream), end_point }, encrypted: true })
}

/// A handshake that one of the sides refused, or one that the network cut.
fn handshake_failed(error: &io::Error, negotiation: Negotiation) -> LinkError {
    let reason = format!("the TLS handshake failed: {error}");
    if error.get_ref().is_some_and(|inner| inner.is::<rustls::Error>()) {
        return LinkError::Tls(reason);
    }
    LinkError::Unreachable(match negotiation {
        Negotiation::Postgres => reason,
        // It takes the handshake for a message of a wrong length and hangs up without a word.
        Negotiation::Direct => format!("{reason} (a server older than 17 hangs up at sslnegotiation=direct)"),
    })
}

/// Asks for TLS. Exactly one byte is read: whatever follows belongs to TLS, and bytes that came
/// before it unasked would otherwise be taken for it (CVE-2021-23222).
async fn is_offered(stream: &mut TcpStream) -> Result<bool, LinkError> {
    let lost = |error: io::Error| LinkError::Unreachable(format!("asking for TLS: {error}"));
    stream.write_all(&SSL_REQUEST).await.map_err(lost)?;
    match stream.read_u8().await.map_err(lost)? {
        b'S' => Ok(true),
        b'N' => Ok(false),
        other => Err(LinkError::Unreachable(format!(
            "it is no PostgreSQL server: it answered {other:#04x} when asked for TLS"
        ))),
    }
}
