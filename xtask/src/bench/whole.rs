//! A whole model that answers about a photo: loading, time to the first token, tokens a second and peak memory,
//! in every type and routing, a process for each answer.

use std::fs;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, bail, ensure};
use serde_json::{Value, json};

use super::peers::Peer;
use super::record::{self, Record};
use super::types::median;
use super::{Args, name};

/// Tokens of an answer, at most.
const NEW_TOKENS: usize = 16;

/// With the template of LLaVA 64 rows of text in the vocabulary that `make-random` writes, of Qwen 75.
const PROMPT: &str = "What is to be seen in this photo? Describe it in one short sentence.";

/// Between two looks at a program's memory.
const LOOK: Duration = Duration::from_millis(20);

/// Of an answer, in seconds, and what it took of memory.
const MEASURED: [&str; 5] = ["loading", "vision", "prefill", "decode", "peak_bytes"];

#[derive(clap::Args)]
#[command(next_help_heading = "A whole model (`whole`)")]
pub struct Flags {
    /// Routings to answer under.
    #[arg(
        long,
        value_delimiter = ',',
        value_name = "PRESET,…",
        default_value = "dense,reroute-pdrop@192,reroute-pdrop@128,reroute-pdrop@64"
    )]
    routing: Vec<String>,
    /// The photo that is asked about.
    #[arg(long, value_name = "FILE", value_parser = file)]
    image: Option<PathBuf>,
    /// The `reroute` program; built for release otherwise.
    #[arg(long, value_name = "FILE", value_parser = file)]
    program: Option<PathBuf>,
}

/// Cargo runs the program in the folder of its package.
fn file(given: &str) -> Result<PathBuf, String> {
    let path = Path::new(given).canonicalize();
    let path = path.map_err(|error| error.to_string())?;
    match path.is_file() {
        true => Ok(path),
        false => Err("no file".into()),
    }
}

/// Somebody who answers in a type, and what was measured of it, round by round.
struct Answered {
    who: String,
    routing: String,
    rounds: Vec<Value>,
}

/// Answers in one type after the other; in a type everybody in turn, round by round. What is measured is kept
/// after every type.
pub fn run(args: &Args, root: &Path, record: &mut Record) -> anyhow::Result<()> {
    let model = Path::new(&args.model);
    ensure!(
        model.is_dir(),
        "`whole` runs a checkpoint: add --model DIR (`cargo xtask make-random` makes one)"
    );
    let image = args.whole.image.as_deref();
    let image = image.context("`whole` asks about a photo: add --image FILE")?;
    let program = match &args.whole.program {
        Some(program) => program.clone(),
        None => build(root, &args.backend[0])?,
    };
    let mut report = json!({
        "device": device(),
        "threads": thread::available_parallelism().map_or(1, usize::from),
        "memory_bytes": memory(),
        "model": name(&args.model),
        "backend": args.backend[0],
        "new_tokens": NEW_TOKENS,
        "rounds": args.rounds(),
        "whole": [],
    });
    let mut failed = Vec::new();
    for dtype in &args.dtype {
        let mut everybody = Vec::new();
        if let Err(error) = answers(args, dtype, &program, image, &mut everybody, record) {
            failed.push(format!("{dtype}: {error:#}"));
            record.notes.extend(failed.last().cloned());
        }
        let rows = everybody.iter().filter(|it| !it.rounds.is_empty());
        let rows: Vec<Value> = rows.map(|it| it.report(dtype)).collect();
        if let Some(list) = report["whole"].as_array_mut() {
            list.extend(rows);
        }
        record.backends = vec![report.clone()];
        if let Some(path) = &args.json {
            let mut all = record.origin();
            let both = all.as_object_mut().zip(report.as_object());
            both.into_iter()
                .for_each(|(all, more)| all.extend(more.clone()));
            record::write(path, &all)?;
        }
        // Tried again at the end.
        let _ = record.keep();
    }
    print!("{}", table(&report["whole"]));
    ensure!(failed.is_empty(), "{}", failed.join("; "));
    Ok(())
}

