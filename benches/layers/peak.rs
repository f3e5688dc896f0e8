//! What the device can do at best, measured in the same run: the ceilings of everything else.

use std::hint::black_box;
use std::thread;
use std::time::Instant;

use burn::tensor::{Distribution, Tensor};
use reroute_cli::backend::{self, Backend, Device};
use serde::Serialize;

use crate::options::Options;
use crate::setup::dtype_name;
use crate::timing::{repeated_seconds, seconds, wait_for_one};

const REPEATS: usize = 5;

/// The fastest of several large operations.
#[derive(Debug, Clone, Copy, Serialize)]
pub struct Peak {
    /// Floating-point operations of a matrix product in the type that is measured.
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
        let memory = Memory::new(device, options);
        let read = (0..REPEATS).map(|_| memory.read());
        let read = read.collect::<anyhow::Result<Vec<_>>>()?;
        let read = read.into_iter().fold(0.0, f64::max);
        let copied = memory.copied()?;
        let peak = Self {
            flops_per_second: product(side, options, device)?,
            read_bytes_per_second: read,
            copied_bytes_per_second: copied,
        };
        println!(
            "Peak of this device: {:.0} GFLOP/s in a {side}×{side} {} product; {:.1} GB/s read, {:.1} GB/s copied",
            peak.flops_per_second / 1e9,
            dtype_name(options.dtype.floats()),
            read / 1e9,
            copied / 1e9,
        );
        Ok(peak)
    }
}

fn fastest(work: impl FnMut() -> anyhow::Result<()>) -> anyhow::Result<f64> {
    let times = repeated_seconds(REPEATS, work)?;
    Ok(times.into_iter().fold(f64::INFINITY, f64::min))
}

fn product(side: usize, options: &Options, device: &Device) -> anyhow::Result<f64> {
    let random = || {
        let numbers = Tensor::<Backend, 2>::random([side; 2], Distribution::Default, device);
        numbers.cast(options.dtype.floats())
    };
    let (a, b) = (random(), random());
    let time = fastest(|| wait_for_one(a.clone().matmul(b.clone())))?;
    Ok(2.0 * (side as f64).powi(3) / time)
}

/// Far more memory than any cache holds, to be read and copied.
///
/// On the host plain memory with all threads: no backend's element-wise operations are as fast, its
/// products are. On a device by tensor operations that do nothing else.
pub struct Memory {
    words: Vec<u64>,
    values: Tensor<Backend, 1>,
    bytes: f64,
}

impl Memory {
    /// Fills it.
    pub fn new(device: &Device, options: &Options) -> Self {
        let bytes = if options.smoke { 1 << 16 } else { 1 << 30 };
        let (host, other) = if backend::ON_HOST {
            (bytes, 4)
        } else {
            (0, bytes)
        };
        Self {
            words: vec![1; host / size_of::<u64>()],
            values: Tensor::ones([other / size_of::<f32>()], device),
            bytes: bytes as f64,
        }
    }

    /// Bytes a second that are only read. On the host the best of one, two and four streams in each
    /// thread: what is best differs by processor.
    pub fn read(&self) -> anyhow::Result<f64> {
        let time = match backend::ON_HOST {
            true => [read_all::<1>, read_all::<2>, read_all::<4>]
                .map(|read| {
                    let started = Instant::now();
                    read(&self.words);
                    started.elapsed().as_secs_f64()
                })
                .into_iter()
                .fold(f64::INFINITY, f64::min),
            false => seconds(|| wait_for_one(self.values.clone().sum()))?,
        };
        Ok(self.bytes / time)
    }

    /// Bytes a second of a copy, those read and those written.
    fn copied(&self) -> anyhow::Result<f64> {
        let mut target = vec![0; self.words.len()];
        let time = fastest(|| match backend::ON_HOST {
            true => {
                copy_all(&self.words, &mut target);
                Ok(())
            }
            false => wait_for_one(self.values.clone().neg()),
        })?;
        Ok(2.0 * self.bytes / time)
    }
}

/// Words of a thread.
fn part(words: &[u64]) -> usize {
    let threads = thread::available_parallelism().map_or(1, usize::from);
    words.len().div_ceil(threads).max(1)
}

fn copy_all(source: &[u64], target: &mut [u64]) {
    let part = part(source);
    thread::scope(|scope| {
        for (source, target) in source.chunks(part).zip(target.chunks_mut(part)) {
            scope.spawn(|| black_box(target).copy_from_slice(source));
        }
    });
}

/// Reads with all threads, each so many streams at a time.
fn read_all<const STREAMS: usize>(words: &[u64]) {
    thread::scope(|scope| {
        for part in words.chunks(part(words)) {
            scope.spawn(|| black_box(sum::<STREAMS>(part)));
        }
    });
}

/// The sum of whole cache lines.
fn sum<const STREAMS: usize>(words: &[u64]) -> u64 {
    /// Words of a line, and independent sums.
    const LINE: usize = 8;
    let (lines, _) = words.as_chunks::<LINE>();
    let stream = lines.len() / STREAMS;
    let mut sums = [[0u64; LINE]; STREAMS];
    for at in 0..stream {
        for (number, sums) in sums.iter_mut().enumerate() {
            let line = &lines[number * stream + at];
            for (sum, word) in sums.iter_mut().zip(line) {
                *sum = sum.wrapping_add(*word);
            }
        }
    }
    sums.as_flattened()
        .iter()
        .fold(0, |sum, word| sum.wrapping_add(*word))
}
