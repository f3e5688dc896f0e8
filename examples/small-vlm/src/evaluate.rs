//! What routing does to a model, on scenes that it has not seen.

use std::path::Path;

use anyhow::{Context, Result, ensure};
use rayon::prelude::*;
use reroute_zoo::backend::Flex;
use reroute_zoo::grounding::iou;
use reroute_zoo::{
    Answer, Folder, ModelConfig, OpenOptions, Plan, Question, RgbImage, Vlm, presets,
};
use serde_json::{Map, Value, json};

use crate::scene::{Kind, SIDE, Scene, Sought, Split};
use crate::statistics::{exact_test, holm, interval, mean};

/// Methods that remove, and what reroutes in their place.
const METHODS: [(&str, &str); 6] = [
    ("fastv", "reroute-fastv"),
    ("pdrop", "reroute-pdrop"),
    ("nuwa", "reroute-nuwa"),
    ("sparsevlm", "reroute-sparsevlm"),
    ("dart", "reroute-dart"),
    ("visionzip", "reroute-visionzip"),
];
/// Visual tokens of 576.
const BUDGETS: [usize; 3] = [192, 128, 64];
/// What the twins of the first two are also measured with: settings that cost next to nothing.
const VARIANTS: [(&str, fn(&mut Value)); 4] = [
    ("memory", |plan| plan["memory"] = json!("sum")),
    ("memory-max", |plan| plan["memory"] = json!("max")),
    ("memory-ride", |plan| {
        plan["memory"] = json!("sum");
        plan["waiting"] = json!("ride-along");
    }),
    ("memory-highest-head", |plan| {
        plan["memory"] = json!("sum");
        for stage in plan["stages"].as_array_mut().into_iter().flatten() {
            stage["score"] = json!({"attention": {"heads": "max"}});
        }
    }),
];
/// Comparisons that were named before anything was measured; the others are corrected for their number.
const NAMED: [&str; 2] = ["reroute-fastv@128", "reroute-pdrop@128"];
/// From which overlap on an object counts as found.
pub(crate) const FOUND: f64 = 0.5;
/// Questions that are answered at once.
const BATCH: usize = 10;
/// What a blank picture shows.
const BLANK: u8 = 64;

/// A question about a scene.
pub(crate) struct Asked {
    scene: Scene,
    sought: Sought,
    picture: RgbImage,
}

/// The scenes that are measured on.
pub(crate) fn scenes(count: usize, seed: u32) -> Vec<Asked> {
    let scenes = (0..).map(|index| Scene::new(Split::Evaluation, seed, index));
    let asked = scenes.filter_map(|scene| {
        let sought = scene.question()?;
        let picture = scene.picture();
        Some(Asked {
            scene,
            sought,
            picture,
        })
    });
    asked.take(count).collect()
}

/// One way of routing, and how well it did.
struct Row {
    routing: String,
    base: Option<usize>,
    average_tokens: f64,
    /// Overlap of the box answered with the object's, for every scene.
    overlaps: Vec<f64>,
}

impl Row {
    /// Whether each object was found.
    fn found(&self) -> Vec<f64> {
        let found = |overlap: &f64| f64::from(*overlap >= FOUND);
        self.overlaps.iter().map(found).collect()
    }
}

