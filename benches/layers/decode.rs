//! One more token: bound by reading the weights once, so measured beside a large read. In every type
//! that the backend computes in; with the prefill before it.

use burn::module::Module;
use burn::tensor::DType;
use reducers::Schedule;
use reroute::{Decoder, KvCache};
use reroute_cli::backend::{self, Backend};
use serde::Serialize;

use crate::model::Model;
use crate::options::Options;
use crate::peak::Memory;
use crate::setup::{Setup, dtype_name};
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
    /// Of a large read in every round: a token writes next to nothing.
    read_bytes_per_second: Spread,
    /// Of it, in the same round.
    of_read: Spread,
    /// Times as fast as f32 in the same round.
    speedup_over_f32: Spread,
}

/// Measures every type that the backend computes in, after a dense and after a routed prefill. In
/// each round every one of them decodes a token and a large memory is read: what others on the machine
/// take of its bandwidth, they take from all.
pub fn run(setup: &Setup, model: &Model, options: &Options) -> anyhow::Result<Vec<Row>> {
    let budget = options.budgets[0];
    let schedules = [
        ("dense".to_string(), Schedule::dense()),
        (
            format!("{METHOD}@{budget}"),
            setup.schedule(METHOD, budget)?,
        ),
    ];
    // Codes are one type more; floats are measured in all types without them.
    let dtypes = match setup.kind.codes() {
        Some(_) => vec![setup.dtype()],
        None => backend::dtypes(&setup.device()),
    };
    let casts = dtypes.into_iter().map(|dtype| {
        let cast = (dtype != setup.dtype())
            .then(|| setup.cast(model, dtype))
            .transpose()?;
        anyhow::Ok((dtype, cast))
    });
    let casts: Vec<_> = casts.collect::<anyhow::Result<_>>()?;
    let mut decodings = Vec::new();
    for (dtype, cast) in &casts {
        for (name, schedule) in &schedules {
            let setup = cast.as_ref().unwrap_or(setup);
            decodings.push(Decoding::new(setup, *dtype, name, schedule, options)?);
        }
    }
    let memory = Memory::new(&setup.device(), options);
    let mut reads = Vec::new();
    for _ in 0..options.rounds() * TOKENS {
        reads.push(memory.read()?);
        for decoding in &mut decodings {
            decoding
                .times
                .push(next_token(&decoding.setup.decoder, &mut decoding.cache)?);
        }
    }
    let read = Spread::of(&reads);
    println!(
        "\nDecoding one token; a large read beside it: {:.1} GB/s",
        read.median / 1e9
    );
    println!(
        "{:<6} {:<18} {:>22} {:>24} {:>9} {:>9} {:>22} {:>20}",
        "type", "cache", "prefill ms", "ms", "MiB read", "GB/s", "% of the read", "× f32"
    );
    let rows: Vec<Row> = decodings
        .iter()
        .map(|decoding| {
            // Types come in the same order for every cache, f32 first.
            let same = |other: &&Decoding| other.cache_name == decoding.cache_name;
            let f32 = decodings.iter().find(same).unwrap_or(decoding);
            decoding.row(&f32.times, &reads)
        })
        .collect();
    rows.iter().for_each(Row::print);
    Ok(rows)
}

/// A cache that grows by a token in every round.
struct Decoding<'a> {
    setup: &'a Setup,
    dtype: DType,
    cache_name: &'a str,
    cache: KvCache<Backend>,
    prefill: Vec<f64>,
    times: Vec<f64>,
}

impl<'a> Decoding<'a> {
    /// Prefills, and decodes the first token, which does not count.
    fn new(
        setup: &'a Setup,
        dtype: DType,
        cache_name: &'a str,
        schedule: &Schedule,
        options: &Options,
    ) -> anyhow::Result<Self> {
        let mut cache = setup.nothing_cached()?;
        let prefill = repeated_seconds(options.rounds(), || {
            cache = setup.prefill(schedule)?.cache;
            Ok(())
        })?;
        next_token(&setup.decoder, &mut cache)?;
        Ok(Self {
            setup,
            dtype,
            cache_name,
            cache,
            prefill,
            times: Vec::new(),
        })
    }

    /// Beside f32 and large reads of the same rounds.
    fn row(&self, f32: &[f64], reads: &[f64]) -> Row {
        let kv: u64 = self.cache.bytes(0).iter().sum();
        let bytes = weight_bytes(self.setup, self.dtype) + kv;
        let ms = Spread::milliseconds(&self.times);
        let rounds = self.times.iter();
        let of_read = rounds
            .clone()
            .zip(reads)
            .map(|(time, read)| bytes as f64 / time / read);
        let speedups = rounds.zip(f32).map(|(time, f32)| f32 / time);
        Row {
            dtype: match self.setup.kind.codes() {
                Some(_) => self.setup.kind.name().into(),
                None => dtype_name(self.dtype),
            },
            cache: self.cache_name.to_string(),
            prefill_ms: Spread::milliseconds(&self.prefill),
            ms,
            bytes,
            bytes_per_second: bytes as f64 / ms.median * 1e3,
            read_bytes_per_second: Spread::of(reads),
            of_read: Spread::of(&of_read.collect::<Vec<_>>()),
            speedup_over_f32: Spread::of(&speedups.collect::<Vec<_>>()),
        }
    }
}

/// Seconds of one more token.
pub fn next_token(decoder: &Decoder<Backend>, cache: &mut KvCache<Backend>) -> anyhow::Result<f64> {
    seconds(|| wait(decoder.decode(&[(0, 1)], cache)?))
}

/// Bytes of what a token is multiplied with: all layers, and the head, which is as large as the
/// embedding table, of which one row is read.
fn weight_bytes(setup: &Setup, dtype: DType) -> u64 {
    let config = setup.decoder.config();
    let layers: usize = setup.decoder.layers().iter().map(Module::num_params).sum();
    let floats = (layers + config.vocab_size * config.hidden_size) * dtype.size();
    (floats + setup.code_bytes()) as u64
}

impl Row {
    fn print(&self) {
        let percent = Spread {
            median: 100.0 * self.of_read.median,
            least: 100.0 * self.of_read.least,
            most: 100.0 * self.of_read.most,
            ..self.of_read
        };
        println!(
            "{:<6} {:<18} {:>22} {:>24} {:>9.0} {:>9.1} {:>22} {:>20}",
            self.dtype,
            self.cache,
            self.prefill_ms.show(0),
            self.ms.show(1),
            self.bytes as f64 / f64::from(1 << 20),
            self.bytes_per_second / 1e9,
            percent.show(0),
            self.speedup_over_f32.show(2),
        );
    }
}
