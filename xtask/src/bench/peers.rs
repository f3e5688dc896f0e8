//! Other implementations, timed in turn with ours so that all see the same minutes of a shared machine.
//!
//! A peer is a program that prints one line of JSON when it is ready, and for every line that it
//! reads one line with its `prefill_ms` and `decode_ms` (`benches/peers/README.md`).

use std::fs::{self, File};
use std::io::{BufRead, BufReader, Write};
use std::path::Path;
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};

use anyhow::{Context, bail};
use serde_json::{Value, json};

use super::{Args, program};

/// What a peer measures.
const QUANTITIES: [&str; 2] = ["prefill_ms", "decode_ms"];

/// Asks everybody in turn, round by round. The first results are ours, the others are compared with
/// them. Who is not there is left out with a note.
pub fn compare(args: &Args, notes: &mut Vec<String>) -> anyhow::Result<Vec<Value>> {
    let scratch = tempfile::tempdir()?;
    let mut ours = program(args, &args.backend[0]);
    ours.arg("peer");
    let mut commands = vec![("reroute".to_string(), ours)];
    for given in &args.compare {
        commands.extend(find(given, args)?);
    }
    let mut peers = Vec::new();
    for (at, (name, command)) in commands.into_iter().enumerate() {
        let log = scratch.path().join(format!("{at}.log"));
        match Peer::start(command, &log) {
            Ok(peer) => peers.push(peer),
            Err(error) if at == 0 => return Err(error.context("our own program")),
            Err(error) => notes.push(format!("peer {name} is left out: {error:#}")),
        }
    }
    let rounds = if args.smoke { 1 } else { args.rounds };
    // The first round warms caches up.
    for round in 0..=rounds {
        for peer in &mut peers {
            let times = peer.ask()?;
            if round > 0 {
                peer.rounds.push(times);
            }
        }
    }
    let Some(ours) = peers.first().map(|peer| peer.rounds.clone()) else {
        return Ok(Vec::new());
    };
    Ok(peers.into_iter().map(|peer| peer.report(&ours)).collect())
}

/// The peers of a folder, by name, or the one that a command starts.
fn find(given: &str, args: &Args) -> anyhow::Result<Vec<(String, Command)>> {
    let folder = Path::new(given);
    if !folder.is_dir() {
        let mut shell = Command::new("sh");
        shell.args(["-c", given]);
        return Ok(vec![(given.to_string(), shell)]);
    }
    let python = args.python.clone();
    let python = python.or_else(|| std::env::var("REROUTE_PYTHON").ok());
    let python = python.unwrap_or_else(|| "python3".into());
    let mut entries: Vec<_> = fs::read_dir(folder)
        .with_context(|| given.to_string())?
        .collect::<Result<_, _>>()?;
    entries.sort_by_key(fs::DirEntry::file_name);
    let mut commands = Vec::new();
    for path in entries.iter().map(fs::DirEntry::path) {
        let manifest = path.join("Cargo.toml");
        let mut command = if path.extension().is_some_and(|extension| extension == "py") {
            let mut command = Command::new(&python);
            command.arg(&path);
            command
        } else if manifest.is_file() {
            let mut command = Command::new(env!("CARGO"));
            command.args(["run", "--release", "--quiet", "--manifest-path"]);
            command.arg(manifest).arg("--");
            command
        } else {
            continue;
        };
        command.args(args.smoke.then_some("--test"));
        commands.push((path.display().to_string(), command));
    }
    Ok(commands)
}

/// A running peer.
struct Peer {
    /// What it said about itself.
    hello: Value,
    process: Child,
    questions: ChildStdin,
    answers: BufReader<ChildStdout>,
    /// Its measurements.
    rounds: Vec<Value>,
}

impl Peer {
    /// Starts a program and waits until it is ready; what it complains of goes to `log`.
    fn start(mut command: Command, log: &Path) -> anyhow::Result<Self> {
        let mut process = command
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(File::create(log)?)
            .spawn()
            .with_context(|| format!("cannot start {:?}", command.get_program()))?;
        let (questions, answers) = (process.stdin.take(), process.stdout.take());
        let mut peer = Self {
            hello: Value::Null,
            process,
            questions: questions.context("no input")?,
            answers: BufReader::new(answers.context("no output")?),
            rounds: Vec::new(),
        };
        peer.hello = peer.line().map_err(|error| {
            let complaints = fs::read_to_string(log).unwrap_or_default();
            match complaints.trim().lines().last() {
                Some(last) => anyhow::anyhow!("{last}"),
                None => error,
            }
        })?;
        Ok(peer)
    }

