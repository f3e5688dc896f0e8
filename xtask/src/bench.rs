//! `cargo xtask bench`: measures backends, and other implementations beside them, and keeps what comes
//! out as JSON and as a picture under `benches/results/`, section by section.

mod peers;
mod plot;
mod record;
mod types;
mod whole;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus};
use std::thread::sleep;
use std::time::Duration;

use anyhow::{Context, ensure};
use clap::builder::RangedU64ValueParser;
use serde_json::{Value, json};

use peers::Compared;
use record::Record;

/// Four decisions at the published relative depths need as many layers to stay apart.
const MIN_LAYERS: u64 = 7;

/// Between two looks at what a backend's program has written.
const LOOK: Duration = Duration::from_secs(1);

#[derive(clap::Args)]
pub struct Args {
    /// Backends to measure, one program for each.
    #[arg(long, value_delimiter = ',', default_value = "flex",
          value_parser = ["flex", "ndarray", "wgpu", "webgpu", "cuda"])]
    backend: Vec<String>,
    /// Layer shapes: `llava` (LLaVA-1.5-7B), `qwen` (Qwen2.5-VL-7B), or a folder with a config.json.
    #[arg(long, default_value = "llava", value_name = "NAME|DIR", value_parser = model)]
    model: String,
    /// Budgets of the routed prefills: visual tokens of 576 that a layer works on, on average.
    #[arg(long, value_delimiter = ',', default_value = "192,128,64", value_parser = ["192", "128", "64"])]
    budgets: Vec<String>,
    /// Decoder layers.
    #[arg(long, default_value_t = 8,
          value_parser = RangedU64ValueParser::<usize>::new().range(MIN_LAYERS..))]
    layers: usize,
    /// Type of weights and activations; decoding is measured in all that the backend has. For `peer`
    /// or `whole` alone any number of types, one after the other.
    #[arg(long, value_delimiter = ',', default_value = "f32", value_name = "TYPE,…",
          value_parser = ["f32", "f16", "bf16", "int8", "q4"])]
    dtype: Vec<String>,
    /// Rounds that medians are taken of.
    #[arg(long, default_value_t = 5, value_parser = RangedU64ValueParser::<usize>::new().range(1..))]
    rounds: usize,
    /// Other implementations to time in turn with ours: a folder of them (`benches/peers`), or a
    /// command that speaks their protocol (`benches/peers/README.md`).
    #[arg(long, value_name = "DIR|COMMAND", value_parser = peers::find)]
    compare: Vec<Compared>,
    /// Python with PyTorch and transformers, for `--compare`; else what REROUTE_PYTHON says, or
    /// python3.
    #[arg(long, value_name = "PROGRAM")]
    python: Option<String>,
    /// Where to write what `--compare` or `whole` finds in each type, as JSON (`benches/peers/README.md`).
    #[arg(long, value_name = "FILE", value_parser = in_a_folder)]
    json: Option<PathBuf>,
    /// What a reader must know about this run, such as who else used the machine.
    #[arg(long)]
    note: Option<String>,
    /// Toy shapes, one round; nothing is kept.
    #[arg(long = "test")]
    smoke: bool,
    /// Weights that `sessions` runs on, instead of the built-in model's.
    #[arg(long, value_name = "DIR", value_parser = model)]
    checkpoint: Option<String>,
    #[command(flatten)]
    whole: whole::Flags,
    /// What to measure: prefill, decode, vision, sizes (together the default), scenes, precision, sessions, kv, ops,
    /// training; `peer` for `--compare` alone, `whole` for a checkpoint that answers about a photo.
    #[arg(value_parser = [
        "prefill", "decode", "vision", "sizes", "scenes", "precision", "sessions", "kv", "ops", "training", "peer",
        "whole",
    ])]
    sections: Vec<String>,
}

impl Args {
    /// Rounds that medians are taken of.
    fn rounds(&self) -> usize {
        if self.smoke { 1 } else { self.rounds }
    }
}

