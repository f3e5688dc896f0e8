//! `reroute convert`: a checkpoint in another form.

use std::fmt::{self, Write as _};
use std::io::{IsTerminal, Write, stderr};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Result, bail};
use reroute_checkpoint::Dtype;
use reroute_convert::{Assembly, Codes, Form, Job, Phase, Plan, Progress, Report};
use reroute_zoo::{CodeFormat, ModelConfig, ZooError};

use crate::args::{Assemble, ConvertArgs, ConvertForm, FileType};
use crate::backend::{self, Backend};
use crate::hub;

/// How often progress is shown.
const INTERVAL: Duration = Duration::from_millis(500);
/// Weights that are named of those whose codes are off by most.
const WORST: usize = 5;
const MIB: f64 = (1 << 20) as f64;

/// Runs the command.
pub fn run(args: &ConvertArgs, out: &mut dyn Write) -> Result<()> {
    if args.allow_pickle {
        let what = "comparing the checksums of .bin files, if there are any …";
        let _ = writeln!(stderr(), "{what}");
    }
    let folder = |path: &Option<PathBuf>| path.as_deref().map(hub::path).transpose();
    // One of the two is there, or the command line is refused.
    let from = args.from.as_ref().or(args.decoder.as_ref());
    let plan = Plan::new(&Job {
        from: hub::path(from.map_or(Path::new(""), PathBuf::as_path))?,
        mmproj: args.mmproj.clone(),
        to: args.to.clone(),
        dtype: args.dtype.and_then(|dtype| match dtype {
            FileType::F32 => Some(Dtype::F32),
            FileType::F16 => Some(Dtype::F16),
            FileType::Bf16 => Some(Dtype::BF16),
            FileType::Int8 | FileType::Q4 => None,
        }),
        codes: codes(args)?,
        form: args.format.map(|format| match format {
            ConvertForm::Burnpack => Form::Burnpack,
            ConvertForm::Safetensors => Form::Safetensors,
            ConvertForm::Hf => Form::HuggingFace,
        }),
        assembly: args.assemble.map(|Assemble::Llava| Assembly {
            image_size: args.image_size,
            image_token: args.image_token.clone(),
            seed: args.seed,
        }),
        vision_tower: folder(&args.vision_tower)?,
        tokenizer: folder(&args.tokenizer)?,
        allow_pickle: args.allow_pickle,
        clamp: args.clamp,
        max_shard_bytes: args.max_shard_bytes,
    })?;
    if let Some(from) = &args.from {
        check_family(args, from)?;
    }
    let mut text = String::new();
    let _ = match args.dry_run {
        true => list(&mut text, &plan),
        false => {
            let mut meter = Meter::new();
            let report = plan.write(&mut |progress| meter.show(progress));
            meter.finish();
            tell(&mut text, &plan, &report?)
        }
    };
    for path in plan.left_out() {
        let _ = writeln!(text, "left out, for it is too large: {}", path.display());
    }
    Ok(out.write_all(text.as_bytes())?)
}

/// The weights that become codes of fewer bits.
fn codes(args: &ConvertArgs) -> Result<Option<Codes>> {
    let format = match args.dtype {
        Some(FileType::Int8) => CodeFormat::Int8,
        Some(FileType::Q4) => CodeFormat::Int4,
        _ => return Ok(None),
    };
    let (Some(from), None) = (&args.from, &args.vision_tower) else {
        bail!(
            "--dtype int8 and q4 are for models that can be opened: convert the parts without it, then what that has \
             written"
        );
    };
    let config = ModelConfig::open(&hub::folder(from, args.mmproj.as_deref())?)?;
    // Parameters that are never made need no driver.
    let device = backend::Device::default();
    let paths = args
        .coded
        .weights(format)
        .coded_paths::<Backend>(&config, &device)?;
    Ok(Some(Codes {
        format,
        names: config.names(),
        paths,
    }))
}

/// Refuses what nothing could open afterwards: a model of a family that is not known, by its name. A language model
/// alone becomes a part of one, and LLaVA as its authors published it another.
fn check_family(args: &ConvertArgs, from: &Path) -> Result<()> {
    if args.vision_tower.is_some() || args.allow_pickle {
        return Ok(());
    }
    let folder = hub::folder(from, args.mmproj.as_deref())?;
    match ModelConfig::open(&folder) {
        Err(ZooError::UnknownFamily { found, .. }) if found.is_empty() => Ok(()),
        Err(error @ ZooError::UnknownFamily { .. }) => Err(error.into()),
        _ => Ok(()),
    }
}