/// Measures a model folder; the report.
pub fn evaluate(folder: &Path, count: usize, seed: u32, routes: bool) -> Result<Value> {
    ensure!(count > 0, "give at least one scene (--scenes)");
    let device = Default::default();
    let vlm = Vlm::<Flex>::open(&Folder::open(folder)?, &OpenOptions::default(), &device)?;
    let asked = scenes(count, seed);
    let depth = Depth::of(vlm.config());
    let dense = vlm.plan("dense")?;
    let mut rows = vec![Row {
        routing: "dense".into(),
        base: None,
        average_tokens: depth.average(&dense),
        overlaps: overlaps(&vlm, &asked, &dense, None)?,
    }];
    let blank = RgbImage::new(SIDE, SIDE, vec![BLANK; SIDE * SIDE * 3])?;
    let blank = overlaps(&vlm, &asked, &dense, Some(&blank))?;
    for budget in BUDGETS.into_iter().filter(|_| routes) {
        for (removing, rerouting) in METHODS {
            let (base, base_plan) = depth.plan(removing, budget)?;
            let (twin, twin_plan) = depth.plan(rerouting, budget)?;
            let twin_plan = depth.at_average(&twin_plan, depth.average(&base_plan))?;
            let (at, mut variants) = (rows.len(), Vec::new());
            for (name, change) in VARIANTS {
                let mut changed = |of: &str, plan: &Plan| -> Result<()> {
                    let mut json = plan.to_json();
                    change(&mut json);
                    let plan = Plan::from_json(&json.to_string())?;
                    variants.push((format!("{of}+{name}"), plan, Some(at)));
                    Ok(())
                };
                if METHODS[..2].contains(&(removing, rerouting)) {
                    changed(&twin, &twin_plan)?;
                }
                // A removal with several decisions can remember, too.
                if (removing, name) == ("pdrop", "memory") {
                    changed(&base, &base_plan)?;
                }
            }
            let pair = [(base, base_plan, None), (twin, twin_plan, Some(at))];
            for (routing, plan, base) in pair.into_iter().chain(variants) {
                eprintln!("{routing}");
                rows.push(Row {
                    routing,
                    base,
                    average_tokens: depth.average(&plan),
                    overlaps: overlaps(&vlm, &asked, &plan, None)?,
                });
            }
        }
    }
    Ok(report(&rows, &asked, &blank))
}

/// What plans are made for.
pub(crate) struct Depth<'a> {
    config: &'a ModelConfig,
    pub(crate) layers: usize,
    /// Visual tokens of a picture.
    pub(crate) tokens: usize,
}

impl<'a> Depth<'a> {
    pub(crate) fn of(config: &'a ModelConfig) -> Self {
        Self {
            config,
            layers: config.decoder().num_layers,
            tokens: config.typical_visual_tokens(),
        }
    }

    pub(crate) fn average(&self, plan: &Plan) -> f64 {
        plan.average_tokens(self.layers, self.tokens)
    }

    /// The plan of a method at a budget, exact where there is such a preset that this model can have.
    fn plan(&self, method: &str, budget: usize) -> Result<(String, Plan)> {
        let encoder = self.config.encoder();
        let name = format!("{method}@{budget}");
        let found = |name: &str| presets::find(name)?.plan(self.layers, &encoder);
        let plan = found(&format!("{name}-exact")).or_else(|_| found(&name))?;
        Ok((name, plan))
    }

    /// The plan with counts that are a little larger or smaller, so that layers have so many tokens on average.
    fn at_average(&self, plan: &Plan, wanted: f64) -> Result<Plan> {
        let layers = self.layers;
        let per_layer: Vec<usize> = plan.visual_tokens_per_layer(layers, self.tokens).collect();
        let entering = plan.entering(self.tokens);
        let stages = plan.schedule.stages().iter();
        let starts: Vec<usize> = stages.map(|stage| stage.layer).collect();
        let ends: Vec<usize> = starts.iter().skip(1).copied().chain([layers]).collect();
        let first = starts.first().copied().unwrap_or(layers);
        let before: usize = per_layer[..first].iter().sum();
        let counts: Vec<usize> = starts.iter().map(|&start| per_layer[start]).collect();
        let missed = |counts: &[usize]| {
            let of_stages = counts.iter().zip(starts.iter().zip(&ends));
            let sums = of_stages.map(|(count, (start, end))| count * (end - start));
            ((before + sums.sum::<usize>()) as f64 / layers as f64 - wanted).abs()
        };
        let in_bounds = |count: f64| (count.round() as usize).clamp(1, entering);
        // Of all plans near the one that is scaled best, those that miss least, and of these the nearest.
        let scaled = (0..=400).map(|percent| {
            let counts = counts.iter();
            let scaled = counts.map(|&count| in_bounds(count as f64 * f64::from(percent) / 100.0));
            scaled.collect::<Vec<_>>()
        });
        let rough = scaled.min_by(|a, b| missed(a).total_cmp(&missed(b)));
        let rough = rough.context("a plan has stages")?;
        let stages = rough.len() as u32;
        let near = (0..5usize.pow(stages)).map(|number| {
            let digit = |at: u32| (number / 5usize.pow(at) % 5) as f64 - 2.0;
            let changes: Vec<f64> = (0..stages).map(digit).collect();
            let size: f64 = changes.iter().map(|change| change.abs()).sum();
            let changed = rough.iter().zip(changes);
            let changed = changed.map(|(&count, change)| in_bounds(count as f64 + change));
            (changed.collect::<Vec<_>>(), size)
        });
        // Sums are whole, so that misses differ by a layer's share or not at all.
        let rank = |(counts, size): &(Vec<usize>, f64)| missed(counts) * 1e6 + size;
        let best = near.min_by(|a, b| rank(a).total_cmp(&rank(b)));
        let (best, _) = best.context("a plan has stages")?;
        let mut json = plan.to_json();
        for (at, count) in best.iter().enumerate() {
            let stage = json["stages"][at].as_object_mut();
            let stage = stage.context("a plan has a list of stages")?;
            stage.remove("keep_ratio");
            stage.insert("keep_count".into(), json!(count));
        }
        Ok(Plan::from_json(&json.to_string())?)
    }
}

