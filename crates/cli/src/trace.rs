//! `reroute trace`: prepared tensors in, everything that routing and decoding did out.
//!
//! Names and layouts are those of the reference outputs that the parity tests compare with.

use std::collections::BTreeMap;
use std::io::Write;

use anyhow::{Context, bail};
use burn::tensor::{DType, Tensor, TensorData};
use reducers::encoder::{EncoderReducer, Tap};
use reroute::{Prompt, SampleLayout};
use reroute_zoo::{
    ModelConfig, Pictures, PixelTensors, TensorInputs, TensorOutputs, VisualTokens, ZooError,
};
use safetensors::tensor::{Dtype, SafeTensors, TensorView};
use serde_json::json;
use vision_encoder::Grid;

use crate::args::TraceArgs;
use crate::backend::{self, Backend, Device};
use crate::known::{self, Known};
use crate::{open, output};

/// Marks the unused end of a row when samples have different numbers of visual tokens.
const NO_TOKEN: i64 = -1;

/// Runs the command.
pub fn run(args: &TraceArgs, out: &mut dyn Write) -> anyhow::Result<()> {
    let known = Known::of(&args.model)?;
    let plan = known.plan(&args.routing.routing)?;
    let config = &known.outline().config;
    if let Some(step) = &plan.encoder {
        let needs = EncoderReducer::<Backend>::needs(&step.method, &config.encoder())?;
        if needs.contains(&Tap::Question) {
            return Err(ZooError::NoQuestion.into());
        }
    }
    known::check_file(
        &args.out,
        [&args.inputs].into_iter().chain(&args.model.model),
    )?;
    let bytes = open::tensors(&args.inputs)?;
    let file = format!("inputs {}", args.inputs.display());
    let tensors = SafeTensors::deserialize(&bytes).with_context(|| file.clone())?;
    check_names(&tensors).with_context(|| file.clone())?;
    let device = backend::device()?;
    let inputs = inputs(&tensors, config, &device).with_context(|| file)?;
    let vlm = open::model(&args.model)?;
    let outputs = vlm.run_tensors(inputs, &plan, args.new_tokens, args.hidden_states)?;
    let written = Written::collect(outputs, args.hidden_states)?;
    output::write_file(&args.out, &written.serialize()?)?;
    let names: Vec<&String> = written.0.keys().collect();
    match args.json {
        true => output::print_json(
            out,
            &json!({"out": output::path(&args.out), "tensors": names}),
        ),
        false => Ok(writeln!(
            out,
            "wrote {} tensors to {}",
            names.len(),
            args.out.display()
        )?),
    }
}

/// Inputs that are known; a file may hold tensors of other names beside them, such as outputs.
const INPUTS: [&str; 8] = [
    "in.input_ids",
    "in.attention_mask",
    "in.mm_token_type_ids",
    "in.pixel_values",
    "in.image_grid_thw",
    "in.pixel_values_videos",
    "in.video_grid_thw",
    "in.second_per_grid_ts",
];

/// An input of an unknown name, perhaps misspelt, is not left out in silence.
fn check_names(tensors: &SafeTensors) -> anyhow::Result<()> {
    let unknown = |name: &&str| name.starts_with("in.") && !INPUTS.contains(name);
    match tensors.names().into_iter().find(unknown) {
        Some(name) => bail!("{name} is no input; known are {}", INPUTS.join(", ")),
        None => Ok(()),
    }
}

fn inputs(
    tensors: &SafeTensors,
    config: &ModelConfig,
    device: &Device,
) -> anyhow::Result<TensorInputs<Backend>> {
    let (shape, ids) = integers(tensors, "in.input_ids")?.context("in.input_ids is missing")?;
    let [samples, length] = shape[..] else {
        bail!("in.input_ids must be [B, L], but is {shape:?}");
    };
    // Also keeps a shape such as [2⁶⁰, 0], which needs no bytes, from asking for memory.
    if ids.is_empty() {
        bail!("in.input_ids is {shape:?}: it holds no tokens");
    }
    let mask = match integers(tensors, "in.attention_mask")? {
        Some((mask_shape, mask)) if mask_shape == shape => mask,
        Some((mask_shape, _)) => {
            bail!("in.attention_mask is {mask_shape:?}, in.input_ids is {shape:?}");
        }
        None => vec![1; ids.len()],
    };
    let mut rows = vec![Vec::with_capacity(length); samples];
    for (at, (&id, &attended)) in ids.iter().zip(&mask).enumerate() {
        if attended != 0 {
            let known = u32::try_from(id).ok();
            let known = known.with_context(|| {
                format!("in.input_ids has the id {id}, which no vocabulary has")
            })?;
            rows[at / length].push(known);
        }
    }
    check_types(tensors, config, &shape, &ids)?;
    Ok(TensorInputs {
        samples: rows,
        pixels: pixels(tensors, device)?,
        second_per_grid_ts: match tensors.tensor("in.second_per_grid_ts") {
            Ok(view) => floats(&view, "in.second_per_grid_ts")?,
            Err(_) => Vec::new(),
        },
    })
}

