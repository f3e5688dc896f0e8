//! Steps of training, and where they are kept: what is common to all stages.

use std::fs::{self, File, OpenOptions};
use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail, ensure};
use burn::module::AutodiffModule;
use burn::optim::adaptor::OptimizerAdaptor;
use burn::optim::{AdamW, AdamWConfig, GradientsAccumulator, GradientsParams, Optimizer};
use burn::record::{BinBytesRecorder, FullPrecisionSettings, Recorder};
use burn::tensor::backend::{AutodiffBackend, Backend};
use burn::tensor::{DType, Tensor};
use reroute_finetune::clip;
use serde::{Deserialize, Serialize};
use serde_json::Value;

type Bytes = BinBytesRecorder<FullPrecisionSettings>;

/// Length of all gradients together that they are shortened to.
const CLIP: f64 = 1.0;

/// How a stage is trained: AdamW, a warm-up, half a cosine down to a fiftieth.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Course {
    /// Steps in all.
    pub steps: usize,
    /// Scenes of a step.
    pub scenes: usize,
    /// The largest learning rate.
    pub rate: f64,
    /// Steps until it is reached.
    pub warmup: usize,
    /// Decay rates of the two moments.
    pub betas: [f32; 2],
    /// Seed of what is drawn.
    pub seed: u32,
}

/// How often a stage is kept, and says how far it is; both may change on the way.
#[derive(Debug, Clone, Copy)]
pub struct Pace {
    /// Steps from one checkpoint to the next.
    pub save_every: usize,
    /// Steps from one line of the log to the next.
    pub log_every: usize,
    /// Most scenes that go through the decoder at once; the gradients of a step are their sum.
    pub pass: usize,
}

impl Course {
    /// The learning rate of a step, counted from 0.
    pub fn rate_of(&self, step: usize) -> f64 {
        let rise = ((step + 1) as f64 / self.warmup.max(1) as f64).min(1.0);
        let done = step as f64 / self.steps.max(1) as f64;
        let fall = 0.5 * (1.0 + (std::f64::consts::PI * done.min(1.0)).cos());
        self.rate * rise * (0.02 + 0.98 * fall)
    }
}

/// A stage under way: what is trained, its optimizer, how far it is.
pub struct Stage<B: AutodiffBackend, M: AutodiffModule<B>> {
    /// What is trained.
    pub module: M,
    /// Steps that are done.
    pub step: usize,
    course: Course,
    pace: Pace,
    optimizer: OptimizerAdaptor<AdamW, M, B>,
    path: PathBuf,
}

/// What a step has found.
#[derive(Debug, Clone, Copy)]
pub struct Taken {
    /// Length of all gradients together.
    pub norm: f64,
    /// The learning rate.
    pub rate: f64,
}

impl<B: AutodiffBackend, M: AutodiffModule<B>> Stage<B, M> {
    /// Begins with `module`, or goes on from the checkpoint of this name in a folder.
    pub fn begin(
        module: M,
        (course, pace): (&Course, Pace),
        folder: &Path,
        name: &str,
        device: &B::Device,
    ) -> Result<Self> {
        fs::create_dir_all(folder).with_context(|| format!("making {}", folder.display()))?;
        agree(&folder.join(format!("{name}.json")), course)?;
        let [first, second] = course.betas;
        let optimizer = AdamWConfig::new()
            .with_beta_1(first)
            .with_beta_2(second)
            .with_epsilon(1e-8)
            .with_weight_decay(0.01)
            .init();
        let mut stage = Self {
            module,
            step: 0,
            course: course.clone(),
            pace,
            optimizer,
            path: folder.join(format!("{name}.checkpoint")),
        };
        if stage.path.exists() {
            let bytes = fs::read(&stage.path)?;
            let wrong = || format!("{} is damaged: remove it", stage.path.display());
            let (step, module, optimizer) = parts(&bytes).with_context(wrong)?;
            let recorder = Bytes::default();
            stage.module = { stage.module }.load_record(recorder.load(module.to_vec(), device)?);
            let record = recorder.load(optimizer.to_vec(), device)?;
            stage.optimizer = stage.optimizer.load_record(record);
            stage.step = step;
        }
        Ok(stage)
    }

    /// Whether all steps are done.
    pub fn is_done(&self) -> bool {
        self.step >= self.course.steps
    }

    /// Whether it is time for a checkpoint.
    pub fn is_due(&self) -> bool {
        self.step.is_multiple_of(self.pace.save_every.max(1)) || self.is_done()
    }

    /// Whether it is time for a line in the log.
    pub fn has_news(&self) -> bool {
        self.step.is_multiple_of(self.pace.log_every.max(1)) || self.is_done()
    }

