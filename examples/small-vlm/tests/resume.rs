//! A run that is killed goes on to the same losses.

use std::fs;
use std::path::Path;
use std::process::{Command, Stdio};
use std::thread::sleep;
use std::time::{Duration, Instant};

use serde_json::Value;

/// The program, training a little of everything.
fn program(folder: &Path) -> Command {
    let mut program = Command::new(env!("CARGO_BIN_EXE_small-vlm"));
    program.args(["train", "--tower-steps", "3", "--align-steps", "3"]);
    program.args(["--steps", "3", "--scenes", "2", "--tower-scenes", "2"]);
    program.args(["--save-every", "1", "--log-every", "1"]);
    program.arg("--folder").arg(folder).stdout(Stdio::null());
    program
}

/// Stage, step and loss of every line of the log.
fn losses(folder: &Path) -> Vec<(String, u64, f64)> {
    let text = fs::read_to_string(folder.join("log.jsonl")).unwrap_or_default();
    let lines = text
        .lines()
        .map_while(|line| serde_json::from_str(line).ok());
    let loss = |line: Value| {
        let loss = line["loss"].as_f64().or(line["nats"].as_f64());
        Some((
            line["stage"].as_str()?.into(),
            line["step"].as_u64()?,
            loss?,
        ))
    };
    lines.filter_map(loss).collect()
}

#[test]
fn a_killed_run_goes_on_to_the_same_losses() {
    let folders = [(); 2].map(|()| tempfile::tempdir().expect("a folder"));
    let [whole, killed] = folders.each_ref().map(|folder| folder.path());
    assert!(program(whole).status().expect("it runs").success());
    let expected = losses(whole);
    assert_eq!(expected.len(), 9);
    // In every stage once.
    for lines in [1, 4, 7] {
        let mut child = program(killed).spawn().expect("it runs");
        let started = Instant::now();
        while losses(killed).len() <= lines && started.elapsed() < Duration::from_secs(120) {
            sleep(Duration::from_millis(2));
        }
        child.kill().expect("it is killed");
        child.wait().expect("it has ended");
    }
    assert!(!killed.join("model").join("config.json").exists() || losses(killed).len() >= 7);
    assert!(program(killed).status().expect("it runs").success());
    let found = losses(killed);
    let keys = |losses: &[(String, u64, f64)]| -> Vec<(String, u64)> {
        losses.iter().map(|line| (line.0.clone(), line.1)).collect()
    };
    assert_eq!(keys(&found), keys(&expected));
    for (found, expected) in found.iter().zip(&expected) {
        let off = (found.2 - expected.2).abs();
        assert!(off <= 1e-5 * expected.2, "{found:?} {expected:?}");
    }
    let weights =
        |folder: &Path| fs::read(folder.join("model/model.safetensors")).expect("a model");
    assert_eq!(weights(whole).len(), weights(killed).len());
    // Begun otherwise, it is refused.
    let mut other = program(killed);
    let other = other.args(["--seed", "7"]).stderr(Stdio::null());
    assert_eq!(other.status().expect("it runs").code(), Some(2));
}
