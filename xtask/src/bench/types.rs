//! What a comparison found in each type: medians, ratios to the fastest peer and the share of what the
//! machine can do, printed and as the file that `--json` names.

use std::path::Path;

use serde_json::{Map, Value, json};

use super::record;

/// What a peer measures.
pub const QUANTITIES: [&str; 2] = ["prefill_ms", "decode_ms"];

/// What somebody said.
pub struct Answers {
    /// Where it was found.
    pub name: String,
    /// About itself.
    pub hello: Value,
    /// Its measurements. The first warms caches up and does not count.
    pub rounds: Vec<Value>,
}

impl Answers {
    /// What it calls itself.
    pub fn title(&self) -> &str {
        self.hello["peer"].as_str().unwrap_or(&self.name)
    }

    /// Whether something was measured that counts.
    pub fn count(&self) -> bool {
        self.rounds.len() > 1
    }

    /// The times that count.
    pub fn times(&self, quantity: &str) -> Vec<f64> {
        let time = |round: &Value| round[quantity].as_f64().unwrap_or(f64::NAN);
        self.rounds.iter().skip(1).map(time).collect()
    }

    /// Its time as a share of another's in the same round.
    pub fn ratios(&self, other: &Self, quantity: &str) -> Vec<f64> {
        let pairs = self.times(quantity).into_iter().zip(other.times(quantity));
        pairs.map(|(ours, theirs)| ours / theirs).collect()
    }

    /// Its times, and how many of them ours took, round by round.
    pub fn report(&self, ours: &Self) -> Value {
        let mut report = self.hello.clone();
        report["peer"] = json!(self.title());
        for quantity in QUANTITIES {
            report[format!("ours_over_it_{quantity}")] = spread(ours.ratios(self, quantity));
            report[quantity] = spread(self.times(quantity));
        }
        report
    }

    /// What a round takes at least as a share of what it took: `least` says seconds, from what the machine
    /// does at most by the limits that the round states, or else the hello.
    fn share(&self, quantity: &str, least: impl Fn(&Value) -> Option<f64>) -> Option<f64> {
        let rounds = self.rounds.iter().skip(1);
        let shares = rounds.map(|round| {
            let limits = [&round["limits"], &self.hello["limits"]];
            let least = limits.into_iter().find_map(&least)?;
            Some(least / (round[quantity].as_f64()? / 1e3))
        });
        let shares: Option<Vec<f64>> = shares.collect();
        shares.and_then(|shares| finite(median(shares)))
    }

    /// FLOPs of the products as a share of those that the machine could have done in the time.
    fn share_of_limit(&self) -> Option<f64> {
        let flops = product_flops(&self.hello["shape"])?;
        self.share("prefill_ms", |limits| {
            Some(flops / limits["flops_per_second"].as_f64()?)
        })
    }

    /// Bytes of the weights as a share of those that the machine could have read in a token's time.
    fn share_of_bandwidth(&self) -> Option<f64> {
        let bytes = self.hello["weight_bytes"].as_f64()?;
        self.share("decode_ms", |limits| {
            Some(bytes / limits["bytes_per_second"].as_f64()?)
        })
    }

    /// The limits of the last round, or of the hello.
    fn limits(&self) -> &Value {
        let last = self.rounds.last().map(|round| &round["limits"]);
        last.filter(|limits| !limits.is_null())
            .unwrap_or(&self.hello["limits"])
    }
}

/// FLOPs of the products with weights in the measured layers: two for each weight and row.
fn product_flops(shape: &Value) -> Option<f64> {
    let size = |name: &str| shape[name].as_f64();
    let hidden = size("hidden_size")?;
    let heads = size("num_attention_heads")? + size("num_key_value_heads")?;
    let attention = 2.0 * heads * size("head_dim")? * hidden;
    let perceptron = 3.0 * hidden * size("intermediate_size")?;
    Some(2.0 * size("rows")? * size("num_hidden_layers")? * (attention + perceptron))
}

/// Those without whom a type on a CPU counts as not measured, by the beginnings of their names. In the
/// other types anybody will do.
fn required(dtype: &str, runs_on: &str) -> &'static [&'static str] {
    match (dtype, runs_on) {
        ("bf16", "cpu") => &["torch", "openvino"],
        ("int8" | "q4", "cpu") => &["openvino", "llama.cpp"],
        _ => &[],
    }
}

