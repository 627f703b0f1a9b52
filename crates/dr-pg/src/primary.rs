//! The server that standbys follow, asked by SQL.

use std::collections::HashMap;

use async_trait::async_trait;
use dr_core::plan::{WalRoom, judge_slots};
use dr_core::port::{Canary, Finding, Follower, Primary, PrimaryState, SlotState, SourceError};
use dr_core::{Lsn, SystemId, Timeline};

use crate::conn::ConnInfo;
use crate::local::micros;
use crate::sql::{QUERY_LIMIT, Sql};

const STATE: &str = "SELECT s.system_identifier, c.timeline_id, pg_is_in_recovery(), \
     (CASE WHEN pg_is_in_recovery() THEN pg_last_wal_replay_lsn() ELSE pg_current_wal_insert_lsn() END)::text, \
     (extract(epoch FROM clock_timestamp()) * 1000000)::int8, \
     pg_snapshot_xmax(pg_current_snapshot())::text::int8 \
     FROM pg_control_system() s, pg_control_checkpoint() c";

const SETTINGS: &str = "SELECT name::text, setting, coalesce(unit, '') FROM pg_settings WHERE name IN ('wal_level', \
     'archive_mode', 'archive_timeout', 'max_wal_senders', 'wal_keep_size', 'max_slot_wal_keep_size', \
     'max_replication_slots', 'hot_standby', 'full_page_writes', 'wal_log_hints', 'data_checksums')";

const FOLLOWERS: &str = "SELECT application_name, state, sync_state, replay_lsn::text, \
     pg_wal_lsn_diff(pg_current_wal_lsn(), replay_lsn)::int8, (extract(epoch FROM replay_lag) * 1000)::int8 \
     FROM pg_stat_replication ORDER BY application_name, pid";

const SLOTS: &str = "SELECT slot_name::text, slot_type, active, restart_lsn::text, \
     pg_wal_lsn_diff(CASE WHEN pg_is_in_recovery() THEN pg_last_wal_receive_lsn() ELSE pg_current_wal_lsn() END, \
     restart_lsn)::int8, wal_status, safe_wal_size, database::text, \
     coalesce((to_jsonb(s) ->> 'failover')::boolean, false) FROM pg_replication_slots s ORDER BY slot_name";

/// All slots of a server.
pub(crate) async fn slots(sql: &Sql) -> Result<Vec<SlotState>, SourceError> {
    let rows = sql.rows("list its replication slots", SLOTS, &[], QUERY_LIMIT).await?;
    let slot = |row: &tokio_postgres::Row| SlotState {
        name: row.get(0),
        kind: row.get(1),
        database: row.get(7),
        failover: row.get(8),
        active: row.get(2),
        restart: lsn(row.get(3)),
        retained_bytes: size(row.get(4)),
        wal_status: row.get(5),
        safe_bytes: size(row.get(6)),
    };
    Ok(rows.iter().map(slot).collect())
}

/// What the slots of a server mean for it; `free`: what is free beside its WAL.
pub(crate) async fn slot_findings(sql: &Sql, free: Option<u64>) -> Result<Vec<Finding>, SourceError> {
    // The setting is in megabytes; −1 is without limit.
    let query = "SELECT setting::int8 FROM pg_settings WHERE name = 'max_slot_wal_keep_size'";
    let row = sql.row("show its settings", query, QUERY_LIMIT).await?;
    let limit = u64::try_from(row.get::<_, i64>(0)).ok().map(|megabytes| megabytes << 20);
    Ok(judge_slots(&slots(sql).await?, WalRoom { limit, free }))
}

/// A primary behind a connection string.
#[derive(Clone, Debug)]
pub struct PrimaryServer {
    conninfo: String,
}

impl PrimaryServer {
    /// Nothing is opened yet.
    pub fn new(conninfo: impl Into<String>) -> Self {
        PrimaryServer { conninfo: conninfo.into() }
    }

    async fn connect(&self) -> Result<Sql, SourceError> {
        Sql::connect(&self.conninfo, None).await
    }
}

fn lsn(text: Option<String>) -> Option<Lsn> {
    text.and_then(|text| text.parse().ok())
}

fn size(value: Option<i64>) -> Option<u64> {
    value.map(|value| u64::try_from(value).unwrap_or(0))
}

