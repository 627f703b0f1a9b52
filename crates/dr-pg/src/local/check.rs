//! Whether a server is ready for backups: each thing, and its fix.

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use dr_core::port::{Finding, SourceError};

use super::StandbyPolicy;
use crate::control;
use crate::sql::{QUERY_LIMIT, Sql};
use crate::{NEWEST_MAJOR, OLDEST_MAJOR};

/// Clocks that differ by more than this make times of targets doubtful.
const CLOCK_LIMIT_MS: i64 = 2_000;

const SETTINGS: &str = "SELECT name::text, setting FROM pg_settings WHERE name IN ('wal_level', 'archive_mode', \
     'archive_command', 'archive_library', 'archive_timeout', 'full_page_writes', 'data_checksums', 'server_version_num')";

const PRIVILEGES: &str = "SELECT has_function_privilege('pg_backup_start(text, boolean)', 'EXECUTE'), \
     has_function_privilege('pg_backup_stop(boolean)', 'EXECUTE'), pg_has_role('pg_read_all_settings', 'USAGE'), \
     current_user::text";

pub(super) async fn check(
    sql: &Sql,
    conninfo: &str,
    data: Result<PathBuf, SourceError>,
    standby: StandbyPolicy,
) -> Result<Vec<Finding>, SourceError> {
    let settings = settings(sql).await?;
    let mut findings = vec![Finding::good("server", format!("{} answers", sql.server()))];
    findings.push(version(settings.get("server_version_num").map_or("", String::as_str)));
    findings.push(privileges(sql).await?);
    findings.push(role(sql, standby).await?);
    let free = data.as_ref().ok().and_then(|data| free_beside_wal(data));
    match data {
        Ok(data) => {
            findings.push(data_directory(sql, &data).await?);
            findings.extend(file_system(&data));
        }
        Err(error) => findings.push(Finding::bad(
            "data-directory",
            format!("where the data directory is cannot be told: {}", whole(&error)),
            "GRANT pg_read_all_settings to the role, or set [cluster] data_directory.",
        )),
    }
    findings.extend(databases(sql, conninfo).await?);
    findings.extend(server(&settings));
    findings.extend(crate::primary::slot_findings(sql, free).await?);
    findings.push(archiver(sql).await?);
    findings.push(clock(sql).await?);
    Ok(findings)
}

/// The settings that decide whether a backup is possible, and how good it is.
pub(crate) async fn settings(sql: &Sql) -> Result<HashMap<String, String>, SourceError> {
    let rows = sql.rows("show its settings", SETTINGS, &[], QUERY_LIMIT).await?;
    Ok(rows.iter().map(|row| (row.get(0), row.get(1))).collect())
}

/// What the server's settings mean for backups and archiving.
pub(crate) fn server(settings: &HashMap<String, String>) -> Vec<Finding> {
    let get = |name: &str| settings.get(name).cloned().unwrap_or_default();
    let mut findings = Vec::new();
    findings.push(match get("wal_level").as_str() {
        level @ ("replica" | "logical") => Finding::good("wal-level", format!("wal_level is {level}")),
        level => Finding::bad(
            "wal-level",
            format!("wal_level is {level}: WAL does not hold enough to recover"),
            "ALTER SYSTEM SET wal_level = 'replica'; then restart the server.",
        ),
    });
    findings.extend(archiving(&get("archive_mode"), &get("archive_command"), &get("archive_library")));
    findings.push(if get("archive_timeout") == "0" {
        Finding::warning(
            "archive-timeout",
            "archive_timeout is 0: on a quiet server WAL stays unarchived for any length of time",
            "ALTER SYSTEM SET archive_timeout = '60s'; SELECT pg_reload_conf();",
        )
    } else {
        Finding::good(
            "archive-timeout",
            format!("WAL is archived at least every {} s", get("archive_timeout")),
        )
    });
    if get("full_page_writes") != "on" {
        findings.push(Finding::warning(
            "full-page-writes",
            "full_page_writes is off: a crash can tear pages beyond repair",
            "ALTER SYSTEM SET full_page_writes = on; SELECT pg_reload_conf();",
        ));
    }
    findings.push(if get("data_checksums") == "on" {
        Finding::good("data-checksums", "pages carry checksums, which each backup checks")
    } else {
        Finding::warning(
            "data-checksums",
            "pages carry no checksums: damage on the disk is backed up unseen",
            "Stop the server and run pg_checksums --enable.",
        )
    });
    findings
}

pub(crate) fn version(number: &str) -> Finding {
    let major = number.parse::<u32>().unwrap_or(0) / 10_000;
    let detail = format!("PostgreSQL {major}");
    if (OLDEST_MAJOR..=NEWEST_MAJOR).contains(&major) {
        Finding::good("version", detail)
    } else {
        let fix = format!("dr supports PostgreSQL {OLDEST_MAJOR} to {NEWEST_MAJOR}.");
        Finding::bad("version", format!("{detail} is not supported"), fix)
    }
}

async fn privileges(sql: &Sql) -> Result<Finding, SourceError> {
    let row = sql.row("show privileges", PRIVILEGES, QUERY_LIMIT).await?;
    let (start, stop, settings, user): (bool, bool, bool, String) =
        (row.get(0), row.get(1), row.get(2), row.get(3));
    let mut missing = Vec::new();
    if !start {
        missing.push(format!("GRANT EXECUTE ON FUNCTION pg_backup_start(text, boolean) TO {user};"));
    }
    if !stop {
        missing.push(format!("GRANT EXECUTE ON FUNCTION pg_backup_stop(boolean) TO {user};"));
    }
    if !settings {
        missing.push(format!("GRANT pg_read_all_settings TO {user};"));
    }
    Ok(if missing.is_empty() {
        Finding::good("privileges", format!("role {user} may take backups"))
    } else {
        let detail = format!("role {user} lacks {} of the privileges that a backup needs", missing.len());
        Finding::bad("privileges", detail, missing.join(" "))
    })
}