pub fn run(args: &Args, root: &Path) -> anyhow::Result<()> {
    let measured: Vec<&str> = args.sections.iter().map(String::as_str).collect();
    let measured: Vec<&str> = measured.into_iter().filter(|it| *it != "peer").collect();
    let only_peers = measured.is_empty() && !args.sections.is_empty();
    let whole = args.sections == ["whole"];
    ensure!(
        whole || !measured.contains(&"whole"),
        "`whole` runs programs of its own: name no other section"
    );
    ensure!(
        measured.len() == args.sections.len() || !args.compare.is_empty(),
        "`peer` needs somebody to compare with: add --compare benches/peers"
    );
    ensure!(
        only_peers || whole || args.dtype.len() == 1,
        "several types in one run are for `peer` or `whole` alone: name no other section, or one --dtype"
    );
    ensure!(
        args.json.is_none() || whole || !args.compare.is_empty(),
        "--json is what a comparison finds: add --compare benches/peers"
    );
    let scratch = tempfile::tempdir()?;
    let folder = match args.smoke {
        true => scratch.path().to_path_buf(),
        false => root.join("benches/results"),
    };
    let dtype = args.dtype.join(" ");
    let what = match measured[..] {
        [built_in @ ("scenes" | "precision")] => vec![built_in],
        ["whole"] => vec!["whole", name(&args.model)],
        ["sessions"] => vec![
            "sessions",
            args.checkpoint.as_deref().map_or("", name),
            &dtype,
        ],
        _ => vec![name(&args.model), &dtype],
    };
    let usual = |word: &&str| !["llava", "f32"].contains(word);
    let what: Vec<&str> = what.into_iter().filter(usual).collect();
    let mut record = Record::new(root, &folder, &what.join(" "))?;
    record.notes.extend(args.note.clone());
    let mut failed = Vec::new();
    if whole && let Err(error) = whole::run(args, root, &mut record) {
        failed.push(format!("not everything was answered: {error:#}"));
    }
    let backends = args.backend.iter().filter(|_| !only_peers && !whole);
    for backend in backends {
        let out = scratch.path().join(format!("{backend}.json"));
        if let Err(error) = measure(args, root, backend, &measured, &out, &mut record) {
            let note = format!("{backend} was not measured to the end: {error:#}");
            record.notes.push(note.clone());
            failed.push(note);
        }
    }
    if !args.compare.is_empty()
        && !whole
        && let Err(error) = peers::compare(args, root, &mut record)
    {
        // Noted there, type by type.
        failed.push(format!("not everything was compared: {error:#}"));
    }
    for note in &record.notes {
        println!("note: {note}");
    }
    if !record.is_empty() {
        let path = record.keep()?;
        match args.smoke {
            true => println!("toy numbers are not kept"),
            false => println!("kept in {}", path.display()),
        }
        let picture = path.with_extension("svg");
        if picture.exists() && !args.smoke {
            println!("drawn in {}", picture.display());
        }
    }
    ensure!(failed.is_empty(), "{}", failed.join("; "));
    Ok(())
}

/// A name of `--model`, or the whole path of the folder that it names: cargo runs the program in the
/// folder of its package.
fn model(given: &str) -> Result<String, String> {
    if let "llava" | "qwen" = given {
        return Ok(given.into());
    }
    let folder = Path::new(given);
    if !folder.join("config.json").is_file() {
        return Err("neither llava nor qwen, nor a folder with a config.json".into());
    }
    let whole = folder.canonicalize().map_err(|error| error.to_string())?;
    let whole = whole.into_os_string().into_string();
    whole.map_err(|_| "the folder's path is not UTF-8: rename it".into())
}

/// A file that can be written once everything is measured.
fn in_a_folder(given: &str) -> Result<PathBuf, String> {
    let path = PathBuf::from(given);
    let folder = path.parent().filter(|it| !it.as_os_str().is_empty());
    let there = folder.is_none_or(Path::is_dir) && path.file_name().is_some() && !path.is_dir();
    match there {
        true => Ok(path),
        false => Err("no file in a folder that is there".into()),
    }
}

/// What a model is called in results: the last part of a folder's path.
fn name(model: &str) -> &str {
    let name = Path::new(model).file_name();
    name.and_then(|name| name.to_str()).unwrap_or(model)
}

/// Builds and runs one backend's program. What it has measured is kept section by section.
fn measure(
    args: &Args,
    root: &Path,
    backend: &str,
    sections: &[&str],
    out: &Path,
    record: &mut Record,
) -> anyhow::Result<()> {
    let mut command = program(args, root, backend, &args.dtype[0]);
    command.args(sections).arg("--out").arg(out);
    let mut child = command.spawn().context("cannot start cargo")?;
    let at = record.backends.len();
    let status = follow(&mut child, out, |mut report| {
        report["model"] = json!(name(&args.model));
        record.backends.truncate(at);
        record.backends.push(report);
        // Tried again at the end.
        let _ = record.keep();
    })?;
    ensure!(status.success(), "the benchmark ended with {status}");
    Ok(())
}

