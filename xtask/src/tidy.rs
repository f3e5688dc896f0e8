//! `cargo xtask tidy`: house rules that no other tool checks.

use std::fs;
use std::path::Path;
use std::process::Command;

use anyhow::{Context, bail};

/// Longest source file, in lines.
const MAX_LINES: usize = 600;

/// Longest example: if more is needed, the library lacks it.
const MAX_EXAMPLE_LINES: usize = 120;

/// An example that is a program: its rooms are as large as any.
const PROGRAM: &str = "examples/small-vlm/";

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
    "crates/finetune/src/host.rs",
    "crates/reducers/src/device.rs",
    "crates/reroute/src/host.rs",
    "crates/checkpoint/",
    "crates/convert/",
];

/// What no file does.
const BANS: &[&str] = &["#[ignore", "todo!(", "unimplemented!("];

/// What a published crate builds in must lie in it: these may climb no further than the crate's folder.
const INCLUDES: &[&str] = &["include_bytes!(", "include_str!(", "include!("];

/// Packages that may name a backend and print, and the extension point for one backend's loops.
const LEAVES: &[&str] = &[
    "crates/cli/",
    "crates/layers/src/host",
    "crates/zoo/src/backend.rs",
    "examples/",
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
    let is_short = name.starts_with("examples/") && !name.starts_with(PROGRAM);
    let most = match is_short {
        true => MAX_EXAMPLE_LINES,
        false => MAX_LINES,
    };
    if lines > most {
        problems.push(format!("{name}: {lines} lines, more than {most}"));
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
        if library && leaves_crate(name, code) {
            problems.push(format!(
                "{name}:{}: includes a file of another crate",
                number + 1
            ));
        }
        for ban in bans.iter().filter(|ban| code.contains(**ban)) {
            problems.push(format!("{name}:{}: {ban}", number + 1));
        }
    }
}

/// Whether a line of a crate's source includes a file from outside of the crate's folder.
fn leaves_crate(name: &str, code: &str) -> bool {
    if !INCLUDES.iter().any(|include| code.contains(include)) {
        return false;
    }
    // Folders between the crate's own (`crates/NAME`) and the file.
    let depth = name.split('/').count().saturating_sub(3);
    code.matches("../").count() > depth
}

#[cfg(test)]
mod tests {
    use super::leaves_crate;

    #[test]
    fn an_include_stays_in_its_crate() {
        let file = "crates/zoo/src/embedded.rs";
        assert!(!leaves_crate(file, r#"include_bytes!("../assets/a.png")"#));
        assert!(leaves_crate(
            file,
            r#"include_bytes!("../../assets/a.png")"#
        ));
        assert!(!leaves_crate(file, r#"open("../../assets/a.png")"#));
    }
}
