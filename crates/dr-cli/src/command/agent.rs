//! `dr agent`: the resident agent, and how to ask it.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use dr_agent::config::Sources;
use dr_agent::protocol::{Client, Request};
use dr_agent::resident::{Notifier, Resident, ResidentError, Signals, Summary};
use dr_agent::{AgentError, Settings, wire};
use serde_json::{Value, json};

use super::sources;
use crate::args::{Agent, Ask, Global};
use crate::error::CliError;
use crate::output;
use crate::paint::{self, Ink};
use crate::table::{facts, table};

/// How long threads that still wait for something may take at the end of the agent.
const LEAVE_TIME: Duration = Duration::from_secs(1);
/// How often to look whether the agent has stopped.
const STOP_POLL: Duration = Duration::from_millis(100);
/// How much longer than the agent's own limit to wait for its end.
const STOP_GRACE: Duration = Duration::from_secs(10);

pub(super) fn run(global: &Global, command: Agent) -> Result<u8, CliError> {
    let mut builder = match command {
        Agent::Run => tokio::runtime::Builder::new_multi_thread(),
        _ => tokio::runtime::Builder::new_current_thread(),
    };
    let failed = |source| CliError::Output { path: "the runtime".into(), source };
    let runtime = builder.enable_all().build().map_err(failed)?;
    let ended = runtime.block_on(async {
        match command {
            Agent::Run => resident(global).await,
            Agent::Status(ask) => status(global, &client(global, &ask)?).await,
            Agent::Reload(ask) => reload(global, &client(global, &ask)?).await,
            Agent::Stop { ask, now, timeout } => {
                stop(global, &client(global, &ask)?, now, timeout.as_deref()).await
            }
        }
    });
    runtime.shutdown_timeout(LEAVE_TIME);
    ended
}

async fn resident(global: &Global) -> Result<u8, CliError> {
    let mut signals = Signals::listen()?;
    let load = wire::resident(sources(global)?);
    let started = Resident::start(load, Arc::new(wire::HostClock), Notifier::from_environment());
    let summary = tokio::select! {
        started = started => {
            let resident = started?;
            let control = resident.control();
            tokio::select! {
                summary = resident.run() => summary?,
                error = signals.obey(control) => return Err(error.into()),
            }
        }
        () = signals.stop_asked() => Summary::default(),
    };
    let result = json!({ "uptime_seconds": summary.uptime.as_secs(), "reloads": summary.reloads });
    output::result(global.json, "agent run", &result, || "The agent has stopped.\n".to_owned());
    Ok(0)
}

/// Who is asked. Where the configuration cannot be read, as when it is about to be refused, the
/// flags, the variables and the default say which socket.
fn client(global: &Global, ask: &Ask) -> Result<Client, CliError> {
    if let Some(socket) = &ask.socket {
        return Ok(Client::new(socket));
    }
    let sources = sources(global)?;
    let settings = Settings::load(&sources).or_else(|error| {
        let without = Sources { file: Some(PathBuf::from("/dev/null")), ..sources };
        let settings = Settings::load(&without)?;
        let socket = settings.text("agent.socket").unwrap_or_default();
        output::warn(&format!("{error}; asking the agent on {socket}, as --socket was not given"));
        Ok::<_, AgentError>(settings)
    })?;
    Ok(Client::new(settings.needed("agent.socket", "this command")?))
}

async fn reload(global: &Global, client: &Client) -> Result<u8, CliError> {
    let answer = client.ask(&Request::Reload).await?;
    output::result(global.json, "agent reload", &answer, || {
        let names = |kind: &str| {
            let names = answer["tasks"][kind].as_array().into_iter().flatten().filter_map(Value::as_str);
            names.collect::<Vec<_>>().join(", ")
        };
        let mut text = "The configuration was reloaded.\n".to_owned();
        for kind in ["started", "restarted", "stopped", "kept"] {
            let names = names(kind);
            if !names.is_empty() {
                text.push_str(&format!("  {kind}: {names}\n"));
            }
        }
        text
    });
    Ok(0)
}

async fn stop(global: &Global, client: &Client, now: bool, timeout: Option<&str>) -> Result<u8, CliError> {
    let timeout = timeout
        .map(dr_core::size::parse_duration)
        .transpose()
        .map_err(|error| CliError::usage(format!("--timeout: {error}"), "Write it as 30s or 5min."))?;
    let began = Instant::now();
    let answer = client.ask(&Request::Stop { now }).await?;
    let own = Duration::try_from_secs_f64(answer["stop_timeout_seconds"].as_f64().unwrap_or_default());
    let limit = timeout.unwrap_or(own.unwrap_or_default() + STOP_GRACE);
    while still_runs(client, &answer["pid"]).await {
        if began.elapsed() >= limit {
            let socket = client.socket().display().to_string();
            return Err(ResidentError::StillRuns { socket, limit }.into());
        }
        tokio::time::sleep(STOP_POLL).await;
    }
    let took = began.elapsed().as_secs_f64();
    let result =
        json!({ "pid": answer["pid"], "now": now, "took_seconds": (took * 1000.0).round() / 1000.0 });
    output::result(global.json, "agent stop", &result, || {
        format!("The agent has stopped, after {took:.1} s.\n")
    });
    Ok(0)
}

