//! What is only looked at: drift and spans.

use std::fmt::Debug;
use std::sync::{Arc, Mutex};

use burn::tensor::{DType, Tensor};
use reducers::{Action, ReducerError, Scorer, Standing};

use tracing::field::{Field, Visit};
use tracing::span::{Attributes, Id, Record};
use tracing::{Event, Metadata, Subscriber};

use crate::support::{B, DEVICE, decoder, observed, prompt, schedule};

/// Ranks by the place in the prompt, the last first.
struct Backwards;

impl Scorer<B> for Backwards {
    fn score(&self, standing: &dyn Standing<B>) -> Result<Tensor<B, 1>, ReducerError> {
        let scores: Vec<f32> = (0..standing.rows()).map(|row| row as f32).collect();
        Ok(Tensor::from_data(scores.as_slice(), (&DEVICE, DType::F32)))
    }
}

#[test]
fn drift_is_that_of_the_rule_that_ranks() {
    let (decoder, prompt) = (decoder(3), prompt(&[9], 3));
    let schedule = schedule(Action::Reroute, &[(1, 2), (3, 2)]);
    let own = decoder.drift(Some(&Backwards), &prompt, &schedule).unwrap();
    assert_eq!(own.len(), 1);
    assert_eq!(own[0].tokens, (0..7).collect::<Vec<_>>());
    let built_in = decoder.drift(None, &prompt, &schedule).unwrap();
    let routed = observed(&decoder, &prompt, &schedule).unwrap();
    let kept = &routed.trace.decisions[0].selected;
    let waited: Vec<usize> = (0..9).filter(|token| !kept.contains(token)).collect();
    assert_eq!(built_in[0].tokens, waited);
    assert_ne!(own[0].tokens, built_in[0].tokens);
}

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
