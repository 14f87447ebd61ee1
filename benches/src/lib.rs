//! Fixtures shared by the criterion benches.
