//! Child processes that end: a deadline, a process group, no standard input, output in a file.

use std::fs::File;
use std::io::{Read, Write};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

/// What marks the processes of one run in their environment, so that those that left their
/// process group (servers do) are found and nobody else's are.
#[derive(Clone, Debug)]
pub struct Mark(String);

impl Mark {
    /// The variable's name.
    pub const NAME: &str = "DR_XTASK_RUN";

    /// A mark that nothing carries yet.
    pub fn fresh() -> Mark {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        Mark(format!("{}-{}", std::process::id(), COUNT.fetch_add(1, Ordering::Relaxed)))
    }

    /// The mark as it stands in an environment.
    pub fn entry(&self) -> String {
        format!("{}={}", Mark::NAME, self.0)
    }

    /// Lets a process and all that it starts carry the mark.
    pub fn put_on(&self, command: &mut Command) {
        command.env(Mark::NAME, &self.0);
    }

    /// Ends every process that carries the mark and returns how many there were.
    pub fn sweep(&self) -> usize {
        let marked = self.carriers();
        for pid in &marked {
            kill_one(*pid, "KILL");
        }
        marked.len()
    }

    fn carriers(&self) -> Vec<u32> {
        let Ok(entries) = std::fs::read_dir("/proc") else { return Vec::new() };
        let entry = self.entry();
        entries
            .flatten()
            .filter_map(|entry| entry.file_name().to_str()?.parse().ok())
            .filter(|pid: &u32| *pid != std::process::id() && carries(*pid, &entry))
            .collect()
    }
}

fn carries(pid: u32, entry: &str) -> bool {
    let path = format!("/proc/{pid}/environ");
    std::fs::read(path).is_ok_and(|bytes| bytes.split(|byte| *byte == 0).any(|item| item == entry.as_bytes()))
}

/// The same for `.ci/run`, which sweeps once more after us.
pub const CI_MARK: &str = "DR_CI_RUN";

/// How a child ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ended {
    /// Exit status 0.
    Well,
    /// Another exit status, or a signal.
    Badly(ExitStatus),
    /// It was killed at its deadline.
    TimedOut,
}

/// A command with its bounds.
pub struct Child {
    command: Command,
    log: PathBuf,
    deadline: Duration,
    mark: Mark,
    echo: bool,
}

impl Child {
    /// A child whose output goes to `log` and that lives at most `deadline`.
    pub fn new(command: Command, log: PathBuf, deadline: Duration) -> Child {
        Child { command, log, deadline, mark: Mark::fresh(), echo: false }
    }

    /// Lets the child carry this mark instead of one of its own.
    pub fn marked(mut self, mark: &Mark) -> Child {
        self.mark = mark.clone();
        self
    }

    /// Copies the output to our standard output while it is written.
    pub fn echo(mut self, echo: bool) -> Child {
        self.echo = echo;
        self
    }

    /// Runs the command to its end or its deadline; its process group is gone afterwards.
    pub fn run(mut self) -> Result<Ended, String> {
        let place = |what: &str, error: std::io::Error| format!("{what} {}: {error}", self.log.display());
        let log = File::create(&self.log).map_err(|error| place("cannot write", error))?;
        let twin = log.try_clone().map_err(|error| place("cannot share", error))?;
        let mut tail = File::open(&self.log).map_err(|error| place("cannot read", error))?;
        let name = self.command.get_program().to_string_lossy().into_owned();
        self.mark.put_on(&mut self.command);
        let mut child = self
            .command
            .stdin(Stdio::null())
            .stdout(log)
            .stderr(twin)
            .process_group(0)
            .spawn()
            .map_err(|error| format!("cannot start {name}: {error}"))?;
        let group = child.id();
        let started = Instant::now();
        let ended = loop {
            let status = child.try_wait().map_err(|error| format!("cannot wait for {name}: {error}"))?;
            if self.echo {
                copy_new(&mut tail);
            }
            if let Some(status) = status {
                break if status.success() { Ended::Well } else { Ended::Badly(status) };
            }
            if started.elapsed() > self.deadline {
                kill_group(group, "TERM");
                std::thread::sleep(Duration::from_secs(3));
                kill_group(group, "KILL");
                // A process that SIGKILL does not end is stuck in the kernel; leave it.
                let _ = child.try_wait();
                break Ended::TimedOut;
            }
            std::thread::sleep(Duration::from_millis(40));
        };
        kill_group(group, "KILL");
        if self.echo {
            copy_new(&mut tail);
        }
        Ok(ended)
    }
}

fn copy_new(tail: &mut File) {
    let mut bytes = Vec::new();
    if tail.read_to_end(&mut bytes).is_ok() && !bytes.is_empty() {
        let mut out = std::io::stdout().lock();
        let _ = out.write_all(&bytes);
        let _ = out.flush();
    }
}

/// Sends a signal to a process group. The shell's `kill` spares us a dependency.
pub fn kill_group(group: u32, signal: &str) {
    signal_to(&format!("-{group}"), signal);
}

