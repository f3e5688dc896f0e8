//! Benchmarks live in `layers/`; this library is empty so that the package has a target to check.