/// How far each answer overlaps with what was sought; about `picture` instead of the scene's, if one is given.
fn overlaps(
    vlm: &Vlm<Flex>,
    asked: &[Asked],
    plan: &Plan,
    picture: Option<&RgbImage>,
) -> Result<Vec<f64>> {
    answers(vlm, asked, plan, picture, |overlap, _| overlap)
}

/// What `look` finds in each answer and its overlap with what was sought.
pub(crate) fn answers<T: Send>(
    vlm: &Vlm<Flex>,
    asked: &[Asked],
    plan: &Plan,
    picture: Option<&RgbImage>,
    look: impl Fn(f64, &Answer) -> T + Sync,
) -> Result<Vec<T>> {
    let found = asked.par_chunks(BATCH).map(|asked| {
        let question = |asked: &Asked| {
            let picture = picture.unwrap_or(&asked.picture).clone();
            let text = vlm.grounding().question(&asked.sought.expression);
            Question::about(vec![picture], text)
        };
        let questions: Vec<Question> = asked.iter().map(question).collect();
        let continues = &mut |_, _| std::ops::ControlFlow::Continue(());
        let answers = vlm.ask_batch(&questions, plan, &vlm.generation_defaults(), continues)?;
        let found = answers.iter().zip(asked).map(|(answer, asked)| {
            let object = asked.scene.objects[asked.sought.target].pixels();
            let found = vlm.answered_box(answer);
            look(found.map_or(0.0, |found| iou(&found, &object)), answer)
        });
        Ok(found.collect::<Vec<T>>())
    });
    let found: Vec<Vec<T>> = found.collect::<Result<_>>()?;
    Ok(found.into_iter().flatten().collect())
}

