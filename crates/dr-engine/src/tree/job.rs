//! What a reading worker is asked to do.

use std::sync::Arc;

use dr_storage::format::{FileEntry, FrameRef, MapRef};

use super::output::OutFile;

/// Work for one worker.
pub(super) enum Job {
    /// Files whose content is in the table.
    Inline(Vec<FileEntry>),
    /// Small files that share a frame.
    Slices { frame: FrameRef, files: Vec<FileEntry> },
    /// One stretch of a large file.
    Stretch { file: Option<Arc<OutFile>>, entry: Arc<FileEntry>, index: usize, map: MapRef },
}
