//! A decoder and prompts of the measured shapes.

use anyhow::{Context, anyhow, ensure};
use burn::module::{Module, ModuleMapper, ModuleVisitor, Param};
use burn::tensor::backend::Backend as AnyBackend;
use burn::tensor::{DType, Distribution, Int, Tensor, TensorData};
use reducers::{ReducerError, Schedule, presets};
use reroute::{Decoder, KvCache, Prefill, Prompt, Routed, Router, SampleLayout};
use reroute_cli::backend::{Backend, Device};
use reroute_layers::{CodeFormat, Coded, Linear, Linears, Weight};

use crate::model::{DISTINCT_LAYERS, Model, TEXT};
use crate::options::Type;
use crate::timing::{seconds, wait, wait_for_one};

/// Text tokens before the image.
const BEFORE_IMAGE: usize = 5;

/// Everything that is measured.
pub struct Setup {
    /// The decoder: all weights made, one prefill done.
    pub decoder: Decoder<Backend>,
    /// One image and a question.
    pub prompt: Prompt<Backend>,
    /// The type of the decoder's weights.
    pub kind: Type,
    /// Visual tokens of the prompt.
    pub visual: usize,
    /// What making the weights took.
    pub weights_seconds: f64,
    /// What the first prefill took: beyond the later ones, compiling and tuning kernels.
    pub first_prefill_seconds: f64,
}

impl Setup {
    /// Builds the decoder with random weights of a fixed seed and runs it once.
    pub fn new(model: &Model, layers: usize, kind: Type, device: &Device) -> anyhow::Result<Self> {
        let dtype = kind.floats();
        Backend::seed(device, 0);
        let decoder = model.decoder.init::<Backend>(device)?;
        // Parameters are made on first use; clones share them only from then on.
        let weights_seconds = seconds(|| {
            decoder.visit(&mut MakeParameters);
            Ok(())
        })?;
        let mut decoder = decoder.map(&mut Cast(dtype));
        if let Some(format) = kind.codes() {
            encode(&mut decoder, format, dtype)?;
        }
        let mut setup = Self {
            decoder: deepen(decoder, layers)?,
            kind,
            prompt: prompt(model, model.visual, dtype, device),
            visual: model.visual,
            weights_seconds,
            first_prefill_seconds: 0.0,
        };
        setup.first_prefill_seconds = seconds(|| setup.prefill(&Schedule::dense()).map(drop))?;
        Ok(setup)
    }

    /// The same decoder and prompt in another type.
    pub fn cast(&self, model: &Model, dtype: DType) -> anyhow::Result<Self> {
        let layers = self.decoder.layers();
        let distinct = layers[..DISTINCT_LAYERS].to_vec();
        let decoder = self.decoder.clone().with_layers(distinct)?;
        Ok(Self {
            decoder: deepen(decoder.map(&mut Cast(dtype)), layers.len())?,
            prompt: prompt(model, self.visual, dtype, &self.device()),
            ..*self
        })
    }

    /// The same prompt before the first layers alone, whose weights both share.
    pub fn shallower(&self, layers: usize) -> anyhow::Result<Self> {
        let first = self.decoder.layers()[..layers].to_vec();
        Ok(Self {
            decoder: self.decoder.clone().with_layers(first)?,
            prompt: self.prompt.clone(),
            ..*self
        })
    }

    /// Bytes of the weights in codes.
    pub fn code_bytes(&self) -> usize {
        let mut decoder = self.decoder.clone();
        let mut linears: Vec<(String, &mut Linear<Backend>)> = Vec::new();
        decoder.linears("", &mut linears);
        let bytes = linears.iter().filter_map(|(_, linear)| {
            let [rows, columns] = linear.weight.dims();
            Some(rows * linear.weight.format()?.row_bytes(columns)?)
        });
        bytes.sum()
    }

    /// The device.
    pub fn device(&self) -> Device {
        self.prompt.embeddings.device()
    }

    /// The type of the prompt and of all that is not in codes.
    pub fn dtype(&self) -> DType {
        self.prompt.embeddings.dtype()
    }

    /// Rows of the prompt.
    pub fn rows(&self) -> usize {
        self.visual + TEXT
    }

    /// Prefills the prompt and waits for its logits.
    pub fn prefill(&self, schedule: &Schedule) -> anyhow::Result<Prefill<Backend>> {
        self.prefill_of(&self.prompt, schedule)
    }

    /// Prefills any prompt and waits for its logits.
    pub fn prefill_of(
        &self,
        prompt: &Prompt<Backend>,
        schedule: &Schedule,
    ) -> anyhow::Result<Prefill<Backend>> {
        let prefill = self.decoder.prefill(prompt, schedule, Default::default())?;
        wait(prefill.logits.clone())?;
        Ok(prefill)
    }

