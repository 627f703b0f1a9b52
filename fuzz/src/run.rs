//! The loop: change, read, watch.

use std::collections::HashSet;
use std::fmt;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use crate::mutate::{Chance, mutate};
use crate::{Answer, Target, memory};

/// Inputs that are kept for a target, beside its seeds.
const MOST_KEPT: usize = 1024;
/// Longer inputs are not kept: they would take the time of many others.
const LONGEST_KEPT: usize = 256 << 10;
/// No input takes a reader so long, even where four others use the processors.
const CASE_LIMIT: Duration = Duration::from_secs(5);

/// What went wrong.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Fault {
    /// A panic, wherever it was caught, and what it said.
    Panic(String),
    /// More memory than the target allows.
    Memory {
        /// Bytes taken.
        taken: usize,
        /// Bytes allowed.
        allowed: usize,
    },
    /// More time than any input may take.
    Time(Duration),
    /// The target refuses a seed of its own: it tests nothing.
    Seed(String),
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Fault::Panic(said) => write!(f, "panicked: {said}"),
            Fault::Memory { taken, allowed } => {
                write!(f, "took {taken} bytes of memory; {allowed} are allowed")
            }
            Fault::Time(took) => write!(f, "took {:.1} s", took.as_secs_f64()),
            Fault::Seed(said) => write!(f, "refuses a seed of its own: {said}"),
        }
    }
}

/// How a target did.
#[derive(Clone, Debug, Default)]
pub struct Report {
    /// Inputs read.
    pub cases: u64,
    /// Of them taken.
    pub taken: u64,
    /// Different answers.
    pub ways: usize,
}

/// A course of one target.
pub struct Run<'a> {
    target: &'a Target,
    chance: Chance,
    kept: Vec<Vec<u8>>,
    ways: HashSet<String>,
    report: Report,
    current: PathBuf,
    file: Option<File>,
}

static PANICS: AtomicUsize = AtomicUsize::new(0);
static LAST_PANIC: Mutex<String> = Mutex::new(String::new());

/// Counts panics on all threads, since some are caught by a runtime, and keeps what the last said.
pub fn watch_panics() {
    std::panic::set_hook(Box::new(|info| {
        PANICS.fetch_add(1, Ordering::SeqCst);
        if let Ok(mut last) = LAST_PANIC.lock() {
            *last = info.to_string().replace('\n', " ");
        }
    }));
}

impl<'a> Run<'a> {
    /// A course of its own for each seed and target. The input under test lies in a file below
    /// `folder`, so that it is there even when the process is not.
    pub fn new(target: &'a Target, seed: u64, folder: &Path) -> Self {
        let name = target.name.bytes().fold(seed, |sum, byte| sum.wrapping_mul(31).wrapping_add(byte.into()));
        let current = folder.join(format!("{}.input", target.name));
        Run {
            file: File::create(&current).ok(),
            target,
            chance: Chance::new(name),
            kept: target.seeds.clone(),
            ways: HashSet::new(),
            report: Report::default(),
            current,
        }
    }

    /// Where the input under test lies.
    pub fn current(&self) -> &Path {
        &self.current
    }

    /// What was done so far.
    pub fn report(&self) -> Report {
        Report { ways: self.ways.len(), ..self.report.clone() }
    }

    /// Reads the seeds: all of them must be taken.
    pub fn seeds(&mut self) -> Result<(), Fault> {
        for seed in &self.target.seeds {
            if let Answer::Refused(said) = self.case(seed)? {
                return Err(Fault::Seed(said));
            }
        }
        if self.target.seeds.is_empty() { Err(Fault::Seed("there is none".into())) } else { Ok(()) }
    }

    /// Reads changed inputs for about this time.
    pub fn work(&mut self, time: Duration) -> Result<(), Fault> {
        let began = Instant::now();
        while began.elapsed() < time {
            self.step()?;
        }
        Ok(())
    }

    /// Reads so many changed inputs.
    pub fn cases(&mut self, count: u64) -> Result<(), Fault> {
        (0..count).try_for_each(|_| self.step())
    }

    fn step(&mut self) -> Result<(), Fault> {
        let one = self.chance.below(self.kept.len());
        let other = self.chance.below(self.kept.len());
        let input = mutate(&self.kept[one], &self.kept[other], &mut self.chance);
        let answer = self.case(&input)?;
        let new = self.ways.insert(way(&answer));
        if new && self.kept.len() < self.target.seeds.len() + MOST_KEPT && input.len() <= LONGEST_KEPT {
            self.kept.push(input);
        }
        Ok(())
    }

