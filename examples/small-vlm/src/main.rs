//! Small vision-language models: trained from scratch on scenes that are drawn anew, and what routing does to them.

mod course;
mod decoder;
mod evaluate;
mod feed;
mod parts;
mod scene;
mod statistics;
mod sweep;
mod tower;

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Result, bail};
use burn::backend::Autodiff;
use clap::{Parser, Subcommand, ValueEnum};
use mimalloc::MiMalloc;
use reroute_zoo::backend::Flex;

use crate::course::{Course, Pace, put};
use crate::scene::{SIDE, Scene, Split};

#[global_allocator]
static ALLOCATOR: MiMalloc = MiMalloc;

type Trained = Autodiff<Flex>;

#[derive(Parser)]
#[command(
    name = "small-vlm",
    about = "Small vision-language models from scratch"
)]
struct Args {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Train a model, or go on with it.
    Train(TrainArgs),
    /// Measure a model on scenes that it has not seen, dense and routed.
    Evaluate(EvaluateArgs),
    /// Write pictures of scenes, and what is asked about them.
    Show(ShowArgs),
}

/// Which model.
#[derive(Debug, Clone, Copy, ValueEnum)]
enum Which {
    /// A deep narrow one, on scenes of coloured shapes.
    Narrow,
    /// One made of real parts.
    Real,
}

#[derive(clap::Args)]
struct TrainArgs {
    /// Which model.
    #[arg(long, value_enum, default_value = "narrow")]
    model: Which,
    /// Where checkpoints, the log and the model are kept.
    #[arg(long, value_name = "DIR", default_value = "target/small-vlm")]
    folder: PathBuf,
    /// Seed of the first numbers and of the scenes.
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u32).range(..1 << 31))]
    seed: u32,
    /// Steps of the tower.
    #[arg(long, value_name = "N", default_value_t = 1800)]
    tower_steps: usize,
    /// Steps of the projector.
    #[arg(long, value_name = "N", default_value_t = 600)]
    align_steps: usize,
    /// Steps of the decoder.
    #[arg(long, value_name = "N", default_value_t = 4000)]
    steps: usize,
    /// Scenes of a step of the decoder.
    #[arg(long, value_name = "N", default_value_t = 24)]
    scenes: usize,
    /// Most scenes that go through the decoder at once: takes less memory, and learns the same.
    #[arg(long, value_name = "N", default_value_t = 24)]
    pass: usize,
    /// Scenes of a step of tower and projector.
    #[arg(long, value_name = "N", default_value_t = 32)]
    tower_scenes: usize,
    /// Steps from one checkpoint to the next.
    #[arg(long, value_name = "N", default_value_t = 100)]
    save_every: usize,
    /// Steps from one line of the log to the next.
    #[arg(long, value_name = "N", default_value_t = 10)]
    log_every: usize,
}

#[derive(clap::Args)]
struct EvaluateArgs {
    /// Which model.
    #[arg(long, value_enum, default_value = "narrow")]
    model: Which,
    /// The folder that it was trained in.
    #[arg(long, value_name = "DIR", default_value = "target/small-vlm")]
    folder: PathBuf,
    /// Scenes to measure on.
    #[arg(long, value_name = "N", default_value_t = 500)]
    scenes: usize,
    /// Seed of these scenes; those that are trained on have none in common with them.
    #[arg(long, default_value_t = 0, value_parser = clap::value_parser!(u32).range(..1 << 31))]
    seed: u32,
    /// The dense model alone.
    #[arg(long)]
    dense: bool,
    /// Instead of methods, schedules that differ in where they begin, how often they decide and how much they keep.
    #[arg(long, conflicts_with = "dense")]
    sweep: bool,
    /// Also write the report to a file.
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
}

#[derive(clap::Args)]
struct ShowArgs {
    /// Where pictures go.
    #[arg(long, value_name = "DIR")]
    to: PathBuf,
    /// Scenes.
    #[arg(long, value_name = "N", default_value_t = 8)]
    scenes: u32,
    /// Seed of the scenes that are measured on.
    #[arg(long, default_value_t = 0, value_parser = clap::value_parser!(u32).range(..1 << 31))]
    seed: u32,
}

fn main() -> ExitCode {
    let args = Args::parse();
    // From one of the pool's own threads a CPU operation starts several times faster than from outside.
    let result = rayon::scope(|_| match &args.command {
        Command::Train(args) => train(args),
        Command::Evaluate(args) => measure(args),
        Command::Show(args) => show(args),
    });
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::from(2)
        }
    }
}

/// All stages that are not done, in their order. The folder of each is there when it is done.
fn train(args: &TrainArgs) -> Result<()> {
    only_narrow(args.model)?;
    let (folder, device) = (args.folder.as_path(), Default::default());
    let [tower, aligned, model] = ["tower", "aligned", "model"].map(|name| folder.join(name));
    // Every stage has scenes of its own.
    let course = |stage: u32, steps, scenes, rate, betas, warmup| Course {
        steps,
        scenes,
        rate,
        warmup,
        betas,
        seed: args.seed.wrapping_mul(3).wrapping_add(stage) & (u32::MAX >> 1),
    };
    let first = course(
        0,
        args.tower_steps,
        args.tower_scenes,
        1.2e-3,
        [0.9, 0.999],
        100,
    );
    let second = course(
        1,
        args.align_steps,
        args.tower_scenes,
        2e-3,
        [0.9, 0.99],
        50,
    );
    let third = course(2, args.steps, args.scenes, 1e-3, [0.9, 0.98], 200);
    for course in [&first, &second, &third] {
        tower::check(course)?;
    }
    let pace = Pace {
        save_every: args.save_every,
        log_every: args.log_every,
        pass: args.pass.max(1),
    };
    let is_there = |path: &Path| path.join("config.json").exists();
    if !is_there(&tower) {
        tower::train::<Trained>((&first, pace), folder, &device, &tower)?;
    }
    if !is_there(&aligned) {
        decoder::align::<Trained>((&second, pace), folder, &device, [&tower, &aligned])?;
    }
    decoder::train::<Trained>((&third, pace), folder, &device, [&aligned, &model])
}

fn only_narrow(which: Which) -> Result<()> {
    match which {
        Which::Narrow => Ok(()),
        Which::Real => bail!("this program has no model of real parts yet: use --model narrow"),
    }
}

fn measure(args: &EvaluateArgs) -> Result<()> {
    only_narrow(args.model)?;
    let model = args.folder.join("model");
    let report = match args.sweep {
        true => sweep::sweep(&model, args.scenes, args.seed)?,
        false => evaluate::evaluate(&model, args.scenes, args.seed, !args.dense)?,
    };
    if let Some(path) = &args.json {
        put(path, format!("{report:#}\n").as_bytes())?;
    }
    let table = if args.sweep {
        sweep::table
    } else {
        evaluate::table
    };
    println!("{}", table(&report));
    Ok(())
}

/// A picture and a line of JSON for each scene.
fn show(args: &ShowArgs) -> Result<()> {
    std::fs::create_dir_all(&args.to)?;
    for index in 0..args.scenes {
        let scene = Scene::new(Split::Evaluation, args.seed, index);
        let Some(sought) = scene.question() else {
            continue;
        };
        let (picture, side) = (scene.picture(), SIDE as u32);
        let path = args.to.join(format!("{index:03}.png"));
        image::save_buffer(&path, picture.data(), side, side, image::ColorType::Rgb8)?;
        let line = serde_json::json!({
            "image": path, "expression": sought.expression, "kind": sought.kind.name(),
            "box": scene.objects[sought.target].shares(),
        });
        println!("{line}");
    }
    Ok(())
}
