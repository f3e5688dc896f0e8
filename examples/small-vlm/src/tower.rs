//! The first stage: a tower whose patches say what is there, and where it is.
//!
//! Answers alone teach a tower little: here every patch of an object is told the object's colour, shape, size and
//! box through linear maps on the features that the projector will read. The maps are thrown away afterwards.

use std::path::Path;
use std::thread;
use std::time::Instant;

use anyhow::{Context, Result, bail};
use burn::module::{Module, Param};
use burn::tensor::activation::{log_sigmoid, log_softmax};
use burn::tensor::backend::{AutodiffBackend, Backend};
use burn::tensor::{Distribution, Int, Tensor, TensorData};
use reroute_zoo::{
    ImageOptions, Model, ModelConfig, Pictures, PixelTensors, Prepared, Preprocessor, RgbImage,
    Trained, Visual,
};
use serde_json::json;

use crate::course::{Course, Log, Pace, Stage, numbers};
use crate::feed::feed;
use crate::parts::{self, GRID, STEPS, WIDTH};
use crate::scene::{COLOURS, Object, SHAPES, SIDE, SIZES, Scene, Split};

/// Pixels of a patch along a side.
const PATCH: usize = SIDE / GRID;
/// Pixels in both directions that a patch shows of an object that it speaks for.
const SHOWN: usize = 3;
/// Deviation of a coordinate that is learnt, in steps.
const BLUR: f64 = 1.0;
/// What the mean error of a box counts.
const BOX: f64 = 6.0;
/// Rows of the linear maps: colour, shape, size, whether there is an object, its box, the steps of its coordinates.
const ROWS: [usize; 6] = [
    COLOURS.len(),
    SHAPES.len(),
    SIZES.len(),
    1,
    4,
    4 * (STEPS + 1),
];

/// The model, of which the tower is trained, and the linear maps that it is trained through.
#[derive(Module, Debug)]
pub struct Supervised<B: Backend> {
    /// The model.
    pub model: Model<B>,
    /// `[rows of all maps, features]`
    maps: Param<Tensor<B, 2>>,
    /// `[rows of all maps, 1]`
    biases: Param<Tensor<B, 2>>,
}

/// What is in each patch.
#[derive(Debug, Clone, Default)]
pub struct Labels {
    /// Patches that show an object, counted through all pictures.
    pub patches: Vec<i64>,
    /// The object of each.
    pub objects: Vec<Object>,
    /// Of every patch, whether it shows one.
    pub is_object: Vec<f32>,
}

impl Labels {
    /// Adds a scene.
    pub fn add(&mut self, scene: &Scene) {
        for row in 0..GRID {
            for column in 0..GRID {
                let shown = |from: usize, object_from: usize, side: usize| {
                    let end = (from + PATCH).min(object_from + side);
                    end.saturating_sub(from.max(object_from))
                };
                let of = |object: &Object| {
                    let width = shown(column * PATCH, object.left, object.side);
                    let height = shown(row * PATCH, object.top, object.side);
                    if width.min(height) > SHOWN {
                        width * height
                    } else {
                        0
                    }
                };
                let most = scene.objects.iter().max_by_key(|object| of(object));
                let object = most.filter(|object| of(object) > 0);
                if let Some(object) = object {
                    self.patches.push(self.is_object.len() as i64);
                    self.objects.push(*object);
                }
                self.is_object.push(f32::from(object.is_some()));
            }
        }
    }
}

/// Pictures and what is in them.
pub struct Batch {
    /// Pixels as the tower takes them.
    pub prepared: Vec<Prepared>,
    /// What is to be said of them.
    pub labels: Labels,
}

/// The scenes of a step.
pub fn batch(preprocessor: &dyn Preprocessor, course: &Course, step: usize) -> Result<Batch> {
    let (mut prepared, mut labels) = (Vec::new(), Labels::default());
    for scene in scenes(course, step) {
        prepared.push(prepare(preprocessor, scene.picture())?);
        labels.add(&scene);
    }
    Ok(Batch { prepared, labels })
}

