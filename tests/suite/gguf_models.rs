//! Models as llama.cpp keeps them, a language model and its tower, against what llama.cpp answers and what
//! transformers makes of the same numbers (`make_gguf_models.py`).

mod said;

use std::fs;
use std::path::PathBuf;

use burn::tensor::DType;
use reducers::Schedule;
use reroute_checkpoint::{CheckpointError, Layout, Shards};
use reroute_cli::backend::{self, Backend};
use reroute_zoo::{
    Folder, Modality, OpenOptions, PixelTensors, Question, TensorInputs, TensorOutputs, Visual, Vlm,
};
use serde::Deserialize;

use crate::golden::{Reference, assert_close, fixture, picture};
use crate::program::{Scratch, refuses, report, reroute};

/// Models, and how far llama.cpp may be from them: it rounds what goes into products with f16 weights to f16, into
/// those with blocks to blocks of int8, and towers to f16. transformers in f32 is as far from it.
const MODELS: [(&str, f32); 8] = [
    ("llava", 0.1),
    ("llava_smol", 0.1),
    ("llava_qwen2", 0.1),
    ("qwen2vl", 0.1),
    ("qwen25vl", 0.1),
    ("qwen3vl", 0.1),
    ("qwen3vl_q8_0", 2.0),
    ("llava_q4_k", 2.5),
];

/// As that of the families' parity.
const TOLERANCE: f32 = 2e-4;

#[derive(Deserialize)]
struct Expected {
    tokens: Vec<Text>,
    text: Prompt,
    image: Picture,
    #[serde(default)]
    chat: Option<Chat>,
}

/// What a template writes.
#[derive(Deserialize)]
struct Chat {
    image: String,
}

#[derive(Deserialize)]
struct Text {
    text: String,
    special: Vec<u32>,
    ids: Vec<u32>,
}

#[derive(Deserialize)]
struct Prompt {
    ids: Vec<u32>,
    greedy: Vec<u32>,
}

#[derive(Deserialize)]
struct Picture {
    before: Vec<u32>,
    rows: usize,
    after: Vec<u32>,
    greedy: Vec<u32>,
}

struct Model {
    name: &'static str,
    apart: f32,
    vlm: Vlm<Backend>,
    expected: Expected,
    numbers: Reference,
}

fn all() -> impl Iterator<Item = Model> {
    MODELS.into_iter().map(|(name, apart)| {
        let path = fixture(&format!("gguf_models/{name}"));
        let folder = Folder::open(&path).unwrap_or_else(|error| panic!("{name}: {error}"));
        let device = backend::device().expect("a device");
        let vlm = Vlm::open(&folder, &OpenOptions::default(), &device);
        let expected = fs::read(path.join("expected.json")).expect("the fixture is complete");
        Model {
            name,
            apart,
            vlm: vlm.unwrap_or_else(|error| panic!("{name}: {error}")),
            expected: serde_json::from_slice(&expected).expect("the fixture is complete"),
            numbers: Reference::open(&format!("gguf_models/{name}/expected")),
        }
    })
}

/// Logarithms of probabilities.
fn logprobs(logits: &[f32]) -> Vec<f32> {
    let most = logits.iter().copied().fold(f32::MIN, f32::max);
    let sum: f64 = logits.iter().map(|x| f64::from(x - most).exp()).sum();
    let sum = most + sum.ln() as f32;
    logits.iter().map(|x| x - sum).collect()
}

impl Model {
    fn run(&self, ids: Vec<u32>, pixels: PixelTensors<Backend>) -> TensorOutputs<Backend> {
        let inputs = TensorInputs {
            samples: vec![ids],
            pixels,
            second_per_grid_ts: Vec::new(),
        };
        let out = self.vlm.run_tensors(inputs, Schedule::dense(), 8, false);
        out.unwrap_or_else(|error| panic!("{}: {error}", self.name))
    }

