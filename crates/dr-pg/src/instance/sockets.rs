//! Where a private server's socket is: in a directory of its own, which only the server's user may
//! enter, so that its rules can trust whoever comes that way.
//!
//! It lies in the data directory and goes away with the copy, whoever stops the server. Where a path
//! is too long for a socket, or has characters that the setting or a connection string would split,
//! it lies among the temporary files. There the data directory that it serves is written beside it,
//! and the next start removes it when that is gone.

use std::fs;
use std::io::Write;
use std::os::unix::fs::{DirBuilderExt, MetadataExt, PermissionsExt, fchown};
use std::path::{Path, PathBuf};

/// The directory's name in a data directory. Backups leave it out.
pub(crate) const NAME: &str = "dr-socket";

/// What names of directories among the temporary files begin with.
const PREFIX: &str = "dr-pg-";

/// The file that says which data directory a directory among the temporary files serves.
const SERVES: &str = "serves";

/// The longest path of a socket: `sun_path` has 108 bytes, the last one is zero.
const LONGEST: usize = 107;

/// The directory for the socket of the server on `data`, an absolute path.
pub(super) fn place(data: &Path, temporary: &Path) -> PathBuf {
    let inside = data.join(NAME);
    if fits(&inside) { inside } else { elsewhere(data, temporary) }
}

fn elsewhere(data: &Path, temporary: &Path) -> PathBuf {
    let mark = crc_fast::checksum(crc_fast::CrcAlgorithm::Crc32Iscsi, data.display().to_string().as_bytes());
    temporary.join(format!("{PREFIX}{mark:08x}"))
}

fn fits(dir: &Path) -> bool {
    let plain = |c: char| c.is_alphanumeric() || "/._-+=:@".contains(c);
    // The port is the copied configuration's.
    let socket = dir.join(".s.PGSQL.65535");
    dir.to_str().is_some_and(|text| text.chars().all(plain)) && socket.as_os_str().len() <= LONGEST
}

/// Makes the directory and its rules, for the owner of `data`.
pub(super) fn make(dir: &Path, data: &Path, temporary: &Path) -> std::io::Result<()> {
    let owner = fs::metadata(data)?;
    match fs::DirBuilder::new().mode(0o700).create(dir) {
        Err(error) if error.kind() == std::io::ErrorKind::AlreadyExists => {}
        other => other?,
    }
    let meta = fs::symlink_metadata(dir)?;
    let me = rustix::process::geteuid().as_raw();
    if !meta.is_dir() || (meta.uid() != owner.uid() && meta.uid() != me) {
        return Err(std::io::Error::other("it belongs to somebody else"));
    }
    fs::set_permissions(dir, fs::Permissions::from_mode(0o700))?;
    write_new(&dir.join("hba"), b"local all all trust\n", &owner)?;
    if dir.starts_with(temporary) && !dir.starts_with(data) {
        use std::os::unix::ffi::OsStrExt;
        write_new(&dir.join(SERVES), data.as_os_str().as_bytes(), &owner)?;
    }
    if rustix::process::geteuid().is_root() {
        fchown(fs::File::open(dir)?, Some(owner.uid()), Some(owner.gid()))?;
    }
    Ok(())
}

/// Writes a file that was not there: root must not write where somebody's link leads.
fn write_new(path: &Path, content: &[u8], owner: &fs::Metadata) -> std::io::Result<()> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    let mut file = fs::OpenOptions::new().write(true).create_new(true).open(path)?;
    file.write_all(content)?;
    if rustix::process::geteuid().is_root() {
        fchown(&file, Some(owner.uid()), Some(owner.gid()))?;
    }
    Ok(())
}

/// Removes what the server on `data` had: it is stopped.
pub(super) fn remove(data: &Path, temporary: &Path) {
    let _ = fs::remove_dir_all(data.join(NAME));
    let _ = fs::remove_dir_all(elsewhere(data, temporary));
}

/// Removes directories among the temporary files whose copies are gone: somebody else stopped those
/// servers. Only what says itself whom it served is touched.
pub(super) fn sweep(temporary: &Path) {
    use std::os::unix::ffi::OsStrExt;
    for entry in fs::read_dir(temporary).into_iter().flatten().flatten() {
        if !entry.file_name().as_bytes().starts_with(PREFIX.as_bytes()) {
            continue;
        }
        let Ok(serves) = fs::read(entry.path().join(SERVES)) else { continue };
        let data = Path::new(std::ffi::OsStr::from_bytes(&serves));
        let gone = matches!(data.try_exists(), Ok(false));
        if data.is_absolute() && gone && elsewhere(data, temporary) == entry.path() {
            let _ = fs::remove_dir_all(entry.path());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_socket_lies_in_the_copy_where_its_path_can_be_one() {
        let temporary = Path::new("/tmp");
        let within = |data: &str| place(Path::new(data), temporary).starts_with(data);
        assert!(within("/srv/restored") && within("/srv/größe_1-2.3"));
        for odd in ["/srv/a b", "/srv/a,b", "/srv/it's", "/srv/\"a", "/srv/a\\b"] {
            assert!(!within(odd), "{odd}");
        }
        // /…/dr-socket/.s.PGSQL.65535 has 25 bytes of its own.
        let longest = format!("/{}", "a".repeat(LONGEST - 26));
        assert_eq!(format!("{longest}/{NAME}/.s.PGSQL.65535").len(), LONGEST);
        assert!(within(&longest) && !within(&format!("{longest}a")));
    }

    #[test]
    fn only_what_served_a_copy_that_is_gone_is_swept_away() {
        let temporary = tempfile::tempdir().expect("a directory");
        let (temporary, there) = (temporary.path(), tempfile::tempdir().expect("a directory"));
        let gone = there.path().join("gone");
        let dir = |data: &Path| {
            let dir = elsewhere(data, temporary);
            fs::create_dir(&dir).expect("a directory");
            fs::write(dir.join(SERVES), data.display().to_string()).expect("a file");
            dir
        };
        let (kept, removed) = (dir(there.path()), dir(&gone));
        let silent = temporary.join("dr-pg-00000000");
        fs::create_dir(&silent).expect("a directory");
        // One that says of itself what its name does not.
        let liar = temporary.join("dr-pg-11111111");
        fs::create_dir(&liar).expect("a directory");
        fs::write(liar.join(SERVES), gone.display().to_string()).expect("a file");
        sweep(temporary);
        assert!(kept.exists() && !removed.exists() && silent.exists() && liar.exists());
        sweep(&temporary.join("none"));
    }

    #[test]
    fn rules_are_never_written_through_a_link() {
        let base = tempfile::tempdir().expect("a directory");
        let (data, outside) = (base.path().join("data"), base.path().join("outside"));
        fs::create_dir_all(data.join(NAME)).expect("a directory");
        fs::write(&outside, "precious").expect("a file");
        std::os::unix::fs::symlink(&outside, data.join(NAME).join("hba")).expect("a link");
        let dir = data.join(NAME);
        make(&dir, &data, Path::new("/tmp")).expect("made");
        assert_eq!(fs::read_to_string(&outside).expect("a file"), "precious");
        assert_eq!(fs::read_to_string(dir.join("hba")).expect("rules"), "local all all trust\n");
        assert_eq!(fs::metadata(&dir).expect("a directory").mode() & 0o777, 0o700);
        fs::remove_dir_all(&dir).expect("removed");
        std::os::unix::fs::symlink(base.path(), &dir).expect("a link");
        assert!(make(&dir, &data, Path::new("/tmp")).is_err(), "a link is no directory of ours");
    }
}
