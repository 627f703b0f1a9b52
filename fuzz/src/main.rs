//! `cargo xtask fuzz`: the runner.

use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::mpsc::{RecvTimeoutError, sync_channel};
use std::time::{Duration, Instant};

use dr_fuzz::memory::Counting;
use dr_fuzz::{Fault, Run, Target, targets, watch_panics};

#[global_allocator]
static ALLOCATOR: Counting = Counting;

const USAGE: &str = "\
usage: dr-fuzz [--seconds N] [--seed N] [--target NAME] [--folder PATH] [--input FILE]

  --seconds  for all targets together (10)
  --seed     the course of chance (1)
  --target   only this one
  --folder   where inputs that show a fault are kept (.)
  --input    read this one input with --target, and nothing else
";

/// A target gets so much time in a turn; turns go round until the time is used.
const TURN: Duration = Duration::from_millis(400);

/// A reader that is still busy after this hangs.
const HANGS: Duration = Duration::from_secs(30);

struct Options {
    time: Duration,
    seed: u64,
    target: Option<String>,
    folder: PathBuf,
    input: Option<PathBuf>,
}

fn options() -> Result<Options, String> {
    let mut options =
        Options { time: Duration::from_secs(10), seed: 1, target: None, folder: ".".into(), input: None };
    let mut arguments = std::env::args().skip(1);
    while let Some(flag) = arguments.next() {
        let value = arguments.next().ok_or_else(|| format!("{flag} needs a value\n\n{USAGE}"))?;
        let number = || value.parse::<u64>().map_err(|_| format!("{flag} {value}: it is no number"));
        match flag.as_str() {
            "--seconds" => options.time = Duration::from_secs(number()?),
            "--seed" => options.seed = number()?,
            "--target" => options.target = Some(value),
            "--folder" => options.folder = value.into(),
            "--input" => options.input = Some(value.into()),
            _ => return Err(format!("{flag} is not known\n\n{USAGE}")),
        }
    }
    Ok(options)
}

fn main() -> ExitCode {
    match options().and_then(|options| fuzz(&options)) {
        Ok(()) => ExitCode::SUCCESS,
        Err(message) => {
            eprintln!("fuzz: {message}");
            ExitCode::FAILURE
        }
    }
}

fn fuzz(options: &Options) -> Result<(), String> {
    let mut all = targets::all();
    if let Some(name) = &options.target {
        let names: Vec<_> = all.iter().map(|target| target.name).collect();
        all.retain(|target| target.name == name);
        if all.is_empty() {
            return Err(format!("there is no target {name:?}; there are {}", names.join(", ")));
        }
    }
    watch_panics();
    let seed = options.seed;
    let mut runs: Vec<Run<'_>> = all.iter().map(|target| Run::new(target, seed, &options.folder)).collect();
    if let Some(input) = &options.input {
        return one(&mut runs, input);
    }
    println!("seed {seed}, {} targets, {} s", all.len(), options.time.as_secs());
    let began = Instant::now();
    for (run, target) in runs.iter_mut().zip(&all) {
        attended(target, seed, &options.folder, || run.seeds())?;
    }
    while began.elapsed() < options.time {
        for (run, target) in runs.iter_mut().zip(&all) {
            let turn = TURN.min(options.time / all.len() as u32);
            attended(target, seed, &options.folder, || run.work(turn))?;
        }
    }
    println!("{:<20} {:>10} {:>10} {:>6}", "target", "inputs", "taken", "ways");
    let mut cases = 0;
    for (run, target) in runs.iter().zip(&all) {
        let report = run.report();
        cases += report.cases;
        println!("{:<20} {:>10} {:>10} {:>6}", target.name, report.cases, report.taken, report.ways);
    }
    println!("fuzz: {} targets, {cases} inputs, no fault, {:.0} s", all.len(), began.elapsed().as_secs_f64());
    Ok(())
}

fn one(runs: &mut [Run<'_>], input: &Path) -> Result<(), String> {
    let [run] = runs else { return Err("--input needs --target".into()) };
    let bytes = std::fs::read(input).map_err(|error| format!("{}: {error}", input.display()))?;
    let answer = run.case(&bytes).map_err(|fault| fault.to_string())?;
    println!("{answer:?}");
    Ok(())
}

/// Works under a second thread's eye: an endless loop ends the process, with the input at hand.
fn attended(
    target: &Target,
    seed: u64,
    folder: &Path,
    work: impl FnOnce() -> Result<(), Fault>,
) -> Result<(), String> {
    let (done, waits) = sync_channel::<()>(1);
    let (name, file) = (target.name, folder.join(format!("{}.input", target.name)));
    let told = move |what: &str| {
        format!(
            "{name} {what}\nseed {seed}; the input is {0}; again:\n  cargo xtask fuzz --target {name} --input {0}",
            file.display()
        )
    };
    let eye = std::thread::spawn({
        let told = told.clone();
        move || {
            if waits.recv_timeout(HANGS) == Err(RecvTimeoutError::Timeout) {
                eprintln!("fuzz: {}", told("does not end"));
                std::process::exit(1);
            }
        }
    });
    let outcome = work();
    drop(done);
    let _ = eye.join();
    outcome.map_err(|fault| told(&fault.to_string()))
}