/// All rounds of a type.
fn answers(
    args: &Args,
    dtype: &str,
    program: &Path,
    image: &Path,
    everybody: &mut Vec<Answered>,
    record: &mut Record,
) -> anyhow::Result<()> {
    let scratch = tempfile::tempdir()?;
    everybody.extend(args.whole.routing.iter().map(|routing| Answered {
        who: "reroute".into(),
        routing: routing.clone(),
        rounds: Vec::new(),
    }));
    let ours = everybody.len();
    let mut peers: Vec<Peer> = Vec::new();
    for round in 0..args.rounds() {
        for ours in &mut everybody[..ours] {
            let mut command = Command::new(program);
            command
                .args(["ask", "--json", "--prompt", PROMPT])
                .args(["--model", &args.model, "--dtype", dtype])
                .args(["--routing", &ours.routing])
                .args(["--max-new-tokens", &NEW_TOKENS.to_string()])
                .arg("--image")
                .arg(image);
            forget(Path::new(&args.model));
            ours.rounds.push(asked(&mut command, scratch.path())?);
            progress(dtype, ours);
        }
        if round == 0 {
            let first = everybody.first().and_then(|ours| ours.rounds.first());
            let job = job(args, dtype, image, first.context("no routing")?);
            let programs = args.compare.iter().flat_map(|it| it.programs(args, true));
            for (at, (name, program)) in programs.enumerate() {
                let log = scratch.path().join(format!("{at}.log"));
                match Peer::start(name.clone(), program, &log, Some(&job)) {
                    Ok(peer) => {
                        everybody.push(Answered {
                            who: peer.said.title().into(),
                            routing: "dense".into(),
                            rounds: Vec::new(),
                        });
                        peers.push(peer);
                    }
                    Err(error) => {
                        let note = format!("{dtype}: peer {name} is left out: {error:#}");
                        record.notes.push(note);
                    }
                }
            }
        }
        for (theirs, peer) in everybody[ours..].iter_mut().zip(&mut peers) {
            if theirs.rounds.len() == round {
                match peer.measure().and_then(checked) {
                    Ok(measured) => {
                        theirs.rounds.push(measured);
                        progress(dtype, theirs);
                    }
                    Err(error) => {
                        let note =
                            format!("{dtype}: {} ended in round {round}: {error:#}", theirs.who);
                        record.notes.push(note);
                    }
                }
            }
        }
    }
    Ok(())
}

/// What a peer has to do to do the same (`benches/peers/README.md`).
fn job(args: &Args, dtype: &str, image: &Path, ours: &Value) -> Value {
    json!({
        "model": args.model,
        "image": image,
        "dtype": dtype,
        "text_rows": ours["text_rows"],
        "visual_tokens": ours["visual_tokens"],
        "new_tokens": NEW_TOKENS,
    })
}

/// Answers once, in a process of its own.
fn asked(command: &mut Command, scratch: &Path) -> anyhow::Result<Value> {
    let log = scratch.join("ours.log");
    let started = Instant::now();
    let mut process = command
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(fs::File::create(&log)?)
        .spawn()
        .with_context(|| format!("cannot start {:?}", command.get_program()))?;
    let mut output = process.stdout.take().context("no output")?;
    let text = thread::spawn(move || {
        let mut text = String::new();
        output.read_to_string(&mut text).map(|_| text)
    });
    let (peak, succeeded) = watch(&mut process)?;
    let wall = started.elapsed();
    let Ok(text) = text.join() else {
        bail!("its output could not be read")
    };
    if !succeeded {
        let words = fs::read_to_string(&log).unwrap_or_default();
        bail!("it ended with: {}", words.trim());
    }
    let said: Value = serde_json::from_str(&text?)?;
    let rows = said["prompt_rows"].as_u64().unwrap_or(0);
    let visual = said["visual_tokens"].as_u64().unwrap_or(0);
    let mut measured = said["seconds"].clone();
    measured["wall"] = json!(wall.as_secs_f64());
    measured["peak_bytes"] = json!(peak);
    measured["tokens"] = json!(said["tokens"].as_array().map_or(0, Vec::len));
    measured["visual_tokens"] = json!(visual);
    measured["text_rows"] = json!(rows - visual);
    measured["average_visual_tokens"] = said["average_visual_tokens"].clone();
    checked(measured)
}

/// What was measured, if all of it was.
fn checked(measured: Value) -> anyhow::Result<Value> {
    for what in ["tokens"].iter().chain(&MEASURED) {
        ensure!(
            measured[*what].is_number(),
            "it said {measured}, which has no {what}"
        );
    }
    Ok(measured)
}

