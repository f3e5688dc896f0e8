//! `reroute presets`: what every preset keeps and costs.

use std::io::Write;
use std::path::PathBuf;

use anyhow::ensure;
use reducers::presets::{self, Preset};
use reducers::{Cost, KvType, Plan, ReducerError, Schedule, Support};
use reroute_zoo::{Checkup, Folder, ModelConfig, OpenOptions, Part};
use serde_json::{Value, json};

use crate::args::{CodedMaps, PresetsArgs, WeightType};
use crate::backend::{self, Backend};
use crate::{hub, open, output};

/// Whether adapters fit the model.
fn check_adapters(adapters: &[PathBuf], folder: &Folder) -> anyhow::Result<()> {
    if adapters.is_empty() {
        return Ok(());
    }
    let adapters = adapters.iter().map(|path| hub::folder(path, None));
    let options = OpenOptions {
        adapters: adapters.collect::<Result<_, _>>()?,
        ..OpenOptions::default()
    };
    let checkup = Checkup::of::<Backend>(folder, &options, &backend::device()?);
    let mut problems = checkup.problems.into_iter();
    match problems.find(|problem| problem.part == Part::Adapter) {
        Some(problem) => Err(problem.error.into()),
        None => Ok(()),
    }
}

/// Runs the command.
pub fn run(args: &PresetsArgs, out: &mut dyn Write) -> anyhow::Result<()> {
    if args.support {
        return Ok(write!(out, "{}", support_table())?);
    }
    let folder = open::folder(args.model.as_deref(), args.mmproj.as_deref())?;
    let config = ModelConfig::open(&folder)?;
    check_adapters(&args.adapter, &folder)?;
    let shape = config.decoder().shape();
    let typical = config.typical_visual_tokens();
    let visual = args.visual_tokens.map_or(typical, |n| n as usize);
    let text = args.text_tokens as usize;
    ensure!(
        visual + text > 0,
        "a prompt of no tokens costs nothing: give --visual-tokens or --text-tokens"
    );
    let own = || KvType::from(WeightType::Auto.types(CodedMaps::Decoder, &folder).0);
    let kv = args.kv.chosen().unwrap_or_else(own);
    let cost = |plan: &Plan| plan.cost(&shape, visual, text, kv);
    let dense = cost(&Schedule::dense().into());
    let rows = presets::presets().map(|preset| {
        let plan = preset.plan(shape.num_layers.into(), &config.encoder());
        let plan = plan.map(|plan| Planned::new(cost(&plan), plan, visual));
        (preset, plan)
    });

    if args.json {
        let report = |(preset, plan): (Preset, Result<Planned, ReducerError>)| match plan {
            Ok(planned) => planned.report(&preset, &dense),
            Err(error) => json!({"preset": preset.name, "error": error.to_string()}),
        };
        let report = json!({
            "num_layers": shape.num_layers,
            "visual_tokens": visual,
            "text_tokens": text,
            "kv": kv.to_string(),
            "presets": rows.map(report).collect::<Vec<Value>>(),
        });
        return output::print_json(out, &report);
    }
    writeln!(
        out,
        "{} layers, {visual} visual + {text} text tokens; FLOPs of the decoder prefill with scoring, \
         KV in {kv}",
        shape.num_layers
    )?;
    writeln!(
        out,
        "{:<26} {:>9} {:>9} {:>7} {:>8} {:>9} {:>6}  {:<20} keep counts",
        "preset", "average", "GFLOPs", "FLOPs", "ceiling", "KV KiB", "enter", "decision layers"
    )?;
    for (preset, plan) in rows {
        match plan {
            Ok(planned) => writeln!(out, "{:<26} {}", preset.name, planned.line(&dense))?,
            Err(error) => writeln!(out, "{:<26} {error}", preset.name)?,
        }
    }
    Ok(())
}

/// A preset on a model.
struct Planned {
    plan: Plan,
    cost: Cost,
    /// Visual tokens that the decoder gets.
    entering: usize,
    /// Its decision layers.
    layers: Vec<usize>,
    keep_counts: Vec<usize>,
}

impl Planned {
    fn new(cost: Cost, plan: Plan, visual: usize) -> Self {
        let entering = plan.entering(visual);
        let stages = plan.schedule.stages().iter();
        Self {
            layers: stages.map(|stage| stage.layer).collect(),
            keep_counts: plan.schedule.keep_counts(entering),
            plan,
            cost,
            entering,
        }
    }

    fn report(&self, preset: &Preset, dense: &Cost) -> Value {
        let about = &preset.method.about;
        json!({
            "preset": preset.name,
            "method": about.description,
            "source": about.source,
            "exact": about.exact,
            "interpretation": about.interpretation,
            "schedule": self.plan.to_json(),
            "entering_tokens": self.entering,
            "layers": self.layers,
            "keep_counts": self.keep_counts,
            "average_visual_tokens": self.cost.average_tokens(),
            "flops": self.cost.total_flops(),
            "published_flops": self.cost.published_flops(),
            "scorer_flops": self.cost.total_scorer_flops(),
            "kv_bytes": self.cost.total_kv_bytes(),
            "speedup_ceiling": self.cost.speedup_ceiling(dense),
        })
    }

    fn line(&self, dense: &Cost) -> String {
        let (cost, entering) = (&self.cost, self.entering);
        format!(
            "{:>9.2} {:>9.3} {:>6.1}% {:>7.2}× {:>9.1} {entering:>6}  {:<20} {}",
            cost.average_tokens(),
            cost.total_flops() / 1e9,
            100.0 * cost.total_flops() / dense.total_flops(),
            cost.speedup_ceiling(dense),
            cost.total_kv_bytes() as f64 / 1024.0,
            joined(&self.layers),
            joined(&self.keep_counts),
        )
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
