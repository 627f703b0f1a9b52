//! The text files that PostgreSQL leaves beside WAL: `backup_label`.

use dr_core::{Lsn, Timeline};

/// What `backup_label` says (`src/backend/access/transam/xlogbackup.c`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BackupLabel {
    /// `START WAL LOCATION`.
    pub start: Lsn,
    /// `START TIMELINE`.
    pub timeline: Timeline,
}

/// Reads a label; `None` when it is not one.
pub fn parse_backup_label(text: &str) -> Option<BackupLabel> {
    let field = |name: &str| text.lines().find_map(|line| line.strip_prefix(name));
    let start = field("START WAL LOCATION: ")?.split_ascii_whitespace().next()?.parse().ok()?;
    let timeline = Timeline(field("START TIMELINE: ")?.trim().parse().ok()?);
    Some(BackupLabel { start, timeline })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_label_tells_where_replay_begins() {
        let text = "START WAL LOCATION: 0/2000028 (file 000000010000000000000002)\nCHECKPOINT LOCATION: 0/2000060\n\
                    BACKUP METHOD: streamed\nSTART TIMELINE: 1\n";
        let label = parse_backup_label(text).expect("a label");
        assert_eq!(label, BackupLabel { start: Lsn(0x200_0028), timeline: Timeline(1) });
        assert_eq!(parse_backup_label("START WAL LOCATION: x\n"), None);
    }
}