/// What would be written.
fn list(out: &mut String, plan: &Plan) -> fmt::Result {
    for file in plan.files() {
        for (tensor, offset) in file.tensors.iter().zip(&file.layout.offsets) {
            let (dtype, shape) = (tensor.dtype, &tensor.shape);
            writeln!(out, "{offset:>14} {dtype:>5} {} {shape:?}", tensor.name)?;
        }
        let (bytes, tensors) = (file.layout.bytes, file.tensors.len());
        writeln!(
            out,
            "{}: {bytes} bytes, {tensors} tensors",
            file.path.display()
        )?;
    }
    for name in plan.companions() {
        writeln!(out, "beside it: {name}")?;
    }
    writeln!(out, "{} bytes to be written", plan.missing_bytes())
}

fn tell(out: &mut String, plan: &Plan, report: &Report) -> fmt::Result {
    for file in plan.files() {
        let (mib, tensors) = (file.layout.bytes as f64 / MIB, file.tensors.len());
        writeln!(
            out,
            "{}: {mib:.1} MiB, {tensors} tensors, verified",
            file.path.display()
        )?;
    }
    if report.resumed > 0 {
        writeln!(
            out,
            "{} tensors were there from an interrupted run",
            report.resumed
        )?;
    }
    let lost: u64 = report.overflows.iter().map(|(_, values)| values).sum();
    if lost > 0 {
        writeln!(
            out,
            "{lost} values in {} tensors were beyond the range of the type and became its largest value; \
             --dtype bf16 or f32 keeps them:",
            report.overflows.len()
        )?;
        for (name, values) in &report.overflows {
            writeln!(out, "  {values:>8} {name}")?;
        }
    }
    tell_errors(out, &report.errors)?;
    if let Some(kib) = peak_memory_kib() {
        writeln!(out, "peak memory: {:.1} MiB", kib as f64 / 1024.0)?;
    }
    Ok(())
}

/// What codes are off by, the worst of them by name.
fn tell_errors(out: &mut String, errors: &[(String, f64)]) -> fmt::Result {
    if errors.is_empty() {
        return Ok(());
    }
    let mean = errors.iter().map(|(_, error)| error).sum::<f64>() / errors.len() as f64;
    writeln!(
        out,
        "{} weights became codes, which are off by {:.3} % of their root mean square on average; most are",
        errors.len(),
        100.0 * mean
    )?;
    let mut worst: Vec<_> = errors.iter().collect();
    worst.sort_by(|(_, a), (_, b)| b.total_cmp(a));
    for (name, error) in worst.into_iter().take(WORST) {
        writeln!(out, "  {:>7.3} % {name}", 100.0 * error)?;
    }
    Ok(())
}

/// Progress with bytes and the time that is left, on a terminal; from time to time elsewhere.
struct Meter {
    start: Instant,
    shown: Option<Instant>,
    /// Bytes that an earlier run had written do not tell the speed.
    first_bytes: Option<u64>,
    interval: Duration,
}

impl Meter {
    fn new() -> Self {
        Self {
            start: Instant::now(),
            shown: None,
            first_bytes: None,
            interval: match stderr().is_terminal() {
                true => INTERVAL,
                false => 20 * INTERVAL,
            },
        }
    }

    fn show(&mut self, progress: Progress) {
        let first_bytes = *self.first_bytes.get_or_insert(progress.done_bytes);
        if self.shown.unwrap_or(self.start).elapsed() < self.interval {
            return;
        }
        self.shown = Some(Instant::now());
        let seconds = self.start.elapsed().as_secs_f64();
        // A file that has come to harm is written again, which takes the count back.
        let rate = progress.done_bytes.saturating_sub(first_bytes) as f64 / seconds;
        let left = progress.total_bytes.saturating_sub(progress.done_bytes) as f64 / rate.max(1.0);
        let what = match progress.phase {
            Phase::Write => "writing",
            Phase::Verify => "verifying",
        };
        let (done, total) = (
            progress.done_bytes as f64 / MIB,
            progress.total_bytes as f64 / MIB,
        );
        let line =
            format!("{what}: {done:.0} of {total:.0} MiB written and verified, {left:.0} s left");
        let _ = match stderr().is_terminal() {
            true => write!(stderr(), "\r{line:<78}"),
            false => writeln!(stderr(), "{line}"),
        };
    }

    fn finish(&self) {
        if stderr().is_terminal() && self.shown.is_some() {
            let _ = writeln!(stderr());
        }
    }
}

/// The most memory that this process has held, where the system tells.
fn peak_memory_kib() -> Option<u64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status
        .lines()
        .find_map(|line| line.strip_prefix("VmHWM:"))?;
    line.split_whitespace().next()?.parse().ok()
}
