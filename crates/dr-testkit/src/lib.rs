//! dr-testkit
