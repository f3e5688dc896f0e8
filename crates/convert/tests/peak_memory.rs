//! Memory does not grow with the model.

#![cfg(target_os = "linux")] // Other systems do not tell the peak.

use std::env;
use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::path::Path;
use std::process::Command;

use reroute_checkpoint::{CodeFormat, Dtype, NameTable, Rule};
use reroute_convert::{Codes, Form, Job, Plan};
use tempfile::TempDir;
use zip::CompressionMethod;
use zip::write::{SimpleFileOptions, ZipWriter};

const MIB: u64 = 1 << 20;

/// Columns of a large matrix.
const COLUMNS: u64 = 1000;

/// Every tensor is called what its parameter is.
const NAMES: NameTable = NameTable {
    rules: &[Rule {
        module: "*",
        file: &["*"],
    }],
    ignore: &[],
};

/// A checkpoint of so many f32 matrices of so many bytes: a hole in a file, read as zeros.
fn checkpoint(folder: &Path, tensors: u64, bytes: u64) {
    let columns = (bytes / 4).min(COLUMNS);
    let rows = bytes / 4 / columns;
    let entries = (0..tensors).map(|at| {
        let (start, end) = (at * bytes, (at + 1) * bytes);
        format!(
            r#""layers.{at}.weight":{{"dtype":"F32","shape":[{rows},{columns}],"data_offsets":[{start},{end}]}}"#
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

/// The same with one tensor, saved by PyTorch.
fn pickle(folder: &Path, bytes: u64) {
    let length = i32::try_from(bytes / 4).unwrap().to_le_bytes();
    let text = |text: &[u8]| {
        let length = u32::try_from(text.len()).unwrap().to_le_bytes();
        [b"X", &length[..], text].concat()
    };
    let pickle = [
        b"\x80\x02}",
        &text(b"weight")[..],
        b"ctorch._utils\n_rebuild_tensor_v2\n((",
        &text(b"storage"),
        b"ctorch\nFloatStorage\n",
        &text(b"0"),
        &text(b"cpu"),
        &[
            b"J",
            &length[..],
            b"tQK\x00J",
            &length,
            b"\x85K\x01\x85\x89",
        ]
        .concat(),
        b"ccollections\nOrderedDict\n)RtRs.",
    ];
    fs::create_dir(folder).unwrap();
    fs::write(folder.join("config.json"), "{}").unwrap();
    let mut archive = ZipWriter::new(File::create(folder.join("pytorch_model.bin")).unwrap());
    let options = SimpleFileOptions::default().compression_method(CompressionMethod::Stored);
    archive.start_file("archive/data.pkl", options).unwrap();
    archive.write_all(&pickle.concat()).unwrap();
    archive.start_file("archive/data/0", options).unwrap();
    io::copy(&mut io::repeat(0).take(bytes), &mut archive).unwrap();
    archive.finish().unwrap();
}

/// What the test below reads, if it is the process that converts.
const FROM: &str = "PEAK_MEMORY_FROM";
const TO: &str = "PEAK_MEMORY_TO";
const HOW: &str = "PEAK_MEMORY_HOW";

/// Converts where it is told to, and says the most memory that the process has held. Told nothing, it
/// does nothing.
#[test]
fn the_process_that_converts() {
    let (Some(from), Some(to)) = (env::var_os(FROM), env::var_os(TO)) else {
        return;
    };
    let mut job = Job::new(from, to);
    match env::var(HOW).unwrap().as_str() {
        "f16" => job.dtype = Some(Dtype::F16),
        "hf" => job.form = Some(Form::HuggingFace),
        "int8" => {
            job.codes = Some(Codes {
                format: CodeFormat::Int8,
                names: &NAMES,
                paths: (0..99).map(|at| format!("layers.{at}.weight")).collect(),
            });
        }
        "pickle" => job.allow_pickle = true,
        _ => {}
    }
    Plan::new(&job).unwrap().write(&mut |_| ()).unwrap();
    let status = fs::read_to_string("/proc/self/status").unwrap();
    let line = { status.lines() }.find_map(|line| line.strip_prefix("VmHWM:"));
    let kib: f64 = { line.unwrap() }
        .split_whitespace()
        .next()
        .unwrap()
        .parse()
        .unwrap();
    println!("peak memory: {:.1} MiB", kib / 1024.0);
}

/// The most memory that a process of its own holds, in MiB.
fn peak(make: impl Fn(&Path), how: &str) -> f64 {
    let scratch = TempDir::new().unwrap();
    let (from, to) = (scratch.path().join("from"), scratch.path().join("to"));
    make(&from);
    let output = Command::new(env::current_exe().unwrap())
        .args(["--exact", "the_process_that_converts", "--nocapture"])
        .env(FROM, from)
        .env(TO, to)
        .env(HOW, how)
        .output()
        .unwrap();
    let printed = String::from_utf8(output.stdout).unwrap();
    let said = printed
        .split_once("peak memory: ")
        .and_then(|(_, said)| said.split_once(" MiB"));
    let (mib, _) =
        said.unwrap_or_else(|| panic!("{printed}{}", String::from_utf8_lossy(&output.stderr)));
    mib.parse().unwrap()
}

#[test]
fn the_peak_is_that_of_one_tensor_whatever_the_size_of_the_model() {
    let tensor = 8 * 4 * 250 * COLUMNS;
    for how in ["", "f16", "hf", "int8"] {
        let peak = |tensors, bytes| peak(|from| checkpoint(from, tensors, bytes), how);
        let (nothing, few, many) = (peak(1, 4), peak(2, tensor), peak(32, tensor));
        let group = tensor as f64 / MIB as f64;
        assert!(
            many - nothing <= 1.2 * group,
            "{nothing} → {many} MiB: {how:?}"
        );
        assert!(many - few <= 0.1 * group, "{few} → {many} MiB: {how:?}");
    }
}

#[test]
fn a_pickle_is_not_read_into_memory_either() {
    let tensor = 64 * MIB;
    let peak = |bytes| peak(|from| pickle(from, bytes), "pickle");
    let (nothing, large) = (peak(4), peak(tensor));
    let group = (tensor / MIB) as f64;
    assert!(large - nothing <= 0.1 * group, "{nothing} → {large} MiB");
}
