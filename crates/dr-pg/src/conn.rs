//! Connections: connection strings as libpq reads them, sockets, TLS.
//!
//! The words are libpq's (manual, "Connection Strings" and "Parameter Key Words"), so that what an
//! operator knows holds here. What is not supported is refused, never passed over, when ignoring
//! it would make a connection less safe than was asked.

mod info;
mod link;
mod passfile;
mod service;
mod text;
mod tls;

pub use info::{ChannelBindingMode, ConnInfo, Endpoint, Host, SessionKind};
pub(crate) use link::{AsItIs, Link, LinkError, SERVER_KEEPALIVE, Stream, link};
pub use tls::{Negotiation, TlsMode, TlsOptions};
