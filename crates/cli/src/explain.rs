//! `reroute explain`: one picture per stage, one line per layer.

use std::collections::BTreeSet;
use std::io::Write;
use std::path::{Path, PathBuf};

use anyhow::Context;
use reducers::{Action, Plan};
use reroute_zoo::{Answer, Question, View, Vlm};
use serde_json::json;

use crate::args::ExplainArgs;
use crate::ask::Asked;
use crate::backend::Backend;
use crate::known::{self, Known};
use crate::{draw, open, output};

/// Runs the command.
pub fn run(args: &ExplainArgs, out: &mut dyn Write) -> anyhow::Result<()> {
    let known = Known::of(&args.model)?;
    let plan = known.plan(&args.routing)?;
    known::check_generation(&args.generation)?;
    known::check_folder(&args.out)?;
    let built_in = args.model.model.is_none();
    let asked = Asked::of(&known, &args.visual, args.prompt.as_deref(), built_in)?;
    let vlm = open::model(&args.model)?;
    let options = open::generation(&args.generation, vlm.generation_defaults())?;
    let question = asked.question(&vlm);
    let answer = vlm.ask(&question, &plan, &options, |_| {})?;
    output::print_notices(&answer);
    // The answer is told whatever becomes of the rest.
    let pictures = pictures(args, &vlm, &plan, &question, &answer);
    let drifts = vlm.drift(&question, &plan);
    let layers = layers(&vlm, &plan, &answer);
    let is_other = vlm.kv_type() != vlm.dtype().into();
    let kv_error = is_other.then(|| vlm.kv_error(&question, &answer.tokens, &plan));
    let kv_error = kv_error.transpose();
    if args.json {
        let mut report = output::answer_json(&vlm, &plan, &answer);
        let shown = pictures.iter().flatten().map(|path| output::path(path));
        report["pictures"] = shown.collect();
        report["drift"] = drifts.iter().flatten().map(output::drift_json).collect();
        report["layers"] = layers.iter().map(Layer::json).collect();
        let shown = kv_error.as_ref().ok().and_then(Option::as_ref);
        report["kv_error"] = shown.map(output::kv_error_json).into();
        output::print_json(out, &report)?;
        drifts?;
        kv_error?;
        return pictures.map(drop);
    }
    writeln!(out, "{}\n  → {}\n", question.text, answer.text)?;
    print_stages(out, &plan, &answer)?;
    print_layers(out, &layers)?;
    let drifts = drifts?;
    if !drifts.is_empty() {
        writeln!(out, "\n{}", output::DRIFT)?;
        drifts
            .iter()
            .try_for_each(|drift| writeln!(out, "  {}", output::drift_line(drift)))?;
    }
    if let Some(error) = kv_error? {
        writeln!(out, "\n{}", output::kv_error_line(&error))?;
    }
    writeln!(out, "\n{}", output::summary(&vlm, &plan, &answer))?;
    let pictures = pictures?;
    if !pictures.is_empty() {
        writeln!(
            out,
            "\npictures (as they are: active; dark: {}; green frame: came back)",
            deferred_name(&plan)
        )?;
        pictures
            .iter()
            .try_for_each(|path| writeln!(out, "  {}", path.display()))?;
    }
    Ok(())
}

fn deferred_name(plan: &Plan) -> &'static str {
    match plan.schedule.action() {
        Action::Reroute => "deferred",
        Action::Remove => "removed",
    }
}