    /// The schedule of `METHOD@BUDGET-exact` at the decoder's depth.
    ///
    /// In a shallow decoder the layers before the first decision can exceed the whole budget. The
    /// first decision then moves to layer 0.
    pub fn schedule(&self, method: &str, budget: usize) -> anyhow::Result<Schedule> {
        let depth = self.decoder.layers().len();
        let preset = presets::find(&format!("{method}@{budget}-exact"))?;
        let layers = match preset.schedule(depth) {
            Ok(schedule) => return Ok(schedule),
            Err(ReducerError::Infeasible { mut layers, .. }) => {
                *layers.first_mut().context("a schedule without decisions")? = 0;
                layers
            }
            Err(error) => return Err(error.into()),
        };
        let schedule = preset.schedule_at(layers, depth)?;
        ensure!(!schedule.is_dense(), "{method:?} does not decide");
        Ok(schedule)
    }

    /// A router before its first layer.
    pub fn router(&self, schedule: &Schedule) -> anyhow::Result<Router<'_, Backend>> {
        Ok(Router::new(
            &self.decoder,
            self.prompt.clone(),
            schedule.clone(),
        )?)
    }

    /// The cache before the first turn.
    pub fn nothing_cached(&self) -> anyhow::Result<KvCache<Backend>> {
        let (layers, samples) = (self.decoder.layers().len(), self.prompt.samples.len());
        Ok(KvCache::new(layers, samples)?)
    }
}

/// `f32`, `f16`, `bf16`: what a type is called in results.
pub fn dtype_name(dtype: DType) -> String {
    format!("{dtype:?}").to_lowercase()
}

/// Waits for a layer's input.
pub fn settle(routed: &Routed<Backend>) -> anyhow::Result<()> {
    wait_for_one(routed.keys.clone())?;
    wait_for_one(routed.hidden_states.clone())
}

/// A question about one image of so many visual tokens, with random embeddings.
pub fn prompt<B: AnyBackend<Device = Device>>(
    model: &Model,
    visual: usize,
    dtype: DType,
    device: &Device,
) -> Prompt<B> {
    let rows = visual + TEXT;
    let shape = [model.decoder.hidden_size, rows];
    let embeddings: Tensor<B, 2> = Tensor::random(shape, Distribution::Normal(0.0, 0.1), device);
    let axes = model.decoder.rope.axes();
    Prompt {
        embeddings: embeddings.cast(dtype),
        positions: positions(axes, visual, rows, device),
        deepstack: Vec::new(),
        samples: vec![SampleLayout {
            rows,
            visual: (BEFORE_IMAGE..BEFORE_IMAGE + visual).collect(),
            next_position: rows as i64,
            salience: None,
            cells: Vec::new(),
        }],
    }
}

/// Positions of one image in text: consecutive on one axis; on three, a square grid in place.
///
/// # Shapes
/// - returns `[axes, rows]`
fn positions<B: AnyBackend<Device = Device>>(
    axes: usize,
    visual: usize,
    rows: usize,
    device: &Device,
) -> Tensor<B, 2, Int> {
    let side = visual.isqrt();
    let position = |axis: usize, row: usize| match row.checked_sub(BEFORE_IMAGE) {
        Some(token) if axes > 1 && token < visual => {
            BEFORE_IMAGE + [0, token / side, token % side][axis]
        }
        Some(_) if axes > 1 => row - visual + side,
        _ => row,
    };
    let all = (0..axes).flat_map(|axis| (0..rows).map(move |row| position(axis, row) as i64));
    let all: Vec<i64> = all.collect();
    Tensor::from_data(TensorData::new(all, [axes, rows]), device)
}

/// A decoder of so many layers that repeats those it has.
fn deepen(decoder: Decoder<Backend>, layers: usize) -> anyhow::Result<Decoder<Backend>> {
    let distinct = decoder.layers();
    let all = (0..layers).map(|at| distinct[at % distinct.len()].clone());
    let all = all.collect();
    Ok(decoder.with_layers(all)?)
}

/// Puts codes in the place of the weights of linear maps.
pub fn encode<B: AnyBackend>(
    decoder: &mut Decoder<B>,
    format: CodeFormat,
    dtype: DType,
) -> anyhow::Result<()> {
    let mut linears: Vec<(String, &mut Linear<B>)> = Vec::new();
    decoder.linears("", &mut linears);
    for (path, linear) in linears {
        let ([_, columns], device) = (linear.weight.dims(), linear.weight.device());
        let numbers = linear.weight.val().cast(DType::F32).into_data();
        let numbers = numbers.as_slice().map_err(|error| anyhow!("{error:?}"))?;
        let rows = format.quantise_rows(numbers, columns);
        let rows = rows.with_context(|| format!("{path} has no codes"))?;
        let words = rows.as_chunks().0.iter();
        let words = words.map(|&bytes| i32::from_ne_bytes(bytes)).collect();
        let coded = Coded::new(format, columns, words, (&device, dtype));
        linear.weight = Weight::Coded(coded.context("rows of whole words")?);
    }
    Ok(())
}

struct MakeParameters;

impl ModuleVisitor<Backend> for MakeParameters {
    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<Backend, D>>) {
        param.val();
    }
}

/// Gives all parameters another type.
pub struct Cast(pub DType);

impl<B: AnyBackend> ModuleMapper<B> for Cast {
    fn map_float<const D: usize>(&mut self, param: Param<Tensor<B, D>>) -> Param<Tensor<B, D>> {
        param.map(|tensor| tensor.cast(self.0))
    }
}
