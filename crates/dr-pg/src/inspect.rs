//! A look at the servers of a host, for `dr init`.

use std::path::PathBuf;

use dr_core::port::SourceError;

use crate::sql::{QUERY_LIMIT, Sql};

/// Where servers put their sockets.
const SOCKET_DIRS: [&str; 2] = ["/var/run/postgresql", "/tmp"];

/// What a running server says of itself.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ServerFacts {
    /// The cluster.
    pub system_id: dr_core::SystemId,
    /// `server_version_num`.
    pub version_num: u32,
    /// The data directory.
    pub data_directory: PathBuf,
    /// `cluster_name`, which Debian sets to version and name.
    pub cluster_name: String,
}

/// Asks the server behind a connection string.
pub async fn inspect(conninfo: &str) -> Result<ServerFacts, SourceError> {
    let sql = Sql::connect(conninfo, None).await?;
    let query = "SELECT system_identifier, current_setting('server_version_num')::int4, \
                 current_setting('data_directory'), current_setting('cluster_name') FROM pg_control_system()";
    let row = sql.row("tell what it is", query, QUERY_LIMIT).await?;
    Ok(ServerFacts {
        system_id: dr_core::SystemId(row.get::<_, i64>(0) as u64),
        version_num: row.get::<_, i32>(1) as u32,
        data_directory: PathBuf::from(row.get::<_, String>(2)),
        cluster_name: row.get(3),
    })
}

/// Connection strings of the servers that have a socket on this host.
pub fn find_servers() -> Vec<String> {
    let mut found = Vec::new();
    for dir in SOCKET_DIRS {
        let Ok(entries) = std::fs::read_dir(dir) else { continue };
        for entry in entries.flatten() {
            let name = entry.file_name();
            let port =
                name.to_str().and_then(|n| n.strip_prefix(".s.PGSQL.")).and_then(|n| n.parse::<u16>().ok());
            if let Some(port) = port {
                found.push(format!("host={dir} port={port} dbname=postgres"));
            }
        }
    }
    found.sort();
    found
}
