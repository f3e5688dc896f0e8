//! `reroute doctor`: what keeps a checkpoint from running on this machine, found before it fails.

mod fit;
mod remedy;

use std::io::Write;

use anyhow::bail;
use burn::tensor::DType;
use reroute::check_kv_type;
use reroute_zoo::{Checkup, KvType, OpenOptions, Parameters, Picture, Weights, ZooError};
use serde_json::{Value, json};
use vision_encoder::DecodeLimits;

use crate::args::DoctorArgs;
use crate::backend::{self, Adapter, Backend};
use crate::output;
use fit::{Answer, LEAST_TEXT, Need, less_text, tensor_bytes};
use remedy::{Contents, HOLDS_CONFIG};

/// The remedy where nothing else helps.
const LARGER: &str = "use a smaller model, or a machine with more memory";

/// The remedy where no tensor may be as large. CUDA takes a share of the card's memory at a time,
/// other drivers have limits of their own.
const UNBOUND: &str = match cfg!(feature = "cuda") {
    true => "use a card with more memory, or the flex backend",
    false => "use another driver, or the flex backend",
};

/// The warning where no token ends an answer.
const ENDLESS: &str = "nothing says which token ends an answer, so that each goes on until it is cut off: write \
    eos_token_id into generation_config.json, or take the one published with the model";

/// The warning where an adapter lies in the model's folder.
const ADAPTER_WITHIN: &str = "there is an adapter in this folder (adapter_config.json), which is not applied unless \
    it is asked for: --adapter DIR";

/// Something that keeps the model from running, or from running well.
struct Problem {
    what: String,
    remedy: String,
}

/// Everything there is to say.
struct Report {
    adapter: Adapter,
    dtypes: Vec<DType>,
    /// What weights and activations are reckoned in.
    dtype: DType,
    /// What the program itself takes of the memory that is reckoned, in bytes.
    program: u64,
    parameters: Option<Parameters>,
    picture: Option<Picture>,
    needs: Vec<Need>,
    /// Bytes of the keys and values of a dense answer in every type.
    kv_bytes: Vec<(KvType, u64)>,
    problems: Vec<Problem>,
    /// What keeps nothing from running, and surprises.
    warnings: Vec<String>,
    /// What the weights are, and what becomes of them.
    form: Option<String>,
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
        dtype: args.model.dtype.floats().unwrap_or(DType::F32),
        program: 0,
        parameters: None,
        picture: None,
        needs: Vec::new(),
        kv_bytes: Vec::new(),
        problems: Vec::new(),
        warnings: Vec::new(),
        form: None,
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
    let folder = match args.model.folder() {
        Ok(folder) => folder,
        Err(error) => {
            report.check_dtype();
            report.problem(error.to_string(), remedy::of_folder(&error, HOLDS_CONFIG));
            return report;
        }
    };
    report.dtype = args.model.dtype.types(args.model.coded, &folder).0;
    report.check_dtype();
    report.check_kv(args.model.kv.chosen(), &device);
    let options = args.model.options(&folder).unwrap_or_else(|error| {
        let holds = "give the folder that holds adapter_config.json to --adapter";
        report.problem(error.to_string(), remedy::of_folder(&error, holds));
        OpenOptions::default()
    });
    let checkup = Checkup::of::<Backend>(&folder, &options, &device);
    let contents = folder.root().map_or_else(Contents::default, Contents::of);
    let dtype = name(report.dtype);
    let widened = match (checkup.is_widened, options.weights) {
        (true, Weights::Stored) => {
            format!(
                "; what products take as it is stays so, what is quantised otherwise is widened to {dtype} while it is read"
            )
        }
        (true, _) => format!("; what is quantised is widened to {dtype} while it is read"),
        (false, _) => String::new(),
    };
    report.form = checkup.form.as_ref().map(|form| form.clone() + &widened);
    if folder.has("adapter_config.json") {
        report.warnings.push(ADAPTER_WITHIN.into());
    }
    if checkup.endless {
        report.warnings.push(ENDLESS.into());
    }
    for problem in &checkup.problems {
        let what = format!("{}: {}", problem.part, problem.error);
        report.problem(what, contents.remedy(problem));
    }
    if let Some(own) = backend::own_memory().filter(|_| backend::ON_HOST) {
        // By now it has read everything but the weights, and gives it back when it ends.
        report.program = fit::computing(own);
        let free = &mut report.adapter.available_bytes;
        *free = free.map(|free| free.saturating_add(own));
    }
    report.check_memory(&checkup, args);
    report
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

