//! The resident agent: tasks under supervision, and the ways to ask it.
//!
//! A program gives it a [`Load`], which reads its configuration in full and answers a [`Plan`]. The
//! agent runs the plan's tasks, answers on a socket and over HTTP, and tells systemd.
//!
//! *Reload*: load the new plan → take its socket and address → give its tasks to the supervisor →
//! let go of the old socket and address. Until the third step nothing has changed, so that whatever
//! fails before leaves the agent as it was; after it nothing fails.
//!
//! *Stop*: ask the tasks to stop → when all are gone, or cut off, close HTTP and the socket. The
//! socket answers until the end, so that one can see what is waited for.

mod error;
mod http;
mod signals;
mod socket;
mod status;
mod systemd;

use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use dr_core::Timestamp;
use dr_core::port::Clock;
use serde_json::{Value, json};
use tokio::sync::watch;
use tokio::task::JoinHandle;

pub use error::ResidentError;
pub use http::{HEALTH_TIME, HTTP_CONNECTIONS, HTTP_HEAD_LIMIT, HTTP_HEAD_TIME, HTTP_TIME};
pub use signals::Signals;
pub use status::NotReady;
pub use systemd::Notifier;

use crate::error::AgentError;
use crate::metrics::Family;
use crate::protocol::{RELOAD_TIME, Request};
use crate::supervise::{Changes, Ended, Handle, Phase, Supervised, Supervisor, TaskError};
use status::Configuration;

/// How long to wait after a connection could not be taken: files may be free again then.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);
/// How long what is served may take to end.
const CLOSE_TIME: Duration = Duration::from_secs(2);
/// How much longer than its tasks the agent itself may take to stop.
const STOP_MARGIN: Duration = Duration::from_secs(15);

/// What an agent is to do, made of a configuration.
#[derive(Debug)]
pub struct Plan {
    /// Where it is asked.
    pub socket: PathBuf,
    /// Where it answers HTTP.
    pub listen: Option<SocketAddr>,
    /// How long tasks may take to their safe point.
    pub stop_timeout: Duration,
    /// The tasks.
    pub tasks: Vec<Supervised>,
}

/// Reads the configuration and checks it in full. It may block.
pub type Load = Arc<dyn Fn() -> Result<Plan, AgentError> + Send + Sync>;

/// Something that is served, until it is stopped.
struct Served {
    stop: watch::Sender<bool>,
    task: JoinHandle<()>,
}

/// Returns when what is served shall end.
#[derive(Clone)]
struct Stopped(watch::Receiver<bool>);

impl Stopped {
    async fn asked(&self) {
        let mut stop = self.0.clone();
        // Whoever could ask is gone: the end too.
        let _ = stop.wait_for(|stop| *stop).await;
    }
}

impl Served {
    fn begin<F: Future<Output = ()> + Send + 'static>(serve: impl FnOnce(Stopped) -> F) -> Self {
        let (stop, stopped) = watch::channel(false);
        Served { stop, task: tokio::spawn(serve(Stopped(stopped))) }
    }

    fn stop(&self) {
        self.stop.send_replace(true);
    }
}

/// What is open: changed only by a reload and at the end.
struct Open {
    place: socket::Place,
    socket: Served,
    http: Option<Http>,
}

/// What answers HTTP.
struct Http {
    /// As configured; the port of the other one may have been chosen by the system.
    asked: SocketAddr,
    address: SocketAddr,
    served: Served,
}

impl Http {
    fn serve(asked: SocketAddr, listening: (SocketAddr, tokio::net::TcpListener), control: Control) -> Self {
        let (address, listener) = listening;
        Http { asked, address, served: http::serve(listener, control) }
    }
}

struct Shared {
    load: Load,
    handle: Handle,
    clock: Arc<dyn Clock>,
    started: Timestamp,
    notifier: Notifier,
    configuration: Mutex<Configuration>,
    /// Held by a reload from its beginning to its end.
    open: tokio::sync::Mutex<Option<Open>>,
}

/// Asks a running agent from within its process; may be cloned.
#[derive(Clone)]
pub struct Control(Arc<Shared>);

impl std::fmt::Debug for Control {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Control").field("configuration", &self.configuration()).finish_non_exhaustive()
    }
}

/// An agent that runs.
#[derive(Debug)]
pub struct Resident {
    control: Control,
    supervisor: JoinHandle<Ended>,
}

/// How an agent ended.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Summary {
    /// How long it ran.
    pub uptime: Duration,
    /// How often its configuration was changed.
    pub reloads: u64,
}

