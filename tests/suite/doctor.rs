//! `reroute doctor`: what it predicts is what happens, and what it finds is all there is.

use std::path::Path;

use clap::Parser;
use reroute_cli::args::Args;
use reroute_cli::backend;
use safetensors::tensor::SafeTensors;
use serde_json::{Value, json};

use crate::program::{Scratch, fixture, refuses, report, scene};

/// What the doctor says as JSON, and whether it found the patient well.
pub fn doctor(flags: &[&str]) -> (Value, bool) {
    let line = [&["reroute", "doctor", "--json"], flags].concat();
    let args = Args::try_parse_from(line).expect("good flags");
    let mut out = Vec::new();
    let result = reroute_cli::run(&args.command, &mut out);
    let report = serde_json::from_slice(&out).expect("one JSON object");
    (report, result.is_ok())
}

/// All problems as text.
fn problems(report: &Value) -> Vec<String> {
    let problems = report["problems"].as_array().expect("a list");
    let text = |problem: &Value| {
        let remedy = problem["remedy"].as_str().expect("a text");
        assert!(!remedy.is_empty());
        problem["problem"].as_str().expect("a text").to_string()
    };
    problems.iter().map(text).collect()
}

fn need<'a>(report: &'a Value, routing: &str) -> &'a Value {
    let needs = report["needs"].as_array().expect("a list");
    let found = needs.iter().find(|need| need["routing"] == routing);
    found.expect("a known routing")
}

#[test]
fn a_good_checkpoint_needs_the_memory_that_an_answer_takes() {
    let asked = report(&["ask", "--routing", "reroute-pdrop@192"]);
    let text = asked["prompt_rows"].as_u64().unwrap() - asked["visual_tokens"].as_u64().unwrap();
    let (report, well) = doctor(&["--text-tokens", &text.to_string()]);
    assert!(well, "{report}");
    assert_eq!(report["problems"], json!([]));
    assert_eq!(report["backend"], backend::NAME);
    assert_eq!(report["dtypes"][0], "f32");
    assert_eq!(report["visual_tokens"], asked["visual_tokens"]);
    let dense = need(&report, "dense");
    assert_eq!(dense["kv_bytes"], asked["dense_kv_bytes"]);
    assert_eq!(
        need(&report, "reroute-pdrop@192")["kv_bytes"],
        asked["kv_bytes"]
    );
    let parts = ["weights_bytes", "kv_bytes", "activation_bytes"].map(|part| &dense[part]);
    let parts = parts.map(|bytes| bytes.as_u64().expect("bytes"));
    assert!(parts.iter().all(|&bytes| bytes > 0));
    // Where tensors lie in the machine's memory, the program lies beside them.
    let program = dense["program_bytes"].as_u64().expect("bytes");
    assert_eq!(program > 0, backend::ON_HOST);
    let parts = [&parts[..], &[program]].concat();
    assert_eq!(dense["total_bytes"], parts.iter().sum::<u64>());
}

#[test]
fn parameters_are_those_in_the_file() {
    let folder = fixture();
    let bytes = std::fs::read(folder.join("model.safetensors")).expect("the fixture is complete");
    let tensors = SafeTensors::deserialize(&bytes).expect("a safetensors file");
    // The tower's features are taken before its last norm.
    let used = |name: &str| !name.contains("post_layernorm");
    let sizes = tensors.tensors().into_iter().filter(|(name, _)| used(name));
    let sizes = sizes.map(|(_, view)| view.shape().iter().product::<usize>());
    let (report, well) = doctor(&["--model", folder.to_str().expect("UTF-8")]);
    assert!(well, "{report}");
    assert_eq!(report["parameters"], sizes.sum::<usize>());
}

#[test]
fn a_picture_becomes_as_many_visual_tokens_as_it_will() {
    let image = scene("063");
    for family in ["qwen2vl", "qwen25vl", "qwen3vl"] {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures");
        let folder = folder.join(family).join("ckpt");
        let folder = folder.to_str().expect("UTF-8");
        let model = ["--model", folder];
        let short = ["--prompt", "What?", "--max-new-tokens", "1"];
        let ask = [&["ask", "--image", &image][..], &model, &short].concat();
        let (found, _) = doctor(&[&model[..], &["--image-size", "112x112"]].concat());
        assert_eq!(
            found["visual_tokens"],
            report(&ask)["visual_tokens"],
            "{family}"
        );
    }
}

