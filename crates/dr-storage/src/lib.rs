//! dr-storage
