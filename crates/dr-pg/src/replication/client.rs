//! A connection for replication commands.

use std::collections::BTreeMap;

use bytes::{Bytes, BytesMut};
use dr_core::{Lsn, SystemId, Timeline};
use postgres_protocol::authentication::{md5_hash, sasl};
use postgres_protocol::message::frontend;

use super::cancel::{CancelKey, Canceller};
use super::error::ReplicationError;
use super::messages::{Fields, Message};
use super::patience::Patience;
use super::wire::Wire;
use crate::conn::{
    ChannelBindingMode, ConnInfo, Endpoint, Link, LinkError, SERVER_KEEPALIVE, SessionKind, link,
};

/// What kind of session this is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ReplicationMode {
    /// Replication commands only; needs no database.
    Physical,
    /// Replication commands, and SQL in the connection's database.
    Database,
}

/// The answer to `IDENTIFY_SYSTEM`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Identity {
    /// The cluster.
    pub system_id: SystemId,
    /// Its current timeline.
    pub timeline: Timeline,
    /// Up to where WAL is flushed (on a standby: received or replayed).
    pub flushed: Lsn,
}

/// The answer to `READ_REPLICATION_SLOT`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SlotFacts {
    /// From where WAL is kept for it; `None`: it has reserved none yet.
    pub restart: Option<Lsn>,
    /// The timeline of that position.
    pub timeline: Option<Timeline>,
}

/// A connection to one server. Dropping it ends whatever it was doing.
pub struct ReplicationClient {
    pub(super) wire: Wire,
    parameters: BTreeMap<String, String>,
    cancel_key: Option<CancelKey>,
    info: ConnInfo,
    encrypted: bool,
}

impl std::fmt::Debug for ReplicationClient {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ReplicationClient").field("server", &self.wire.server).finish_non_exhaustive()
    }
}

impl ReplicationClient {
    /// Connects to the first of the hosts that answers and is of the wanted kind.
    pub async fn connect(info: &ConnInfo, mode: ReplicationMode) -> Result<Self, ReplicationError> {
        let mut last = None;
        let mut second_best = None;
        for endpoint in &info.endpoints {
            match Self::connect_to(info, endpoint, mode).await {
                Ok(mut client) => match client.is_wanted(info.session_kind).await {
                    Ok(true) => return Ok(client),
                    Ok(false) if info.session_kind == SessionKind::PreferStandby => {
                        second_best = Some(client)
                    }
                    Ok(false) => {
                        let reason =
                            format!("it is not what target_session_attrs asks for: {:?}", info.session_kind);
                        last = Some(client.wire.lost(reason));
                    }
                    Err(error) => last = Some(error),
                },
                Err(error) => last = Some(error),
            }
        }
        match (second_best, last) {
            (Some(client), _) => Ok(client),
            (None, Some(error)) => Err(error),
            (None, None) => Err(ReplicationError::Unreachable {
                server: info.server(),
                reason: "there is no host".into(),
            }),
        }
    }

    async fn connect_to(
        info: &ConnInfo,
        endpoint: &Endpoint,
        mode: ReplicationMode,
    ) -> Result<Self, ReplicationError> {
        let mut last = None;
        for plain in info.tls.mode.ways() {
            let server = endpoint.to_string();
            let opened = match link(info, endpoint, *plain).await {
                Ok(opened) => opened,
                Err(LinkError::Unreachable(reason)) => {
                    return Err(ReplicationError::Unreachable { server, reason });
                }
                Err(LinkError::Tls(reason)) => {
                    last = Some(ReplicationError::Refused { server, code: String::new(), reason });
                    continue;
                }
            };
            let encrypted = opened.encrypted;
            let attempt = Self::begin(info, endpoint, mode, opened);
            match tokio::time::timeout(info.connect_limit, attempt).await {
                Ok(Ok(client)) => return Ok(client),
                // No rule lets this role in this way; a wrong password is wrong in every way.
                Ok(Err(ReplicationError::Refused { server, code, reason })) if code == "28000" => {
                    let way = if encrypted { "with TLS" } else { "without TLS" };
                    let before = last.map(|error: ReplicationError| format!("{error}; ")).unwrap_or_default();
                    last = Some(ReplicationError::Refused {
                        server,
                        code,
                        reason: format!("{before}{way}: {reason}"),
                    });
                }
                Ok(Err(error)) => return Err(error),
                Err(_) => {
                    let (doing, limit) = ("let this client in".to_owned(), info.connect_limit);
                    return Err(ReplicationError::Late { server, doing, limit });
                }
            }
        }
        let unreachable =
            || ReplicationError::Unreachable { server: info.server(), reason: "no way in".into() };
        Err(last.unwrap_or_else(unreachable))
    }

