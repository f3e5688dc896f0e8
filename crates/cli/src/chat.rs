//! `reroute chat`: questions that follow one another.

use std::io::{BufRead, IsTerminal, Write, stderr, stdin};
use std::path::Path;

use anyhow::{Context, bail};
use reducers::Plan;
use reroute::RerouteError;
use reroute_zoo::{Conversation, Question, Visual, Vlm, ZooError};

use crate::args::ChatArgs;
use crate::backend::Backend;
use crate::known::{self, Known};
use crate::source::is_stdin;
use crate::{open, output};

const HELP: &str = "\
A line is a question; the answer follows. Images and videos stay in the conversation.
  /image FILE   the next question is also about this image; a name may stand in quotation marks
  /video DIR    the next question is also about this video, a folder of frames
  /reset        forget everything
  /help         this text
  /quit         leave; so does the end of the input";

/// What to do about a conversation that is too long.
const FULL: &str = "the conversation is full: /reset forgets it, then ask again";

/// Longest line that is read, in bytes.
const MAX_LINE_BYTES: usize = 1 << 20;

/// Runs the command on the standard input.
pub fn run(args: &ChatArgs, out: &mut dyn Write) -> anyhow::Result<()> {
    run_on(args, &mut stdin().lock(), stdin().is_terminal(), out)
}

/// Runs the command on any input. A person at a terminal may try again after a mistake; elsewhere the
/// first mistake ends the program.
pub fn run_on(
    args: &ChatArgs,
    input: &mut dyn BufRead,
    is_person: bool,
    out: &mut dyn Write,
) -> anyhow::Result<()> {
    let known = Known::of(&args.model)?;
    let plan = known.plan(&args.routing.routing)?;
    known::check_generation(&args.generation)?;
    if args.visual.image.iter().any(|path| is_stdin(path)) {
        bail!("chat reads its questions from the standard input; give the image as a file");
    }
    let mut visuals = known.visuals(&args.visual)?;
    let vlm = open::model(&args.model)?;
    let options = open::generation(&args.generation, vlm.generation_defaults())?;
    let start = || Conversation::new(&vlm, plan.clone(), options.clone());
    let mut conversation = start();
    let mut is_first = true;
    if is_person {
        let _ = writeln!(stderr(), "{HELP}");
    }
    loop {
        if is_person {
            let _ = write!(stderr(), "> ");
        }
        let Some(line) = read_line(input)? else {
            return Ok(());
        };
        // What some editors put in front of UTF-8 text.
        let mark = if std::mem::take(&mut is_first) {
            "\u{FEFF}"
        } else {
            ""
        };
        let line = line.strip_prefix(mark).unwrap_or(&line).trim();
        let done = match line.split_once(char::is_whitespace).unwrap_or((line, "")) {
            ("", _) => continue,
            ("/quit", _) => return Ok(()),
            ("/help", _) => {
                let _ = writeln!(stderr(), "{HELP}");
                continue;
            }
            ("/reset", _) => {
                conversation = start();
                visuals.clear();
                continue;
            }
            ("/image", path) if is_stdin(Path::new(unquoted(path))) => Err(anyhow::anyhow!(
                "chat reads its questions from the standard input; give the image as a file"
            )),
            ("/image", path) => open::image(Path::new(unquoted(path))).map(|image| {
                visuals.push(Visual::Image(image));
            }),
            ("/video", path) => open::video(Path::new(unquoted(path)), args.visual.fps)
                .map(|video| visuals.push(Visual::Video(video))),
            (command, _) if command.starts_with('/') => {
                Err(anyhow::anyhow!("{command} is no command; /help lists them"))
            }
            _ => {
                let question = Question {
                    visuals: visuals.clone(),
                    text: line.to_string(),
                };
                let told = tell(args, &vlm, &plan, &mut conversation, &question, out);
                match told {
                    Ok(()) => {
                        visuals.clear();
                        Ok(())
                    }
                    Err(error) if is_full(&error) => Err(error.context(FULL)),
                    failed => failed,
                }
            }
        };
        match done {
            Err(error) if is_person => {
                let _ = writeln!(stderr(), "error: {error:#}");
            }
            done => done?,
        }
    }
}

/// A name without the quotation marks around it.
fn unquoted(name: &str) -> &str {
    let name = name.trim();
    let inside = |mark| name.strip_prefix(mark)?.strip_suffix(mark);
    inside('"').or_else(|| inside('\'')).unwrap_or(name)
}

/// Whether the conversation has become too long.
fn is_full(error: &anyhow::Error) -> bool {
    matches!(
        error.downcast_ref(),
        Some(ZooError::Reroute(RerouteError::ContextLength { .. }))
    )
}

/// Asks one question and prints its answer.
fn tell(
    args: &ChatArgs,
    vlm: &Vlm<Backend>,
    plan: &Plan,
    conversation: &mut Conversation<Backend>,
    question: &Question,
    out: &mut dyn Write,
) -> anyhow::Result<()> {
    let mut written = Ok(());
    let answer = conversation.ask(question, |piece| {
        if !args.json && written.is_ok() {
            written = write!(out, "{piece}").and_then(|()| out.flush());
        }
    })?;
    written?;
    if args.json {
        output::print_notices(&answer);
        let report = output::answer_json(vlm, plan, &answer);
        writeln!(out, "{report}")?;
    } else {
        writeln!(out)?;
        output::print_notices(&answer);
        let _ = writeln!(stderr(), "{}", output::turn_summary(vlm, plan, &answer));
    }
    Ok(out.flush()?)
}

/// The next line; `None` at the end of the input.
fn read_line(input: &mut dyn BufRead) -> anyhow::Result<Option<String>> {
    let mut line = Vec::new();
    let mut limited = std::io::Read::take(input, MAX_LINE_BYTES as u64 + 1);
    limited
        .read_until(b'\n', &mut line)
        .context("cannot read the next question")?;
    if line.len() > MAX_LINE_BYTES {
        bail!("a line is longer than {MAX_LINE_BYTES} bytes; shorten it");
    }
    if line.is_empty() {
        return Ok(None);
    }
    let line = String::from_utf8(line).context("a line is not UTF-8 text")?;
    Ok(Some(line))
}
