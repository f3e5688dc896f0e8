//! Models assembled of parts: towers as torch exports them to ONNX, and folders, are those of transformers
//! (`make_onnx.py`).

use std::fs;
use std::panic::{AssertUnwindSafe, catch_unwind};

use burn::tensor::DType;
use reducers::Schedule;
use reroute_cli::backend::{Backend, Device};
use reroute_convert::{Assembly, Form, Job, Plan};
use reroute_zoo::messages::{Content, Message, Role};
use reroute_zoo::{
    ChatTemplate, Folder, OpenOptions, Pictures, PixelTensors, TensorInputs, Tokenizer, Visual, Vlm,
};
use serde_json::Value;

use super::{contents, convert};
use crate::golden::{Reference, assert_close, fixture, picture, rows, values};
use crate::program::{Named, Scratch, refuses, reroute, safetensors};

/// As that of the other variants of LLaVA.
const TOLERANCE: f32 = 2e-4;

fn job(tower: &str, to: &Scratch) -> Job {
    Job {
        assembly: Some(Assembly::default()),
        vision_tower: Some(fixture("onnx").join(tower)),
        ..Job::new(fixture("onnx/decoder"), to.at("hf"))
    }
}

fn assembled(job: &Job) -> Vlm<Backend> {
    convert(job).unwrap_or_else(|error| panic!("{error}"));
    let options = OpenOptions {
        dtype: DType::F32,
        ..OpenOptions::default()
    };
    let folder = Folder::open(&job.to).unwrap();
    Vlm::open(&folder, &options, &Device::default()).unwrap()
}

fn sized(tower: &str, to: &Scratch, image_size: usize) -> Job {
    let mut job = job(tower, to);
    // As the file has it, which features are compared with.
    job.dtype = Some(reroute_checkpoint::Dtype::F32);
    job.assembly.as_mut().unwrap().image_size = Some(image_size);
    job
}

#[test]
fn features_and_text_are_those_of_the_library() {
    let golden = Reference::open("onnx/golden");
    for (tower, side, name, tokens) in [
        ("facebook.onnx", 28, "dinov2_28", 16),
        ("facebook.onnx", 42, "dinov2_42", 36),
        ("transformers.onnx", 28, "dinov2_28", 16),
        ("transformers.onnx", 42, "dinov2_42", 36),
        ("clip.onnx", 42, "clip", 36),
        ("siglip.onnx", 42, "siglip", 36),
    ] {
        let to = Scratch::new();
        let vlm = assembled(&sized(tower, &to, side));
        let image = Visual::Image(picture("llava_variants/picture.png"));
        let (view, prepared) = vlm.preprocessor().prepare(&image).unwrap();
        assert_eq!(view.token_count(), tokens, "{tower}");
        let pixels = PixelTensors::of(vec![prepared], vlm.device()).unwrap();
        let Some(Pictures::Fixed(found)) = &pixels.images else {
            panic!("{tower}: squares");
        };
        let expected = golden.floats(&format!("{name}.pixel_values"));
        assert!(values(found.clone()) == expected, "{tower}: pixels");
        let run = |ids: Vec<u32>, pixels| {
            let inputs = TensorInputs {
                samples: vec![ids],
                pixels,
                second_per_grid_ts: Vec::new(),
            };
            let out = vlm.run_tensors(inputs, Schedule::dense(), 0, false);
            out.unwrap()
        };
        let out = run([vec![3; tokens], vec![10]].concat(), pixels);
        let features = out.tokens.features.as_ref().unwrap();
        let expected = golden.floats(&format!("{name}.features"));
        assert_close(tower, &rows(features), &expected, TOLERANCE);
        assert_eq!(out.tokens.images.unwrap().tokens.dims(), [32, tokens]);
        let logits = values(run(golden.ids("text.ids"), PixelTensors::default()).logits);
        let expected = golden.floats("text.logits");
        let last = &expected[expected.len() - logits.len()..];
        assert_close(tower, &logits, last, TOLERANCE);
    }
}

/// Whoever named the weights, and wherever they were folded to, they are the same; and so they are from a folder.
#[test]
fn every_export_of_a_tower_has_the_same_weights() {
    let model = "hf/model.safetensors";
    let to = [Scratch::new(), Scratch::new(), Scratch::new()];
    convert(&sized("facebook.onnx", &to[0], 28)).unwrap();
    convert(&sized("transformers.onnx", &to[1], 28)).unwrap();
    let expected = contents(to[0].at(model));
    assert!(contents(to[1].at(model)) == expected);

    // The tower alone, as transformers saves it.
    let tower = Scratch::new();
    let tensors: Vec<Named> = (expected.iter())
        .filter_map(|(name, (dtype, shape, bytes))| {
            let name = name.strip_prefix("vision_tower.")?;
            Some((name, *dtype, shape.clone(), bytes.clone()))
        })
        .collect();
    tower.write("model.safetensors", safetensors(&tensors));
    let config: Value = serde_json::from_slice(&to[0].read("hf/config.json")).unwrap();
    tower.write("config.json", config["vision_config"].to_string());
    let mut job = sized("", &to[2], 28);
    job.vision_tower = Some(tower.path().into());
    convert(&job).unwrap();
    assert!(contents(to[2].at(model)) == expected);
    for name in ["config.json", "preprocessor_config.json"] {
        let name = format!("hf/{name}");
        assert_eq!(to[2].read(&name), to[0].read(&name), "{name}");
    }
}

