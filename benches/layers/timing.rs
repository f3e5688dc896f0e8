//! Clocks, medians and peaks of memory.

use std::time::Instant;

use anyhow::anyhow;
use burn::tensor::Tensor;
use peakmem_alloc::PeakMemAllocTrait;
use reroute_cli::backend::{self, Backend};
use serde::Serialize;

use crate::HEAP;

/// What several runs gave.
#[derive(Debug, Clone, Copy, Serialize)]
pub struct Spread {
    /// The middle run; the mean of the two in the middle if their number is even.
    pub median: f64,
    /// The least.
    pub least: f64,
    /// The most.
    pub most: f64,
    /// How many there were.
    pub runs: usize,
}

impl Spread {
    /// Of at least one value.
    pub fn of(values: &[f64]) -> Self {
        Self {
            median: median(values.to_vec()),
            least: values.iter().copied().fold(f64::INFINITY, f64::min),
            most: values.iter().copied().fold(f64::NEG_INFINITY, f64::max),
            runs: values.len(),
        }
    }

    /// Seconds as milliseconds.
    pub fn milliseconds(seconds: &[f64]) -> Self {
        Self::of(seconds).times(1e3)
    }

    /// In another unit.
    pub fn times(self, factor: f64) -> Self {
        Self {
            median: self.median * factor,
            least: self.least * factor,
            most: self.most * factor,
            ..self
        }
    }

    /// `12.3 (11.9–14.0)`, with so many digits after the point.
    pub fn show(&self, digits: usize) -> String {
        format!(
            "{:.digits$} ({:.digits$}–{:.digits$})",
            self.median, self.least, self.most
        )
    }
}

/// Seconds that `work` takes, up to and including its wait for the device.
pub fn seconds(work: impl FnOnce() -> anyhow::Result<()>) -> anyhow::Result<f64> {
    let started = Instant::now();
    work()?;
    Ok(started.elapsed().as_secs_f64())
}

/// The seconds of `repeats` runs after one that does not count.
pub fn repeated_seconds(
    repeats: usize,
    mut work: impl FnMut() -> anyhow::Result<()>,
) -> anyhow::Result<Vec<f64>> {
    work()?;
    (0..repeats).map(|_| seconds(&mut work)).collect()
}

/// What `peak_bytes` are, in every report. CubeCL tells what its pools hold in pages of up to a quarter
/// of a card's memory, and nothing of peaks.
pub const PEAK_MEMORY: &str = if backend::ON_HOST {
    "growth of the heap during a run, at its peak: beyond its input and the weights"
} else {
    "not measured on this backend: it has no counter of peaks"
};

/// Seconds, and the bytes by which the heap grew at its peak: what a run needs beyond its input and
/// the weights. `None` where tensors lie in the memory of a device of its own.
pub fn seconds_and_peak(
    work: impl FnOnce() -> anyhow::Result<()>,
) -> anyhow::Result<(f64, Option<usize>)> {
    HEAP.reset_peak_memory();
    let seconds = seconds(work)?;
    let grown = HEAP.get_peak_memory();
    Ok((seconds, backend::ON_HOST.then_some(grown)))
}

/// Waits for a small tensor by reading it, and checks that it holds numbers: a benchmark of NaN
/// measures nothing.
pub fn wait<const D: usize>(tensor: Tensor<Backend, D>) -> anyhow::Result<()> {
    let data = tensor
        .try_into_data()
        .map_err(|error| anyhow!("the device cannot compute: {error:?}"))?;
    match data.convert::<f32>().iter::<f32>().all(f32::is_finite) {
        true => Ok(()),
        false => Err(anyhow!("a result is not finite")),
    }
}

/// Waits for a tensor of any size by reading one value of it.
pub fn wait_for_one<const D: usize>(tensor: Tensor<Backend, D>) -> anyhow::Result<()> {
    let one = tensor.dims().map(|_| 0..1);
    wait(tensor.slice(one))
}

/// The middle value; the mean of the two in the middle if their number is even.
pub fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    let (low, high) = (values.len().saturating_sub(1) / 2, values.len() / 2);
    match (values.get(low), values.get(high)) {
        (Some(low), Some(high)) => low.midpoint(*high),
        _ => f64::NAN,
    }
}

/// Mebibytes of a peak, where the backend lets it be measured.
pub fn mebibytes(bytes: Option<usize>) -> String {
    bytes.map_or("unmeasured".into(), |bytes| {
        format!("{:.0}", bytes as f64 / f64::from(1 << 20))
    })
}

/// Mebibytes of a cache, `64.0 of 64.0` that were predicted.
pub fn kv_mebibytes(bytes: u64, predicted: u64) -> String {
    let [bytes, predicted] = [bytes, predicted].map(|bytes| bytes as f64 / f64::from(1 << 20));
    format!("{bytes:.1} of {predicted:.1}")
}
