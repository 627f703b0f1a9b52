//! What the supervisor does with tasks that fail, panic, hang and hold on.
#![allow(clippy::unwrap_used, missing_docs)]

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use dr_agent::supervise::{
    Handle, Policy, SuperviseError, Supervised, Supervisor, Task, TaskContext, TaskError, TaskView,
};

/// How long a test waits for what must happen.
const LIMIT: Duration = Duration::from_secs(20);

type Work = fn(u32, TaskContext) -> std::pin::Pin<Box<dyn Future<Output = Result<(), TaskError>> + Send>>;

/// A task whose work knows how often it was begun.
struct Planted {
    name: &'static str,
    runs: Arc<AtomicU32>,
    work: Work,
}

#[async_trait::async_trait]
impl Task for Planted {
    fn name(&self) -> &str {
        self.name
    }

    async fn run(&self, context: TaskContext) -> Result<(), TaskError> {
        let run = self.runs.fetch_add(1, Ordering::SeqCst);
        (self.work)(run, context).await
    }
}

fn quick() -> Policy {
    let wait = Duration::from_millis(10);
    Policy { first_wait: wait, longest_wait: wait, ..Policy::permanent() }
}

fn planted(name: &'static str, work: Work) -> (Supervised, Arc<AtomicU32>) {
    let runs = Arc::new(AtomicU32::new(0));
    (Supervised::new(Arc::new(Planted { name, runs: runs.clone(), work }), quick()), runs)
}

fn good() -> Work {
    |_, context| {
        Box::pin(async move {
            context.stop_requested().await;
            Ok(())
        })
    }
}

async fn until(handle: &Handle, what: &str, holds: impl Fn(&[TaskView]) -> bool) {
    let end = Instant::now() + LIMIT;
    while !holds(&handle.view().tasks) {
        assert!(Instant::now() < end, "{what}: {:?}", handle.view());
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

#[tokio::test]
async fn a_panic_is_a_failure_and_neither_ends_the_process_nor_other_tasks() {
    let (supervisor, handle) = Supervisor::new(LIMIT);
    let running = tokio::spawn(supervisor.run());
    let (bad, _) = planted("bad", |run, context| {
        Box::pin(async move {
            assert!(run >= 3, "planted in run {run}");
            context.stop_requested().await;
            Ok(())
        })
    });
    let (other, other_runs) = planted("good", good());
    handle.apply(vec![bad, other]).await.unwrap();
    until(&handle, "it is unready after three panics, and runs on", |tasks| {
        tasks[0].failures == 3 && tasks[0].state == "running"
    })
    .await;
    let view = handle.view();
    assert!(view.tasks[0].last_error.as_ref().unwrap().message.contains("planted in run 2"));
    assert!(view.tasks[0].unready.is_some() && view.tasks[1].unready.is_none());
    assert_eq!(other_runs.load(Ordering::SeqCst), 1);
    handle.drain().await.unwrap();
    assert!(running.await.unwrap().cut.is_empty());
}

#[tokio::test]
async fn a_drain_lets_a_task_reach_its_safe_point() {
    let (supervisor, handle) = Supervisor::new(LIMIT);
    let running = tokio::spawn(supervisor.run());
    let (task, _) = planted("slow", |_, context| {
        Box::pin(async move {
            context.stop_requested().await;
            tokio::time::sleep(Duration::from_millis(200)).await;
            context.report(dr_agent::supervise::Report { detail: "safe".into(), metrics: vec![] });
            Ok(())
        })
    });
    handle.apply(vec![task]).await.unwrap();
    handle.drain().await.unwrap();
    let late = handle.apply(vec![]).await;
    assert_eq!(late, Err(SuperviseError::Stopping), "nothing is changed while it stops");
    assert!(running.await.unwrap().cut.is_empty());
    assert_eq!(handle.reports()["slow"].detail, "safe");
    assert_eq!(handle.drain().await, Err(SuperviseError::Stopping));
}

#[tokio::test]
async fn what_does_not_stop_in_time_is_cut_off_and_named() {
    let (supervisor, handle) = Supervisor::new(Duration::from_millis(100));
    let running = tokio::spawn(supervisor.run());
    let (deaf, _) = planted("deaf", |_, _| Box::pin(std::future::pending()));
    let (other, _) = planted("good", good());
    handle.apply(vec![deaf, other]).await.unwrap();
    handle.drain().await.unwrap();
    let ended = tokio::time::timeout(LIMIT, running).await.unwrap().unwrap();
    assert_eq!(ended.cut, ["deaf"]);
}

#[tokio::test]
async fn a_cut_does_not_wait() {
    let (supervisor, handle) = Supervisor::new(Duration::from_secs(3600));
    let running = tokio::spawn(supervisor.run());
    let (deaf, _) = planted("deaf", |_, _| Box::pin(std::future::pending()));
    handle.apply(vec![deaf]).await.unwrap();
    handle.drain().await.unwrap();
    handle.cut().await.unwrap();
    assert_eq!(tokio::time::timeout(LIMIT, running).await.unwrap().unwrap().cut, ["deaf"]);
}

#[tokio::test]
async fn a_reload_restarts_only_what_was_made_of_other_settings() {
    let (supervisor, handle) = Supervisor::new(LIMIT);
    let running = tokio::spawn(supervisor.run());
    let ((a, a_runs), (b, b_runs)) = (planted("a", good()), planted("b", good()));
    handle.apply(vec![a.clone().made_of("1"), b.clone().made_of("1")]).await.unwrap();
    until(&handle, "they run", |_| b_runs.load(Ordering::SeqCst) == 1).await;
    let changes = handle.apply(vec![a.made_of("1"), b.made_of("2")]).await.unwrap();
    assert_eq!((changes.kept, changes.restarted), (vec!["a".to_owned()], vec!["b".to_owned()]));
    until(&handle, "b runs anew", |_| b_runs.load(Ordering::SeqCst) == 2).await;
    assert_eq!(a_runs.load(Ordering::SeqCst), 1);
    let restarts: Vec<u64> = handle.view().tasks.iter().map(|task| task.restarts).collect();
    assert_eq!(restarts, [0, 0], "a reload is no failure");
    handle.drain().await.unwrap();
    running.await.unwrap();
}

#[tokio::test]
async fn two_tasks_of_one_name_are_refused_and_nothing_is_changed() {
    let (supervisor, handle) = Supervisor::new(LIMIT);
    let running = tokio::spawn(supervisor.run());
    let twice = handle.apply(vec![planted("a", good()).0, planted("a", good()).0]).await;
    assert_eq!(twice, Err(SuperviseError::Twice { name: "a".into() }));
    assert!(handle.view().tasks.is_empty());
    handle.drain().await.unwrap();
    running.await.unwrap();
}

#[tokio::test]
async fn a_supervisor_that_nobody_can_ask_any_more_stops() {
    let (supervisor, handle) = Supervisor::new(LIMIT);
    let running = tokio::spawn(supervisor.run());
    handle.apply(vec![planted("a", good()).0]).await.unwrap();
    assert!(handle.is_alive(LIMIT).await);
    drop(handle);
    assert!(tokio::time::timeout(LIMIT, running).await.unwrap().unwrap().cut.is_empty());
}

#[tokio::test]
async fn a_loop_that_does_not_run_is_not_alive() {
    let (supervisor, handle) = Supervisor::new(LIMIT);
    assert!(!handle.is_alive(Duration::from_millis(50)).await);
    drop(supervisor);
    assert!(!handle.is_alive(LIMIT).await);
}
