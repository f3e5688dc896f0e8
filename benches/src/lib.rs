//! What is measured, per backend, one binary.
