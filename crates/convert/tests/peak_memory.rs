//! Memory does not grow with the model.

#![cfg(target_os = "linux")] // Other systems do not tell the peak.

use std::fs::{self, File};
use std::path::Path;
use std::process::Command;

use tempfile::TempDir;

const MIB: u64 = 1 << 20;

/// A checkpoint of so many f32 tensors of so many bytes: a hole in a file, read as zeros.
fn checkpoint(folder: &Path, tensors: u64, bytes: u64) {
    let entries = (0..tensors).map(|at| {
        let (start, end) = (at * bytes, (at + 1) * bytes);
        format!(
            r#""layers.{at}":{{"dtype":"F32","shape":[{}],"data_offsets":[{start},{end}]}}"#,
            bytes / 4
        )
    });
    let header = format!("{{{}}}", entries.collect::<Vec<_>>().join(","));
    let mut content = (header.len() as u64).to_le_bytes().to_vec();
    content.extend(header.as_bytes());
    fs::create_dir(folder).unwrap();
    fs::write(folder.join("config.json"), "{}").unwrap();
    let path = folder.join("model.safetensors");
    fs::write(&path, &content).unwrap();
    let file = File::options().write(true).open(path).unwrap();
    file.set_len(content.len() as u64 + tensors * bytes)
        .unwrap();
}

/// The most memory that the program says it has held, in MiB.
fn peak(tensors: u64, bytes: u64, flags: &[&str]) -> f64 {
    let scratch = TempDir::new().unwrap();
    let (from, to) = (scratch.path().join("from"), scratch.path().join("to"));
    checkpoint(&from, tensors, bytes);
    let output = Command::new(env!("CARGO_BIN_EXE_convert"))
        .arg("--from")
        .arg(from)
        .arg("--to")
        .arg(to)
        .args(flags)
        .output()
        .unwrap();
    let printed = String::from_utf8(output.stdout).unwrap();
    let line = printed
        .lines()
        .find_map(|line| line.strip_prefix("peak memory: "));
    let line =
        line.unwrap_or_else(|| panic!("{printed}{}", String::from_utf8_lossy(&output.stderr)));
    line.strip_suffix(" MiB").unwrap().parse().unwrap()
}

#[test]
fn the_peak_is_that_of_one_tensor_whatever_the_size_of_the_model() {
    let tensor = 8 * MIB;
    for flags in [&[][..], &["--dtype", "f16"], &["--format", "hf"]] {
        let nothing = peak(1, 4, flags);
        let few = peak(2, tensor, flags);
        let many = peak(32, tensor, flags);
        let group = (tensor / MIB) as f64;
        assert!(
            many - nothing <= 1.2 * group,
            "{nothing} → {many} MiB: {flags:?}"
        );
        assert!(many - few <= 0.1 * group, "{few} → {many} MiB: {flags:?}");
    }
}
