//! `cargo xtask tidy`: house rules that no other tool checks.

use std::fs;
use std::path::Path;
use std::process::Command;

use anyhow::{Context, bail};

/// Longest source file, in lines.
const MAX_LINES: usize = 600;

/// What library code never does: print, or give up on data from outside.
const LIBRARY_BANS: &[&str] = &[
    "println!",
    "eprintln!",
    "print!(",
    "dbg!",
    "todo!",
    "unimplemented!",
    "panic!(",
    ".unwrap()",
    "std::env::",
    "pub use *",
    "burn_flex",
    "burn_ndarray",
    "burn_wgpu",
    "burn_cuda",
];

/// What waits for the device and copies to the host.
const READ_BACKS: &[&str] = &["to_data(", "into_scalar("];

/// Library files that may: called once per decision, per picture or per token, never per layer. The
/// host tensors of `layers` are there already; the last two crates know files, not devices.
const MAY_READ_BACK: &[&str] = &[
    "crates/layers/src/host.rs",
    "crates/reducers/src/encoder/host.rs",
    "crates/reducers/src/score.rs",
    "crates/reroute/src/host.rs",
    "crates/checkpoint/",
    "crates/convert/",
];

/// What no file does.
const BANS: &[&str] = &["#[ignore", "todo!(", "unimplemented!("];

/// Packages that may name a backend and print, and the extension point for one backend's loops.
const LEAVES: &[&str] = &[
    "crates/cli/",
    "crates/convert/src/main.rs",
    "crates/layers/src/host.rs",
    "xtask/",
    "tests/",
    "benches/",
];

pub fn run(root: &Path) -> anyhow::Result<()> {
    let listed = Command::new("git")
        .args([
            "ls-files",
            "--cached",
            "--others",
            "--exclude-standard",
            "*.rs",
        ])
        .current_dir(root)
        .output()
        .context("cannot run git")?;
    let listed = String::from_utf8(listed.stdout)?;
    let mut problems = Vec::new();
    for name in listed.lines().filter(|name| root.join(name).is_file()) {
        let text = fs::read_to_string(root.join(name)).with_context(|| name.to_string())?;
        check(name, &text, &mut problems);
    }
    if listed.is_empty() {
        bail!("git lists no Rust files in {}", root.display());
    }
    if !problems.is_empty() {
        bail!(
            "{} house rules are broken:\n{}",
            problems.len(),
            problems.join("\n")
        );
    }
    println!("{} files are tidy", listed.lines().count());
    Ok(())
}

fn check(name: &str, text: &str, problems: &mut Vec<String>) {
    let lines = text.lines().count();
    if lines > MAX_LINES {
        problems.push(format!("{name}: {lines} lines, more than {MAX_LINES}"));
    }
    if name == "xtask/src/tidy.rs" {
        return;
    }
    let is_program = |folder| name.contains(folder);
    let library = !LEAVES.iter().any(|leaf| name.starts_with(leaf))
        && !["/tests/", "/examples/"].into_iter().any(is_program);
    let may_read_back = MAY_READ_BACK.iter().any(|part| name.starts_with(part));
    let mut in_tests = false;
    for (number, line) in text.lines().enumerate() {
        let code = line.trim_start();
        in_tests |= code == "#[cfg(test)]";
        let bans: Vec<&str> = match library && !in_tests {
            true if may_read_back => LIBRARY_BANS.to_vec(),
            true => [LIBRARY_BANS, READ_BACKS].concat(),
            false => BANS.to_vec(),
        };
        if code.starts_with("//") {
            continue;
        }
        for ban in bans.iter().filter(|ban| code.contains(**ban)) {
            problems.push(format!("{name}:{}: {ban}", number + 1));
        }
    }
}
