//! `cargo xtask demo`: a disposable shop, a mistake, and the way back, with measured times.
//!
//! Everything lives in one scratch directory, and one janitor (`janitor.rs`) stops the servers
//! and removes the directory however this ends.

mod account;
pub mod interrupted;
pub mod server;
mod shop;

use std::os::unix::fs::{PermissionsExt, chown};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use serde_json::Value;

use crate::child::{Child, Ended, last_lines};
use crate::environment::{self, cargo};
use crate::janitor::Scratch;
use account::Account;
use server::{Server, User};

/// No single command of the demo takes longer than this, or something is wrong.
const PATIENCE: Duration = Duration::from_secs(120);

/// Runs the demo.
pub fn main(args: &[String]) -> Result<(), String> {
    let bin = environment::ensure_postgres()?;
    let user = User::of_server()?;
    let program = match args {
        [] => build(false)?,
        [flag] if flag == "--debug" => build(true)?,
        [flag, program] if flag == "--program" => PathBuf::from(program),
        _ => return Err("demo knows only --debug and --program FILE".into()),
    };
    let mut stage = Stage::set_up(bin, user, &program)?;
    let outcome = stage.play();
    if outcome.is_err() {
        // The scratch directory is about to go; what the servers said would be lost.
        for log in ["production.log", "restored/dr-recovery.log", "dr.log"] {
            let text = last_lines(&stage.place(log), 12);
            if !text.is_empty() {
                eprintln!("--- {log}\n{text}");
            }
        }
    }
    outcome
}

fn build(debug: bool) -> Result<PathBuf, String> {
    println!("building dr ({})", if debug { "debug" } else { "release" });
    let mut command = cargo(&["build", "--package", "dr-cli", "--bin", "dr"]);
    if !debug {
        command.arg("--release");
    }
    let log = environment::logs().join("demo-build.log");
    std::fs::create_dir_all(environment::logs()).map_err(|error| error.to_string())?;
    match Child::new(command, log.clone(), Duration::from_secs(40 * 60)).echo(true).run()? {
        Ended::Well => Ok(environment::target().join(if debug { "debug" } else { "release" }).join("dr")),
        ended => Err(format!("dr does not build ({ended:?}), see {}", log.display())),
    }
}

/// Everything that the demo made, in one place.
struct Stage {
    production: Server,
    user: User,
    started: Instant,
    account: Account,
    // Last, so that it goes last.
    scratch: Scratch,
}

impl Stage {
    fn set_up(bin: PathBuf, user: User, program: &Path) -> Result<Stage, String> {
        let scratch = Scratch::new("dr-demo")?;
        let here = scratch.path().to_owned();
        let own = |path: &Path, mode: u32| {
            std::fs::set_permissions(path, std::fs::Permissions::from_mode(mode))
                .and_then(|()| chown(path, Some(user.uid), Some(user.gid)))
                .map_err(|error| format!("cannot hand over {}: {error}", path.display()))
        };
        // The server's user may not be allowed to enter the folder that we were built in.
        let copy = here.join("dr");
        std::fs::copy(program, &copy)
            .map_err(|error| format!("cannot copy {}: {error}", program.display()))?;
        own(&copy, 0o755)?;
        for folder in ["sockets", "tmp"] {
            let folder = here.join(folder);
            std::fs::create_dir(&folder).map_err(|error| error.to_string())?;
            own(&folder, 0o700)?;
        }
        own(&here, 0o755)?;
        let production = Server {
            bin,
            user: user.clone(),
            data: here.join("production"),
            sockets: here.join("sockets"),
            port: 5432,
        };
        Ok(Stage { production, user, started: Instant::now(), account: Account::default(), scratch })
    }

    fn place(&self, name: &str) -> PathBuf {
        self.scratch.path().join(name)
    }

    /// The story, from an empty disk to the proof.
    fn play(&mut self) -> Result<(), String> {
        self.open_shop()?;
        self.protect()?;
        let load = self.start_load()?;
        self.back_up()?;
        let mistake = self.make_mistake()?;
        load.check()?;
        self.recover(&mistake)?;
        self.account.close(self.started.elapsed());
        Ok(())
    }

    fn open_shop(&mut self) -> Result<(), String> {
        let started = Instant::now();
        self.production.init()?;
        self.production.start(&self.place("production.log"), self.scratch.mark())?;
        self.production.sql(&shop::schema())?;
        let size = self.production.sql("SELECT pg_size_pretty(pg_database_size(current_database()))")?;
        let tenants = shop::TENANTS.len();
        let text = format!(
            "a cluster with {tenants} tenants, a schema each (orders, payments, inventory, customers), {size}"
        );
        self.account.line(&text, started.elapsed());
        Ok(())
    }

    fn protect(&mut self) -> Result<(), String> {
        let started = Instant::now();
        let (repository, config) = (self.place("repository"), self.place("dr.toml"));
        let connection = self.production.conninfo();
        let made = self.dr(&[
            "--repo",
            &repository.to_string_lossy(),
            "init",
            "--connection",
            &connection,
            "--label",
            "shop",
            "--output",
            &config.to_string_lossy(),
        ])?;
        let archive = text(&made, "archive_command").ok_or("dr init did not say the archive_command")?;
        self.production
            .sql(&format!("ALTER SYSTEM SET archive_command = '{}'", archive.replace('\'', "''")))?;
        self.production.sql("SELECT pg_reload_conf()")?;
        self.dr_configured(&["check"])?;
        self.account.line(
            "an encrypted repository, WAL archived by `dr wal push`, `dr check` content",
            started.elapsed(),
        );
        Ok(())
    }

