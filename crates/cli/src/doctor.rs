//! `reroute doctor`: what keeps a checkpoint from running on this machine, found before it fails.

use std::io::Write;

use anyhow::bail;
use burn::tensor::DType;
use checkpoint::CheckpointError;
use reducers::{Schedule, presets};
use serde_json::{Value, json};
use zoo::{Checkup, ModelConfig, OpenOptions, Parameters, Picture, ZooError};

use crate::args::DoctorArgs;
use crate::backend::{self, Adapter, Backend};
use crate::{open, output};

/// The remedy where nothing else helps.
const LARGER: &str = "use a smaller model, or a machine with more memory";

/// Something that keeps the model from running, or from running well.
struct Problem {
    what: String,
    remedy: String,
}

/// Memory that a routing needs, in bytes.
struct Need {
    routing: String,
    weights: u64,
    kv: u64,
    activations: u64,
}

impl Need {
    fn total(&self) -> u64 {
        let parts = [self.weights, self.kv, self.activations];
        parts.into_iter().fold(0, u64::saturating_add)
    }
}

/// Everything there is to say.
struct Report {
    adapter: Adapter,
    dtypes: Vec<DType>,
    /// What weights and activations are reckoned in.
    dtype: DType,
    parameters: Option<Parameters>,
    picture: Option<Picture>,
    needs: Vec<Need>,
    problems: Vec<Problem>,
}

/// Runs the command.
pub fn run(args: &DoctorArgs, out: &mut dyn Write) -> anyhow::Result<()> {
    let report = examine(args);
    match args.json {
        true => output::print_json(out, &report.to_json())?,
        false => report.print(args, out)?,
    }
    match report.problems.len() {
        0 => Ok(()),
        1 => bail!("there is a problem, see above"),
        several => bail!("there are {several} problems, see above"),
    }
}

/// Looks at everything; what is wrong with one thing keeps it from nothing else.
fn examine(args: &DoctorArgs) -> Report {
    let mut report = Report {
        adapter: backend::adapter(),
        dtypes: Vec::new(),
        dtype: args.model.dtype.burn(),
        parameters: None,
        picture: None,
        needs: Vec::new(),
        problems: Vec::new(),
    };
    let device = match backend::device() {
        Ok(device) => {
            report.dtypes = backend::dtypes(&device);
            device
        }
        Err(error) => {
            report.problem(
                error.to_string(),
                "the driver of this backend must be there when the program starts; the flex backend needs none",
            );
            // Parameters that are never made need no driver.
            backend::Device::default()
        }
    };
    report.check_dtype();
    let folder = match open::folder(args.model.model.as_deref()) {
        Ok(folder) => folder,
        Err(error) => {
            report.problem(
                error.to_string(),
                "give an existing checkpoint folder to --model",
            );
            return report;
        }
    };
    let options = OpenOptions {
        dtype: report.dtype,
        pad_to_square: args.model.pad_to_square.then_some(true),
        max_pixels: args.model.max_pixels,
    };
    let checkup = Checkup::of::<Backend>(&folder, &options, &device);
    for problem in &checkup.problems {
        let what = format!("{}: {}", problem.part, problem.error);
        report.problem(what, remedy(problem));
    }
    report.check_memory(&checkup, args);
    report
}

/// What to do about a part of a checkpoint folder that cannot be used.
fn remedy(problem: &zoo::Problem) -> &'static str {
    match &problem.error {
        ZooError::UnknownFamily { .. } => {
            return "give a checkpoint of LLaVA-1.5, Qwen2-VL, Qwen2.5-VL or Qwen3-VL to --model";
        }
        ZooError::Checkpoint(CheckpointError::Pickle { .. }) => {
            return "cargo xtask convert --from DIR --to NEW --allow-pickle; LLaVA as its authors published it also \
                    takes --vision-tower and --tokenizer (README, \"Checkpoints that load at once\")";
        }
        ZooError::Checkpoint(CheckpointError::Module(_)) => {
            return "give config.json and weights of the same model and revision, not quantised";
        }
        _ => {}
    }
    match problem.part {
        "config.json" => "download it again, from the same revision as the weights",
        "weights" => "download all weight files again, from the same revision as config.json",
        "chat template" => "remove the template to use the family's own, or download it again",
        _ => "download this file again, from the same revision as the weights",
    }
}

