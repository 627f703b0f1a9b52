//! Which WAL a recovery will read, and whether all of it is there.

use std::collections::{BTreeMap, BTreeSet};

use serde::{Deserialize, Serialize};

use crate::history::TimelineHistory;
use crate::lsn::{Lsn, SegmentSize, Timeline, WalSegment};

/// The WAL that an archive holds: segment numbers by timeline.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct StoredWal {
    complete: BTreeMap<Timeline, BTreeSet<u64>>,
    partial: BTreeMap<Timeline, BTreeSet<u64>>,
}

impl StoredWal {
    /// Adds a complete segment.
    pub fn add(&mut self, segment: WalSegment) {
        self.complete.entry(segment.timeline).or_default().insert(segment.number);
    }

    /// Adds the incomplete last segment of a timeline.
    pub fn add_partial(&mut self, segment: WalSegment) {
        self.partial.entry(segment.timeline).or_default().insert(segment.number);
    }

    fn has(&self, timeline: Timeline, number: u64) -> bool {
        [&self.complete, &self.partial]
            .iter()
            .any(|map| map.get(&timeline).is_some_and(|n| n.contains(&number)))
    }

    fn last(&self, timeline: Timeline) -> Option<u64> {
        [&self.complete, &self.partial].iter().filter_map(|map| map.get(&timeline)?.last().copied()).max()
    }
}

/// A hole in the archived WAL.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct WalGap {
    /// The first segment that is missing, as its file name.
    pub first_missing: String,
    /// The LSN at which the hole begins: what lies before can be replayed.
    pub at: Lsn,
    /// The first segment after the hole, as its file name; `None` when the hole has no far side.
    pub resumes_with: Option<String>,
}

/// The WAL of a recovery.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct WalPlan {
    /// The first segment to be read, as its file name.
    pub first: String,
    /// Segments that will be read at most.
    pub segments: u64,
    /// The LSN after the last archived byte on the way.
    pub end: Lsn,
    /// A hole that the recovery would have to cross.
    pub gap: Option<WalGap>,
}

/// Plans the WAL from `start` on `history`'s path: at least to `needed`, and to the end of what is
/// archived when `to_end` (targets whose position is not known beforehand).
///
/// For a segment, PostgreSQL asks for the newest timeline of the path first
/// (`XLogFileReadAnyTLI` in `xlogrecovery.c`); a segment counts as present when one that is valid
/// at its position is there.
pub fn plan_wal(
    history: &TimelineHistory,
    start: Lsn,
    needed: Lsn,
    to_end: bool,
    size: SegmentSize,
    stored: &StoredWal,
) -> WalPlan {
    let path = spans(history, size);
    let first = start.0 / size.bytes();
    // The segment of the last needed byte, not of the byte after it.
    let must = needed.0.saturating_sub(1).max(start.0) / size.bytes();
    let archived = path
        .iter()
        .filter_map(|span| stored.last(span.timeline).map(|n| n.min(span.last)).filter(|n| *n >= span.first))
        .max();
    let last = if to_end { archived.map_or(must, |n| n.max(must)) } else { must };
    let present = |number: u64| path.iter().any(|s| s.holds(number) && stored.has(s.timeline, number));
    let name = |number: u64| {
        let timeline = path.iter().find(|s| s.holds(number)).map_or(history.timeline, |s| s.timeline);
        WalSegment { timeline, number }.file_name(size)
    };
    let missing = (first..=last).find(|number| !present(*number));
    let gap = missing.map(|number| WalGap {
        first_missing: name(number),
        at: Lsn(number * size.bytes()),
        resumes_with: (number..=archived.unwrap_or(number)).find(|n| present(*n)).map(name),
    });
    let end = missing.unwrap_or(last + 1) * size.bytes();
    WalPlan { first: name(first), segments: last + 1 - first, end: Lsn(end), gap }
}

/// The segments of one timeline that lie on a path.
struct Span {
    timeline: Timeline,
    first: u64,
    last: u64,
}

impl Span {
    fn holds(&self, number: u64) -> bool {
        (self.first..=self.last).contains(&number)
    }
}