    /// A step down the gradients of a loss, which are clipped together.
    pub fn descend(&mut self, loss: &Tensor<B, 1>) -> Result<Taken> {
        let gradients = GradientsParams::from_grads(loss.backward(), &self.module);
        self.follow(gradients)
    }

    /// The same with the sum of the gradients of several parts of a loss.
    pub fn descend_by(&mut self, mut sum: GradientsAccumulator<M>) -> Result<Taken> {
        self.follow(sum.grads())
    }

    fn follow(&mut self, gradients: GradientsParams) -> Result<Taken> {
        let (gradients, norm) = clip(&self.module, gradients, CLIP)?;
        ensure!(
            norm.is_finite(),
            "step {}: the gradient is {norm}",
            self.step + 1
        );
        let rate = self.course.rate_of(self.step);
        self.module = self.optimizer.step(rate, self.module.clone(), gradients);
        self.step += 1;
        Ok(Taken { norm, rate })
    }

    /// Writes a checkpoint; the last one is there until this one is whole.
    pub fn save(&self) -> Result<()> {
        let recorder = Bytes::default();
        let module: Vec<u8> = recorder.record(self.module.clone().into_record(), ())?;
        let optimizer: Vec<u8> = recorder.record(self.optimizer.to_record(), ())?;
        let mut bytes = Vec::with_capacity(24 + module.len() + optimizer.len());
        for number in [self.step, module.len(), optimizer.len()] {
            bytes.extend((number as u64).to_le_bytes());
        }
        bytes.extend(module);
        bytes.extend(optimizer);
        put(&self.path, &bytes)
    }
}

/// Step, module and optimizer of a checkpoint.
fn parts(bytes: &[u8]) -> Result<(usize, &[u8], &[u8])> {
    let (head, rest) = bytes.split_at_checked(24).context("it is too short")?;
    let numbers = head.as_chunks().0.iter().map(|&x| u64::from_le_bytes(x));
    let numbers: Vec<usize> = numbers.map(|number| number as usize).collect();
    let [step, module, optimizer] = numbers[..] else {
        bail!("it has no head");
    };
    let all = module.checked_add(optimizer);
    ensure!(all == Some(rest.len()), "it has been cut off");
    let (module, optimizer) = rest.split_at(module);
    Ok((step, module, optimizer))
}

/// A stage goes on as it was begun.
fn agree(path: &Path, course: &Course) -> Result<()> {
    if !path.exists() {
        return put(path, &serde_json::to_vec_pretty(course)?);
    }
    let found: Course = serde_json::from_slice(&fs::read(path)?)
        .with_context(|| format!("reading {}", path.display()))?;
    ensure!(
        found == *course,
        "{} was begun as {found:?}, not as {course:?}: give the same settings, or another folder",
        path.display()
    );
    Ok(())
}

/// Writes a file that is there as a whole or not at all.
pub fn put(path: &Path, bytes: &[u8]) -> Result<()> {
    let mut name = path.as_os_str().to_owned();
    name.push(".partial");
    let partial = PathBuf::from(name);
    let write = || -> std::io::Result<()> {
        let mut file = File::create(&partial)?;
        file.write_all(bytes)?;
        file.sync_all()?;
        fs::rename(&partial, path)
    };
    write().with_context(|| format!("writing {}", path.display()))
}

/// The numbers of a tensor.
pub fn numbers<B: Backend, const D: usize>(tensor: Tensor<B, D>) -> Vec<f64> {
    tensor.cast(DType::F32).into_data().iter::<f64>().collect()
}

/// A log of one JSON object per line.
pub struct Log(File);

impl Log {
    /// Opens the log of a folder. What a stage logged beyond the step from which it goes on is forgotten.
    pub fn open(folder: &Path, stage: &str, step: usize) -> Result<Self> {
        let path = folder.join("log.jsonl");
        if path.exists() {
            let lines = BufReader::new(File::open(&path)?).lines();
            let is_known = |line: &String| {
                let Ok(line) = serde_json::from_str::<Value>(line) else {
                    return false;
                };
                line["stage"] != stage || line["step"].as_u64() <= Some(step as u64)
            };
            let lines: Vec<String> = lines.collect::<std::io::Result<_>>()?;
            let known = lines.into_iter().filter(is_known);
            let text: String = known.flat_map(|line| [line, "\n".into()]).collect();
            put(&path, text.as_bytes())?;
        }
        let file = OpenOptions::new().create(true).append(true).open(&path);
        Ok(Self(
            file.with_context(|| format!("opening {}", path.display()))?,
        ))
    }

    /// Adds a line, here and on the screen.
    pub fn write(&mut self, line: &Value) -> Result<()> {
        println!("{line}");
        Ok(writeln!(self.0, "{line}")?)
    }
}