impl Report {
    fn problem(&mut self, what: impl Into<String>, remedy: impl Into<String>) {
        self.problems.push(Problem {
            what: what.into(),
            remedy: remedy.into(),
        });
    }

    fn check_dtype(&mut self) {
        if !self.dtypes.is_empty() && !self.dtypes.contains(&self.dtype) {
            let name = name(self.dtype);
            let what = format!("the {} backend does not compute in {name}", backend::NAME);
            self.problem(what, "use --dtype f32, or another backend");
        }
    }

    /// Compares what the model needs with what there is.
    fn check_memory(&mut self, checkup: &Checkup, args: &DoctorArgs) {
        let (Some(config), Some(parameters)) = (&checkup.config, checkup.parameters) else {
            return;
        };
        self.parameters = Some(parameters);
        self.check_binding(parameters);
        let Some(preprocessor) = &checkup.preprocessor else {
            return self.check_weights(parameters);
        };
        let picture = match preprocessor.picture(args.image_size) {
            Ok(picture) => picture,
            Err(error) => {
                let [width, height] = args.image_size;
                let what = format!("an image of {width}×{height} pixels: {error}");
                return self.problem(what, "give another --image-size");
            }
        };
        self.picture = Some(picture);
        self.check_context(config, &picture, args);
        self.needs = needs(config, parameters, &picture, args, self.dtype);
        let (Some(dense), Some(available)) = (self.needs.first(), self.available_bytes()) else {
            return;
        };
        if dense.total() <= available {
            return;
        }
        let what = format!(
            "a dense answer needs about {} MiB of memory, {} MiB are free",
            mebibytes(dense.total()),
            mebibytes(available)
        );
        let fits = |needs: &[Need]| {
            let mut fitting = needs.iter().filter(|need| need.total() <= available);
            fitting.next().map(|need| need.routing.clone())
        };
        let half = needs(config, parameters, &picture, args, DType::F16);
        let half = fits(&half).filter(|_| self.dtypes.contains(&DType::F16));
        let remedy = match (fits(&self.needs), half) {
            (Some(routing), _) => format!("use --routing {routing}"),
            (None, Some(routing)) if self.dtype != DType::F16 => {
                format!("use --dtype f16 (with --routing {routing})")
            }
            _ => LARGER.into(),
        };
        self.problem(what, remedy);
    }

    /// What there is for the model, if that is known.
    fn available_bytes(&self) -> Option<u64> {
        self.adapter.available_bytes.or(self.adapter.memory_bytes)
    }

    /// Whether the weights fit, where nothing is known of pictures.
    fn check_weights(&mut self, parameters: Parameters) {
        let bytes = |dtype| weight_bytes(parameters, dtype);
        let Some(available) = self.available_bytes() else {
            return;
        };
        if bytes(self.dtype) <= available {
            return;
        }
        let what = format!(
            "the weights alone need {} MiB of memory, {} MiB are free",
            mebibytes(bytes(self.dtype)),
            mebibytes(available)
        );
        let half = bytes(DType::F16) <= available && self.dtypes.contains(&DType::F16);
        self.problem(what, if half { "use --dtype f16" } else { LARGER });
    }

    /// Whether an operation takes the largest parameter.
    fn check_binding(&mut self, parameters: Parameters) {
        let bytes = parameters
            .largest_elements
            .saturating_mul(self.dtype.size() as u64);
        if let Some(most) = self
            .adapter
            .largest_binding_bytes
            .filter(|&most| bytes > most)
        {
            let what = format!(
                "the largest weight has {} MiB, {} takes at most {} MiB at a time",
                mebibytes(bytes),
                self.adapter.name,
                mebibytes(most)
            );
            let half = parameters.largest_elements.saturating_mul(2) <= most;
            let remedy = match half && self.dtype == DType::F32 && self.dtypes.contains(&DType::F16)
            {
                true => "use --dtype f16",
                false => "use another driver, or the flex backend",
            };
            self.problem(what, remedy);
        }
    }

