//! What replication slots mean for the primary that keeps WAL for them.

use crate::port::{Finding, SlotState};
use crate::size;

/// A slot is told of when it has used this share (percent) of what it may keep.
const WARN_PERCENT: u64 = 50;

/// What is known of the room for WAL.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct WalRoom {
    /// `max_slot_wal_keep_size` in bytes; `None`: without limit.
    pub limit: Option<u64>,
    /// Free bytes of the file system that holds WAL, when it can be seen.
    pub free: Option<u64>,
}

/// Says which slots endanger the primary, or are about to be lost, and what to do. Pure; the order
/// of the slots is kept.
pub fn judge_slots(slots: &[SlotState], room: WalRoom) -> Vec<Finding> {
    let mut found: Vec<Finding> = slots.iter().filter_map(|slot| judge(slot, room)).collect();
    if found.is_empty() && !slots.is_empty() {
        let detail = format!("{} replication slots, none of which keeps too much WAL", slots.len());
        found.push(Finding::good("slots", detail));
    }
    if room.limit.is_none() && !slots.is_empty() {
        let detail = "max_slot_wal_keep_size is without limit: a slot that nobody reads fills the disk, and the \
                      primary stops";
        let fix = "ALTER SYSTEM SET max_slot_wal_keep_size = '50GB'; SELECT pg_reload_conf();";
        found.push(Finding::warning("slot-limit", detail, fix));
    }
    found
}

fn judge(slot: &SlotState, room: WalRoom) -> Option<Finding> {
    let kept = slot.retained_bytes.unwrap_or(0);
    let name = &slot.name;
    let drop = format!(
        "If nothing will read it again: SELECT pg_drop_replication_slot('{}');",
        name.replace('\'', "''")
    );
    match slot.wal_status.as_deref() {
        Some("lost") => {
            let detail = format!(
                "slot {name} has lost WAL that its reader still needs: the reader must be built anew"
            );
            return Some(Finding::warning(
                "slot-lost",
                detail,
                format!("`dr standby create --delta` rebuilds a standby. {drop}"),
            ));
        }
        Some("unreserved") => {
            let detail =
                format!("slot {name} keeps {} and loses WAL with the next checkpoint", size::bytes(kept));
            return Some(Finding::warning(
                "slot-nearly-lost",
                detail,
                "Bring its reader back now, or raise max_slot_wal_keep_size.",
            ));
        }
        _ => {}
    }
    let share = |of: u64| kept.saturating_mul(100) / of.max(1);
    if let Some(free) = room.free.filter(|free| share(*free) >= WARN_PERCENT) {
        let detail = format!(
            "slot {name} keeps {} of WAL, and {} are free beside it",
            size::bytes(kept),
            size::bytes(free)
        );
        return Some(Finding::warning("slot-disk", detail, format!("Bring its reader back. {drop}")));
    }
    if let Some(limit) = room.limit.filter(|limit| share(*limit) >= WARN_PERCENT) {
        let detail = format!("slot {name} keeps {} of at most {}", size::bytes(kept), size::bytes(limit));
        return Some(Finding::warning(
            "slot-behind",
            detail,
            format!("Bring its reader back before the slot is lost. {drop}"),
        ));
    }
    (!slot.active && kept > 0).then(|| {
        let detail = format!("nobody reads slot {name}; it keeps {} of WAL and goes on", size::bytes(kept));
        Finding::warning("slot-unused", detail, drop)
    })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::port::Verdict;

    fn slot(kept: u64, active: bool, status: &str) -> SlotState {
        SlotState {
            name: "s".into(),
            kind: "physical".into(),
            database: None,
            failover: false,
            active,
            restart: None,
            retained_bytes: Some(kept),
            wal_status: Some(status.into()),
            safe_bytes: None,
        }
    }

    fn checks(slot: SlotState, room: WalRoom) -> Vec<String> {
        judge_slots(&[slot], room)
            .into_iter()
            .filter(|f| f.verdict != Verdict::Good)
            .map(|f| f.check)
            .collect()
    }

    #[test]
    fn each_danger_is_named_and_the_worst_one_first() {
        let room = WalRoom { limit: Some(1000), free: Some(10_000) };
        assert!(checks(slot(10, true, "reserved"), room).is_empty());
        assert_eq!(checks(slot(10, false, "reserved"), room), ["slot-unused"]);
        assert_eq!(checks(slot(500, true, "extended"), room), ["slot-behind"]);
        assert_eq!(checks(slot(6000, true, "extended"), room), ["slot-disk"]);
        assert_eq!(checks(slot(6000, true, "unreserved"), room), ["slot-nearly-lost"]);
        assert_eq!(checks(slot(0, false, "lost"), room), ["slot-lost"]);
        assert_eq!(checks(slot(10, true, "reserved"), WalRoom::default()), ["slot-limit"]);
        assert!(judge_slots(&[], WalRoom::default()).is_empty());
    }

    proptest! {
        #[test]
        fn no_slot_stops_a_backup_and_every_warning_has_a_way_out(kept: u64, active: bool, limit: Option<u64>, free: Option<u64>, status in "reserved|extended|unreserved|lost") {
            for finding in judge_slots(&[slot(kept, active, &status)], WalRoom { limit, free }) {
                prop_assert!(finding.verdict != Verdict::Bad);
                prop_assert!(finding.verdict == Verdict::Good || !finding.fix.is_empty());
            }
        }
    }
}
