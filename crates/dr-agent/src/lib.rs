//! dr-agent
