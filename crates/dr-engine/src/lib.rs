//! dr-engine
