//! What happened, in a few lines, with the time that each took.

use std::time::Duration;

/// The account of a demo, told while it goes on.
#[derive(Default)]
pub struct Account {
    facts: Vec<(String, String)>,
}

impl Account {
    /// Tells one step.
    pub fn line(&self, text: &str, took: Duration) {
        println!("{:>7.1} s  {text}", took.as_secs_f64());
    }

    /// Keeps a fact for the end.
    pub fn fact(&mut self, name: &str, value: &str) {
        self.facts.push((name.to_owned(), value.to_owned()));
    }

    /// Tells what was proved.
    pub fn close(&self, took: Duration) {
        println!("\nProved:");
        for (name, value) in &self.facts {
            println!("  {name:<12} {value}");
        }
        println!("\nThe whole demo took {:.1} s; nothing of it is left on this machine.", took.as_secs_f64());
    }
}
