//! What the catalogues tell about a cluster.

use std::collections::BTreeSet;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use dr_core::port::{HostFile, HostNeeds, RelationEntry, SourceError, TablespaceFacts};

use futures_util::stream::{self, BoxStream};
use futures_util::{Stream, StreamExt, TryStreamExt};
use tokio_postgres::Row;

use crate::sql::{QUERY_LIMIT, Sql};

/// The largest file outside the data directory that is kept.
const MAX_HOST_FILE: u64 = 1 << 20;

/// A million relations take some seconds to list.
const CATALOGUE_LIMIT: Duration = Duration::from_secs(600);

/// Tries to get into a database of a server that is busy for the moment.
const CONNECT_TRIES: u32 = 3;

/// A name as bytes of UTF-8 where the database's encoding allows: a `SQL_ASCII` database holds
/// whatever its clients sent, and asking for that as text fails the whole query.
macro_rules! name {
    ($column:literal) => {
        concat!(
            "CASE WHEN getdatabaseencoding() IN ('UTF8', 'SQL_ASCII') THEN replace(",
            $column,
            "::text, chr(92), repeat(chr(92), 2))::bytea ELSE convert_to(",
            $column,
            "::text, 'UTF8') END"
        )
    };
}

/// Without those that an interrupted DROP DATABASE left (`datconnlimit` −2). Sorted as bytes, as
/// every listing of the catalogue is.
const DATABASES: &str = concat!(
    "SELECT ",
    name!("datname"),
    ", oid, dattablespace FROM pg_database WHERE datallowconn AND datconnlimit <> -2 ORDER BY 1"
);

/// File numbers come from `pg_relation_filenode`, which also resolves mapped relations.
const RELATIONS: &str = concat!(
    "SELECT ",
    name!("n.nspname"),
    ", ",
    name!("c.relname"),
    ", c.relkind::text, c.oid, pg_relation_filenode(c.oid), \
       CASE WHEN c.reltablespace = 0 THEN $1 ELSE c.reltablespace END, \
       coalesce(i.indrelid, t.oid, 0::oid) AS owner, c.relisshared \
     FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace \
     LEFT JOIN pg_index i ON i.indexrelid = c.oid \
     LEFT JOIN pg_class t ON c.relkind = 't' AND t.reltoastrelid = c.oid \
     WHERE pg_relation_filenode(c.oid) IS NOT NULL AND c.relpersistence <> 't' ORDER BY 1, 2"
);

/// A database that can be connected to.
struct Database {
    name: String,
    oid: u32,
    tablespace: u32,
}

async fn databases(sql: &Sql) -> Result<Vec<Database>, SourceError> {
    let rows = sql.rows("list its databases", DATABASES, &[], QUERY_LIMIT).await?;
    let database = |row: &Row| {
        let name = match String::from_utf8(row.get(0)) {
            Ok(name) => name,
            Err(error) => {
                let name = String::from_utf8_lossy(error.as_bytes());
                tracing::warn!(%name, "the database's name is not UTF-8: its relations are not catalogued");
                return None;
            }
        };
        Some(Database { name, oid: row.get(1), tablespace: row.get(2) })
    };
    Ok(rows.iter().filter_map(database).collect())
}

/// A session inside a database; `None` when this role is not let in or it is gone. The files are
/// backed up all the same, so that is told, and no reason to have no backup.
async fn inside(conninfo: &str, database: &Database) -> Option<Sql> {
    for attempt in 1..=CONNECT_TRIES {
        match Sql::connect(conninfo, Some(&database.name)).await {
            Ok(sql) => return Some(sql),
            Err(SourceError::Unreachable { .. }) if attempt < CONNECT_TRIES => {
                tokio::time::sleep(Duration::from_secs(1)).await;
            }
            Err(error) => {
                let reason = std::error::Error::source(&error).map(ToString::to_string).unwrap_or_default();
                let database = &database.name;
                tracing::warn!(%database, %reason, "the database cannot be entered: its relations are not catalogued");
                return None;
            }
        }
    }
    None
}

