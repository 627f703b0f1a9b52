//! HTTP for those who watch: `/healthz`, `/readyz`, `/metrics`. Reads only, one request a connection.

use std::convert::Infallible;
use std::net::SocketAddr;
use std::time::Duration;

use bytes::Bytes;
use http_body_util::Full;
use hyper::body::Incoming;
use hyper::header::{ALLOW, CACHE_CONTROL, CONTENT_TYPE};
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper::{Method, Request, Response, StatusCode};
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinSet;
use tokio::time::timeout;

use super::error::ResidentError;
use super::{ACCEPT_PAUSE, Control, Served, Stopped};
use crate::metrics;

/// How many connections are served at once; more are closed.
pub const HTTP_CONNECTIONS: usize = 32;
/// How long a connection may take from its first byte to its last.
pub const HTTP_TIME: Duration = Duration::from_secs(20);
/// How long the head of a request may take.
pub const HTTP_HEAD_TIME: Duration = Duration::from_secs(5);
/// The longest head of a request, in bytes.
pub const HTTP_HEAD_LIMIT: usize = 16 << 10;
/// How long the supervisor's loop may take to show that it lives.
pub const HEALTH_TIME: Duration = Duration::from_secs(2);

const JSON: &str = "application/json";
const TEXT: &str = "text/plain; charset=utf-8";

/// Listens on an address; answers the address too, whose port may have been chosen by the system.
pub(super) async fn listen(address: SocketAddr) -> Result<(SocketAddr, TcpListener), ResidentError> {
    let failed = |source| ResidentError::Listen { address, source };
    let listener = TcpListener::bind(address).await.map_err(failed)?;
    Ok((listener.local_addr().map_err(failed)?, listener))
}

/// Answers whoever connects, until it is stopped.
pub(super) fn serve(listener: TcpListener, control: Control) -> Served {
    Served::begin(|stopped| accept(listener, control, stopped))
}

async fn accept(listener: TcpListener, control: Control, stopped: Stopped) {
    let mut connections = JoinSet::new();
    loop {
        tokio::select! {
            () = stopped.asked() => return,
            Some(_) = connections.join_next() => {}
            accepted = listener.accept() => match accepted {
                Ok(_) if connections.len() >= HTTP_CONNECTIONS => {}
                Ok((stream, _)) => {
                    connections.spawn(connection(stream, control.clone()));
                }
                Err(error) => {
                    tracing::warn!("agent.listen takes no connection: {error}");
                    tokio::time::sleep(ACCEPT_PAUSE).await;
                }
            },
        }
    }
}

async fn connection(stream: TcpStream, control: Control) {
    let answer = service_fn(move |request: Request<Incoming>| {
        let control = control.clone();
        async move { Ok::<_, Infallible>(respond(request.method(), request.uri().path(), &control).await) }
    });
    let served = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(HTTP_HEAD_TIME)
        .max_buf_size(HTTP_HEAD_LIMIT)
        .keep_alive(false)
        .serve_connection(TokioIo::new(stream), answer);
    // What goes wrong on a connection is its client's to see.
    let _ = timeout(HTTP_TIME, served).await;
}

async fn respond(method: &Method, path: &str, control: &Control) -> Response<Full<Bytes>> {
    if !matches!(*method, Method::GET | Method::HEAD) {
        let mut response = of(StatusCode::METHOD_NOT_ALLOWED, TEXT, "only GET and HEAD\n".into());
        response.headers_mut().insert(ALLOW, hyper::header::HeaderValue::from_static("GET, HEAD"));
        return response;
    }
    match path {
        "/healthz" if control.is_alive(HEALTH_TIME).await => of(StatusCode::OK, TEXT, "ok\n".into()),
        "/healthz" => of(StatusCode::SERVICE_UNAVAILABLE, TEXT, "the supervisor does not answer\n".into()),
        "/readyz" => {
            let not_ready = control.not_ready();
            let code = if not_ready.is_empty() { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE };
            let body = serde_json::json!({ "ready": not_ready.is_empty(), "not_ready": not_ready });
            of(code, JSON, format!("{body}\n"))
        }
        "/metrics" => of(StatusCode::OK, metrics::CONTENT_TYPE, metrics::text(control.metrics())),
        _ => of(StatusCode::NOT_FOUND, TEXT, "there are /healthz, /readyz and /metrics\n".into()),
    }
}

fn of(code: StatusCode, kind: &'static str, body: String) -> Response<Full<Bytes>> {
    let mut response = Response::new(Full::new(Bytes::from(body)));
    *response.status_mut() = code;
    let headers = response.headers_mut();
    headers.insert(CONTENT_TYPE, hyper::header::HeaderValue::from_static(kind));
    headers.insert(CACHE_CONTROL, hyper::header::HeaderValue::from_static("no-store"));
    response
}
