//! What a server counts, as Prometheus reads it.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use burn::tensor::backend::Backend;
use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::encoding::text::encode;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::Histogram;
use prometheus_client::registry::{Registry, Unit};
use reroute_zoo::reducers::Schedule;
use reroute_zoo::{Answer, Vlm};

/// Bounds in seconds.
const SECONDS: [f64; 14] = [
    0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0,
];
const TOKENS: [f64; 10] = [
    8.0, 16.0, 32.0, 64.0, 128.0, 192.0, 288.0, 576.0, 1280.0, 5120.0,
];
const SHARES: [f64; 10] = [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0];

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct OfOutcome {
    outcome: &'static str,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct OfRouting {
    routing: String,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct OfModel {
    model: String,
}

type Routings = Family<OfRouting, Histogram, fn() -> Histogram>;

/// All counters of a server.
#[derive(Debug)]
pub(crate) struct Metrics {
    registry: Registry,
    requests: Family<OfOutcome, Counter>,
    under_way: Gauge,
    waiting: Family<OfModel, Gauge>,
    running: Family<OfModel, Gauge>,
    kv_bytes: Family<OfModel, Gauge>,
    inbox_bytes: Gauge,
    prompt_tokens: Counter,
    pub(crate) generated_tokens: Counter,
    vision: Histogram,
    prefill: Histogram,
    decode: Histogram,
    visual_tokens: Routings,
    flops_share: Routings,
}

/// How a request ends, counted once: without a word it was cancelled, for who asked has gone.
#[derive(Debug)]
pub(crate) struct Ticket {
    metrics: Arc<Metrics>,
    told: AtomicBool,
}

impl Ticket {
    pub(crate) fn new(metrics: Arc<Metrics>) -> Self {
        metrics.under_way.inc();
        let told = AtomicBool::new(false);
        Self { metrics, told }
    }

    pub(crate) fn end(&self, outcome: &'static str) {
        if !self.told.swap(true, Ordering::Relaxed) {
            self.metrics
                .requests
                .get_or_create(&OfOutcome { outcome })
                .inc();
            self.metrics.under_way.dec();
        }
    }
}

impl Drop for Ticket {
    fn drop(&mut self) {
        self.end("cancelled");
    }
}

impl Metrics {
    pub(crate) fn new() -> Self {
        let seconds = || Histogram::new(SECONDS);
        let metrics = Self {
            registry: Registry::with_prefix("reroute"),
            requests: Family::default(),
            under_way: Gauge::default(),
            waiting: Family::default(),
            running: Family::default(),
            kv_bytes: Family::default(),
            inbox_bytes: Gauge::default(),
            prompt_tokens: Counter::default(),
            generated_tokens: Counter::default(),
            vision: seconds(),
            prefill: seconds(),
            decode: seconds(),
            visual_tokens: Family::new_with_constructor(|| Histogram::new(TOKENS)),
            flops_share: Family::new_with_constructor(|| Histogram::new(SHARES)),
        };
        metrics.registered()
    }

    fn registered(mut self) -> Self {
        let to = &mut self.registry;
        to.register(
            "requests",
            "Requests by how they ended",
            self.requests.clone(),
        );
        let help = "Requests that have come and not ended";
        to.register("requests_under_way", help, self.under_way.clone());
        let help = "Requests that wait for the running batch";
        to.register("queue_length", help, self.waiting.clone());
        let help = "Answers that are generated side by side";
        to.register("running_answers", help, self.running.clone());
        let help = "Keys and values of running answers, and caches";
        to.register_with_unit("kv", help, Unit::Bytes, self.kv_bytes.clone());
        let help = "Bodies and pictures of requests under way";
        to.register_with_unit("inbox", help, Unit::Bytes, self.inbox_bytes.clone());
        let help = "Rows of prompts that were answered";
        to.register("prompt_tokens", help, self.prompt_tokens.clone());
        let help = "Tokens that were generated";
        to.register("generated_tokens", help, self.generated_tokens.clone());
        let help = "Vision tower and projector of a request";
        to.register_with_unit("vision", help, Unit::Seconds, self.vision.clone());
        let help = "The prompt of a request through the decoder";
        to.register_with_unit("prefill", help, Unit::Seconds, self.prefill.clone());
        let help = "The tokens of an answer, side by side with those of others";
        to.register_with_unit("decode", help, Unit::Seconds, self.decode.clone());
        let help = "Visual tokens that a layer works on, on average over the layers of a prompt";
        to.register("visual_tokens_per_layer", help, self.visual_tokens.clone());
        let help = "FLOPs of a prefill as a share of the dense model's";
        to.register("flops_share", help, self.flops_share.clone());
        self
    }

    /// An answer has ended. The prompt is counted with the first of a request.
    pub(crate) fn answered<B: Backend>(
        &self,
        vlm: &Vlm<B>,
        (routing, schedule): (&str, &Schedule),
        answer: &Answer,
        is_first: bool,
    ) {
        self.decode.observe(answer.timings.decode.as_secs_f64());
        if !is_first {
            return;
        }
        self.prompt_tokens.inc_by(answer.prompt_rows as u64);
        self.vision.observe(answer.timings.vision.as_secs_f64());
        self.prefill.observe(answer.timings.prefill.as_secs_f64());
        let routing = OfRouting {
            routing: routing.to_owned(),
        };
        let (cost, dense) = vlm.costs(schedule, answer);
        let tokens = self.visual_tokens.get_or_create(&routing);
        tokens.observe(cost.average_tokens());
        let share = self.flops_share.get_or_create(&routing);
        share.observe(cost.total_flops() / dense.total_flops());
    }

    /// What a model does at the moment: requests that wait, answers that run, bytes.
    pub(crate) fn load(&self, model: &str, (waiting, running): (usize, usize), bytes: u64) {
        let model = OfModel {
            model: model.to_owned(),
        };
        self.waiting.get_or_create(&model).set(waiting as i64);
        self.running.get_or_create(&model).set(running as i64);
        self.kv_bytes.get_or_create(&model).set(bytes as i64);
    }

    /// Everything as text.
    pub(crate) fn text(&self, inbox_bytes: u64) -> String {
        self.inbox_bytes.set(inbox_bytes as i64);
        let mut text = String::new();
        // Writing into a string does not fail.
        let _ = encode(&mut text, &self.registry);
        text
    }
}