/// The names of databases that this role cannot enter.
pub(crate) async fn closed_databases(sql: &Sql, conninfo: &str) -> Result<Vec<String>, SourceError> {
    let mut closed = Vec::new();
    for database in databases(sql).await? {
        if inside(conninfo, &database).await.is_none() {
            closed.push(database.name);
        }
    }
    Ok(closed)
}

/// The relations of all databases, one connection at a time.
pub(crate) fn relations<'a>(
    sql: &'a Sql,
    conninfo: &'a str,
) -> BoxStream<'a, Result<RelationEntry, SourceError>> {
    stream::once(databases(sql))
        .map_ok(|databases| stream::iter(databases.into_iter().map(Ok::<_, SourceError>)))
        .try_flatten()
        .map_ok(move |database| relations_of(conninfo, database))
        .try_flatten()
        .boxed()
}

fn relations_of(
    conninfo: &str,
    database: Database,
) -> impl Stream<Item = Result<RelationEntry, SourceError>> + use<'_> {
    let opened = async move {
        let Some(sql) = inside(conninfo, &database).await else { return Ok(stream::empty().boxed()) };
        let doing = "list its relations";
        let rows = sql.stream(doing, RELATIONS, &[&database.tablespace], CATALOGUE_LIMIT).await?;
        Ok::<_, SourceError>(rows.map_ok(move |row| relation(&database, &row)).boxed())
    };
    stream::once(opened).try_flatten()
}

fn relation(database: &Database, row: &Row) -> RelationEntry {
    let text = |bytes: Vec<u8>| String::from_utf8_lossy(&bytes).into_owned();
    let shared: bool = row.get(7);
    RelationEntry {
        database: database.name.clone(),
        schema: text(row.get(0)),
        name: text(row.get(1)),
        kind: row.get::<_, String>(2).chars().next().unwrap_or('?'),
        oid: row.get(3),
        database_oid: if shared { 0 } else { database.oid },
        tablespace_oid: row.get(5),
        filenode: row.get(4),
        owner_oid: row.get(6),
    }
}

/// Tablespaces that lie outside the data directory.
pub(crate) async fn tablespaces(sql: &Sql) -> Result<Vec<TablespaceFacts>, SourceError> {
    let query = "SELECT oid, spcname::text, pg_tablespace_location(oid) FROM pg_tablespace \
                 WHERE pg_tablespace_location(oid) <> '' ORDER BY oid";
    let rows = sql.rows("list its tablespaces", query, &[], QUERY_LIMIT).await?;
    Ok(rows
        .iter()
        .map(|row| TablespaceFacts { oid: row.get(0), name: row.get(1), location: row.get(2) })
        .collect())
}

/// Files outside the data directory: configuration as on Debian, certificates, keys, includes.
pub(crate) async fn host_files(sql: &Sql, data: &Path) -> Result<Vec<HostFile>, SourceError> {
    let query = "SELECT name::text, setting FROM pg_settings WHERE setting <> '' AND name IN \
                 ('config_file', 'hba_file', 'ident_file', 'ssl_cert_file', 'ssl_key_file', 'ssl_ca_file', 'ssl_crl_file')";
    let mut wanted: Vec<(String, PathBuf)> = Vec::new();
    for row in sql.rows("list its configuration files", query, &[], QUERY_LIMIT).await? {
        wanted.push((row.get(0), PathBuf::from(row.get::<_, String>(1))));
    }
    let includes = "SELECT DISTINCT sourcefile FROM pg_settings WHERE sourcefile IS NOT NULL";
    // The rules' files may include others since PostgreSQL 16.
    let rules = "SELECT DISTINCT to_jsonb(r) ->> 'file_name' FROM pg_hba_file_rules r \
                 WHERE to_jsonb(r) ->> 'file_name' IS NOT NULL";
    for query in [includes, rules] {
        // Only privileged roles see the source files; without them the main files are kept.
        for row in sql.rows("list its includes", query, &[], QUERY_LIMIT).await.unwrap_or_default() {
            wanted.push(("include".to_owned(), PathBuf::from(row.get::<_, String>(0))));
        }
    }
    let mut seen = BTreeSet::new();
    let mut out = Vec::new();
    for (role, path) in wanted {
        let outside = path.is_absolute() && !path.starts_with(data);
        if !outside || !seen.insert(path.clone()) {
            continue;
        }
        let Ok(meta) = std::fs::metadata(&path) else { continue };
        let small = meta.len() <= MAX_HOST_FILE;
        out.push(HostFile {
            path: path.display().to_string(),
            role,
            mode: meta.permissions().mode() & 0o777,
            content: small.then(|| std::fs::read(&path).ok()).flatten(),
        });
    }
    Ok(out)
}

