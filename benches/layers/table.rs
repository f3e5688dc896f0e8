//! Measured speed-up of every preset beside its FLOP ceiling.

use std::process::Command;
use std::time::Instant;

use reducers::{Cost, Schedule};
use reroute::{Decoder, Prompt};
use reroute_cli::backend::{self, Backend};
use serde_json::{Value, json};

use crate::shapes::{self, DEPTH, TEXT, VISUAL};
use crate::single::Entry;

const ROUNDS: usize = 3;
const METHODS: [&str; 4] = ["fastv", "pdrop", "reroute-fastv", "reroute-pdrop"];
const BUDGETS: [usize; 3] = [192, 128, 64];

/// Times all presets, dense and routed in turn within each round because clocks drift, prints the
/// table and writes it where `REROUTE_BENCH_OUT` says.
pub fn run() {
    let (decoder, prompt) = (shapes::decoder(DEPTH), shapes::prompt());
    let names: Vec<String> = BUDGETS
        .iter()
        .flat_map(|budget| METHODS.map(|method| format!("{method}@{budget}-exact")))
        .collect();
    let schedules: Vec<Schedule> = names.iter().map(|name| shapes::schedule(name)).collect();
    let decision = decision_seconds();
    let mut dense = Vec::new();
    let mut routed = vec![Vec::new(); names.len()];
    for _ in 0..ROUNDS {
        // Dense before and after the routed runs of a round: the mean is paired with them.
        let before = seconds(&decoder, &prompt, &Schedule::dense());
        let times: Vec<f64> =
            schedules.iter().map(|schedule| seconds(&decoder, &prompt, schedule)).collect();
        let mean = (before + seconds(&decoder, &prompt, &Schedule::dense())) / 2.0;
        dense.push(mean);
        for (all, time) in routed.iter_mut().zip(times) {
            all.push((mean / time, time));
        }
    }

    let shape = shapes::config(DEPTH).shape();
    let cost = |schedule: &Schedule| Cost::of(&shape, schedule, VISUAL, TEXT, 4);
    let dense_cost = cost(&Schedule::dense());
    let dense_seconds = median(dense);
    println!(
        "\n{DEPTH} layers, {VISUAL} + {TEXT} tokens, medians of {ROUNDS} rounds; dense {:.0} ms, {:.0} GFLOP/s; \
         a decision adds {:.1} ms",
        dense_seconds * 1e3,
        dense_cost.total_flops() / dense_seconds / 1e9,
        decision * 1e3,
    );
    println!("preset                   average      ms  speed-up  ceiling  of ceiling  selection");
    let mut rows = Vec::new();
    for ((name, schedule), times) in names.iter().zip(&schedules).zip(routed) {
        let cost = cost(schedule);
        let speedup = median(times.iter().map(|(ratio, _)| *ratio).collect());
        let time = median(times.iter().map(|(_, time)| *time).collect());
        let ceiling = cost.speedup_ceiling(&dense_cost);
        let selection = decision * schedule.stages().len() as f64 / time;
        println!(
            "{name:<24} {:>7.1} {:>7.0} {speedup:>8.2}× {ceiling:>7.2}× {:>9.1} % {:>8.1} %",
            cost.average_tokens(),
            time * 1e3,
            100.0 * speedup / ceiling,
            100.0 * selection,
        );
        rows.push(json!({
            "preset": name,
            "average_tokens": cost.average_tokens(),
            "milliseconds": time * 1e3,
            "speedup": speedup,
            "ceiling": ceiling,
            "selection_share": selection,
        }));
    }
    let report = json!({
        "backend": backend::NAME,
        "commit": output("git", &["rev-parse", "HEAD"]),
        "processor": processor(),
        "threads": std::thread::available_parallelism().map_or(0, |n| n.get()),
        "layers": DEPTH,
        "visual_tokens": VISUAL,
        "text_tokens": TEXT,
        "rounds": ROUNDS,
        "dense_milliseconds": dense_seconds * 1e3,
        "dense_gflop_per_second": dense_cost.total_flops() / dense_seconds / 1e9,
        "decision_milliseconds": decision * 1e3,
        "presets": rows,
    });
    keep(&report);
}

fn seconds(decoder: &Decoder<Backend>, prompt: &Prompt<Backend>, schedule: &Schedule) -> f64 {
    let started = Instant::now();
    let prefill = decoder.prefill(prompt, schedule, Default::default());
    shapes::wait(prefill.expect("a good prompt").logits);
    started.elapsed().as_secs_f64()
}

/// What a decision on all rows adds to entering a layer and its work on the rows that stay: the
/// entry of a deciding layer less the share of a plain entry that the kept rows would cost anyway.
fn decision_seconds() -> f64 {
    let (plain, decides) = (Entry::new(false), Entry::new(true));
    let time = |entry: &Entry| {
        let started = Instant::now();
        entry.run();
        started.elapsed().as_secs_f64()
    };
    let kept = (128 + TEXT) as f64 / (VISUAL + TEXT) as f64;
    let differences = (0..9).map(|_| {
        let plain = time(&plain);
        time(&decides) - kept * plain
    });
    median(differences.collect())
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

fn output(program: &str, arguments: &[&str]) -> String {
    let output = Command::new(program).args(arguments).output();
    let text = output.map(|output| String::from_utf8_lossy(&output.stdout).trim().to_string());
    text.unwrap_or_default()
}

fn processor() -> String {
    let cpuinfo = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let model = cpuinfo.lines().find_map(|line| line.strip_prefix("model name")?.split_once(": "));
    model.map_or_else(String::new, |(_, name)| name.to_string())
}

fn keep(report: &Value) {
    let Ok(path) = std::env::var("REROUTE_BENCH_OUT") else {
        return;
    };
    match std::fs::write(&path, format!("{report:#}\n")) {
        Ok(()) => println!("kept in {path}"),
        Err(error) => println!("cannot write {path}: {error}"),
    }
}
