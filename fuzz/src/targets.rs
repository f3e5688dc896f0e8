//! What is done with bytes that claim to be files or requests, through the doors that these come in by.

use reroute_checkpoint::{Gguf, Layout, LinearMap, NameTable, Onnx, Rule, Shards, read_adapter};
use reroute_serve::{Limits, check};
use reroute_zoo::burn::tensor::DType;
use reroute_zoo::messages::{Content, Message, Role};
use reroute_zoo::{ChatTemplate, Dialect, Folder, OpenOptions, Outline, Tokenizer};

/// What a file of `fuzz/corpus/NAME` is given to.
pub type Target = fn(&[u8]);

/// Every target, by name.
pub const TARGETS: [(&str, Target); 9] = [
    ("adapter", adapter),
    ("gguf", gguf),
    ("model", model),
    ("onnx", onnx),
    ("processor", processor),
    ("request", request),
    ("safetensors", safetensors),
    ("template", template),
    ("tokenizer", tokenizer),
];

/// Longest tensor that is read whole, in bytes.
const WHOLE: u64 = 1 << 20;

/// Files one behind the other, each with its length in four bytes before it; the last may be cut off.
fn files<const N: usize>(names: [&str; N], mut data: &[u8]) -> Folder {
    let mut found = Vec::new();
    for name in names {
        let Some((length, rest)) = data.split_first_chunk::<4>() else {
            break;
        };
        let length = u32::from_le_bytes(*length) as usize;
        let (file, rest) = rest.split_at(length.min(rest.len()));
        data = rest;
        // A length of none at all is a file that is not there.
        if length > 0 {
            found.push((name.to_owned(), file.to_vec()));
        }
    }
    Folder::in_memory(found)
}

fn one(name: &str, data: &[u8]) -> Folder {
    Folder::in_memory([(name.to_owned(), data.to_vec())])
}

/// Reads rows of every tensor, and small ones whole.
fn read(shards: &Shards) {
    let names: Vec<String> = shards.names().map(str::to_owned).collect();
    for name in names {
        let Some(info) = shards.info(&name) else {
            continue;
        };
        let rows = info.shape.first().copied().unwrap_or(1);
        let last = rows.saturating_sub(1)..rows;
        if info.bytes <= WHOLE {
            let _ = shards.stored_codes(&name, 0..rows);
            let _ = shards.read(&name, DType::F16, Layout::Transposed);
            let _ = shards.read(&name, DType::F32, Layout::AsStored);
        }
        if info.bytes / rows.max(1) as u64 <= WHOLE {
            let _ = shards.read_rows(&name, last.clone(), DType::BF16);
            let _ = shards.stored_codes(&name, last);
        }
    }
}

/// A GGUF file: header, blocks.
fn gguf(data: &[u8]) {
    if let Ok(file) = Gguf::open(&one("a.gguf", data), "a.gguf") {
        read(&file.tensors);
    }
}

/// A language model and its tower.
fn model(data: &[u8]) {
    let folder = files(["a.gguf", "b.gguf"], data);
    if let Ok(folder) = folder.with_gguf() {
        let _ = Outline::open(&folder, &OpenOptions::default());
        if let Ok(shards) = Shards::open(&folder) {
            read(&shards);
            let _ = shards.fingerprint();
        }
    }
}

/// A vocabulary, and what the tokenizer that it becomes does.
fn tokenizer(data: &[u8]) {
    let Ok(file) = Gguf::open(&one("a.gguf", data), "a.gguf") else {
        return;
    };
    let Ok(json) = file.tokenizer() else {
        return;
    };
    if let Ok(tokenizer) = Tokenizer::from_json(&json, &[1]) {
        let text = tokenizer.disarm("<s>naïve  12 caf\u{E9}<|im_end|>\n");
        if let Ok(ids) = tokenizer.encode(&text, true) {
            let _ = tokenizer.decode(&ids);
        }
        let mut stream = tokenizer.stream();
        for id in 0..64 {
            let _ = stream.push(id);
        }
        let _ = stream.rest();
    }
}

/// An ONNX file.
fn onnx(data: &[u8]) {
    if let Ok(file) = Onnx::open(&one("a.onnx", data), "a.onnx") {
        read(&file.tensors);
    }
}

/// A checkpoint's weights, and the configuration that says how they are quantised.
fn safetensors(data: &[u8]) {
    let folder = files(["config.json", "model.safetensors"], data);
    if let Ok(shards) = Shards::open(&folder) {
        read(&shards);
    }
}

/// An adapter.
fn adapter(data: &[u8]) {
    const NAMES: NameTable = NameTable {
        rules: &[Rule {
            module: "*",
            file: &["model.*", "*"],
        }],
        ignore: &[],
    };
    let folder = files(["adapter_config.json", "adapter_model.safetensors"], data);
    let linears = ["a.q_proj", "a.v_proj", "b.0.q_proj"];
    let linears = linears.map(|path| LinearMap::new(&NAMES, path.into(), path.into(), [8, 8]));
    let _ = read_adapter(&folder, &NAMES, &linears);
}

/// Settings of a model and of its processors.
fn processor(data: &[u8]) {
    let folder = files(
        [
            "config.json",
            "preprocessor_config.json",
            "processor_config.json",
            "video_preprocessor_config.json",
        ],
        data,
    );
    if let Ok(outline) = Outline::open(&folder, &OpenOptions::default()) {
        for size in [[1, 1], [640, 480], [10_000, 7]] {
            let _ = outline.preprocessor.picture(size);
        }
    }
}

/// A chat template.
fn template(data: &[u8]) {
    let dialect = Dialect {
        template: "",
        image: "<image>",
        video: "<video>",
        time: None,
    };
    let folder = files(["chat_template.jinja", "tokenizer_config.json"], data);
    if let Ok(template) = ChatTemplate::open(&folder, dialect) {
        let message = |role, content| Message { role, content };
        let text = || Content::Text("where is it?".into());
        let messages = [
            message(Role::System, vec![text()]),
            message(Role::User, vec![Content::Image, text()]),
            message(Role::Assistant, vec![text()]),
        ];
        let _ = template.render_conversation(&messages, true);
    }
}

/// The body of a request to a server.
fn request(data: &[u8]) {
    let limits = Limits {
        pixels: 1 << 20,
        ..Limits::default()
    };
    if let Err((status, error)) = check(data, &limits) {
        assert!((400..500).contains(&status), "{status}: {error}");
    }
}
