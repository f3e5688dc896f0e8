//! What the device can do at best, measured in the same run: the ceilings of everything else.

use std::hint::black_box;
use std::thread;

use burn::tensor::{Distribution, Tensor};
use reroute_cli::backend::{self, Backend, Device};
use serde::Serialize;

use crate::options::Options;
use crate::timing::{repeated_seconds, wait_for_one};

const REPEATS: usize = 5;

/// The fastest of several large operations.
#[derive(Debug, Clone, Copy, Serialize)]
pub struct Peak {
    /// Floating-point operations of a matrix product.
    pub flops_per_second: f64,
    /// Bytes that are only read.
    pub read_bytes_per_second: f64,
    /// Bytes of a copy, those read and those written.
    pub copied_bytes_per_second: f64,
}

impl Peak {
    /// Measures and prints it.
    pub fn measure(device: &Device, options: &Options) -> anyhow::Result<Self> {
        let side = if options.smoke { 64 } else { 4096 };
        let [read, copied] = bandwidth(device, options)?;
        let peak = Self {
            flops_per_second: product(side, device)?,
            read_bytes_per_second: read,
            copied_bytes_per_second: copied,
        };
        println!(
            "Peak of this device: {:.0} GFLOP/s in a {side}×{side} f32 product; {:.1} GB/s read, {:.1} GB/s copied",
            peak.flops_per_second / 1e9,
            read / 1e9,
            copied / 1e9,
        );
        Ok(peak)
    }
}

/// Bytes a second that are only read, and of a copy, those read and those written.
pub fn bandwidth(device: &Device, options: &Options) -> anyhow::Result<[f64; 2]> {
    let bytes = if options.smoke { 1 << 16 } else { 1 << 30 };
    match backend::ON_HOST {
        true => host_bandwidth(bytes),
        false => device_bandwidth(bytes, device),
    }
}

fn fastest(work: impl FnMut() -> anyhow::Result<()>) -> anyhow::Result<f64> {
    let times = repeated_seconds(REPEATS, work)?;
    Ok(times.into_iter().fold(f64::INFINITY, f64::min))
}

fn product(side: usize, device: &Device) -> anyhow::Result<f64> {
    let random = || Tensor::<Backend, 2>::random([side; 2], Distribution::Default, device);
    let (a, b) = (random(), random());
    let time = fastest(|| wait_for_one(a.clone().matmul(b.clone())))?;
    Ok(2.0 * (side as f64).powi(3) / time)
}

/// Reading and copying by tensor operations that do nothing else.
fn device_bandwidth(bytes: usize, device: &Device) -> anyhow::Result<[f64; 2]> {
    let values = Tensor::<Backend, 1>::ones([bytes / size_of::<f32>()], device);
    let read = fastest(|| wait_for_one(values.clone().sum()))?;
    let copied = fastest(|| wait_for_one(values.clone().neg()))?;
    Ok([bytes as f64 / read, 2.0 * bytes as f64 / copied])
}

/// Reading and copying plain memory with all threads: no backend's element-wise operations are as
/// fast, its products are.
fn host_bandwidth(bytes: usize) -> anyhow::Result<[f64; 2]> {
    let threads = thread::available_parallelism().map_or(1, usize::from);
    let words = bytes / size_of::<u64>();
    let part = words.div_ceil(threads);
    let source = vec![1u64; words];
    let mut target = vec![0u64; words];
    let read = fastest(|| {
        thread::scope(|scope| {
            for part in source.chunks(part) {
                scope.spawn(|| {
                    black_box(part.iter().fold(0u64, |sum, word| sum.wrapping_add(*word)))
                });
            }
        });
        Ok(())
    })?;
    let copied = fastest(|| {
        thread::scope(|scope| {
            for (source, target) in source.chunks(part).zip(target.chunks_mut(part)) {
                scope.spawn(|| black_box(target).copy_from_slice(source));
            }
        });
        Ok(())
    })?;
    Ok([bytes as f64 / read, 2.0 * bytes as f64 / copied])
}
