//! What the records of routings come to.

use std::collections::{BTreeMap, BTreeSet};

use serde::Serialize;

use crate::bootstrap::{Cell, Interval, intervals, mean};
use crate::record::{Record, Records};
use crate::score::{RIGHT, Score};
use crate::{EvalError, Task};

/// The routing that others are compared with.
pub const DENSE: &str = "dense";

/// How intervals are drawn, and what else is told.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Reckoning {
    /// Draws of the bootstrap; 0 for none.
    pub resamples: usize,
    /// What they are drawn by.
    pub seed: u64,
    /// Also tell what boxes come to as the release divides them.
    pub release: bool,
}

impl Default for Reckoning {
    fn default() -> Self {
        Self {
            resamples: 10_000,
            seed: 0,
            release: false,
        }
    }
}

/// What one routing comes to.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Summary {
    /// What it is called.
    pub routing: String,
    /// Whether what is not kept comes back (`reroute`) or not (`remove`).
    pub action: Option<String>,
    /// Samples that were answered.
    pub samples: usize,
    /// Different pictures among them.
    pub pictures: usize,
    /// Samples that were not.
    pub errors: usize,
    /// Answers that are not whole.
    pub cut_off: usize,
    /// Visual tokens that a layer worked on, on average over layers and samples.
    pub average_tokens: f64,
    /// What is measured; the first counts.
    pub metrics: Vec<Metric>,
}

/// A number that is measured.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Metric {
    /// What it is called.
    pub name: String,
    /// From 0 to 1.
    pub value: f64,
    /// Whether it is a mean over samples, which has an interval.
    pub is_mean: bool,
    /// Bounds of 95 %.
    pub interval: Option<Interval>,
    /// This less that of dense, on the samples that both have answered.
    pub difference: Option<Difference>,
}

/// How a routing differs from dense.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Difference {
    /// The mean of the differences.
    pub value: f64,
    /// Bounds of 95 %.
    pub interval: Option<Interval>,
}

type Of = fn(&Score) -> Option<f64>;

/// Means over samples.
fn means(records: &Records, release: bool) -> Vec<(&'static str, Of)> {
    let has_boxes = scores(records).any(|(_, score)| score.iou.is_some());
    if !has_boxes {
        return vec![("accuracy", |score| Some(score.score))];
    }
    let mut means: Vec<(&'static str, Of)> = vec![
        ("accuracy at IoU 0.5", |score| {
            score.iou.map(|_| score.score)
        }),
        ("mean IoU", |score| score.iou),
    ];
    if release {
        means.push(("accuracy at IoU 0.5, release's division", |score| {
            Some(f64::from(score.release_iou? >= RIGHT))
        }));
        means.push(("mean IoU, release's division", |score| score.release_iou));
    }
    // Of one's own data that are not only boxes.
    if scores(records).any(|(_, score)| score.iou.is_none()) {
        means.push(("accuracy of answers", |score| {
            score.iou.is_none().then_some(score.score)
        }));
    }
    means
}

fn scores(records: &Records) -> impl Iterator<Item = (&Record, &Score)> {
    let records = records.records.values();
    records.filter_map(|record| Some((record, record.score.as_ref()?)))
}

/// What the records of several routings come to, in their order; compared with [`DENSE`] if it is among them.
///
/// # Errors
/// [`EvalError::Merge`] if they are of different samples.
pub fn summaries(all: &[Records], reckoning: &Reckoning) -> Result<Vec<Summary>, EvalError> {
    let Some(first) = all.first() else {
        return Ok(Vec::new());
    };
    for other in all {
        let header = crate::Header {
            routing: first.header.routing.clone(),
            plan: first.header.plan.clone(),
            ..other.header.clone()
        };
        if let Some((field, was, now)) = first.header.differs(&header) {
            return Err(EvalError::Merge {
                reason: format!(
                    "{} and {} cannot be compared: {field} is {was} and {now}",
                    first.header.routing, other.header.routing
                ),
            });
        }
    }
    let pictures = all.iter().flat_map(|records| records.records.values());
    let pictures: BTreeSet<&str> = pictures.filter_map(picture).collect();
    let pictures: BTreeMap<&str, usize> = pictures.into_iter().zip(0..).collect();
    let dense = all.iter().find(|records| records.header.routing == DENSE);
    // Every mean, and its difference, is a series of one bootstrap.
    let mut series = Vec::new();
    for records in all {
        for (_, of) in means(records, reckoning.release) {
            series.push(cells(records, None, of, &pictures));
            series.push(match dense.filter(|dense| !std::ptr::eq(*dense, records)) {
                Some(dense) => cells(records, Some(dense), of, &pictures),
                None => Vec::new(),
            });
        }
    }
    let bounds = intervals(&series, reckoning.resamples, reckoning.seed);
    let mut reckoned = series.iter().zip(bounds);
    let mut next = || {
        let (cells, interval) = reckoned.next()?;
        Some((mean(cells.iter())?, interval))
    };
    let summary = |records: &Records| {
        let mut metrics = Vec::new();
        for (name, _) in means(records, reckoning.release) {
            let (value, difference) = (next(), next());
            let Some((value, interval)) = value else {
                continue;
            };
            let difference = difference.map(|(value, interval)| Difference { value, interval });
            metrics.push(Metric {
                name: name.into(),
                value,
                is_mean: true,
                interval,
                difference,
            });
        }
        metrics.extend(plain(records));
        let answered: Vec<&Record> = scores(records).map(|(record, _)| record).collect();
        let seen: BTreeSet<&str> = answered
            .iter()
            .filter_map(|record| picture(record))
            .collect();
        let tokens = answered
            .iter()
            .map(|record| record.average_tokens)
            .sum::<f64>();
        // Dense is a plan without stages.
        let plan = &records.header.plan;
        let has_stages = plan["stages"]
            .as_array()
            .is_some_and(|stages| !stages.is_empty());
        let action = plan.get("action").filter(|_| has_stages);
        Summary {
            routing: records.header.routing.clone(),
            action: action.and_then(|action| Some(action.as_str()?.to_string())),
            samples: answered.len(),
            pictures: seen.len(),
            errors: records.records.len() - answered.len(),
            cut_off: answered.iter().filter(|record| record.cut_off).count(),
            average_tokens: tokens / answered.len().max(1) as f64,
            metrics,
        }
    };
    Ok(all.iter().map(summary).collect())
}