    /// Compares every step with transformers, and with llama.cpp.
    fn check(&self, what: &str, out: TensorOutputs<Backend>, greedy: &[u32]) {
        let name = format!("{} {what}", self.name);
        let generation = &out.generations[0];
        assert_eq!(generation.tokens, greedy, "{name}");
        let found: Vec<f32> = generation
            .logits
            .iter()
            .flat_map(|step| logprobs(step))
            .collect();
        let exact = self.numbers.floats(&format!("reference.{what}.logprobs"));
        assert_close(&name, &found, &exact, TOLERANCE);
        let rounded = self.numbers.floats(&format!("{what}.logprobs"));
        assert_close(&name, &found, &rounded, self.apart);
    }
}

#[test]
fn texts_become_the_tokens_of_llama_cpp() {
    for model in all() {
        // `<image>` is a picture's place in LLaVA, whatever token the file has for it; llama.cpp does not compose
        // letters and accents, as Qwen's tokenizer does.
        let is_llava = model.name.starts_with("llava");
        let others: &[&str] = if is_llava {
            &["<image>", "<unk>", "<|image_pad|>", "e\u{301}"]
        } else {
            &["e\u{301}"]
        };
        let is_same = |text: &&Text| !others.iter().any(|part| text.text.contains(part));
        for Text { text, special, ids } in model.expected.tokens.iter().filter(is_same) {
            for (ids, added) in [(special, true), (ids, false)] {
                let found = model.vlm.tokenizer().encode(text, added).expect("a text");
                assert_eq!(&found, ids, "{}: {text:?} {added}", model.name);
            }
        }
    }
}

#[test]
fn logits_and_answers_of_a_text_are_those_of_llama_cpp() {
    for model in all() {
        let Prompt { ids, greedy } = &model.expected.text;
        let out = model.run(ids.clone(), PixelTensors::default());
        model.check("text", out, greedy);
    }
}

#[test]
fn logits_and_answers_about_a_picture_are_those_of_llama_cpp() {
    for model in all() {
        let image = picture(&format!("gguf_models/{}/picture.png", model.name));
        let prepared = model.vlm.preprocessor().prepare(&Visual::Image(image));
        let (view, prepared) = prepared.expect("a good picture");
        let asked = &model.expected.image;
        assert_eq!(
            view.tokens.iter().product::<usize>(),
            asked.rows,
            "{}",
            model.name
        );
        let pixels = PixelTensors::of(vec![prepared], model.vlm.device()).expect("one picture");
        let slot = model
            .vlm
            .config()
            .slots()
            .of(Modality::Image)
            .expect("it sees pictures");
        let slots = vec![slot; asked.rows];
        let ids = [&asked.before[..], &slots, &asked.after].concat();
        model.check("image", model.run(ids, pixels), &asked.greedy);
    }
}

#[test]
fn questions_are_written_as_the_template_of_the_file_has_them() {
    let mut templates = 0;
    for model in all() {
        let Some(chat) = &model.expected.chat else {
            continue;
        };
        templates += 1;
        let place = match model.name.starts_with("llava") {
            true => "<image>\n",
            false => "<|vision_start|><|image_pad|><|vision_end|>",
        };
        let written = chat.image.replace("<__media__>", place);
        let image = picture(&format!("gguf_models/{}/picture.png", model.name));
        let question = Question::about(vec![image], "Where is it?");
        let slot = model.vlm.config().slots().of(Modality::Image);
        let tokens = model
            .vlm
            .tokenizer()
            .encode(&written, false)
            .expect("a text");
        let expected = tokens.into_iter().flat_map(|id| {
            let rows = if Some(id) == slot {
                model.expected.image.rows
            } else {
                1
            };
            std::iter::repeat_n(id, rows)
        });
        let found = model.vlm.encode(&question).expect("a good question");
        assert_eq!(found, expected.collect::<Vec<u32>>(), "{}", model.name);
    }
    assert!(templates >= 4);
}

