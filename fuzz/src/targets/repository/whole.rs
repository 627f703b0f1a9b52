//! A whole repository with one object changed, through `dr verify` at its deepest.

use std::rc::Rc;
use std::sync::Arc;

use dr_core::Timestamp;
use dr_core::port::{Clock, Key, NoEvents};
use dr_engine::{Cancel, Context};
use dr_verify::{Level, VerifyOptions, verify};

use super::Fixture;
use crate::{Answer, Target};

/// Kinds of objects of which each bit is bound by something that is checked under encryption.
const BOUND: [&str; 5] = ["manifest", "meta", "pack", "packs", "repo.json"];

#[derive(Debug)]
struct Still;

impl Clock for Still {
    fn now(&self) -> Timestamp {
        Timestamp::UNIX_EPOCH
    }
}

/// A byte that chooses an object, and what it becomes.
pub(super) fn target(name: &'static str, fixture: Rc<Fixture>, sealed: bool) -> Target {
    let keys: Vec<Key> = fixture.objects.keys().cloned().collect();
    assert!(keys.len() < 256, "a byte chooses");
    let seed = |(number, key): (usize, &Key)| [&[number as u8][..], &fixture.objects[key]].concat();
    let seeds = keys.iter().enumerate().map(seed).collect();
    let sound =
        look(&fixture, &keys[0], &fixture.objects[&keys[0]]).expect("a golden repository is looked at");
    let read = move |bytes: &[u8]| {
        let Some((number, object)) = bytes.split_first() else {
            return Answer::Refused("it is empty".into());
        };
        let key = &keys[usize::from(*number) % keys.len()];
        let found = look(&fixture, key, object);
        if found.as_ref() == Ok(&sound) {
            let same = fixture.objects[key] == object;
            let bound = sealed && BOUND.contains(&Fixture::kind_of(key));
            assert!(same || !bound, "damage in {key} was not seen");
            return Answer::Taken;
        }
        Answer::Refused(match found {
            Ok(problems) => problems.into_iter().find(|problem| !sound.contains(problem)).unwrap_or_default(),
            Err(error) => error,
        })
    };
    // Four workers' buffers, and the frames that they open.
    Target::new(name, seeds, read).memory(512 << 20)
}

/// What a verification says is wrong.
fn look(fixture: &Fixture, key: &Key, object: &[u8]) -> Result<Vec<String>, String> {
    let repo = fixture.open(fixture.target_with(key, object)).map_err(|error| error.to_string())?;
    let context = Context {
        store: repo.cluster(fixture.system_id()),
        repo,
        events: Arc::new(NoEvents),
        clock: Arc::new(Still),
        label: "main".into(),
        host: "host".into(),
        cancel: Cancel::default(),
    };
    let options = VerifyOptions { backups: Vec::new(), all: true, level: Level::Content, workers: 2 };
    let report = fixture.run(verify(&context, &options)).map_err(|error| error.to_string())?;
    let problems = report.backups.iter().flat_map(|backup| &backup.problems);
    let problems = problems.map(|problem| format!("{}: {}", problem.place, problem.what));
    Ok(problems.chain(report.wal_gaps.iter().cloned()).collect())
}
