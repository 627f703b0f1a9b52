//! SQL connections with deadlines.

use std::time::Duration;

use dr_core::port::SourceError;
use futures_util::{Stream, StreamExt, stream};
use tokio_postgres::config::{ChannelBinding, SslMode, SslNegotiation};
use tokio_postgres::types::ToSql;
use tokio_postgres::{Client, Config, Row};

use crate::conn::{
    AsItIs, ChannelBindingMode, ConnInfo, Endpoint, Link, LinkError, SERVER_KEEPALIVE, SessionKind, link,
};

/// An ordinary query may take this long; starting a backup waits for a checkpoint.
pub(crate) const QUERY_LIMIT: Duration = Duration::from_secs(60);

/// How long a cancelled query may take to go away.
const CANCEL_LIMIT: Duration = Duration::from_secs(5);

/// A session that no database or role setting leads astray: names mean the catalogue's own objects
/// whatever a database's owner put into its search path, and no time-out ends a long backup. Given
/// at the start, since the owner's own settings would already bind what sets them later.
const SESSION: &str = "-c search_path=pg_catalog -c client_min_messages=warning -c statement_timeout=0 \
     -c lock_timeout=0 -c idle_session_timeout=0 -c idle_in_transaction_session_timeout=0";

/// Only PostgreSQL 17 and later know this one.
const TRANSACTION_TIMEOUT: &str =
    "SELECT set_config(name, '0', false) FROM pg_settings WHERE name = 'transaction_timeout'";

/// A connection and where it leads, for messages. The password never shows.
pub(crate) struct Sql {
    client: Client,
    info: ConnInfo,
    endpoint: Endpoint,
    encrypted: bool,
    server: String,
}

/// Why one way into the server failed, and whether no rule of its own lets this role in that way.
struct Failure {
    error: SourceError,
    no_rule: bool,
}

impl From<SourceError> for Failure {
    fn from(error: SourceError) -> Self {
        Failure { error, no_rule: false }
    }
}

impl Sql {
    pub async fn connect(conninfo: &str, database: Option<&str>) -> Result<Self, SourceError> {
        let mut info = ConnInfo::parse(conninfo)?;
        if let Some(database) = database {
            info = info.with_database(database);
        }
        Sql::connect_by(info).await
    }

    pub async fn connect_by(info: ConnInfo) -> Result<Self, SourceError> {
        let mut last = None;
        let mut second_best = None;
        for endpoint in &info.endpoints {
            match Sql::connect_to(&info, endpoint).await {
                Ok(sql) => match sql.is_wanted(info.session_kind).await {
                    Ok(true) => return Ok(sql),
                    Ok(false) if info.session_kind == SessionKind::PreferStandby => second_best = Some(sql),
                    Ok(false) => {
                        let reason = info.session_kind.unwanted();
                        last = Some(SourceError::Unreachable { server: sql.server, source: reason.into() });
                    }
                    Err(error) => last = Some(error),
                },
                Err(error) => last = Some(error),
            }
        }
        match (second_best, last) {
            (Some(sql), _) => Ok(sql),
            (None, Some(error)) => Err(error),
            (None, None) => {
                Err(SourceError::Unreachable { server: info.server(), source: "there is no host".into() })
            }
        }
    }

    /// Tries the ways that `sslmode` leaves: where one is optional, the other is tried too when the
    /// server's rules refuse the first.
    async fn connect_to(info: &ConnInfo, endpoint: &Endpoint) -> Result<Self, SourceError> {
        let server = endpoint.to_string();
        let mut last = None;
        for plain in info.tls.mode.ways() {
            let opened = match link(info, endpoint, *plain).await {
                Ok(opened) => opened,
                Err(LinkError::Unreachable(reason)) => {
                    return Err(SourceError::Unreachable { server, source: reason.into() });
                }
                Err(LinkError::Tls(reason)) => {
                    last = Some(denied(&server, reason));
                    continue;
                }
            };
            let encrypted = opened.encrypted;
            match Sql::begin(info, endpoint, opened).await {
                // No rule lets this role in this way; a wrong password is wrong in every way.
                Err(Failure { error, no_rule: true }) if encrypted != *plain => last = Some(error),
                Err(Failure { error, .. }) => return Err(last.unwrap_or(error)),
                Ok(sql) => {
                    tracing::debug!(%server, encrypted, database = %info.database, "connected");
                    return Ok(sql);
                }
            }
        }
        Err(last.unwrap_or(SourceError::Unreachable { server, source: "no way in".into() }))
    }

