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
/// them. Who is not there, or stops answering, is left out with a note.
pub fn compare(args: &Args, notes: &mut Vec<String>) -> anyhow::Result<Vec<Value>> {
    let scratch = tempfile::tempdir()?;
    let mut ours = program(args, &args.backend[0]);
    ours.arg("peer");
    let log = scratch.path().join("ours.log");
    let mut ours = Peer::start("reroute".into(), ours, &log).context("our own program")?;
    let mut others = Vec::new();
    for given in &args.compare {
        for (name, command) in find(given, args)? {
            let log = scratch.path().join(format!("{}.log", others.len()));
            match Peer::start(name.clone(), command, &log) {
                Ok(peer) => others.push(peer),
                Err(error) => notes.push(left_out(&name, &error)),
            }
        }
    }
    let rounds = if args.smoke { 1 } else { args.rounds };
    for _ in 0..=rounds {
        ours.ask()?;
        others.retain_mut(|peer| match peer.ask() {
            Ok(()) => true,
            Err(error) => {
                notes.push(left_out(&peer.name, &error));
                false
            }
        });
    }
    let times = ours.rounds.clone();
    let everybody = std::iter::once(ours).chain(others);
    Ok(everybody.map(|peer| peer.report(&times)).collect())
}

fn left_out(name: &str, error: &anyhow::Error) -> String {
    format!("peer {name} is left out: {error:#}")
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
    /// Where it was found.
    name: String,
    /// What it said about itself.
    hello: Value,
    process: Child,
    questions: ChildStdin,
    answers: BufReader<ChildStdout>,
    /// Its measurements. The first warms caches up and does not count.
    rounds: Vec<Value>,
}

impl Peer {
    /// Starts a program and waits until it is ready; what it complains of goes to `log`.
    fn start(name: String, mut command: Command, log: &Path) -> anyhow::Result<Self> {
        let mut process = command
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(File::create(log)?)
            .spawn()
            .with_context(|| format!("cannot start {:?}", command.get_program()))?;
        let (questions, answers) = (process.stdin.take(), process.stdout.take());
        let mut peer = Self {
            name,
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

    /// Lets it measure once more.
    fn ask(&mut self) -> anyhow::Result<()> {
        let mut ask = || {
            writeln!(self.questions)?;
            self.questions.flush()?;
            self.line()
        };
        let times = ask().context("it stopped answering")?;
        self.rounds.push(times);
        Ok(())
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
                rounds.iter().skip(1).map(time).collect()
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
        let script = r#"echo '{"peer": "shell"}'; for t in 70 10 20 40; do read _
            echo "{\"prefill_ms\": $t, \"decode_ms\": 4}"; done"#;
        let log = folder.path().join("log");
        let mut peer = Peer::start("shell".into(), shell(script), &log).unwrap();
        for _ in 0..4 {
            peer.ask().unwrap();
        }
        assert!(peer.ask().is_err(), "it has ended");
        let ours: Vec<_> = [90.0, 5.0, 5.0, 20.0]
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
            "shell".into(),
            shell("echo no torch here >&2; exit 1"),
            &folder.path().join("log"),
        );
        let error = started.err().expect("it has not started").to_string();
        assert_eq!(error, "no torch here");
    }
}
