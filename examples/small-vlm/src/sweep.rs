//! When rerouting wins: schedules that differ in where they begin, how often they decide and how much they keep, and
//! what can be seen of it in a forward pass.

use std::path::Path;

use anyhow::{Result, ensure};
use reroute_zoo::backend::Flex;
use reroute_zoo::{Answer, Folder, OpenOptions, Plan, Vlm};
use serde_json::{Value, json};

use crate::evaluate::{Depth, FOUND, answers, scenes};
use crate::statistics::{interval, mean, ranks_agree};

/// Where the first decision is taken, as shares of the layers.
const FIRST: [f64; 5] = [0.07, 0.125, 0.25, 0.375, 0.5];
/// Decisions of a schedule.
const DECISIONS: [usize; 3] = [2, 4, 8];
/// Visual tokens on average over the layers, as a share.
const SHARES: [f64; 3] = [0.5, 0.33, 0.22];

/// A schedule, whatever happens to those that are not kept.
struct Setting {
    /// The layers of the decisions.
    layers: Vec<usize>,
    /// What each keeps.
    counts: Vec<usize>,
}

impl Setting {
    /// Evenly spaced decisions that keep ever fewer tokens, by a constant factor; `None` where layers before the first take more
    /// than the share already.
    fn new(first: usize, decisions: usize, share: f64, depth: &Depth) -> Option<Self> {
        let decisions = decisions.min(depth.layers - first);
        let at = |k: usize| first + k * (depth.layers - first) / decisions;
        let layers: Vec<usize> = (0..decisions).map(at).collect();
        let all = depth.tokens as f64;
        let counts = |factor: f64| -> Vec<usize> {
            let kept = (1..=decisions).map(|k| (all * factor.powi(k as i32)).round() as usize);
            kept.map(|kept| kept.max(1)).collect()
        };
        let missed = |counts: &[usize]| (average(&layers, counts, depth) - share).abs();
        let tried = (1..1000).map(|step| counts(f64::from(step) / 1000.0));
        let counts = tried.min_by(|a, b| missed(a).total_cmp(&missed(b)))?;
        (missed(&counts) < 0.02).then_some(Self { layers, counts })
    }

    fn plan(&self, action: &str, memory: &str) -> Result<Plan> {
        let stages = self.layers.iter().zip(&self.counts);
        let stages: Vec<Value> = stages
            .map(|(layer, count)| json!({"layer": layer, "keep_count": count}))
            .collect();
        let plan = json!({"action": action, "memory": memory, "stages": stages});
        Ok(Plan::from_json(&plan.to_string())?)
    }
}

/// The share of visual tokens that a layer works on.
fn average(layers: &[usize], counts: &[usize], depth: &Depth) -> f64 {
    let ends = layers.iter().skip(1).chain([&depth.layers]);
    let work = layers.iter().zip(ends).zip(counts);
    let work: usize = work
        .map(|((start, end), count)| count * (end - start))
        .sum();
    (depth.tokens * layers[0] + work) as f64 / (depth.layers * depth.tokens) as f64
}

/// What a forward pass shows of its decisions.
#[derive(Default, Clone, Copy)]
struct Seen {
    /// Of what the tokens that are let go have ever got of the last row's attention to candidates, at decisions so far: the mean
    /// over decisions behind the first.
    forgotten: f64,
    /// Of the selected, those that had been deferred before: the mean over decisions behind the first.
    returned: f64,
}

impl Seen {
    fn of(answer: &Answer) -> Self {
        let decisions: Vec<_> = answer.trace.of_sample(0).collect();
        let later = decisions.len().saturating_sub(1).max(1) as f64;
        let mut shares: Vec<f64> = Vec::new();
        let mut seen = Self::default();
        for (at, decision) in decisions.iter().enumerate() {
            let most = decision.candidates.iter().max().map_or(0, |last| last + 1);
            shares.resize(shares.len().max(most), 0.0);
            if at > 0 {
                let kept: f64 = decision.selected.iter().map(|&token| shares[token]).sum();
                let all: f64 = shares.iter().sum();
                seen.forgotten += (1.0 - kept / all.max(f64::MIN_POSITIVE)) / later;
                let of = decision.selected.len().max(1) as f64;
                seen.returned += decision.returned.len() as f64 / of / later;
            }
            let sum: f64 = decision.scores.iter().map(|&score| f64::from(score)).sum();
            for (&token, &score) in decision.candidates.iter().zip(&decision.scores) {
                shares[token] += f64::from(score) / sum.max(f64::MIN_POSITIVE);
            }
        }
        seen
    }
}