fn picture(record: &Record) -> Option<&str> {
    record.picture.as_deref()
}

/// What a routing scores on each picture; beside dense, by how much more, where both have answered.
fn cells(
    records: &Records,
    dense: Option<&Records>,
    of: Of,
    pictures: &BTreeMap<&str, usize>,
) -> Vec<Cell> {
    let mut cells = vec![(0.0, 0.0); pictures.len()];
    for (record, score) in scores(records) {
        let less = match dense {
            Some(dense) => {
                let beside = dense.records.get(&record.sample);
                beside.and_then(|record| of(record.score.as_ref()?))
            }
            None => Some(0.0),
        };
        let at = picture(record).and_then(|picture| pictures.get(picture));
        if let (Some(value), Some(less), Some(&at)) = (of(score), less, at) {
            cells[at].0 += value - less;
            cells[at].1 += 1.0;
        }
    }
    cells
}

/// Numbers without intervals.
fn plain(records: &Records) -> Vec<Metric> {
    let metric = |name: String, value: f64| Metric {
        name,
        value,
        is_mean: false,
        interval: None,
        difference: None,
    };
    let all: Vec<(&Record, &Score)> = scores(records).collect();
    let ious: Vec<f64> = all.iter().filter_map(|(_, score)| score.iou).collect();
    let mut metrics = Vec::new();
    if !ious.is_empty() {
        for at in [0.1, 0.3, 0.7, 0.9] {
            let right = ious.iter().filter(|iou| **iou >= at).count();
            let share = right as f64 / ious.len() as f64;
            metrics.push(metric(format!("accuracy at IoU {at}"), share));
        }
    }
    if records.header.task == Task::Pope {
        let mut of = |name: &str, scores: &[&Score]| {
            for (what, value) in YesNo::of(scores).numbers() {
                metrics.push(metric(format!("{name}{what}"), value));
            }
        };
        let scores: Vec<&Score> = all.iter().map(|(_, score)| *score).collect();
        of("", &scores);
    }
    let categories = all
        .iter()
        .filter_map(|(record, _)| record.category.as_deref());
    for category in categories.collect::<BTreeSet<_>>() {
        let here = |(record, _): &&(&Record, &Score)| record.category.as_deref() == Some(category);
        let scores: Vec<&Score> = all.iter().filter(here).map(|(_, score)| *score).collect();
        let right = scores.iter().map(|score| score.score).sum::<f64>();
        let value = right / scores.len() as f64;
        metrics.push(metric(format!("{category}: accuracy"), value));
        if records.header.task == Task::Pope {
            for (what, value) in YesNo::of(&scores).numbers() {
                metrics.push(metric(format!("{category}: {what}"), value));
            }
        }
    }
    metrics
}

/// How often yes was right, and was said (POPE).
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct YesNo {
    /// Yes, rightly.
    pub true_yes: usize,
    /// Yes, wrongly.
    pub false_yes: usize,
    /// No, wrongly. What is neither counts for nothing here.
    pub false_no: usize,
    /// All answers.
    pub answers: usize,
}

impl YesNo {
    /// Counts answers.
    pub fn of(scores: &[&Score]) -> Self {
        let count = |yes, said| {
            let like = |score: &&&Score| (score.yes, score.said) == (Some(yes), Some(said));
            scores.iter().filter(like).count()
        };
        Self {
            true_yes: count(true, true),
            false_yes: count(false, true),
            false_no: count(true, false),
            answers: scores.len(),
        }
    }

    /// Precision, recall, F1, and how often yes was said.
    pub fn numbers(self) -> [(&'static str, f64); 4] {
        let share = |part: usize, all: usize| match all {
            0 => 0.0,
            _ => part as f64 / all as f64,
        };
        let yes = self.true_yes + self.false_yes;
        let (precision, recall) = (
            share(self.true_yes, yes),
            share(self.true_yes, self.true_yes + self.false_no),
        );
        let both = precision + recall;
        let f1 = if both > 0.0 {
            2.0 * precision * recall / both
        } else {
            0.0
        };
        [
            ("precision", precision),
            ("recall", recall),
            ("F1", f1),
            ("answered yes", share(yes, self.answers)),
        ]
    }
}
