//! What a run says of itself: a line of JSON for every step and validation, and a plot of the losses.

use std::fs::{self, File, OpenOptions};
use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};

use plotters::prelude::*;
use serde::{Deserialize, Serialize};

use crate::TuneError;

/// File of the lines.
const LINES: &str = "log.jsonl";
/// File of the plot.
const PLOT: &str = "loss.svg";

/// A line of the log.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", tag = "kind")]
pub enum Line {
    /// A step of the optimizer.
    Step(Step),
    /// A validation.
    Validation(Validation),
}

/// A step of the optimizer.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Step {
    /// Steps that are done with this one.
    pub step: usize,
    /// Mean cross-entropy of the tokens of answers before it, in nats.
    pub loss: f64,
    /// Length of the gradient of all parameters, before it was clipped.
    pub norm: f64,
    /// Learning rate.
    pub rate: f64,
    /// The preset of the forward pass.
    pub routing: String,
    /// Examples.
    pub examples: usize,
    /// Tokens of answers.
    pub tokens: usize,
    /// Rows of all prompts and answers.
    pub rows: usize,
    /// What it took.
    pub seconds: f64,
}

/// How well examples are answered that are not trained on.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Validation {
    /// Steps that are done.
    pub step: usize,
    /// Mean cross-entropy of the tokens of answers, in nats.
    pub loss: f64,
    /// Examples whose answer is one box.
    pub boxes: usize,
    /// Share of them that are answered with a box of IoU 0.5 or more.
    pub accuracy: Option<f64>,
    /// Mean IoU of what they are answered with; 0 for an answer without a box.
    pub mean_iou: Option<f64>,
}

/// The log of a run.
pub(crate) struct Log {
    path: PathBuf,
    file: File,
    lines: Vec<Line>,
}

impl Log {
    /// Goes on behind a step and a validation: what was written of later ones is forgotten.
    pub(crate) fn open(folder: &Path, step: usize, validated: usize) -> Result<Self, TuneError> {
        let path = folder.join(LINES);
        let mut lines = Vec::new();
        if let Ok(file) = File::open(&path) {
            // A kill may have cut the last one, a hand any other.
            let read = BufReader::new(file).lines().map_while(Result::ok);
            let read = read.filter_map(|line| serde_json::from_str::<Line>(&line).ok());
            lines.extend(read.filter(|line| match line {
                Line::Step(line) => line.step <= step,
                Line::Validation(line) => line.step <= validated,
            }));
        }
        let partial = path.with_extension("jsonl.partial");
        let mut file = File::create(&partial).map_err(TuneError::io(&partial))?;
        for line in &lines {
            write(&mut file, line).map_err(TuneError::io(&partial))?;
        }
        fs::rename(&partial, &path).map_err(TuneError::io(&path))?;
        let file = OpenOptions::new().append(true).open(&path);
        let file = file.map_err(TuneError::io(&path))?;
        Ok(Self { path, file, lines })
    }

    pub(crate) fn push(&mut self, line: Line) -> Result<(), TuneError> {
        write(&mut self.file, &line).map_err(TuneError::io(&self.path))?;
        self.lines.push(line);
        Ok(())
    }

    /// Draws the losses of steps and validations. A plot that fails costs nothing but the plot.
    pub(crate) fn plot(&self, folder: &Path) -> Result<(), String> {
        let of = |line: &Line| match line {
            Line::Step(line) => (line.step as f64, line.loss, false),
            Line::Validation(line) => (line.step as f64, line.loss, true),
        };
        let points: Vec<(f64, f64, bool)> = self.lines.iter().map(of).collect();
        let ends = points.iter().fold((1f64, 0f64), |(step, loss), point| {
            (step.max(point.0), loss.max(point.1))
        });
        let mut text = String::new();
        {
            let area = SVGBackend::with_string(&mut text, (900, 420)).into_drawing_area();
            let drawn = draw(&area, &points, ends);
            drawn.map_err(|error| error.to_string())?;
        }
        fs::write(folder.join(PLOT), text).map_err(|error| error.to_string())
    }
}

fn draw<'a>(
    area: &DrawingArea<SVGBackend<'a>, plotters::coord::Shift>,
    points: &[(f64, f64, bool)],
    (steps, loss): (f64, f64),
) -> Result<(), DrawingAreaErrorKind<<SVGBackend<'a> as DrawingBackend>::ErrorType>> {
    area.fill(&WHITE)?;
    let mut chart = ChartBuilder::on(area)
        .margin(16)
        .x_label_area_size(40)
        .y_label_area_size(56)
        .build_cartesian_2d(0.0..steps, 0.0..(loss * 1.05).max(1e-3))?;
    chart
        .configure_mesh()
        .x_desc("step")
        .y_desc("cross-entropy of answers, nats a token")
        .draw()?;
    let of = |wanted: bool| {
        let points = points.iter().filter(move |point| point.2 == wanted);
        points.map(|&(step, loss, _)| (step, loss))
    };
    chart
        .draw_series(LineSeries::new(of(false), &BLUE))?
        .label("training")
        .legend(|(x, y)| PathElement::new(vec![(x, y), (x + 20, y)], BLUE));
    chart
        .draw_series(of(true).map(|at| Circle::new(at, 4, RED.filled())))?
        .label("validation")
        .legend(|(x, y)| Circle::new((x + 10, y), 4, RED.filled()));
    chart
        .configure_series_labels()
        .border_style(BLACK)
        .background_style(WHITE)
        .draw()?;
    area.present()
}

fn write(file: &mut File, line: &Line) -> std::io::Result<()> {
    let mut text = serde_json::to_vec(line)?;
    text.push(b'\n');
    file.write_all(&text)
}
