//! How long the allocator of the program keeps freed memory.

use std::ffi::c_long;

use libmimalloc_sys::{mi_option_set_default, mi_option_t};

/// `mi_option_purge_delay` of `mimalloc.h`, which the Rust bindings do not name.
const PURGE_DELAY: mi_option_t = 15;

/// Milliseconds that freed memory stays with the program.
const KEPT_MS: c_long = 10_000;

/// Keeps freed memory for ten seconds instead of one, unless `MIMALLOC_PURGE_DELAY` says otherwise.
///
/// A prefill frees and takes the same hundreds of megabytes in every layer. What goes back to the
/// system in between comes again page by page, each page a fault and filled with zeros.
#[expect(unsafe_code, reason = "the only way to set an option of mimalloc")]
pub fn keep_freed_memory() {
    // SAFETY: takes two numbers and no pointers; an option that does not exist is ignored.
    unsafe { mi_option_set_default(PURGE_DELAY, KEPT_MS) }
}

#[cfg(test)]
mod tests {
    use libmimalloc_sys::mi_option_get;

    use super::*;

    /// Milliseconds that mimalloc keeps freed memory when nobody asks for anything else.
    const DEFAULT_MS: c_long = 1000;

    #[test]
    #[expect(unsafe_code, reason = "the only way to read an option of mimalloc")]
    fn the_option_is_the_one_that_it_is_taken_for() {
        // SAFETY: takes a number.
        let milliseconds = || unsafe { mi_option_get(PURGE_DELAY) };
        assert_eq!(milliseconds(), DEFAULT_MS);
        keep_freed_memory();
        assert_eq!(milliseconds(), KEPT_MS);
    }
}