/// All that is said of the rows.
fn report(rows: &[Row], asked: &[Asked], blank: &[f64]) -> Value {
    let difference = |row: &Row, base: &Row, of: fn(&Row) -> Vec<f64>| -> Vec<f64> {
        let pairs = of(row).into_iter().zip(of(base));
        pairs.map(|(a, b)| a - b).collect()
    };
    let compared: Vec<usize> = (0..rows.len())
        .filter(|&at| rows[at].base.is_some())
        .collect();
    let probability = |&at: &usize| {
        let base = rows[at].base.map_or(&rows[at], |base| &rows[base]);
        let gains = difference(&rows[at], base, Row::found);
        let count = |sign: f64| gains.iter().filter(|gain| **gain * sign > 0.0).count();
        exact_test(count(1.0), count(-1.0))
    };
    let is_named = |at: &usize| NAMED.contains(&rows[*at].routing.as_str());
    let others: Vec<usize> = { compared.iter().copied() }
        .filter(|at| !is_named(at))
        .collect();
    let corrected = holm(&others.iter().map(probability).collect::<Vec<_>>());
    let lines = rows.iter().enumerate().map(|(at, row)| {
        let found = row.found();
        let mut line = json!({
            "routing": row.routing, "base": null, "accuracy": mean(&found), "mean_iou": mean(&row.overlaps),
            "interval": interval(&found, 0), "mean_iou_interval": interval(&row.overlaps, 0), "gain": null,
            "gain_interval": null, "average_tokens": row.average_tokens, "kinds": by_kind(asked, &found),
        });
        if let Some(base) = row.base.map(|base| &rows[base]) {
            let gains = difference(row, base, Row::found);
            let of_overlap = difference(row, base, |row| row.overlaps.clone());
            line["base"] = json!(base.routing);
            line["gain"] = json!(mean(&gains));
            line["gain_interval"] = json!(interval(&gains, 0));
            line["mean_iou_gain"] = json!(mean(&of_overlap));
            line["mean_iou_gain_interval"] = json!(interval(&of_overlap, 0));
            line["gain_kinds"] = by_kind(asked, &gains);
            line["named_before"] = json!(is_named(&at));
            line["p"] = json!(probability(&at));
            let place = others.iter().position(|other| *other == at);
            line["p_holm"] = json!(place.map(|place| corrected[place]));
        }
        line
    });
    let found = |overlap: &f64| f64::from(*overlap >= FOUND);
    let blank: Vec<f64> = blank.iter().map(found).collect();
    let random: Vec<f64> = asked.iter().map(by_chance).collect();
    json!({
        "scenes": described(asked),
        "blank_picture": {"accuracy": mean(&blank), "interval": interval(&blank, 0)},
        "random_object": {"accuracy": mean(&random)},
        "rows": lines.collect::<Vec<_>>(),
    })
}

/// The mean of numbers of scenes, by the kind of expression.
fn by_kind(asked: &[Asked], numbers: &[f64]) -> Value {
    let mut kinds = Map::new();
    for kind in Kind::ALL {
        let of_kind = asked.iter().zip(numbers);
        let of_kind = of_kind.filter(|(asked, _)| asked.sought.kind == kind);
        let of_kind: Vec<f64> = of_kind.map(|(_, number)| *number).collect();
        if !of_kind.is_empty() {
            let line = json!({"scenes": of_kind.len(), "mean": mean(&of_kind)});
            kinds.insert(kind.name().into(), line);
        }
    }
    Value::Object(kinds)
}

/// The accuracy of who names any object of the scene.
fn by_chance(asked: &Asked) -> f64 {
    let object = asked.scene.objects[asked.sought.target].pixels();
    let objects = asked.scene.objects.iter();
    let found = objects.filter(|other| iou(&other.pixels(), &object) >= FOUND);
    found.count() as f64 / asked.scene.objects.len() as f64
}

/// What scenes are like.
fn described(asked: &[Asked]) -> Value {
    let share = |is: &dyn Fn(&Asked) -> bool| {
        asked.iter().filter(|asked| is(asked)).count() as f64 / asked.len() as f64
    };
    let objects = asked.iter().map(|asked| asked.scene.objects.len());
    let boxes = asked.iter().map(|asked| {
        let side = asked.scene.objects[asked.sought.target].side as f64;
        (side / SIDE as f64).powi(2)
    });
    json!({
        "count": asked.len(),
        "fewest_objects": objects.min(),
        "with_distractor": share(&|asked| asked.scene.has_distractor(asked.sought.target)),
        "largest_box": boxes.fold(0.0, f64::max),
    })
}

