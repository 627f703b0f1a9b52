//! Which backup a recovery starts from.

use std::cmp::Reverse;

use jiff::Timestamp;
use thiserror::Error;

use crate::guard::Guard;
use crate::history::TimelineHistory;
use crate::id::BackupId;
use crate::lsn::{Lsn, Timeline};
use crate::port::RecoveryTarget;

/// A backup, as far as the choice needs to know it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Candidate {
    /// Its identity.
    pub id: BackupId,
    /// The timeline on which it was taken.
    pub timeline: Timeline,
    /// The LSN at which it is consistent.
    pub stop: Lsn,
    /// The server's clock at its end.
    pub stop_time: Timestamp,
    /// Whether it holds pages that were already bad.
    pub degraded: bool,
}

/// The backup to start from, and what was passed over.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BackupChoice {
    /// The backup.
    pub id: BackupId,
    /// A newer degraded backup that was passed over for it.
    pub passed_over: Option<BackupId>,
}

/// Why no backup serves the target.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum ChoiceError {
    /// There is no backup at all.
    #[error("there is no backup of this cluster")]
    NoBackup,
    /// The named backup does not exist.
    #[error("there is no backup {id} of this cluster")]
    NoSuchBackup {
        /// The backup asked for.
        id: BackupId,
    },
    /// The backup is not an ancestor of the timeline.
    #[error("no backup lies on the way to timeline {timeline}")]
    NotOnTimeline {
        /// The timeline asked for.
        timeline: Timeline,
    },
    /// The target lies before the end of every backup that could serve.
    #[error("the target lies before the end of the {which} backup {id}, which ended at {stop_time} ({stop})")]
    TargetBeforeBackup {
        /// "oldest" or "chosen".
        which: &'static str,
        /// The backup.
        id: BackupId,
        /// When it ended.
        stop_time: Timestamp,
        /// Where it ended.
        stop: Lsn,
    },
}

/// Chooses the newest backup on the way to the target; a sound one before a degraded one.
///
/// "Newest" is by LSN on the path of `history`, never by name or clock.
pub fn choose_backup(
    candidates: &[Candidate],
    history: &TimelineHistory,
    target: &RecoveryTarget,
    asked: Option<BackupId>,
) -> Result<BackupChoice, ChoiceError> {
    if candidates.is_empty() {
        return Err(ChoiceError::NoBackup);
    }
    let pool: Vec<&Candidate> = match asked {
        Some(id) => vec![candidates.iter().find(|c| c.id == id).ok_or(ChoiceError::NoSuchBackup { id })?],
        None => candidates.iter().collect(),
    };
    let on_path: Vec<&Candidate> =
        pool.into_iter().filter(|c| history.contains(c.timeline, c.stop)).collect();
    let oldest = *on_path
        .iter()
        .min_by_key(|c| c.stop)
        .ok_or(ChoiceError::NotOnTimeline { timeline: history.timeline })?;
    let mut usable: Vec<&Candidate> = on_path.into_iter().filter(|c| serves(c, target)).collect();
    usable.sort_by_key(|c| (Reverse(c.stop), Reverse(c.stop_time)));
    let Some(newest) = usable.first() else {
        return Err(ChoiceError::TargetBeforeBackup {
            which: if asked.is_some() { "chosen" } else { "oldest" },
            id: oldest.id,
            stop_time: oldest.stop_time,
            stop: oldest.stop,
        });
    };
    let chosen = usable.iter().find(|c| !c.degraded).unwrap_or(newest);
    let passed_over = (chosen.id != newest.id).then_some(newest.id);
    Ok(BackupChoice { id: chosen.id, passed_over })
}

fn serves(candidate: &Candidate, target: &RecoveryTarget) -> bool {
    if !Guard::TargetAfterBackup.holds() {
        return true;
    }
    match target {
        // The time is compared with the server's clock at the end of the backup: an equal time is
        // refused, since a commit at that very instant may lie on either side.
        RecoveryTarget::Time { time } => candidate.stop_time < *time,
        RecoveryTarget::Lsn { lsn } => candidate.stop <= *lsn,
        _ => true,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn time(second: i64) -> Timestamp {
        Timestamp::from_second(second).expect("a time")
    }

    fn candidate(n: u32, timeline: u32, stop: u64, degraded: bool) -> Candidate {
        Candidate {
            // Names in the reverse order of positions: no rule may go by name.
            id: BackupId::new(time(1_000 - i64::from(n)), n),
            timeline: Timeline(timeline),
            stop: Lsn(stop),
            stop_time: time(stop as i64),
            degraded,
        }
    }

    fn choose(list: &[Candidate], target: RecoveryTarget) -> Result<BackupChoice, ChoiceError> {
        choose_backup(list, &TimelineHistory::root(Timeline(1)), &target, None)
    }

    #[test]
    fn the_newest_backup_before_the_target_is_chosen_by_position_not_by_name() {
        let list = [candidate(1, 1, 100, false), candidate(2, 1, 300, false), candidate(3, 1, 200, false)];
        let id = |target| choose(&list, target).map(|c| c.id);
        assert_eq!(id(RecoveryTarget::Latest), Ok(list[1].id));
        assert_eq!(id(RecoveryTarget::Lsn { lsn: Lsn(299) }), Ok(list[2].id));
        assert_eq!(id(RecoveryTarget::Time { time: time(150) }), Ok(list[0].id));
    }

    #[test]
    fn a_target_before_the_end_of_every_backup_is_refused() {
        let list = [candidate(1, 1, 100, false)];
        for target in [RecoveryTarget::Lsn { lsn: Lsn(99) }, RecoveryTarget::Time { time: time(100) }] {
            assert!(matches!(choose(&list, target), Err(ChoiceError::TargetBeforeBackup { .. })));
        }
        assert!(choose(&list, RecoveryTarget::Lsn { lsn: Lsn(100) }).is_ok());
    }

    #[test]
    fn a_sound_backup_is_chosen_before_a_newer_degraded_one() {
        let list = [candidate(1, 1, 100, false), candidate(2, 1, 200, true)];
        let choice = choose(&list, RecoveryTarget::Latest).expect("a choice");
        assert_eq!((choice.id, choice.passed_over), (list[0].id, Some(list[1].id)));
        let only = [list[1].clone()];
        assert_eq!(choose(&only, RecoveryTarget::Latest).map(|c| c.id), Ok(only[0].id));
    }

    #[test]
    fn a_backup_of_another_branch_is_not_used() {
        let history = TimelineHistory { timeline: Timeline(3), ancestors: vec![(Timeline(1), Lsn(150))] };
        let list = [candidate(1, 1, 100, false), candidate(2, 1, 200, false), candidate(3, 2, 120, false)];
        let chosen = choose_backup(&list, &history, &RecoveryTarget::Latest, None);
        assert_eq!(chosen.map(|c| c.id), Ok(list[0].id));
        let asked = choose_backup(&list, &history, &RecoveryTarget::Latest, Some(list[2].id));
        assert_eq!(asked, Err(ChoiceError::NotOnTimeline { timeline: Timeline(3) }));
    }
}
