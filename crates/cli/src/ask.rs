//! `reroute ask`: a question about images.

use std::io::{Write, stderr};
use std::time::Instant;

use anyhow::bail;
use reroute_zoo::{Question, Visual, Vlm};

use crate::args::{AskArgs, VisualArgs};
use crate::backend::Backend;
use crate::known::{self, Known};
use crate::{open, output};
use reroute_zoo::embedded;

/// Runs the command.
pub fn run(args: &AskArgs, out: &mut dyn Write) -> anyhow::Result<()> {
    let known = Known::of(&args.model)?;
    let plan = known.plan(&args.routing.routing)?;
    known::check_generation(&args.generation)?;
    let built_in = args.model.model.is_none();
    let asked = Asked::of(&known, &args.visual, args.prompt.as_deref(), built_in)?;
    let started = Instant::now();
    let vlm = open::model(&args.model)?;
    let loading = started.elapsed().as_secs_f64();
    let options = open::generation(&args.generation, vlm.generation_defaults())?;
    let mut written = Ok(());
    let answer = vlm.ask(&asked.question(&vlm), &plan, &options, |piece| {
        if !args.json && written.is_ok() {
            written = write!(out, "{piece}").and_then(|()| out.flush());
        }
    })?;
    written?;
    if args.json {
        output::print_notices(&answer);
        let mut report = output::answer_json(&vlm, &plan, &answer);
        report["seconds"]["loading"] = loading.into();
        return output::print_json(out, &report);
    }
    writeln!(out)?;
    output::print_notices(&answer);
    let _ = writeln!(stderr(), "{}", output::summary(&vlm, &plan, &answer));
    Ok(())
}

/// A question as the flags put it.
pub(crate) struct Asked {
    visuals: Vec<Visual>,
    /// The prompt, if it is not for the model to say.
    prompt: Option<String>,
}

impl Asked {
    /// The user's question; with the built-in model, its scene and expression fill the gaps.
    pub(crate) fn of(
        known: &Known,
        visual: &VisualArgs,
        prompt: Option<&str>,
        built_in: bool,
    ) -> anyhow::Result<Self> {
        if prompt.is_none() && !built_in {
            bail!("--prompt is missing: say what you want to know");
        }
        let mut visuals = known.visuals(visual)?;
        if visuals.is_empty() && built_in {
            visuals.push(Visual::Image(open::scene()?));
        }
        let prompt = prompt.map(ToString::to_string);
        Ok(Self { visuals, prompt })
    }

    /// The question to this model.
    pub(crate) fn question(self, vlm: &Vlm<Backend>) -> Question {
        let ask_for = || vlm.grounding().question(embedded::SCENE.expression);
        Question {
            visuals: self.visuals,
            text: self.prompt.unwrap_or_else(ask_for),
        }
    }
}
