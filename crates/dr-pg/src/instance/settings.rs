//! Recovery settings of a restored directory.

use std::fs;
use std::io::Write;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use dr_core::port::{ClusterError, RecoverySpec, RecoveryTarget, TargetAction};

/// Marks the part of `postgresql.auto.conf` that is ours.
const BEGIN: &str = "# --- recovery settings written by dr restore";

/// Settings that must not survive from the cluster's earlier life.
const OURS: [&str; 7] = [
    "hot_standby",
    "restore_command",
    "recovery_target_inclusive",
    "recovery_target_timeline",
    "recovery_target_action",
    "primary_conninfo",
    "primary_slot_name",
];

/// Settings that must not survive in any file: they are written with these values, since another
/// configuration file may hold them and PostgreSQL refuses two targets (`xlogrecovery.c`,
/// `error_multiple_recovery_targets`). The empty ones come first, ours after them: the target is
/// assigned in the order of the file.
const NEUTRAL: [(&str, &str); 8] = [
    ("recovery_target", ""),
    ("recovery_target_name", ""),
    ("recovery_target_time", ""),
    ("recovery_target_xid", ""),
    ("recovery_target_lsn", ""),
    // Commands of the first server: they may remove WAL from its archive or move its address.
    ("archive_cleanup_command", ""),
    ("recovery_end_command", ""),
    ("recovery_min_apply_delay", "0"),
];

pub(super) fn write(data: &Path, control: &[u8], spec: &RecoverySpec) -> Result<(), ClusterError> {
    let place = data.join("postgresql.auto.conf");
    let old = match fs::read_to_string(&place) {
        Ok(text) => text,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => String::new(),
        Err(source) => {
            return Err(ClusterError::File { operation: "read", path: place.display().to_string(), source });
        }
    };
    write_synced(&place, &merged(&old, spec))?;
    if !data.join("postgresql.conf").exists() {
        write_synced(&data.join("postgresql.conf"), &fallback(control)?)?;
    }
    let (signal, other) = match spec.standby {
        Some(_) => ("standby.signal", "recovery.signal"),
        None => ("recovery.signal", "standby.signal"),
    };
    let _ = fs::remove_file(data.join(other));
    write_synced(&data.join(signal), "")
}

/// The old settings without ours, then ours.
fn merged(old: &str, spec: &RecoverySpec) -> String {
    let mut text = String::new();
    for line in old.lines().filter(|line| *line != BEGIN) {
        let name = line.trim_start().split(['=', ' ', '\t']).next().unwrap_or("").to_ascii_lowercase();
        let replaced = OURS.contains(&name.as_str())
            || NEUTRAL.iter().any(|(setting, _)| *setting == name)
            || spec.settings.iter().any(|(setting, _)| *setting == name);
        if !replaced {
            text.push_str(line);
            text.push('\n');
        }
    }
    text.push_str(BEGIN);
    text.push('\n');
    for (name, value) in settings(spec) {
        text.push_str(&format!("{name} = '{}'\n", quoted(&value)));
    }
    text
}

/// A value as `GUC_scanstr` in `guc-file.l` reads it.
fn quoted(value: &str) -> String {
    value.replace('\\', "\\\\").replace('\'', "''").replace('\n', "\\n")
}

fn settings(spec: &RecoverySpec) -> Vec<(String, String)> {
    let chosen = match &spec.target {
        RecoveryTarget::Latest => "",
        RecoveryTarget::Immediate => "recovery_target",
        RecoveryTarget::Time { .. } => "recovery_target_time",
        RecoveryTarget::Lsn { .. } => "recovery_target_lsn",
        RecoveryTarget::Xid { .. } => "recovery_target_xid",
        RecoveryTarget::Name { .. } => "recovery_target_name",
    };
    let neutral = NEUTRAL.iter().filter(|(name, _)| *name != chosen);
    let mut out: Vec<(&str, String)> = neutral.map(|(name, value)| (*name, (*value).to_owned())).collect();
    out.extend([
        ("restore_command", spec.restore_command.clone()),
        // A standby follows its primary through promotions.
        (
            "recovery_target_timeline",
            match spec.standby {
                Some(_) => "latest".to_owned(),
                None => spec.timeline.to_string(),
            },
        ),
    ]);
    if let Some(standby) = &spec.standby {
        out.push(("hot_standby", if standby.hot { "on" } else { "off" }.into()));
        out.extend(standby.primary_conninfo.iter().map(|info| ("primary_conninfo", info.clone())));
        out.extend(standby.slot.iter().map(|slot| ("primary_slot_name", slot.clone())));
    }
    let value = match &spec.target {
        RecoveryTarget::Latest => None,
        RecoveryTarget::Immediate => Some("immediate".to_owned()),
        RecoveryTarget::Time { time } => Some(time.strftime("%Y-%m-%d %H:%M:%S%.6f+00").to_string()),
        RecoveryTarget::Lsn { lsn } => Some(lsn.to_string()),
        RecoveryTarget::Xid { xid } => Some(xid.to_string()),
        RecoveryTarget::Name { name } => Some(name.clone()),
    };
    out.extend(value.map(|value| (chosen, value)));
    if spec.target != RecoveryTarget::Latest {
        let action = match spec.action {
            TargetAction::Promote => "promote",
            TargetAction::Pause => "pause",
            TargetAction::Shutdown => "shutdown",
        };
        out.push(("recovery_target_action", action.into()));
        out.push(("recovery_target_inclusive", if spec.inclusive { "on" } else { "off" }.into()));
    }
    let own = out.into_iter().map(|(name, value)| (name.to_owned(), value));
    own.chain(spec.settings.iter().cloned()).collect()
}