/// Draws every stage for every image and every time step of a video; returns the files written.
fn pictures(
    args: &ExplainArgs,
    vlm: &Vlm<Backend>,
    plan: &Plan,
    question: &Question,
    answer: &Answer,
) -> anyhow::Result<Vec<PathBuf>> {
    let mut written = Vec::new();
    if answer.trace.decisions.is_empty() && plan.encoder.is_none() {
        remove_others(&args.out, &written)?;
        return Ok(written);
    }
    std::fs::create_dir_all(&args.out)
        .with_context(|| format!("cannot make the folder {}", args.out.display()))?;
    let mut frames = Vec::new();
    for (index, (visual, view)) in question.visuals.iter().zip(&answer.views).enumerate() {
        let [_, rows, columns] = view.tokens;
        anyhow::ensure!(view.is_grid(), draw::NO_GRID);
        for (step, picture) in vlm
            .preprocessor()
            .pictures(visual, view)?
            .into_iter()
            .enumerate()
        {
            let mut which = String::new();
            if question.visuals.len() > 1 {
                let kind = if view.time.is_some() {
                    "video"
                } else {
                    "image"
                };
                which.push_str(&format!("-{kind}-{}", index + 1));
            }
            if view.time.is_some() {
                which.push_str(&format!("-step-{}", step + 1));
            }
            frames.push((picture, rows * columns, columns, which));
        }
    }
    let (mut stages, action) = (Vec::new(), plan.schedule.action());
    if answer.cells.len() < answer.views.iter().map(View::token_count).sum() {
        let all: Vec<usize> = (0..answer.visual_tokens).collect();
        stages.push(("encoder".to_string(), answer.states(&all, &[], action)));
    }
    for (stage, decision) in answer.trace.decisions.iter().enumerate() {
        let name = format!("stage-{}-layer-{}", stage + 1, decision.layer);
        let states = answer.states(&decision.selected, &decision.returned, action);
        stages.push((name, states));
    }
    for (stage, states) in stages {
        let mut rest = &states[..];
        for (picture, tokens, columns, which) in &frames {
            let (states, others) = rest.split_at(*tokens);
            rest = others;
            let picture = draw::tokens(picture, states, *columns)?;
            let name = format!("{stage}{which}.png");
            let path = args.out.join(name);
            output::write_file(&path, &draw::Format::Png.encode(&picture)?)?;
            written.push(path);
        }
    }
    remove_others(&args.out, &written)?;
    Ok(written)
}

/// Removes the pictures of an earlier run.
fn remove_others(folder: &Path, written: &[PathBuf]) -> anyhow::Result<()> {
    let Ok(entries) = folder.read_dir() else {
        return Ok(());
    };
    for entry in entries.flatten() {
        let (path, name) = (entry.path(), entry.file_name());
        if name.to_str().is_some_and(is_ours) && !written.contains(&path) {
            let cannot = || format!("cannot remove {} of an earlier run", path.display());
            std::fs::remove_file(&path).with_context(cannot)?;
        }
    }
    Ok(())
}

/// Whether a picture has a name that this command gives: `stage-1-layer-2-image-1.png`,
/// `encoder-video-1-step-2.png`.
fn is_ours(name: &str) -> bool {
    let Some(mut rest) = name.strip_suffix(".png") else {
        return false;
    };
    let take = |rest: &mut &str, word: &str| match rest.strip_prefix(word) {
        Some(after) => {
            let number = after.trim_start_matches(|c: char| c.is_ascii_digit());
            let has_number = number.len() < after.len();
            *rest = if has_number { number } else { rest };
            has_number
        }
        None => false,
    };
    let stage = take(&mut rest, "stage-") && take(&mut rest, "-layer-");
    if !stage {
        match rest.strip_prefix("encoder") {
            Some(after) => rest = after,
            None => return false,
        }
    }
    let _ = take(&mut rest, "-image-") || take(&mut rest, "-video-");
    take(&mut rest, "-step-");
    rest.is_empty()
}

fn print_stages(out: &mut dyn Write, plan: &Plan, answer: &Answer) -> anyhow::Result<()> {
    let deferred = deferred_name(plan);
    writeln!(
        out,
        "stage  layer  candidates  active  {deferred:>8}  came back  first time"
    )?;
    let mut seen = BTreeSet::new();
    for (stage, decision) in answer.trace.decisions.iter().enumerate() {
        let active = decision.selected.len();
        let new = decision
            .selected
            .iter()
            .filter(|&&token| seen.insert(token))
            .count();
        writeln!(
            out,
            "{:>5}  {:>5}  {:>10}  {active:>6}  {:>8}  {:>9}  {:>10}",
            stage + 1,
            decision.layer,
            decision.candidates.len(),
            answer.visual_tokens - active,
            decision.returned.len(),
            if stage == 0 { 0 } else { new },
        )?;
    }
    Ok(writeln!(out)?)
}

