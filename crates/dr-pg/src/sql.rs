//! SQL connections with deadlines.

use std::time::Duration;

use dr_core::port::SourceError;
use tokio_postgres::types::ToSql;
use tokio_postgres::{Client, Config, NoTls, Row};

const CONNECT_LIMIT: Duration = Duration::from_secs(10);

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
    server: String,
}

impl Sql {
    pub async fn connect(conninfo: &str, database: Option<&str>) -> Result<Self, SourceError> {
        let mut config: Config = conninfo.parse().map_err(|error: tokio_postgres::Error| {
            SourceError::Invalid { setting: "the connection".into(), reason: dr_reason(&error) }
        })?;
        if let Some(database) = database {
            config.dbname(database);
        }
        if config.get_user().is_none()
            && let Some(name) = crate::process::user_name(rustix::process::geteuid().as_raw())
        {
            config.user(name);
        }
        config.application_name("dr");
        let options = config.get_options().map(|own| format!("{own} {SESSION}"));
        config.options(options.as_deref().unwrap_or(SESSION));
        let server = describe(&config);
        let unreachable = |source| SourceError::Unreachable { server: server.clone(), source };
        let connected = tokio::time::timeout(CONNECT_LIMIT, config.connect(NoTls)).await;
        let (client, connection) = match connected {
            Err(_) => {
                return Err(unreachable(late(CONNECT_LIMIT).into()));
            }
            Ok(Err(error)) if error.code().is_some_and(|code| !is_passing(code.code())) => {
                return Err(SourceError::Denied {
                    server,
                    operation: "the connection".into(),
                    source: dr_reason(&error).into(),
                });
            }
            Ok(Err(error)) => return Err(unreachable(dr_reason(&error).into())),
            Ok(Ok(pair)) => pair,
        };
        // The task ends with the client; its error reaches the next query.
        tokio::spawn(connection);
        let sql = Sql { client, server };
        match tokio::time::timeout(QUERY_LIMIT, sql.client.batch_execute(TRANSACTION_TIMEOUT)).await {
            Ok(Ok(())) => Ok(sql),
            Ok(Err(error)) => Err(sql.failed("set up a session", dr_reason(&error))),
            Err(_) => Err(sql.failed("set up a session", late(QUERY_LIMIT))),
        }
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
                // The session stays usable: what is asked next must not wait behind this query.
                let cancel = self.client.cancel_token();
                let _ = tokio::time::timeout(CANCEL_LIMIT, cancel.cancel_query(NoTls)).await;
                Err(self.failed(doing, late(limit)))
            }
            Ok(Err(error)) if error.code().is_some_and(|code| code.code() == "42501") => {
                Err(SourceError::Denied {
                    server: self.server.clone(),
                    operation: doing.to_owned(),
                    source: dr_reason(&error).into(),
                })
            }
            Ok(Err(error)) => Err(self.failed(doing, dr_reason(&error))),
            Ok(Ok(rows)) => Ok(rows),
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

fn describe(config: &Config) -> String {
    use tokio_postgres::config::Host;
    let port = config.get_ports().first().copied().unwrap_or(5432);
    match config.get_hosts().first() {
        Some(Host::Tcp(host)) => format!("{host}:{port}"),
        Some(Host::Unix(dir)) => format!("{}/.s.PGSQL.{port}", dir.display()),
        None => format!("localhost:{port}"),
    }
}
