//! SQL connections with deadlines.

use std::time::Duration;

use dr_core::port::SourceError;
use tokio_postgres::types::ToSql;
use tokio_postgres::{Client, Config, NoTls, Row};

const CONNECT_LIMIT: Duration = Duration::from_secs(10);

/// An ordinary query may take this long; starting a backup waits for a checkpoint.
pub(crate) const QUERY_LIMIT: Duration = Duration::from_secs(60);

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
        let server = describe(&config);
        let unreachable = |source| SourceError::Unreachable { server: server.clone(), source };
        let connected = tokio::time::timeout(CONNECT_LIMIT, config.connect(NoTls)).await;
        let (client, connection) = match connected {
            Err(_) => {
                return Err(unreachable(format!("no answer within {} s", CONNECT_LIMIT.as_secs()).into()));
            }
            Ok(Err(error)) if error.as_db_error().is_some() => {
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
        Ok(Sql { client, server })
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
        let failed = |source: Box<dyn std::error::Error + Send + Sync>| SourceError::Query {
            server: self.server.clone(),
            operation: doing.to_owned(),
            source,
        };
        match tokio::time::timeout(limit, self.client.query(query, parameters)).await {
            Err(_) => Err(failed(format!("no answer within {} s", limit.as_secs()).into())),
            Ok(Err(error)) if error.code().is_some_and(|code| code.code() == "42501") => {
                Err(SourceError::Denied {
                    server: self.server.clone(),
                    operation: doing.to_owned(),
                    source: dr_reason(&error).into(),
                })
            }
            Ok(Err(error)) => Err(failed(dr_reason(&error).into())),
            Ok(Ok(rows)) => Ok(rows),
        }
    }

    pub async fn row(&self, doing: &str, query: &str, limit: Duration) -> Result<Row, SourceError> {
        let rows = self.rows(doing, query, &[], limit).await?;
        rows.into_iter().next().ok_or_else(|| SourceError::Query {
            server: self.server.clone(),
            operation: doing.to_owned(),
            source: "the server answered nothing".into(),
        })
    }
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
