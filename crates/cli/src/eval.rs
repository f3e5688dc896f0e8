//! `reroute eval`: measures routings on questions with known answers.

use std::collections::BTreeMap;
use std::io::Write;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};

use anyhow::{Context, bail, ensure};
use reducers::Plan;
use reroute_eval::record::checksum;
use reroute_eval::{
    DENSE, Data, Event, GroundingPrompt, OnError, Reckoning, Records, Settings, Summary, Task,
    merge, report, summaries,
};
use reroute_zoo::{Folder, Vlm};
use serde_json::{Value, json};

use crate::args::{
    BootstrapArgs, EvalArgs, EvalCommand, ModelArgs, OnErrorArg, PromptArg, UnitsArg,
};
use crate::backend::{self, Backend};
use crate::known::{self, Known};
use crate::progress::Progress;
use crate::{hub, open, output};

/// Largest configuration that is read, and the endings of weights.
const CONFIG_MAX_BYTES: u64 = 1 << 20;
const WEIGHTS: [&str; 4] = ["safetensors", "bpk", "gguf", "bin"];
/// All splits that have answers.
const ALL: &str = "all";

/// Runs the command.
pub fn run(args: &EvalArgs, out: &mut dyn Write) -> anyhow::Result<()> {
    if let Some(EvalCommand::Merge {
        from,
        out: to,
        box_units,
        bootstrap,
        json,
    }) = &args.command
    {
        known::check_folder(to)?;
        let records = merge(from, to)?;
        let report = told(&records, to, reckoning(*box_units, *bootstrap), *json, out)?;
        return print(*json, vec![report], out);
    }
    let Some(path) = &args.data else {
        bail!("--data is missing: say where the questions are");
    };
    let known = Known::of(&args.model)?;
    let routings = routings(args, &known)?;
    known::check_folder(&args.out)?;
    let jobs = jobs(args, path)?;
    let vlm = open::model(&args.model)?;
    let settings = Settings {
        routings,
        limit: args.limit,
        shard: args.shard,
        prompt: match args.prompt {
            PromptArg::Family => GroundingPrompt::Family,
            PromptArg::Full => GroundingPrompt::Full,
            PromptArg::Short => GroundingPrompt::Short,
            PromptArg::Nuwa => GroundingPrompt::Nuwa,
        },
        max_new_tokens: args.max_new_tokens,
        batch: args.batch,
        on_error: match args.on_error {
            OnErrorArg::Stop => OnError::Stop,
            OnErrorArg::Skip => OnError::Skip,
        },
        resume: args.resume,
        model: model(&args.model, &vlm)?,
    };
    let (mut reports, mut lines) = (Vec::new(), String::new());
    for data in &jobs {
        let name = format!("{}-{}", data.task.name(), data.split);
        let folder = match jobs.len() {
            1 => args.out.clone(),
            _ => args.out.join(&name),
        };
        let mut shown = Shown::new(name);
        let records = reroute_eval::run(&vlm, data, &settings, &folder, &mut |event| {
            shown.show(&event);
            ControlFlow::Continue(())
        });
        shown.bar.close();
        let records = records?;
        let reckoning = reckoning(args.box_units, args.bootstrap);
        reports.push(told(&records, &folder, reckoning, args.json, out)?);
        let csv = report::csv(&records, &summaries(&records, &reckoning)?);
        let rows = csv.split_once('\n').map_or("", |(_, rows)| rows);
        lines.push_str(if lines.is_empty() { &csv } else { rows });
    }
    if jobs.len() > 1 {
        let name = format!("results{}.csv", args.shard.suffix());
        output::write_file(&args.out.join(name), lines.as_bytes())?;
    }
    print(args.json, reports, out)
}

fn reckoning(units: UnitsArg, bootstrap: BootstrapArgs) -> Reckoning {
    Reckoning {
        resamples: bootstrap.resamples,
        seed: bootstrap.seed,
        release: units == UnitsArg::Release,
    }
}

/// Writes the results of records, and prints them for people.
fn told(
    records: &[Records],
    folder: &Path,
    reckoning: Reckoning,
    json: bool,
    out: &mut dyn Write,
) -> anyhow::Result<Value> {
    let found: Vec<Summary> = summaries(records, &reckoning)?;
    report::write(folder, records, &found)?;
    if !json {
        writeln!(out, "{}", report::table(records, &found))?;
    }
    Ok(report::json(records, &found))
}

fn print(json: bool, mut reports: Vec<Value>, out: &mut dyn Write) -> anyhow::Result<()> {
    match reports.len() {
        _ if !json => Ok(()),
        1 => output::print_json(out, &reports.remove(0)),
        _ => output::print_json(out, &Value::Array(reports)),
    }
}

