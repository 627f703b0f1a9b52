//! With which parts `dr` runs: configuration, and the one place that names adapters together.
#![forbid(unsafe_code)]

pub mod config;
mod error;
pub mod wire;

pub use config::Settings;
pub use error::AgentError;
