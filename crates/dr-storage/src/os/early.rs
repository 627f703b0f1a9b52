//! `sync_file_range`, which no safe wrapper offers.
#![allow(unsafe_code)]

use std::fs::File;
use std::os::fd::AsRawFd;

/// Asks the kernel to begin writing a range to disk, without waiting.
///
/// It promises nothing: a sync is still needed. It spreads the writing over the time of the work,
/// so that the sync at the end has little left to do.
pub fn write_back_early(file: &File, offset: u64, len: u64) {
    // SAFETY: the descriptor is open for the duration of the call, and the call reads and writes
    // no memory of this process.
    unsafe {
        libc::sync_file_range(
            file.as_raw_fd(),
            offset as libc::off64_t,
            len as libc::off64_t,
            libc::SYNC_FILE_RANGE_WRITE,
        );
    }
}
