use super::*;

fn seconds(count: u64) -> Duration {
    Duration::from_secs(count)
}

fn wanted(name: &str, policy: Policy, settings: &str) -> Wanted {
    Wanted { name: name.into(), policy, settings: settings.into() }
}

fn of(policy: Policy) -> Machine {
    let mut machine = Machine::new(seconds(60));
    let (_, acts) = machine.want(vec![wanted("a", policy, "")], seconds(0));
    assert_eq!(acts, [Act::Start("a".into())]);
    machine
}

fn bad() -> Outcome {
    Outcome::Badly(TaskError::bug("planted"))
}

fn state(machine: &Machine, now: Duration) -> TaskView {
    machine.view(now).tasks.remove(0)
}

#[test]
fn the_wait_doubles_from_one_second_to_sixty_and_the_agent_is_unready_from_the_third_failure() {
    let mut machine = of(Policy::permanent());
    let mut now = seconds(0);
    for (failures, wait) in [(1, 1), (2, 2), (3, 4), (4, 8), (5, 16), (6, 32), (7, 60), (8, 60), (40, 60)] {
        while state(&machine, now).failures < failures {
            assert_eq!(machine.ended("a", bad(), now), None);
            let next = machine.next(now).expect("it is started again");
            assert!(machine.tick(next - Duration::from_nanos(1)).is_empty(), "not before its time");
            if state(&machine, now).failures == failures {
                assert_eq!(next - now, seconds(wait), "after {failures} failures");
            }
            now = next;
            assert_eq!(machine.tick(now), [Act::Start("a".into())]);
        }
        assert_eq!(state(&machine, now).unready.is_some(), failures >= 3);
    }
    assert_eq!(state(&machine, now).restarts, 40);
}

#[test]
fn failures_are_forgotten_after_a_steady_run() {
    let mut machine = of(Policy::permanent());
    for at in [0, 10, 20] {
        machine.ended("a", bad(), seconds(at));
        machine.tick(seconds(at + 9));
    }
    assert!(state(&machine, seconds(30)).unready.is_some());
    let steady = machine.next(seconds(30)).expect("the moment is an event");
    assert_eq!(steady, seconds(29 + 60));
    assert!(machine.tick(steady).is_empty());
    assert_eq!((state(&machine, steady).unready, state(&machine, steady).failures), (None, 0));
    machine.ended("a", bad(), seconds(200));
    assert_eq!(machine.next(seconds(200)), Some(seconds(201)), "the first wait again");
}

#[test]
fn each_kind_is_started_again_as_it_says() {
    let ended = |policy, outcome| {
        let mut machine = of(policy);
        machine.ended("a", outcome, seconds(5));
        state(&machine, seconds(5)).state
    };
    assert_eq!(ended(Policy::permanent(), Outcome::Well), "waiting");
    assert_eq!(ended(Policy::permanent(), bad()), "waiting");
    assert_eq!(ended(Policy::transient(), Outcome::Well), "ended");
    assert_eq!(ended(Policy::transient(), bad()), "waiting");
    assert_eq!(ended(Policy::one_shot(), Outcome::Well), "ended");
    assert_eq!(ended(Policy::one_shot(), bad()), "failed");
}

#[test]
fn a_failed_one_shot_makes_unready_only_when_it_is_required() {
    for required in [true, false] {
        let mut machine = of(Policy { required, ..Policy::one_shot() });
        machine.ended("a", bad(), seconds(5));
        assert_eq!(state(&machine, seconds(5)).unready.is_some(), required);
    }
}

#[test]
fn a_drain_asks_all_and_is_over_when_all_are_gone() {
    let mut machine = Machine::new(seconds(60));
    let policy = Policy::permanent();
    machine.want(vec![wanted("a", policy, ""), wanted("b", policy, ""), wanted("c", policy, "")], seconds(0));
    machine.ended("c", bad(), seconds(1));
    let asked = machine.drain(seconds(1));
    assert_eq!(asked, [Act::AskToStop("a".into()), Act::AskToStop("b".into())]);
    assert!(machine.drain(seconds(2)).is_empty(), "once");
    assert_eq!(machine.ended("a", Outcome::Well, seconds(3)), None, "a permanent task may end now");
    assert!(!machine.is_over(seconds(3)));
    assert_eq!(machine.ended("b", bad(), seconds(4)), None, "nothing is started again");
    assert!(machine.is_over(seconds(4)) && machine.cut().is_empty());
    assert!(machine.tick(seconds(1000)).is_empty());
}

