//! What the libraries have to say while they work, as lines on standard error.
//!
//! Warnings always; with `-v` what is noteworthy, with `-vv` each step. Only our own crates speak:
//! others would write down what they send, secrets included.

use std::collections::BTreeSet;
use std::fmt::{Debug, Write};
use std::sync::Mutex;

use tracing::field::{Field, Visit};
use tracing::{Event, Level, Metadata, Subscriber};
use tracing_subscriber::layer::{Context, Layer, SubscriberExt};

use crate::paint::{self, Ink};
use crate::progress;

/// The most distinct warnings that are remembered, so as not to repeat them.
const REMEMBERED: usize = 1000;

/// Begins to listen. `verbose`: how often `-v` was given. `resident`: for a process whose log is read
/// later: what is noteworthy is told unless `quiet`, and a warning as often as it happens.
pub(crate) fn listen(verbose: u8, quiet: bool, resident: bool) {
    let level = match verbose {
        0 if quiet || !resident => Level::WARN,
        0 | 1 => Level::INFO,
        _ => Level::DEBUG,
    };
    let warned = (!resident).then(Mutex::default);
    let lines = Lines { level, warned };
    // A second run in one process listens already.
    let _ = tracing::subscriber::set_global_default(tracing_subscriber::registry().with(lines));
}

struct Lines {
    level: Level,
    /// Warnings that were told, where each is told once.
    warned: Option<Mutex<BTreeSet<String>>>,
}

impl Lines {
    /// Each database of a cluster would repeat the same warning.
    fn is_news(&self, line: &str) -> bool {
        let Some(Ok(mut warned)) = self.warned.as_ref().map(Mutex::lock) else { return true };
        if warned.len() >= REMEMBERED {
            return !warned.contains(line);
        }
        warned.insert(line.to_owned())
    }
}

impl<S: Subscriber> Layer<S> for Lines {
    fn enabled(&self, metadata: &Metadata<'_>, _: Context<'_, S>) -> bool {
        metadata.target().starts_with("dr_") && *metadata.level() <= self.level
    }

    fn on_event(&self, event: &Event<'_>, _: Context<'_, S>) {
        let mut text = Text::default();
        event.record(&mut text);
        let line = format!("{}{}", text.message, text.fields);
        let level = *event.metadata().level();
        let mark = match level {
            Level::ERROR => paint::err(Ink::Bad, "error:"),
            Level::WARN => paint::err(Ink::Warning, "warning:"),
            Level::INFO => paint::err(Ink::Faint, "info:"),
            _ => paint::err(Ink::Faint, "debug:"),
        };
        if level > Level::WARN || self.is_news(&line) {
            progress::line(&format!("{mark} {line}"));
        }
    }
}

/// An event as one line: its message, then its fields.
#[derive(Default)]
struct Text {
    message: String,
    fields: String,
}

impl Visit for Text {
    fn record_str(&mut self, field: &Field, value: &str) {
        self.record_debug(field, &format_args!("{value}"));
    }

    fn record_debug(&mut self, field: &Field, value: &dyn Debug) {
        let _ = match field.name() {
            "message" => write!(self.message, "{value:?}"),
            name => write!(self.fields, ", {name} {value:?}"),
        };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_our_own_crates_speak_and_only_as_loud_as_asked() {
        let listened = |level, check: fn() -> bool| {
            let lines = Lines { level, warned: Some(Mutex::default()) };
            tracing::subscriber::with_default(tracing_subscriber::registry().with(lines), check)
        };
        assert!(listened(Level::DEBUG, || tracing::enabled!(target: "dr_pg::sql", Level::DEBUG)));
        assert!(!listened(Level::DEBUG, || tracing::enabled!(target: "dr_pg::sql", Level::TRACE)));
        assert!(!listened(Level::WARN, || tracing::enabled!(target: "dr_pg::sql", Level::INFO)));
        assert!(!listened(Level::DEBUG, || tracing::enabled!(target: "object_store::aws", Level::ERROR)));
    }

    #[test]
    fn a_line_is_news_once_except_in_a_resident_process() {
        let lines = Lines { level: Level::WARN, warned: Some(Mutex::default()) };
        assert!(lines.is_news("a") && lines.is_news("b"));
        assert!(!lines.is_news("a"));
        let resident = Lines { level: Level::WARN, warned: None };
        assert!(resident.is_news("a") && resident.is_news("a"));
    }
}