async fn data_directory(sql: &Sql, data: &Path) -> Result<Finding, SourceError> {
    let row =
        sql.row("tell what it is", "SELECT system_identifier FROM pg_control_system()", QUERY_LIMIT).await?;
    let server = row.get::<_, i64>(0) as u64;
    let place = data.display();
    Ok(match control::read(data) {
        Ok(facts) if facts.system_id.0 == server => {
            Finding::good("data-directory", format!("{place} can be read and is this server's"))
        }
        Ok(facts) => Finding::bad(
            "data-directory",
            format!("{place} belongs to cluster {}, the server is cluster {server}", facts.system_id),
            "Set [cluster] data_directory and connection to the same server.",
        ),
        Err(error) => Finding::bad(
            "data-directory",
            format!("{place} cannot be read: {}", whole(&error)),
            "Run dr as the user that owns the data directory (usually postgres).",
        ),
    })
}

pub(crate) async fn role(sql: &Sql, standby: StandbyPolicy) -> Result<Finding, SourceError> {
    let row = sql.row("tell what it is", "SELECT pg_is_in_recovery()", QUERY_LIMIT).await?;
    Ok(standby.finding(row.get(0)))
}

/// What an ordinary user may still write where WAL lies.
fn free_beside_wal(data: &Path) -> Option<u64> {
    let stat = rustix::fs::statvfs(data.join("pg_wal")).ok()?;
    Some(stat.f_bavail.saturating_mul(stat.f_frsize))
}

fn file_system(data: &Path) -> Option<Finding> {
    (!super::is_on_local_file_systems(data)).then(|| {
        let detail = "the data directory is on a file system whose time stamps are not relied upon: each \
                      backup reads every file";
        Finding::warning("file-system", detail, "")
    })
}

pub(crate) async fn databases(sql: &Sql, conninfo: &str) -> Result<Option<Finding>, SourceError> {
    let closed = super::facts::closed_databases(sql, conninfo).await?;
    Ok((!closed.is_empty()).then(|| {
        let names = closed.join(", ");
        let detail =
            format!("databases that cannot be entered: {names}; they are backed up, but not by relation");
        Finding::warning("databases", detail, "GRANT CONNECT ON DATABASE … to the role.")
    }))
}

fn whole(error: &dyn std::error::Error) -> String {
    error.source().map_or(error.to_string(), |source| format!("{error}: {source}"))
}

fn archiving(mode: &str, command: &str, library: &str) -> Vec<Finding> {
    let mut findings = Vec::new();
    findings.push(if mode == "off" {
        Finding::bad(
            "archive-mode",
            "archive_mode is off: nothing is archived, and no backup can be completed",
            "ALTER SYSTEM SET archive_mode = on; then restart the server.",
        )
    } else {
        Finding::good("archive-mode", format!("archive_mode is {mode}"))
    });
    let fix = "ALTER SYSTEM SET archive_command = 'dr wal push %p'; SELECT pg_reload_conf(); (dr init prints the whole line.)";
    findings.push(if !library.is_empty() {
        let detail = format!("archive_library is {library:?}: archive_command is not used");
        Finding::warning("archive-command", detail, fix)
    } else if command.contains("wal push") {
        Finding::good("archive-command", "archive_command pushes to dr")
    } else {
        let detail = format!("archive_command does not call `dr wal push`: {command:?}");
        Finding::warning("archive-command", detail, fix)
    });
    findings
}

pub(crate) async fn archiver(sql: &Sql) -> Result<Finding, SourceError> {
    let query = "SELECT archived_count, failed_count, coalesce(last_failed_wal, ''), \
                 coalesce(last_failed_time > coalesce(last_archived_time, '-infinity'), false) FROM pg_stat_archiver";
    let row = sql.row("show its archiver", query, QUERY_LIMIT).await?;
    let (archived, failed, last, failing): (i64, i64, String, bool) =
        (row.get(0), row.get(1), row.get(2), row.get(3));
    Ok(if failing {
        let detail = format!("archiving fails: {last} was tried last, {failed} failures in all");
        Finding::warning("archiver", detail, "The server's log has the command's own words.")
    } else {
        Finding::good("archiver", format!("{archived} files archived, none failing now"))
    })
}

pub(crate) async fn clock(sql: &Sql) -> Result<Finding, SourceError> {
    let query = "SELECT (extract(epoch FROM clock_timestamp()) * 1000)::int8";
    let row = sql.row("tell the time", query, QUERY_LIMIT).await?;
    let here = std::time::UNIX_EPOCH.elapsed().map_or(0, |d| d.as_millis() as i64);
    let apart = (here - row.get::<_, i64>(0)).abs();
    Ok(if apart > CLOCK_LIMIT_MS {
        let detail = format!("the clocks of this host and of the server differ by {apart} ms");
        Finding::warning("clock", detail, "Run a time service (chrony, systemd-timesyncd) on both.")
    } else {
        Finding::good("clock", "the clocks of this host and of the server agree")
    })
}
