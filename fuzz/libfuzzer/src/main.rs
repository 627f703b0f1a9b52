//! One target of `dr-fuzz`, named by `DR_FUZZ_TARGET`, under libFuzzer.
#![no_main]

use dr_fuzz::{Target, targets};

thread_local! {
    static TARGET: Target = {
        let name = std::env::var("DR_FUZZ_TARGET").unwrap_or_default();
        let mut all = targets::all();
        let names: Vec<_> = all.iter().map(|target| target.name).collect();
        all.retain(|target| target.name == name);
        let target = all.pop();
        target.unwrap_or_else(|| panic!("DR_FUZZ_TARGET is {name:?}; there are {}", names.join(", ")))
    };
}

libfuzzer_sys::fuzz_target!(|input: &[u8]| {
    TARGET.with(|target| (target.read)(input));
});