/// Collations with versions, by provider: databases' own, and those that their objects use.
/// `datlocale` was `daticulocale` before PostgreSQL 17, `colllocale` was `colliculocale`.
const DATABASE_COLLATIONS: &str = "\
SELECT datlocprovider::text, coalesce(to_jsonb(d) ->> 'datlocale', to_jsonb(d) ->> 'daticulocale', datcollate), \
       datcollversion FROM pg_database d WHERE datcollversion IS NOT NULL";
const OBJECT_COLLATIONS: &str = "\
SELECT DISTINCT collprovider::text, coalesce(to_jsonb(c) ->> 'colllocale', to_jsonb(c) ->> 'colliculocale', collcollate), \
       collversion FROM pg_collation c WHERE collversion IS NOT NULL AND oid IN \
       (SELECT refobjid FROM pg_depend WHERE refclassid = 'pg_collation'::regclass)";

/// Libraries and collations that a host must have.
pub(crate) async fn host_needs(sql: &Sql, conninfo: &str, major: u32) -> Result<HostNeeds, SourceError> {
    let query = "SELECT setting FROM pg_settings WHERE setting <> '' AND name IN \
                 ('shared_preload_libraries', 'session_preload_libraries', 'local_preload_libraries')";
    let mut libraries = BTreeSet::new();
    for row in sql.rows("list its libraries", query, &[], QUERY_LIMIT).await? {
        let names = row.get::<_, String>(0);
        libraries.extend(
            names.split(',').map(|n| n.trim().trim_matches('"').trim_start_matches("$libdir/").to_owned()),
        );
    }
    let mut collations = BTreeSet::new();
    collect_collations(sql, DATABASE_COLLATIONS, &mut collations).await?;
    for database in databases(sql).await? {
        let Some(inside) = inside(conninfo, &database).await else { continue };
        let query = "SELECT DISTINCT probin FROM pg_proc WHERE probin IS NOT NULL AND oid >= 16384";
        for row in inside.rows("list its libraries", query, &[], CATALOGUE_LIMIT).await? {
            libraries.insert(row.get::<_, String>(0).trim_start_matches("$libdir/").to_owned());
        }
        collect_collations(&inside, OBJECT_COLLATIONS, &mut collations).await?;
    }
    Ok(HostNeeds {
        major,
        architecture: rustix::system::uname().machine().to_string_lossy().into_owned(),
        libraries: libraries.into_iter().filter(|name| !name.is_empty()).collect(),
        collations: collations.into_iter().collect(),
    })
}

async fn collect_collations(
    sql: &Sql,
    query: &str,
    out: &mut BTreeSet<(String, String)>,
) -> Result<(), SourceError> {
    for row in sql.rows("list its collations", query, &[], CATALOGUE_LIMIT).await? {
        let provider = match row.get::<_, String>(0).as_str() {
            "i" => "icu",
            "b" => "builtin",
            _ => "libc",
        };
        out.insert((format!("{provider}:{}", row.get::<_, String>(1)), row.get(2)));
    }
    Ok(())
}