/// `in.mm_token_type_ids` says nothing that the ids do not say; it must not say something else.
fn check_types(
    tensors: &SafeTensors,
    config: &ModelConfig,
    shape: &[usize],
    ids: &[i64],
) -> anyhow::Result<()> {
    let Some((types_shape, types)) = integers(tensors, "in.mm_token_type_ids")? else {
        return Ok(());
    };
    if types_shape != shape {
        bail!("in.mm_token_type_ids is {types_shape:?}, in.input_ids is {shape:?}");
    }
    for (&id, found) in ids.iter().zip(types) {
        let expected = match u32::try_from(id).ok() {
            Some(id) if id == config.slots().image => 1,
            Some(id) if Some(id) == config.slots().video => 2,
            _ => 0,
        };
        if found != expected {
            bail!("in.mm_token_type_ids gives token {id} the type {found}, it is {expected}");
        }
    }
    Ok(())
}

/// Pixels of images of one size, or patches.
fn pixels(tensors: &SafeTensors, device: &Device) -> anyhow::Result<PixelTensors<Backend>> {
    let images = tensors.tensor("in.pixel_values").ok();
    let images = images.filter(|view| !view.data().is_empty());
    let videos = tensors.tensor("in.pixel_values_videos").ok();
    if let Some(view) = images.as_ref().filter(|view| view.shape().len() != 2) {
        let [images, channels, height, width] = view.shape()[..] else {
            bail!(
                "in.pixel_values must be [N, 3, H, W] or [patches, features], but is {:?}",
                view.shape()
            );
        };
        if videos.is_some() {
            bail!(
                "in.pixel_values_videos are patches: give in.pixel_values as [patches, features], too"
            );
        }
        let values = floats(view, "in.pixel_values")?;
        let data = TensorData::new(values, [images, channels, height, width]);
        let pixels = Tensor::from_data(data, (device, DType::F32));
        return Ok(PixelTensors::images(Pictures::Fixed(pixels)));
    }
    let patches = |view: Option<TensorView>, pixels, grids| {
        view.map(|view| patches(tensors, &view, pixels, grids, device))
            .transpose()
    };
    Ok(PixelTensors {
        images: patches(images, "in.pixel_values", "in.image_grid_thw")?,
        videos: patches(videos, "in.pixel_values_videos", "in.video_grid_thw")?,
    })
}

/// Patches `[patches, features]` and their grids `[N, 3]`.
fn patches(
    tensors: &SafeTensors,
    view: &TensorView,
    pixels: &str,
    grids: &str,
    device: &Device,
) -> anyhow::Result<Pictures<Backend>> {
    let shape = view.shape();
    let [patches, features] = shape[..] else {
        bail!("{pixels} must be [patches, features], but is {shape:?}");
    };
    let sizes = integers(tensors, grids)?;
    let (grid_shape, sizes) = sizes.with_context(|| format!("{pixels} needs {grids} [N, 3]"))?;
    if grid_shape.len() != 2 || grid_shape[1] != 3 {
        bail!("{grids} must be [N, 3], but is {grid_shape:?}");
    }
    let size = |size: i64| {
        let size = usize::try_from(size).ok();
        size.with_context(|| format!("{grids} has a negative size"))
    };
    let grid = |thw: &[i64]| {
        Ok(Grid {
            t: size(thw[0])?,
            h: size(thw[1])?,
            w: size(thw[2])?,
        })
    };
    let grids = sizes
        .chunks_exact(3)
        .map(grid)
        .collect::<anyhow::Result<_>>()?;
    let data = TensorData::new(floats(view, pixels)?, [patches, features]);
    let values: Tensor<Backend, 2> = Tensor::from_data(data, (device, DType::F32));
    Ok(Pictures::Patches(values.transpose(), grids))
}

