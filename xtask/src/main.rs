//! The workspace's own tasks: `cargo xtask <task>`.
//!
//! Everything that a person or CI runs goes through here, so that both run the same thing. Each
//! child process has a deadline, no standard input, and a log file in place of our standard
//! output: a forgotten server can then never keep CI waiting on an open pipe.

mod bench;
mod child;
mod demo;
mod environment;
mod fuzz;
mod generate;
mod guards;
mod janitor;
mod postgres;
mod s3;
mod scale;
mod soak;
mod source;
mod steps;
mod test;
mod tidy;
mod units;

use std::process::ExitCode;

const USAGE: &str = "\
usage: cargo xtask <task>

  test [--quick] [--no-s3]   run the checks and tests, installing what they need
  tidy                       check the rules that compilers do not check
  guards [--only NAME]       switch off each safety guard and demand a red test
  fuzz [--budget 60s]        every reader against bytes that nobody wrote (fuzz/README.md)
  soak --budget 2h           repeat the randomised and the long tests until the budget is used
  gen                        write the documents that are made from code
  demo [--debug]             a disposable cluster, a mistake, and the way back
  pg MAJOR [DIRECTORY]       the programs of another version of PostgreSQL, for tests by hand
  scale [--part DIVISOR]     memory while parts of 10 TB and 6 million files are backed up
  bench-peers [--rounds 5]   dr beside pgBackRest, as ratios (benches/README.md)
  bench-stream [--rounds 5]  a streamed backup beside what bounds it (benches/README.md)
";

fn main() -> ExitCode {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let rest = args.get(1..).unwrap_or_default();
    let outcome = match args.first().map(String::as_str) {
        Some("test") => test::main(rest),
        Some("demo") => demo::main(rest),
        Some("guards") => guards::main(rest),
        Some("fuzz") => fuzz::main(rest),
        Some("soak") => soak::main(rest),
        Some("scale") => scale::main(rest),
        Some("bench-peers") => bench::main(rest),
        Some("bench-stream") => bench::stream(rest),
        Some("pg") => postgres::main(rest),
        Some("gen") => generate::main(),
        Some("tidy") => tidy::main(),
        Some("help" | "--help" | "-h") => {
            print!("{USAGE}");
            Ok(())
        }
        _ => Err(format!("which task?\n\n{USAGE}")),
    };
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(message) => {
            eprintln!("xtask: {message}");
            ExitCode::FAILURE
        }
    }
}