    /// Whether the decoder has positions for the whole conversation.
    fn check_context(&mut self, config: &ModelConfig, picture: &Picture, args: &DoctorArgs) {
        let rows = picture
            .visual_tokens
            .saturating_add(args.text_tokens as usize);
        let most = config.decoder().max_position_embeddings;
        if rows > most {
            let what = format!("{rows} tokens do not fit into the model's {most} positions");
            self.problem(what, "use a smaller --max-pixels, or fewer text tokens");
        }
    }

    fn print(&self, args: &DoctorArgs, out: &mut dyn Write) -> anyhow::Result<()> {
        let size = |bytes: Option<u64>, none: &str| {
            bytes.map_or(none.into(), |bytes| format!("{} MiB", mebibytes(bytes)))
        };
        let adapter = &self.adapter;
        writeln!(out, "backend   {} on {}", backend::NAME, adapter.name)?;
        let dtypes: Vec<String> = self.dtypes.iter().copied().map(name).collect();
        writeln!(out, "computes  {}", dtypes.join(", "))?;
        let (all, free) = (
            size(adapter.memory_bytes, "unknown"),
            size(adapter.available_bytes, "unknown"),
        );
        writeln!(out, "memory    {all}, free: {free}")?;
        let binding = size(adapter.largest_binding_bytes, "no limit");
        writeln!(out, "binding   {binding}")?;
        if let Some(parameters) = self.parameters {
            let millions = parameters.elements as f64 / 1e6;
            let largest = parameters
                .largest_elements
                .saturating_mul(self.dtype.size() as u64);
            writeln!(
                out,
                "model     {millions:.1} million parameters; the largest tensor has {} MiB",
                mebibytes(largest)
            )?;
        }
        if let Some(picture) = self.picture {
            let ([width, height], [seen_width, seen_height]) = (args.image_size, picture.resized);
            writeln!(
                out,
                "image     {width}×{height}, seen as {seen_width}×{seen_height}: {} patches, {} visual tokens",
                picture.patches, picture.visual_tokens
            )?;
            writeln!(
                out,
                "\nMemory in {}, MiB, with {} text tokens; activations are an estimate\n\
                 {:<26} {:>9} {:>9} {:>11} {:>9}",
                name(self.dtype),
                args.text_tokens,
                "routing",
                "weights",
                "KV",
                "activations",
                "together"
            )?;
        }
        for need in &self.needs {
            writeln!(
                out,
                "{:<26} {:>9} {:>9} {:>11} {:>9}",
                need.routing,
                mebibytes(need.weights),
                mebibytes(need.kv),
                mebibytes(need.activations),
                mebibytes(need.total())
            )?;
        }
        if self.problems.is_empty() {
            writeln!(out, "\nNothing is wrong.")?;
        }
        for (number, problem) in self.problems.iter().enumerate() {
            writeln!(out, "\n{}. {}", number + 1, problem.what)?;
            writeln!(out, "   remedy: {}", problem.remedy)?;
        }
        Ok(())
    }

    fn to_json(&self) -> Value {
        let needs = self.needs.iter().map(|need| {
            json!({
                "routing": need.routing,
                "weights_bytes": need.weights,
                "kv_bytes": need.kv,
                "activation_bytes": need.activations,
                "total_bytes": need.total(),
            })
        });
        let problems = self.problems.iter();
        json!({
            "backend": backend::NAME,
            "adapter": self.adapter.name,
            "dtypes": self.dtypes.iter().copied().map(name).collect::<Vec<_>>(),
            "memory_bytes": self.adapter.memory_bytes,
            "available_bytes": self.adapter.available_bytes,
            "largest_binding_bytes": self.adapter.largest_binding_bytes,
            "dtype": name(self.dtype),
            "parameters": self.parameters.map(|parameters| parameters.elements),
            "largest_parameter": self.parameters.map(|parameters| parameters.largest_elements),
            "visual_tokens": self.picture.map(|picture| picture.visual_tokens),
            "needs": needs.collect::<Vec<_>>(),
            "problems": problems
                .map(|problem| json!({"problem": problem.what, "remedy": problem.remedy}))
                .collect::<Vec<_>>(),
        })
    }
}

