//! How long loading takes beside reading the files once.
//!
//! `cargo run --release -p reroute-checkpoint --example load_speed -- read|keep|load FOLDER [f32|f16|bf16]`, with
//! the page cache warm or dropped before. `read` reads all bytes into one small buffer, `keep` into memory
//! that is kept, as every program that copies its weights must; `load` loads all tensors as the type, f32 if none
//! is said, then uses every page of them, which for mapped files is when they are read.

use std::fs::File;
use std::io::Read;
use std::path::Path;
use std::time::Instant;

use burn::tensor::{DType, TensorData};
use reroute_checkpoint::{CheckpointError, Folder, Layout, Shards};

/// Bytes that are read at once, as the library does.
const BLOCK_BYTES: usize = 1 << 20;
/// Bytes in one page of memory.
const PAGE: usize = 4096;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let mut args = std::env::args().skip(1);
    let (Some(mode), Some(path)) = (args.next(), args.next()) else {
        return Err("give read, keep or load, and the folder of a checkpoint".into());
    };
    let dtype = match args.next().as_deref() {
        None | Some("f32") => DType::F32,
        Some("f16") => DType::F16,
        Some("bf16") => DType::BF16,
        Some(other) => return Err(format!("{other} is none of f32, f16 and bf16").into()),
    };
    let shards = Shards::open(&Folder::open(&path)?)?;
    let start = Instant::now();
    match mode.as_str() {
        "read" => shards.files().try_for_each(read)?,
        "keep" => drop(
            shards
                .files()
                .map(std::fs::read)
                .collect::<Result<Vec<_>, _>>()?,
        ),
        _ => {
            let tensors = load(&shards, dtype)?;
            println!("loaded after {:.2} s", start.elapsed().as_secs_f64());
            let sum: u64 = tensors.iter().map(one_byte_per_page).sum();
            let kept: usize = tensors.iter().map(|data| data.as_bytes().len()).sum();
            let kept = kept as f64 / 2_f64.powi(30);
            println!("used, sum {sum}; {kept:.2} GiB stay; {}", memory());
        }
    }
    let (seconds, gib) = (
        start.elapsed().as_secs_f64(),
        shards.total_bytes() as f64 / 2_f64.powi(30),
    );
    println!("{mode} {path}: {gib:.2} GiB in {seconds:.2} s");
    Ok(())
}

fn read(file: &Path) -> std::io::Result<()> {
    let (mut file, mut buffer) = (File::open(file)?, vec![0; BLOCK_BYTES]);
    while file.read(&mut buffer)? > 0 {}
    Ok(())
}

/// All weights, as a module would hold them.
fn load(shards: &Shards, dtype: DType) -> Result<Vec<TensorData>, CheckpointError> {
    let names = shards.names();
    let tensors = names.map(|name| shards.read(name, dtype, Layout::AsStored));
    tensors.collect()
}

fn one_byte_per_page(data: &TensorData) -> u64 {
    let bytes = data.as_bytes().iter().step_by(PAGE);
    bytes.copied().map(u64::from).sum()
}

/// The most memory held so far, and what of it is a mapping of files, where the system tells.
fn memory() -> String {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let wanted = |line: &&str| line.starts_with("VmHWM") || line.starts_with("RssFile");
    let lines: Vec<&str> = status.lines().filter(wanted).collect();
    lines.join(", ").replace('\t', " ")
}