/// Measures every schedule; the report.
pub fn sweep(folder: &Path, count: usize, seed: u32) -> Result<Value> {
    ensure!(count > 0, "give at least one scene (--scenes)");
    let device = Default::default();
    let vlm = Vlm::<Flex>::open(&Folder::open(folder)?, &OpenOptions::default(), &device)?;
    let asked = scenes(count, seed);
    let depth = Depth::of(vlm.config());
    let found = |plan: &Plan| -> Result<(Vec<f64>, Vec<Seen>)> {
        let look = |overlap: f64, answer: &Answer| (f64::from(overlap >= FOUND), Seen::of(answer));
        Ok(answers(&vlm, &asked, plan, None, look)?.into_iter().unzip())
    };
    let (dense, _) = found(&vlm.plan("dense")?)?;
    let mut rows = Vec::new();
    let firsts = FIRST.map(|share| ((share * depth.layers as f64) as usize).max(1));
    for first in firsts {
        for (decisions, share) in DECISIONS
            .iter()
            .flat_map(|d| SHARES.map(|share| (*d, share)))
        {
            let Some(setting) = Setting::new(first, decisions, share, &depth) else {
                continue;
            };
            let (removed, _) = found(&setting.plan("remove", "off")?)?;
            let (rerouted, seen) = found(&setting.plan("reroute", "off")?)?;
            let (remembering, _) = found(&setting.plan("reroute", "sum")?)?;
            let gain = |better: &[f64]| -> Vec<f64> {
                better.iter().zip(&removed).map(|(a, b)| a - b).collect()
            };
            let [plain, memory] = [&rerouted, &remembering].map(|of| gain(of));
            let of = |what: fn(&Seen) -> f64| mean(&seen.iter().map(what).collect::<Vec<_>>());
            eprintln!("{:?} {:?}", setting.layers, setting.counts);
            rows.push(json!({
                "first": first, "layers": setting.layers, "keep_counts": setting.counts,
                "average_tokens": average(&setting.layers, &setting.counts, &depth) * depth.tokens as f64,
                "removed": mean(&removed), "rerouted": mean(&rerouted), "rerouted_memory": mean(&remembering),
                "gain": mean(&plain), "gain_interval": interval(&plain, 0),
                "gain_memory": mean(&memory), "gain_memory_interval": interval(&memory, 0),
                "forgotten": of(|seen| seen.forgotten), "returned": of(|seen| seen.returned),
            }));
        }
    }
    let column = |key: &str| -> Vec<f64> {
        let numbers = rows.iter().filter_map(|row| row[key].as_f64());
        numbers.collect()
    };
    let pairs = column("gain_memory").into_iter().zip(column("gain"));
    let repaired: Vec<f64> = pairs.map(|(with, without)| with - without).collect();
    let agree = |key: &str| {
        json!({
            "gain": ranks_agree(&column(key), &column("gain")),
            "gain_memory": ranks_agree(&column(key), &column("gain_memory")),
            "memory_over_none": ranks_agree(&column(key), &repaired),
        })
    };
    Ok(json!({
        "scenes": asked.len(), "layers": depth.layers, "visual_tokens": depth.tokens, "dense": mean(&dense),
        "rank_correlations": {
            "first": agree("first"), "average_tokens": agree("average_tokens"), "removed": agree("removed"),
            "forgotten": agree("forgotten"), "returned": agree("returned"),
        },
        "rows": rows,
    }))
}

/// A report as people read it.
pub fn table(report: &Value) -> String {
    let number = |value: &Value| value.as_f64().unwrap_or(f64::NAN);
    let points = |value: &Value| 100.0 * number(value);
    let mut lines = vec![
        format!("dense {:.1} % of {}", points(&report["dense"]), report["scenes"]),
        format!("rank correlations {}", report["rank_correlations"]),
        "first  decisions  tokens  removed  rerouted  + memory   gain  interval        with memory  interval        forgotten  returned".into(),
    ];
    for row in report["rows"].as_array().into_iter().flatten() {
        let [low, high] = [0, 1].map(|end| points(&row["gain_interval"][end]));
        let [low_memory, high_memory] = [0, 1].map(|end| points(&row["gain_memory_interval"][end]));
        lines.push(format!(
            "{:5}  {:9}  {:6.2}  {:7.1}  {:8.1}  {:8.1}  {:+5.1}  {low:+5.1} … {high:+5.1}  {:+11.1}  {low_memory:+5.1} … {high_memory:+5.1}  {:9.3}  {:8.3}",
            row["first"],
            row["layers"].as_array().map_or(0, Vec::len),
            number(&row["average_tokens"]),
            points(&row["removed"]),
            points(&row["rerouted"]),
            points(&row["rerouted_memory"]),
            points(&row["gain"]),
            points(&row["gain_memory"]),
            number(&row["forgotten"]),
            number(&row["returned"]),
        ));
    }
    lines.join("\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Schedules begin where they should, keep ever fewer, and cost what was asked for.
    #[test]
    fn settings_have_their_budgets() {
        let folder = crate::parts::folder().expect("it is built in");
        let config = reroute_zoo::ModelConfig::open(&folder).expect("it describes a model");
        let depth = Depth::of(&config);
        let setting = Setting::new(2, 4, 0.33, &depth).expect("there is one");
        assert_eq!(setting.layers, [2, 5, 9, 12]);
        assert!(setting.counts.is_sorted_by(|a, b| a >= b));
        let average = average(&setting.layers, &setting.counts, &depth);
        assert!((average - 0.33).abs() < 0.02, "{average}");
        let plan = setting.plan("remove", "off").expect("a plan");
        let of_plan = depth.average(&plan) / depth.tokens as f64;
        assert!((of_plan - average).abs() < 1e-12, "{of_plan}");
        assert!(Setting::new(8, 4, 0.33, &depth).is_none());
    }
}
