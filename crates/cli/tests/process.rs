//! The program as a process: exit codes, where its words go, and that it does not panic.

use std::path::Path;
use std::process::{Command, Output, Stdio};

fn reroute(flags: &[&str], folder: &Path) -> Output {
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
fn an_image_comes_through_a_pipe() {
    let folder = tempfile::tempdir().expect("a folder");
    let scene = concat!(env!("CARGO_MANIFEST_DIR"), "/../zoo/assets/scenes/063.png");
    let question = ["--prompt", "How many rings are there?"];
    let expected = reroute(
        &[&["ask", "--image", scene], &question[..]].concat(),
        folder.path(),
    );
    let mut program = Command::new(env!("CARGO_BIN_EXE_reroute"))
        .args(["ask", "--image", "-"])
        .args(question)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .expect("the program starts");
    let bytes = std::fs::read(scene).expect("the scene exists");
    let mut input = program.stdin.take().expect("a pipe");
    std::io::Write::write_all(&mut input, &bytes).expect("it is read");
    drop(input);
    let output = program.wait_with_output().expect("it ends");
    assert_eq!(output.status.code(), Some(0));
    assert_eq!(output.stdout, expected.stdout);
    assert!(!output.stdout.is_empty());
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
        &["ground", "--overlay", "box.gif"],
        &["ask", "--max-pixels", "0"],
        &["ask", "--max-pixels", "5000"],
        &["completions", "tcsh"],
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

#[test]
fn a_reader_that_has_seen_enough_is_no_failure() {
    let mut program = Command::new(env!("CARGO_BIN_EXE_reroute"))
        .arg("presets")
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("the program starts");
    drop(program.stdout.take());
    let output = program.wait_with_output().expect("it ends");
    let said = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(0), "{said}");
    assert_eq!(said, "");
}

#[test]
fn answers_go_to_stdout_and_notes_and_errors_to_stderr() {
    let folder = tempfile::tempdir().expect("a folder");
    let output = reroute(&["ask"], folder.path());
    assert_eq!(String::from_utf8_lossy(&output.stdout).lines().count(), 1);
    assert!(String::from_utf8_lossy(&output.stderr).contains("visual tokens"));

    let output = reroute(&["ask", "--routing", "fastv@17"], folder.path());
    assert!(output.stdout.is_empty());
    assert!(String::from_utf8_lossy(&output.stderr).starts_with("error: "));
}

#[test]
fn an_answer_that_is_cut_off_is_said_to_be() {
    let folder = tempfile::tempdir().expect("a folder");
    for (flags, is_cut_off) in [
        (&["ask"][..], false),
        (&["ask", "--max-new-tokens", "2"], true),
        (&["ask", "--json", "--max-new-tokens", "2"], true),
        (&["explain", "--max-new-tokens", "2"], true),
        (&["ground", "--max-new-tokens", "2"], true),
    ] {
        let output = reroute(flags, folder.path());
        let said = String::from_utf8_lossy(&output.stderr);
        assert_eq!(said.contains("cut off"), is_cut_off, "{flags:?}: {said}");
    }
}

#[test]
fn version_names_backend_and_features() {
    let output = reroute(&["--version"], Path::new("."));
    let said = String::from_utf8_lossy(&output.stdout);
    let backend = reroute_cli::backend::NAME;
    for words in [
        env!("CARGO_PKG_VERSION"),
        &format!("backend: {backend}"),
        &format!("features: {backend}"),
    ] {
        assert!(said.contains(words), "{said}");
    }
}

#[test]
fn completions_and_the_manual_know_every_command() {
    let commands = [
        "ask", "chat", "ground", "explain", "compare", "trace", "presets", "doctor",
    ];
    for flags in [
        &["completions", "bash"][..],
        &["completions", "zsh"],
        &["completions", "fish"],
        &["completions", "elvish"],
        &["completions", "powershell"],
        &["man"],
    ] {
        let output = reroute(flags, Path::new("."));
        assert_eq!(output.status.code(), Some(0), "{flags:?}");
        let said = String::from_utf8_lossy(&output.stdout).to_lowercase();
        for command in commands {
            assert!(said.contains(command), "{flags:?} knows {command}");
        }
        assert!(said.contains("routing"), "{flags:?} knows flags");
    }
    assert_eq!(
        reroute(&["completions"], Path::new(".")).status.code(),
        Some(2)
    );
}

/// What an answer takes at its peak is what the doctor says: never more, and not much less.
#[cfg(all(target_os = "linux", feature = "flex"))]
#[test]
fn the_doctor_counts_the_program_itself() {
    use std::io::{BufRead, BufReader, Write};
    let scene = Path::new(env!("CARGO_MANIFEST_DIR")).join("../zoo/assets/scenes/063.png");
    let mut program = Command::new(env!("CARGO_BIN_EXE_reroute"))
        .args(["chat", "--image"])
        .arg(scene)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .expect("the program starts");
    let mut input = program.stdin.take().expect("a pipe");
    writeln!(input, "find the cross").expect("it listens");
    let mut answer = String::new();
    let output = program.stdout.take().expect("a pipe");
    BufReader::new(output)
        .read_line(&mut answer)
        .expect("it answers");
    // It waits for the next question.
    let status = std::fs::read_to_string(format!("/proc/{}/status", program.id()));
    let status = status.expect("it runs");
    drop(input);
    program.wait().expect("it ends");
    let peak = status.lines().find_map(|line| line.strip_prefix("VmHWM:"));
    let peak = peak.expect("known").trim().trim_end_matches(" kB");
    let peak = peak.parse::<f64>().expect("a number") * 1024.0;

    let report = reroute(&["doctor", "--json", "--text-tokens", "20"], Path::new("."));
    let report: serde_json::Value = serde_json::from_slice(&report.stdout).expect("JSON");
    let needs = report["needs"].as_array().expect("a list");
    let dense = needs.iter().find(|need| need["routing"] == "dense");
    let said = dense.expect("it is first")["total_bytes"]
        .as_f64()
        .expect("bytes");
    let ratio = said / peak;
    assert!(
        (1.0..1.25).contains(&ratio),
        "{said} bytes said, {peak} taken"
    );
}

/// An interrupt costs nothing: what was learnt until then is a checkpoint, and the run goes on from there.
#[cfg(all(unix, feature = "flex"))]
#[test]
fn an_interrupted_run_leaves_a_checkpoint() {
    use std::io::{BufRead, BufReader};
    let folder = tempfile::tempdir().expect("a folder");
    let scene = Path::new(env!("CARGO_MANIFEST_DIR")).join("../zoo/assets/scenes/063.png");
    let image = scene.canonicalize().expect("the scene exists");
    let line = serde_json::json!({"image": image, "expression": "it", "box": [20, 30, 50, 60]});
    std::fs::write(folder.path().join("data.jsonl"), line.to_string()).expect("can be written");
    let flags = [
        "tune",
        "--data",
        "data.jsonl",
        "--to",
        "run",
        "--batch",
        "1",
        "--accumulate",
        "1",
    ];
    let mut program = Command::new(env!("CARGO_BIN_EXE_reroute"))
        .args(flags)
        .args(["--steps", "100000"])
        .current_dir(folder.path())
        .stderr(Stdio::piped())
        .spawn()
        .expect("the program starts");
    let mut lines = BufReader::new(program.stderr.take().expect("a pipe")).lines();
    let has_stepped = |line: std::io::Result<String>| line.expect("text").contains("tokens/s");
    assert!(lines.any(has_stepped));
    let interrupt = Command::new("kill")
        .args(["-INT", &program.id().to_string()])
        .status();
    assert!(interrupt.expect("it is sent").success());
    let said: Vec<String> = lines.map(|line| line.expect("text")).collect();
    assert_eq!(program.wait().expect("it ends").code(), Some(2));
    let last = said.last().expect("an error");
    assert!(
        last.contains("stopped after step") && last.contains("--resume"),
        "{last}"
    );
    let is_checkpoint = |name: &str| name.starts_with("checkpoint-");
    let entries = std::fs::read_dir(folder.path().join("run")).expect("a run");
    let names: Vec<String> = { entries }
        .map(|entry| {
            entry
                .expect("a name")
                .file_name()
                .to_string_lossy()
                .into_owned()
        })
        .filter(|name| is_checkpoint(name))
        .collect();
    let [checkpoint] = &names[..] else {
        panic!("one checkpoint, not {names:?}");
    };
    let step = checkpoint.trim_start_matches("checkpoint-");
    assert!(last.contains(&format!("step {step}:")), "{last}");
}

/// The limits of the system, not ours, would end these: no memory, no stack.
#[test]
fn checkpoints_made_to_exhaust_memory_or_stack_exit_with_2() {
    let checkpoint = Path::new(env!("CARGO_MANIFEST_DIR")).join("../zoo/assets/narrow-llava");
    let config = std::fs::read_to_string(checkpoint.join("config.json")).expect("it is there");
    let many = "\"num_hidden_layers\": 1000000000";
    let layers = config.replace("\"num_hidden_layers\": 16", many);
    let heads = config.replace("\"vocab_size\"", "\"head_dim\": 2147483646, \"vocab_size\"");
    assert!(layers != config && heads != config);
    let chain = format!("{{{{ {}1 }}}}", "-".repeat(60_000));
    for (name, content, expected) in [
        ("config.json", layers, "num_hidden_layers is 1000000000"),
        ("config.json", heads, "head_dim is 2147483646"),
        (
            "chat_template.jinja",
            chain,
            "0 image placeholders for 1 images",
        ),
    ] {
        let folder = tempfile::tempdir().expect("a folder");
        let copy = folder.path().join("model");
        std::fs::create_dir(&copy).expect("a folder");
        for file in checkpoint.read_dir().expect("a folder") {
            let file = file.expect("readable");
            std::fs::copy(file.path(), copy.join(file.file_name())).expect("a copy");
        }
        std::fs::write(copy.join(name), content).expect("a file");
        let scene = checkpoint.join("../scenes/063.png");
        let flags = ["ask", "--model", "model", "--prompt", "x", "--image"];
        let flags = [&flags[..], &[scene.to_str().expect("UTF-8")]].concat();
        let output = reroute(&flags, folder.path());
        let said = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(2), "{name}: {said}");
        assert!(said.contains(expected), "{name}: {said}");
    }
}

