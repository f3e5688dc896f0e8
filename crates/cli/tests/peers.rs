//! `reroute tune` by two processes of this machine.

use std::fs;
use std::net::TcpListener;
use std::path::Path;
use std::process::{Child, Command, Output, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use safetensors::SafeTensors;
use serde_json::{Value, json};

const SCENE: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../zoo/assets/scenes/063.png");
/// Within which a peer that has lost another one ends.
const NOTICED: Duration = Duration::from_secs(30);

/// The first of six ports that nobody uses.
fn port() -> u16 {
    let is_free = |port: u16| TcpListener::bind(("0.0.0.0", port)).is_ok();
    let start = 20_000 + (std::process::id() % 20_000) as u16;
    let mut ports = (start..60_000).step_by(7);
    let port = ports.find(|&first| (first..first + 6).all(is_free));
    port.expect("free ports")
}

fn tune(folder: &Path, to: &str, more: &[&str]) -> Child {
    let data = folder.join("train.jsonl");
    if !data.exists() {
        let boxes = [[20, 30, 50, 60], [10, 10, 60, 60], [40, 20, 90, 70]];
        let lines = {
            boxes
                .iter()
                .zip(["that thing", "a square", "the large one"])
        }
        .map(|(corners, words)| json!({"image": SCENE, "expression": words, "box": corners}))
        .map(|line| line.to_string());
        let lines: Vec<String> = lines.collect();
        fs::write(&data, lines.join("\n")).expect("can be written");
    }
    let flags = [
        "tune",
        "--data",
        "train.jsonl",
        "--to",
        to,
        "--rank",
        "4",
        "--accumulate",
        "2",
    ];
    let program = Command::new(env!("CARGO_BIN_EXE_reroute"))
        .args(flags)
        .args([
            "--dtype",
            "f32",
            "--learning-rate",
            "0.003",
            "--dropout",
            "0.1",
        ])
        .args(["--routing", "dense,reroute-pdrop@192", "--save-every", "2"])
        .args(more)
        .current_dir(folder)
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn();
    program.expect("the program starts")
}

/// Both peers.
fn both(folder: &Path, to: &str, more: &[&str]) -> [Child; 2] {
    let port = port().to_string();
    ["0", "1"].map(|peer| {
        let flags = ["--peers", "2", "--peer", peer, "--peer-port", &port];
        tune(folder, to, &[&flags, more].concat())
    })
}

fn said(output: &Output) -> String {
    let [out, error] = [&output.stdout, &output.stderr].map(|bytes| String::from_utf8_lossy(bytes));
    format!("{out}\n{error}")
}

fn succeeds(program: Child) -> Output {
    let output = program.wait_with_output().expect("it ends");
    assert!(output.status.success(), "{}", said(&output));
    output
}

fn losses(folder: &Path, to: &str) -> Vec<f64> {
    let text = fs::read_to_string(folder.join(to).join("log.jsonl")).unwrap_or_default();
    let lines = text
        .lines()
        .filter_map(|line| serde_json::from_str::<Value>(line).ok());
    let steps = lines.filter(|line| line["kind"] == "step");
    steps.filter_map(|line| line["loss"].as_f64()).collect()
}

fn adapter(folder: &Path, to: &str) -> Vec<f32> {
    let path = folder.join(to).join("adapter/adapter_model.safetensors");
    let bytes = fs::read(path).expect("an adapter");
    let tensors = SafeTensors::deserialize(&bytes).expect("tensors");
    let mut tensors = tensors.tensors();
    tensors.sort_by(|one, other| one.0.cmp(&other.0));
    let bytes: Vec<u8> = tensors
        .iter()
        .flat_map(|(_, tensor)| tensor.data().to_vec())
        .collect();
    let numbers = bytes.as_chunks().0.iter();
    numbers.map(|&bytes| f32::from_le_bytes(bytes)).collect()
}

#[test]
fn two_processes_learn_what_one_does_and_a_lost_one_is_named() {
    let folder = tempfile::tempdir().expect("a folder");
    let folder = folder.path();
    let steps = ["--steps", "12"];
    succeeds(tune(folder, "alone", &steps));
    let expected = losses(folder, "alone");
    assert_eq!(expected.len(), 12);
    let [first, second] = both(folder, "whole", &steps);
    let output = succeeds(first);
    let other = succeeds(second);
    assert!(
        String::from_utf8_lossy(&output.stdout)
            .trim_end()
            .ends_with("whole/adapter")
    );
    assert!(
        !said(&other).contains("whole/adapter"),
        "the first one alone writes"
    );
    let whole = losses(folder, "whole");
    assert_eq!(whole.len(), 12);
    for (found, expected) in whole.iter().zip(&expected) {
        assert!(
            (found - expected).abs() <= 1e-5 * expected,
            "{whole:?} {expected:?}"
        );
    }
    let (found, expected) = (adapter(folder, "whole"), adapter(folder, "alone"));
    let norm = |numbers: &mut dyn Iterator<Item = f32>| numbers.map(|x| x * x).sum::<f32>().sqrt();
    let off = norm(&mut found.iter().zip(&expected).map(|(a, b)| a - b));
    let off = off / norm(&mut expected.iter().copied());
    assert!(off < 1e-4, "adapters are {off:e} apart");

    for killed in [1, 0] {
        let to = format!("cut-{killed}");
        let mut peers = both(folder, &to, &steps);
        let began = Instant::now();
        while losses(folder, &to).len() < 4 {
            assert!(
                began.elapsed() < Duration::from_secs(240),
                "no step is done"
            );
            thread::sleep(Duration::from_millis(20));
        }
        peers[killed].kill().expect("it lives");
        let killed_at = Instant::now();
        let [first, second] = peers;
        let (gone, left) = match killed {
            0 => (first, second),
            _ => (second, first),
        };
        let output = left.wait_with_output().expect("it ends");
        let took = killed_at.elapsed();
        drop(gone.wait_with_output());
        let text = said(&output);
        assert_eq!(output.status.code(), Some(2), "{text}");
        assert!(text.contains(&format!("peer {killed} ")), "{text}");
        assert!(text.contains("--resume"), "{text}");
        assert!(took < NOTICED, "{took:?}");
        let rest = both(folder, &to, &[&steps[..], &["--resume"]].concat());
        for program in rest {
            succeeds(program);
        }
        assert_eq!(losses(folder, &to), whole);
        assert_eq!(adapter(folder, &to), found);
    }
}

#[test]
fn peers_with_other_flags_and_taken_ports_are_refused() {
    let folder = tempfile::tempdir().expect("a folder");
    let folder = folder.path();
    let port = port();
    let flags = |peer: &'static str, seed: &'static str| {
        let port = port.to_string();
        let flags = [
            "--peers",
            "2",
            "--steps",
            "2",
            "--peer",
            peer,
            "--seed",
            seed,
            "--peer-port",
        ];
        let flags = flags.iter().map(|flag| (*flag).to_owned());
        flags.chain([port]).collect::<Vec<String>>()
    };
    let start = |flags: Vec<String>| {
        let flags: Vec<&str> = flags.iter().map(String::as_str).collect();
        tune(folder, "run", &flags)
    };
    let different = [start(flags("0", "0")), start(flags("1", "1"))];
    for program in different {
        let output = program.wait_with_output().expect("it ends");
        assert_eq!(output.status.code(), Some(2), "{}", said(&output));
        assert!(
            said(&output).contains("peer 1 and peer 0 have different"),
            "{}",
            said(&output)
        );
    }
    let _taken = TcpListener::bind(("0.0.0.0", port)).expect("it is free");
    let output = start(flags("0", "0")).wait_with_output().expect("it ends");
    assert!(said(&output).contains("--peer-port"), "{}", said(&output));
    let late = start([&flags("1", "0")[..], &["--peer-timeout".into(), "2".into()]].concat());
    let output = late.wait_with_output().expect("it ends");
    assert_eq!(output.status.code(), Some(2));
    assert!(
        said(&output).contains("peer 0 has not come within 2 s"),
        "{}",
        said(&output)
    );
}