#[test]
fn everything_that_is_wrong_is_found_at_once() {
    let folder = Scratch::checkpoint();
    folder.write("tokenizer.json", "{");
    folder.write("preprocessor_config.json", "[]");
    folder.write("generation_config.json", "nothing");
    folder.write("chat_template.jinja", "{% if %}");
    folder.set("config.json", "/text_config/intermediate_size", json!(48));
    let (report, well) = doctor(&["--model", &folder.path()]);
    assert!(!well);
    let problems = problems(&report);
    let parts = [
        "tokenizer.json",
        "generation_config.json",
        "weights",
        "preprocessor_config.json",
        "chat template",
    ];
    for part in parts {
        let about = problems.iter().filter(|problem| problem.starts_with(part));
        assert_eq!(about.count(), 1, "{part}: {problems:?}");
    }
    assert_eq!(problems.len(), parts.len(), "{problems:?}");
    let weights = problems
        .iter()
        .find(|problem| problem.starts_with("weights"));
    assert!(weights.expect("found above").contains("gate_proj"));
}

/// Downloading again would help with none of these.
#[test]
fn a_remedy_is_for_what_is_wrong() {
    let fixture = |name: &str| {
        let fixtures = Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures");
        fixtures.join(name).display().to_string()
    };
    let of_another = Scratch::checkpoint();
    of_another.set("config.json", "/text_config/intermediate_size", json!(48));
    for (model, part, words) in [
        (fixture("convert/original"), "weights", "--allow-pickle"),
        (fixture("convert/clip"), "config.json", "LLaVA-1.5"),
        (of_another.path(), "weights", "same model"),
    ] {
        let (report, well) = doctor(&["--model", &model]);
        assert!(!well);
        let problems = report["problems"].as_array().expect("a list");
        let is_meant = |problem: &&Value| {
            let text = problem["problem"].as_str().expect("a text");
            text.starts_with(part)
        };
        let problem = problems.iter().find(is_meant).expect("a known part");
        let remedy = problem["remedy"].as_str().expect("a text");
        assert!(remedy.contains(words), "{remedy}");
    }
}