/// In two parts here.
#[test]
fn a_decoder_may_be_a_gguf_file() {
    let to = Scratch::new();
    let mut job = job("facebook.onnx", &to);
    job.from = fixture("gguf_models/llava_smol/llava_smol-F32-00001-of-00002.gguf");
    assembled(&job);
    let files = contents(to.at("hf/model.safetensors"));
    assert!(files.contains_key("language_model.model.embed_tokens.weight"));
    let config: Value = serde_json::from_slice(&to.read("hf/config.json")).unwrap();
    assert_eq!(config["text_config"]["model_type"], "llama");
}

#[test]
fn a_folder_says_what_it_is() {
    let to = Scratch::new();
    convert(&job("transformers.onnx", &to)).unwrap();
    let read = |name: &str| -> Value { serde_json::from_slice(&to.read(name)).unwrap() };
    let config = read("hf/config.json");
    for (pointer, expected) in [
        ("/model_type", Value::from("llava")),
        ("/image_token_index", 3.into()),
        ("/image_seq_length", 36.into()),
        ("/tie_word_embeddings", true.into()),
        // What the decoder says.
        ("/torch_dtype", "float16".into()),
        ("/text_config/dtype", "float16".into()),
        ("/text_config/model_type", "llama".into()),
        ("/vision_config/model_type", "dinov2".into()),
        ("/vision_config/image_size", 42.into()),
        ("/vision_config/num_attention_heads", 4.into()),
        ("/vision_config/num_hidden_layers", 2.into()),
        ("/vision_config/mlp_ratio", 2.into()),
        ("/vision_config/hidden_act", "gelu".into()),
        ("/vision_feature_layer", (-1).into()),
    ] {
        assert_eq!(config.pointer(pointer), Some(&expected), "{pointer}");
    }
    let clip = Scratch::new();
    convert(&job("clip.onnx", &clip)).unwrap();
    let clip: Value = serde_json::from_slice(&clip.read("hf/config.json")).unwrap();
    assert_eq!(clip["vision_config"]["hidden_act"], "quick_gelu");
    assert_eq!(clip["vision_config"]["num_attention_heads"], 4);

    let tokenizer = Tokenizer::from_json(&to.read("hf/tokenizer.json"), &[3]).unwrap();
    assert_eq!(tokenizer.id("<image>"), Some(3));
    assert_eq!(tokenizer.id("<repo_name>"), None);
    let said = read("hf/tokenizer_config.json");
    assert_eq!(said["extra_special_tokens"][0], "<image>");
    assert_eq!(read("hf/processor_config.json")["patch_size"], 7);
    let names = [
        "chat_template.jinja",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "preprocessor_config.json",
        "processor_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
    ];
    let mut found: Vec<String> = (fs::read_dir(to.at("hf")).unwrap())
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    found.sort();
    assert_eq!(found, names);
}

#[test]
fn a_template_of_texts_takes_images_as_in_transformers() {
    let to = Scratch::new();
    let vlm = assembled(&job("facebook.onnx", &to));
    let dialect = llava::DIALECT;
    let template = ChatTemplate::open(&Folder::open(to.at("hf")).unwrap(), dialect).unwrap();
    let cases = fs::read(fixture("onnx/templates.json")).unwrap();
    let cases: Vec<Value> = serde_json::from_slice(&cases).unwrap();
    let part = |part: &Value| match part["text"].as_str() {
        Some(text) => Content::Text(text.into()),
        None => Content::Image,
    };
    let message = |message: &Value| Message {
        role: match message["role"].as_str() {
            Some("system") => Role::System,
            Some("user") => Role::User,
            _ => Role::Assistant,
        },
        content: match &message["content"] {
            Value::Array(parts) => parts.iter().map(part).collect(),
            text => vec![Content::Text(text.as_str().unwrap().into())],
        },
    };
    for case in &cases {
        let messages = case["messages"].as_array().unwrap();
        let messages: Vec<Message> = messages.iter().map(message).collect();
        let found = template.render_conversation(&messages, true).unwrap();
        assert_eq!(found, case["rendered"].as_str().unwrap());
        let images = messages.iter().flat_map(|message| &message.content);
        let images = images.filter(|part| **part == Content::Image).count();
        let ids = template.encode(vlm.tokenizer(), &messages, true).unwrap();
        assert_eq!(ids.iter().filter(|&&id| id == 3).count(), images);
    }
}