#[async_trait]
impl Primary for PrimaryServer {
    async fn check_for_standby(&self, streams: bool) -> Result<Vec<Finding>, SourceError> {
        let sql = self.connect().await?;
        let rows = sql.rows("show its settings", SETTINGS, &[], QUERY_LIMIT).await?;
        let settings: HashMap<String, String> = rows.iter().map(|row| (row.get(0), row.get(1))).collect();
        let used = "SELECT (SELECT count(*) FROM pg_stat_activity WHERE backend_type = 'walsender')::int4, \
                    (SELECT count(*) FROM pg_replication_slots)::int4, pg_is_in_recovery()";
        let row = sql.row("count its WAL senders", used, QUERY_LIMIT).await?;
        Ok(findings(&settings, row.get(0), row.get(1), row.get(2), streams))
    }

    async fn state(&self) -> Result<PrimaryState, SourceError> {
        let sql = self.connect().await?;
        let row = sql.row("tell where it is", STATE, QUERY_LIMIT).await?;
        let position = lsn(row.get(3)).ok_or_else(|| SourceError::Query {
            server: sql.server().to_owned(),
            operation: "tell where it is".into(),
            source: "it has no WAL position".into(),
        })?;
        Ok(PrimaryState {
            system_id: SystemId(row.get::<_, i64>(0) as u64),
            timeline: Timeline(row.get::<_, i32>(1) as u32),
            lsn: position,
            time: micros(row.get(4)),
            next_xid: row.get::<_, i64>(5) as u64,
        })
    }

    async fn canary(&self, note: &str, archived: bool) -> Result<Canary, SourceError> {
        let sql = self.connect().await?;
        let query = "SELECT pg_logical_emit_message(true, 'dr', $1)::text, \
                     (extract(epoch FROM clock_timestamp()) * 1000000)::int8, \
                     ('x' || substr(pg_walfile_name(pg_current_wal_lsn()), 1, 8))::bit(32)::int4";
        let rows = sql.rows("write a mark into its WAL", query, &[&note], QUERY_LIMIT).await?;
        let found = rows.first().and_then(|row| Some((lsn(row.get(0))?, row.get(1), row.get(2))));
        let (at, time, timeline): (Lsn, i64, i32) = found.ok_or_else(|| SourceError::Query {
            server: sql.server().to_owned(),
            operation: "write a mark into its WAL".into(),
            source: "it gave no position".into(),
        })?;
        if archived {
            sql.row("close a WAL segment", "SELECT pg_switch_wal()::text", QUERY_LIMIT).await?;
        }
        Ok(Canary { lsn: at, timeline: Timeline(timeline as u32), time: micros(time) })
    }

    async fn ensure_slot(&self, name: &str) -> Result<bool, SourceError> {
        let sql = self.connect().await?;
        let doing = "make a replication slot";
        let query = "SELECT slot_type FROM pg_replication_slots WHERE slot_name = $1";
        let rows = sql.rows(doing, query, &[&name], QUERY_LIMIT).await?;
        if let Some(row) = rows.first() {
            let kind: String = row.get(0);
            if kind == "physical" {
                return Ok(false);
            }
            let reason = format!("slot {name} is there and is {kind}");
            return Err(SourceError::Invalid { setting: "--slot".into(), reason });
        }
        let query = "SELECT pg_create_physical_replication_slot($1, true)::text";
        sql.rows(doing, query, &[&name], QUERY_LIMIT).await?;
        Ok(true)
    }

    async fn drop_slot(&self, name: &str) -> Result<(), SourceError> {
        let sql = self.connect().await?;
        let query = "SELECT pg_drop_replication_slot(slot_name) FROM pg_replication_slots \
                     WHERE slot_name = $1 AND NOT active";
        sql.rows("drop a replication slot", query, &[&name], QUERY_LIMIT).await.map(drop)
    }

    async fn followers(&self) -> Result<Vec<Follower>, SourceError> {
        let sql = self.connect().await?;
        let rows = sql.rows("list its standbys", FOLLOWERS, &[], QUERY_LIMIT).await?;
        let follower = |row: &tokio_postgres::Row| Follower {
            name: row.get(0),
            state: row.get::<_, Option<String>>(1).unwrap_or_default(),
            sync: row.get::<_, Option<String>>(2).unwrap_or_default(),
            replayed: lsn(row.get(3)),
            lag_bytes: size(row.get(4)),
            lag_ms: size(row.get(5)),
        };
        Ok(rows.iter().map(follower).collect())
    }

    async fn slots(&self) -> Result<Vec<SlotState>, SourceError> {
        slots(&self.connect().await?).await
    }

    fn conninfo_for(&self, standby: &str) -> Result<String, SourceError> {
        ConnInfo::with_application(&self.conninfo, standby)
    }
}

