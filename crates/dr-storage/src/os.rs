//! What the standard library does not offer of the operating system.

mod direct;
mod early;

use std::fs::File;
use std::io;
use std::path::Path;

pub use direct::{DirectFile, PageBuffer};
pub use early::write_back_early;

/// Syncs everything of the file system that holds `file`; one call instead of one a file.
///
/// Linux reports write errors of any file of the file system since 5.8 (`syncfs(2)`).
pub fn sync_filesystem(file: &File) -> io::Result<()> {
    Ok(rustix::fs::syncfs(file)?)
}

/// Syncs a directory, so that names made in it survive a crash.
pub fn sync_directory(path: &Path) -> io::Result<()> {
    File::open(path)?.sync_all()
}

/// Whether this process may do what it likes with files.
pub fn is_superuser() -> bool {
    rustix::process::geteuid().is_root()
}

/// Bytes that an ordinary user may still write to the file system of `path`.
pub fn free_space(path: &Path) -> io::Result<u64> {
    let stat = rustix::fs::statvfs(path)?;
    Ok(stat.f_bavail.saturating_mul(stat.f_frsize))
}

/// The file system that holds `path`: equal numbers mean the same one.
pub fn device(path: &Path) -> io::Result<u64> {
    use std::os::unix::fs::MetadataExt;
    Ok(std::fs::metadata(path)?.dev())
}