    async fn begin(info: &ConnInfo, endpoint: &Endpoint, link: Link) -> Result<Self, Failure> {
        let server = endpoint.to_string();
        let encrypted = link.encrypted;
        let config = config_of(info, endpoint, encrypted);
        let unreachable = |reason: String| {
            Failure::from(SourceError::Unreachable { server: server.clone(), source: reason.into() })
        };
        let limit = info.connect_limit;
        let connected = config.connect_raw(link.stream, AsItIs);
        let (client, connection) = match tokio::time::timeout(limit, connected).await {
            Err(_) => return Err(unreachable(late(limit))),
            Ok(Err(error)) if error.code().is_some_and(|code| is_passing(code.code())) => {
                return Err(unreachable(dr_reason(&error)));
            }
            // No code: this side refuses (no password, no channel binding), or the stream was lost.
            Ok(Err(error)) if error.code().is_some() || is_refusal(&error) => {
                let no_rule = error.code().is_some_and(|code| code.code() == "28000");
                return Err(Failure { error: denied(&server, dr_reason(&error)), no_rule });
            }
            Ok(Err(error)) => return Err(unreachable(dr_reason(&error))),
            Ok(Ok(pair)) => pair,
        };
        // The task ends with the client; its error reaches the next query.
        tokio::spawn(connection);
        let sql = Sql { client, info: info.clone(), endpoint: endpoint.clone(), encrypted, server };
        match tokio::time::timeout(QUERY_LIMIT, sql.client.batch_execute(TRANSACTION_TIMEOUT)).await {
            Ok(Ok(())) => Ok(sql),
            Ok(Err(error)) => Err(sql.failed("set up a session", dr_reason(&error)).into()),
            Err(_) => Err(sql.failed("set up a session", late(QUERY_LIMIT)).into()),
        }
    }

    async fn is_wanted(&self, kind: SessionKind) -> Result<bool, SourceError> {
        if kind == SessionKind::Any {
            return Ok(true);
        }
        let query = "SELECT pg_is_in_recovery(), current_setting('default_transaction_read_only') = 'on'";
        let row = self.row("tell whether it is a standby", query, QUERY_LIMIT).await?;
        Ok(kind.accepts(row.get(0), row.get(1)))
    }

    /// Ends a query that takes too long: the session stays usable, and what is asked next must not
    /// wait behind it.
    async fn cancel(&self) {
        let cancel = async {
            let link = link(&self.info, &self.endpoint, !self.encrypted).await.ok()?;
            self.client.cancel_token().cancel_query_raw(link.stream, AsItIs).await.ok()
        };
        let _ = tokio::time::timeout(CANCEL_LIMIT, cancel).await;
    }

    /// A connection string's meaning for further connections to this very server, and no other of
    /// its hosts.
    pub fn same_server(&self) -> ConnInfo {
        let mut info = self.info.clone();
        info.endpoints = vec![self.endpoint.clone()];
        info.session_kind = SessionKind::Any;
        info
    }

    pub fn server(&self) -> &str {
        &self.server
    }

    pub async fn rows(
        &self,
        doing: &str,
        query: &str,
        parameters: &[&(dyn ToSql + Sync)],
        limit: Duration,
    ) -> Result<Vec<Row>, SourceError> {
        match tokio::time::timeout(limit, self.client.query(query, parameters)).await {
            Err(_) => {
                self.cancel().await;
                Err(self.failed(doing, late(limit)))
            }
            Ok(Err(error)) => Err(self.refused(doing, &error)),
            Ok(Ok(rows)) => Ok(rows),
        }
    }