    async fn begin(
        info: &ConnInfo,
        endpoint: &Endpoint,
        mode: ReplicationMode,
        link: Link,
    ) -> Result<Self, ReplicationError> {
        let encrypted = link.encrypted;
        let end_point = link.stream.end_point().map(<[u8]>::to_vec);
        let mut client = ReplicationClient {
            wire: Wire::new(link.stream, endpoint.to_string()),
            parameters: BTreeMap::new(),
            cancel_key: None,
            info: info.clone(),
            encrypted,
        };
        let (replication, database) = match mode {
            // The database's name counts for pg_hba.conf and the password file only.
            ReplicationMode::Physical => ("true", "replication"),
            ReplicationMode::Database => ("database", info.database.as_str()),
        };
        // What the connection string says comes later, and so holds.
        let options = format!("{SERVER_KEEPALIVE} {}", info.options.as_deref().unwrap_or_default());
        let parameters = vec![
            ("user", info.user.as_str()),
            ("database", database),
            ("replication", replication),
            ("client_encoding", "UTF8"),
            ("application_name", info.application_name.as_deref().unwrap_or("dr")),
            ("options", options.as_str()),
        ];
        let mut out = BytesMut::new();
        let built = frontend::startup_message(parameters, &mut out);
        built.map_err(|error| client.refused(error.to_string()))?;
        client.wire.send(&out).await?;
        let password = info.password_for(endpoint, database);
        client.authenticate(password.as_deref(), end_point).await?;
        client.settle(endpoint).await?;
        Ok(client)
    }

    fn refused(&self, reason: impl Into<String>) -> ReplicationError {
        ReplicationError::Refused {
            server: self.wire.server.clone(),
            code: String::new(),
            reason: reason.into(),
        }
    }

    async fn next_of_handshake(&mut self) -> Result<Message, ReplicationError> {
        let message = self.wire.receive_any("let this client in", self.info.connect_limit).await?;
        match message {
            // Too many clients (class 53) and starting up or shutting down (57) pass.
            Message::Error(said) if said.code.starts_with("53") || said.code.starts_with("57") => {
                Err(self.wire.lost(said.message))
            }
            Message::Error(said) => Err(ReplicationError::Refused {
                server: self.wire.server.clone(),
                reason: format!("{} ({})", said.message, said.code),
                code: said.code,
            }),
            message => Ok(message),
        }
    }

