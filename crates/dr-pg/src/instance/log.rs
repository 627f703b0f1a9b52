//! What a server's log says about the end of recovery (`src/backend/access/transam/xlogrecovery.c`).

use std::fs;
use std::path::Path;

use dr_core::port::{ClusterError, RecoveryEnd};
use dr_core::{Lsn, Timeline, TimelineHistory, Timestamp};

/// Failures of clients that came too early, or while the server went, say nothing about the recovery.
/// A session that is told to go while it authenticates calls it a timeout (`ProcessInterrupts` in
/// `postgres.c`).
const HARMLESS: [&str; 8] = [
    "the database system is ",
    "terminating ",
    "role \"",
    "database \"",
    "sorry, too many clients already",
    "remaining connection slots ",
    "canceling authentication ",
    "connection to client lost",
];

/// Lines that end a recovery at its target.
const STOPPING: [&str; 2] = ["recovery stopping ", "pausing at the end of recovery"];

/// Lines of evidence kept at most.
const MAX_LINES: usize = 40;

pub(super) fn recovery_end(data: &Path, log: &Path) -> Result<RecoveryEnd, ClusterError> {
    let bytes = fs::read(log).map_err(|source| ClusterError::File {
        operation: "read",
        path: log.display().to_string(),
        source,
    })?;
    let mut end = parse(&String::from_utf8_lossy(&bytes));
    // The history of the new timeline tells to the byte where the old one was left.
    if let Some(timeline) = end.new_timeline {
        let history = data.join(format!("pg_wal/{:08X}.history", timeline.0));
        let text = fs::read_to_string(history).unwrap_or_default();
        let switch = TimelineHistory::parse(timeline, &text).ok().and_then(|h| h.ancestors.last().copied());
        end.lsn = switch.map(|(_, lsn)| lsn).or(end.lsn);
    }
    Ok(end)
}

fn parse(text: &str) -> RecoveryEnd {
    let mut end = RecoveryEnd::default();
    for line in text.lines() {
        let Some((_, message)) = line.split_once(":  ") else { continue };
        let is = |level: &str| line.contains(&format!("{level}:  "));
        let mut keep = true;
        if is("LOG") && STOPPING.iter().any(|s| message.starts_with(s)) {
            end.stopped_at_target = true;
        } else if let Some(rest) = message.strip_prefix("redo done at ") {
            end.lsn = rest.split_ascii_whitespace().next().and_then(|lsn| lsn.parse::<Lsn>().ok());
        } else if let Some(rest) = message.strip_prefix("last completed transaction was at log time ") {
            end.last_commit = time(rest);
        } else if let Some(rest) = message.strip_prefix("selected new timeline ID: ") {
            end.new_timeline = rest.trim().parse().ok().map(Timeline);
        } else if (is("FATAL") || is("PANIC")) && !HARMLESS.iter().any(|h| message.starts_with(h)) {
            end.failed = true;
        } else {
            keep = false;
        }
        if keep && end.evidence.len() < MAX_LINES {
            end.evidence.push(message.to_owned());
        }
    }
    end
}

/// A time as the server writes it with time zone UTC: `2026-11-26 21:00:00.123456+00`.
fn time(text: &str) -> Option<Timestamp> {
    text.trim().replacen(' ', "T", 1).parse().ok()
}

/// The last line that says why a server did not start; empty when none does.
pub(super) fn last_words(log: &Path) -> String {
    let text = fs::read(log).map(|b| String::from_utf8_lossy(&b).into_owned()).unwrap_or_default();
    let serious = |line: &&str| line.contains("FATAL:  ") || line.contains("PANIC:  ");
    text.lines()
        .rfind(serious)
        .and_then(|line| line.split_once(":  "))
        .map(|(_, m)| m.to_owned())
        .unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_log_tells_where_recovery_stopped() {
        let end = parse(
            "2026-11-26 21:00:00.000 UTC [1] LOG:  starting point-in-time recovery to WAL location (LSN) \"0/5000000\"\n\
             2026-11-26 21:00:01.000 UTC [9] FATAL:  the database system is starting up\n\
             2026-11-26 21:00:01.000 UTC [1] LOG:  recovery stopping before commit of transaction 745, time 2026-11-26 20:59:00.5+00\n\
             2026-11-26 21:00:01.000 UTC [1] LOG:  redo done at 0/4FFFFC8 system usage: CPU: user: 0.0 s\n\
             2026-11-26 21:00:01.000 UTC [1] LOG:  last completed transaction was at log time 2026-11-26 20:58:59.25+00\n\
             2026-11-26 21:00:01.000 UTC [1] LOG:  selected new timeline ID: 2\n",
        );
        assert!(end.stopped_at_target && !end.failed);
        assert_eq!(end.lsn, Some(Lsn(0x4FF_FFC8)));
        assert_eq!(end.new_timeline, Some(Timeline(2)));
        assert_eq!(end.last_commit, "2026-11-26T20:58:59.25Z".parse().ok());
        assert_eq!(end.evidence.len(), 4);
    }

    #[test]
    fn what_early_clients_are_told_is_not_a_failure_and_a_missing_timeline_is() {
        let failed = |message: &str| parse(&format!("x [1] FATAL:  {message}\n")).failed;
        assert!(!failed("role \"dr\" does not exist"));
        assert!(!failed("the database system is not accepting connections"));
        assert!(!failed("terminating background worker \"x\" due to administrator command"));
        assert!(!failed("canceling authentication due to timeout"));
        assert!(failed("recovery target timeline 7 does not exist"));
        assert!(failed("could not locate a valid checkpoint record"));
    }

    #[test]
    fn a_target_that_was_not_reached_is_a_failure() {
        let end = parse("x FATAL:  recovery ended before configured recovery target was reached\n");
        assert!(end.failed && !end.stopped_at_target);
    }
}