/// The spans of a path, newest timeline first.
fn spans(history: &TimelineHistory, size: SegmentSize) -> Vec<Span> {
    let mut spans = Vec::with_capacity(history.ancestors.len() + 1);
    let mut first = 0;
    for (timeline, switch) in &history.ancestors {
        // The segment with the switch exists in both timelines; the old one may be partial.
        let last = switch.0.saturating_sub(1) / size.bytes();
        spans.push(Span { timeline: *timeline, first, last });
        first = switch.0 / size.bytes();
    }
    spans.push(Span { timeline: history.timeline, first, last: u64::MAX });
    spans.reverse();
    spans
}

#[cfg(test)]
mod tests {
    use super::*;

    const SIZE: SegmentSize = SegmentSize::DEFAULT;

    fn seg(number: u64) -> Lsn {
        Lsn(number * SIZE.bytes())
    }

    fn stored(list: &[(u32, std::ops::RangeInclusive<u64>)]) -> StoredWal {
        let mut out = StoredWal::default();
        for (timeline, numbers) in list {
            numbers.clone().for_each(|n| out.add(WalSegment { timeline: Timeline(*timeline), number: n }));
        }
        out
    }

    fn root() -> TimelineHistory {
        TimelineHistory::root(Timeline(1))
    }

    #[test]
    fn a_hole_before_later_wal_is_a_gap() {
        let wal = stored(&[(1, 2..=4), (1, 6..=9)]);
        let plan = plan_wal(&root(), seg(2), seg(3), true, SIZE, &wal);
        let gap = plan.gap.expect("a gap");
        assert_eq!(gap.first_missing, "000000010000000000000005");
        assert_eq!(gap.resumes_with.as_deref(), Some("000000010000000000000006"));
        assert_eq!(gap.at, seg(5));
        // A target before the hole does not cross it.
        assert_eq!(plan_wal(&root(), seg(2), seg(5), false, SIZE, &wal).gap, None);
        assert!(plan_wal(&root(), seg(2), Lsn(seg(5).0 + 1), false, SIZE, &wal).gap.is_some());
    }

    #[test]
    fn wal_that_ends_before_the_backup_is_consistent_is_a_gap_without_a_far_side() {
        let plan = plan_wal(&root(), seg(2), seg(5), true, SIZE, &stored(&[(1, 2..=3)]));
        assert_eq!(plan.gap.map(|g| (g.at, g.resumes_with)), Some((seg(4), None)));
        let nothing = plan_wal(&root(), seg(2), seg(2), true, SIZE, &StoredWal::default());
        assert_eq!(nothing.gap.map(|g| g.at), Some(seg(2)));
    }

    #[test]
    fn the_path_crosses_timelines_at_their_switch() {
        let ancestors = vec![(Timeline(1), Lsn(seg(5).0 + 100)), (Timeline(2), seg(8))];
        let history = TimelineHistory { timeline: Timeline(3), ancestors };
        // Segment 5 is there as timeline 2's copy; segment 8 begins timeline 3.
        let wal = stored(&[(1, 2..=4), (2, 5..=7), (3, 8..=9)]);
        let plan = plan_wal(&history, seg(2), seg(3), true, SIZE, &wal);
        assert_eq!((plan.gap, plan.end, plan.segments), (None, seg(10), 8));
        // WAL of timeline 1 after the switch is another history and fills no hole.
        let wrong = stored(&[(1, 2..=9), (3, 8..=9)]);
        assert_eq!(plan_wal(&history, seg(2), seg(3), true, SIZE, &wrong).gap.map(|g| g.at), Some(seg(6)));
    }

    #[test]
    fn a_partial_segment_counts_at_the_end_of_its_timeline() {
        let mut wal = stored(&[(1, 2..=3)]);
        wal.add_partial(WalSegment { timeline: Timeline(1), number: 4 });
        let plan = plan_wal(&root(), seg(2), seg(3), true, SIZE, &wal);
        assert_eq!((plan.gap, plan.end), (None, seg(5)));
    }
}
