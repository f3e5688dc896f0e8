//! `reroute compare`: several routings on one question, side by side.

use std::io::Write;
use std::time::Duration;

use anyhow::ensure;
use reducers::Plan;
use reroute::Drift;
use reroute_zoo::grounding::{BoundingBox, iou};
use reroute_zoo::{Answer, Question, Visual, Vlm};
use serde_json::json;
use vision_encoder::RgbImage;

use crate::args::CompareArgs;
use crate::ask::Asked;
use crate::backend::Backend;
use crate::known::{self, Known};
use crate::{draw, open, output};

/// What one routing came to.
struct Row {
    name: String,
    plan: Plan,
    answer: Answer,
    found: Option<BoundingBox>,
    drifts: Vec<Drift>,
    /// Medians over the rounds.
    vision: Duration,
    prefill: Duration,
    decode: Duration,
}

/// Runs the command.
pub fn run(args: &CompareArgs, out: &mut dyn Write) -> anyhow::Result<()> {
    ensure!(args.rounds > 0, "--rounds is 0: ask at least once");
    let known = Known::of(&args.model)?;
    let plans = args.routing.iter();
    let plans = plans.map(|routing| Ok((routing.clone(), known.plan(routing)?)));
    let plans = plans.collect::<anyhow::Result<Vec<(String, Plan)>>>()?;
    known::check_generation(&args.generation)?;
    let visual = args.visual.image.iter().chain(&args.visual.video);
    known::check_picture(&args.out, visual.chain(&args.model.model))?;
    let built_in = args.model.model.is_none();
    let asked = Asked::of(&known, &args.visual, args.prompt.as_deref(), built_in)?;
    let vlm = open::model(&args.model)?;
    let options = open::generation(&args.generation, vlm.generation_defaults())?;
    let question = asked.question(&vlm);
    // Rounds take turns, so that what disturbs the machine disturbs every routing.
    let mut answers: Vec<Vec<Answer>> = plans.iter().map(|_| Vec::new()).collect();
    for _ in 0..args.rounds {
        for ((_, plan), answers) in plans.iter().zip(&mut answers) {
            answers.push(vlm.ask(&question, plan, &options, |_| {})?);
        }
    }
    let is_image = matches!(question.visuals.first(), Some(Visual::Image(_)));
    let mut rows = Vec::new();
    for ((name, plan), mut answers) in plans.into_iter().zip(answers) {
        let median = |of: &dyn Fn(&Answer) -> Duration| {
            let mut times: Vec<Duration> = answers.iter().map(of).collect();
            times.sort();
            times[times.len() / 2]
        };
        let vision = median(&|answer| answer.timings.vision);
        let prefill = median(&|answer| answer.timings.prefill);
        let decode = median(&|answer| answer.timings.decode);
        let answer = answers.remove(0);
        rows.push(Row {
            found: is_image.then(|| vlm.answered_box(&answer)).flatten(),
            drifts: vlm.drift(&question, &plan)?,
            name,
            plan,
            answer,
            vision,
            prefill,
            decode,
        });
    }
    if let Some(row) = rows.first() {
        output::print_notices(&row.answer);
    }
    // The answers are told whatever becomes of the picture.
    let picture = picture(&vlm, &question, &rows).and_then(|picture| {
        let Some(picture) = picture else {
            return Ok(None);
        };
        let bytes = draw::Format::of(&args.out)?.encode(&picture)?;
        output::write_file(&args.out, &bytes)?;
        Ok(Some(&args.out))
    });
    if args.json {
        let routings: Vec<_> = rows.iter().map(|row| report(&vlm, row, &rows[0])).collect();
        let written = picture.as_ref().ok().and_then(|picture| *picture);
        let written = written.map(|path| output::path(path));
        output::print_json(out, &json!({"routings": routings, "picture": written}))?;
        return picture.map(drop);
    }
    writeln!(out, "{}\n", question.text)?;
    print_table(out, &vlm, &rows)?;
    print_drifts(out, &rows)?;
    if let Some(path) = picture? {
        writeln!(
            out,
            "\npicture: {} (rows as numbered; answer, then what each stage works on: as it is \
             active, dark not, green frame came back)",
            path.display()
        )?;
    }
    Ok(())
}

fn report(vlm: &Vlm<Backend>, row: &Row, first: &Row) -> serde_json::Value {
    let mut report = output::answer_json(vlm, &row.plan, &row.answer);
    report["routing"] = json!(row.name);
    report["box"] = json!(row.found);
    report["iou_with_first"] = json!(agreement(row, first));
    report["seconds"] = json!({
        "vision": row.vision.as_secs_f64(),
        "prefill": row.prefill.as_secs_f64(),
        "decode": row.decode.as_secs_f64(),
    });
    report["drift"] = json!(
        row.drifts
            .iter()
            .map(output::drift_json)
            .collect::<Vec<_>>()
    );
    report
}