/// Waits for a program to end; hands on what it has written whenever that has changed.
fn follow(
    child: &mut Child,
    out: &Path,
    mut changed: impl FnMut(Value),
) -> anyhow::Result<ExitStatus> {
    let mut seen = Vec::new();
    loop {
        let ended = child.try_wait()?;
        let text = fs::read(out).unwrap_or_default();
        if text != seen {
            changed(serde_json::from_slice(&text)?);
            seen = text;
        }
        match ended {
            Some(status) => return Ok(status),
            None => sleep(LOOK),
        }
    }
}

/// The bench binary of a backend, with the flags that all its sections share.
fn program(args: &Args, root: &Path, backend: &str, dtype: &str) -> Command {
    let mut command = Command::new(env!("CARGO"));
    command
        .current_dir(root)
        .args(["bench", "--quiet", "-p", "benches", "--no-default-features"])
        .args(["--features", backend, "--", "--model", &args.model])
        .args(["--budgets", &args.budgets.join(",")])
        .args(["--layers", &args.layers.to_string()])
        .args(["--dtype", dtype])
        .args(["--rounds", &args.rounds.to_string()])
        .args(args.smoke.then_some("--test"));
    if let Some(checkpoint) = &args.checkpoint {
        command.args(["--checkpoint", checkpoint]);
    }
    command
}

#[cfg(test)]
mod tests {
    use std::process::Command;

    use clap::Parser;

    use super::{Args, follow, model, name};

    #[derive(Parser)]
    struct Line {
        #[command(flatten)]
        bench: Args,
    }

    fn refusal(line: &[&str]) -> String {
        let line = Line::try_parse_from([&["bench"], line].concat());
        line.err().expect("it is refused").to_string()
    }

    #[test]
    fn what_cannot_be_measured_is_refused_before_anything_is_built() {
        for (line, words) in [
            (&["--model", "/no/such/folder"][..], "config.json"),
            (&["--layers", "6"], "6 is not in 7.."),
            (&["--rounds", "0"], "0 is not in 1.."),
            (&["--budgets", "100"], "192, 128, 64"),
            (&["--backend", "gpu"], "webgpu"),
            (&["prefil"], "a similar value exists: 'prefill'"),
            (&["--compare", "no-such-folder"], "neither a folder"),
            (&["--dtype", "bf16,int4"], "int8, q4"),
            (&["whole", "--image", "/no/such/file"], "No such file"),
            (
                &["--json", "/no/such/folder/types.json"],
                "a folder that is there",
            ),
        ] {
            let refusal = refusal(line);
            assert!(refusal.contains(words), "{line:?}: {refusal}");
        }
        for (line, words) in [
            (&["peer"][..], "add --compare"),
            (&["--json", "types.json"], "add --compare"),
            (
                &["decode", "--dtype", "f32,bf16"],
                "for `peer` or `whole` alone",
            ),
            (
                &["--dtype", "bf16,q4", "--compare", "sh"],
                "for `peer` or `whole` alone",
            ),
            (&["whole", "decode"], "name no other section"),
        ] {
            let line = Line::try_parse_from([&["bench"], line].concat()).unwrap();
            let error = super::run(&line.bench, "/no/such/folder".as_ref()).unwrap_err();
            assert!(error.to_string().contains(words), "{error}");
        }
    }

    #[test]
    fn a_folder_is_called_by_its_own_name_from_wherever_it_is_seen() {
        let folder = tempfile::tempdir().unwrap();
        let folder = folder.path().join("my-model");
        std::fs::create_dir_all(folder.join("inside")).unwrap();
        std::fs::write(folder.join("config.json"), "{}").unwrap();
        let seen = model(folder.join("inside/..").to_str().unwrap()).unwrap();
        assert_eq!(name(&seen), "my-model");
        assert_eq!(name(&model("qwen").unwrap()), "qwen");
    }

    #[test]
    fn what_a_program_wrote_before_it_failed_is_handed_on() {
        let folder = tempfile::tempdir().unwrap();
        let out = folder.path().join("out.json");
        let script = r#"echo '{"prefill": 1}' > "$1"; exit 2"#;
        let mut shell = Command::new("sh");
        shell.args(["-c", script, "sh"]).arg(&out);
        let mut last = None;
        let status = follow(&mut shell.spawn().unwrap(), &out, |report| {
            last = Some(report);
        });
        assert_eq!(status.unwrap().code(), Some(2));
        assert_eq!(last.unwrap()["prefill"], 1);
    }
}
