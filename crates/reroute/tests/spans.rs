//! What `tracing` is told. Alone in its process, so that no other thread meets a span first.

use std::fmt::Debug;
use std::sync::{Arc, Mutex};

use reducers::Action;
use tracing::field::{Field, Visit};
use tracing::span::{Attributes, Id, Record};
use tracing::{Event, Metadata, Subscriber};

use crate::support::{decoder, observed, prompt, schedule};

#[expect(dead_code, reason = "the decoder tests use the rest")]
#[path = "decoder/support.rs"]
mod support;

/// Writes down the spans in order of their beginning, each with its fields.
#[derive(Clone, Default)]
struct Spans(Arc<Mutex<Vec<String>>>);

struct Fields<'a>(&'a mut String);

impl Visit for Fields<'_> {
    fn record_debug(&mut self, field: &Field, value: &dyn Debug) {
        self.0.push_str(&format!(" {field}={value:?}"));
    }
}

impl Subscriber for Spans {
    /// Other crates have spans too.
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        metadata.target().starts_with("reroute::")
    }

    fn new_span(&self, span: &Attributes<'_>) -> Id {
        let mut spans = self.0.lock().unwrap();
        let mut text = span.metadata().name().to_string();
        span.record(&mut Fields(&mut text));
        spans.push(text);
        Id::from_u64(spans.len() as u64)
    }

    fn record(&self, span: &Id, values: &Record<'_>) {
        let text = &mut self.0.lock().unwrap()[span.into_u64() as usize - 1];
        values.record(&mut Fields(text));
    }

    fn record_follows_from(&self, _: &Id, _: &Id) {}
    fn event(&self, _: &Event<'_>) {}
    fn enter(&self, _: &Id) {}
    fn exit(&self, _: &Id) {}
}

#[test]
fn spans_say_what_is_done() {
    let spans = Spans::default();
    tracing::subscriber::with_default(spans.clone(), || {
        let decoder = decoder(1);
        let schedule = schedule(Action::Reroute, &[(1, 2), (3, 1)]);
        let turn = observed(&decoder, &prompt(&[9, 4], 1), &schedule);
        let mut cache = turn.unwrap().cache;
        decoder.decode(&[(0, 1), (1, 1)], &mut cache).unwrap();
    });
    assert_eq!(
        *spans.0.lock().unwrap(),
        [
            "prefill samples=2 rows=23",
            "decision layer=1 candidates=13 kept=4",
            "decision layer=3 candidates=13 kept=2",
            "decode tokens=2",
        ]
    );
}