/// Whether that process still answers; another one is the next agent.
async fn still_runs(client: &Client, pid: &Value) -> bool {
    match client.ask(&Request::Status).await {
        Ok(status) => status["pid"] == *pid,
        Err(ResidentError::NoAgent { .. }) => false,
        // It goes away in the middle of an answer, or is too busy to give one.
        Err(_) => true,
    }
}

async fn status(global: &Global, client: &Client) -> Result<u8, CliError> {
    let status = client.ask(&Request::Status).await?;
    output::result(global.json, "agent status", &status, || shown(&status));
    Ok(0)
}

/// A field as text. The agent may be of another version: what it does not tell is shown as unknown.
fn text(value: &Value) -> String {
    match value {
        Value::Null => "?".to_owned(),
        Value::String(text) => text.clone(),
        other => other.to_string(),
    }
}

fn span(value: &Value) -> String {
    let Some(seconds) = value.as_f64() else { return "?".to_owned() };
    let whole = seconds.max(0.0) as u64;
    match whole {
        0..=119 => format!("{seconds:.0} s"),
        120..=7199 => format!("{} min", whole / 60),
        7200..=172_799 => format!("{} h", whole / 3600),
        _ => format!("{} days", whole / 86_400),
    }
}

fn shown(status: &Value) -> String {
    let ready = match status["ready"].as_bool() {
        Some(true) => paint::out(Ink::Good, "ready"),
        _ => paint::out(Ink::Bad, "NOT READY"),
    };
    let mut out = format!(
        "{ready}  dr {}, process {} on {}, {} for {}\n",
        text(&status["version"]),
        text(&status["pid"]),
        text(&status["host"]),
        text(&status["phase"]),
        span(&status["uptime_seconds"]),
    );
    for reason in status["not_ready"].as_array().into_iter().flatten() {
        out.push_str(&format!(
            "  {}: {}\n",
            paint::out(Ink::Bad, &text(&reason["what"])),
            text(&reason["why"])
        ));
    }
    let configuration = &status["configuration"];
    let listen = if status["listen"].is_null() { "off".to_owned() } else { text(&status["listen"]) };
    out.push_str(&facts(&[
        ("socket", text(&status["socket"])),
        ("HTTP", listen),
        (
            "configuration",
            format!(
                "read {}, reloaded {} times, refused {} times",
                text(&configuration["loaded"]),
                text(&configuration["reloads"]),
                text(&configuration["refused"]),
            ),
        ),
    ]));
    let tasks: Vec<&Value> = status["tasks"].as_array().into_iter().flatten().collect();
    let rows: Vec<Vec<String>> = tasks.iter().map(|task| row(task)).collect();
    out.push('\n');
    out.push_str(&table(&["task", "state", "for", "restarts", "says"], &[2, 3], &rows));
    for task in tasks {
        let name = text(&task["name"]);
        if task["last_error"].is_object() {
            out.push_str(&format!("{name} failed last: {}\n", text(&task["last_error"]["message"])));
        }
        for finding in task["detail"]["findings"].as_array().into_iter().flatten() {
            if finding["verdict"] != "good" {
                let (verdict, fix) = (text(&finding["verdict"]), text(&finding["fix"]));
                out.push_str(&format!(
                    "{name}: {verdict}: {} {}\n",
                    text(&finding["check"]),
                    text(&finding["detail"])
                ));
                if !fix.is_empty() {
                    out.push_str(&format!("  -> {fix}\n"));
                }
            }
        }
    }
    out
}

fn row(task: &Value) -> Vec<String> {
    let state = text(&task["state"]);
    let state = match state.as_str() {
        "running" => paint::out(Ink::Good, &state),
        "failed" => paint::out(Ink::Bad, &state),
        _ => paint::out(Ink::Warning, &state),
    };
    let says = match (task["detail"]["verdict"].as_str(), task["detail"]["ended"].as_str()) {
        (Some(verdict), Some(ended)) => format!("{verdict}, at {ended}"),
        _ if task["next_start_seconds"].is_number() => {
            format!("starts again in {}", span(&task["next_start_seconds"]))
        }
        _ => String::new(),
    };
    vec![text(&task["name"]), state, span(&task["state_seconds"]), text(&task["restarts"]), says]
}