/// Dense first, then what is asked for.
fn routings(args: &EvalArgs, known: &Known) -> anyhow::Result<Vec<(String, Plan)>> {
    let has_dense = args.routing.iter().any(|routing| routing == DENSE);
    let first = (!has_dense && !args.no_dense).then(|| DENSE.to_string());
    let names = first.iter().chain(&args.routing);
    let plans = names.map(|name| Ok((name.clone(), known.plan(name)?)));
    let plans: Vec<(String, Plan)> = plans.collect::<anyhow::Result<_>>()?;
    ensure!(
        !plans.is_empty(),
        "--no-dense leaves nothing to measure: name a --routing"
    );
    let mut seen = BTreeMap::new();
    for (name, _) in &plans {
        let file = reroute_eval::record::file_name(name, args.shard);
        if let Some(other) = seen.insert(file, name) {
            bail!("--routing {name} is given twice, or called like {other} in names of files");
        }
    }
    Ok(plans)
}

/// The questions of every task and split.
fn jobs(args: &EvalArgs, path: &Path) -> anyhow::Result<Vec<Data>> {
    let mut jobs: Vec<Data> = Vec::new();
    for name in &args.task {
        let task: Task = name.parse().context("--task")?;
        let default = [task.default_split().to_string()];
        let splits: Vec<String> = match &args.split[..] {
            [] => default.to_vec(),
            [all] if all == ALL => task.splits().iter().map(ToString::to_string).collect(),
            named => named.to_vec(),
        };
        let path = match task {
            Task::Own => path.to_owned(),
            _ => in_cache(path, task),
        };
        for split in splits {
            let is_new = |job: &Data| (job.task, &job.split) != (task, &split);
            if jobs.iter().all(is_new) {
                jobs.push(Data::open(task, &split, &path)?);
            }
        }
    }
    Ok(jobs)
}

/// Where the data are; the cache of the hub if that is where `OWNER/NAME` is.
fn in_cache(path: &Path, task: Task) -> PathBuf {
    let named = path.to_str() == Some(task.repository()) && !path.exists();
    match named {
        true => hub::cache(),
        false => path.to_owned(),
    }
}

/// The model and how it is opened: what of it decides the numbers.
fn model(args: &ModelArgs, vlm: &Vlm<Backend>) -> anyhow::Result<Value> {
    let folder = args.folder()?;
    let adapters = args.adapter.iter().map(|path| {
        let path = hub::path(path)?;
        let config = std::fs::read(path.join("adapter_config.json")).unwrap_or_default();
        Ok(json!({"config": checksum(&config), "weights": weights(Some(&path))}))
    });
    let adapters = adapters.collect::<anyhow::Result<Vec<Value>>>()?;
    Ok(json!({
        "config": config(&folder),
        "weights": weights(folder.root()),
        "adapters": adapters,
        "merge_adapters": args.merge_adapter,
        "dtype": format!("{:?}", vlm.dtype()),
        "weight_type": format!("{:?}", args.dtype),
        "coded": format!("{:?}", args.coded),
        "kv": vlm.kv_type().to_string(),
        "pad_to_square": args.pad_to_square,
        "max_pixels": args.max_pixels,
        "backend": backend::NAME,
    }))
}

/// Checksums of the files that say what the model is and how it is asked.
fn config(folder: &Folder) -> Value {
    const FILES: [&str; 6] = [
        "config.json",
        "preprocessor_config.json",
        "tokenizer_config.json",
        "chat_template.jinja",
        "chat_template.json",
        "grounding.json",
    ];
    let files = FILES.iter().filter(|name| folder.has(name));
    let checksums = files.filter_map(|name| {
        let read = folder.read(name, CONFIG_MAX_BYTES).ok()?;
        Some((name.to_string(), json!(checksum(&read))))
    });
    Value::Object(checksums.collect())
}

/// Names and bytes of the files of weights.
fn weights(root: Option<&Path>) -> Value {
    let entries = root.and_then(|root| root.read_dir().ok());
    let files = entries.into_iter().flatten().flatten().filter_map(|entry| {
        let path = entry.path();
        let end = path.extension()?.to_str()?;
        let bytes = std::fs::metadata(&path).ok()?.len();
        let name = path.file_name()?.display().to_string();
        WEIGHTS.contains(&end).then(|| (name, json!(bytes)))
    });
    Value::Object(files.collect())
}

/// Progress on stderr.
struct Shown {
    bar: Progress,
    name: String,
    answers: usize,
    score: f64,
}

impl Shown {
    fn new(name: String) -> Self {
        Self {
            bar: Progress::new(0),
            name,
            answers: 0,
            score: 0.0,
        }
    }

    fn show(&mut self, event: &Event) {
        match event {
            Event::Began { done, all } => {
                self.bar.begin(*done, *all);
                let name = &self.name;
                self.bar
                    .line(&format!("{name}: {done} of {all} answers are there"));
            }
            Event::Failed(error) => self.bar.line(&format!("recorded as failed: {error}")),
            Event::Wrote { done, score } => {
                if let Some(score) = score {
                    self.answers += 1;
                    self.score += score;
                }
                let (answers, score) = (self.answers as f64, self.score);
                self.bar.show(*done, |passed| {
                    let right = 100.0 * score / answers.max(1.0);
                    format!("{right:.1} % right  {:.2} answers/s", answers / passed)
                });
            }
            _ => {}
        }
    }
}
