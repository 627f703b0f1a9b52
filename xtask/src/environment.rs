//! What the tests need from the machine, and how it is had when it is missing.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use crate::child::{self, Child, Ended};

/// The workspace's root.
pub fn root() -> PathBuf {
    let here = PathBuf::from(env!("CARGO_MANIFEST_DIR"));
    here.parent().map_or(here.clone(), Path::to_owned)
}

/// Where this task's logs go: beside cargo's own output.
pub fn logs() -> PathBuf {
    target().join("xtask")
}

/// Cargo's target directory.
pub fn target() -> PathBuf {
    std::env::var_os("CARGO_TARGET_DIR").map_or_else(|| root().join("target"), PathBuf::from)
}

/// Cargo, at the workspace's root.
pub fn cargo(args: &[&str]) -> Command {
    let mut command = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    command.args(args).current_dir(root());
    command
}

/// Whether we are root, who may install but may not run PostgreSQL.
pub fn is_root() -> bool {
    std::fs::read_to_string("/proc/self/status")
        .unwrap_or_default()
        .lines()
        .find_map(|line| line.strip_prefix("Uid:"))
        .and_then(|ids| ids.split_whitespace().nth(1).map(|id| id == "0"))
        .unwrap_or(false)
}

/// A program found along `PATH`.
pub fn find_program(name: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH")?;
    std::env::split_paths(&path).map(|folder| folder.join(name)).find(|file| file.is_file())
}

/// The newest directory of PostgreSQL server programs, if any is installed.
pub fn find_postgres() -> Option<PathBuf> {
    let complete =
        |bin: &PathBuf| ["postgres", "initdb", "pg_ctl"].iter().all(|name| bin.join(name).is_file());
    let told = std::env::var_os("DR_TEST_PG_BIN").map(PathBuf::from).filter(complete);
    let mut majors: Vec<(u32, PathBuf)> = std::fs::read_dir("/usr/lib/postgresql")
        .into_iter()
        .flatten()
        .flatten()
        .filter_map(|entry| Some((entry.file_name().to_str()?.parse().ok()?, entry.path().join("bin"))))
        .filter(|(_, bin)| complete(bin))
        .collect();
    majors.sort();
    told.or_else(|| majors.pop().map(|(_, bin)| bin)).or_else(|| {
        let mut ask = Command::new(find_program("pg_config")?);
        let bin = PathBuf::from(child::output(ask.arg("--bindir")).ok()?.trim());
        complete(&bin).then_some(bin)
    })
}

/// The server programs, installed with apt if that is needed and allowed.
pub fn ensure_postgres() -> Result<PathBuf, String> {
    if let Some(bin) = find_postgres() {
        return Ok(bin);
    }
    if !is_root() || find_program("apt-get").is_none() {
        return Err("PostgreSQL's server programs were not found. Install them (Debian, Ubuntu: \
                    apt-get install postgresql), or set DR_TEST_PG_BIN to their directory."
            .into());
    }
    println!("PostgreSQL's server programs were not found; installing the distribution's");
    // The package would otherwise create and start a cluster of its own.
    let folder = Path::new("/etc/postgresql-common");
    if !folder.exists() {
        std::fs::create_dir_all(folder)
            .and_then(|()| std::fs::write(folder.join("createcluster.conf"), "create_main_cluster = false\n"))
            .map_err(|error| format!("cannot write below {}: {error}", folder.display()))?;
    }
    apt_install(&["postgresql"])?;
    find_postgres().ok_or_else(|| "PostgreSQL was installed, but its programs are still not found".into())
}

/// Where pgBackRest is, installed if need be and possible: the trial beside it is tested with it.
pub fn ensure_pgbackrest() -> Result<PathBuf, String> {
    if find_program("pgbackrest").is_none() {
        if !is_root() || find_program("apt-get").is_none() {
            return Err("install pgBackRest (Debian, Ubuntu: apt-get install pgbackrest)".into());
        }
        println!("pgBackRest was not found; installing the distribution's");
        apt_install(&["pgbackrest"])?;
    }
    find_program("pgbackrest").ok_or_else(|| "pgBackRest was installed, but is still not found".into())
}