/// What the user has decides what helps.
#[test]
fn a_remedy_is_for_what_the_user_has() {
    let variant = |pointer: &str, value: Value| {
        let folder = Scratch::checkpoint();
        folder.set("config.json", pointer, value);
        folder
    };
    let family = |name: &str| variant("/model_type", json!(name));
    let without = |name: &str, others: &[&str]| {
        let folder = Scratch::checkpoint();
        folder.remove(name);
        for other in others {
            folder.write(other, "x");
        }
        folder
    };
    let quantised = |how: &str| {
        let folder = Scratch::checkpoint();
        let config = json!({"quant_method": how});
        folder.set("config.json", "/quantization_config", config);
        // Quantised weights have other shapes.
        folder.set("config.json", "/text_config/intermediate_size", json!(48));
        folder
    };
    let adapter = Scratch::new();
    adapter.write(
        "adapter_config.json",
        r#"{"peft_type": "LORA", "base_model_name_or_path": "llava-hf/llava-1.5-7b-hf"}"#,
    );
    adapter.write("adapter_model.safetensors", "x");
    let cache = Scratch::new();
    std::fs::create_dir(cache.at("snapshots")).expect("a folder");
    let files = |name: &str| {
        let folder = Scratch::new();
        folder.write(name, "x");
        folder
    };
    let weights = "model.safetensors";
    for (folder, part, words) in [
        (
            family("llava_next"),
            "config.json",
            &["not supported", "llava-1.5-7b-hf"][..],
        ),
        (
            family("qwen2"),
            "config.json",
            &["Qwen/Qwen2.5-VL-7B-Instruct"],
        ),
        (
            family("siglip_vision_model"),
            "config.json",
            &["tower", "llava-1.5-7b-hf"],
        ),
        (
            family("llava_llama"),
            "config.json",
            &["reroute convert", "--vision-tower"],
        ),
        (
            variant("/text_config/hidden_act", json!("relu")),
            "config.json",
            &["not supported", "nearest", "llava-1.5-7b-hf"],
        ),
        (
            adapter,
            "config.json",
            &["adapter", "llava-hf/llava-1.5-7b-hf", "--adapter"],
        ),
        (cache, "config.json", &["snapshots"]),
        (
            files("model-q4.gguf"),
            "model-q4.gguf",
            &["kind that is read", "docs/checkpoints.md"],
        ),
        (
            without(weights, &["model-q4.gguf"]),
            "model-q4.gguf",
            &["kind that is read"],
        ),
        (files("model.onnx"), "weights", &["ONNX", "not supported"]),
        (
            without(weights, &["pytorch_model.bin"]),
            "weights",
            &["reroute convert", "--allow-pickle"],
        ),
        (without(weights, &[]), "weights", &["finish the download"]),
        (
            without("tokenizer.json", &["tokenizer.model"]),
            "tokenizer.json",
            &["tokenizer.model", "AutoTokenizer"],
        ),
        (
            without("tokenizer.json", &["vocab.json", "merges.txt"]),
            "tokenizer.json",
            &["vocab.json", "AutoTokenizer"],
        ),
        (
            quantised("bitsandbytes"),
            "weights",
            &["bitsandbytes", "dequantize"],
        ),
        (
            quantised("hqq"),
            "weights",
            &["hqq", "not supported", "--dtype f16"],
        ),
    ] {
        let (report, well) = doctor(&["--model", &folder.path()]);
        assert!(!well);
        let problems = report["problems"].as_array().expect("a list");
        let is_meant = |problem: &&Value| {
            let text = problem["problem"].as_str().expect("a text");
            let is_file = part.ends_with(".gguf");
            text.starts_with(part) || is_file && text.contains(part)
        };
        let problem = problems.iter().find(is_meant);
        let problem = problem.unwrap_or_else(|| panic!("{part} of {report}"));
        let remedy = problem["remedy"].as_str().expect("a text");
        for words in words {
            assert!(remedy.contains(words), "{words}: {problem}");
        }
        assert!(
            !remedy.contains("xtask") && !remedy.contains("again"),
            "{remedy}"
        );
    }
}

#[test]
fn a_flag_without_a_meaning_is_a_problem() {
    for flags in [
        &["--max-pixels", "5000"][..],
        &["--pad-to-square", "--model", &qwen()],
    ] {
        let (report, well) = doctor(flags);
        assert!(!well);
        assert_eq!(report["problems"][0]["remedy"], "leave the flag out");
    }
}

fn qwen() -> String {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures/qwen25vl/ckpt");
    folder.to_str().expect("UTF-8").to_string()
}

#[test]
fn without_a_configuration_the_other_files_are_still_examined() {
    let folder = Scratch::checkpoint();
    folder.write("config.json", "{}");
    folder.remove("model.safetensors");
    let (report, well) = doctor(&["--model", &folder.path()]);
    assert!(!well);
    let problems = problems(&report);
    assert_eq!(problems.len(), 2, "{problems:?}");
    assert!(problems[0].starts_with("config.json"), "{problems:?}");
    assert!(problems[1].starts_with("weights"), "{problems:?}");
    for nowhere in ["nowhere", "config.json"] {
        let (report, well) = doctor(&["--model", &folder.at(nowhere)]);
        assert!(!well);
        assert_eq!(report["problems"].as_array().map(Vec::len), Some(1));
        let remedy = report["problems"][0]["remedy"].as_str();
        assert!(remedy.expect("a text").contains("holds config.json"));
    }
}

