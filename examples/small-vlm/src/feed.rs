//! What steps learn from, made in a thread of its own while the step before is computed.

use std::ops::Range;
use std::sync::mpsc::{Receiver, sync_channel};
use std::thread::Scope;

use anyhow::Result;

/// Steps that are made ahead.
const AHEAD: usize = 3;

/// Makes something for every step, in order; it ends when nobody listens.
pub fn feed<'s, 'e, T: Send + 's>(
    scope: &'s Scope<'s, 'e>,
    steps: Range<usize>,
    make: impl Fn(usize) -> Result<T> + Send + 's,
) -> Receiver<Result<T>> {
    let (sender, receiver) = sync_channel(AHEAD);
    scope.spawn(move || {
        for step in steps {
            let made = make(step);
            let failed = made.is_err();
            if sender.send(made).is_err() || failed {
                return;
            }
        }
    });
    receiver
}
