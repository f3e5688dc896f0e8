//! The second and third stages: a projector whose tokens a decoder can read, then the decoder, from scratch.

use std::path::Path;
use std::thread;
use std::time::Instant;

use anyhow::{Result, bail};
use burn::module::AutodiffModule;
use burn::optim::{GradientsAccumulator, GradientsParams};
use burn::tensor::backend::{AutodiffBackend, Backend};
use burn::tensor::{Tensor, TensorData};
use reroute_zoo::messages::{Content, Message, Role};
use reroute_zoo::vision_encoder::VisionOutput;
use reroute_zoo::{
    AnswerLogits, FamilyModel, Folder, Lesson, Model, OpenOptions, Prepared, SaveOptions, Schedule,
    Trained, Tutor, Visual, VisualTokens, Vlm,
};
use serde_json::json;

use crate::course::{Course, Log, Pace, Stage, numbers};
use crate::feed::feed;
use crate::parts::{self, GRID, WIDTH};
use crate::scene::{COLOURS, Kind, SHAPES, Scene};
use crate::tower::{Batch, batch, features, scenes};

/// Visual tokens of a picture.
const TOKENS: usize = GRID * GRID;
/// Questions about a scene.
const QUESTIONS: usize = 8;
/// Share of the steps in which expressions say what an object is, and not where.
const EASY: f64 = 0.25;
/// Expressions that say what an object is.
const EASY_KINDS: [Kind; 3] = [Kind::Unique, Kind::Attributes, Kind::Size];

/// The model of a folder, in f32.
pub fn open<B: AutodiffBackend>(folder: &Path, device: &B::Device) -> Result<Vlm<B>> {
    let folder = Folder::open(folder)?;
    Ok(Vlm::open(&folder, &OpenOptions::default(), device)?)
}

/// Trains the projector until its tokens say in the decoder's own words what the tower saw: a patch of an object
/// is the sum of the embeddings of its colour, shape and size and of the codes of its box, all others are nothing.
pub fn align<B: AutodiffBackend>(
    (course, pace): (&Course, Pace),
    folder: &Path,
    device: &B::Device,
    [from, to]: [&Path; 2],
) -> Result<()> {
    let vlm = open::<B>(from, device)?;
    let frozen = vlm.model().valid();
    let words = parts::words(vlm.tokenizer())?;
    let embedded = numbers(vlm.model().decoder().embed(&words)?);
    let basis = parts::basis();
    let mut model = vlm.model().clone().train(&[Trained::Projector])?;
    if !folder.join("aligned.checkpoint").exists() {
        model = standardised(model, &frozen, course, &vlm, device)?;
    }
    let mut stage = Stage::begin(model, (course, pace), folder, "aligned", device)?;
    let mut log = Log::open(folder, "aligned", stage.step)?;
    let preprocessor = vlm.preprocessor();
    thread::scope(|scope| {
        let batches = feed(scope, stage.step..course.steps, move |step| {
            batch(preprocessor, course, step)
        });
        for batch in batches {
            let started = Instant::now();
            let Batch { prepared, labels } = batch?;
            let patches = labels.is_object.len();
            let mut wanted = vec![0f32; WIDTH * patches];
            for (&patch, object) in labels.patches.iter().zip(&labels.objects) {
                let mut vector = vec![0.0; WIDTH];
                let names = [
                    object.colour,
                    COLOURS.len() + object.shape,
                    COLOURS.len() + SHAPES.len() + object.size,
                ];
                for name in names {
                    for (feature, number) in vector.iter_mut().enumerate() {
                        *number += embedded[feature * words.len() + name];
                    }
                }
                for (side, at) in object.shares().into_iter().enumerate() {
                    let code = parts::spread(&basis, side, at);
                    vector.iter_mut().zip(code).for_each(|(x, y)| *x += y);
                }
                for (feature, number) in vector.into_iter().enumerate() {
                    wanted[feature * patches + patch as usize] = number as f32;
                }
            }
            let wanted = TensorData::new(wanted, [WIDTH, patches]);
            let wanted = Tensor::<B, 2>::from_data(wanted, device);
            let seen = Tensor::from_inner(features(&frozen, prepared, device)?);
            let error = (project(&stage.module, &seen)? - wanted.clone())
                .square()
                .mean();
            let taken = stage.descend(&error)?;
            if stage.has_news() {
                let share = |tensor: Tensor<B, 1>| numbers(tensor).iter().sum::<f64>();
                let (error, all) = (share(error), share(wanted.square().mean()));
                log.write(&json!({
                    "stage": "aligned", "step": stage.step, "loss": error, "explained": 1.0 - error / all,
                    "norm": taken.norm, "rate": taken.rate, "seconds": started.elapsed().as_secs_f64(),
                }))?;
            }
            if stage.is_due() {
                stage.save()?;
            }
        }
        anyhow::Ok(())
    })?;
    stage
        .module
        .save(to, &parts::folder()?, &Default::default())?;
    Ok(())
}