#[test]
fn what_does_not_stop_in_time_is_cut_and_named() {
    let mut machine = of(Policy::permanent());
    machine.drain(seconds(10));
    assert!(machine.tick(seconds(69)).is_empty());
    assert_eq!(machine.next(seconds(69)), Some(seconds(70)));
    assert_eq!(machine.tick(seconds(70)), [Act::Cut("a".into())]);
    assert!(!machine.is_over(seconds(70)));
    machine.ended("a", Outcome::WasCut, seconds(70));
    assert!(machine.is_over(seconds(70)));
    assert_eq!(machine.cut(), ["a"]);
}

#[test]
fn one_that_cannot_even_be_cut_does_not_hold_up_the_end() {
    let mut machine = of(Policy::permanent());
    assert_eq!(machine.cut_all(seconds(10)), [Act::Cut("a".into())]);
    assert!(machine.cut_all(seconds(11)).is_empty(), "once");
    assert!(!machine.is_over(seconds(14)));
    assert_eq!(machine.next(seconds(14)), Some(seconds(10) + CUT_LIMIT));
    assert!(machine.is_over(seconds(10) + CUT_LIMIT));
}

#[test]
fn a_reload_touches_only_what_changed() {
    let policy = Policy::permanent();
    let mut machine = Machine::new(seconds(60));
    let all = ["kept", "changed", "gone"].map(|name| wanted(name, policy, "1")).to_vec();
    machine.want(all, seconds(0));
    let next = vec![wanted("kept", policy, "1"), wanted("changed", policy, "2"), wanted("new", policy, "1")];
    let (changes, acts) = machine.want(next, seconds(5));
    assert_eq!((changes.kept, changes.started), (vec!["kept".to_owned()], vec!["new".to_owned()]));
    assert_eq!((changes.restarted, changes.stopped), (vec!["changed".to_owned()], vec!["gone".to_owned()]));
    let asked = ["gone", "changed"].map(|name| Act::AskToStop(name.into()));
    assert_eq!(acts, [&asked[..], &[Act::Start("new".into())]].concat());
    assert_eq!(machine.ended("changed", Outcome::Well, seconds(6)), Some(Act::Start("changed".into())));
    assert_eq!(machine.ended("gone", Outcome::Well, seconds(6)), Some(Act::Forget("gone".into())));
    assert_eq!(machine.view(seconds(6)).tasks.len(), 3);
}

#[test]
fn a_reload_starts_what_waits_or_failed_at_once_and_with_a_clean_record() {
    for policy in [Policy::permanent(), Policy::one_shot()] {
        let mut machine = of(policy);
        machine.ended("a", bad(), seconds(1));
        let (_, acts) = machine.want(vec![wanted("a", policy, "new")], seconds(1));
        assert_eq!(acts, [Act::Start("a".into())]);
        let view = state(&machine, seconds(1));
        assert_eq!((view.failures, view.last_error, view.unready), (0, None, None));
    }
}

#[test]
fn a_task_that_is_taken_away_and_wanted_again_before_it_stopped_comes_back() {
    let mut machine = of(Policy::permanent());
    machine.want(vec![], seconds(1));
    let (changes, acts) = machine.want(vec![wanted("a", Policy::permanent(), "")], seconds(2));
    assert_eq!((changes.restarted, acts), (vec!["a".to_owned()], vec![]));
    assert_eq!(machine.ended("a", Outcome::Well, seconds(3)), Some(Act::Start("a".into())));
}

#[test]
fn a_changed_task_that_does_not_stop_is_cut_and_started_anew() {
    let mut machine = of(Policy::permanent());
    machine.want(vec![wanted("a", Policy::permanent(), "new")], seconds(1));
    assert_eq!(machine.tick(seconds(61)), [Act::Cut("a".into())]);
    assert_eq!(machine.ended("a", Outcome::WasCut, seconds(61)), Some(Act::Start("a".into())));
    assert!(machine.cut().is_empty(), "that is told at the end of the agent only");
}