/// Waits for a program to end; the most memory that it had, in bytes, where the system tells, and whether it
/// succeeded.
fn watch(process: &mut Child) -> anyhow::Result<(Option<u64>, bool)> {
    let status = PathBuf::from(format!("/proc/{}/status", process.id()));
    let mut peak = None;
    loop {
        // Of a program that has ended nothing is told, so that the look before counts.
        let text = fs::read_to_string(&status).unwrap_or_default();
        peak = peak.max(kib(&text, "VmHWM:").map(|kib| kib << 10));
        match process.try_wait()? {
            Some(status) => return Ok((peak, status.success())),
            None => thread::sleep(LOOK),
        }
    }
}

/// A line of `/proc` that counts KiB.
fn kib(text: &str, field: &str) -> Option<u64> {
    let line = text.lines().find_map(|line| line.strip_prefix(field))?;
    line.trim().strip_suffix("kB")?.trim().parse().ok()
}

/// Of the machine, in bytes.
fn memory() -> Option<u64> {
    let text = fs::read_to_string("/proc/meminfo").ok()?;
    kib(&text, "MemTotal:").map(|kib| kib << 10)
}

fn device() -> String {
    let text = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let line = text
        .lines()
        .find_map(|line| line.strip_prefix("model name"));
    let named = line.map(|line| line.trim_matches([' ', '\t', ':']).to_string());
    named.unwrap_or_else(|| std::env::consts::ARCH.into())
}

/// Makes the system drop what it remembers of a model's files, so that everybody loads from the disk: what is
/// left of them in memory depends on who ran before.
fn forget(folder: &Path) {
    for entry in folder.read_dir().into_iter().flatten().flatten() {
        let mut input = std::ffi::OsString::from("if=");
        input.push(entry.path());
        let mut dd = Command::new("dd");
        dd.arg(input).args(["iflag=nocache", "count=0"]);
        // Where there is no such program, loading is faster after the first time.
        let _ = dd.stdout(Stdio::null()).stderr(Stdio::null()).status();
    }
}

/// Builds the program of a backend; where it is.
fn build(root: &Path, backend: &str) -> anyhow::Result<PathBuf> {
    let output = Command::new(env!("CARGO"))
        .current_dir(root)
        .args(["build", "--quiet", "--release", "-p", "reroute-cli"])
        .args(["--bin", "reroute", "--no-default-features"])
        .args(["--features", backend, "--message-format", "json"])
        .stderr(Stdio::inherit())
        .output()
        .context("cannot start cargo")?;
    ensure!(
        output.status.success(),
        "cargo ended with {}",
        output.status
    );
    let text = String::from_utf8(output.stdout)?;
    let said = text
        .lines()
        .filter_map(|line| serde_json::from_str(line).ok());
    let program = said
        .filter_map(|it: Value| it["executable"].as_str().map(PathBuf::from))
        .next_back();
    program.context("cargo does not say where the program is")
}

impl Answered {
    /// Medians of the rounds, and the rounds.
    fn report(&self, dtype: &str) -> Value {
        let of = |number: &dyn Fn(&Value) -> Option<f64>| {
            let numbers: Option<Vec<f64>> = self.rounds.iter().map(number).collect();
            numbers.map(median).filter(|it| it.is_finite())
        };
        let first_token = |it: &Value| Some(it["vision"].as_f64()? + it["prefill"].as_f64()?);
        let mut report = json!({
            "who": self.who,
            "dtype": dtype,
            "routing": self.routing,
            "first_token": of(&first_token),
            "answer": of(&|it| Some(first_token(it)? + it["decode"].as_f64()?)),
            // The first token is the prefill's.
            "tokens_per_second": of(&|it| Some((it["tokens"].as_f64()? - 1.0) / it["decode"].as_f64()?)),
            "rounds": self.rounds,
        });
        for what in MEASURED.iter().chain(&["tokens"]) {
            report[*what] = json!(of(&|it| it[*what].as_f64()));
        }
        report
    }
}

/// What has just been measured.
fn progress(dtype: &str, it: &Answered) {
    let last = it.rounds.last().unwrap_or(&Value::Null);
    println!("{dtype} {} {}: {last}", it.who, it.routing);
}

/// As Markdown.
fn table(rows: &Value) -> String {
    let mut text = String::from(
        "\n| type | who | routing | loading | first token | of it vision | tokens/s | answer | peak memory |\n\
         |---|---|---|---|---|---|---|---|---|\n",
    );
    for row in rows.as_array().into_iter().flatten() {
        let word = |what: &str| row[what].as_str().unwrap_or("?");
        let number = |what: &str| row[what].as_f64().unwrap_or(f64::NAN);
        text += &format!(
            "| {} | {} | {} | {:.1} s | {:.2} s | {:.2} s | {:.2} | {:.1} s | {:.1} GB |\n",
            word("dtype"),
            word("who"),
            word("routing"),
            number("loading"),
            number("first_token"),
            number("vision"),
            number("tokens_per_second"),
            number("answer"),
            number("peak_bytes") / 1e9,
        );
    }
    text
}

