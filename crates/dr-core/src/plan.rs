//! Pure planners.
