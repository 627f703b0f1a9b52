//! The loop that acts on what the machine decides.

use std::collections::BTreeMap;
use std::panic::AssertUnwindSafe;
use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::sync::{mpsc, oneshot, watch};
use tokio::task::{AbortHandle, Id, JoinError, JoinSet};

use super::machine::{Act, Changes, Machine, Outcome, Wanted};
use super::view::{Report, Reports, View};
use super::{SuperviseError, Supervised, Task, TaskContext, TaskError};

/// How many requests may wait for the loop.
const WAITING_REQUESTS: usize = 16;
/// How long the loop may take to answer.
const ANSWER_LIMIT: Duration = Duration::from_secs(5);

enum Request {
    Want(Vec<Supervised>, Duration, oneshot::Sender<Changes>),
    Drain(oneshot::Sender<()>),
    Cut(oneshot::Sender<()>),
    Beat(oneshot::Sender<()>),
}

/// How a supervisor ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Ended {
    /// Tasks that did not stop in time and were cut off.
    pub cut: Vec<String>,
}

/// Runs tasks. It ends when it is asked to; until then it looks after whatever it was given.
pub struct Supervisor {
    began: Instant,
    machine: Machine,
    tasks: BTreeMap<String, Arc<dyn Task>>,
    running: JoinSet<Result<(), TaskError>>,
    live: BTreeMap<String, Live>,
    requests: mpsc::Receiver<Request>,
    view: watch::Sender<View>,
    reports: Reports,
}

struct Live {
    stop: watch::Sender<bool>,
    abort: AbortHandle,
}

/// Asks a supervisor; may be cloned.
#[derive(Clone, Debug)]
pub struct Handle {
    began: Instant,
    requests: mpsc::Sender<Request>,
    view: watch::Receiver<View>,
    reports: Reports,
    stop_timeout: Duration,
}

impl Supervisor {
    /// One without tasks. `stop_timeout`: how long a task may take to its safe point.
    pub fn new(stop_timeout: Duration) -> (Supervisor, Handle) {
        let began = Instant::now();
        let machine = Machine::new(stop_timeout);
        let (send, requests) = mpsc::channel(WAITING_REQUESTS);
        let (view, seen) = watch::channel(machine.view(Duration::ZERO));
        let reports = Reports::default();
        let handle = Handle { began, requests: send, view: seen, reports: reports.clone(), stop_timeout };
        let (tasks, running, live) = (BTreeMap::new(), JoinSet::new(), BTreeMap::new());
        (Supervisor { began, machine, tasks, running, live, requests, view, reports }, handle)
    }

    /// Runs until it was asked to stop and all tasks are gone, or cannot be ended. When every handle
    /// is gone nobody could ask any more, so that it stops then too.
    pub async fn run(mut self) -> Ended {
        let mut asked = true;
        loop {
            let now = self.now();
            let acts = self.machine.tick(now);
            self.act(acts);
            self.publish();
            if self.machine.is_over(self.now()) {
                break;
            }
            let next = self.machine.next(self.now()).map(|at| self.began + at);
            tokio::select! {
                request = self.requests.recv(), if asked => match request {
                    Some(request) => self.answer(request),
                    None => {
                        asked = false;
                        let acts = self.machine.drain(self.now());
                        self.act(acts);
                    }
                },
                Some(ended) = self.running.join_next_with_id() => self.ended(ended),
                () = sleep_until(next) => {}
            }
        }
        // What is left here did not end even when it was cut off.
        self.running.detach_all();
        Ended { cut: self.machine.cut().to_vec() }
    }

    fn now(&self) -> Duration {
        self.began.elapsed()
    }

    fn publish(&self) {
        let view = self.machine.view(self.now());
        self.view.send_if_modified(|last| {
            let changed = *last != view;
            *last = view;
            changed
        });
    }

    /// Answers; one who no longer waits for the answer is no fault.
    fn answer(&mut self, request: Request) {
        let now = self.now();
        match request {
            Request::Want(tasks, stop_timeout, reply) => {
                if self.machine.phase() != super::Phase::Running {
                    return;
                }
                self.machine.set_stop_timeout(stop_timeout);
                let wanted = |s: &Supervised| Wanted {
                    name: s.task.name().to_owned(),
                    policy: s.policy,
                    settings: s.settings.clone(),
                };
                let (changes, acts) = self.machine.want(tasks.iter().map(wanted).collect(), now);
                for Supervised { task, .. } in tasks {
                    if !changes.kept.iter().any(|kept| kept == task.name()) {
                        self.tasks.insert(task.name().to_owned(), task);
                    }
                }
                self.act(acts);
                self.publish();
                let _ = reply.send(changes);
            }
            Request::Drain(reply) => {
                let acts = self.machine.drain(now);
                self.act(acts);
                self.publish();
                let _ = reply.send(());
            }
            Request::Cut(reply) => {
                let acts = self.machine.cut_all(now);
                self.act(acts);
                self.publish();
                let _ = reply.send(());
            }
            Request::Beat(reply) => {
                let _ = reply.send(());
            }
        }
    }

