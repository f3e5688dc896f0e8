//! Other implementations, timed in turn with ours so that all see the same minutes of a shared machine.
//!
//! A peer is a program that reads one line of JSON with a shape, prints one line when it is ready, and
//! for every further line that it reads one line with its `prefill_ms` and `decode_ms`
//! (`benches/peers/README.md`).

use std::fs::{self, File};
use std::io::{self, BufRead, BufReader, Write};
use std::iter;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, ExitStatus, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, bail, ensure};
use serde_json::{Value, json};

use super::record::Record;
use super::types::{self, Answers, QUANTITIES};
use super::{Args, name, program};

/// How long a peer may take to be built, make its weights and run once.
const PATIENCE_AT_FIRST: Duration = Duration::from_secs(3600);

/// How long it may take to measure once.
const PATIENCE: Duration = Duration::from_secs(600);

/// How long a program that says nothing any more, or is asked nothing any more, may take to end.
const PATIENCE_AT_LAST: Duration = Duration::from_secs(5);

/// Between two looks at whether it has.
const LOOK: Duration = Duration::from_millis(20);

/// Whom to compare with.
#[derive(Clone)]
pub enum Compared {
    /// Scripts, and manifests of crates.
    Folder(Vec<PathBuf>),
    /// What the shell runs.
    Command(String),
}

