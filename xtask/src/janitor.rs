//! Cleans up after us however we end.
//!
//! A shell waits on a pipe that only we hold open. When we are done, interrupted or killed, the
//! pipe closes, and the shell stops the servers below our scratch directory, ends what carries
//! our mark, and removes the directory. No signal handler is needed, and `kill -9` is covered.

use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, Stdio};
use std::time::{Duration, Instant};

use crate::child::{CI_MARK, Mark};

// $1 is the scratch directory, $2 our mark. A postmaster told to quit takes its children along.
const SCRIPT: &str = r#"
trap '' INT TERM HUP
read line
pids=
for file in $(find "$1" -maxdepth 4 -name postmaster.pid 2>/dev/null); do
  pids="$pids $(head -n 1 "$file")"
done
for pid in $pids; do kill -s QUIT "$pid"; done
for environ in /proc/[0-9]*/environ; do
  pid=${environ#/proc/}; pid=${pid%/environ}
  if tr '\0' '\n' < "$environ" | grep -qxF "$2"; then kill -s KILL "$pid"; fi
done
for file in "$1"/s3/run/*.pid; do
  [ -e "$file" ] && kill -s KILL "$(cat "$file")"
done
tries=0
for pid in $pids; do
  while [ -d "/proc/$pid" ] && [ $tries -lt 50 ]; do sleep 0.1; tries=$((tries + 1)); done
  kill -s KILL "$pid"
done
# Who was told to end may still write, or tidy up itself.
tries=0
while [ -e "$1" ] && [ $tries -lt 100 ]; do rm -rf -- "$1" || sleep 0.1; tries=$((tries + 1)); done
"#;

/// A scratch directory that every user may enter, and the shell that removes it when we end.
pub struct Scratch {
    path: PathBuf,
    mark: Mark,
    shell: Child,
    hold: Option<ChildStdin>,
}

impl Scratch {
    /// Makes `<temporary directory>/<name>-<our pid>`, open to everybody as the temporary
    /// directory is: PostgreSQL refuses to run as root, and its user works in there too.
    pub fn new(name: &str) -> Result<Scratch, String> {
        // Not TMPDIR: that may be private to one user, and socket paths must stay short.
        let mark = Mark::fresh();
        let path = PathBuf::from(format!("/tmp/{name}-{}", std::process::id()));
        std::fs::create_dir(&path).map_err(|error| format!("cannot make {}: {error}", path.display()))?;
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o1777))
            .map_err(|error| format!("cannot open up {}: {error}", path.display()))?;
        let mut shell = Command::new("/bin/sh")
            .args(["-c", SCRIPT, "janitor"])
            .arg(&path)
            .arg(mark.entry())
            // It must outlive the sweeps that end everything else.
            .env_remove(Mark::NAME)
            .env_remove(CI_MARK)
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .process_group(0)
            .spawn()
            .map_err(|error| format!("cannot start /bin/sh: {error}"))?;
        let hold = shell.stdin.take();
        Ok(Scratch { path, mark, shell, hold })
    }

    /// The directory.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The mark of the processes that end with the directory.
    pub fn mark(&self) -> &Mark {
        &self.mark
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        drop(self.hold.take());
        let started = Instant::now();
        while started.elapsed() < Duration::from_secs(20) {
            if !matches!(self.shell.try_wait(), Ok(None)) {
                return;
            }
            std::thread::sleep(Duration::from_millis(20));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_scratch_directory_is_gone_when_its_owner_is() {
        let scratch = Scratch::new("xtask-janitor").expect("scratch");
        let path = scratch.path().to_owned();
        std::fs::write(path.join("file"), b"x").expect("write");
        assert!(path.is_dir());
        drop(scratch);
        assert!(!path.exists());
    }
}