/// A checkpoint that the Hugging Face cache has is called by its name; nothing else is looked for.
#[cfg(unix)]
#[test]
fn a_checkpoint_in_the_cache_is_called_by_its_name() {
    let assets = Path::new(env!("CARGO_MANIFEST_DIR")).join("../zoo/assets/narrow-llava");
    let folder = tempfile::tempdir().expect("a folder");
    let repository = folder.path().join("home/hub/models--owner--a.name");
    let [blobs, refs, snapshot] = ["blobs", "refs", "snapshots/abc"].map(|at| {
        let made = repository.join(at);
        std::fs::create_dir_all(&made).expect("a folder");
        made
    });
    std::fs::write(refs.join("main"), "abc").expect("a file");
    for file in assets.read_dir().expect("a folder") {
        let name = file.expect("readable").file_name();
        std::fs::copy(assets.join(&name), blobs.join(&name)).expect("a copy");
        let blob = Path::new("../../blobs").join(&name);
        std::os::unix::fs::symlink(blob, snapshot.join(&name)).expect("a link");
    }
    let run = |variable: &str, value: &str, flags: &[&str]| {
        let program = Command::new(env!("CARGO_BIN_EXE_reroute"))
            .args(flags)
            .current_dir(folder.path())
            .env_remove("HF_HUB_CACHE")
            .env_remove("HF_HOME")
            .env(variable, value)
            .output();
        program.expect("the program starts")
    };
    let scene = assets.join("../scenes/063.png");
    let picture = ["--image", scene.to_str().expect("UTF-8"), "--prompt", "x"];
    let ask = [&["ask", "--model", "owner/a.name"], &picture[..]].concat();
    let found = run("HF_HOME", "home", &ask);
    let said = String::from_utf8_lossy(&found.stderr);
    assert_eq!(found.status.code(), Some(0), "{said}");
    assert_eq!(run("HF_HUB_CACHE", "home/hub", &ask).stdout, found.stdout);
    let convert = [
        "convert",
        "--from",
        "owner/a.name",
        "--to",
        "copy",
        "--format",
        "hf",
    ];
    assert_eq!(run("HF_HOME", "home", &convert).status.code(), Some(0));
    let copied = run(
        "HF_HOME",
        "",
        &[&["ask", "--model", "copy"], &picture[..]].concat(),
    );
    assert_eq!(copied.stdout, found.stdout);

    for (home, name) in [("home", "owner/other"), ("elsewhere", "owner/a.name")] {
        let output = run("HF_HOME", home, &["presets", "--model", name]);
        let said = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(2), "{said}");
        assert!(said.contains(&format!("hf download {name}")), "{said}");
    }
    std::fs::remove_file(snapshot.join("model.safetensors")).expect("it is there");
    let output = run("HF_HOME", "home", &ask);
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(said.contains("hf download owner/a.name"), "{said}");
}
