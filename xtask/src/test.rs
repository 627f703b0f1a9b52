//! `cargo xtask test`: everything that CI runs, in the order in which it is cheapest to fail.

use std::os::unix::fs::chown;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use crate::demo::server::User;
use crate::environment::{self, cargo};
use crate::janitor::Scratch;
use crate::s3;
use crate::steps::{State, Steps};

/// What all steps together may take. CI gives up after 90 minutes and then says nothing.
const BUDGET: Duration = Duration::from_secs(35 * 60);
/// The same for `--quick`.
const QUICK_BUDGET: Duration = Duration::from_secs(15 * 60);

struct Options {
    quick: bool,
    s3: bool,
}

fn options(args: &[String]) -> Result<Options, String> {
    let mut options = Options { quick: false, s3: true };
    for arg in args {
        match arg.as_str() {
            "--quick" => options.quick = true,
            "--no-s3" => options.s3 = false,
            other => return Err(format!("test does not know {other}")),
        }
    }
    Ok(options)
}

/// Runs the checks and tests.
pub fn main(args: &[String]) -> Result<(), String> {
    let options = options(args)?;
    let scratch = Scratch::new("drt")?;
    let budget = if options.quick { QUICK_BUDGET } else { BUDGET };
    let mut steps = Steps::new(budget, environment::logs(), scratch.mark().clone())?;
    set_environment(&mut steps, &scratch)?;
    // It runs until all steps are done.
    let (server_programs, _s3) = prepare(&mut steps, &options, &scratch);
    check(&mut steps, &options, &scratch);
    test(&mut steps, &options, &scratch, server_programs.as_deref());
    steps.finish()
}

fn set_environment(steps: &mut Steps, scratch: &Scratch) -> Result<(), String> {
    let place = scratch.path().to_str().ok_or("the scratch directory's name is not text")?;
    steps.set("DR_TEST_TMP", place);
    steps.set("TMPDIR", place);
    if std::env::var_os("CI").is_some() {
        // A cold build is used once: what makes the next one faster only costs here.
        steps.set("CARGO_INCREMENTAL", "0");
        steps.set("CARGO_PROFILE_DEV_DEBUG", "0");
    }
    Ok(())
}

fn prepare(steps: &mut Steps, options: &Options, scratch: &Scratch) -> (Option<PathBuf>, Option<s3::Server>) {
    let mut found = None;
    steps.call("postgresql", || {
        let bin = environment::ensure_postgres()?;
        println!("server programs: {}", bin.display());
        found = Some(bin);
        Ok(())
    });
    if let Some(bin) = &found {
        steps.set("DR_TEST_PG_BIN", bin.to_string_lossy());
    }
    if options.quick {
        return (found, None);
    }
    let mut python = None;
    steps.call("python", || {
        python = Some(environment::ensure_python()?);
        Ok(())
    });
    if let Some(python) = python {
        steps.set("DR_TEST_PYTHON", python.to_string_lossy());
    }
    let server = start_s3(steps, options, scratch);
    (found, server)
}

fn start_s3(steps: &mut Steps, options: &Options, scratch: &Scratch) -> Option<s3::Server> {
    if !options.s3 {
        steps.skip("s3 server", "as told by --no-s3");
        return None;
    }
    let mut server = None;
    steps.call("s3 server", || {
        server = Some(s3::Server::start(scratch.path())?);
        Ok(())
    });
    for (name, value) in server.iter().flat_map(s3::Server::variables) {
        steps.set(name, value);
    }
    server
}

fn check(steps: &mut Steps, options: &Options, scratch: &Scratch) {
    let minutes = |count: u64| Duration::from_secs(count * 60);
    steps.run("fmt", minutes(2), cargo(&["fmt", "--all", "--check"]));
    steps.call("tidy", crate::tidy::main);
    crate::units::step(steps, scratch.path());
    let clippy = ["clippy", "--workspace", "--all-targets", "--quiet", "--", "-D", "warnings"];
    steps.run("clippy", minutes(15), cargo(&clippy));
    if options.quick {
        return;
    }
    let mut doc = cargo(&["doc", "--workspace", "--no-deps", "--document-private-items", "--quiet"]);
    doc.env("RUSTDOCFLAGS", "-D warnings");
    steps.run("rustdoc", minutes(8), doc);
    if environment::find_program("cargo-deny").is_some() {
        steps.run(
            "deny",
            minutes(2),
            cargo(&["deny", "--offline", "check", "--deny", "warnings", "licenses", "bans", "sources"]),
        );
    } else {
        steps.skip("deny", "cargo-deny is not installed (cargo install cargo-deny --locked)");
    }
}

