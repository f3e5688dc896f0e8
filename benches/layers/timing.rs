//! Clocks and medians.

use std::time::Instant;

use anyhow::anyhow;
use burn::tensor::Tensor;
use reroute_cli::backend::Backend;

/// Seconds that `work` takes, up to and including its wait for the device.
pub fn seconds(work: impl FnOnce() -> anyhow::Result<()>) -> anyhow::Result<f64> {
    let started = Instant::now();
    work()?;
    Ok(started.elapsed().as_secs_f64())
}

/// Median seconds of `repeats` runs after one that does not count.
pub fn median_seconds(
    repeats: usize,
    mut work: impl FnMut() -> anyhow::Result<()>,
) -> anyhow::Result<f64> {
    work()?;
    let times: anyhow::Result<Vec<f64>> = (0..repeats).map(|_| seconds(&mut work)).collect();
    Ok(median(times?))
}

/// Waits for a small tensor by reading it, and checks that it holds numbers: a benchmark of NaN
/// measures nothing.
pub fn wait<const D: usize>(tensor: Tensor<Backend, D>) -> anyhow::Result<()> {
    let data = tensor
        .try_into_data()
        .map_err(|error| anyhow!("the device cannot compute: {error:?}"))?;
    match data.iter::<f32>().all(f32::is_finite) {
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
