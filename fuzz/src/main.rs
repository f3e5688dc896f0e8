//! One fuzz target for all readers; `REROUTE_FUZZ` names the one that is tried (`targets.rs`).

#![no_main]

mod targets;

use std::io::Write;
use std::sync::LazyLock;
use std::{env, io, process};

use libfuzzer_sys::{Corpus, fuzz_target};
use peak_alloc::PeakAlloc;

use targets::{TARGETS, Target};

/// Memory that a reader may take: so many bytes for each of the file, and so many whatever its length (regular
/// expressions, templates and tokenizers are compiled).
const ALLOWED_FACTOR: usize = 64;
const ALLOWED_BYTES: usize = 64 << 20;

#[global_allocator]
static HEAP: PeakAlloc = PeakAlloc;

static TARGET: LazyLock<Target> = LazyLock::new(|| {
    let name = env::var("REROUTE_FUZZ").unwrap_or_default();
    let found = TARGETS.into_iter().find(|(known, _)| *known == name);
    found.map_or_else(
        || {
            let names = TARGETS.map(|(name, _)| name).join(", ");
            let _ = writeln!(io::stderr(), "REROUTE_FUZZ is {name:?}, not one of {names}");
            process::exit(2)
        },
        |(_, target)| target,
    )
});

fuzz_target!(|data: &[u8]| -> Corpus {
    let before = HEAP.current_usage();
    HEAP.reset_peak_usage();
    TARGET(data);
    let taken = HEAP.peak_usage().saturating_sub(before);
    let allowed = ALLOWED_BYTES + ALLOWED_FACTOR * data.len();
    assert!(
        taken <= allowed,
        "{taken} bytes were taken for a file of {}",
        data.len()
    );
    Corpus::Keep
});
