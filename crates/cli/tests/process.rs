//! The program as a process: exit codes, where its words go, and that it does not panic.

use std::process::{Command, Output};

fn reroute(flags: &[&str], folder: &std::path::Path) -> Output {
    let program = Command::new(env!("CARGO_BIN_EXE_reroute"))
        .args(flags)
        .current_dir(folder)
        .output();
    program.expect("the program starts")
}

#[test]
fn without_anything_a_box_is_drawn() {
    let folder = tempfile::tempdir().expect("a folder");
    let output = reroute(&["ground"], folder.path());
    assert_eq!(output.status.code(), Some(0));
    let said = String::from_utf8_lossy(&output.stdout);
    assert!(
        said.contains("pixels") && said.contains("normalized"),
        "{said}"
    );
    let picture = std::fs::read(folder.path().join("reroute-ground.png")).expect("it is drawn");
    let limits = vision_encoder::DecodeLimits::default();
    let picture = vision_encoder::decode(&picture, &limits).expect("a good PNG");
    let red = picture
        .data()
        .chunks_exact(3)
        .filter(|pixel| *pixel == [255, 45, 85]);
    assert!(red.count() > 100, "a box is on the picture");
}

#[test]
fn ask_explain_and_presets_answer() {
    let folder = tempfile::tempdir().expect("a folder");
    for flags in [
        &["ask", "--routing", "reroute-pdrop@192", "--json"][..],
        &["explain"],
        &["presets", "--json"],
        &["presets"],
    ] {
        let output = reroute(flags, folder.path());
        assert_eq!(output.status.code(), Some(0), "{flags:?}");
        assert!(!output.stdout.is_empty(), "{flags:?}");
    }
    let pictures = std::fs::read_dir(folder.path().join("reroute-explain")).expect("made");
    assert_eq!(pictures.count(), 4);
}

#[test]
fn bad_input_exits_with_2_and_leaves_nothing() {
    for flags in [
        &["ask", "--model", "nowhere", "--prompt", "x"][..],
        &["ask", "--routing", "fastv@17"],
        &["ask", "--image", "nowhere.png"],
        &["ask", "--temperature", "-1"],
        &["ground", "--overlay", "nowhere/box.png"],
        &[
            "trace",
            "--inputs",
            "nowhere.safetensors",
            "--out",
            "out.safetensors",
        ],
        &["answer"],
        &[],
    ] {
        let folder = tempfile::tempdir().expect("a folder");
        let output = reroute(flags, folder.path());
        let said = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(2), "{flags:?}: {said}");
        assert!(
            !said.is_empty() && !said.contains("panicked"),
            "{flags:?}: {said}"
        );
        let left = std::fs::read_dir(folder.path()).expect("readable").count();
        assert_eq!(left, 0, "{flags:?} leaves files behind");
    }
}
