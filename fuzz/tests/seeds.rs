//! The targets test what they say.
#![allow(missing_docs)]

use dr_fuzz::{Run, targets};

#[test]
fn every_target_takes_its_own_seeds_and_refuses_some_changes() {
    let folder = std::env::temp_dir().join(format!("dr-fuzz-seeds-{}", std::process::id()));
    std::fs::create_dir(&folder).expect("a folder");
    for target in targets::all() {
        let mut run = Run::new(&target, 7, &folder);
        run.seeds().and_then(|()| run.cases(40)).unwrap_or_else(|fault| panic!("{}: {fault}", target.name));
        let report = run.report();
        // Any bytes are a path.
        assert!(report.taken < report.cases || target.name == "path", "{} refuses nothing", target.name);
    }
    std::fs::remove_dir_all(&folder).expect("remove");
}