#[cfg(test)]
mod tests {
    use std::process::Command;

    use clap::Parser;
    use serde_json::json;

    use super::super::{Args, record::Record};
    use super::{Answered, asked, kib, table};

    #[derive(Parser)]
    struct Line {
        #[command(flatten)]
        bench: Args,
    }

    fn args(line: &[&str]) -> Args {
        let line = Line::try_parse_from([&["bench", "whole"], line].concat());
        line.unwrap_or_else(|error| panic!("{error}")).bench
    }

    #[test]
    fn what_is_missing_is_said_before_anything_runs() {
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join("config.json"), "{}").unwrap();
        let model = folder.path().to_str().unwrap();
        for (line, words) in [
            (&[][..], "add --model"),
            (&["--model", model], "add --image"),
        ] {
            let mut record = Record::new(folder.path(), folder.path(), "").unwrap();
            let error = super::run(&args(line), folder.path(), &mut record).unwrap_err();
            assert!(error.to_string().contains(words), "{error}");
        }
    }

    #[test]
    fn of_a_folder_those_run_that_run_whole_models() {
        let folder = tempfile::tempdir().unwrap();
        for name in ["a_layer.py", "a_whole.py"] {
            std::fs::write(folder.path().join(name), "").unwrap();
        }
        let args = args(&["--compare", folder.path().to_str().unwrap()]);
        for (whole, end) in [(true, "a_whole.py"), (false, "a_layer.py")] {
            let programs = args.compare[0].programs(&args, whole);
            assert_eq!(programs.len(), 1);
            assert!(programs[0].0.ends_with(end));
        }
    }

    #[test]
    fn an_answer_is_read_and_the_memory_of_its_program() {
        let folder = tempfile::tempdir().unwrap();
        let said = json!({
            "prompt_rows": 640, "visual_tokens": 576, "tokens": [1, 2, 3], "average_visual_tokens": 191.6,
            "seconds": {"loading": 8.0, "vision": 1.0, "prefill": 2.0, "decode": 0.5},
        });
        let script = format!("sleep 0.1; echo '{said}'");
        let run = |script: &str| asked(Command::new("sh").args(["-c", script]), folder.path());
        let measured = run(&script).unwrap();
        assert_eq!(measured["text_rows"], 64);
        assert_eq!(measured["loading"], 8.0);
        assert!(measured["wall"].as_f64() > Some(0.1));
        assert!(measured["peak_bytes"].as_u64() > Some(1 << 18));
        let silent = run("sleep 0.1; echo '{}'").unwrap_err().to_string();
        assert!(
            silent.contains("no tokens") || silent.contains("no loading"),
            "{silent}"
        );
        let failed = run("echo error: no such file >&2; exit 2").unwrap_err();
        assert!(failed.to_string().contains("no such file"), "{failed}");
    }

    #[test]
    fn medians_are_of_the_rounds_and_the_first_token_is_the_prefills() {
        let round = |prefill: f64| {
            json!({
                "loading": 8.0, "vision": 1.0, "prefill": prefill, "decode": 0.5, "tokens": 3,
                "peak_bytes": 2_000_000_000_u64,
            })
        };
        let answered = Answered {
            who: "reroute".into(),
            routing: "dense".into(),
            rounds: [2.0, 9.0, 3.0].map(round).to_vec(),
        };
        let report = answered.report("q4");
        assert_eq!(report["first_token"], 4.0);
        assert_eq!(report["tokens_per_second"], 4.0);
        assert_eq!(report["answer"], 4.5);
        let line = "| q4 | reroute | dense | 8.0 s | 4.00 s | 1.00 s | 4.00 | 4.5 s | 2.0 GB |";
        assert_eq!(table(&json!([report])).lines().last(), Some(line));
    }

    #[test]
    fn memory_is_read_as_the_system_writes_it() {
        let text = "Name:\tsh\nVmPeak:\t  900 kB\nVmHWM:\t    1024 kB\n";
        assert_eq!(kib(text, "VmHWM:"), Some(1024));
        assert_eq!(kib(text, "VmRSS:"), None);
    }
}
