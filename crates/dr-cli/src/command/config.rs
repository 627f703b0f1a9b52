//! `dr config`.

use super::Session;
use crate::args::Config;
use crate::error::CliError;
use crate::output;
use crate::table::table;

pub(super) fn run(session: &Session, command: Config) -> Result<u8, CliError> {
    let values = &session.settings.shown();
    match command {
        // Loading has checked every layer already.
        Config::Check => {
            dr_agent::wire::access(&session.settings)?;
            dr_agent::wire::target(&session.settings, false)?;
            let written = values.values().filter(|w| w.origin != "default").count();
            output::result(session.global.json, "config check", values, || {
                format!(
                    "The configuration is valid: {written} settings are written, the others are defaults.\n"
                )
            });
        }
        Config::Show { origin } => {
            let row = |(name, written): (&&str, &dr_agent::config::Written)| {
                let mut row = vec![(*name).to_owned(), written.value.clone()];
                if origin {
                    row.push(written.origin.clone());
                }
                row
            };
            let rows: Vec<Vec<String>> = values.iter().map(row).collect();
            let header: &[&str] =
                if origin { &["setting", "value", "written in"] } else { &["setting", "value"] };
            output::result(session.global.json, "config show", values, || table(header, &[], &rows));
        }
    }
    Ok(0)
}
