//! One more token: bound by reading the weights once, so measured in bytes per second. In every type
//! that the backend computes in; beside it, the prefill before it.

use burn::module::Module;
use burn::tensor::DType;
use reducers::Schedule;
use reroute::KvCache;
use reroute_cli::backend::{self, Backend};
use serde::Serialize;

use crate::model::Model;
use crate::options::Options;
use crate::peak::bandwidth;
use crate::setup::Setup;
use crate::timing::{Spread, repeated_seconds, seconds, wait};

/// The method of the routed cache.
const METHOD: &str = "reroute-pdrop";

/// Tokens of a round.
const TOKENS: usize = 4;

/// Times of one decoded token.
#[derive(Serialize)]
pub struct Row {
    dtype: String,
    cache: String,
    /// The prefill that leaves this cache.
    prefill_ms: Spread,
    ms: Spread,
    /// Bytes of the weights, and of the keys and values attended to.
    bytes: u64,
    bytes_per_second: f64,
    /// Bandwidth of a large read before and after these tokens, the mean: a token writes next to nothing.
    read_bytes_per_second: f64,
    /// Of that.
    of_peak: f64,
}

/// Measures every type that the backend computes in, after a dense and a routed prefill in turn.
pub fn run(setup: &Setup, model: &Model, options: &Options) -> anyhow::Result<Vec<Row>> {
    let budget = options.budgets[0];
    let schedules = [
        ("dense".to_string(), Schedule::dense()),
        (
            format!("{METHOD}@{budget}"),
            setup.schedule(METHOD, budget)?,
        ),
    ];
    println!("\nDecoding one token");
    println!(
        "{:<6} {:<18} {:>22} {:>24} {:>9} {:>9} {:>9} {:>8}",
        "type", "cache", "prefill ms", "ms", "MiB read", "GB/s", "peak", "of peak"
    );
    let mut rows = Vec::new();
    for dtype in backend::dtypes(&setup.device()) {
        let cast;
        let setup = match dtype {
            DType::F32 => setup,
            _ => {
                cast = setup.cast(model, dtype);
                &cast
            }
        };
        let mut caches = Vec::new();
        for (_, schedule) in &schedules {
            let mut cache = setup.nothing_cached();
            let prefill = repeated_seconds(options.rounds(), || {
                cache = setup.prefill(schedule)?.cache;
                Ok(())
            })?;
            next_token(setup, &mut cache)?;
            caches.push((cache, prefill, Vec::new()));
        }
        let [before, _] = bandwidth(&setup.device(), options)?;
        for _ in 0..options.rounds() * TOKENS {
            for (cache, _, times) in &mut caches {
                times.push(next_token(setup, cache)?);
            }
        }
        let [after, _] = bandwidth(&setup.device(), options)?;
        let read_bytes_per_second = before.midpoint(after);
        for ((name, _), (cache, prefill, times)) in schedules.iter().zip(caches) {
            let kv: u64 = cache.bytes(0).iter().sum();
            let ms = Spread::milliseconds(&times);
            let bytes = weight_bytes(setup, dtype) + kv;
            let bytes_per_second = bytes as f64 / ms.median * 1e3;
            rows.push(Row {
                dtype: format!("{dtype:?}").to_lowercase(),
                cache: name.clone(),
                prefill_ms: Spread::milliseconds(&prefill),
                ms,
                bytes,
                bytes_per_second,
                read_bytes_per_second,
                of_peak: bytes_per_second / read_bytes_per_second,
            });
        }
    }
    rows.iter().for_each(Row::print);
    Ok(rows)
}

/// Seconds of one more token.
pub fn next_token(setup: &Setup, cache: &mut KvCache<Backend>) -> anyhow::Result<f64> {
    seconds(|| wait(setup.decoder.decode(&[(0, 1)], cache)?))
}

/// Bytes of what a token is multiplied with: all layers, and the head, which is as large as the
/// embedding table, of which one row is read.
fn weight_bytes(setup: &Setup, dtype: DType) -> u64 {
    let config = setup.decoder.config();
    let layers: usize = setup.decoder.layers().iter().map(Module::num_params).sum();
    ((layers + config.vocab_size * config.hidden_size) * dtype.size()) as u64
}

impl Row {
    fn print(&self) {
        println!(
            "{:<6} {:<18} {:>22} {:>24} {:>9.0} {:>9.1} {:>9.1} {:>6.0} %",
            self.dtype,
            self.cache,
            self.prefill_ms.show(0),
            self.ms.show(1),
            self.bytes as f64 / f64::from(1 << 20),
            self.bytes_per_second / 1e9,
            self.read_bytes_per_second / 1e9,
            100.0 * self.of_peak,
        );
    }
}