/// The model whose projector takes up features as if they had mean 0 and deviation 1.
fn standardised<B: AutodiffBackend>(
    model: Model<B>,
    frozen: &Model<B::InnerBackend>,
    course: &Course,
    vlm: &Vlm<B>,
    device: &B::Device,
) -> Result<Model<B>> {
    let Batch { prepared, .. } = batch(vlm.preprocessor(), course, 0)?;
    let seen = features(frozen, prepared, device)?;
    let rows = seen.dims()[1];
    let mean = seen.clone().mean_dim(1);
    let deviation = (seen - mean.clone()).square().mean_dim(1).sqrt();
    let factors = numbers(deviation).into_iter().map(|x| 1.0 / (x + 1e-3));
    let factors: Vec<f64> = factors.collect();
    let means = numbers(mean);
    debug_assert_eq!((factors.len(), rows % TOKENS), (WIDTH, 0));
    Ok(parts::with_inputs(model, &factors, &means))
}

/// Visual tokens of features.
fn project<B: Backend>(model: &Model<B>, features: &Tensor<B, 2>) -> Result<Tensor<B, 2>> {
    match model {
        Model::Llava(llava) => match llava.project(features) {
            Some(tokens) => Ok(tokens),
            None => bail!("the model has no projector"),
        },
        _ => bail!("the model is no LLaVA"),
    }
}

/// Scenes and what is asked about them.
struct Asked {
    prepared: Vec<Prepared>,
    lessons: Vec<Lesson>,
}

/// What a step asks.
fn asked(tutor: &Tutor, course: &Course, step: usize) -> Result<Asked> {
    let is_easy = (step as f64) < EASY * course.steps as f64;
    let kinds: &[Kind] = if is_easy { &EASY_KINDS } else { &Kind::ALL };
    let (mut all, mut lessons) = (Vec::new(), Vec::new());
    for scene in scenes(course, step) {
        let (view, prepared) = (tutor.preprocessor()).prepare(&Visual::Image(scene.picture()))?;
        let exchanges = exchanges(tutor, &scene, kinds);
        let lesson = tutor.lesson(None, &exchanges, vec![(view, prepared.clone())])?;
        lessons.push(lesson.without_pixels());
        all.push(prepared);
    }
    Ok(Asked {
        prepared: all,
        lessons,
    })
}

/// Questions about a scene and their answers; the picture comes with the first.
fn exchanges(tutor: &Tutor, scene: &Scene, kinds: &[Kind]) -> Vec<(Message, String)> {
    let questions = scene.some_questions(QUESTIONS, kinds).into_iter();
    let exchange = |(at, sought): (usize, crate::scene::Sought)| {
        let text = Content::Text(tutor.grounding().question(&sought.expression));
        let image = (at == 0).then_some(Content::Image);
        let message = Message {
            role: Role::User,
            content: image.into_iter().chain([text]).collect(),
        };
        (message, answer(scene.objects[sought.target].shares()))
    };
    questions.enumerate().map(exchange).collect()
}

/// A box as the model writes it.
pub fn answer([x1, y1, x2, y2]: [f64; 4]) -> String {
    format!("[{x1:.2}, {y1:.2}, {x2:.2}, {y2:.2}]")
}

