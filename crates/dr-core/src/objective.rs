//! Recovery objectives: what may be lost, and for how long, by data category and tier.

use std::time::Duration;

use serde::{Deserialize, Serialize};

/// A kind of data with its own worth to the business.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct DataCategory(pub String);

/// How much a loss hurts; tier 1 is recovered first.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Tier {
    /// The business stands still without it (payments, orders).
    Critical,
    /// Work goes on for hours without it (inventory, customers).
    Important,
    /// Work goes on for a day without it (reports, logs).
    Deferrable,
}

/// The most time that recovery may take (recovery time objective).
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Rto(pub Duration);

/// The most time's worth of committed work that may be lost (recovery point objective).
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Rpo(pub Duration);

/// What is promised for one category of data.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Objective {
    /// The data that it is about.
    pub category: DataCategory,
    /// Its tier.
    pub tier: Tier,
    /// The most time to recover.
    pub rto: Rto,
    /// The most work to lose.
    pub rpo: Rpo,
}

/// A measured value beside its objective.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Measured {
    /// What was measured.
    pub actual: Duration,
    /// What was promised.
    pub objective: Duration,
}

impl Measured {
    /// Whether the promise was kept; an exact hit is kept.
    pub fn is_met(self) -> bool {
        self.actual <= self.objective
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_objective_is_met_up_to_its_limit() {
        let limit = Duration::from_secs(60);
        assert!(Measured { actual: limit, objective: limit }.is_met());
        assert!(!Measured { actual: limit + Duration::from_nanos(1), objective: limit }.is_met());
        assert!(Tier::Critical < Tier::Deferrable);
    }
}