    /// Whether the backend can keep keys and values in a type.
    fn check_kv(&mut self, kv: Option<KvType>, device: &backend::Device) {
        if let Some(Err(error)) = kv.map(|kv| check_kv_type::<Backend>(kv, device)) {
            self.problem(error.to_string(), "use --kv auto, or another backend");
        }
    }

    /// Compares what the model needs with what there is.
    fn check_memory(&mut self, checkup: &Checkup, args: &DoctorArgs) {
        let (Some(config), Some(parameters)) = (&checkup.config, checkup.parameters) else {
            return;
        };
        self.parameters = Some(parameters);
        let Some(preprocessor) = &checkup.preprocessor else {
            return self.check_weights(parameters);
        };
        let answer = Answer {
            config,
            parameters,
            preprocessor: preprocessor.as_ref(),
            image_size: args.image_size,
            text_tokens: args.text_tokens as usize,
            dtype: self.dtype,
            kv: args.model.kv.chosen(),
            program: self.program,
            max_pixels: args.model.max_pixels,
        };
        let [width, height] = args.image_size;
        let readable = DecodeLimits::default().check(width as u32, height as u32);
        let picture = readable.map_err(ZooError::from);
        match picture.and_then(|()| answer.picture()) {
            Ok(picture) => self.check_answer(&answer, picture),
            Err(error) => self.problem(
                error.to_string(),
                "scale the image down or cut it into pieces, and give its --image-size",
            ),
        }
    }

    /// Whether a picture and a text fit, and if not, what does.
    fn check_answer(&mut self, answer: &Answer, picture: Picture) {
        self.picture = Some(picture);
        self.check_context(answer, &picture);
        self.needs = answer.needs();
        self.kv_bytes = answer.kv_bytes();
        if let Some(dense) = self.needs.first() {
            let (needed, largest) = (dense.total(), dense.largest);
            self.check_fit("a dense answer needs about", needed, largest, |report| {
                answer.remedy(&report.adapter, &report.dtypes)
            });
        }
    }

    /// Whether the weights fit, where nothing is known of pictures.
    fn check_weights(&mut self, parameters: Parameters) {
        let needed = |dtype| {
            let largest = tensor_bytes(parameters.largest_elements, dtype);
            [parameters.bytes(dtype.size()), largest]
        };
        let [bytes, largest] = needed(self.dtype);
        self.check_fit("the weights alone need", bytes, largest, |report| {
            let [bytes, largest] = needed(DType::F16);
            let fits = report.dtypes.contains(&DType::F16)
                && bytes <= report.adapter.available_bytes.unwrap_or(u64::MAX)
                && largest <= report.adapter.largest_binding_bytes.unwrap_or(u64::MAX);
            (fits && report.dtype != DType::F16).then(|| "use --dtype f16".into())
        });
    }

    /// Whether so many bytes, and a tensor of so many, fit; if not, with what `remedy` says to do.
    fn check_fit(
        &mut self,
        needs: &str,
        needed: u64,
        largest: u64,
        remedy: impl FnOnce(&Self) -> Option<String>,
    ) {
        let Adapter {
            name,
            available_bytes,
            largest_binding_bytes,
            ..
        } = &self.adapter;
        let mut problems = Vec::new();
        if let Some(free) = available_bytes.filter(|&free| needed > free) {
            let [needed, free] = [needed, free].map(mebibytes);
            problems.push((
                format!("{needs} {needed} MiB of memory, {free} MiB are free"),
                LARGER,
            ));
        }
        if let Some(most) = largest_binding_bytes.filter(|&most| largest > most) {
            let [largest, most] = [largest, most].map(mebibytes);
            problems.push((
                format!("the largest tensor has {largest} MiB, {name} takes at most {most} MiB at a time"),
                UNBOUND,
            ));
        }
        if problems.is_empty() {
            return;
        }
        let remedy = remedy(self);
        for (what, last_resort) in problems {
            self.problem(what, remedy.as_deref().unwrap_or(last_resort));
        }
    }