/// The scenes of a step: no two steps have one in common.
pub fn scenes(course: &Course, step: usize) -> impl Iterator<Item = Scene> {
    let first = step * course.scenes;
    let seed = course.seed;
    (first..first + course.scenes).map(move |index| Scene::new(Split::Train, seed, index as u32))
}

/// A picture's pixels as the tower takes them.
pub fn prepare(preprocessor: &dyn Preprocessor, picture: RgbImage) -> Result<Prepared> {
    Ok(preprocessor.prepare(&Visual::Image(picture))?.1)
}

/// Features that the tower makes of pictures, `[features, patches]`.
pub fn features<B: Backend>(
    model: &Model<B>,
    prepared: Vec<Prepared>,
    device: &B::Device,
) -> Result<Tensor<B, 2>> {
    let Model::Llava(llava) = model else {
        bail!("the model is no LLaVA");
    };
    match PixelTensors::of(prepared, device)?.images {
        Some(Pictures::Fixed(pixels)) => Ok(llava.vision_features(pixels)?),
        _ => bail!("the pictures are no squares"),
    }
}

/// Trains the tower and writes the model with it to `to`. A run in the folder goes on.
pub fn train<B: AutodiffBackend>(
    (course, pace): (&Course, Pace),
    folder: &Path,
    device: &B::Device,
    to: &Path,
) -> Result<()> {
    let like = parts::folder()?;
    let config = ModelConfig::open(&like)?;
    let preprocessor = config.preprocessor(&like, &ImageOptions::default())?;
    let module = Supervised::<B>::new(course.seed, device)?;
    let mut stage = Stage::begin(module, (course, pace), folder, "tower", device)?;
    let mut log = Log::open(folder, "tower", stage.step)?;
    let preprocessor = preprocessor.as_ref();
    thread::scope(|scope| {
        let batches = feed(scope, stage.step..course.steps, move |step| {
            batch(preprocessor, course, step)
        });
        for batch in batches {
            let started = Instant::now();
            let (loss, said) = stage.module.loss(batch?, device)?;
            let taken = stage.descend(&loss)?;
            if stage.has_news() {
                let line = said.line(&loss);
                let mut line = json!({
                    "stage": "tower", "step": stage.step, "loss": line[0], "object": line[1], "colour": line[2],
                    "shape": line[3], "size": line[4], "pixels_off": line[5],
                });
                line["norm"] = json!(taken.norm);
                line["rate"] = json!(taken.rate);
                line["seconds"] = json!(started.elapsed().as_secs_f64());
                log.write(&line)?;
            }
            if stage.is_due() {
                stage.save()?;
            }
        }
        anyhow::Ok(())
    })?;
    stage.module.model.save(to, &like, &Default::default())?;
    Ok(())
}

/// What the maps said of a batch.
struct Said<B: Backend> {
    is_object: Tensor<B, 2>,
    /// Whether colour, shape and size of each patch are right.
    right: Vec<Tensor<B, 1, Int>>,
    error: Tensor<B, 1>,
    labels: Labels,
}

impl<B: Backend> Said<B> {
    /// Loss; shares of patches whose object, colour, shape and size are right; error of a box in pixels.
    fn line(&self, loss: &Tensor<B, 1>) -> Vec<f64> {
        let is_object = numbers(self.is_object.clone());
        let right = { is_object.iter().zip(&self.labels.is_object) }
            .filter(|(said, is)| (**said > 0.0) == (**is > 0.0));
        let mut line = vec![
            numbers(loss.clone()).iter().sum(),
            right.count() as f64 / is_object.len() as f64,
        ];
        for right in &self.right {
            let right: Vec<f64> = right.clone().into_data().iter::<f64>().collect();
            line.push(right.iter().sum::<f64>() / right.len() as f64);
        }
        let error: f64 = numbers(self.error.clone()).iter().sum();
        line.push(error * SIDE as f64);
        line
    }
}

