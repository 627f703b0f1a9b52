//! The registry of safety guards, and the error for text that is not what it should be.
//!
//! A guard is a check that stands between an operator and a loss (`docs/guards.md`). Each has a
//! name here. `cargo xtask guards` builds with the feature `guards-off`, switches off one guard at
//! a time with `DR_GUARD_OFF=<name>`, and fails unless some test then goes red. Without that
//! feature, [`Guard::holds`] is the constant `true` and nothing can be switched off.

use thiserror::Error;

/// Text that cannot be read as the thing it should name.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[error("expected {expected}, got {found:?}")]
pub struct InvalidText {
    expected: &'static str,
    found: String,
}

impl InvalidText {
    /// `expected` completes the sentence "expected …".
    pub fn new(expected: &'static str, found: &str) -> Self {
        let mut found = found.to_owned();
        if let Some((at, _)) = found.char_indices().nth(80) {
            found.truncate(at);
            found.push('…');
        }
        InvalidText { expected, found }
    }
}

macro_rules! guards {
    ($($variant:ident = $name:literal, $rule:literal, $text:literal;)*) => {
        /// A named safety guard.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
        pub enum Guard { $(#[doc = $text] $variant,)* }

        impl Guard {
            /// Every guard there is.
            pub const ALL: &'static [Guard] = &[$(Guard::$variant,)*];

            /// The stable name used by `cargo xtask guards` and `docs/guards.md`.
            pub fn name(self) -> &'static str { match self { $(Guard::$variant => $name,)* } }

            /// The safety rule that the guard serves.
            pub fn rule(self) -> &'static str { match self { $(Guard::$variant => $rule,)* } }

            /// What the guard refuses or ensures, as one sentence.
            pub fn text(self) -> &'static str { match self { $(Guard::$variant => $text,)* } }
        }
    };
}

guards! {
    CreateOnly = "create-only", "2", "A stored object is never overwritten.";
    SameNameOtherContent = "same-name-other-content", "2", "Same name with other content is refused, loudly.";
    DurableBeforeOk = "durable-before-ok", "3", "A directory target syncs the file and its directory before it reports success.";
    PoisonAfterSyncFailure = "poison-after-sync-failure", "3", "After a failed sync a directory target reports no further success.";
    AskAfterTimeout = "ask-after-timeout", "4", "A put that timed out is answered by reading back, not by guessing.";
    FrameTag = "frame-tag", "5", "A sealed frame is opened only when its tag verifies.";
    ContentDigest = "content-digest", "5", "Restored content must have the digest that the backup recorded.";
    MetadataDigest = "metadata-digest", "5", "A map or table must have the digest that its parent recorded.";
    ClusterOfObject = "cluster-of-object", "5", "An object of another cluster is refused.";
    ManifestLast = "manifest-last", "1", "The manifest is put after everything that it names is durable.";
    UnknownFeature = "unknown-feature", "5", "A required feature that this version does not know is refused.";
    ProbeCreateOnly = "probe-create-only", "2", "A store that ignores create-only is refused.";
    WalSegmentCheck = "wal-segment-check", "13", "A WAL segment is checked before it is taken.";
    WalSystemId = "wal-system-id", "14", "WAL of another system identifier is refused.";
    WalFence = "wal-fence", "14", "A second writer of one WAL name is refused.";
    FetchProvesAbsence = "fetch-proves-absence", "9", "Fetch answers 'no such file' only when a listing proves it.";
    FetchWholeFile = "fetch-whole-file", "10", "Fetched WAL is handed over by rename, whole and verified.";
    WalGap = "wal-gap", "12", "A restore across a gap in WAL is refused before a byte moves.";
    WalBeforeCommit = "wal-before-commit", "1", "A backup is committed only when the WAL of its range is archived.";
    PageCheck = "page-check", "5", "A page whose checksum is wrong degrades the backup.";
    ControlLast = "control-last", "16", "pg_control is put in place last.";
    RestoreIntoEmpty = "restore-into-empty", "17", "A restore refuses a directory that is not empty.";
    DeltaSameCluster = "delta-same-cluster", "17", "A delta restore refuses a directory of another cluster or a running one.";
    TargetReached = "target-reached", "15", "A recovery that did not reach its target is a failure.";
    TargetAfterBackup = "target-after-backup", "15", "A target before the end of the backup is refused.";
    DiskSpace = "disk-space", "17", "A restore that does not fit is refused before a byte moves.";
    HostCompatible = "host-compatible", "17", "A restore onto a host that cannot run the cluster is refused.";
    OneBackupAtATime = "one-backup-at-a-time", "1", "A second backup of the same cluster is refused while one runs.";
}

impl Guard {
    /// The guard with this name.
    pub fn named(name: &str) -> Option<Guard> {
        Guard::ALL.iter().copied().find(|guard| guard.name() == name)
    }

    /// Whether the guard is in force: always, except under the test-only feature `guards-off`.
    #[cfg(not(feature = "guards-off"))]
    #[inline(always)]
    pub fn holds(self) -> bool {
        true
    }

    /// Whether the guard is in force: always, except under the test-only feature `guards-off`.
    #[cfg(feature = "guards-off")]
    pub fn holds(self) -> bool {
        static OFF: std::sync::OnceLock<Option<String>> = std::sync::OnceLock::new();
        OFF.get_or_init(|| std::env::var("DR_GUARD_OFF").ok()).as_deref() != Some(self.name())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn guard_names_are_unique_and_found() {
        for guard in Guard::ALL {
            assert_eq!(Guard::named(guard.name()), Some(*guard));
        }
    }

    #[test]
    fn long_text_is_cut_in_messages() {
        let error = InvalidText::new("an LSN", &"ä".repeat(500));
        assert!(error.to_string().chars().count() < 120);
    }
}
