//! A demo that is interrupted in its middle leaves nothing behind.

use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use crate::child::kill_group;

/// What is there at the moments at which it is interrupted: a server under load, a restore.
const MOMENTS: [&str; 2] = ["sockets/.s.PGSQL.5432", "restored"];

/// How long the demo may take to come to such a moment.
const COMES: Duration = Duration::from_secs(120);

/// How long it may take to go: its servers are told to quit.
const GOES: Duration = Duration::from_secs(30);

/// Interrupts the demo, as Ctrl-C does, at each of the moments. `demo` makes its command.
pub fn check(demo: impl Fn() -> Command) -> Result<(), String> {
    MOMENTS.into_iter().try_for_each(|moment| at(demo(), moment))
}

fn at(mut demo: Command, moment: &str) -> Result<(), String> {
    let demo = demo.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null()).process_group(0);
    let mut child = demo.spawn().map_err(|error| format!("the demo does not start: {error}"))?;
    let place = PathBuf::from(format!("/tmp/dr-demo-{}", child.id()));
    let outcome = interrupt(&mut child, &place, moment);
    kill_group(child.id(), "KILL");
    let _ = child.wait();
    outcome
}

fn interrupt(child: &mut Child, place: &Path, moment: &str) -> Result<(), String> {
    let mut ended = None;
    let came = within(COMES, || {
        ended = child.try_wait().ok().flatten();
        ended.is_some() || place.join(moment).exists()
    });
    if let Some(status) = ended {
        return Err(format!("the demo ended ({status}) before {moment} was there"));
    }
    if !came {
        return Err(format!("the demo did not come to {moment} within {} s", COMES.as_secs()));
    }
    kill_group(child.id(), "INT");
    let gone = within(GOES, || {
        ended = ended.or_else(|| child.try_wait().ok().flatten());
        ended.is_some() && !place.exists()
    });
    match ended {
        _ if !gone => Err(format!("{} s after Ctrl-C {} was still there", GOES.as_secs(), place.display())),
        Some(status) if status.signal().is_none() => {
            Err(format!("interrupted at {moment}, the demo ended with {status}"))
        }
        // Whoever removed the directory may be the last to go.
        _ if within(GOES, || inhabitants(place).is_empty()) => Ok(()),
        _ => Err(format!("processes of the interrupted demo are left: {}", inhabitants(place).join(", "))),
    }
}

/// The processes that work in a directory, or have it among their arguments.
fn inhabitants(place: &Path) -> Vec<String> {
    let place = place.to_string_lossy();
    std::fs::read_dir("/proc")
        .into_iter()
        .flatten()
        .flatten()
        .filter_map(|entry| entry.file_name().to_str()?.parse::<u32>().ok())
        .filter(|pid| {
            let arguments = std::fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
            let works_in = std::fs::read_link(format!("/proc/{pid}/cwd")).unwrap_or_default();
            let arguments = String::from_utf8_lossy(&arguments);
            arguments.contains(&*place) || works_in.to_string_lossy().contains(&*place)
        })
        .map(|pid| pid.to_string())
        .collect()
}

fn within(limit: Duration, mut done: impl FnMut() -> bool) -> bool {
    let began = Instant::now();
    while began.elapsed() < limit {
        if done() {
            return true;
        }
        std::thread::sleep(Duration::from_millis(20));
    }
    false
}