impl<B: Backend> Supervised<B> {
    fn new(seed: u32, device: &B::Device) -> Result<Self> {
        let model = parts::random(seed, device)?.train(&[Trained::Tower])?;
        let rows = ROWS.iter().sum();
        B::seed(device, seed.into());
        let maps = Tensor::random([rows, WIDTH], Distribution::Normal(0.0, 0.05), device);
        Ok(Self {
            model,
            maps: Param::from_tensor(maps),
            biases: Param::from_tensor(Tensor::zeros([rows, 1], device)),
        })
    }

    /// Rows of a map, for features of patches.
    fn map(&self, which: usize, features: &Tensor<B, 2>) -> Tensor<B, 2> {
        let (start, rows) = (ROWS[..which].iter().sum(), ROWS[which]);
        let of = |param: &Param<Tensor<B, 2>>| param.val().narrow(0, start, rows);
        of(&self.maps).matmul(features.clone()) + of(&self.biases)
    }

    fn loss(&self, batch: Batch, device: &B::Device) -> Result<(Tensor<B, 1>, Said<B>)> {
        let labels = batch.labels;
        let all = features(&self.model, batch.prepared, device)?;
        let patches = Tensor::<B, 1, Int>::from_data(labels.patches.as_slice(), device);
        let features = all.clone().select(1, patches);
        let objects = &labels.objects;
        let count = objects.len();

        let is_object = self.map(3, &all);
        let is = Tensor::<B, 1>::from_data(labels.is_object.as_slice(), device).unsqueeze::<2>();
        // Binary cross-entropy: softplus(x) − y·x.
        let softplus = -log_sigmoid(-is_object.clone());
        let mut loss = (softplus - is * is_object.clone()).mean();

        let wanted: [fn(&Object) -> usize; 3] = [
            |object| object.colour,
            |object| object.shape,
            |object| object.size,
        ];
        let mut right = Vec::new();
        for (which, wanted) in wanted.into_iter().enumerate() {
            let wanted: Vec<i64> = objects.iter().map(|object| wanted(object) as i64).collect();
            let wanted = Tensor::<B, 1, Int>::from_data(wanted.as_slice(), device).unsqueeze::<2>();
            let said = self.map(which, &features);
            loss = loss
                - log_softmax(said.clone(), 0)
                    .gather(0, wanted.clone())
                    .mean();
            right.push(said.argmax(0).equal(wanted).int().reshape([count]));
        }

        let shares: Vec<[f64; 4]> = objects.iter().map(Object::shares).collect();
        let boxes: Vec<f32> = { 0..4 }
            .flat_map(|side| shares.iter().map(move |shares| shares[side] as f32))
            .collect();
        let boxes = Tensor::<B, 2>::from_data(TensorData::new(boxes, [4, count]), device);
        let error = (self.map(4, &features) - boxes).abs().mean();
        loss = loss + error.clone().mul_scalar(BOX);

        let mut blurred = vec![0f32; 4 * (STEPS + 1) * count];
        for (at, shares) in shares.iter().enumerate() {
            for (side, share) in shares.iter().enumerate() {
                let weights = (0..=STEPS).map(|step| {
                    let off = (step as f64 - share * STEPS as f64) / BLUR;
                    (-0.5 * off * off).exp()
                });
                let sum: f64 = weights.clone().sum();
                for (step, weight) in weights.enumerate() {
                    blurred[(side * (STEPS + 1) + step) * count + at] = (weight / sum) as f32;
                }
            }
        }
        let blurred = TensorData::new(blurred, [4, STEPS + 1, count]);
        let blurred = Tensor::<B, 3>::from_data(blurred, device);
        let said = self.map(5, &features).reshape([4, STEPS + 1, count]);
        let crossed = (blurred * log_softmax(said, 1))
            .sum()
            .div_scalar(4.0 * count as f64);
        loss = loss - crossed.mul_scalar(0.5);

        let said = Said {
            is_object,
            right,
            error,
            labels,
        };
        Ok((loss, said))
    }
}

/// Checks that a course can be counted: a scene has a number of 32 bits.
pub fn check(course: &Course) -> Result<()> {
    let last = course.steps.checked_mul(course.scenes);
    last.and_then(|last| u32::try_from(last).ok())
        .context("steps × scenes is more than 2³²")?;
    Ok(())
}
