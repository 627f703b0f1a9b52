//! Server programs: where they are, and how they are run.

use std::os::unix::fs::MetadataExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

/// The directory of the server's programs of a major version (`None`: the newest found).
///
/// Looked at: Debian's and Red Hat's places, then `PATH`.
pub fn find_bin_dir(major: Option<u32>) -> Option<PathBuf> {
    let mut found: Vec<(u32, PathBuf)> = Vec::new();
    let mut consider = |dir: PathBuf| {
        // A link somewhere in PATH leads to the directory that has the other programs too.
        let program = std::fs::canonicalize(dir.join("postgres"));
        let dir = program.ok().and_then(|path| path.parent().map(Path::to_owned)).unwrap_or(dir);
        if dir.join("postgres").is_file()
            && let Some(version) = major_of(&dir)
            && !found.iter().any(|(known, _)| *known == version)
        {
            found.push((version, dir));
        }
    };
    for (base, suffix) in [("/usr/lib/postgresql", "bin"), ("/usr", "bin")] {
        let Ok(entries) = std::fs::read_dir(base) else { continue };
        for entry in entries.flatten() {
            let name = entry.file_name();
            if base == "/usr/lib/postgresql" || name.to_string_lossy().starts_with("pgsql-") {
                consider(entry.path().join(suffix));
            }
        }
    }
    // tidy: allow(environment): where programs are is not a setting of ours
    for dir in std::env::split_paths(&std::env::var_os("PATH").unwrap_or_default()) {
        consider(dir);
    }
    let fits = found.into_iter().filter(|(version, _)| major.is_none_or(|major| major == *version));
    fits.max_by_key(|(version, _)| *version).map(|(_, dir)| dir)
}

/// The major version of the programs in a directory.
pub(crate) fn major_of(dir: &Path) -> Option<u32> {
    let output = Command::new(dir.join("postgres")).arg("--version").stdin(Stdio::null()).output().ok()?;
    // "postgres (PostgreSQL) 15.18 (Debian 15.18-0+deb12u1)"
    let text = String::from_utf8(output.stdout).ok()?;
    let version = text.split_once(") ")?.1;
    version.split(|c: char| !c.is_ascii_digit()).next()?.parse().ok()
}

/// A command that runs as the owner of `data`: PostgreSQL refuses root.
pub(crate) fn command_as_owner(program: &Path, data: &Path) -> std::io::Result<Command> {
    let mut command = Command::new(program);
    command.stdin(Stdio::null());
    if rustix::process::geteuid().is_root() {
        let owner = std::fs::metadata(data)?;
        command.uid(owner.uid()).gid(owner.gid());
    }
    Ok(command)
}

/// The name and the home directory of a user, from the system's user list.
pub(crate) fn user(uid: u32) -> Option<(String, PathBuf)> {
    let text = std::fs::read_to_string("/etc/passwd").ok()?;
    text.lines().find_map(|line| {
        let fields: Vec<&str> = line.split(':').collect();
        (fields.get(2)?.parse() == Ok(uid))
            .then(|| (fields[0].to_owned(), PathBuf::from(fields.get(5).unwrap_or(&"/"))))
    })
}
