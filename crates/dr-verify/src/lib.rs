//! dr-verify
