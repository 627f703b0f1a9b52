//! Other major versions of PostgreSQL than the machine's own: `cargo xtask pg 17`, and the steps of
//! the tests that run on them.
//!
//! Packages are fetched once, into the same cache as the S3 server's. What runs is a copy: the cache
//! may lie where the user `postgres` may not enter, and the programs name their libraries' place.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use crate::child::{Child, Ended, last_lines, output};
use crate::environment::{self, cargo, root};
use crate::steps::Steps;

/// The versions that `cargo xtask test` covers, with the suites that have them.
const FROM_SUITES: [(u32, &[&str]); 3] = [(15, &["bookworm"]), (17, &["trixie"]), (18, &["forky", "sid"])];

/// No suite has this one; `cargo xtask soak` covers it.
pub const FROM_ELSEWHERE: u32 = 16;

/// Fetching and unpacking takes about ten seconds where the network is good.
const FETCH_LIMIT: Duration = Duration::from_secs(300);

/// Tests that start servers: all but one of them need no other version.
const ON_EACH: [&str; 11] = [
    "real_server",
    "real_faults",
    "real_stream",
    "real_standby",
    "real_cuts",
    "real_agent",
    "source",
    "instance",
    "formats",
    "replication",
    "cuts",
];

/// `cargo xtask pg MAJOR [DIRECTORY]`: the programs of a version, for a test by hand.
pub fn main(args: &[String]) -> Result<(), String> {
    let (major, place) = match args {
        [major] => (major, PathBuf::from(format!("/var/tmp/dr-postgresql-{major}"))),
        [major, place] => (major, PathBuf::from(place)),
        _ => return Err("pg needs a major version and perhaps a directory, as in pg 17 /srv/pg17".into()),
    };
    let version: u32 = major.parse().map_err(|_| format!("{major:?} is no major version"))?;
    let place = std::path::absolute(&place).map_err(|error| format!("{}: {error}", place.display()))?;
    let made = copied(version, &place);
    let bin = if is_ours(&made) { made } else { programs(version, &place)? };
    println!("DR_TEST_PG_BIN={}", bin.display());
    Ok(())
}

/// The directory of the programs of a version: the system's, or a copy made in `place`.
pub fn programs(major: u32, place: &Path) -> Result<PathBuf, String> {
    let system = PathBuf::from(format!("/usr/lib/postgresql/{major}/bin"));
    if ["postgres", "initdb", "pg_upgrade", "psql"].iter().all(|name| system.join(name).is_file()) {
        return Ok(system);
    }
    // A copy of somebody else's would run with our rights.
    std::fs::create_dir(place).map_err(|error| format!("cannot make {}: {error}", place.display()))?;
    let made = fetch(major, place);
    if made.is_err() {
        let _ = std::fs::remove_dir_all(place);
    }
    made
}

/// Where the programs are in a copy.
fn copied(major: u32, place: &Path) -> PathBuf {
    match major {
        FROM_ELSEWHERE => place.join("bin"),
        _ => place.join(format!("usr/lib/postgresql/{major}/bin")),
    }
}

/// Whether an earlier call of ours made the copy.
fn is_ours(bin: &Path) -> bool {
    use std::os::unix::fs::MetadataExt;
    let owner = |path: &Path| std::fs::metadata(path).map(|meta| meta.uid()).ok();
    let programs = owner(&bin.join("postgres"));
    programs.is_some() && programs == owner(Path::new("/proc/self"))
}

fn fetch(major: u32, place: &Path) -> Result<PathBuf, String> {
    let cached = environment::cache().join(format!("postgresql-{major}"));
    let script = |name: &str| {
        let mut command = Command::new("bash");
        command.arg(root().join("xtask/env").join(name)).arg(&cached).arg(place);
        command
    };
    let command = if major == FROM_ELSEWHERE {
        script("pg-16.sh")
    } else {
        let suites = FROM_SUITES.iter().find(|(known, _)| *known == major).map(|(_, suites)| suites);
        let known = FROM_SUITES.map(|(known, _)| known.to_string()).join(", ");
        let suites = suites
            .ok_or_else(|| format!("PostgreSQL {major}: only {known} and {FROM_ELSEWHERE} are known"))?;
        let mut command = script("pg.sh");
        command.arg(major.to_string()).args(*suites);
        command
    };
    std::fs::create_dir_all(environment::cache()).map_err(|error| format!("no cache: {error}"))?;
    run(major, command)?;
    Ok(copied(major, place))
}

