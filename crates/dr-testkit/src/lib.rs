//! Fakes, faults and disposable servers for the tests of the workspace. Never published.
#![allow(clippy::unwrap_used)]

pub mod far;
pub mod faults;
pub mod instance;
pub mod pg;
pub mod scale;
pub mod sim;