/// Why a type counts as not measured.
fn lacking(dtype: &str, ours: Option<&Answers>, peers: &[&Answers]) -> Option<String> {
    let Some(ours) = ours.filter(|ours| ours.count()) else {
        return Some("our own program did not run".into());
    };
    let runs_on = ours.hello["shape"]["runs_on"].as_str().unwrap_or_default();
    let absent = required(dtype, runs_on).iter().filter(|name| {
        let mut ran = peers.iter().map(|peer| peer.title().to_lowercase());
        !ran.any(|title| title.starts_with(*name))
    });
    let absent: Vec<&str> = absent.copied().collect();
    match (absent.is_empty(), peers.is_empty()) {
        (false, _) => Some(format!("{} did not run", absent.join(" and "))),
        (true, true) => Some("nobody else ran".into()),
        (true, false) => None,
    }
}

/// What was found in a type. Ratios are medians of those of the rounds; the best is the peer that is
/// fastest beside ours in them.
pub fn report(dtype: &str, ours: Option<&Answers>, others: &[&Answers], notes: &[String]) -> Value {
    let peers: Vec<&Answers> = others.iter().copied().filter(|peer| peer.count()).collect();
    let names = names(&peers);
    let named = || names.iter().zip(&peers);
    let reason = lacking(dtype, ours, &peers);
    let times = |quantity: &str| -> Map<String, Value> {
        let time = |peer: &&Answers| json!(median(peer.times(quantity)));
        named()
            .map(|(name, peer)| (name.clone(), time(peer)))
            .collect()
    };
    let best = |quantity: &str| {
        let ours = ours.filter(|_| reason.is_none())?;
        let ratios = named().map(|(name, peer)| (name, median(ours.ratios(peer, quantity))));
        ratios.max_by(|one, other| one.1.total_cmp(&other.1))
    };
    let name_of = |best: Option<(&String, f64)>| best.map(|(name, _)| name.clone());
    let ratio_of = |best: Option<(&String, f64)>| best.and_then(|(_, ratio)| finite(ratio));
    let our_time = |quantity: &str| ours.and_then(|ours| finite(median(ours.times(quantity))));
    let everybody = || {
        let ours = ours.map(|ours| ("ours".to_string(), ours));
        ours.into_iter()
            .chain(named().map(|(name, peer)| (name.clone(), *peer)))
    };
    let rounds: Map<String, Value> = everybody()
        .map(|(name, it)| (name, json!(it.rounds)))
        .collect();
    let hellos: Map<String, Value> = everybody()
        .map(|(name, it)| (name, it.hello.clone()))
        .collect();
    json!({
        "dtype": dtype,
        "measured": reason.is_none(),
        "reason": reason,
        "ours_ms": our_time("prefill_ms"),
        "peers": times("prefill_ms"),
        "best": name_of(best("prefill_ms")),
        "ratio_to_best": ratio_of(best("prefill_ms")),
        "ours_decode_ms": our_time("decode_ms"),
        "peers_decode_ms": times("decode_ms"),
        "decode_best": name_of(best("decode_ms")),
        "decode_ratio_to_best": ratio_of(best("decode_ms")),
        "share_of_limit": ours.and_then(Answers::share_of_limit),
        "decode_share_of_bandwidth": ours.and_then(Answers::share_of_bandwidth),
        "limits": ours.map(|ours| ours.limits().clone()),
        "said": hellos,
        "rounds": rounds,
        "notes": notes,
    })
}

/// Names that tell peers apart.
fn names(peers: &[&Answers]) -> Vec<String> {
    let alone = |title: &str| peers.iter().filter(|peer| peer.title() == title).count() == 1;
    let name = |peer: &&Answers| match alone(peer.title()) {
        true => peer.title().to_string(),
        false => format!("{} ({})", peer.title(), peer.name),
    };
    peers.iter().map(name).collect()
}

fn finite(value: f64) -> Option<f64> {
    value.is_finite().then_some(value)
}

pub fn median(values: Vec<f64>) -> f64 {
    spread(values)["median"].as_f64().unwrap_or(f64::NAN)
}

/// Median, least and most.
pub fn spread(mut values: Vec<f64>) -> Value {
    values.sort_by(f64::total_cmp);
    let middle = (values.len().saturating_sub(1) / 2, values.len() / 2);
    let at = |index: usize| values.get(index).copied().unwrap_or(f64::NAN);
    json!({
        "median": at(middle.0).midpoint(at(middle.1)),
        "least": at(0),
        "most": at(values.len().saturating_sub(1)),
        "runs": values.len(),
    })
}

/// Writes all types so far, with where they came from.
pub fn keep(path: &Path, origin: &Value, types: &[Value]) -> anyhow::Result<()> {
    let mut report = origin.clone();
    let mut said = types.iter().map(|it| &it["said"]["ours"]);
    report["device"] = json!(said.find_map(|ours| ours["device"].as_str()));
    report["types"] = json!(types);
    record::write(path, &report)
}