fn integers(tensors: &SafeTensors, name: &str) -> anyhow::Result<Option<(Vec<usize>, Vec<i64>)>> {
    let Ok(view) = tensors.tensor(name) else {
        return Ok(None);
    };
    let chunks = |size| view.data().chunks_exact(size);
    let values = match view.dtype() {
        Dtype::I64 => chunks(8).map(|b| i64::from_le_bytes(array(b))).collect(),
        Dtype::I32 => chunks(4)
            .map(|b| i32::from_le_bytes(array(b)).into())
            .collect(),
        Dtype::BOOL | Dtype::U8 => view.data().iter().map(|&b| b.into()).collect(),
        other => bail!("{name} has type {other:?}; write I64"),
    };
    Ok(Some((view.shape().to_vec(), values)))
}

fn floats(view: &TensorView, name: &str) -> anyhow::Result<Vec<f32>> {
    if view.dtype() != Dtype::F32 {
        bail!("{name} has type {:?}; write F32", view.dtype());
    }
    let bytes = view.data().chunks_exact(4);
    Ok(bytes.map(|b| f32::from_le_bytes(array(b))).collect())
}

fn array<const N: usize>(bytes: &[u8]) -> [u8; N] {
    std::array::from_fn(|i| bytes[i])
}

/// Named tensors to write: type, shape, little-endian bytes.
struct Written(BTreeMap<String, (Dtype, Vec<usize>, Vec<u8>)>);

impl Written {
    fn collect(outputs: TensorOutputs<Backend>, hidden_states: bool) -> anyhow::Result<Self> {
        let mut written = Self(BTreeMap::new());
        let samples = outputs.generations.len();
        written.tensor("logits", outputs.logits)?;
        written.routing(&outputs.trace, samples);

        let layers = outputs.kv_lengths.first().map_or(0, Vec::len);
        let lengths: Vec<i64> = outputs
            .kv_lengths
            .iter()
            .flatten()
            .map(|&n| n as i64)
            .collect();
        let shape = if samples == 1 {
            vec![layers]
        } else {
            vec![samples, layers]
        };
        written.integers("kv_lengths", shape, &lengths);

        let new_tokens = outputs
            .generations
            .iter()
            .map(|g| g.tokens.len())
            .max()
            .unwrap_or(0);
        if new_tokens > 0 {
            let vocab_size = outputs.generations[0].logits[0].len();
            let (mut ids, mut logits) = (Vec::new(), Vec::new());
            for generation in &outputs.generations {
                let missing = new_tokens - generation.tokens.len();
                ids.extend(generation.tokens.iter().map(|&id| i64::from(id)));
                ids.extend(std::iter::repeat_n(NO_TOKEN, missing));
                logits.extend(generation.logits.iter().flatten());
                logits.extend(std::iter::repeat_n(f32::NAN, missing * vocab_size));
            }
            written.integers("decode.ids", vec![samples, new_tokens], &ids);
            written.floats(
                "decode.logits",
                vec![samples, new_tokens, vocab_size],
                &logits,
            );
        }
        written.positions(&outputs.prompt)?;
        if hidden_states {
            // Packed rows; with one sample the leading axis is the batch.
            let row_major = |x: Tensor<Backend, 2>| x.transpose().unsqueeze::<3>();
            let VisualTokens {
                features,
                images,
                videos,
                kept: _,
            } = outputs.tokens;
            let embeddings = outputs.prompt.embeddings;
            for (name, features) in [
                ("vision_features", features),
                ("image_embeds", images.map(|images| images.tokens)),
                ("video_embeds", videos.map(|videos| videos.tokens)),
                ("inputs_embeds", Some(embeddings)),
            ] {
                if let Some(features) = features {
                    written.tensor(name, row_major(features))?;
                }
            }
            for (layer, features) in outputs.prompt.deepstack.into_iter().enumerate() {
                written.tensor(&format!("deepstack.{layer}"), row_major(features))?;
            }
            for (layer, hidden) in outputs.hidden_states.into_iter().enumerate() {
                let rows: Vec<i64> = hidden.rows.iter().map(|&row| row as i64).collect();
                written.integers(&format!("hidden.{layer}.rows"), vec![rows.len()], &rows);
                written.tensor(&format!("hidden.{layer}"), row_major(hidden.values))?;
            }
        }
        Ok(written)
    }