    async fn authenticate(
        &mut self,
        password: Option<&str>,
        end_point: Option<Vec<u8>>,
    ) -> Result<(), ReplicationError> {
        let needs = "it asks for a password, and there is none (password, passfile or ~/.pgpass)";
        let must_bind = self.info.channel_binding == ChannelBindingMode::Require;
        loop {
            let message = self.next_of_handshake().await?;
            let Message::Authentication(kind, body) = message else {
                match message {
                    Message::Notice(_) | Message::NegotiateVersion(_) => continue,
                    other => return Err(self.wire.unexpected("let this client in", &other)),
                }
            };
            let mut out = BytesMut::new();
            match kind {
                0 if must_bind => {
                    return Err(
                        self.refused("it did not bind the password to the channel (channel_binding=require)")
                    );
                }
                0 => return Ok(()),
                3 | 5 if must_bind => {
                    return Err(self.refused("it asks for a password without channel binding"));
                }
                3 | 5 => {
                    let password = password.ok_or_else(|| self.refused(needs))?;
                    let answer = match (kind, <[u8; 4]>::try_from(&body[..])) {
                        (3, _) => password.to_owned(),
                        (_, Ok(salt)) => md5_hash(self.info.user.as_bytes(), password.as_bytes(), salt),
                        _ => return Err(self.wire.protocol("a wrong salt")),
                    };
                    let built = frontend::password_message(answer.as_bytes(), &mut out);
                    built.map_err(|error| self.refused(error.to_string()))?;
                    self.wire.send(&out).await?;
                }
                10 => {
                    let password = password.ok_or_else(|| self.refused(needs))?;
                    return self.scram(password, body, end_point).await;
                }
                7 | 9 => return Err(self.refused("it asks for Kerberos or SSPI, which is not supported")),
                other => return Err(self.refused(format!("it asks for authentication of kind {other}"))),
            }
        }
    }

    /// SCRAM-SHA-256, bound to the TLS channel where both sides can (RFC 5802, RFC 5929).
    async fn scram(
        &mut self,
        password: &str,
        offered: Bytes,
        end_point: Option<Vec<u8>>,
    ) -> Result<(), ReplicationError> {
        let mode = self.info.channel_binding;
        let mut offered = Fields(offered);
        let mechanisms: Vec<String> =
            std::iter::from_fn(|| offered.text().filter(|name| !name.is_empty())).collect();
        let offers = |name: &str| mechanisms.iter().any(|m| m == name);
        let end_point = end_point.filter(|_| mode != ChannelBindingMode::Disable);
        let (mechanism, binding) = match end_point {
            Some(digest) if offers(sasl::SCRAM_SHA_256_PLUS) => {
                (sasl::SCRAM_SHA_256_PLUS, sasl::ChannelBinding::tls_server_end_point(digest))
            }
            _ if mode == ChannelBindingMode::Require => {
                return Err(
                    self.refused("channel binding is not to be had (channel_binding=require needs TLS)")
                );
            }
            // "I could, but you did not offer it": the server notices if somebody took it away.
            Some(_) if offers(sasl::SCRAM_SHA_256) => {
                (sasl::SCRAM_SHA_256, sasl::ChannelBinding::unrequested())
            }
            None if offers(sasl::SCRAM_SHA_256) => (sasl::SCRAM_SHA_256, sasl::ChannelBinding::unsupported()),
            _ => return Err(self.refused(format!("it offers none but {}", mechanisms.join(", ")))),
        };
        let failed = |error: std::io::Error| format!("SCRAM failed: {error}");
        let mut scram = sasl::ScramSha256::new(password.as_bytes(), binding);
        let mut out = BytesMut::new();
        let built = frontend::sasl_initial_response(mechanism, scram.message(), &mut out);
        built.map_err(|error| self.refused(failed(error)))?;
        self.wire.send(&out).await?;
        loop {
            match self.next_of_handshake().await? {
                Message::Authentication(11, body) => {
                    scram.update(&body).map_err(|error| self.refused(failed(error)))?;
                    let mut out = BytesMut::new();
                    let built = frontend::sasl_response(scram.message(), &mut out);
                    built.map_err(|error| self.refused(failed(error)))?;
                    self.wire.send(&out).await?;
                }
                Message::Authentication(12, body) => {
                    // The server proves that it knows the password too.
                    scram.finish(&body).map_err(|error| self.refused(failed(error)))?;
                    return match self.next_of_handshake().await? {
                        Message::Authentication(0, _) => Ok(()),
                        other => Err(self.wire.unexpected("let this client in", &other)),
                    };
                }
                Message::Notice(_) => {}
                other => return Err(self.wire.unexpected("let this client in", &other)),
            }
        }
    }