#[test]
fn a_projector_is_that_of_its_seed_and_of_no_run_before() {
    let model = "hf/model.safetensors";
    let projector = |seed: u64| {
        let to = Scratch::new();
        let mut job = job("clip.onnx", &to);
        job.assembly.as_mut().unwrap().seed = seed;
        convert(&job).unwrap();
        contents(to.at(model))
    };
    let (first, other) = (projector(0), projector(1));
    assert!(projector(0) == first);
    for (name, tensor) in &first {
        let is_random = name.starts_with("multi_modal_projector.") && name.ends_with("weight");
        assert_eq!(other[name] != *tensor, is_random, "{name}");
    }
    let to = Scratch::new();
    let mut job = job("clip.onnx", &to);
    for (seed, resumed) in [(0, true), (1, false)] {
        let bytes = Plan::new(&job).unwrap().total_bytes();
        let plan = Plan::new(&job).unwrap();
        let run = catch_unwind(AssertUnwindSafe(|| {
            plan.write(&mut |now| assert!(now.done_bytes < bytes * 9 / 10, "interrupted"))
        }));
        assert!(run.is_err(), "it was not interrupted");
        job.assembly.as_mut().unwrap().seed = seed;
        let report = convert(&job).unwrap();
        assert_eq!(report.resumed > 0, resumed);
        assert!(
            contents(to.at(model))
                == if seed == 0 {
                    first.clone()
                } else {
                    other.clone()
                }
        );
        fs::remove_dir_all(to.at("hf")).unwrap();
        job.assembly.as_mut().unwrap().seed = 0;
    }
}

#[test]
fn the_program_assembles_and_the_result_answers() {
    let to = Scratch::new();
    let at = |path: &str| fixture(path).display().to_string();
    let (tower, decoder) = (at("onnx/facebook.onnx"), at("onnx/decoder"));
    let parts = ["convert", "--assemble", "llava", "--vision-tower", &tower];
    let folder = to.at("made");
    let size = ["--decoder", &decoder, "--image-size", "28"];
    let rest = [&size[..], &["--to", &folder]].concat();
    let flags = [&parts[..], &rest].concat();
    let listed = reroute(&[&flags[..], &["--dry-run"]].concat()).unwrap();
    assert!(
        listed.contains("multi_modal_projector.linear_1.weight [32, 32]"),
        "{listed}"
    );
    assert!(fs::read_dir(&folder).is_err(), "a dry run writes nothing");
    reroute(&flags).unwrap();
    let image = at("llava_variants/picture.png");
    let ask = [
        "ask", "--model", &folder, "--image", &image, "--prompt", "What?",
    ];
    reroute(&[&ask[..], &["--max-new-tokens", "2"]].concat()).unwrap();

    // The same from the facade's point of view, in other forms.
    for form in [Form::Burnpack, Form::Safetensors] {
        let mut job = sized("facebook.onnx", &to, 28);
        job.form = Some(form);
        job.to = to.at(&format!("{form:?}")).into();
        assembled(&job);
    }

    refuses(&parts, &["--decoder"]);
    refuses(
        &["convert", "--decoder", &decoder, "--to", "x"],
        &["--assemble"],
    );
    refuses(&["convert", "--to", "x"], &["--from"]);
    let llava = at("llava/ckpt");
    let free = to.at("free");
    let with = |changes: &[&str]| {
        let mut flags: Vec<String> = [&parts[..], &["--to", &free, "--format", "burnpack"]]
            .concat()
            .into_iter()
            .map(str::to_owned)
            .collect();
        flags.extend(changes.iter().map(|&flag| flag.to_owned()));
        flags
    };
    for (changes, expected) in [
        (
            &["--decoder", &decoder, "--image-size", "30"][..],
            "multiple of its patches of 7",
        ),
        (
            &["--decoder", &decoder, "--image-token", "<none>"],
            "<repo_name>",
        ),
        (&["--decoder", &llava], "model_type is \"llava\""),
    ] {
        refuses(&with(changes), &[expected]);
    }
    let clip = at("onnx/clip.onnx");
    let other = ["convert", "--assemble", "llava", "--vision-tower", &clip];
    let rest = [&size[..], &["--to", &free]].concat();
    refuses(&[&other[..], &rest].concat(), &["those of 42 pixels"]);
    let other = ["convert", "--assemble", "llava", "--vision-tower", &decoder];
    refuses(
        &[&other[..], &rest].concat(),
        &["no tower is found", "supported are"],
    );
}