fn test(steps: &mut Steps, options: &Options, scratch: &Scratch, server_programs: Option<&Path>) {
    let minutes = |count: u64| Duration::from_secs(count * 60);
    let nextest = environment::find_program("cargo-nextest").is_some();
    if !nextest {
        println!("cargo-nextest is not installed; using `cargo test` (no time limit per test)");
    }
    let runner: &[&str] = if nextest { &["nextest", "run"] } else { &["test"] };
    let targets: &[&str] = if nextest { &[] } else { &["--lib", "--bins", "--tests"] };
    let base = [runner, &["--workspace"], targets].concat();
    if steps.run("build tests", minutes(20), cargo(&[&base[..], &["--no-run"]].concat())) != State::Passed {
        steps.not_run("tests", "they did not build");
        return;
    }
    let profile: &[&str] = match (nextest, options.quick) {
        (true, true) => &["--profile", "quick"],
        (true, false) => &["--profile", "ci"],
        (false, true) => &["--", "--skip", "slow_"],
        (false, false) => &[],
    };
    let time = if options.quick { minutes(5) } else { minutes(15) };
    if !options.quick {
        // Before the tests: CI reads the last summary as the run's.
        steps.run("doc tests", minutes(8), cargo(&["test", "--workspace", "--doc", "--quiet"]));
    }
    steps.run("tests", time, cargo(&[&base[..], profile].concat()));
    if options.quick {
        return;
    }
    if let Some(own) = server_programs {
        crate::postgres::steps(steps, own, scratch.path(), runner);
    }
    // With the tests, so that the same features are on and nothing is built twice.
    let programs = cargo(&["build", "--workspace", "--bins", "--tests"]);
    if steps.run("build programs", minutes(10), programs) == State::Passed {
        crate::fuzz::short_step(steps);
        run_examples(steps, scratch);
        let dr = environment::target().join("debug/dr");
        let demo = || own(&["demo", "--program", &dr.to_string_lossy()]);
        steps.run("demo", minutes(5), demo());
        steps.call("demo, interrupted", || crate::demo::interrupted::check(demo));
    }
    if nextest {
        steps.run("guards", minutes(15), own(&["guards"]));
    } else {
        steps.skip("guards", "cargo-nextest is not installed");
    }
}

/// This program with another task.
fn own(args: &[&str]) -> Command {
    // Not `current_exe`: the build of the programs may have put another file in its place.
    let mut command = Command::new(format!("/proc/{}/exe", std::process::id()));
    command.args(args).current_dir(environment::root());
    command
}

/// Runs each program of the `examples` package, as somebody whom PostgreSQL accepts.
fn run_examples(steps: &mut Steps, scratch: &Scratch) {
    let user = match User::of_server() {
        Ok(user) => user,
        Err(error) => return steps.not_run("examples", &error),
    };
    let place = scratch.path().join("examples");
    let made = std::fs::create_dir(&place).and_then(|()| chown(&place, Some(user.uid), Some(user.gid)));
    if let Err(error) = made {
        return steps.not_run("examples", &error.to_string());
    }
    for name in example_names() {
        let program = scratch.path().join(&name);
        let copied = std::fs::copy(environment::target().join("debug").join(&name), &program);
        if let Err(error) = copied {
            steps.not_run(&format!("example {name}"), &error.to_string());
            continue;
        }
        let mut command = user.command(&program);
        command.env("TMPDIR", &place).env("DR_TEST_TMP", &place);
        steps.run(&format!("example {name}"), Duration::from_secs(120), command);
    }
}

fn example_names() -> Vec<String> {
    let mut names: Vec<String> = std::fs::read_dir(environment::root().join("examples/src/bin"))
        .into_iter()
        .flatten()
        .flatten()
        .filter_map(|entry| entry.file_name().to_str()?.strip_suffix(".rs").map(str::to_owned))
        .collect();
    names.sort();
    names
}
