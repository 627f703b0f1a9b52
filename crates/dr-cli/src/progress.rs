//! Progress: a bar on a terminal, a line now and then elsewhere.

use std::io::{IsTerminal, Write};
use std::sync::Mutex;
use std::time::{Duration, Instant};

use dr_core::event::{Event, Unit};
use dr_core::port::EventSink;
use indicatif::{ProgressBar, ProgressStyle};

/// How often a line is written where there is no terminal.
const LINE_EVERY: Duration = Duration::from_secs(5);

/// Shows a job's events on standard error.
#[derive(Debug)]
pub(crate) struct Progress {
    terminal: bool,
    quiet: bool,
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    bar: Option<ProgressBar>,
    stage: &'static str,
    total: Option<u64>,
    unit: Option<Unit>,
    told: Option<Instant>,
}

impl Progress {
    pub fn new(quiet: bool) -> Self {
        Progress { terminal: std::io::stderr().is_terminal(), quiet, state: Mutex::default() }
    }

    fn begin(&self, state: &mut State, stage: &'static str, total: Option<u64>, unit: Unit) {
        *state = State { stage, total, unit: Some(unit), told: Some(Instant::now()), bar: None };
        if !self.terminal || self.quiet {
            return;
        }
        let shape = match (unit, total) {
            (Unit::Bytes, Some(_)) => {
                "{prefix:>9} [{bar:30}] {percent:>3} %  {binary_bytes} of {binary_total_bytes}  {binary_bytes_per_sec}  {eta} left {msg}"
            }
            (Unit::Bytes, None) => "{prefix:>9} {spinner} {binary_bytes}  {binary_bytes_per_sec} {msg}",
            (_, Some(_)) => "{prefix:>9} [{bar:30}] {pos} of {len} {msg}",
            _ => "{prefix:>9} {spinner} {elapsed} {msg}",
        };
        let bar = total.map_or_else(ProgressBar::new_spinner, ProgressBar::new);
        let style = ProgressStyle::with_template(shape).unwrap_or_else(|_| ProgressStyle::default_bar());
        bar.set_style(style.progress_chars("=> "));
        bar.set_prefix(stage);
        bar.enable_steady_tick(Duration::from_millis(200));
        show(Some(bar.clone()));
        state.bar = Some(bar);
    }

    fn progress(&self, state: &mut State, done: u64, note: Option<String>) {
        if let Some(bar) = &state.bar {
            // An estimate of the size may be low.
            if bar.length().is_some_and(|len| done > len) {
                bar.set_length(done);
            }
            bar.set_position(done);
            bar.set_message(note.unwrap_or_default());
        } else if !self.quiet && state.told.is_none_or(|at| at.elapsed() >= LINE_EVERY) {
            state.told = Some(Instant::now());
            let amount = match (state.unit, state.total) {
                (Some(Unit::Bytes), Some(total)) => {
                    format!("{} of {}", dr_core::size::bytes(done), dr_core::size::bytes(total))
                }
                (Some(Unit::Bytes), None) => dr_core::size::bytes(done),
                (_, Some(total)) => format!("{done} of {total}"),
                _ => format!("{done}"),
            };
            line(&format!("{}: {amount} {}", state.stage, note.unwrap_or_default()));
        }
    }
}

/// The bar on the terminal, which makes room for lines.
static BAR: Mutex<Option<ProgressBar>> = Mutex::new(None);

/// Puts a bar in the place of the one before, which is wiped away.
fn show(bar: Option<ProgressBar>) {
    let before = BAR.lock().ok().and_then(|mut shown| std::mem::replace(&mut *shown, bar));
    if let Some(before) = before {
        before.finish_and_clear();
    }
}

/// A line on standard error, above the bar.
pub(crate) fn line(text: &str) {
    let write = || {
        let _ = writeln!(std::io::stderr().lock(), "{}", text.trim_end());
    };
    match BAR.lock().ok().and_then(|bar| bar.clone()) {
        Some(bar) => bar.suspend(write),
        None => write(),
    }
}

impl Drop for Progress {
    /// A job that failed ended no stage: its bar must not stay over the error.
    fn drop(&mut self) {
        show(None);
    }
}

impl EventSink for Progress {
    fn emit(&self, event: Event) {
        let Ok(mut state) = self.state.lock() else { return };
        match event {
            Event::StageBegan { stage, total, unit } => self.begin(&mut state, stage, total, unit),
            Event::Progress { done, note, .. } => self.progress(&mut state, done, note),
            Event::StageEnded { stage, elapsed_ms } => {
                state.bar = None;
                show(None);
                if !self.quiet {
                    let took = dr_core::size::duration(Duration::from_millis(elapsed_ms));
                    line(&format!("{stage:>9}  {took}"));
                }
            }
            Event::Warning { text } => crate::output::warn(&text),
            Event::Note { text } if !self.quiet => line(&text),
            _ => {}
        }
    }
}
