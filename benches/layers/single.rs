//! Single measurements.

use burn::tensor::{Distribution, Tensor};
use divan::Bencher;
use reducers::{Action, Schedule, Stage};
use reroute::{Prefill, Router};
use reroute_cli::backend::Backend;

use crate::shapes::{self, DEPTH, TEXT, VISUAL};

/// Two layers of the vision tower on one image, patch embedding included.
#[divan::bench(sample_count = 5, sample_size = 1)]
fn vision_two_layers(bencher: Bencher) {
    let tower = shapes::tower();
    let pixels = Tensor::random([1, 3, 336, 336], Distribution::Default, &shapes::device());
    let run = || {
        let features = tower.patch_features(pixels.clone(), shapes::VISION_LAYERS);
        shapes::wait(features.expect("the right size"));
    };
    run();
    bencher.bench_local(run);
}

/// Prefill of 576 + 64 tokens through 16 layers.
#[divan::bench(
    args = ["dense", "fastv@128-exact", "pdrop@128-exact", "reroute-fastv@128-exact", "reroute-pdrop@128-exact"],
    sample_count = 3,
    sample_size = 1
)]
fn prefill(bencher: Bencher, preset: &str) {
    let (decoder, prompt) = (shapes::decoder(DEPTH), shapes::prompt());
    let schedule = shapes::schedule(preset);
    bencher.bench_local(|| {
        let prefill = decoder.prefill(&prompt, &schedule, Default::default());
        shapes::wait(prefill.expect("a good prompt").logits);
    });
}

/// The entry of a layer on 640 rows: input norm and keys; with a decision that keeps 128 tokens,
/// also scores, selection and gathering.
#[divan::bench(args = ["plain", "decision"], sample_count = 15, sample_size = 1)]
fn layer_entry(bencher: Bencher, kind: &str) {
    let entry = Entry::new(kind == "decision");
    entry.run();
    bencher.bench_local(|| entry.run());
}

/// What [`layer_entry`] measures.
pub struct Entry {
    decoder: reroute::Decoder<Backend>,
    prompt: reroute::Prompt<Backend>,
    schedule: Schedule,
}

impl Entry {
    /// A plain entry, or one that decides.
    pub fn new(decides: bool) -> Self {
        // A second stage, so that deferred rows are parked as they are in a prefill.
        let stages = vec![Stage::count(0, 128), Stage::count(1, 128)];
        let schedule = match decides {
            true => Schedule::new(Action::Reroute, false, stages).expect("valid"),
            false => Schedule::dense(),
        };
        Self {
            decoder: shapes::decoder(1),
            prompt: shapes::prompt(),
            schedule,
        }
    }

    /// Enters the layer and waits for keys and hidden states.
    pub fn run(&self) {
        let embeddings = self.prompt.embeddings.clone();
        let rope = &self.decoder.config().rope;
        let rope = rope.table(self.prompt.positions.clone(), embeddings.dtype());
        let mut router = Router::new(&self.prompt, &self.schedule, rope);
        let routed = router.enter(0, &self.decoder.layers()[0], embeddings);
        let routed = routed.expect("finite scores");
        shapes::wait(routed.keys);
        shapes::wait(routed.hidden_states);
    }
}

/// One token through two layers, after a prefill of 640 rows of which 640 or about 128 are cached.
#[divan::bench(args = ["dense", "routed"], sample_count = 15, sample_size = 1)]
fn decode_two_layers(bencher: Bencher, kind: &str) {
    let decoder = shapes::decoder(2);
    let schedule = match kind {
        "dense" => Schedule::dense(),
        _ => Schedule::new(Action::Remove, false, vec![Stage::count(0, 128 - TEXT)]).expect("valid"),
    };
    let prefill = decoder.prefill(&shapes::prompt(), &schedule, Default::default());
    let Prefill { mut cache, .. } = prefill.expect("a good prompt");
    assert!(cache.lengths(0)[0] <= VISUAL + TEXT);
    bencher.bench_local(|| {
        let logits = decoder.decode(&[(0, 1)], &mut cache).expect("within the context");
        shapes::wait(logits);
    });
}
