//! Embeds the resident agent in a program of one's own, with a task of one's own.
//!
//! The task counts. The program asks the agent over its socket, gives it a new configuration, sees
//! that only the task whose settings changed is started anew, and stops it in order. It needs no
//! server.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use async_trait::async_trait;
use dr_agent::metrics::Family;
use dr_agent::protocol::{Client, Request};
use dr_agent::resident::{Notifier, Plan, Resident};
use dr_agent::supervise::{Policy, Report, Supervised, Task, TaskContext, TaskError};
use dr_examples::{HostClock, Result};

/// How long this program waits for what must happen.
const LIMIT: Duration = Duration::from_secs(30);

/// Counts on, and says how far it is.
struct Counter {
    every: Duration,
}

#[async_trait]
impl Task for Counter {
    fn name(&self) -> &str {
        "counter"
    }

    async fn run(&self, context: TaskContext) -> std::result::Result<(), TaskError> {
        let mut count = 0u32;
        // `pause` answers false when the task is asked to stop: this is its safe point.
        while context.pause(self.every).await {
            count += 1;
            let metric = Family::gauge("counter_count", "How far it has counted.");
            context
                .report(Report { detail: count.into(), metrics: vec![metric.with(&[], f64::from(count))] });
        }
        Ok(())
    }
}

/// Does nothing, for as long as it may.
struct Idler;

#[async_trait]
impl Task for Idler {
    fn name(&self) -> &str {
        "idler"
    }

    async fn run(&self, context: TaskContext) -> std::result::Result<(), TaskError> {
        context.stop_requested().await;
        Ok(())
    }
}

#[tokio::main]
async fn main() -> Result<()> {
    let scratch = dr_testkit::pg::Scratch::new();
    let socket = scratch.path().join("agent.sock");

    // The configuration, as far as it matters here: how often the counter counts. A real program
    // reads a file. An error here refuses the reload, and nothing is changed.
    let every_ms = Arc::new(AtomicU64::new(10));
    let (place, setting) = (socket.clone(), every_ms.clone());
    let load = move || {
        let every = Duration::from_millis(setting.load(Ordering::Relaxed));
        Ok(Plan {
            socket: place.clone(),
            listen: None,
            stop_timeout: Duration::from_secs(10),
            tasks: vec![
                Supervised::new(Arc::new(Counter { every }), Policy::permanent())
                    .made_of(format!("{every:?}")),
                Supervised::new(Arc::new(Idler), Policy::permanent()),
            ],
        })
    };

    // `Notifier::from_environment()` tells systemd; `Signals` obeys SIGTERM and SIGHUP.
    let agent = Resident::start(Arc::new(load), Arc::new(HostClock), Notifier::default()).await?;
    let running = tokio::spawn(agent.run());

    let client = Client::new(&socket);
    let began = Instant::now();
    loop {
        let status = client.ask(&Request::Status).await?;
        if status["tasks"][0]["detail"].as_u64() > Some(2) {
            println!("the counter is at {}, ready: {}", status["tasks"][0]["detail"], status["ready"]);
            break;
        }
        assert!(began.elapsed() < LIMIT, "the counter does not count: {status:#}");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }

    every_ms.store(20, Ordering::Relaxed);
    let changed = client.ask(&Request::Reload).await?;
    println!("reloaded: {changed}");
    assert_eq!(changed["tasks"]["restarted"], serde_json::json!(["counter"]));
    assert_eq!(changed["tasks"]["kept"], serde_json::json!(["idler"]));

    client.ask(&Request::Stop { now: false }).await?;
    let summary = tokio::time::timeout(LIMIT, running).await???;
    println!("stopped in order after {:?} and {} reload", summary.uptime, summary.reloads);
    Ok(())
}