    /// Whether the decoder has positions for the whole conversation.
    fn check_context(&mut self, answer: &Answer, picture: &Picture) {
        let rows = picture.visual_tokens.saturating_add(answer.text_tokens);
        let (most, limit) = answer.config.decoder().context();
        if rows > most {
            let what = format!("{rows} tokens do not fit into the model's {most} positions");
            let left = most.saturating_sub(picture.visual_tokens);
            let remedy = match (left < LEAST_TEXT, answer.takes_any_size()) {
                (false, _) => less_text(left),
                (true, true) => "use a smaller --max-pixels".into(),
                (true, false) => format!("use a model of more positions ({limit})"),
            };
            self.problem(what, remedy);
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
        let unbound = if backend::ON_HOST {
            "no limit"
        } else {
            "unknown"
        };
        let binding = size(adapter.largest_binding_bytes, unbound);
        writeln!(out, "binding   {binding}")?;
        if let Some(form) = &self.form {
            writeln!(out, "weights   {form}")?;
        }
        if let Some(parameters) = self.parameters {
            let millions = parameters.elements as f64 / 1e6;
            let largest = tensor_bytes(parameters.largest_elements, self.dtype);
            writeln!(
                out,
                "model     {millions:.1} million parameters; the largest weight has {} MiB",
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
                 {:<26} {:>9} {:>9} {:>11} {:>9} {:>9}",
                name(self.dtype),
                args.text_tokens,
                "routing",
                "weights",
                "KV",
                "activations",
                "program",
                "together"
            )?;
        }
        for need in &self.needs {
            writeln!(
                out,
                "{:<26} {:>9} {:>9} {:>11} {:>9} {:>9}",
                need.routing,
                mebibytes(need.weights),
                mebibytes(need.kv),
                mebibytes(need.activations),
                mebibytes(need.program),
                mebibytes(need.total())
            )?;
        }
        if !self.kv_bytes.is_empty() {
            writeln!(out, "\n{}", fit::kv_line(&self.kv_bytes))?;
        }
        match (
            self.problems.is_empty(),
            adapter.available_bytes,
            self.needs.first(),
        ) {
            (true, None, Some(dense)) => writeln!(
                out,
                "\nNo problem is found. How much memory {} has is unknown; a dense answer needs about {} MiB of it.",
                adapter.name,
                mebibytes(dense.total())
            )?,
            (true, ..) => writeln!(out, "\nNothing is wrong.")?,
            (false, ..) => {}
        }
        for warning in &self.warnings {
            writeln!(out, "\nwarning: {warning}")?;
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
                "program_bytes": need.program,
                "total_bytes": need.total(),
                "largest_tensor_bytes": need.largest,
            })
        });
        let problems = self.problems.iter();
        let kv_bytes = self.kv_bytes.iter();
        let kv_bytes = kv_bytes.map(|(kv, bytes)| (kv.to_string(), json!(bytes)));
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
            "kv_bytes": kv_bytes.collect::<serde_json::Map<_, _>>(),
            "warnings": self.warnings,
            "form": self.form,
            "problems": problems
                .map(|problem| json!({"problem": problem.what, "remedy": problem.remedy}))
                .collect::<Vec<_>>(),
        })
    }
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
    use std::path::Path;

    use clap::Parser;
    use reroute_zoo::Folder;

    use super::fit::LEAST_PIXELS;
    use super::*;
    use crate::args::{Args, Command};

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
            program: 0,
            parameters: None,
            picture: None,
            needs: Vec::new(),
            kv_bytes: Vec::new(),
            problems: Vec::new(),
            warnings: Vec::new(),
            form: None,
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

    /// The remedies get harder as memory gets scarce, and so do those where operations take less.
    #[test]
    fn what_does_not_fit_is_a_problem_with_a_remedy_that_works() {
        let folder = "../../tests/fixtures/qwen25vl/ckpt";
        let folder = Folder::open(Path::new(env!("CARGO_MANIFEST_DIR")).join(folder));
        let options = OpenOptions::default();
        let folder = folder.expect("a fixture");
        let checkup = Checkup::of::<Backend>(&folder, &options, &Default::default());
        let answer = Answer {
            config: checkup.config.as_ref().expect("a good fixture"),
            parameters: Parameters {
                elements: 1 << 26,
                largest_elements: 1 << 10,
                ..Default::default()
            },
            preprocessor: checkup.preprocessor.as_deref().expect("a good fixture"),
            image_size: [840, 840],
            text_tokens: 320,
            dtype: DType::F32,
            kv: None,
            program: 0,
            max_pixels: None,
        };
        let half = Answer {
            dtype: DType::F16,
            ..answer
        };
        let small = Answer {
            max_pixels: Some(LEAST_PIXELS),
            ..half
        };
        let fewest = |answer: &Answer, of: fn(&Need) -> u64| {
            let needs = answer.needs();
            needs.iter().map(of).min().expect("some routings")
        };
        let dense = answer.needs().remove(0);
        let picture = answer.picture().expect("a good size");
        for (free, most, remedy) in [
            (None, None, None),
            (Some(dense.total()), Some(dense.largest), None),
            (Some(dense.total() - 1), None, Some("use --routing")),
            (
                Some(fewest(&answer, Need::total) - 1),
                None,
                Some("use --dtype f16"),
            ),
            (
                Some(fewest(&half, Need::total) - 1),
                None,
                Some("--max-pixels"),
            ),
            (
                Some(fewest(&small, Need::total) - 1),
                None,
                Some("to 160 tokens"),
            ),
            (Some(1), None, Some("a smaller model")),
            (None, Some(dense.largest - 1), Some("use --dtype f16")),
            (
                None,
                Some(half.needs()[0].largest - 1),
                Some("--max-pixels"),
            ),
            (None, Some(1), Some(UNBOUND)),
        ] {
            let mut report = report(free, most, DType::F32);
            report.check_answer(&answer, picture);
            assert_remedy(&report, remedy);
        }
    }

    #[test]
    fn weights_that_do_not_fit_are_a_problem_even_if_nothing_is_known_of_pictures() {
        for (free, most, dtype, remedy) in [
            (None, None, DType::F32, None),
            (Some(4 << 30), Some(4 << 20), DType::F32, None),
            (Some(3 << 30), None, DType::F32, Some("--dtype f16")),
            (Some(1 << 30), None, DType::F32, Some("a smaller model")),
            (Some(1 << 30), None, DType::F16, Some("a smaller model")),
            (None, Some(3 << 20), DType::F32, Some("--dtype f16")),
            (None, Some(1 << 20), DType::F32, Some(UNBOUND)),
        ] {
            let mut report = report(free, most, dtype);
            report.check_weights(Parameters {
                elements: 1 << 30,
                largest_elements: 1 << 20,
                ..Default::default()
            });
            assert_remedy(&report, remedy);
        }
    }

    #[test]
    fn memory_that_is_unknown_is_not_said_to_suffice() {
        let args = Args::try_parse_from(["reroute", "doctor"]).expect("good flags");
        let Command::Doctor(args) = args.command else {
            unreachable!("it is the doctor");
        };
        for (free, said) in [
            (None, "unknown; a dense answer needs about 3 MiB"),
            (Some(9), "Nothing is wrong"),
        ] {
            let mut report = report(free, None, DType::F32);
            report.needs.push(Need {
                routing: "dense".into(),
                weights: 2 << 20,
                kv: 1,
                activations: 1,
                program: 0,
                largest: 1,
            });
            let mut printed = Vec::new();
            report.print(&args, &mut printed).expect("memory");
            let printed = String::from_utf8(printed).expect("UTF-8");
            assert!(printed.contains(said), "{printed}");
        }
    }
}