/// The language model and the tower of a folder.
fn files(name: &str) -> [String; 2] {
    let folder = fixture(&format!("gguf_models/{name}"));
    let entries = folder.read_dir().expect("the fixture is complete");
    let mut paths: Vec<PathBuf> = entries.map(|entry| entry.expect("a file").path()).collect();
    paths.retain(|path| path.extension().is_some_and(|end| end == "gguf"));
    paths.sort();
    let is_tower = |path: &PathBuf| path.to_string_lossy().contains("mmproj");
    let tower = paths.iter().find(|path| is_tower(path)).expect("a tower");
    let language = paths
        .iter()
        .find(|path| !is_tower(path))
        .expect("a language model");
    [language, tower].map(|path| path.display().to_string())
}

/// Written as a folder that transformers loads, or as Burnpack, the numbers are the same.
#[test]
fn conversions_have_the_numbers_of_the_file() {
    for (name, dtype) in [
        ("llava", None),
        ("qwen2vl", None),
        ("qwen3vl_q8_0", Some("f32")),
    ] {
        let [language, tower] = files(name);
        let source = Folder::open_gguf(&language, Some(tower.as_ref())).expect("a good pair");
        let source = Shards::open(&source).expect("its weights");
        let scratch = Scratch::new();
        for format in ["hf", "burnpack"] {
            let to = scratch.at(format);
            let mut flags = vec![
                "convert", "--from", &language, "--mmproj", &tower, "--to", &to,
            ];
            flags.extend(["--format", format]);
            flags.extend(dtype.iter().flat_map(|dtype| ["--dtype", dtype]));
            reroute(&flags).unwrap_or_else(|error| panic!("{name}: {error}"));
            let folder = Folder::open(&to).expect("a folder");
            let written = Shards::open(&folder).expect("its weights");
            assert!(written.names().eq(source.names()), "{name}");
            for tensor in source.names() {
                let read = |shards: &Shards| {
                    let data = shards.read(tensor, DType::F32, Layout::AsStored);
                    data.expect("numbers").into_vec::<f32>().expect("f32")
                };
                let bits = |numbers: Vec<f32>| numbers.into_iter().map(f32::to_bits);
                assert!(
                    bits(read(&written)).eq(bits(read(&source))),
                    "{name} {tensor}"
                );
            }
            let picture = fixture(&format!("gguf_models/{name}/picture.png"));
            let picture = picture.display().to_string();
            let flags = [
                "--image",
                &picture,
                "--prompt",
                "x",
                "--max-new-tokens",
                "4",
            ];
            let answer = |model: &[&str]| {
                let flags = [&["ask"], model, &flags].concat();
                report(&flags)["tokens"].clone()
            };
            let expected = answer(&["--model", &language, "--mmproj", &tower]);
            assert_eq!(answer(&["--model", &to]), expected, "{name}");
        }
    }
}

/// A folder with these files of others.
fn folder_of(files: &[(&str, &String)]) -> Scratch {
    let scratch = Scratch::new();
    for (name, file) in files {
        scratch.write(name, fs::read(file).expect("a file"));
    }
    scratch
}