    /// Positions `[axes, B, L]` (packed rows with several samples of different length are padded
    /// with −1 at the end), and what generated tokens add to their row number `[B, 1]`.
    fn positions(&mut self, prompt: &Prompt<Backend>) -> anyhow::Result<()> {
        let [axes, rows] = prompt.positions.dims();
        let data = prompt.positions.clone().try_into_data();
        let data = data.map_err(|error| anyhow::anyhow!("reading positions failed: {error:?}"))?;
        let packed: Vec<i64> = data.iter::<i64>().collect();
        let longest = prompt
            .samples
            .iter()
            .map(|sample| sample.rows)
            .max()
            .unwrap_or(0);
        let mut positions = Vec::new();
        for axis in packed.chunks_exact(rows) {
            let mut rest = axis;
            for sample in &prompt.samples {
                let (of_sample, others) = rest.split_at(sample.rows);
                positions.extend_from_slice(of_sample);
                positions.extend(std::iter::repeat_n(NO_TOKEN, longest - sample.rows));
                rest = others;
            }
        }
        let samples = prompt.samples.len();
        self.integers(
            "rope.position_ids",
            vec![axes, samples, longest],
            &positions,
        );
        let delta = |sample: &SampleLayout| sample.next_position - sample.rows as i64;
        let deltas: Vec<i64> = prompt.samples.iter().map(delta).collect();
        self.integers("rope_deltas", vec![samples, 1], &deltas);
        Ok(())
    }

    /// Scores and selections per decision layer, one row per sample. `scores` has one column per
    /// candidate in visual order and `selected` points at those columns; under *remove* the
    /// candidates of a later decision are those kept so far, whose numbers among all visual tokens are
    /// in `candidates`.
    fn routing(&mut self, trace: &reroute::RoutingTrace, samples: usize) {
        let layers: std::collections::BTreeSet<usize> = trace
            .decisions
            .iter()
            .map(|decision| decision.layer)
            .collect();
        for layer in layers {
            let at = |sample| {
                let mut decisions = trace.of_sample(sample);
                decisions.find(|decision| decision.layer == layer)
            };
            let decisions: Vec<_> = (0..samples).map(at).collect();
            let most = |length: &dyn Fn(&reroute::Decision) -> usize| {
                decisions
                    .iter()
                    .flatten()
                    .map(|d| length(d))
                    .max()
                    .unwrap_or(0)
            };
            let candidates = most(&|d| d.candidates.len());
            let kept = most(&|d| d.selected.len());
            let (mut scores, mut selected, mut tokens) = (Vec::new(), Vec::new(), Vec::new());
            for decision in &decisions {
                let (s, c, k): (&[f32], &[usize], &[usize]) = match decision {
                    Some(d) => (&d.scores, &d.candidates, &d.selected),
                    None => (&[], &[], &[]),
                };
                let column = |token: &usize| c.partition_point(|other| other < token) as i64;
                scores.extend_from_slice(s);
                scores.extend(std::iter::repeat_n(f32::NAN, candidates - s.len()));
                tokens.extend(c.iter().map(|&token| token as i64));
                tokens.extend(std::iter::repeat_n(NO_TOKEN, candidates - c.len()));
                selected.extend(k.iter().map(column));
                selected.extend(std::iter::repeat_n(NO_TOKEN, kept - k.len()));
            }
            let name = |what: &str| format!("routing.{layer}.{what}");
            self.floats(&name("scores"), vec![samples, candidates], &scores);
            self.integers(&name("candidates"), vec![samples, candidates], &tokens);
            self.integers(&name("selected"), vec![samples, kept], &selected);
        }
    }

    fn tensor<const D: usize>(
        &mut self,
        name: &str,
        tensor: Tensor<Backend, D>,
    ) -> anyhow::Result<()> {
        let shape = tensor.dims().to_vec();
        let data = tensor.try_into_data();
        let data =
            data.map_err(|error| anyhow::anyhow!("reading {name} back failed: {error:?}"))?;
        let values: Vec<f32> = data.iter::<f32>().collect();
        self.floats(name, shape, &values);
        Ok(())
    }

    fn floats(&mut self, name: &str, shape: Vec<usize>, values: &[f32]) {
        let bytes = values
            .iter()
            .flat_map(|value| value.to_le_bytes())
            .collect();
        self.0.insert(name.into(), (Dtype::F32, shape, bytes));
    }

    fn integers(&mut self, name: &str, shape: Vec<usize>, values: &[i64]) {
        let bytes = values
            .iter()
            .flat_map(|value| value.to_le_bytes())
            .collect();
        self.0.insert(name.into(), (Dtype::I64, shape, bytes));
    }

    fn serialize(&self) -> anyhow::Result<Vec<u8>> {
        let views = self.0.iter().map(|(name, (dtype, shape, bytes))| {
            Ok((name, TensorView::new(*dtype, shape.clone(), bytes)?))
        });
        let views = views.collect::<Result<Vec<_>, safetensors::SafeTensorError>>()?;
        Ok(safetensors::serialize(views, None)?)
    }
}
