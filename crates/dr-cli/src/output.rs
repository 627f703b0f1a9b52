//! What a command says: text for people, JSON for programs.

use std::io::Write;
use std::sync::Mutex;

use dr_core::Classified;
use dr_engine::chain;
use serde::Serialize;
use serde_json::json;

use crate::error::CliError;
use crate::paint::{self, Ink};
use crate::progress;

/// The version of the JSON shapes (docs/cli/json.md).
const JSON_VERSION: u32 = 1;

/// The first failure of standard output.
static FAILURE: Mutex<Option<std::io::Error>> = Mutex::new(None);

/// Prints text or JSON to standard output. A reader that went away is not an error; a full disk is
/// kept for [`failure`], so that the command does not end well.
pub(crate) fn print(text: &str) {
    let mut out = std::io::stdout().lock();
    note(out.write_all(text.as_bytes()).and_then(|()| out.flush()));
}

fn note(printed: std::io::Result<()>) {
    if let Err(error) = printed
        && error.kind() != std::io::ErrorKind::BrokenPipe
        && let Ok(mut failure) = FAILURE.lock()
    {
        failure.get_or_insert(error);
    }
}

/// What kept standard output from being written.
pub(crate) fn failure() -> Option<std::io::Error> {
    FAILURE.lock().ok().and_then(|mut failure| failure.take())
}

/// Prints help or the version, which is all that was asked for; answers the exit code.
pub(crate) fn help(asked_for: &clap::Error) -> u8 {
    note(asked_for.print().and_then(|()| std::io::stdout().flush()));
    match failure() {
        None => 0,
        Some(source) => {
            let lost = CliError::Stdout { source };
            error(false, "help", &lost);
            lost.class().exit_code()
        }
    }
}

/// Something that an operator should know, beside the result.
pub(crate) fn warn(text: &str) {
    progress::line(&format!("{} {text}", paint::err(Ink::Warning, "warning:")));
}

/// Ends a command: its result as JSON, or as the text that `people` makes of it.
pub(crate) fn result<T: Serialize>(json: bool, command: &str, result: &T, people: impl FnOnce() -> String) {
    if json {
        let document = json!({ "dr": JSON_VERSION, "command": command, "result": result });
        print(&format!("{document:#}\n"));
    } else {
        print(&people());
    }
}

/// Shows an error: what, why, the way out, the page.
pub(crate) fn error(json: bool, command: &str, error: &CliError) {
    let causes = causes(error);
    if json {
        let document = json!({ "dr": JSON_VERSION, "command": command, "error": {
            "class": error.class(), "code": error.code(), "message": error.to_string(),
            "causes": causes, "hint": error.hint(),
        }});
        print(&format!("{document:#}\n"));
        return;
    }
    let mut text = format!("{} {error}\n", paint::err(Ink::Bad, "error:"));
    for cause in causes {
        text.push_str(&format!("  because: {cause}\n"));
    }
    if let Some(hint) = error.hint().filter(|hint| !hint.is_empty()) {
        text.push_str(&format!("{} {hint}\n", paint::err(Ink::Good, "hint:")));
    }
    let page = format!("({}, see docs/errors/{}.md)", error.class(), error.code());
    text.push_str(&paint::err(Ink::Faint, &page));
    progress::line(&text);
}

/// A wrong command line, for programs.
pub(crate) fn usage_error(error: &clap::Error) {
    let text = error.to_string();
    let (message, hint) = text.trim().split_once("\n\n").unwrap_or((text.trim(), ""));
    let document = json!({ "dr": JSON_VERSION, "command": null, "error": {
        "class": "invalid", "code": "cli-usage", "message": message.trim_start_matches("error: "),
        "causes": [], "hint": hint.trim(),
    }});
    print(&format!("{document:#}\n"));
}

/// The chain below an error. Wrappers that only pass a cause on are left out.
fn causes(error: &CliError) -> Vec<String> {
    let mut causes: Vec<String> = Vec::new();
    let mut next = std::error::Error::source(error);
    while let Some(cause) = next {
        let words = cause.to_string();
        let empty = words == "storage failed" || words == "a key is missing or wrong";
        if !empty && causes.last() != Some(&words) {
            causes.push(words);
        }
        next = cause.source();
    }
    causes
}

/// An error in one line, for `wal` commands whose words end in the server's log.
pub(crate) fn one_line(error: &CliError) -> String {
    let hint = error.hint().map(|hint| format!(" Hint: {hint}")).unwrap_or_default();
    format!("dr: {} [{}]{hint}\n", chain(error), error.code())
}
