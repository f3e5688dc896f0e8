//! What a GGUF file says of itself counts as llama.cpp takes it, or it is refused.

use std::fs;

use reroute_checkpoint::CheckpointError;
use reroute_cli::backend::{self, Backend};
use reroute_zoo::{Folder, OpenOptions, Tokenizer, Vlm};
use serde_json::{Value, json};

use super::files;

/// What is taken from a model, what is added to it or to its tower, and what is said of that.
type Refusal<'a> = (
    &'a str,
    &'a [&'a str],
    &'a [(&'a str, Stored)],
    bool,
    &'a str,
);
/// Kind of a value, and the value.
type Stored = (u32, Vec<u8>);

/// A file with further keys, and old ones that nobody knows any more.
fn with_keys(path: &str, lost: &[&str], keys: &[(&str, u32, Vec<u8>)]) -> Vec<u8> {
    /// Behind magic, version and number of tensors: the number of keys, then the keys.
    const COUNT: usize = 16;
    let mut file = fs::read(path).expect("a file");
    for key in lost {
        let at = file
            .windows(key.len())
            .position(|part| part == key.as_bytes());
        file[at.unwrap_or_else(|| panic!("{key}"))] = b'?';
    }
    let text = |text: &[u8]| [&(text.len() as u64).to_le_bytes()[..], text].concat();
    let mut added: Vec<u8> = Vec::new();
    for (key, kind, value) in keys {
        added.extend(
            [
                text(key.as_bytes()),
                kind.to_le_bytes().to_vec(),
                value.clone(),
            ]
            .concat(),
        );
    }
    // Tensors are counted from a multiple of 32 on.
    let name = [text(b"filling"), 8_u32.to_le_bytes().to_vec()].concat();
    let length = added.len() + name.len() + 8;
    let filling = vec![b' '; length.next_multiple_of(32) - length];
    added.extend([name, text(&filling)].concat());
    let count = file[COUNT..COUNT + 8].as_chunks::<8>().0[0];
    let count = u64::from_le_bytes(count) + keys.len() as u64 + 1;
    file[COUNT..COUNT + 8].copy_from_slice(&count.to_le_bytes());
    file.splice(COUNT + 8..COUNT + 8, added);
    file
}

/// No default takes the place of what is said.
#[test]
fn what_a_file_says_is_heard_or_refused() {
    let float = |number: f32| (6_u32, number.to_le_bytes().to_vec());
    let flag = |flag: u8| (7_u32, vec![flag]);
    let text = |text: &str| {
        let length = (text.len() as u64).to_le_bytes();
        (8_u32, [&length[..], text.as_bytes()].concat())
    };
    let pair = |name: &str, lost: &[&str], keys: &[(&str, Stored)], of_tower: bool| {
        let [language, tower] = files(name);
        let keys: Vec<_> = { keys.iter() }
            .map(|(key, (kind, value))| (*key, *kind, value.clone()))
            .collect();
        let read = |path: &str, is_meant: bool| match is_meant {
            true => with_keys(path, lost, &keys),
            false => fs::read(path).expect("a file"),
        };
        let files = [
            ("a.gguf".to_owned(), read(&language, !of_tower)),
            ("b.gguf".to_owned(), read(&tower, of_tower)),
        ];
        Folder::in_memory(files).with_gguf()
    };
    let config = |folder: Result<Folder, CheckpointError>| -> Value {
        let folder = folder.unwrap_or_else(|error| panic!("{error}"));
        folder.read_json("config.json", 1 << 20).expect("JSON")
    };
    assert!(config(pair("llava", &[], &[], false))["text_config"]["rope_scaling"].is_null());
    for key in ["llama.rope.scaling.factor", "llama.rope.scale_linear"] {
        let config = config(pair("llava", &[], &[(key, float(4.0))], false));
        let scaling = &config["text_config"]["rope_scaling"];
        assert_eq!(
            *scaling,
            json!({"rope_type": "linear", "factor": 4.0}),
            "{key}"
        );
    }
    let base = "llama.rope.freq_base";
    let epsilon = "llama.attention.layer_norm_rms_epsilon";
    let scaled = ("qwen2vl.rope.scaling.factor", float(4.0));
    let refusals: [Refusal; 11] = [
        (
            "llava",
            &[],
            &[("llama.rope.scaling.type", text("yarn"))],
            false,
            "yarn",
        ),
        ("qwen2vl", &[], &[scaled], false, "rope.scaling"),
        (
            "llava",
            &[],
            &[("llama.attention.causal", flag(0))],
            false,
            "causal",
        ),
        (
            "llava",
            &[],
            &[("llama.expert_count", (4, vec![8, 0, 0, 0]))],
            false,
            "experts",
        ),
        (
            "llava",
            &[],
            &[("llama.logit_scale", text("x"))],
            false,
            "logit_scale is not",
        ),
        (
            "llava",
            &[base],
            &[(base, text("10000"))],
            false,
            "not a finite number",
        ),
        (
            "llava",
            &[base],
            &[(base, float(f32::NAN))],
            false,
            "not a finite number",
        ),
        ("llava", &[epsilon], &[], false, "does not say"),
        (
            "llava",
            &[],
            &[("clip.vision.mm_patch_merge_type", text("spatial_unpad"))],
            true,
            "NeXT",
        ),
        (
            "llava",
            &["clip.vision.block_count"],
            &[("clip.vision.block_count", (4, vec![9, 0, 0, 0]))],
            true,
            "blocks",
        ),
        (
            "llava",
            &["v.blk.0.ln1.weight"],
            &[],
            true,
            "?.blk.0.ln1.weight (GGUF)",
        ),
    ];
    for (name, lost, keys, of_tower, expected) in refusals {
        let folder = pair(name, lost, keys, of_tower);
        let error = match folder {
            Err(error) => error.to_string(),
            // A tensor of another name is found when the weights are.
            Ok(folder) => {
                let device = backend::device().expect("a device");
                let vlm = Vlm::<Backend>::open(&folder, &OpenOptions::default(), &device);
                vlm.expect_err("a tensor is missing").to_string()
            }
        };
        assert!(error.contains(expected), "{error}");
    }
    // No pattern is no window.
    let pattern = "clip.vision.n_wa_pattern";
    let all = pair("qwen25vl", &[pattern], &[(pattern, (4, vec![0; 4]))], true);
    let vision = config(all)["vision_config"].clone();
    let blocks: Vec<u64> = (0..vision["depth"].as_u64().expect("a count")).collect();
    assert_eq!(vision["fullatt_block_indexes"], json!(blocks));
    // Texts of pieces begin with token 1, whether the file says so or not.
    let silent = pair("llava", &["tokenizer.ggml.bos_token_id"], &[], false).expect("a good pair");
    let json = silent.read("tokenizer.json", 1 << 24).expect("a tokenizer");
    let tokenizer = Tokenizer::from_json(&json, &[]).expect("a good tokenizer");
    assert_eq!(
        tokenizer.encode("a", true).expect("a text").first(),
        Some(&1)
    );
}