#[test]
fn a_pair_is_opened_by_its_folder_or_by_its_files() {
    let [language, tower] = files("qwen3vl");
    let folder = folder_of(&[("a.gguf", &language), ("b.gguf", &tower)]);
    for path in [folder.path(), folder.at("a.gguf"), language.clone()] {
        let folder = Folder::open(&path).unwrap_or_else(|error| panic!("{path}: {error}"));
        assert!(folder.describe().ends_with(".gguf"));
        assert!(Shards::open(&folder).is_ok());
    }
    let in_memory = [("a.gguf", &language), ("b.gguf", &tower)]
        .map(|(name, path)| (name.to_owned(), fs::read(path).expect("a file")));
    let in_memory = Folder::in_memory(in_memory)
        .with_gguf()
        .expect("a good pair");
    assert!(in_memory.has("config.json"));

    // Several of a kind have to be named.
    let several = folder_of(&[
        ("a.gguf", &language),
        ("b.gguf", &language),
        ("c.gguf", &tower),
        ("d.gguf", &tower),
    ]);
    let refused = |result: Result<Folder, CheckpointError>, expected: &str| {
        let error = result.expect_err("it is refused").to_string();
        assert!(error.contains(expected), "{error}");
    };
    refused(Folder::open(several.path()), "several language models");
    refused(Folder::open(several.at("a.gguf")), "several towers");
    // Nobody has asked for what lies beside a file.
    let beside = folder_of(&[("a.gguf", &language), ("b.gguf", &tower)]);
    beside.write("c.gguf", "damaged");
    assert!(Folder::open(beside.at("a.gguf")).is_ok());
    refused(Folder::open(beside.path()), "c.gguf");
    let path = several.at("d.gguf");
    assert!(Folder::open_gguf(several.at("a.gguf"), Some(path.as_ref())).is_ok());

    // What does not go together.
    let [llava, llava_tower] = files("llava_qwen2");
    refused(
        Folder::open_gguf(&language, Some(llava_tower.as_ref())),
        "of another model",
    );
    refused(
        Folder::open_gguf(&llava, Some(tower.as_ref())),
        "of another model",
    );
    refused(
        Folder::open_gguf(&tower, Some(language.as_ref())),
        "vision tower",
    );
    let [wide, _] = files("llava_q4_k");
    for (model, mmproj, expected) in [
        (&language, &language, "no tower"),
        (&wide, &llava_tower, "features"),
        (&several.at("z.gguf"), &tower, "not there"),
        (&language, &several.path(), "name the file in it"),
        (&Scratch::checkpoint().path(), &tower, "leave --mmproj out"),
    ] {
        refused(Folder::open_gguf(model, Some(mmproj.as_ref())), expected);
    }
    refused(Folder::open_decoder(&language), "a decoder is");
    // Whatever it is called.
    let nameless = folder_of(&[("a", &llava)]);
    assert!(Folder::open(nameless.at("a")).is_ok());
    let pointer = Scratch::new();
    pointer.write("a.gguf", "version https://git-lfs.github.com/spec/v1\n");
    refused(Folder::open(pointer.path()), "git lfs pull");
    let to = pointer.at("x.safetensors");
    refuses(
        &[
            "convert", "--from", &language, "--mmproj", &tower, "--to", &to,
        ],
        &["give a folder"],
    );
    let to = pointer.at("x.gguf");
    refuses(
        &[
            "convert", "--from", &language, "--mmproj", &tower, "--to", &to,
        ],
        &["not written"],
    );
    refused(
        Folder::open(folder_of(&[("b.gguf", &tower)]).path()),
        "no language model",
    );
    refused(
        Folder::open(folder_of(&[("a.gguf", &language)]).path()),
        "mmproj",
    );
    let alone = folder_of(&[("a.gguf", &llava)]);
    refuses(
        &["presets", "--model", &alone.path()],
        &["--mmproj", "--assemble"],
    );
    refuses(
        &["ask", "--model", &several.path(), "--prompt", "x"],
        &["several language models", "--mmproj"],
    );
}

/// A tokenizer, a template and settings beside the file count for more than what it says.
#[test]
fn files_beside_count_for_more() {
    let [language, tower] = files("qwen25vl");
    let folder = folder_of(&[("a.gguf", &language), ("b.gguf", &tower)]);
    folder.write("generation_config.json", r#"{"eos_token_id": 7}"#);
    folder.write("chat_template.jinja", "x");
    let opened = folder.folder();
    let read = |name: &str| opened.read(name, 1 << 20).expect("a file");
    assert_eq!(read("generation_config.json"), br#"{"eos_token_id": 7}"#);
    assert_eq!(read("chat_template.jinja"), b"x");
    folder.write("tokenizer.json", "{}");
    let opened = folder.folder();
    assert_eq!(
        opened.read("tokenizer.json", 1 << 20).expect("a file"),
        b"{}"
    );
    let [language, tower] = files("llava");
    let llava = folder_of(&[("a.gguf", &language), ("b.gguf", &tower)]);
    llava.write("tokenizer.json", "{}");
    let error = Folder::open(llava.path()).expect_err("no place for a picture");
    assert!(error.to_string().contains("<image>"), "{error}");
}
