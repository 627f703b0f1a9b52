//! Completions, manual pages and the generated reference.

use std::fmt::Write as _;
use std::path::Path;

use clap::{Command, CommandFactory};

use crate::args::Cli;
use crate::error::CliError;
use crate::output;

pub(super) fn completions(shell: clap_complete::Shell) -> Result<u8, CliError> {
    let mut text = Vec::new();
    clap_complete::generate(shell, &mut Cli::command(), "dr", &mut text);
    output::print(&String::from_utf8_lossy(&text));
    Ok(0)
}

pub(super) fn man(dir: &Path) -> Result<u8, CliError> {
    let failed = |source| CliError::Output { path: dir.display().to_string(), source };
    std::fs::create_dir_all(dir).map_err(failed)?;
    clap_mangen::generate_to(Cli::command(), dir).map_err(failed)?;
    output::print(&format!("Manual pages are in {}.\n", dir.display()));
    Ok(0)
}

pub(super) fn print_reference(what: &str) -> Result<u8, CliError> {
    output::print(&reference(what)?);
    Ok(0)
}

/// The generated reference of the commands (`cli`) or of the settings (`config`), in Markdown.
pub fn reference(what: &str) -> Result<String, CliError> {
    match what {
        "cli" => Ok(cli()),
        "config" => Ok(dr_agent::config::reference()),
        _ => Err(CliError::usage(format!("there is no reference of {what:?}"), "Write cli or config.")),
    }
}

fn cli() -> String {
    let mut text = String::from(
        "# Commands\n\nGenerated from the command line's own help; change it there and run `cargo xtask gen`.\n",
    );
    let mut root = Cli::command().term_width(98).disable_help_subcommand(true);
    root.build();
    section(&mut text, &mut root, "");
    text
}

fn section(text: &mut String, command: &mut Command, parent: &str) {
    let name = if parent.is_empty() {
        command.get_name().to_owned()
    } else {
        format!("{parent} {}", command.get_name())
    };
    let help = command.render_long_help().to_string();
    let help: Vec<&str> = help.lines().map(str::trim_end).collect();
    let _ = write!(text, "\n## {name}\n\n```text\n{}\n```\n", help.join("\n").trim());
    for sub in command.get_subcommands_mut().filter(|sub| !sub.is_hide_set()) {
        section(text, sub, &name);
    }
}