impl Resident {
    /// Starts an agent; when this returns, it can be asked and its tasks run.
    pub async fn start(load: Load, clock: Arc<dyn Clock>, notifier: Notifier) -> Result<Self, AgentError> {
        let plan = read(&load).await?;
        let (place, listener) = socket::Place::take(&plan.socket)?;
        let http = match plan.listen {
            Some(asked) => Some((asked, http::listen(asked).await?)),
            None => None,
        };
        let (supervisor, handle) = Supervisor::new(plan.stop_timeout);
        let started = clock.now();
        let configuration = Configuration {
            loaded: started,
            applied: 0,
            refused: 0,
            last_error: None,
            socket: plan.socket.clone(),
            listen: http.as_ref().map(|(_, (address, _))| *address),
            stop_timeout: plan.stop_timeout,
        };
        let (configuration, open) = (Mutex::new(configuration), tokio::sync::Mutex::new(None));
        let shared = Shared { load, handle, clock, started, notifier, configuration, open };
        let control = Control(Arc::new(shared));
        let supervisor = tokio::spawn(supervisor.run());
        control.0.handle.apply(plan.tasks).await.map_err(ResidentError::from)?;
        let socket = socket::serve(listener, control.clone());
        let http = http.map(|(asked, listening)| Http::serve(asked, listening, control.clone()));
        *control.0.open.lock().await = Some(Open { place, socket, http });
        let listen = control.configuration().listen.map_or("off".to_owned(), |address| address.to_string());
        tracing::info!("the agent runs: socket {}, HTTP {listen}", plan.socket.display());
        control.0.notifier.ready();
        Ok(Resident { control, supervisor })
    }

    /// Asks it.
    pub fn control(&self) -> Control {
        self.control.clone()
    }

    /// Returns when the agent was asked to stop and has stopped.
    pub async fn run(self) -> Result<Summary, AgentError> {
        let telling = tokio::spawn(tell(self.control.clone()));
        let watching = tokio::spawn(watch_over(self.control.clone()));
        let ended = self.supervisor.await;
        telling.abort();
        watching.abort();
        // A reload that hangs must not hold up the end; what it holds goes with the process.
        if let Ok(mut open) = tokio::time::timeout(CLOSE_TIME, self.control.0.open.lock()).await
            && let Some(open) = open.take()
        {
            open.close().await;
        }
        let ended = ended.map_err(|error| ResidentError::Bug { what: format!("the supervisor: {error}") })?;
        if !ended.cut.is_empty() {
            return Err(ResidentError::Cut { tasks: ended.cut }.into());
        }
        let uptime = self.control.0.handle.uptime();
        Ok(Summary { uptime, reloads: self.control.configuration().applied })
    }
}

impl Open {
    async fn close(self) {
        let (http, socket) = (self.http.map(|http| http.served), self.socket);
        for served in [http, Some(socket)].into_iter().flatten() {
            served.stop();
            let abort = served.task.abort_handle();
            if tokio::time::timeout(CLOSE_TIME, served.task).await.is_err() {
                abort.abort();
            }
        }
        drop(self.place);
    }
}

/// Reads the configuration, with an end, on a thread that may wait.
async fn read(load: &Load) -> Result<Plan, AgentError> {
    let load = load.clone();
    let reading = tokio::task::spawn_blocking(move || load());
    match tokio::time::timeout(RELOAD_TIME, reading).await {
        Ok(Ok(plan)) => plan,
        Ok(Err(error)) => {
            Err(ResidentError::Bug { what: format!("reading the configuration: {error}") }.into())
        }
        Err(_) => Err(ResidentError::LoadLate { limit: RELOAD_TIME }.into()),
    }
}

