//! dr-pg