/// Prints what was found in a type.
pub fn print(found: &Value) {
    let dtype = found["dtype"].as_str().unwrap_or("?");
    println!("\n{dtype}: two layers (four less two), one prompt and one more token, in turn");
    println!("{:<60} {:>12} {:>12}", "who", "prefill ms", "decode ms");
    let number = |value: &Value| value.as_f64().unwrap_or(f64::NAN);
    let line = |name: &str, prefill: &Value, decode: &Value| {
        println!(
            "{name:<60} {:>12.1} {:>12.2}",
            number(prefill),
            number(decode)
        );
    };
    if !found["ours_ms"].is_null() {
        line("ours", &found["ours_ms"], &found["ours_decode_ms"]);
    }
    for (name, prefill) in found["peers"].as_object().into_iter().flatten() {
        line(name, prefill, &found["peers_decode_ms"][name]);
    }
    for (what, ratio, best) in [
        ("prefill", "ratio_to_best", "best"),
        ("decode", "decode_ratio_to_best", "decode_best"),
    ] {
        if let (Some(ratio), Some(best)) = (found[ratio].as_f64(), found[best].as_str()) {
            println!("{what}: ours takes {ratio:.2} of the time of {best}");
        }
    }
    if let Some(share) = found["share_of_limit"].as_f64() {
        println!(
            "products at {:.0} % of the limit: {}",
            100.0 * share,
            found["limits"]
        );
    }
    if let Some(share) = found["decode_share_of_bandwidth"].as_f64() {
        println!(
            "a token reads weights at {:.0} % of the bandwidth",
            100.0 * share
        );
    }
    if let Some(reason) = found["reason"].as_str() {
        println!("counts as not measured: {reason}");
    }
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::{Answers, keep, report};

    /// Somebody who has run so many rounds of these times, after one that does not count.
    fn answers(title: &str, rounds: &[(f64, f64)]) -> Answers {
        let counted = rounds.iter().map(
            |(prefill, decode)| json!({"prefill_ms": prefill, "decode_ms": decode, "tries": 1}),
        );
        let first = json!({"prefill_ms": 1e6, "decode_ms": 1e6});
        Answers {
            name: format!("{title}.py"),
            hello: json!({"peer": title, "shape": {
                "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 2,
                "num_attention_heads": 32, "num_key_value_heads": 32, "head_dim": 128,
                "rows": 640, "runs_on": "cpu",
            }}),
            rounds: std::iter::once(first).chain(counted).collect(),
        }
    }

    fn found(dtype: &str, ours: Option<&Answers>, others: &[&Answers]) -> Value {
        report(dtype, ours, others, &["busy".into()])
    }

    #[test]
    fn the_best_peer_is_the_one_that_is_fastest_beside_ours() {
        let ours = answers("reroute, flex", &[(10.0, 1.0), (20.0, 1.0), (90.0, 1.0)]);
        let torch = answers("torch 2", &[(20.0, 2.0), (40.0, 2.0), (60.0, 2.0)]);
        // Its median is higher, but in most rounds it was the faster of the two.
        let openvino = answers("openvino 2026", &[(10.0, 4.0), (50.0, 4.0), (50.0, 4.0)]);
        let found = found("bf16", Some(&ours), &[&torch, &openvino]);
        assert_eq!(found["measured"], true);
        assert_eq!(found["reason"], Value::Null);
        assert_eq!(found["ours_ms"], 20.0);
        assert_eq!(found["peers"]["torch 2"], 40.0);
        assert_eq!(found["peers_decode_ms"]["openvino 2026"], 4.0);
        // 1, 0.4, 1.8 beside 0.5, 0.5, 1.5.
        assert_eq!(found["ratio_to_best"], 1.0);
        assert_eq!(found["best"], "openvino 2026");
        assert_eq!(found["decode_ratio_to_best"], 0.5);
        assert_eq!(found["decode_best"], "torch 2");
        assert_eq!(found["rounds"]["ours"][1]["tries"], 1);
        assert_eq!(found["said"]["torch 2"]["peer"], "torch 2");
        assert_eq!(found["notes"][0], "busy");
    }

    #[test]
    fn without_those_who_count_a_type_is_not_measured() {
        let ours = answers("reroute, flex", &[(10.0, 1.0)]);
        let torch = answers("torch 2", &[(20.0, 2.0)]);
        let llama = answers("llama.cpp, b1", &[(20.0, 2.0)]);
        let openvino = answers("openvino 2026", &[(20.0, 2.0)]);
        let early = answers("openvino 2026", &[]);
        for (dtype, others, reason) in [
            ("f32", &[][..], "nobody else ran"),
            ("bf16", &[&torch, &llama], "openvino did not run"),
            ("bf16", &[&torch, &early], "openvino did not run"),
            ("int8", &[&torch], "openvino and llama.cpp did not run"),
            ("q4", &[&openvino], "llama.cpp did not run"),
        ] {
            let found = found(dtype, Some(&ours), others);
            assert_eq!(found["measured"], false, "{dtype}");
            assert_eq!(found["reason"], reason, "{dtype}");
            assert_eq!(found["ratio_to_best"], Value::Null);
            assert_eq!(found["best"], Value::Null);
            assert_eq!(found["decode_ratio_to_best"], Value::Null);
            assert_eq!(found["ours_ms"], 10.0);
        }
        for (dtype, others) in [
            ("f32", &[&torch][..]),
            ("f16", &[&torch]),
            ("int8", &[&llama, &openvino]),
            ("q4", &[&llama, &openvino, &torch]),
        ] {
            assert_eq!(
                found(dtype, Some(&ours), others)["measured"],
                true,
                "{dtype}"
            );
        }
        // On a card PyTorch is all that there is.
        let mut card = answers("reroute, cuda", &[(10.0, 1.0)]);
        card.hello["shape"]["runs_on"] = json!("cuda");
        assert_eq!(found("bf16", Some(&card), &[&torch])["measured"], true);
    }

    #[test]
    fn without_ours_nothing_is_measured() {
        let torch = answers("torch 2", &[(20.0, 2.0)]);
        let early = answers("reroute, flex", &[]);
        for ours in [None, Some(&early)] {
            let found = found("f32", ours, &[&torch]);
            assert_eq!(found["reason"], "our own program did not run");
            for nothing in ["ours_ms", "ratio_to_best", "share_of_limit"] {
                assert_eq!(found[nothing], Value::Null, "{nothing}");
            }
            assert_eq!(found["peers"]["torch 2"], 20.0);
        }
    }

    #[test]
    fn the_limit_is_that_of_the_round_or_else_of_the_hello_or_unknown() {
        let share = |ours: &Answers| found("f32", Some(ours), &[])["share_of_limit"].clone();
        let mut ours = answers(
            "reroute, flex",
            &[(2000.0, 1.0), (1000.0, 1.0), (1000.0, 1.0)],
        );
        assert_eq!(share(&ours), Value::Null);
        // Two layers of 202 million weights, 640 rows: 518 GFLOP.
        let flops: f64 = 2.0 * 640.0 * 2.0 * 202_375_168.0;
        ours.hello["limits"] = json!({"flops_per_second": flops, "instruction": "vdpbf16ps"});
        assert_eq!(share(&ours), 1.0);
        for round in 1..=3 {
            ours.rounds[round]["limits"] = json!({
                "flops_per_second": 2.0 * flops, "bytes_per_second": 8e9, "instruction": "vdpbf16ps",
            });
        }
        assert_eq!(share(&ours), 0.5);
        // A token in a millisecond.
        ours.hello["weight_bytes"] = json!(4_000_000);
        let found_share = found("f32", Some(&ours), &[])["decode_share_of_bandwidth"].clone();
        assert_eq!(found_share, 0.5);
        let found = found("f32", Some(&ours), &[]);
        assert_eq!(found["limits"]["instruction"], "vdpbf16ps");
    }

    #[test]
    fn peers_of_one_name_are_told_apart() {
        let ours = answers("reroute, flex", &[(10.0, 1.0)]);
        let one = answers("torch 2", &[(20.0, 2.0)]);
        let mut other = answers("torch 2", &[(40.0, 2.0)]);
        other.name = "other.py".into();
        let found = found("f32", Some(&ours), &[&one, &other]);
        assert_eq!(found["peers"]["torch 2 (torch 2.py)"], 20.0);
        assert_eq!(found["peers"]["torch 2 (other.py)"], 40.0);
        assert_eq!(found["best"], "torch 2 (torch 2.py)");
    }

    #[test]
    fn the_file_has_all_types_and_where_they_come_from() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("types.json");
        let mut ours = answers("reroute, flex", &[(10.0, 1.0)]);
        ours.hello["device"] = json!("Fast Processor");
        let torch = answers("torch 2", &[(20.0, 2.0)]);
        let types = [
            found("int8", None, &[]),
            found("f32", Some(&ours), &[&torch]),
        ];
        for count in 1..=2 {
            keep(&path, &json!({"commit": "abc"}), &types[..count]).unwrap();
            let kept: Value = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
            assert_eq!(kept["commit"], "abc");
            assert_eq!(kept["types"].as_array().unwrap().len(), count);
            assert_eq!(kept["types"][0]["measured"], false);
            assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 1);
        }
        let kept: Value = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
        assert_eq!(kept["device"], "Fast Processor");
        assert_eq!(kept["types"][1]["dtype"], "f32");
        assert_eq!(kept["types"][1]["ratio_to_best"], 0.5);
    }
}
