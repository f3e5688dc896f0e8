//! Adapters on the command line.

use reducers::Schedule;
use reroute_cli::backend::{Backend, Device};
use reroute_zoo::{Folder, OpenOptions, Question, Vlm};
use serde_json::json;

use crate::golden::fixture;
use crate::program::{Scratch, read_image, refuses, report, reroute, scene};

fn path(name: &str) -> String {
    fixture(name).to_str().expect("UTF-8").to_owned()
}

/// Every command that opens a model takes adapters, several at once, beside the weights or in them.
#[test]
fn commands_answer_with_adapters() {
    let (model, first) = (path("llava/ckpt"), path("adapters/llava"));
    let (second, picture) = (path("adapters/llava_second"), scene("063"));
    let ask = [
        "ask", "--model", &model, "--image", &picture, "--prompt", "what?",
    ];
    let ask = [&ask[..], &["--max-new-tokens", "6"]].concat();
    let answers = |flags: &[&str]| report(&[&ask[..], flags].concat())["tokens"].clone();
    let both = ["--adapter", &first, "--adapter", &second];
    let [plain, one, two] = [&[][..], &both[..2], &both].map(answers);
    assert!(
        plain != one && one != two && two != plain,
        "{plain} {one} {two}"
    );
    assert_eq!(answers(&[&both[..], &["--merge-adapter"]].concat()), two);
    // Costs are counted without.
    let presets = ["presets", "--model", &model];
    assert_eq!(report(&[&presets[..], &both].concat()), report(&presets));
    let other = path("adapters/qwen25vl");
    refuses(
        &[&presets[..], &["--adapter", &other]].concat(),
        &["adapter"],
    );

    let adapters = [first.as_str(), &second].map(|path| Folder::open(path).expect("a folder"));
    let options = OpenOptions {
        adapters: adapters.into(),
        ..OpenOptions::default()
    };
    let folder = Folder::open(&model).expect("a folder");
    let vlm = Vlm::<Backend>::open(&folder, &options, &Device::default()).expect("it opens");
    let question = Question::about(vec![read_image(&picture)], "what?");
    let mut options = vlm.generation_defaults();
    options.max_new_tokens = 6;
    let answer = vlm.ask(&question, Schedule::dense(), &options, |_| {});
    assert_eq!(json!(answer.expect("a good question").tokens), two);

    let scratch = Scratch::new();
    let traced = |name: &str, flags: &[&str]| {
        let (inputs, out) = (path("llava/golden.safetensors"), scratch.at(name));
        let trace = [
            "trace", "--model", &model, "--inputs", &inputs, "--out", &out,
        ];
        reroute(&[&trace[..], flags].concat()).expect("good inputs");
        std::fs::read(out).expect("it is written")
    };
    assert_ne!(traced("plain", &[]), traced("adapted", &both));
    let (doctor, _) = crate::doctor::doctor(&[&["--model", &model][..], &both].concat());
    assert_eq!(doctor["problems"], json!([]));
}

#[test]
fn adapters_that_do_not_fit_are_refused_before_the_weights_are_read() {
    let (model, other) = (path("llava/ckpt"), path("adapters/qwen25vl"));
    let picture = scene("063");
    let ask = [
        "ask", "--model", &model, "--image", &picture, "--prompt", "what?",
    ];
    let with = |adapter: &str| [&ask[..], &["--adapter", adapter]].concat().join("\n");
    let refused = |adapter: &str, expected: &[&str]| {
        let flags = with(adapter);
        refuses(&flags.split('\n').collect::<Vec<_>>(), expected);
    };
    refused(
        &other,
        &[
            &other,
            "for \"tests/fixtures/qwen25vl/ckpt\"",
            "does not fit this model",
        ],
    );
    refused(
        "nowhere",
        &["nowhere", "cannot be opened", "adapter_config.json"],
    );
    refused(&model, &["adapter_config.json", "of an adapter"]);
    refused("no/such-adapter", &["hf download no/such-adapter"]);
    refuses(&[&ask[..], &["--merge-adapter"]].concat(), &["--adapter"]);
    let (doctor, well) = crate::doctor::doctor(&["--model", &model, "--adapter", &other]);
    assert!(!well);
    let problem = doctor["problems"][0]["problem"].as_str().expect("a text");
    assert!(problem.starts_with("adapter: "), "{problem}");
    let remedy = doctor["problems"][0]["remedy"].as_str().expect("a text");
    assert!(!remedy.contains("PeftModel"), "{remedy}");
    let (doctor, _) = crate::doctor::doctor(&["--model", "no/such-model"]);
    let remedy = doctor["problems"][0]["remedy"].as_str().expect("a text");
    assert!(remedy.contains("hf download no/such-model"), "{remedy}");
}