    fn act(&mut self, acts: impl IntoIterator<Item = Act>) {
        for act in acts {
            match act {
                Act::Start(name) => self.start(name),
                Act::AskToStop(name) => {
                    if let Some(live) = self.live.get(&name) {
                        tracing::debug!("the task {name} is asked to stop");
                        live.stop.send_replace(true);
                    }
                }
                Act::Cut(name) => {
                    if let Some(live) = self.live.get(&name) {
                        tracing::warn!("the task {name} did not stop in time and is cut off");
                        live.abort.abort();
                    }
                }
                Act::Forget(name) => {
                    self.tasks.remove(&name);
                    self.reports.forget(&name);
                }
            }
        }
    }

    fn start(&mut self, name: String) {
        let Some(task) = self.tasks.get(&name).cloned() else { return };
        tracing::debug!("the task {name} starts");
        let (stop, asked) = watch::channel(false);
        let context = TaskContext { name: name.clone(), stop: asked, reports: self.reports.clone() };
        let abort = self.running.spawn(async move { task.run(context).await });
        self.live.insert(name, Live { stop, abort });
    }

    fn ended(&mut self, ended: Result<(Id, Result<(), TaskError>), JoinError>) {
        let (id, outcome) = match ended {
            Ok((id, Ok(()))) => (id, Outcome::Well),
            Ok((id, Err(error))) => (id, Outcome::Badly(error)),
            Err(error) if error.is_cancelled() => (error.id(), Outcome::WasCut),
            Err(error) => (error.id(), Outcome::Badly(panicked(error))),
        };
        let found = self.live.iter().find(|(_, live)| live.abort.id() == id);
        let Some(name) = found.map(|(name, _)| name.clone()) else { return };
        self.live.remove(&name);
        if let Outcome::Badly(error) = &outcome {
            tracing::warn!("the task {name} failed: {error} [{}]", error.code);
        }
        let act = self.machine.ended(&name, outcome, self.now());
        self.act(act);
    }
}

fn panicked(error: JoinError) -> TaskError {
    let Ok(payload) = error.try_into_panic() else { return TaskError::bug("it panicked") };
    // The payload's own destructor is not ours to run into.
    let text = std::panic::catch_unwind(AssertUnwindSafe(|| {
        let text = payload.downcast_ref::<&str>().map(|text| (*text).to_owned());
        text.or_else(|| payload.downcast_ref::<String>().cloned())
    }));
    match text.ok().flatten() {
        Some(text) => TaskError::bug(format!("it panicked: {text}")),
        None => TaskError::bug("it panicked"),
    }
}

async fn sleep_until(at: Option<Instant>) {
    match at {
        Some(at) => tokio::time::sleep_until(at.into()).await,
        None => std::future::pending().await,
    }
}

impl Handle {
    /// The tasks that should be there from now on: new ones are started, changed ones started anew,
    /// missing ones stopped, the others left alone.
    pub async fn apply(&self, tasks: Vec<Supervised>) -> Result<Changes, SuperviseError> {
        self.apply_with(tasks, self.stop_timeout).await
    }

    /// The same with another time to stop.
    pub async fn apply_with(
        &self,
        tasks: Vec<Supervised>,
        stop_timeout: Duration,
    ) -> Result<Changes, SuperviseError> {
        for (index, one) in tasks.iter().enumerate() {
            if tasks[..index].iter().any(|other| other.task.name() == one.task.name()) {
                return Err(SuperviseError::Twice { name: one.task.name().to_owned() });
            }
        }
        self.ask(|reply| Request::Want(tasks, stop_timeout, reply)).await
    }

    /// Asks all tasks to stop at their safe point; what is not done in time is cut off.
    pub async fn drain(&self) -> Result<(), SuperviseError> {
        self.ask(Request::Drain).await
    }

    /// Cuts off all tasks.
    pub async fn cut(&self) -> Result<(), SuperviseError> {
        self.ask(Request::Cut).await
    }

    /// Whether the loop answers within a time: what a watchdog asks.
    pub async fn is_alive(&self, within: Duration) -> bool {
        tokio::time::timeout(within, self.ask(Request::Beat)).await.is_ok_and(|answer| answer.is_ok())
    }

    /// All tasks now.
    pub fn view(&self) -> View {
        self.view.borrow().clone()
    }

    /// Waits until something changed; `false` when nothing will any more.
    pub async fn changed(&mut self) -> bool {
        self.view.changed().await.is_ok()
    }

    /// The last report of each task.
    pub fn reports(&self) -> BTreeMap<String, Report> {
        self.reports.all()
    }

    /// The time since the supervisor began: what the moments of a [`View`] count from.
    pub fn uptime(&self) -> Duration {
        self.began.elapsed()
    }

    async fn ask<T>(&self, request: impl FnOnce(oneshot::Sender<T>) -> Request) -> Result<T, SuperviseError> {
        let (reply, answer) = oneshot::channel();
        let asked = async {
            self.requests.send(request(reply)).await.map_err(|_| SuperviseError::Stopping)?;
            answer.await.map_err(|_| SuperviseError::Stopping)
        };
        let late = |_| SuperviseError::Late { within: ANSWER_LIMIT };
        tokio::time::timeout(ANSWER_LIMIT, asked).await.map_err(late)?
    }
}