/// Intersection over union with the first routing's box.
fn agreement(row: &Row, first: &Row) -> Option<f64> {
    Some(iou(row.found.as_ref()?, first.found.as_ref()?))
}

fn print_table(out: &mut dyn Write, vlm: &Vlm<Backend>, rows: &[Row]) -> anyhow::Result<()> {
    let width = rows.iter().map(|row| row.name.chars().count()).max();
    let width = width.unwrap_or(0).max("routing".len());
    writeln!(
        out,
        "    {:<width$}  average  FLOPs  KV KiB  vision  prefill  decode   IoU  {:<20}  answer",
        "routing", "enter and selected"
    )?;
    for (index, row) in rows.iter().enumerate() {
        let (cost, dense) = vlm.costs(&row.plan.schedule, &row.answer);
        let kv = row.answer.kv_bytes.iter().sum::<u64>() as f64 / 1024.0;
        let decisions = row.answer.trace.decisions.iter();
        let mut counts = vec![row.answer.visual_tokens.to_string()];
        counts.extend(decisions.map(|decision| decision.selected.len().to_string()));
        let milliseconds = |time: Duration| format!("{:.1}ms", time.as_secs_f64() * 1e3);
        writeln!(
            out,
            "{:>2}  {:<width$}  {:>7.2}  {:>4.0}%  {kv:>6.1}  {:>6}  {:>7}  {:>6}  {:>4}  {:<20}  {}",
            index + 1,
            row.name,
            cost.average_tokens(),
            100.0 * cost.total_flops() / dense.total_flops(),
            milliseconds(row.vision),
            milliseconds(row.prefill),
            milliseconds(row.decode),
            agreement(row, &rows[0]).map_or("-".into(), |iou| format!("{iou:.2}")),
            counts.join(" "),
            row.answer.text.replace('\n', " "),
        )?;
    }
    Ok(())
}

fn print_drifts(out: &mut dyn Write, rows: &[Row]) -> anyhow::Result<()> {
    if rows.iter().all(|row| row.drifts.is_empty()) {
        return Ok(());
    }
    writeln!(out, "\n{}", output::DRIFT)?;
    for (index, row) in rows.iter().enumerate() {
        for drift in &row.drifts {
            writeln!(out, "{:>2}  {}", index + 1, output::drift_line(drift))?;
        }
    }
    Ok(())
}

/// One row per routing: its answer on the first picture, what enters the decoder if that is not all,
/// and what each stage works on.
fn picture(
    vlm: &Vlm<Backend>,
    question: &Question,
    rows: &[Row],
) -> anyhow::Result<Option<RgbImage>> {
    let (Some(visual), Some(first)) = (question.visuals.first(), rows.first()) else {
        return Ok(None);
    };
    let view = &first.answer.views[0];
    let Some(seen) = vlm
        .preprocessor()
        .pictures(visual, view)?
        .into_iter()
        .next()
    else {
        return Ok(None);
    };
    let [_, cell_rows, columns] = view.tokens;
    anyhow::ensure!(view.is_grid(), draw::NO_GRID);
    let tokens = cell_rows * columns;
    let mut grid = Vec::new();
    for row in rows {
        let mut cells = vec![answered(visual, &seen, row)?];
        let (mut states, action) = (Vec::new(), row.plan.schedule.action());
        if row.plan.encoder.is_some() {
            let all: Vec<usize> = (0..row.answer.visual_tokens).collect();
            states.push(row.answer.states(&all, &[], action));
        }
        for decision in &row.answer.trace.decisions {
            let (selected, returned) = (&decision.selected, &decision.returned);
            states.push(row.answer.states(selected, returned, action));
        }
        for states in &states {
            cells.push(draw::tokens(&seen, &states[..tokens], columns)?);
        }
        grid.push(cells);
    }
    Ok(Some(draw::contact_sheet(&grid)?))
}

/// The picture as the model sees it, with the box that was answered.
fn answered(visual: &Visual, seen: &RgbImage, row: &Row) -> anyhow::Result<RgbImage> {
    let (Visual::Image(image), Some(found)) = (visual, row.found) else {
        return draw::tokens(seen, &[], 1);
    };
    let mut picture = draw::enlarge(image, (448 / image.width()).max(1))?;
    let scale = picture.width() as f64 / image.width() as f64;
    draw::rectangle(&mut picture, &found.map(|at| at * scale), draw::FOUND);
    Ok(picture)
}