/// What a layer was predicted to cost and what it did cost.
struct Layer {
    index: usize,
    rows: usize,
    predicted_rows: usize,
    flops: f64,
    predicted_flops: f64,
    published_flops: f64,
    scorer_flops: f64,
    kv_bytes: u64,
    predicted_kv_bytes: u64,
}

impl Layer {
    fn json(&self) -> serde_json::Value {
        json!({
            "layer": self.index,
            "rows": {"predicted": self.predicted_rows, "measured": self.rows},
            "flops": {"predicted": self.predicted_flops, "measured": self.flops},
            "published_flops": self.published_flops,
            "scorer_flops": self.scorer_flops,
            "kv_bytes": {"predicted": self.predicted_kv_bytes, "measured": self.kv_bytes},
        })
    }
}

fn layers(vlm: &Vlm<Backend>, plan: &Plan, answer: &Answer) -> Vec<Layer> {
    let shape = vlm.config().decoder().shape();
    let (cost, _) = vlm.costs(&plan.schedule, answer);
    let layer = |index: usize| {
        let rows = answer.trace.rows[index][0];
        Layer {
            index,
            rows,
            predicted_rows: cost.rows[index],
            // Counted from the rows that the layer really processed.
            flops: shape.partial_layer_flops(rows, answer.trace.queries[index][0], rows),
            predicted_flops: cost.layer_flops[index],
            published_flops: cost.published_layer_flops[index],
            scorer_flops: cost.scorer_flops[index],
            kv_bytes: answer.kv_bytes[index],
            predicted_kv_bytes: cost.kv_bytes[index],
        }
    };
    (0..shape.num_layers.into()).map(layer).collect()
}

fn print_layers(out: &mut dyn Write, layers: &[Layer]) -> anyhow::Result<()> {
    writeln!(
        out,
        "             rows           MFLOPs of the layer        scorer        KV bytes"
    )?;
    writeln!(
        out,
        "layer  predicted  measured   predicted   measured    MFLOPs  predicted   measured"
    )?;
    for layer in layers {
        writeln!(
            out,
            "{:>5}  {:>9}  {:>8}  {:>10.2} {:>10.2}  {:>8.3}  {:>9}  {:>9}",
            layer.index,
            layer.predicted_rows,
            layer.rows,
            layer.predicted_flops / 1e6,
            layer.flops / 1e6,
            layer.scorer_flops / 1e6,
            layer.predicted_kv_bytes,
            layer.kv_bytes,
        )?;
    }
    let total = |of: &dyn Fn(&Layer) -> f64| layers.iter().map(of).sum::<f64>();
    writeln!(
        out,
        "total  {:>9}  {:>8}  {:>10.2} {:>10.2}  {:>8.3}  {:>9}  {:>9}",
        total(&|l| l.predicted_rows as f64),
        total(&|l| l.rows as f64),
        total(&|l| l.predicted_flops) / 1e6,
        total(&|l| l.flops) / 1e6,
        total(&|l| l.scorer_flops) / 1e6,
        total(&|l| l.predicted_kv_bytes as f64),
        total(&|l| l.kv_bytes as f64),
    )?;
    Ok(writeln!(
        out,
        "In the last layer one row goes past keys and values; papers count all of them: {:.2} MFLOPs.",
        total(&|l| l.published_flops) / 1e6
    )?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_pictures_of_this_command_are_removed() {
        for ours in [
            "stage-1-layer-2.png",
            "stage-12-layer-30-image-2.png",
            "stage-1-layer-2-video-3-step-14.png",
            "stage-1-layer-2-step-1.png",
            "encoder.png",
            "encoder-image-1.png",
        ] {
            assert!(is_ours(ours), "{ours}");
        }
        for other in [
            "stage-1-layer-2.jpg",
            "stage-1.png",
            "stage-a-layer-2.png",
            "stage-1-layer-2-image-.png",
            "stage-1-layer-2-copy.png",
            "encoder-old.png",
            "my stage-1-layer-2.png",
            "photo.png",
            ".png",
        ] {
            assert!(!is_ours(other), "{other}");
        }
    }
}