    /// Takes what a server tells about itself until it is ready.
    async fn settle(&mut self, endpoint: &Endpoint) -> Result<(), ReplicationError> {
        loop {
            match self.next_of_handshake().await? {
                Message::ParameterStatus(name, value) => drop(self.parameters.insert(name, value)),
                Message::BackendKey(process, secret) => {
                    let secret = Bytes::copy_from_slice(&secret);
                    self.cancel_key = Some(CancelKey { endpoint: endpoint.clone(), process, secret });
                }
                Message::Ready(_) => return Ok(()),
                Message::Notice(_) | Message::NegotiateVersion(_) => {}
                other => return Err(self.wire.unexpected("let this client in", &other)),
            }
        }
    }

    async fn is_wanted(&mut self, kind: SessionKind) -> Result<bool, ReplicationError> {
        if kind == SessionKind::Any {
            return Ok(true);
        }
        let read_only = self.show("default_transaction_read_only").await? == "on";
        Ok(kind.accepts(self.is_standby().await?, read_only))
    }

    /// Whether the server is in recovery.
    pub async fn is_standby(&mut self) -> Result<bool, ReplicationError> {
        Ok(self.show("in_hot_standby").await? == "on")
    }

    /// The same with other limits of each wait from now on.
    #[must_use]
    pub fn with_patience(mut self, patience: Patience) -> Self {
        self.wire.patience = patience;
        self
    }

    /// Where this connection leads, without secrets.
    pub fn server(&self) -> &str {
        &self.wire.server
    }

    /// Whether TLS is on.
    pub fn is_encrypted(&self) -> bool {
        self.encrypted
    }

    /// A parameter that the server told at the start, such as `server_version`.
    pub fn parameter(&self, name: &str) -> Option<&str> {
        self.parameters.get(name).map(String::as_str)
    }

    /// The server's major version.
    pub fn major(&self) -> u32 {
        let digits =
            |text: &str| text.split(|c: char| !c.is_ascii_digit()).next().and_then(|d| d.parse().ok());
        self.parameter("server_version").and_then(digits).unwrap_or(0)
    }

    /// Sends a command and collects its rows, which must be few.
    pub async fn rows(
        &mut self,
        doing: &str,
        command: &str,
    ) -> Result<Vec<Vec<Option<String>>>, ReplicationError> {
        self.send_command(command).await?;
        let mut rows = Vec::new();
        let mut failure = None;
        loop {
            match self.wire.receive_soon(doing).await? {
                Message::Row(columns) => rows.push(texts(columns)),
                Message::RowDescription(_) | Message::Complete(_) | Message::EmptyQuery => {}
                // After an error the server is ready again, unless the session is over.
                Message::Error(said) if said.is_fatal() => return Err(self.wire.said(doing, &said)),
                Message::Error(said) => failure = Some(self.wire.said(doing, &said)),
                Message::Ready(_) => return failure.map_or(Ok(rows), Err),
                other => return Err(self.wire.unexpected(doing, &other)),
            }
        }
    }

    pub(super) async fn send_command(&mut self, command: &str) -> Result<(), ReplicationError> {
        let mut out = BytesMut::new();
        let built = frontend::query(command, &mut out);
        built.map_err(|error| self.wire.protocol(error.to_string()))?;
        self.wire.send(&out).await
    }

    async fn row(&mut self, doing: &str, command: &str) -> Result<Vec<Option<String>>, ReplicationError> {
        let rows = self.rows(doing, command).await?;
        rows.into_iter().next().ok_or_else(|| self.wire.protocol(format!("no row when asked to {doing}")))
    }

