//! Whether a server is ready for backups over the replication connection.

use dr_core::error::{Classified, ErrorClass};
use dr_core::port::{Finding, SourceError, Verdict};

use crate::local::{StandbyPolicy, check as shared};
use crate::replication::{ReplicationClient, ReplicationMode};
use crate::sql::{QUERY_LIMIT, Sql};

const ROLE: &str = "SELECT current_user::text, rolreplication OR rolsuper, \
     rolsuper OR pg_has_role('pg_read_server_files', 'USAGE') FROM pg_roles WHERE rolname = current_user";

const SENDERS: &str = "SELECT current_setting('max_wal_senders')::int4, (SELECT count(*)::int4 FROM pg_stat_activity \
     WHERE backend_type = 'walsender')";

pub(super) async fn check(
    sql: &Sql,
    conninfo: &str,
    standby: StandbyPolicy,
) -> Result<Vec<Finding>, SourceError> {
    let settings = shared::settings(sql).await?;
    let mut findings = vec![Finding::good("server", format!("{} answers", sql.server()))];
    findings.push(shared::version(settings.get("server_version_num").map_or("", String::as_str)));
    findings.extend(role(sql).await?);
    let senders = senders(sql).await?;
    let has_room = senders.verdict == Verdict::Good;
    findings.push(senders);
    findings.push(connection(sql, has_room).await?);
    findings.push(shared::role(sql, standby).await?);
    findings.extend(shared::databases(sql, conninfo).await?);
    findings.extend(shared::server(&settings));
    findings.extend(crate::primary::slot_findings(sql, None).await?);
    findings.push(shared::archiver(sql).await?);
    findings.push(shared::clock(sql).await?);
    Ok(findings)
}

async fn role(sql: &Sql) -> Result<Vec<Finding>, SourceError> {
    let row = sql.row("show privileges", ROLE, QUERY_LIMIT).await?;
    let (user, may, may_read): (String, bool, bool) = (row.get(0), row.get(1), row.get(2));
    let mut findings = vec![if may {
        Finding::good("privileges", format!("role {user} may replicate"))
    } else {
        let fix = format!("ALTER ROLE {user} REPLICATION;");
        Finding::bad("privileges", format!("role {user} may not replicate"), fix)
    }];
    if !may_read {
        findings.push(Finding::warning(
            "torn-pages",
            format!(
                "role {user} cannot read a page a second time: one that was being written may count as damaged \
                 and the backup as degraded"
            ),
            format!("GRANT pg_read_server_files TO {user}; (it may then read every file of the server)"),
        ));
    }
    Ok(findings)
}

async fn senders(sql: &Sql) -> Result<Finding, SourceError> {
    let row = sql.row("count its WAL senders", SENDERS, QUERY_LIMIT).await?;
    let (all, used): (i32, i32) = (row.get(0), row.get(1));
    Ok(if used < all {
        Finding::good("wal-senders", format!("{used} of {all} WAL senders are in use"))
    } else {
        Finding::bad(
            "wal-senders",
            format!("all {all} WAL senders are in use"),
            "ALTER SYSTEM SET max_wal_senders = a higher number; then restart the server.",
        )
    })
}

/// Only a try shows what pg_hba.conf says about replication. A connection that is lost on the way, to
/// a server that answers and has room, is nothing to be mended there: it passes.
async fn connection(sql: &Sql, has_room: bool) -> Result<Finding, SourceError> {
    Ok(match ReplicationClient::connect(&sql.same_server(), ReplicationMode::Physical).await {
        Ok(client) => {
            let tls = if client.is_encrypted() { "with" } else { "without" };
            Finding::good("replication", format!("the replication connection works, {tls} TLS"))
        }
        Err(error) if has_room && error.class() == ErrorClass::Transient => return Err(error.into()),
        Err(error) => Finding::bad("replication", error.to_string(), error.hint().unwrap_or_default()),
    })
}