/// What `ask` refuses, the doctor finds.
#[test]
fn a_checkpoint_that_no_question_can_be_put_to_has_a_problem() {
    let image = scene("063");
    let raises = |folder: &Scratch| {
        folder.write("chat_template.jinja", "{{ raise_exception('no') }}");
    };
    let shows_no_image = |folder: &Scratch| {
        folder.write("chat_template.jinja", "{{ messages[0].role }}");
    };
    let knows_no_slot = |folder: &Scratch| {
        folder.set("config.json", "/image_token_index", json!(4_000_000));
    };
    let changes: [&dyn Fn(&Scratch); 3] = [&raises, &shows_no_image, &knows_no_slot];
    for change in changes {
        let folder = Scratch::checkpoint();
        change(&folder);
        let (report, well) = doctor(&["--model", &folder.path()]);
        assert!(!well);
        let problems = problems(&report);
        assert_eq!(problems.len(), 1, "{problems:?}");
        let (part, message) = problems[0].split_once(": ").expect("a part");
        assert_eq!(part, "chat template");
        let model = folder.path();
        let ask = [
            "ask", "--model", &model, "--image", &image, "--prompt", "What?",
        ];
        refuses(&ask, &[message]);
    }
}

/// Larger files are not read.
#[test]
fn an_image_that_is_too_large_is_a_problem() {
    let (report, well) = doctor(&["--image-size", "8001x8000"]);
    assert!(!well);
    let problems = problems(&report);
    assert!(
        problems[0].contains("at most 64000000 pixels"),
        "{problems:?}"
    );
    assert_eq!(problems.len(), 1, "{problems:?}");
}

#[test]
fn a_model_that_no_machine_holds_is_known_before_it_is_loaded() {
    let folder = Scratch::checkpoint();
    folder.set("config.json", "/text_config/num_hidden_layers", json!(1000));
    folder.set(
        "config.json",
        "/text_config/intermediate_size",
        json!(1 << 23),
    );
    let (report, well) = doctor(&["--model", &folder.path()]);
    assert!(!well);
    // A graphics card does not say how much memory it has.
    let known = !report["available_bytes"].is_null() || !report["memory_bytes"].is_null();
    let problems = problems(&report);
    let told = problems
        .iter()
        .any(|problem| problem.contains("dense answer needs"));
    assert_eq!(told, known, "{problems:?}");
    let weights = &need(&report, "dense")["weights_bytes"];
    assert!(weights.as_u64().expect("bytes") > 1 << 40);
}

#[test]
fn a_type_that_the_backend_does_not_compute_in_is_a_problem() {
    let (report, well) = doctor(&["--dtype", "f16"]);
    let computes = report["dtypes"].as_array().expect("a list");
    assert_eq!(well, computes.contains(&json!("f16")), "{report}");
    if !well {
        assert!(problems(&report)[0].contains("f16"), "{report}");
    }
}

#[test]
fn more_tokens_than_positions_are_a_problem() {
    let (report, well) = doctor(&["--text-tokens", "4000000000"]);
    assert!(!well);
    assert!(problems(&report)[0].contains("positions"), "{report}");

    // Where the picture alone takes all of them, no text is short enough.
    let folder = Scratch::checkpoint();
    folder.set(
        "config.json",
        "/text_config/max_position_embeddings",
        json!(4),
    );
    let (report, well) = doctor(&["--model", &folder.path()]);
    assert!(!well);
    let remedy = report["problems"][0]["remedy"].as_str().expect("a text");
    assert!(remedy.contains("a model of more positions"), "{report}");
}

#[test]
fn routings_that_the_model_refuses_need_no_memory() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures/qwen25vl/ckpt");
    let (report, well) = doctor(&["--model", folder.to_str().expect("UTF-8")]);
    assert!(well, "{report}");
    let needs = report["needs"].as_array().expect("a list");
    let listed = |method: &str| {
        let mut names = needs.iter().map(|need| need["routing"].as_str());
        names.any(|name| name.is_some_and(|name| name.starts_with(method)))
    };
    // It renumbers positions, of which this family has three axes.
    assert!(listed("pdrop@") && !listed("pdrop-original@"), "{report}");
}

#[test]
fn a_size_that_is_none_is_refused() {
    for size in ["0x100", "100", "100x", "axb", "100000x1"] {
        refuses(&["doctor", "--image-size", size], &["1024x768"]);
    }
    refuses(&["doctor", "--text-tokens", "-3"], &["invalid value '-3'"]);
}