/// What the dense model and every preset need; `dense` is the first.
fn needs(
    config: &ModelConfig,
    parameters: Parameters,
    picture: &Picture,
    args: &DoctorArgs,
    dtype: DType,
) -> Vec<Need> {
    let depth = config.decoder().num_layers;
    let schedules = presets::presets().filter(|preset| !preset.exact);
    let schedules =
        schedules.filter_map(|preset| Some((preset.name.clone(), preset.schedule(depth).ok()?)));
    let need = |(routing, schedule): (String, Schedule)| {
        let text = args.text_tokens as usize;
        let memory = config.memory(picture, text, &schedule, dtype.size());
        Need {
            routing,
            weights: weight_bytes(parameters, dtype),
            kv: memory.kv,
            activations: memory.activations,
        }
    };
    schedules.map(need).collect()
}

fn weight_bytes(parameters: Parameters, dtype: DType) -> u64 {
    parameters.elements.saturating_mul(dtype.size() as u64)
}

fn name(dtype: DType) -> String {
    format!("{dtype:?}").to_lowercase()
}

/// Rounded up: what is needed must fit.
fn mebibytes(bytes: u64) -> u64 {
    bytes.div_ceil(1 << 20)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Of a device that computes in f32 and f16.
    fn report(available_bytes: Option<u64>, binding: Option<u64>, dtype: DType) -> Report {
        Report {
            adapter: Adapter {
                name: "a card".into(),
                memory_bytes: None,
                available_bytes,
                largest_binding_bytes: binding,
            },
            dtypes: vec![DType::F32, DType::F16],
            dtype,
            parameters: None,
            picture: None,
            needs: Vec::new(),
            problems: Vec::new(),
        }
    }

    /// That the only problem has this remedy, if there is to be one.
    fn assert_remedy(report: &Report, remedy: Option<&str>) {
        let found: Vec<&str> = report.problems.iter().map(|p| &*p.remedy).collect();
        assert_eq!(found.len(), usize::from(remedy.is_some()), "{found:?}");
        if let Some(remedy) = remedy {
            assert!(found[0].contains(remedy), "{found:?}");
        }
    }

    #[test]
    fn a_weight_that_no_operation_takes_is_a_problem_with_a_remedy_that_works() {
        for (most, dtype, remedy) in [
            (4 << 20, DType::F32, None),
            (3 << 20, DType::F32, Some("--dtype f16")),
            (1 << 20, DType::F32, Some("another driver")),
            (1 << 20, DType::F16, Some("another driver")),
        ] {
            let mut report = report(None, Some(most), dtype);
            report.check_binding(Parameters {
                elements: 1 << 30,
                largest_elements: 1 << 20,
            });
            assert_remedy(&report, remedy);
        }
    }

    #[test]
    fn weights_that_do_not_fit_are_a_problem_even_if_nothing_is_known_of_pictures() {
        for (available, dtype, remedy) in [
            (None, DType::F32, None),
            (Some(4 << 30), DType::F32, None),
            (Some(3 << 30), DType::F32, Some("--dtype f16")),
            (Some(1 << 30), DType::F32, Some("a smaller model")),
            (Some(1 << 30), DType::F16, Some("a smaller model")),
        ] {
            let mut report = report(available, None, dtype);
            report.check_weights(Parameters {
                elements: 1 << 30,
                largest_elements: 1 << 20,
            });
            assert_remedy(&report, remedy);
        }
    }
}
