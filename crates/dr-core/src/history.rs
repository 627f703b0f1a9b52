//! Timeline histories: which timeline a recovery passes through, and where it changes.

use crate::guard::InvalidText;
use crate::lsn::{Lsn, Timeline};

/// The ancestry of a timeline, as its `.history` file tells it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TimelineHistory {
    /// The timeline that this is the history of.
    pub timeline: Timeline,
    /// The ancestors, oldest first, each with the LSN at which it was left.
    pub ancestors: Vec<(Timeline, Lsn)>,
}

impl TimelineHistory {
    /// The history of a timeline without ancestors (timeline 1 has no file).
    pub fn root(timeline: Timeline) -> Self {
        TimelineHistory { timeline, ancestors: Vec::new() }
    }

    /// Reads a `.history` file: `parent<TAB>switch LSN<TAB>reason` a line, `#` comments
    /// (`readTimeLineHistory` in `timeline.c`).
    pub fn parse(timeline: Timeline, text: &str) -> Result<Self, InvalidText> {
        let mut ancestors: Vec<(Timeline, Lsn)> = Vec::new();
        for line in text.lines() {
            let line = line.trim_start();
            if line.is_empty() || line.starts_with('#') {
                continue;
            }
            let bad = || InvalidText::new("a timeline history line (parent, switch LSN, reason)", line);
            let mut fields = line.split_ascii_whitespace();
            let parent: u32 = fields.next().and_then(|f| f.parse().ok()).ok_or_else(bad)?;
            let switch: Lsn = fields.next().and_then(|f| f.parse().ok()).ok_or_else(bad)?;
            let rises = ancestors.last().is_none_or(|(last, at)| last.0 < parent && *at <= switch);
            if !rises || parent >= timeline.0 || parent == 0 {
                return Err(bad());
            }
            ancestors.push((Timeline(parent), switch));
        }
        Ok(TimelineHistory { timeline, ancestors })
    }

    /// The timeline to read the byte at `lsn` from, on the way to [`Self::timeline`].
    pub fn timeline_at(&self, lsn: Lsn) -> Timeline {
        self.ancestors.iter().find(|(_, switch)| lsn < *switch).map_or(self.timeline, |(t, _)| *t)
    }

    /// Whether a backup that was on `timeline` at `lsn` lies on the way to [`Self::timeline`].
    pub fn contains(&self, timeline: Timeline, lsn: Lsn) -> bool {
        timeline == self.timeline || self.ancestors.iter().any(|(t, switch)| *t == timeline && lsn <= *switch)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TEXT: &str = "1\t0/5000000\tno recovery target specified\n\n2\t0/7000000\tbefore 2026-01-01\n";

    #[test]
    fn a_history_says_which_timeline_holds_a_position() {
        let history = TimelineHistory::parse(Timeline(3), TEXT).expect("a history");
        assert_eq!(history.timeline_at(Lsn(0x0400_0000)), Timeline(1));
        assert_eq!(history.timeline_at(Lsn(0x0500_0000)), Timeline(2));
        assert_eq!(history.timeline_at(Lsn(0x0700_0000)), Timeline(3));
        assert!(history.contains(Timeline(1), Lsn(0x0500_0000)));
        assert!(!history.contains(Timeline(1), Lsn(0x0500_0001)));
        assert!(!history.contains(Timeline(4), Lsn(0)));
    }

    #[test]
    fn a_damaged_history_is_refused() {
        for text in [
            "x\t0/1\n",
            "1\n",
            "2\t0/5\tx\n1\t0/6\tx\n",
            "1\t0/6\tx\n2\t0/5\tx\n",
            "3\t0/5\tx\n",
            "0\t0/5\tx\n",
        ] {
            assert!(TimelineHistory::parse(Timeline(3), text).is_err(), "{text:?}");
        }
    }
}