fn run(major: u32, command: Command) -> Result<(), String> {
    let logs = environment::logs();
    std::fs::create_dir_all(&logs).map_err(|error| format!("cannot make {}: {error}", logs.display()))?;
    let log = logs.join(format!("postgresql-{major}.log"));
    match Child::new(command, log.clone(), FETCH_LIMIT).run()? {
        Ended::Well => Ok(()),
        Ended::Badly(_) => Err(last_lines(&log, 3)),
        Ended::TimedOut => Err(format!("it was not fetched within {} s", FETCH_LIMIT.as_secs())),
    }
}

/// The major version of the programs in a directory.
fn major_of(bin: &Path) -> Result<u32, String> {
    // "postgres (PostgreSQL) 15.18 (Debian 15.18-0+deb12u1)"
    let text = output(Command::new(bin.join("postgres")).arg("--version"))?;
    let version = text.split(' ').nth(2).unwrap_or_default();
    version.split(|c: char| !c.is_ascii_digit()).next().and_then(|major| major.parse().ok()).ok_or(text)
}

/// Runs the tests that start servers on each version that `own` is not, and the upgrades between all.
/// A version that cannot be had here is skipped, and the reason is told.
pub fn steps(steps: &mut Steps, own: &Path, scratch: &Path, runner: &[&str]) {
    let mut found = match major_of(own) {
        Ok(major) => vec![(major, own.to_owned())],
        Err(error) => return steps.not_run("other versions", &error),
    };
    for (major, _) in FROM_SUITES {
        if found.iter().any(|(known, _)| *known == major) {
            continue;
        }
        let programs = programs(major, &scratch.join(format!("postgresql-{major}")));
        match programs {
            Ok(bin) => {
                on_one(steps, major, &bin, runner);
                found.push((major, bin));
            }
            Err(error) => steps.skip(&format!("postgresql {major}"), &error),
        }
    }
    found.sort();
    let [.., (_, newest)] = &found[..] else { return };
    if found.len() < 2 {
        return steps.skip("pg_upgrade", "there is only one version");
    }
    let path = std::env::join_paths(found.iter().map(|(_, bin)| bin)).unwrap_or_default();
    let mut command = cargo(&[runner, &["--workspace", "--test", "upgrade"]].concat());
    command.env("DR_TEST_PG_BIN", newest).env("DR_TEST_PG_UPGRADE", path);
    steps.run("pg_upgrade", Duration::from_secs(240), command);
}

/// Runs the tests that start servers on one version.
pub fn on_one(steps: &mut Steps, major: u32, bin: &Path, runner: &[&str]) {
    // The whole workspace, so that features are as before and nothing is built twice.
    let tests = ON_EACH.iter().flat_map(|name| ["--test", name]);
    let mut command = cargo(&[runner, &["--workspace"]].concat());
    // The distribution's pgBackRest knows the distribution's server only.
    command.args(tests).env("DR_TEST_PG_BIN", bin).env_remove("DR_TEST_PGBACKREST");
    steps.run(&format!("postgresql {major}"), Duration::from_secs(600), command);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_version_that_nobody_has_is_an_error_and_leaves_nothing() {
        let place = std::env::temp_dir().join(format!("xtask-pg-{}", std::process::id()));
        let error = programs(12, &place).expect_err("no PostgreSQL 12");
        assert!(error.contains("15, 17, 18 and 16"), "{error}");
        assert!(!place.exists());
    }

    #[test]
    fn a_place_that_somebody_made_before_is_not_used() {
        let place = std::env::temp_dir().join(format!("xtask-pg-taken-{}", std::process::id()));
        std::fs::create_dir(&place).expect("make");
        let refused = programs(14, &place).is_err_and(|error| error.contains("cannot make"));
        std::fs::remove_dir(&place).expect("it is left alone");
        assert!(refused);
    }

    #[test]
    fn every_test_on_servers_that_is_named_is_there() {
        for name in ON_EACH.iter().chain(["upgrade"].iter()) {
            let file = format!("tests/{name}.rs");
            let there = |krate: &str| root().join("crates").join(krate).join(&file).is_file();
            assert!(["dr-cli", "dr-pg"].iter().any(|krate| there(krate)), "{file}");
        }
    }
}