/// A report as people read it.
pub fn table(report: &Value) -> String {
    let number = |value: &Value| value.as_f64().unwrap_or(f64::NAN) * 100.0;
    let mut lines = vec![
        format!("{}", report["scenes"]),
        format!("blank picture {:.1} %", number(&report["blank_picture"]["accuracy"])),
        format!("random object {:.1} %", number(&report["random_object"]["accuracy"])),
        "routing                           tokens  accuracy  interval       mean IoU   gain  interval        p (Holm)".into(),
    ];
    for row in report["rows"].as_array().into_iter().flatten() {
        let [low, high] = [0, 1].map(|end| number(&row["interval"][end]));
        let mut line = format!(
            "{:33} {:6.2}  {:6.1} %  {low:5.1} … {high:4.1}  {:8.3}",
            row["routing"].as_str().unwrap_or_default(),
            row["average_tokens"].as_f64().unwrap_or(f64::NAN),
            number(&row["accuracy"]),
            row["mean_iou"].as_f64().unwrap_or(f64::NAN),
        );
        if row["gain"].is_number() {
            let [low, high] = [0, 1].map(|end| number(&row["gain_interval"][end]));
            let gain = number(&row["gain"]);
            line += &format!("  {gain:+5.1}  {low:+5.1} … {high:+5.1}");
            match row["p_holm"].as_f64() {
                Some(p) => line += &format!("  {p:.3}"),
                None => line += &format!("  {:.3} (named)", number(&row["p"]) / 100.0),
            }
        }
        lines.push(line);
    }
    lines.join("\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Every method and its twin cost the same in the model that is trained here, whatever is rounded.
    #[test]
    fn twins_have_equal_budgets() {
        let folder = crate::parts::folder().expect("it is built in");
        let config = ModelConfig::open(&folder).expect("it describes a model");
        let depth = Depth::of(&config);
        assert_eq!((depth.layers, depth.tokens), (16, 64));
        for budget in BUDGETS {
            for (removing, rerouting) in METHODS {
                let plan = |method| depth.plan(method, budget).expect("a preset").1;
                let average = depth.average(&plan(removing));
                let twin = depth.at_average(&plan(rerouting), average).expect("a plan");
                assert_eq!(depth.average(&twin), average, "{rerouting}@{budget}");
                let wanted = 64.0 * budget as f64 / 576.0;
                // FastV's and SparseVLM's first layers alone cost more than the smallest budget.
                let most = if budget == 64 { 3.6 } else { 0.6 };
                assert!(
                    (average - wanted).abs() < most,
                    "{removing}@{budget}: {average}"
                );
            }
        }
    }

    /// A report on made-up answers: the first method loses what its twin finds, the others are alike.
    #[test]
    fn rows_are_compared_with_their_bases() {
        let asked = scenes(40, 3);
        let row = |routing: &str, base, found: usize| Row {
            routing: routing.into(),
            base,
            average_tokens: 1.0,
            overlaps: (0..40).map(|at| f64::from(at < found)).collect(),
        };
        let rows = [
            row("dense", None, 30),
            row("fastv@128", None, 10),
            row("reroute-fastv@128", Some(1), 25),
            row("pdrop@64", None, 10),
            row("reroute-pdrop@64", Some(3), 20),
            row("nuwa@64", None, 12),
            row("reroute-nuwa@64", Some(5), 12),
        ];
        let report = report(&rows, &asked, &[0.0; 40]);
        let rows = &report["rows"];
        assert_eq!(rows[0]["accuracy"], 0.75);
        assert!(rows[1]["gain"].is_null() && rows[1]["base"].is_null());
        assert_eq!(
            (&rows[2]["base"], &rows[2]["gain"]),
            (&json!("fastv@128"), &json!(0.375))
        );
        assert!(rows[2]["p_holm"].is_null() && rows[2]["p"].as_f64() < Some(0.001));
        let p = exact_test(10, 0);
        assert_eq!(rows[4]["p_holm"].as_f64(), Some(2.0 * p));
        assert_eq!(rows[6]["p_holm"], 1.0);
        assert_eq!(rows[6]["gain_interval"], json!([0.0, 0.0]));
        let kinds = rows[0]["kinds"].as_object().expect("kinds");
        let counts = kinds.values().filter_map(|kind| kind["scenes"].as_u64());
        assert_eq!(counts.sum::<u64>(), 40);
        assert_eq!(report["blank_picture"]["accuracy"], 0.0);
        let chance = report["random_object"]["accuracy"].as_f64();
        assert!(chance > Some(0.16) && chance <= Some(0.25));
        assert!(table(&report).contains("reroute-fastv@128"));
    }
}
