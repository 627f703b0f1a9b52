//! The command line of `dr`: it asks, shows and exits; the libraries do the work.
#![forbid(unsafe_code)]

mod args;
mod command;
mod error;
mod log;
mod output;
mod paint;
mod progress;
mod table;

pub use args::Cli;
pub use command::reference;
pub use error::{CODES, CliError};

use std::ffi::OsString;
use std::process::ExitCode;

use clap::{CommandFactory, FromArgMatches};

/// Exit of `dr wal fetch` for everything but delivery and proven absence: PostgreSQL takes it as a
/// failure of the command and stops, instead of believing that WAL has ended.
pub(crate) const FETCH_FAILED: u8 = 200;

/// Parses the command line and runs it.
pub fn run(arguments: impl IntoIterator<Item = OsString>) -> ExitCode {
    let arguments: Vec<OsString> = arguments.into_iter().collect();
    let fetching = arguments.iter().skip(1).any(|a| a == "wal") && arguments.iter().any(|a| a == "fetch");
    let parser = Cli::command().color(paint::of_parser(&arguments));
    let matches = parser.try_get_matches_from(&arguments);
    let cli = match matches.and_then(|matches| Cli::from_arg_matches(&matches)) {
        Ok(cli) => cli,
        Err(error) if error.use_stderr() => {
            if arguments.iter().any(|a| a == "--json") {
                output::usage_error(&error);
            } else {
                let _ = error.print();
            }
            return ExitCode::from(if fetching { FETCH_FAILED } else { error.exit_code() as u8 });
        }
        Err(asked_for) => return ExitCode::from(output::help(&asked_for)),
    };
    if fetching {
        // Not even a panic may look like the end of WAL.
        let outcome = std::panic::catch_unwind(|| command::run(cli));
        return ExitCode::from(outcome.unwrap_or(FETCH_FAILED));
    }
    ExitCode::from(command::run(cli))
}