fn apt_install(packages: &[&str]) -> Result<(), String> {
    let apt = |args: &[&str]| {
        let mut command = Command::new("apt-get");
        command.env("DEBIAN_FRONTEND", "noninteractive").args(["-o", "Acquire::Retries=3", "-y"]).args(args);
        command
    };
    run("apt-update", Duration::from_secs(300), apt(&["update"]))?;
    let mut install = apt(&["-o", "Dpkg::Options::=--force-confold", "install", "--no-install-recommends"]);
    install.args(packages);
    run("apt-install", Duration::from_secs(600), install)
}

/// Runs a preparing command quietly; on failure its last lines are in the error.
pub fn run(name: &str, deadline: Duration, command: Command) -> Result<(), String> {
    std::fs::create_dir_all(logs()).map_err(|error| format!("cannot make {}: {error}", logs().display()))?;
    let log = logs().join(format!("{name}.log"));
    let what = format!("{command:?}");
    match Child::new(command, log.clone(), deadline).run()? {
        Ended::Well => Ok(()),
        Ended::Badly(status) => Err(format!("{what}: {status}\n{}", child::last_lines(&log, 20))),
        Ended::TimedOut => Err(format!("{what}: did not end within {} s", deadline.as_secs())),
    }
}

/// Where things are kept that a clean build need not fetch again.
pub fn cache() -> PathBuf {
    std::env::var_os("XDG_CACHE_HOME")
        .map(PathBuf::from)
        .or_else(|| std::env::var_os("HOME").map(|home| PathBuf::from(home).join(".cache")))
        .unwrap_or_else(std::env::temp_dir)
        .join("dr-xtask")
}

/// Packages that the restore script of `docs/formats/` imports.
const PYTHON_PACKAGES: &[&str] = &["cryptography", "zstandard", "blake3"];

/// A Python with the packages of the escape-hatch script, kept outside of the target directory
/// and named for what is in it, so that a clean build does not fetch it again.
pub fn ensure_python() -> Result<PathBuf, String> {
    let wish = PYTHON_PACKAGES.join("-");
    let folder = cache().join(format!("python-{wish}"));
    let python = folder.join("bin/python");
    if imports(&python) {
        return Ok(python);
    }
    for base in ["/usr/bin/python3", "python3"] {
        if imports(Path::new(base)) {
            return Ok(PathBuf::from(base));
        }
    }
    println!("making a Python environment with {wish}");
    let _ = std::fs::remove_dir_all(&folder);
    if make_venv(&folder).is_err() {
        if !is_root() || find_program("apt-get").is_none() {
            return Err(
                "python3 with its venv module is needed (Debian: apt-get install python3-venv)".into()
            );
        }
        apt_install(&["python3-venv"])?;
        make_venv(&folder)?;
    }
    let mut pip = Command::new(&python);
    pip.args(["-m", "pip", "install", "--quiet", "--no-input"]).args(PYTHON_PACKAGES);
    run("pip-install", Duration::from_secs(300), pip)?;
    if imports(&python) { Ok(python) } else { Err(format!("{} does not import {wish}", python.display())) }
}

fn make_venv(folder: &Path) -> Result<(), String> {
    let mut last = String::new();
    for base in ["/usr/bin/python3", "python3"] {
        let mut venv = Command::new(base);
        venv.args(["-m", "venv"]).arg(folder);
        match run("python-venv", Duration::from_secs(120), venv) {
            Ok(()) => return Ok(()),
            Err(error) => last = error,
        }
        let _ = std::fs::remove_dir_all(folder);
    }
    Err(last)
}

fn imports(python: &Path) -> bool {
    let script = format!("import {}", PYTHON_PACKAGES.join(", "));
    let mut command = Command::new(python);
    command.args(["-c", &script]);
    child::output(&mut command).is_ok()
}