    /// Rows as they are taken, each within `limit`; the session ends with the stream.
    pub async fn stream(
        self,
        doing: &'static str,
        query: &str,
        parameters: &[&(dyn ToSql + Sync)],
        limit: Duration,
    ) -> Result<impl Stream<Item = Result<Row, SourceError>> + Send + use<>, SourceError> {
        let asked = self.client.query_raw(query, parameters.iter().copied());
        let rows = match tokio::time::timeout(limit, asked).await {
            Err(_) => {
                self.cancel().await;
                return Err(self.failed(doing, late(limit)));
            }
            Ok(Err(error)) => return Err(self.refused(doing, &error)),
            Ok(Ok(rows)) => Box::pin(rows),
        };
        Ok(stream::try_unfold((self, rows), move |(sql, mut rows)| async move {
            match tokio::time::timeout(limit, rows.next()).await {
                Err(_) => {
                    sql.cancel().await;
                    Err(sql.failed(doing, late(limit)))
                }
                Ok(Some(Err(error))) => Err(sql.refused(doing, &error)),
                Ok(row) => Ok(row.transpose().ok().flatten().map(|row| (row, (sql, rows)))),
            }
        }))
    }

    fn refused(&self, doing: &str, error: &tokio_postgres::Error) -> SourceError {
        let (operation, source) = (doing.to_owned(), dr_reason(error).into());
        match error.code() {
            Some(code) if code.code() == "42501" => {
                SourceError::Denied { server: self.server.clone(), operation, source }
            }
            _ => SourceError::Query { server: self.server.clone(), operation, source },
        }
    }

    fn failed(&self, doing: &str, reason: String) -> SourceError {
        let operation = doing.to_owned();
        SourceError::Query { server: self.server.clone(), operation, source: reason.into() }
    }

    pub async fn row(&self, doing: &str, query: &str, limit: Duration) -> Result<Row, SourceError> {
        let rows = self.rows(doing, query, &[], limit).await?;
        rows.into_iter().next().ok_or_else(|| self.failed(doing, "the server answered nothing".into()))
    }
}

/// Refusals that pass: too many connections, no memory, starting up or shutting down (classes 53
/// and 57 in `errcodes.txt`).
fn is_passing(code: &str) -> bool {
    code.starts_with("53") || code.starts_with("57")
}

fn late(limit: Duration) -> String {
    format!("no answer within {} s", limit.as_secs())
}

/// The server's own words, which tokio-postgres keeps in the source.
fn dr_reason(error: &tokio_postgres::Error) -> String {
    match (error.as_db_error(), std::error::Error::source(error)) {
        (Some(db), _) => format!("{}: {}", db.severity(), db.message()),
        (None, Some(source)) => format!("{error}: {source}"),
        (None, None) => error.to_string(),
    }
}

fn denied(server: &str, reason: String) -> SourceError {
    SourceError::Denied {
        server: server.to_owned(),
        operation: SourceError::CONNECTION.into(),
        source: reason.into(),
    }
}

/// Whether the other side was there and authentication failed on this one.
fn is_refusal(error: &tokio_postgres::Error) -> bool {
    let text = error.to_string();
    text.starts_with("authentication error") || text.starts_with("invalid configuration")
}

/// For a stream that is open, and encrypted if it is to be: TLS is not begun a second time.
fn config_of(info: &ConnInfo, endpoint: &Endpoint, encrypted: bool) -> Config {
    let mut config = Config::new();
    config.user(&info.user).dbname(&info.database);
    config.application_name(info.application_name.as_deref().unwrap_or("dr"));
    let own = info.options.as_deref().unwrap_or_default();
    config.options(format!("{SERVER_KEEPALIVE} {own} {SESSION}"));
    if let Some(password) = info.password_for(endpoint, &info.database) {
        config.password(password);
    }
    config.ssl_mode(if encrypted { SslMode::Require } else { SslMode::Disable });
    config.ssl_negotiation(SslNegotiation::Direct);
    config.channel_binding(match info.channel_binding {
        ChannelBindingMode::Disable => ChannelBinding::Disable,
        ChannelBindingMode::Prefer => ChannelBinding::Prefer,
        ChannelBindingMode::Require => ChannelBinding::Require,
    });
    config
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_servers_keepalive_can_be_chosen_and_what_keeps_a_session_safe_cannot() {
        let own = "-c tcp_keepalives_idle=7 -c search_path=evil";
        let info = ConnInfo::parse(&format!("host=a user=x options='{own}'")).unwrap();
        let config = config_of(&info, &info.endpoints[0], false);
        let options = config.get_options().unwrap();
        let last = |name: &str| options.rsplit(name).next().unwrap().split(' ').next().unwrap().to_owned();
        assert_eq!(last("tcp_keepalives_idle="), "7");
        assert_eq!(last("tcp_keepalives_count="), "3");
        assert_eq!(last("search_path="), "pg_catalog");
    }
}
