//! What the catalogues tell about a cluster.

use std::collections::BTreeSet;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use dr_core::port::{HostFile, HostNeeds, RelationEntry, SourceError, TablespaceFacts};

use crate::sql::{QUERY_LIMIT, Sql};

/// The largest file outside the data directory that is kept.
const MAX_HOST_FILE: u64 = 1 << 20;

const DATABASES: &str =
    "SELECT datname::text, oid, dattablespace FROM pg_database WHERE datallowconn ORDER BY 1";

/// File numbers come from `pg_relation_filenode`, which also resolves mapped relations.
const RELATIONS: &str = "\
SELECT n.nspname::text, c.relname::text, c.relkind::text, c.oid, pg_relation_filenode(c.oid), \
       CASE WHEN c.reltablespace = 0 THEN $1 ELSE c.reltablespace END, \
       coalesce(i.indrelid, t.oid, 0::oid) AS owner, c.relisshared \
FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace \
LEFT JOIN pg_index i ON i.indexrelid = c.oid \
LEFT JOIN pg_class t ON c.relkind = 't' AND t.reltoastrelid = c.oid \
WHERE pg_relation_filenode(c.oid) IS NOT NULL AND c.relpersistence <> 't'";

/// The relations of all databases, one connection at a time.
pub(super) async fn relations(sql: &Sql, conninfo: &str) -> Result<Vec<RelationEntry>, SourceError> {
    let mut out = Vec::new();
    for database in sql.rows("list its databases", DATABASES, &[], QUERY_LIMIT).await? {
        let (name, oid, tablespace): (String, u32, u32) = (database.get(0), database.get(1), database.get(2));
        let inside = Sql::connect(conninfo, Some(&name)).await?;
        for row in inside.rows("list its relations", RELATIONS, &[&tablespace], QUERY_LIMIT).await? {
            let shared: bool = row.get(7);
            out.push(RelationEntry {
                database: name.clone(),
                schema: row.get(0),
                name: row.get(1),
                kind: row.get::<_, String>(2).chars().next().unwrap_or('?'),
                oid: row.get(3),
                database_oid: if shared { 0 } else { oid },
                tablespace_oid: row.get(5),
                filenode: row.get(4),
                owner_oid: row.get(6),
            });
        }
    }
    out.sort_unstable();
    Ok(out)
}

/// Tablespaces that lie outside the data directory.
pub(super) async fn tablespaces(sql: &Sql) -> Result<Vec<TablespaceFacts>, SourceError> {
    let query = "SELECT oid, spcname::text, pg_tablespace_location(oid) FROM pg_tablespace \
                 WHERE pg_tablespace_location(oid) <> '' ORDER BY oid";
    let rows = sql.rows("list its tablespaces", query, &[], QUERY_LIMIT).await?;
    Ok(rows
        .iter()
        .map(|row| TablespaceFacts { oid: row.get(0), name: row.get(1), location: row.get(2) })
        .collect())
}

/// Files outside the data directory: configuration as on Debian, certificates, keys, includes.
pub(super) async fn host_files(sql: &Sql, data: &Path) -> Result<Vec<HostFile>, SourceError> {
    let query = "SELECT name::text, setting FROM pg_settings WHERE setting <> '' AND name IN \
                 ('config_file', 'hba_file', 'ident_file', 'ssl_cert_file', 'ssl_key_file', 'ssl_ca_file', 'ssl_crl_file')";
    let mut wanted: Vec<(String, PathBuf)> = Vec::new();
    for row in sql.rows("list its configuration files", query, &[], QUERY_LIMIT).await? {
        wanted.push((row.get(0), PathBuf::from(row.get::<_, String>(1))));
    }
    let includes = "SELECT DISTINCT sourcefile FROM pg_settings WHERE sourcefile IS NOT NULL";
    // Only privileged roles see the source files; without them the main files are kept.
    for row in sql.rows("list its includes", includes, &[], QUERY_LIMIT).await.unwrap_or_default() {
        wanted.push(("include".to_owned(), PathBuf::from(row.get::<_, String>(0))));
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

/// Libraries and collations that a host must have.
pub(super) async fn host_needs(sql: &Sql, conninfo: &str, major: u32) -> Result<HostNeeds, SourceError> {
    let query = "SELECT setting FROM pg_settings WHERE name IN \
                 ('shared_preload_libraries', 'session_preload_libraries') AND setting <> ''";
    let mut libraries = BTreeSet::new();
    for row in sql.rows("list its libraries", query, &[], QUERY_LIMIT).await? {
        let names = row.get::<_, String>(0);
        libraries.extend(
            names.split(',').map(|n| n.trim().trim_matches('"').trim_start_matches("$libdir/").to_owned()),
        );
    }
    let mut collations = BTreeSet::new();
    let query =
        "SELECT datname::text, datcollate, datcollversion FROM pg_database WHERE datcollversion IS NOT NULL";
    for row in sql.rows("list its collations", query, &[], QUERY_LIMIT).await? {
        collations.insert((format!("libc:{}", row.get::<_, String>(1)), row.get::<_, String>(2)));
    }
    for database in sql.rows("list its databases", DATABASES, &[], QUERY_LIMIT).await? {
        let inside = Sql::connect(conninfo, Some(&database.get::<_, String>(0))).await?;
        let query = "SELECT DISTINCT probin FROM pg_proc WHERE probin IS NOT NULL AND oid >= 16384";
        for row in inside.rows("list its libraries", query, &[], QUERY_LIMIT).await? {
            libraries.insert(row.get::<_, String>(0).trim_start_matches("$libdir/").to_owned());
        }
    }
    Ok(HostNeeds {
        major,
        architecture: rustix::system::uname().machine().to_string_lossy().into_owned(),
        libraries: libraries.into_iter().filter(|name| !name.is_empty()).collect(),
        collations: collations.into_iter().collect(),
    })
}
