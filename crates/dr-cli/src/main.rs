//! `dr`: disaster recovery for PostgreSQL, as commands.

use std::process::ExitCode;

fn main() -> ExitCode {
    dr_cli::run(std::env::args_os())
}
