//! `reroute ask`: a question about images.

use std::io::{Write, stderr};

use anyhow::bail;
use reroute_zoo::{Question, Visual, Vlm};

use crate::args::{AskArgs, VisualArgs};
use crate::backend::Backend;
use crate::{open, output};
use reroute_zoo::embedded;

/// Runs the command.
pub fn run(args: &AskArgs, out: &mut dyn Write) -> anyhow::Result<()> {
    let vlm = open::model(&args.model)?;
    let plan = open::plan(&args.routing.routing, vlm.config())?;
    let options = open::generation(&args.generation, vlm.generation_defaults())?;
    let built_in = args.model.model.is_none();
    let question = question(&vlm, &args.visual, args.prompt.as_deref(), built_in)?;
    let mut written = Ok(());
    let answer = vlm.ask(&question, &plan, &options, |piece| {
        if !args.json && written.is_ok() {
            written = write!(out, "{piece}").and_then(|()| out.flush());
        }
    })?;
    written?;
    output::print_notices(&answer);
    if args.json {
        return output::print_json(out, &output::answer_json(&vlm, &plan, &answer));
    }
    writeln!(out)?;
    let _ = writeln!(stderr(), "{}", output::summary(&vlm, &plan, &answer));
    Ok(())
}

/// The user's question; with the built-in model, its scene and expression fill the gaps.
pub(crate) fn question(
    vlm: &Vlm<Backend>,
    visual: &VisualArgs,
    prompt: Option<&str>,
    built_in: bool,
) -> anyhow::Result<Question> {
    let mut visuals = open::visuals(visual)?;
    if visuals.is_empty() && built_in {
        visuals.push(Visual::Image(open::scene()?));
    }
    let text = match prompt {
        Some(prompt) => prompt.to_string(),
        None if built_in => vlm.grounding().question(embedded::SCENE.expression),
        None => bail!("--prompt is missing: say what you want to know"),
    };
    Ok(Question { visuals, text })
}