impl Control {
    fn configuration(&self) -> Configuration {
        self.0.configuration.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn note(&self, change: impl FnOnce(&mut Configuration)) {
        change(&mut self.0.configuration.lock().unwrap_or_else(PoisonError::into_inner));
    }

    /// How it is.
    pub fn status(&self) -> Value {
        status::status(&self.0.handle, &self.configuration(), self.0.started)
    }

    /// Why it is not ready.
    pub fn not_ready(&self) -> Vec<NotReady> {
        status::not_ready(&self.0.handle.view(), &self.configuration())
    }

    /// What `/metrics` says.
    pub fn metrics(&self) -> Vec<Family> {
        status::metrics(&self.0.handle, &self.configuration(), self.0.started)
    }

    /// Tells systemd in a line how it is.
    fn tell(&self) {
        self.0.notifier.status(&status::line(&self.0.handle.view(), &self.not_ready()));
    }

    /// Whether the supervisor's loop answers within a time.
    pub async fn is_alive(&self, within: Duration) -> bool {
        self.0.handle.is_alive(within).await
    }

    /// Asks the tasks to stop at their safe point, or cuts them off `now`.
    pub async fn stop(&self, now: bool) -> Result<(), ResidentError> {
        if self.0.handle.view().phase == Phase::Running {
            tracing::info!("the agent stops");
            self.0.notifier.stopping(self.configuration().stop_timeout + STOP_MARGIN);
        }
        if now {
            self.0.handle.cut().await?
        } else {
            self.0.handle.drain().await?
        };
        Ok(())
    }

    /// Reads the configuration and puts it in force; a bad one is refused, and changes nothing.
    pub async fn reload(&self) -> Result<Changes, ResidentError> {
        let mut open = self.0.open.lock().await;
        if self.0.handle.view().phase != Phase::Running {
            return Err(ResidentError::Stopping);
        }
        self.0.notifier.reloading();
        let changed = self.change(&mut open).await;
        self.0.notifier.ready();
        match changed {
            Ok((changes, socket, listen, stop_timeout)) => {
                tracing::info!("the configuration was reloaded: {}", json!(changes));
                let loaded = self.0.clock.now();
                self.note(|c| {
                    (c.loaded, c.last_error, c.applied) = (loaded, None, c.applied + 1);
                    (c.socket, c.listen, c.stop_timeout) = (socket, listen, stop_timeout);
                });
                self.tell();
                Ok(changes)
            }
            Err(error) => {
                let told = TaskError::of(&error);
                tracing::warn!("the new configuration is refused, the old one stays: {told} [{}]", told.code);
                self.note(|c| (c.refused, c.last_error) = (c.refused + 1, Some(told.clone())));
                self.tell();
                let TaskError { class, code, message, hint } = told;
                Err(ResidentError::Refused { class, code, message, hint })
            }
        }
    }

    async fn change(
        &self,
        open: &mut Option<Open>,
    ) -> Result<(Changes, PathBuf, Option<SocketAddr>, Duration), AgentError> {
        let plan = read(&self.0.load).await?;
        let Some(open) = open else { return Err(ResidentError::Stopping.into()) };
        let place = match plan.socket == open.place.path() {
            true => None,
            false => Some(socket::Place::take(&plan.socket)?),
        };
        let old = open.http.as_ref().map(|http| http.asked);
        let http = match plan.listen {
            Some(asked) if Some(asked) != old => Some((asked, http::listen(asked).await?)),
            _ => None,
        };
        let applied = self.0.handle.apply_with(plan.tasks, plan.stop_timeout).await;
        let changes = applied.map_err(ResidentError::from)?;
        if let Some((place, listener)) = place {
            let socket = socket::serve(listener, self.clone());
            std::mem::replace(&mut open.socket, socket).stop();
            open.place = place;
        }
        let gone = match http {
            Some((asked, listening)) => open.http.replace(Http::serve(asked, listening, self.clone())),
            None if plan.listen.is_none() => open.http.take(),
            None => None,
        };
        if let Some(http) = gone {
            http.served.stop();
        }
        let listen = open.http.as_ref().map(|http| http.address);
        Ok((changes, plan.socket, listen, plan.stop_timeout))
    }

    /// Answers a request of the protocol.
    pub(crate) async fn answer(&self, request: Request) -> Result<Value, ResidentError> {
        match request {
            Request::Status => Ok(self.status()),
            Request::Reload => self.reload().await.map(|changes| json!({ "tasks": changes })),
            Request::Stop { now } => {
                self.stop(now).await?;
                let limit = self.configuration().stop_timeout.as_secs_f64();
                Ok(json!({ "pid": std::process::id(), "now": now, "stop_timeout_seconds": limit }))
            }
        }
    }
}

/// Tells systemd how the agent is, whenever its tasks change.
async fn tell(control: Control) {
    let mut handle = control.0.handle.clone();
    control.tell();
    while handle.changed().await {
        control.tell();
    }
}

/// Tells systemd that the agent lives, as long as its supervisor's loop answers.
async fn watch_over(control: Control) {
    let Some(every) = control.0.notifier.every() else { return };
    let mut times = tokio::time::interval(every);
    loop {
        times.tick().await;
        if control.is_alive(every / 2).await {
            control.0.notifier.alive();
        } else {
            tracing::error!("the supervisor's loop does not answer; the watchdog is not told that it lives");
        }
    }
}
