//! `reroute presets`: what every preset keeps and costs.

use std::io::Write;

use reducers::{Plan, Schedule, Support, presets};
use reroute_zoo::ModelConfig;
use serde_json::json;

use crate::args::PresetsArgs;
use crate::{open, output};

/// Runs the command.
pub fn run(args: &PresetsArgs, out: &mut dyn Write) -> anyhow::Result<()> {
    if args.support {
        return Ok(write!(out, "{}", support_table())?);
    }
    let config = ModelConfig::open(&open::folder(args.model.as_deref())?)?;
    let shape = config.decoder().shape();
    let typical = config.typical_visual_tokens();
    let visual = args.visual_tokens.map_or(typical, |n| n as usize);
    let text = args.text_tokens as usize;
    let bytes = args.dtype.burn().size();
    let cost = |plan: &Plan| plan.cost(&shape, visual, text, bytes);
    let dense = cost(&Schedule::dense().into());

    let mut reports = Vec::new();
    if !args.json {
        writeln!(
            out,
            "{} layers, {visual} visual + {text} text tokens; FLOPs of the decoder prefill with scoring, \
             KV in {:?}",
            shape.num_layers, args.dtype
        )?;
        writeln!(
            out,
            "{:<26} {:>9} {:>9} {:>7} {:>8} {:>9} {:>6}  {:<20} keep counts",
            "preset", "average", "GFLOPs", "FLOPs", "ceiling", "KV KiB", "enter", "decision layers"
        )?;
    }
    for preset in presets::presets() {
        let plan = match preset.plan(shape.num_layers, &config.encoder()) {
            Ok(plan) => plan,
            Err(error) if args.json => {
                reports.push(json!({"preset": preset.name, "error": error.to_string()}));
                continue;
            }
            Err(error) => {
                writeln!(out, "{:<26} {error}", preset.name)?;
                continue;
            }
        };
        let cost = cost(&plan);
        let entering = plan.entering(visual);
        let counts = plan.schedule.keep_counts(entering);
        let stages = plan.schedule.stages().iter();
        let layers: Vec<usize> = stages.map(|stage| stage.layer).collect();
        if args.json {
            reports.push(json!({
                "preset": preset.name,
                "method": preset.method.about.description,
                "source": preset.method.about.source,
                "exact": preset.method.about.exact,
                "interpretation": preset.method.about.interpretation,
                "schedule": plan.to_json(),
                "entering_tokens": entering,
                "layers": layers,
                "keep_counts": counts,
                "average_visual_tokens": cost.average_tokens(),
                "flops": cost.total_flops(),
                "scorer_flops": cost.total_scorer_flops(),
                "kv_bytes": cost.total_kv_bytes(),
                "speedup_ceiling": cost.speedup_ceiling(&dense),
            }));
            continue;
        }
        writeln!(
            out,
            "{:<26} {:>9.2} {:>9.3} {:>6.1}% {:>7.2}× {:>9.1} {entering:>6}  {:<20} {}",
            preset.name,
            cost.average_tokens(),
            cost.total_flops() / 1e9,
            100.0 * cost.total_flops() / dense.total_flops(),
            cost.speedup_ceiling(&dense),
            cost.total_kv_bytes() as f64 / 1024.0,
            joined(&layers),
            joined(&counts),
        )?;
    }
    match args.json {
        true => output::print_json(
            out,
            &json!({
                "num_layers": shape.num_layers,
                "visual_tokens": visual,
                "text_tokens": text,
                "presets": reports,
            }),
        ),
        false => Ok(()),
    }
}

/// What works with what, and how close to its source, as Markdown.
pub fn support_table() -> String {
    let towers = presets::TOWERS.iter();
    let columns: String = towers.map(|(name, _)| format!(" {name} |")).collect();
    let mut table = format!(
        "| method | does | source | exact | interpretation |{columns}\n|---|---|---|---|---|{}\n",
        "---|".repeat(presets::TOWERS.len())
    );
    for method in presets::methods() {
        let about = method.about;
        let support = |encoder| match method.support(encoder) {
            Support::Yes => " yes |".to_string(),
            Support::Adapted => " adapted |".to_string(),
            Support::No(reason) => format!(" no: {reason} |"),
        };
        let towers = presets::TOWERS.iter();
        table.push_str(&format!(
            "| `{}` | {} | {} | {} | {} |{}\n",
            method.name,
            about.description,
            about.source,
            about.exact,
            about.interpretation,
            towers
                .map(|(_, encoder)| support(encoder))
                .collect::<String>(),
        ));
    }
    table
}

fn joined(numbers: &[usize]) -> String {
    let words: Vec<String> = numbers.iter().map(ToString::to_string).collect();
    words.join(" ")
}