/// What the settings mean for a standby.
fn findings(
    settings: &HashMap<String, String>,
    senders: i32,
    slots: i32,
    in_recovery: bool,
    streams: bool,
) -> Vec<Finding> {
    let get = |name: &str| settings.get(name).map_or("", String::as_str);
    let number = |name: &str| get(name).parse::<i64>().unwrap_or(0);
    let mut out = Vec::new();
    let mut bad = |wrong: bool, check: &'static str, detail: String, fix: &str| {
        out.push(if wrong { Finding::bad(check, detail, fix) } else { Finding::good(check, detail) });
    };
    let level = get("wal_level");
    let fix = "ALTER SYSTEM SET wal_level = 'replica'; then restart the server.";
    bad(!matches!(level, "replica" | "logical"), "wal-level", format!("wal_level is {level}"), fix);
    let mode = get("archive_mode");
    let fix = "ALTER SYSTEM SET archive_mode = on; then restart the server.";
    bad(mode == "off", "archive-mode", format!("archive_mode is {mode}"), fix);
    if streams {
        let all = number("max_wal_senders");
        let fix = "ALTER SYSTEM SET max_wal_senders = a higher number; then restart the server.";
        bad(
            i64::from(senders) >= all,
            "wal-senders",
            format!("{senders} of {all} WAL senders are in use"),
            fix,
        );
        let all = number("max_replication_slots");
        let fix = "ALTER SYSTEM SET max_replication_slots = a higher number; then restart the server.";
        bad(i64::from(slots) >= all, "replication-slots", format!("{slots} of {all} slots are in use"), fix);
    }
    let mut warn = |wrong: bool, check: &'static str, detail: &str, fix: &str| {
        if wrong {
            out.push(Finding::warning(check, detail, fix));
        }
    };
    warn(in_recovery, "primary", "the server is a standby itself: this one will follow it", "");
    warn(
        streams && number("max_slot_wal_keep_size") < 0,
        "slot-limit",
        "max_slot_wal_keep_size is without limit: the slot of a standby that is gone fills the primary's disk",
        "ALTER SYSTEM SET max_slot_wal_keep_size = '50GB'; SELECT pg_reload_conf(); (the archive serves a standby that fell behind)",
    );
    warn(
        !streams && number("archive_timeout") == 0,
        "archive-timeout",
        "archive_timeout is 0: a standby that follows the archive falls behind on a quiet primary without limit",
        "ALTER SYSTEM SET archive_timeout = '60s'; SELECT pg_reload_conf();",
    );
    warn(
        get("data_checksums") != "on" && get("wal_log_hints") != "on",
        "rewind",
        "neither data_checksums nor wal_log_hints is on: after a failover pg_rewind cannot bring the old primary back",
        "ALTER SYSTEM SET wal_log_hints = on; then restart the server. (dr rebuilds a standby without it.)",
    );
    out
}

#[cfg(test)]
mod tests {
    use dr_core::port::Verdict;

    use super::*;

    fn of(pairs: &[(&str, &str)]) -> HashMap<String, String> {
        let good = [
            ("wal_level", "replica"),
            ("archive_mode", "on"),
            ("max_wal_senders", "10"),
            ("max_replication_slots", "10"),
            ("max_slot_wal_keep_size", "51200"),
            ("archive_timeout", "60"),
            ("data_checksums", "on"),
        ];
        good.iter().chain(pairs).map(|(name, value)| ((*name).into(), (*value).into())).collect()
    }

    fn worst(pairs: &[(&str, &str)], senders: i32, streams: bool) -> Vec<String> {
        let found = findings(&of(pairs), senders, 0, false, streams);
        found.iter().filter(|f| f.verdict != Verdict::Good).map(|f| f.check.clone()).collect()
    }

    #[test]
    fn each_setting_that_keeps_a_standby_from_following_is_named() {
        assert!(worst(&[], 0, true).is_empty());
        assert_eq!(worst(&[("wal_level", "minimal")], 0, true), ["wal-level"]);
        assert_eq!(worst(&[("archive_mode", "off")], 0, true), ["archive-mode"]);
        assert_eq!(worst(&[], 10, true), ["wal-senders"]);
        assert_eq!(worst(&[("max_replication_slots", "0")], 0, true), ["replication-slots"]);
        assert_eq!(worst(&[("max_slot_wal_keep_size", "-1")], 0, true), ["slot-limit"]);
        assert_eq!(worst(&[("archive_timeout", "0")], 0, false), ["archive-timeout"]);
        assert!(worst(&[("archive_timeout", "0"), ("max_wal_senders", "0")], 0, false).len() == 1);
        assert_eq!(worst(&[("data_checksums", "off")], 0, true), ["rewind"]);
    }
}
