//! `dr key`: who can open the repository.

use dr_agent::AgentError;
use dr_agent::wire;
use dr_engine::EngineError;
use serde_json::json;

use super::Session;
use crate::args::Key;
use crate::error::CliError;
use crate::output;

pub(super) async fn run(session: &Session, command: Key) -> Result<u8, CliError> {
    let repo = session.repository().await?;
    match command {
        Key::Add { age_recipient, new_file } => {
            if !repo.can_read_data() {
                let absent = dr_core::port::KeyError::Absent {
                    operation: "adding a key",
                    needed: "the repository's key",
                };
                return Err(EngineError::key("cannot add a key")(absent).into());
            }
            let provider = wire::new_key(age_recipient.as_deref(), new_file.as_deref())?;
            let slot =
                repo.add_key(provider.as_ref()).await.map_err(EngineError::repo("cannot add the key"))?;
            let document = json!({ "slot": slot, "key": provider.id() });
            output::result(session.global.json, "key add", &document, || {
                format!("The key {} opens the repository now (slot {slot}).\n", provider.id())
            });
        }
        Key::Host { file } => {
            let host = repo.host_key().map_err(EngineError::repo("cannot make a host key"))?;
            host.write(&file).map_err(|source| AgentError::Key { source })?;
            let document = json!({ "file": file });
            output::result(session.global.json, "key host", &document, || {
                format!(
                    "{} lets a host back up, push WAL, list and show; it reads no content.\n",
                    file.display()
                )
            });
        }
    }
    Ok(0)
}