    /// The cluster, its timeline and how far its WAL is flushed.
    pub async fn identify(&mut self) -> Result<Identity, ReplicationError> {
        let row = self.row("tell what it is", "IDENTIFY_SYSTEM").await?;
        let field = |index: usize| row.get(index).and_then(Option::as_deref).unwrap_or_default();
        match (field(0).parse().map(SystemId), field(1).parse().map(Timeline), field(2).parse::<Lsn>()) {
            (Ok(system_id), Ok(timeline), Ok(flushed)) => Ok(Identity { system_id, timeline, flushed }),
            _ => Err(self.wire.protocol(format!("IDENTIFY_SYSTEM answered {row:?}"))),
        }
    }

    /// A setting of the server.
    pub async fn show(&mut self, name: &str) -> Result<String, ReplicationError> {
        let command = format!("SHOW {}", identifier(name));
        let row = self.row(&format!("show {name}"), &command).await?;
        Ok(row.into_iter().next().flatten().unwrap_or_default())
    }

    /// The history file of a timeline: its name and its content. `None` for a timeline without one,
    /// which the first is.
    pub async fn timeline_history(
        &mut self,
        timeline: Timeline,
    ) -> Result<Option<(String, String)>, ReplicationError> {
        let command = format!("TIMELINE_HISTORY {}", timeline.0);
        match self.row("send a timeline's history", &command).await {
            Ok(mut row) if row.len() == 2 => {
                let content = row.pop().flatten().unwrap_or_default();
                Ok(Some((row.pop().flatten().unwrap_or_default(), content)))
            }
            Ok(row) => Err(self.wire.protocol(format!("TIMELINE_HISTORY answered {} columns", row.len()))),
            Err(error) if error.sqlstate() == Some("58P01") => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Makes a physical slot that keeps WAL from now on. An existing one is an error of class
    /// fenced.
    pub async fn create_slot(&mut self, name: &str, temporary: bool) -> Result<(), ReplicationError> {
        let temporary = if temporary { "TEMPORARY " } else { "" };
        let command =
            format!("CREATE_REPLICATION_SLOT {} {temporary}PHYSICAL (RESERVE_WAL)", identifier(name));
        self.row(&format!("create slot {name}"), &command).await.map(drop)
    }

    /// From where a physical slot keeps WAL; `None`: there is no such slot.
    pub async fn read_slot(&mut self, name: &str) -> Result<Option<SlotFacts>, ReplicationError> {
        let command = format!("READ_REPLICATION_SLOT {}", identifier(name));
        let row = self.row(&format!("read slot {name}"), &command).await?;
        if row.first().is_none_or(Option::is_none) {
            return Ok(None);
        }
        let field = |index: usize| row.get(index).and_then(Option::as_deref);
        let restart = field(1).and_then(|text| text.parse().ok());
        Ok(Some(SlotFacts { restart, timeline: field(2).and_then(|text| text.parse().ok()).map(Timeline) }))
    }

    /// Removes a slot; waits until nobody uses it.
    pub async fn drop_slot(&mut self, name: &str) -> Result<(), ReplicationError> {
        let command = format!("DROP_REPLICATION_SLOT {} WAIT", identifier(name));
        self.rows(&format!("drop slot {name}"), &command).await.map(drop)
    }

    /// What ends a command of this connection from elsewhere. `None`: the server gave no key for it.
    pub fn canceller(&self) -> Option<Canceller> {
        self.cancel_key.clone().map(|key| Canceller::new(self.info.clone(), key, self.encrypted))
    }
}

fn texts(columns: Vec<Option<Bytes>>) -> Vec<Option<String>> {
    columns.into_iter().map(|c| c.map(|bytes| String::from_utf8_lossy(&bytes).into_owned())).collect()
}

/// A name in double quotes.
pub(super) fn identifier(name: &str) -> String {
    format!("\"{}\"", name.replace('"', "\"\""))
}

/// A string in single quotes, as the replication grammar reads it.
pub(super) fn literal(text: &str) -> String {
    format!("'{}'", text.replace('\'', "''"))
}
