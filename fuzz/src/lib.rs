//! Do readers hold against bytes that nobody wrote?
//!
//! A [`Target`] is one reader with inputs that it takes. [`Run`] changes those inputs without knowing
//! their structure ([`mutate`]), gives them to the reader, and watches: a panic, too much memory or
//! too much time is a fault, and so is an answer that the target itself knows to be wrong. Inputs
//! that make a reader answer in a new way become seeds too. One seed of chance, one course.
//!
//! Stable Rust, without instrumentation: `cargo xtask fuzz`. The same targets under libFuzzer:
//! `fuzz/libfuzzer`.

pub mod memory;
pub mod mutate;
mod run;
pub mod targets;

pub use run::{Fault, Report, Run, watch_panics};

/// What a reader said.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Answer {
    /// It took the input.
    Taken,
    /// It refused it, in these words.
    Refused(String),
}

impl<T, E: std::fmt::Display> From<Result<T, E>> for Answer {
    fn from(result: Result<T, E>) -> Self {
        match result {
            Ok(_) => Answer::Taken,
            Err(error) => Answer::Refused(error.to_string()),
        }
    }
}

/// A reader of bytes. It panics when it finds an answer wrong.
pub type Reader = Box<dyn Fn(&[u8]) -> Answer>;

/// One reader, with inputs that it takes.
pub struct Target {
    /// Its name.
    pub name: &'static str,
    /// Inputs that it takes.
    pub seeds: Vec<Vec<u8>>,
    /// Bytes of memory that it may take beside the input.
    pub memory: usize,
    /// The reader.
    pub read: Reader,
}

impl std::fmt::Debug for Target {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Target({}, {} seeds)", self.name, self.seeds.len())
    }
}

impl Target {
    /// A reader that needs little memory beside its input.
    pub fn new(name: &'static str, seeds: Vec<Vec<u8>>, read: impl Fn(&[u8]) -> Answer + 'static) -> Self {
        Target { name, seeds, memory: 8 << 20, read: Box::new(read) }
    }

    /// The same with another bound.
    pub fn memory(mut self, bytes: usize) -> Self {
        self.memory = bytes;
        self
    }
}