    fn start_load(&self) -> Result<server::Load, String> {
        let script = self.place("sales.sql");
        std::fs::write(&script, "SELECT shop.sale()\n\\watch 0.005\n").map_err(|error| error.to_string())?;
        self.production.load(&script, self.scratch.mark())
    }

    fn back_up(&mut self) -> Result<(), String> {
        let started = Instant::now();
        let report = self.dr_configured(&["backup"])?;
        let stored = find(&report, "bytes_stored").and_then(Value::as_u64).unwrap_or(0);
        let text = format!("a backup under load, {:.1} MB stored", stored as f64 / 1e6);
        self.account.line(&text, started.elapsed());
        Ok(())
    }

    /// Sells on, then drops a table; the digest of its rows is taken under the lock that the drop
    /// needs, so that it is the table's very last state.
    fn make_mistake(&mut self) -> Result<shop::Mistake, String> {
        let started = Instant::now();
        std::thread::sleep(Duration::from_secs(4));
        let mistake = shop::Mistake::parse(&self.production.sql(&shop::drop_table())?)?;
        std::thread::sleep(Duration::from_secs(2));
        let sales = self.production.sql("SELECT count(*) FROM shop.sales_made")?;
        // Recovery can only tell that the moment has passed when it sees a later commit.
        let last = self.production.close_segment()?;
        self.production.wait_archived(&last, PATIENCE)?;
        let text = format!(
            "{sales} sales later somebody ran DROP TABLE {}: {} rows gone, selling went on",
            shop::VICTIM,
            mistake.rows
        );
        self.account.line(&text, started.elapsed());
        Ok(mistake)
    }

    fn recover(&mut self, mistake: &shop::Mistake) -> Result<(), String> {
        let started = Instant::now();
        let to = self.place("restored");
        let report = self.dr_configured(&[
            "restore",
            "--to",
            &to.to_string_lossy(),
            "--time",
            &mistake.moment,
            "--start",
        ])?;
        let restored = self.production.other(&to)?;
        let back = shop::Digest::parse(&restored.sql(shop::DIGEST)?)?;
        let took = started.elapsed();
        let gone = self.production.sql(&format!("SELECT to_regclass('{}') IS NULL", shop::VICTIM))?;
        if gone != "t" {
            return Err("the table is still there in production: the demo proved nothing".into());
        }
        if (back.rows, &back.md5) != (mistake.rows, &mistake.md5) {
            return Err(format!("the rows differ: {mistake:?} before, {back:?} after recovery"));
        }
        let reached = find(&report, "reached").cloned().unwrap_or_default();
        let word = |name: &str| text(&reached, name).unwrap_or_else(|| "unknown".into());
        self.account.line(&format!("`dr restore --time '{}' --start`", mistake.moment), took);
        self.account.fact("reached", &format!("LSN {} on timeline {}", word("lsn"), word("timeline")));
        self.account.fact("last commit", &word("last_commit"));
        self.account.fact("rows", &format!("{} in {}, as before the mistake", back.rows, shop::VICTIM));
        self.account.fact("digest", &format!("{} both times", back.md5));
        restored.stop()?;
        self.production.stop()
    }

    fn dr_configured(&self, args: &[&str]) -> Result<Value, String> {
        let config = self.place("dr.toml");
        self.dr(&[&["--config", &config.to_string_lossy()], args].concat())
    }

    /// Runs dr as the server's user and returns the result that it printed as JSON.
    fn dr(&self, args: &[&str]) -> Result<Value, String> {
        let log = self.place("dr.log");
        let mut command: Command = self.user.command(&self.place("dr"));
        command.arg("--json").args(args).current_dir(self.scratch.path());
        command.env("TMPDIR", self.place("tmp")).env("TZ", "UTC");
        let ended = Child::new(command, log.clone(), PATIENCE).marked(self.scratch.mark()).run()?;
        let said = std::fs::read_to_string(&log).unwrap_or_default();
        if ended != Ended::Well {
            return Err(format!("dr {}: {ended:?}\n{said}", args.join(" ")));
        }
        // Notes on standard error may stand before the document.
        let from = said.find('{').ok_or_else(|| format!("dr {} printed no JSON: {said}", args.join(" ")))?;
        serde_json::from_str(&said[from..]).map_err(|error| format!("dr {}: {error}\n{said}", args.join(" ")))
    }
}

/// The first value with this name, wherever it stands in the document.
fn find<'a>(value: &'a Value, name: &str) -> Option<&'a Value> {
    match value {
        Value::Object(map) => map.get(name).or_else(|| map.values().find_map(|inner| find(inner, name))),
        Value::Array(list) => list.iter().find_map(|inner| find(inner, name)),
        _ => None,
    }
}

fn text(value: &Value, name: &str) -> Option<String> {
    match find(value, name)? {
        Value::String(text) => Some(text.clone()),
        Value::Null => None,
        other => Some(other.to_string()),
    }
}