    /// Reads one input.
    pub fn case(&mut self, input: &[u8]) -> Result<Answer, Fault> {
        // Not synced: it outlives the process, and need not outlive the machine.
        if let Some(file) = &self.file {
            let _ = file.write_all_at(input, 0).and_then(|()| file.set_len(input.len() as u64));
        }
        let panics = PANICS.load(Ordering::SeqCst);
        let began = Instant::now();
        let read = || catch_unwind(AssertUnwindSafe(|| (self.target.read)(input)));
        let (answer, taken) = memory::peak_of(read);
        let took = began.elapsed();
        self.report.cases += 1;
        let (Ok(answer), true) = (answer, PANICS.load(Ordering::SeqCst) == panics) else {
            return Err(Fault::Panic(LAST_PANIC.lock().map(|said| said.clone()).unwrap_or_default()));
        };
        if taken > self.target.memory {
            return Err(Fault::Memory { taken, allowed: self.target.memory });
        }
        if took > CASE_LIMIT {
            return Err(Fault::Time(took));
        }
        self.report.taken += u64::from(answer == Answer::Taken);
        Ok(answer)
    }
}

/// What kind of answer this is: its words without their numbers, and without what they quote.
fn way(answer: &Answer) -> String {
    match answer {
        Answer::Taken => "taken".into(),
        Answer::Refused(said) => {
            let (head, tail) = said.split_once(['"', '`']).unwrap_or((said, ""));
            let tail = tail.rsplit_once(['"', '`']).map_or(tail, |(_, tail)| tail);
            head.chars().chain(tail.chars()).filter(|c| !c.is_ascii_digit()).take(120).collect()
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[global_allocator]
    static ALLOCATOR: memory::Counting = memory::Counting;

    fn fault_of(read: impl Fn(&[u8]) -> Answer + 'static) -> Option<Fault> {
        watch_panics();
        let target = Target::new("planted", vec![b"DRPACK 0 and so on".to_vec()], read).memory(1 << 20);
        let folder =
            std::env::temp_dir().join(format!("dr-fuzz-{}-{:?}", std::process::id(), Instant::now()));
        std::fs::create_dir(&folder).expect("a folder");
        let mut run = Run::new(&target, 1, &folder);
        let fault = run.seeds().and_then(|()| run.cases(2000)).err();
        if fault.is_some() {
            assert!(run.current().is_file(), "the input is there");
        }
        std::fs::remove_dir_all(&folder).expect("remove");
        fault
    }

    #[test]
    fn planted_faults_are_found() {
        let sound = fault_of(|input| Answer::from(std::str::from_utf8(input)));
        assert_eq!(sound, None);
        let panics = fault_of(|input| {
            assert!(input.get(7) != Some(&0x80), "a planted fault");
            Answer::Taken
        });
        assert!(
            matches!(&panics, Some(Fault::Panic(said)) if said.contains("a planted fault")),
            "{panics:?}"
        );
        let caught = fault_of(|input| {
            // As a runtime does it: the panic is on another thread, and nothing of it is left here.
            let byte = input.get(3).copied();
            let _ = std::thread::spawn(move || assert!(byte != Some(0xff), "caught elsewhere")).join();
            Answer::Taken
        });
        assert!(
            matches!(&caught, Some(Fault::Panic(said)) if said.contains("caught elsewhere")),
            "{caught:?}"
        );
        let memory = fault_of(|input| {
            let wanted = input.first().map_or(0, |first| usize::from(*first) << 14);
            Answer::from(std::str::from_utf8(&vec![b'a'; wanted]))
        });
        assert!(matches!(memory, Some(Fault::Memory { taken, .. }) if taken > 1 << 20), "{memory:?}");
        assert!(matches!(fault_of(|_| Answer::Refused("no".into())), Some(Fault::Seed(_))));
    }

    #[test]
    fn answers_that_differ_in_numbers_alone_are_one_way() {
        let refused = |text: &str| way(&Answer::Refused(text.into()));
        assert_eq!(refused("byte 17 of \"x1\" is wrong"), refused("byte 9 of \"y\" is wrong"));
        assert_ne!(refused("it ends too early"), refused("a number is too long"));
    }
}