/// A configuration for a cluster whose own lies outside its directory, as on Debian: the limits
/// that a hot standby must not undercut, from `pg_control` (same offsets in 1300, 1700, 1800).
fn fallback(bytes: &[u8]) -> Result<String, ClusterError> {
    let mut text = String::from(
        "# Written by dr restore: this cluster keeps its configuration outside the data directory.\n\
         # `dr restore --host-files DIR` gives the files that were backed up.\n",
    );
    crate::control::parse(bytes, "pg_control")?;
    let number = |at: usize| i32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]]);
    for (name, at) in [
        ("max_connections", 180),
        ("max_worker_processes", 184),
        ("max_wal_senders", 188),
        ("max_prepared_transactions", 192),
        ("max_locks_per_transaction", 196),
    ] {
        text.push_str(&format!("{name} = {}\n", number(at)));
    }
    Ok(text)
}

fn write_synced(path: &Path, text: &str) -> Result<(), ClusterError> {
    let failed = |source| ClusterError::File { operation: "write", path: path.display().to_string(), source };
    let mut options = fs::OpenOptions::new();
    options.write(true).create(true).truncate(true).mode(0o600);
    let mut file = options.open(path).map_err(failed)?;
    file.write_all(text.as_bytes()).and_then(|()| file.sync_all()).map_err(failed)
}

#[cfg(test)]
mod tests {
    use super::*;
    use dr_core::{Lsn, Timeline};

    #[test]
    fn earlier_recovery_settings_do_not_survive_and_others_do() {
        let spec = RecoverySpec {
            target: RecoveryTarget::Lsn { lsn: Lsn(0x300_0000) },
            inclusive: false,
            timeline: Timeline(2),
            action: TargetAction::Promote,
            restore_command: "dr wal fetch --repo '/x y' %f %p".into(),
            settings: vec![("archive_mode".into(), "off".into())],
            standby: None,
        };
        let old =
            "# a comment\nwork_mem = '64MB'\nrecovery_target_time = '2020-01-01'\narchive_mode = 'on'\n";
        let once = merged(old, &spec);
        assert!(
            once.contains("work_mem = '64MB'")
                && !once.contains("2020")
                && once.contains("archive_mode = 'off'")
        );
        assert!(once.contains("restore_command = 'dr wal fetch --repo ''/x y'' %f %p'"));
        assert!(once.contains("recovery_target_inclusive = 'off'"));
        assert_eq!(merged(&once, &spec), once, "writing again changes nothing");
        let standby = RecoverySpec {
            target: RecoveryTarget::Latest,
            standby: Some(dr_core::port::StandbySpec {
                primary_conninfo: Some("host=a application_name='x y'".into()),
                slot: Some("s".into()),
                hot: true,
            }),
            ..spec
        };
        let follows = merged(&once, &standby);
        assert!(follows.contains("primary_conninfo = 'host=a application_name=''x y'''"), "{follows}");
        assert!(
            follows.contains("recovery_target_timeline = 'latest'")
                && follows.contains("primary_slot_name = 's'")
        );
        assert!(
            follows.contains("recovery_target_lsn = ''") && !follows.contains("0/3000000"),
            "no target is left"
        );
        assert_eq!(merged(&follows, &standby), follows);
    }
}
