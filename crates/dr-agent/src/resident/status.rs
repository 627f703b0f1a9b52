//! How the agent is: for `dr agent status`, for readiness and for metrics.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use dr_core::Timestamp;
use serde::Serialize;
use serde_json::{Value, json};

use crate::metrics::Family;
use crate::protocol;
use crate::supervise::{Handle, Phase, TaskError, TaskView, View};

/// The configuration in force, and what became of newer ones.
#[derive(Clone, Debug)]
pub(super) struct Configuration {
    pub loaded: Timestamp,
    pub applied: u64,
    pub refused: u64,
    /// Why the newest one was refused.
    pub last_error: Option<TaskError>,
    pub socket: PathBuf,
    pub listen: Option<SocketAddr>,
    pub stop_timeout: Duration,
}

/// A reason why the agent is not ready.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct NotReady {
    /// What is not: `agent`, `configuration` or `task NAME`.
    pub what: String,
    /// Why.
    pub why: String,
}

/// All reasons why the agent is not ready.
pub(super) fn not_ready(view: &View, configuration: &Configuration) -> Vec<NotReady> {
    let because = |what: &str, why: String| NotReady { what: what.to_owned(), why };
    let mut reasons = Vec::new();
    if view.phase != Phase::Running {
        reasons.push(because("agent", "it is stopping".into()));
    }
    if let Some(error) = &configuration.last_error {
        reasons.push(because("configuration", format!("the last reload was refused: {error}")));
    }
    for task in &view.tasks {
        if let Some(why) = &task.unready {
            reasons.push(because(&format!("task {}", task.name), why.clone()));
        }
    }
    reasons
}

fn seconds(time: Duration) -> f64 {
    (time.as_secs_f64() * 1000.0).round() / 1000.0
}

/// The answer to `status`.
pub(super) fn status(handle: &Handle, configuration: &Configuration, started: Timestamp) -> Value {
    let (view, now, reports) = (handle.view(), handle.uptime(), handle.reports());
    let not_ready = not_ready(&view, configuration);
    let of_task = |task: &TaskView| {
        json!({
            "name": task.name, "state": task.state, "state_seconds": seconds(now.saturating_sub(task.since)),
            "next_start_seconds": task.next_start.map(|at| seconds(at.saturating_sub(now))),
            "required": task.required, "failures": task.failures, "restarts": task.restarts,
            "last_error": task.last_error, "detail": reports.get(&task.name).map(|report| &report.detail),
        })
    };
    json!({
        "version": crate::VERSION, "pid": std::process::id(), "host": crate::wire::host_name(),
        "started": started, "uptime_seconds": seconds(now), "phase": view.phase,
        "ready": not_ready.is_empty(), "not_ready": not_ready,
        "configuration": {
            "loaded": configuration.loaded, "reloads": configuration.applied,
            "refused": configuration.refused, "last_error": configuration.last_error,
        },
        "socket": configuration.socket, "listen": configuration.listen,
        "stop_timeout_seconds": seconds(configuration.stop_timeout),
        "protocol": protocol::speaks(),
        "tasks": view.tasks.iter().map(of_task).collect::<Vec<_>>(),
    })
}

/// What systemd shows beside the service.
pub(super) fn line(view: &View, not_ready: &[NotReady]) -> String {
    if view.phase != Phase::Running {
        let left: Vec<&str> = view.tasks.iter().filter(|t| t.is_up()).map(|t| t.name.as_str()).collect();
        return format!(
            "stopping; waits for: {}",
            if left.is_empty() { "nothing".into() } else { left.join(", ") }
        );
    }
    match not_ready.first() {
        None => format!("ready; {} task(s) run", view.tasks.iter().filter(|task| task.is_up()).count()),
        Some(first) => format!("not ready: {}: {}", first.what, first.why),
    }
}

/// The answer to `/metrics`.
pub(super) fn metrics(handle: &Handle, configuration: &Configuration, started: Timestamp) -> Vec<Family> {
    let view = handle.view();
    let number = |holds: bool| f64::from(u8::from(holds));
    let ready = number(not_ready(&view, configuration).is_empty());
    let mut up = Family::gauge("dr_agent_task_up", "Whether a task runs.");
    let mut restarts = Family::counter(
        "dr_agent_task_restarts_total",
        "How often a task was started again after a failure.",
    );
    for task in &view.tasks {
        up = up.with(&[("task", &task.name)], number(task.is_up()));
        restarts = restarts.with(&[("task", &task.name)], task.restarts as f64);
    }
    let seconds_of = |at: Timestamp| at.as_millisecond() as f64 / 1000.0;
    let mut families = vec![
        Family::gauge("dr_build_info", "The version that runs; always 1.")
            .with(&[("version", crate::VERSION)], 1.0),
        Family::gauge("dr_agent_start_time_seconds", "When the agent started, in seconds since 1970.")
            .with(&[], seconds_of(started)),
        Family::gauge("dr_agent_ready", "Whether all required tasks run and the configuration is good.")
            .with(&[], ready),
        Family::counter("dr_agent_config_reloads_total", "Reloads, by what became of them.")
            .with(&[("result", "applied")], configuration.applied as f64)
            .with(&[("result", "refused")], configuration.refused as f64),
        Family::gauge("dr_agent_config_loaded_time_seconds", "When the configuration in force was read.")
            .with(&[], seconds_of(configuration.loaded)),
        up,
        restarts,
    ];
    families.extend(handle.reports().into_values().flat_map(|report| report.metrics));
    families
}