/// Sends a signal to one process.
pub fn kill_one(pid: u32, signal: &str) {
    signal_to(&pid.to_string(), signal);
}

fn signal_to(whom: &str, signal: &str) {
    let script = format!("kill -s {signal} -- {whom}");
    let _ = Command::new("/bin/sh")
        .args(["-c", &script])
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .status();
}

/// No short command takes longer.
const SHORT: Duration = Duration::from_secs(120);

/// The output of a short command, as text; an error says what it printed.
///
/// It goes through files: a pipe would be held open by whatever the command left behind.
pub fn output(command: &mut Command) -> Result<String, String> {
    let name = format!("{command:?}");
    let failed = |what: &str, error: std::io::Error| format!("{what} {name}: {error}");
    static COUNT: AtomicU32 = AtomicU32::new(0);
    let number = COUNT.fetch_add(1, Ordering::Relaxed);
    let base = std::env::temp_dir().join(format!("xtask-output-{}-{number}", std::process::id()));
    let (out, err) = (base.with_extension("out"), base.with_extension("err"));
    let open = |path: &Path| File::create(path).map_err(|error| failed("cannot keep the output of", error));
    let spawned =
        command.stdin(Stdio::null()).stdout(open(&out)?).stderr(open(&err)?).process_group(0).spawn();
    let ended = match spawned {
        Ok(mut child) => {
            let ended = wait(&mut child, SHORT).map_err(|error| failed("cannot wait for", error));
            // A server has a session of its own by now; whatever else is left is not wanted.
            kill_group(child.id(), "KILL");
            ended
        }
        Err(error) => Err(failed("cannot start", error)),
    };
    let read = |path: &Path| {
        let bytes = std::fs::read(path).unwrap_or_default();
        let _ = std::fs::remove_file(path);
        String::from_utf8_lossy(&bytes).into_owned()
    };
    let (out, err) = (read(&out), read(&err));
    match ended? {
        Some(status) if status.success() => Ok(out),
        Some(status) => Err(format!("{name}: {status}\n{err}")),
        None => Err(format!("{name}: did not end within {} s\n{err}", SHORT.as_secs())),
    }
}

/// Waits for a child that leads its group; `None`: it was killed at the limit.
fn wait(child: &mut std::process::Child, limit: Duration) -> std::io::Result<Option<ExitStatus>> {
    let started = Instant::now();
    loop {
        if let Some(status) = child.try_wait()? {
            return Ok(Some(status));
        }
        if started.elapsed() > limit {
            kill_group(child.id(), "KILL");
            child.wait()?;
            return Ok(None);
        }
        std::thread::sleep(Duration::from_millis(3));
    }
}

/// The last lines of a log, for a message.
pub fn last_lines(log: &Path, count: usize) -> String {
    let text =
        std::fs::read(log).map(|bytes| String::from_utf8_lossy(&bytes).into_owned()).unwrap_or_default();
    let lines: Vec<&str> = text.lines().collect();
    lines[lines.len().saturating_sub(count)..].join("\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sh(script: &str) -> Command {
        let mut command = Command::new("/bin/sh");
        command.args(["-c", script]);
        command
    }

    fn log(name: &str) -> PathBuf {
        std::env::temp_dir().join(format!("xtask-child-{}-{name}", std::process::id()))
    }

    #[test]
    fn a_child_is_killed_at_its_deadline_with_all_of_its_group() {
        let path = log("deadline");
        let started = Instant::now();
        let ended = Child::new(sh("sleep 61 & sleep 62"), path.clone(), Duration::from_millis(200))
            .run()
            .expect("run");
        assert_eq!(ended, Ended::TimedOut);
        assert!(started.elapsed() < Duration::from_secs(30));
        let _ = std::fs::remove_file(path);
    }

    #[test]
    fn a_background_process_that_holds_the_output_does_not_keep_us_waiting() {
        let path = log("background");
        let started = Instant::now();
        let ended =
            Child::new(sh("sleep 63 & exit 0"), path.clone(), Duration::from_secs(20)).run().expect("run");
        assert_eq!(ended, Ended::Well);
        assert!(started.elapsed() < Duration::from_secs(10));
        let _ = std::fs::remove_file(path);
    }

    #[test]
    fn output_is_had_although_a_background_process_holds_it() {
        let started = Instant::now();
        let text = output(&mut sh("echo said; sleep 65 &")).expect("output");
        assert_eq!(text, "said\n");
        assert!(started.elapsed() < Duration::from_secs(20));
        assert!(output(&mut sh("echo why >&2; exit 3")).is_err_and(|error| error.contains("why")));
    }

    #[test]
    fn a_process_that_left_its_group_is_found_by_its_mark() {
        let mark = Mark::fresh();
        let mut setsid = Command::new("setsid");
        mark.put_on(&mut setsid);
        let mut left = setsid.args(["sleep", "64"]).spawn().expect("setsid");
        let found = (0..100).any(|_| {
            std::thread::sleep(Duration::from_millis(20));
            mark.carriers().contains(&left.id())
        });
        let _ = left.kill();
        let _ = left.wait();
        assert!(found, "marked process was not found");
    }
}