/// What the model says before each token of the answers of lessons whose pictures have these visual tokens.
fn said<B: AutodiffBackend>(
    vlm: &Vlm<B>,
    lessons: &[Lesson],
    tokens: Tensor<B, 2>,
) -> Result<AnswerLogits<B>> {
    let visuals = (0..lessons.len()).map(|at| VisualTokens {
        images: Some(VisionOutput {
            tokens: tokens.clone().narrow(1, at * TOKENS, TOKENS),
            deepstack: Vec::new(),
        }),
        ..VisualTokens::default()
    });
    let visuals: Vec<VisualTokens<B>> = visuals.collect();
    let lessons: Vec<&Lesson> = lessons.iter().collect();
    Ok(vlm.answer_logits(&lessons, Some(&visuals), Schedule::dense())?)
}

/// Trains the decoder, and writes the model to `to`, in f16. A run in the folder goes on.
///
/// The projector stays as it was aligned: at the decoder's rate it forgets names before they are of use, and the decoder, which
/// then finds sizes and places alone, never asks for them again.
pub fn train<B: AutodiffBackend>(
    (course, pace): (&Course, Pace),
    folder: &Path,
    device: &B::Device,
    [from, to]: [&Path; 2],
) -> Result<()> {
    let mut vlm = open::<B>(from, device)?;
    let frozen = vlm.model().valid();
    let model = vlm.model().clone().train(&[Trained::Decoder])?;
    let mut stage = Stage::begin(model, (course, pace), folder, "decoder", device)?;
    let mut log = Log::open(folder, "decoder", stage.step)?;
    let tutor = vlm.tutor();
    let like = parts::folder()?;
    let half = SaveOptions {
        dtype: Some(burn::tensor::DType::F16),
        ..SaveOptions::default()
    };
    let mut running: Option<f64> = None;
    thread::scope(|scope| {
        let portions = feed(scope, stage.step..course.steps, move |step| {
            asked(&tutor, course, step)
        });
        for portion in portions {
            let started = Instant::now();
            let Asked { prepared, lessons } = portion?;
            let tokens = project(&frozen, &features(&frozen, prepared, device)?)?;
            let tokens = Tensor::from_inner(tokens);
            let module = stage.module.clone();
            vlm = vlm.map_model(|_| module);
            let answers: usize = lessons.iter().map(Lesson::answer_tokens).sum();
            let mut gradients = GradientsAccumulator::new();
            let mut of_numbers = Vec::new();
            for (at, lessons) in lessons.chunks(pace.pass).enumerate() {
                let (first, count) = (at * pace.pass * TOKENS, lessons.len() * TOKENS);
                let said = said(&vlm, lessons, tokens.clone().narrow(1, first, count))?;
                let ids = said.tokens.clone();
                let losses = said.losses();
                let share = losses.clone().sum().div_scalar(answers as f64);
                let found = GradientsParams::from_grads(share.backward(), &stage.module);
                gradients.accumulate(&stage.module, found);
                // Of coordinates alone: what ends an answer is soon known.
                let losses = numbers(losses).into_iter().zip(ids);
                of_numbers.extend(losses.filter(|(_, id)| *id > 1).map(|(loss, _)| loss));
            }
            let taken = stage.descend_by(gradients)?;
            let nats = of_numbers.iter().sum::<f64>() / of_numbers.len() as f64;
            let mean = running.map_or(nats, |mean| 0.95 * mean + 0.05 * nats);
            running = Some(mean);
            if stage.has_news() {
                log.write(&json!({
                    "stage": "decoder", "step": stage.step, "nats": nats, "mean": mean, "boxes": of_numbers.len() / 4,
                    "rows": lessons.iter().map(|lesson| lesson.rows()).sum::<usize>(), "norm": taken.norm,
                    "rate": taken.rate, "seconds": started.elapsed().as_secs_f64(),
                }))?;
            }
            if stage.is_due() {
                stage.save()?;
                stage.module.save(to, &like, &half)?;
            }
        }
        anyhow::Ok(())
    })?;
    stage.module.save(to, &like, &half)?;
    Ok(())
}