/// The peers of a folder, by name, or the one that a command starts.
pub fn find(given: &str) -> Result<Compared, String> {
    let folder = Path::new(given);
    if !folder.is_dir() {
        let program = given.split_whitespace().next().unwrap_or_default();
        let mut known = Command::new("sh");
        known.args(["-c", r#"command -v "$1""#, "sh", program]);
        let known = known.stdout(Stdio::null()).status();
        return match known.is_ok_and(|status| status.success()) {
            true => Ok(Compared::Command(given.into())),
            false => Err(format!(
                "neither a folder nor a command: the shell finds no {program:?}"
            )),
        };
    }
    let entries = fs::read_dir(folder).and_then(Iterator::collect::<io::Result<Vec<_>>>);
    let mut entries = entries.map_err(|error| error.to_string())?;
    entries.sort_by_key(fs::DirEntry::file_name);
    let peers = entries.iter().map(fs::DirEntry::path).filter_map(|path| {
        let manifest = path.join("Cargo.toml");
        let script = path.extension().is_some_and(|extension| extension == "py");
        script
            .then_some(path)
            .or(manifest.is_file().then_some(manifest))
    });
    let peers: Vec<PathBuf> = peers.collect();
    match peers.is_empty() {
        true => Err("no peers in this folder: neither .py files nor folders of crates".into()),
        false => Ok(Compared::Folder(peers)),
    }
}

impl Compared {
    /// The program of every peer, after the peer's name: of a folder those of layers, or those that run a `whole`
    /// model.
    pub fn programs(&self, args: &Args, whole: bool) -> Vec<(String, Command)> {
        let python = args.python.clone();
        let python = python.or_else(|| std::env::var("REROUTE_PYTHON").ok());
        let python = python.unwrap_or_else(|| "python3".into());
        match self {
            Self::Command(given) => {
                let mut shell = Command::new("sh");
                shell.args(["-c", given]);
                vec![(given.clone(), shell)]
            }
            Self::Folder(peers) => peers
                .iter()
                .filter(|path| path.to_string_lossy().ends_with("_whole.py") == whole)
                .map(|path| {
                    let mut command;
                    if path.ends_with("Cargo.toml") {
                        command = Command::new(env!("CARGO"));
                        command.args(["run", "--release", "--quiet", "--manifest-path"]);
                    } else {
                        command = Command::new(&python);
                    }
                    command.arg(path);
                    (path.display().to_string(), command)
                })
                .collect(),
        }
    }
}

/// Compares in one type after the other, and keeps what was found after each.
pub fn compare(args: &Args, root: &Path, record: &mut Record) -> anyhow::Result<()> {
    let mut found = Vec::new();
    let mut failed = Vec::new();
    for dtype in &args.dtype {
        let mut comparison = Comparison::default();
        if let Err(error) = comparison.run(args, root, dtype, record) {
            comparison.notes.push(format!("{error:#}"));
            failed.push(format!("{dtype}: {error:#}"));
        }
        let (ours, notes) = (comparison.ours.as_ref(), &comparison.notes);
        let others: Vec<&Answers> = comparison.others.iter().map(|peer| &peer.said).collect();
        found.push(types::report(
            dtype,
            ours.map(|peer| &peer.said),
            &others,
            notes,
        ));
        found.last().into_iter().for_each(types::print);
        let noted = comparison.notes.into_iter();
        record
            .notes
            .extend(noted.map(|note| format!("{dtype}: {note}")));
        if let Some(path) = &args.json {
            let mut origin = record.origin();
            origin["backend"] = json!(args.backend[0]);
            origin["model"] = json!(if args.smoke { "toy" } else { name(&args.model) });
            origin["rounds"] = json!(args.rounds());
            types::keep(path, &origin, &found)?;
        }
    }
    ensure!(failed.is_empty(), "{}", failed.join("; "));
    Ok(())
}

/// Everybody who runs in one type; they end with it.
#[derive(Default)]
struct Comparison {
    ours: Option<Peer>,
    others: Vec<Peer>,
    notes: Vec<String>,
}

impl Comparison {
    /// Starts everybody, asks them in turn, round by round, and records it after each. The first
    /// results are ours, the others are compared with them. Who is not there, or stops answering, is
    /// left out from then on, with a note.
    fn run(
        &mut self,
        args: &Args,
        root: &Path,
        dtype: &str,
        record: &mut Record,
    ) -> anyhow::Result<()> {
        let scratch = tempfile::tempdir()?;
        let mut program = program(args, root, &args.backend[0], dtype);
        program.arg("peer");
        let log = scratch.path().join("ours.log");
        let ours = Peer::start("reroute".into(), program, &log, None);
        let ours = self.ours.insert(ours.context("our own program")?);
        let shape = ours.said.hello["shape"].clone();
        let programs = args
            .compare
            .iter()
            .flat_map(|given| given.programs(args, false));
        for (name, program) in programs {
            let log = scratch.path().join(format!("{}.log", self.others.len()));
            match Peer::start(name.clone(), program, &log, Some(&shape)) {
                Ok(peer) => self.others.push(peer),
                Err(error) => {
                    let note = format!("peer {name} is left out: {error:#}");
                    self.notes.push(note);
                }
            }
        }
        let earlier = record.peers.clone();
        for round in 0..=args.rounds() {
            ours.ask().context("our own program")?;
            let others = self.others.iter_mut();
            for peer in others.filter(|peer| peer.said.rounds.len() == round) {
                if let Err(error) = peer.ask() {
                    let name = &peer.said.name;
                    let note = format!("peer {name} ended in round {round}: {error:#}");
                    self.notes.push(note);
                    // It would go on beside the others.
                    let _ = peer.process.kill();
                }
            }
            // The first round does not count.
            let everybody = iter::once(&*ours).chain(&self.others);
            let everybody = everybody.map(|peer| &peer.said).filter(|said| said.count());
            let reports = everybody.map(|said| said.report(&ours.said));
            record.peers = earlier.iter().cloned().chain(reports).collect();
            if round > 0 {
                // Tried again at the end.
                let _ = record.keep();
            }
        }
        Ok(())
    }
}

/// A running peer.
pub struct Peer {
    pub said: Answers,
    process: Child,
    /// Until it shall end.
    questions: Option<ChildStdin>,
    answers: Receiver<io::Result<String>>,
    /// Where its complaints go.
    log: PathBuf,
}

impl Peer {
    /// Starts a program and waits until it is ready to run a shape; ours says which one it is.
    pub fn start(
        name: String,
        mut command: Command,
        log: &Path,
        shape: Option<&Value>,
    ) -> anyhow::Result<Self> {
        let mut process = command
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(File::create(log)?)
            .spawn()
            .with_context(|| format!("cannot start {:?}", command.get_program()))?;
        let (questions, output) = (process.stdin.take(), process.stdout.take());
        let output = BufReader::new(output.context("no output")?);
        let (said, answers) = channel();
        // Ends with the program's output, or when nobody listens any more.
        thread::spawn(move || output.lines().try_for_each(|line| said.send(line)));
        let mut peer = Self {
            said: Answers {
                name,
                hello: Value::Null,
                rounds: Vec::new(),
            },
            process,
            questions,
            answers,
            log: log.into(),
        };
        if let Some(shape) = shape {
            peer.say(&shape.to_string());
        }
        peer.said.hello = peer.line(PATIENCE_AT_FIRST)?;
        let theirs = &peer.said.hello["shape"];
        ensure!(
            shape.is_none_or(|shape| shape == theirs),
            "it runs the shape {theirs}, not the one on its first line of input \
             (benches/peers/README.md)"
        );
        Ok(peer)
    }

    /// Writes it a line. Who has already ended says in its answer why.
    fn say(&mut self, line: &str) {
        let questions = self.questions.as_mut();
        let _ = questions.map(|questions| writeln!(questions, "{line}"));
    }

    /// Lets it measure once more; what it says.
    pub fn measure(&mut self) -> anyhow::Result<Value> {
        self.say("");
        self.line(PATIENCE)
    }

    /// Lets it measure layers once more.
    fn ask(&mut self) -> anyhow::Result<()> {
        let times = self.measure()?;
        for quantity in QUANTITIES {
            let time = times[quantity].as_f64();
            let time = time.with_context(|| format!("it said {times}, which has no {quantity}"))?;
            ensure!(
                time > 0.0,
                "twice the layers took no longer: it said {times}, {quantity} being the difference"
            );
        }
        self.said.rounds.push(times);
        Ok(())
    }

    /// The next line of JSON.
    fn line(&mut self, patience: Duration) -> anyhow::Result<Value> {
        let line = match self.answers.recv_timeout(patience) {
            Ok(line) => line?,
            Err(RecvTimeoutError::Timeout) => bail!("it was silent for {patience:?}"),
            Err(RecvTimeoutError::Disconnected) => bail!(self.last_words()),
        };
        serde_json::from_str(&line).with_context(|| format!("it said {:?}", line.trim()))
    }

    /// How it has ended, if it does so before long.
    fn end(&mut self) -> Option<ExitStatus> {
        let started = Instant::now();
        while started.elapsed() < PATIENCE_AT_LAST {
            match self.process.try_wait() {
                Ok(None) => thread::sleep(LOOK),
                ended => return ended.ok().flatten(),
            }
        }
        None
    }

    /// Why it has ended.
    fn last_words(&mut self) -> String {
        // No exit code: it was killed, and what it wrote last has nothing to do with it.
        if let Some(status) = self.end().filter(|status| status.code().is_none()) {
            return format!("it ended with {status}");
        }
        let complaints = fs::read_to_string(&self.log).unwrap_or_default();
        let mut lines = complaints.lines().filter(|line| !line.trim().is_empty());
        // Cargo and clap say first what is wrong, and then what to do; Python says it last.
        let first = lines.clone().find(|line| line.starts_with("error"));
        let words = first.or_else(|| lines.next_back()).map(str::trim);
        words.unwrap_or("it ended without a word").into()
    }
}

impl Drop for Peer {
    fn drop(&mut self) {
        // The end of its input is what ends it; it may have files to remove.
        self.questions = None;
        if self.end().is_none() {
            let _ = self.process.kill();
            let _ = self.process.wait();
        }
    }
}

#[cfg(test)]
mod tests {
    use std::process::Command;
    use std::time::Duration;

    use serde_json::json;

    use super::{Answers, Compared, Peer, find};

    /// What a shell script becomes as a peer that is asked for `{"rows": 8}`.
    fn start(script: &str) -> anyhow::Result<Peer> {
        let folder = tempfile::tempdir().unwrap();
        let mut shell = Command::new("sh");
        shell.args(["-c", script]);
        let log = folder.path().join("log");
        Peer::start("shell".into(), shell, &log, Some(&json!({"rows": 8})))
    }

    fn refusal(script: &str) -> String {
        let error = start(script).err().expect("it has not started");
        error.to_string()
    }

    #[test]
    fn a_peer_answers_line_by_line_and_is_compared_round_by_round() {
        let script = r#"read shape; echo "{\"peer\": \"shell\", \"shape\": $shape}"
            for t in 70 10 20 40; do read _
            echo "{\"prefill_ms\": $t, \"decode_ms\": 4}"; done"#;
        let mut peer = start(script).unwrap();
        for _ in 0..4 {
            peer.ask().unwrap();
        }
        assert!(peer.ask().is_err(), "it has ended");
        let ours = Answers {
            name: "ours".into(),
            hello: json!({}),
            rounds: [90.0, 5.0, 5.0, 20.0]
                .map(|time| json!({"prefill_ms": time, "decode_ms": 2.0}))
                .to_vec(),
        };
        let report = peer.said.report(&ours);
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
        for (script, words) in [
            (
                "echo Traceback >&2; echo no torch here >&2; exit 1",
                "no torch here",
            ),
            (
                "echo error: no int8 >&2; echo see --help >&2; exit 2",
                "error: no int8",
            ),
            ("exit 1", "it ended without a word"),
        ] {
            assert_eq!(refusal(script), words);
        }
        let killed = refusal("echo all is well >&2; kill -ILL $$");
        assert!(killed.contains("signal: 4"), "{killed}");
    }

    #[test]
    fn a_peer_may_tidy_up_when_its_input_ends() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("tidied");
        let script = format!(
            r#"read shape; echo "{{\"peer\": \"shell\", \"shape\": $shape}}"
            while read _; do :; done; sleep 0.1; echo > {}"#,
            path.display()
        );
        drop(start(&script).unwrap());
        assert!(path.is_file());
    }

    #[test]
    fn a_difference_that_is_not_positive_is_no_time() {
        let script = r#"read shape; echo "{\"peer\": \"shell\", \"shape\": $shape}"
            read _; echo '{"prefill_ms": -7, "decode_ms": 1}'; read _"#;
        let error = start(script).unwrap().ask().unwrap_err().to_string();
        assert!(error.contains("took no longer"), "{error}");
    }

    #[test]
    fn a_peer_of_another_shape_is_not_compared() {
        let refusal = refusal(r#"echo '{"peer": "shell", "shape": {"rows": 9}}'; read _; read _"#);
        assert!(
            refusal.contains(r#"runs the shape {"rows":9}"#),
            "{refusal}"
        );
    }

    #[test]
    fn answers_without_times_and_silence_are_errors() {
        let script = r#"read shape; echo "{\"peer\": \"shell\", \"shape\": $shape}"
            read _; echo '{"prefill_ms": 7}'; exec sleep 60"#;
        let mut peer = start(script).unwrap();
        let error = peer.ask().unwrap_err().to_string();
        assert!(error.contains("decode_ms"), "{error}");
        assert!(peer.said.rounds.is_empty());
        let error = peer.line(Duration::from_millis(1)).unwrap_err();
        assert_eq!(error.to_string(), "it was silent for 1ms");
        peer.process.kill().unwrap();
    }

    #[test]
    fn whom_to_compare_with_is_checked_at_once() {
        let folder = tempfile::tempdir().unwrap();
        let refusal = |given: &str| find(given).err().expect("it is refused");
        let path = folder.path().to_str().unwrap();
        assert!(refusal(path).contains("no peers"));
        assert!(refusal("no-such-folder --fast").contains("no-such-folder"));
        std::fs::write(folder.path().join("a.py"), "").unwrap();
        std::fs::write(folder.path().join("README.md"), "").unwrap();
        std::fs::create_dir(folder.path().join("b")).unwrap();
        std::fs::write(folder.path().join("b/Cargo.toml"), "").unwrap();
        let Ok(Compared::Folder(peers)) = find(path) else {
            panic!("a folder with peers");
        };
        assert_eq!(
            peers,
            ["a.py", "b/Cargo.toml"].map(|name| folder.path().join(name))
        );
        assert!(matches!(find("sh -c true"), Ok(Compared::Command(_))));
    }
}