    fn ask(&mut self) -> anyhow::Result<Value> {
        writeln!(self.questions)?;
        self.questions.flush()?;
        let name = self.hello["peer"].clone();
        self.line()
            .with_context(|| format!("peer {name} stopped answering"))
    }

    /// The next line of JSON.
    fn line(&mut self) -> anyhow::Result<Value> {
        let mut line = String::new();
        if self.answers.read_line(&mut line)? == 0 {
            bail!("it ended without a word");
        }
        serde_json::from_str(&line).with_context(|| format!("it said {:?}", line.trim()))
    }

    /// Its times, and how many of them ours took, round by round.
    fn report(mut self, ours: &[Value]) -> Value {
        let mut report = self.hello.take();
        for quantity in QUANTITIES {
            let times = |rounds: &[Value]| -> Vec<f64> {
                let time = |round: &Value| round[quantity].as_f64().unwrap_or(f64::NAN);
                rounds.iter().map(time).collect()
            };
            let (theirs, ours) = (times(&self.rounds), times(ours));
            let ratios = ours.iter().zip(&theirs).map(|(ours, theirs)| ours / theirs);
            report[format!("ours_over_it_{quantity}")] = spread(ratios.collect());
            report[quantity] = spread(theirs);
        }
        report
    }
}

impl Drop for Peer {
    fn drop(&mut self) {
        // It may have ended by itself.
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

/// Median, least and most.
fn spread(mut values: Vec<f64>) -> Value {
    values.sort_by(f64::total_cmp);
    let middle = (values.len().saturating_sub(1) / 2, values.len() / 2);
    let at = |index: usize| values.get(index).copied().unwrap_or(f64::NAN);
    json!({
        "median": at(middle.0).midpoint(at(middle.1)),
        "least": at(0),
        "most": at(values.len().saturating_sub(1)),
        "runs": values.len(),
    })
}

/// Prints the comparison.
pub fn print(peers: &[Value]) {
    println!(
        "\nTwo layers, one prompt, one more token, in turn; `ours` as a share of the other's time"
    );
    println!(
        "{:<46} {:>12} {:>8} {:>12} {:>8}",
        "who", "prefill ms", "ours", "decode ms", "ours"
    );
    for peer in peers {
        let median = |name: &str| peer[name]["median"].as_f64().unwrap_or(f64::NAN);
        println!(
            "{:<46} {:>12.1} {:>7.2}x {:>12.1} {:>7.2}x",
            peer["peer"].as_str().unwrap_or("?"),
            median("prefill_ms"),
            median("ours_over_it_prefill_ms"),
            median("decode_ms"),
            median("ours_over_it_decode_ms"),
        );
    }
}

#[cfg(test)]
mod tests {
    use std::process::Command;

    use super::Peer;

    fn shell(script: &str) -> Command {
        let mut shell = Command::new("sh");
        shell.args(["-c", script]);
        shell
    }

    #[test]
    fn a_peer_answers_line_by_line_and_is_compared_round_by_round() {
        let folder = tempfile::tempdir().unwrap();
        let script = r#"echo '{"peer": "shell"}'; t=10; while read _; do
            echo "{\"prefill_ms\": $t, \"decode_ms\": 4}"; t=$((t * 2)); done"#;
        let mut peer = Peer::start(shell(script), &folder.path().join("log")).unwrap();
        for _ in 0..3 {
            let times = peer.ask().unwrap();
            peer.rounds.push(times);
        }
        let ours: Vec<_> = [5.0, 5.0, 20.0]
            .map(|time| serde_json::json!({"prefill_ms": time, "decode_ms": 2.0}))
            .to_vec();
        let report = peer.report(&ours);
        assert_eq!(report["peer"], "shell");
        assert_eq!(report["prefill_ms"]["median"], 20.0);
        assert_eq!(report["prefill_ms"]["most"], 40.0);
        // 5 of 10, 5 of 20, 20 of 40.
        assert_eq!(report["ours_over_it_prefill_ms"]["median"], 0.5);
        assert_eq!(report["ours_over_it_prefill_ms"]["least"], 0.25);
        assert_eq!(report["ours_over_it_decode_ms"]["most"], 0.5);
    }

    #[test]
    fn an_absent_peer_says_why() {
        let folder = tempfile::tempdir().unwrap();
        let started = Peer::start(
            shell("echo no torch here >&2; exit 1"),
            &folder.path().join("log"),
        );
        let error = started.err().expect("it has not started").to_string();
        assert_eq!(error, "no torch here");
    }
}
