//! A checkpoint that is wrong is refused with a message that says which file and what to do; no panic.

use serde_json::{Value, json};

use crate::program::{Scratch, fixture, refuses, reroute, scene};

pub const MAX_CONFIG_BYTES: usize = 1 << 20;

/// Asks the model in a folder about a scene.
pub fn ask(folder: &Scratch) -> Vec<String> {
    let words = "ask --prompt hi --max-new-tokens 1 --model";
    let mut flags: Vec<String> = words.split(' ').map(String::from).collect();
    flags.extend([folder.path(), "--image".into(), scene("063")]);
    flags
}

#[test]
fn the_unchanged_fixture_is_good_input() {
    reroute(&ask(&Scratch::checkpoint())).unwrap();
}

#[test]
fn folders_that_hold_no_checkpoint() {
    let empty = Scratch::new();
    refuses(
        &ask(&empty),
        &[
            &empty.path(),
            "has no \"config.json\"",
            "download complete?",
        ],
    );
    for (path, reason, hint) in [
        (
            empty.at("nowhere"),
            "cannot be opened",
            "give the folder that holds config.json",
        ),
        (
            scene("063"),
            "is not a folder",
            "give the folder that it lies in",
        ),
    ] {
        refuses(
            &["ask", "--prompt", "hi", "--model", &path],
            &[&path, reason, hint],
        );
        refuses(&["presets", "--model", &path], &[&path, reason, hint]);
    }
}

#[test]
fn files_that_are_missing() {
    for (name, expected) in [
        ("config.json", "has no \"config.json\""),
        ("tokenizer.json", "has no \"tokenizer.json\""),
        (
            "preprocessor_config.json",
            "has no \"preprocessor_config.json\"",
        ),
        (
            "model.safetensors",
            "none of model.bpk, model.safetensors and model.safetensors.index.json",
        ),
    ] {
        let folder = Scratch::checkpoint();
        folder.remove(name);
        refuses(
            &ask(&folder),
            &[&folder.path(), expected, "download complete?"],
        );
    }
    let folder = Scratch::checkpoint();
    folder.remove("model.safetensors");
    folder.write("pytorch_model.bin", "pickle");
    refuses(
        &ask(&folder),
        &[
            "\"pytorch_model.bin\", a pickle",
            "reroute convert --allow-pickle",
        ],
    );
}

#[test]
fn settings_that_are_not_the_json_they_should_be() {
    let config = std::fs::read_to_string(fixture().join("config.json")).unwrap();
    let too_long = " ".repeat(MAX_CONFIG_BYTES + 1);
    let deep = format!("{{\"text_config\": {}", "[".repeat(100_000));
    for (name, content, expected) in [
        ("config.json", &config[..300], "EOF while parsing"),
        ("config.json", "", "EOF while parsing"),
        ("config.json", "not JSON", "expected ident at line 1"),
        ("config.json", "[1]", "line 1 column"),
        (
            "config.json",
            &too_long,
            "1048577 bytes or more, 1048576 are allowed",
        ),
        ("config.json", &deep, "not understood"),
        ("config.json", r#"{"model_type": 3}"#, "expected a string"),
        (
            "generation_config.json",
            r#"{"eos_token_id": "</s>"}"#,
            "not understood",
        ),
        (
            "generation_config.json",
            r#"{"eos_token_id": -1}"#,
            "not understood",
        ),
        (
            "generation_config.json",
            r#"{"max_new_tokens": -1}"#,
            "integer `-1`",
        ),
        ("generation_config.json", r#"{"eos"#, "EOF while parsing"),
        (
            "tokenizer_config.json",
            r#"{"bos_token": 5}"#,
            "not understood",
        ),
        (
            "preprocessor_config.json",
            r#"{"size": "large"}"#,
            "not understood",
        ),
        (
            "grounding.json",
            r#"{"prompt": "x", "box": "miles"}"#,
            "unknown variant `miles`",
        ),
    ] {
        let folder = Scratch::checkpoint();
        let path = folder.write(name, content);
        refuses(&ask(&folder), &[&path, expected, "download"]);
    }
}

#[test]
fn odd_generation_settings_are_no_reason_to_refuse() {
    for content in [
        r#"{"eos_token_id": null, "max_new_tokens": null, "temperature": "hot"}"#,
        r#"{"eos_token_id": [2, 3], "do_sample": 7}"#,
        r#"{"eos_token_id": []}"#,
        "{}",
    ] {
        let folder = Scratch::checkpoint();
        folder.write("generation_config.json", content);
        reroute(&ask(&folder)).unwrap();
    }
}

/// Asserts that the fixture with one value of a settings file changed is refused.
#[track_caller]
fn refuses_setting(name: &str, (pointer, value, expected): &(&str, Value, &str)) {
    let folder = Scratch::checkpoint();
    folder.set(name, pointer, value.clone());
    refuses(&ask(&folder), &[expected]);
}

#[test]
fn config_numbers_that_are_impossible_or_contradict_each_other() {
    for case in [
        (
            "/text_config/rms_norm_eps",
            json!(1e300),
            "rms_norm_eps is 1000",
        ),
        (
            "/text_config/num_attention_heads",
            json!(5),
            "96 is not a multiple of num_attention_heads 5",
        ),
        (
            "/text_config/num_attention_heads",
            json!(0),
            "num_attention_heads 0",
        ),
        (
            "/text_config/num_key_value_heads",
            json!(4),
            "6 is not a multiple of num_key_value_heads 4",
        ),
        (
            "/text_config/num_key_value_heads",
            json!(0),
            "num_key_value_heads is 0",
        ),
        ("/text_config/head_dim", json!(15), "head_dim 15 is odd"),
        (
            "/text_config/head_dim",
            json!(2_147_483_646),
            "head_dim is 2147483646, 1 to 4096",
        ),
        (
            "/text_config/num_hidden_layers",
            json!(0),
            "num_hidden_layers is 0",
        ),
        (
            "/text_config/num_hidden_layers",
            json!(-8),
            "invalid value: integer `-8`",
        ),
        (
            "/text_config/num_hidden_layers",
            json!(8.5),
            "invalid type: floating point `8.5`",
        ),
        (
            "/text_config/num_hidden_layers",
            json!(100_000_000),
            "num_hidden_layers is 100000000, 1 to 1024",
        ),
        (
            "/text_config/hidden_size",
            json!(1e30),
            "invalid type: floating point `1e+30`",
        ),
        ("/text_config/hidden_size", json!(u64::MAX), "hidden_size"),
        (
            "/text_config/vocab_size",
            json!("448"),
            "invalid type: string \"448\"",
        ),
        (
            "/text_config/vocab_size",
            json!(300),
            "ids up to 408, the model's vocabulary has 300",
        ),
        (
            "/text_config/max_position_embeddings",
            json!(0),
            "max_position_embeddings is 0",
        ),
        (
            "/text_config/max_position_embeddings",
            json!(50),
            "the model has 50 (max_position_embeddings)",
        ),
        ("/text_config/rms_norm_eps", json!(-1), "rms_norm_eps is -1"),
        ("/text_config/rope_theta", json!(0), "rope_theta is 0"),
        (
            "/text_config/model_type",
            json!("gpt2"),
            "text_config.model_type \"gpt2\"",
        ),
        (
            "/text_config/hidden_act",
            json!("relu"),
            "activation other than silu",
        ),
        (
            "/vision_config/num_hidden_layers",
            json!(1 << 20),
            "vision_config.num_hidden_layers is 1048576, 1 to 1024",
        ),
        (
            "/vision_config/num_attention_heads",
            json!(5),
            "64 is not a multiple of num_attention_heads 5",
        ),
        (
            "/vision_config/image_size",
            json!(224),
            "image_seq_length is 64, but image_size and patch_size give 256",
        ),
        (
            "/vision_config/patch_size",
            json!(0),
            "vision_config.patch_size is 0",
        ),
        (
            "/vision_config/patch_size",
            json!(113),
            "patch_size 113 exceeds image_size 112",
        ),
        (
            "/vision_config/layer_norm_eps",
            json!(-0.5),
            "vision_config.layer_norm_eps is -0.5",
        ),
        (
            "/vision_config/hidden_act",
            json!("tanh"),
            "vision_config.hidden_act \"tanh\"",
        ),
        ("/vision_config", json!({}), "image_seq_length is 64"),
        ("/vision_config", json!(null), "invalid type: null"),
        (
            "/vision_feature_layer",
            json!(-9),
            "vision_feature_layer -9 does not exist in a tower of 4 layers",
        ),
        (
            "/vision_feature_layer",
            json!([]),
            "vision_feature_layer lists 0 layers",
        ),
        (
            "/vision_config/model_type",
            json!("pixtral"),
            "this is Pixtral, which shares the model_type",
        ),
        (
            "/vision_config/model_type",
            json!("siglip_vision_model"),
            "give 63 visual tokens under vision_feature_select_strategy \"default\"",
        ),
        (
            "/text_config/rope_scaling",
            json!({"type": "yarn", "factor": 4.0}),
            "rope type \"yarn\" is not supported",
        ),
        (
            "/vision_feature_select_strategy",
            json!("cls"),
            "\"cls\" is neither \"default\" nor \"full\"",
        ),
        (
            "/vision_feature_select_strategy",
            json!("full"),
            "vision_feature_select_strategy \"full\"",
        ),
        (
            "/image_token_index",
            json!(-1),
            "integer `-1`, expected u32",
        ),
        (
            "/image_token_index",
            json!(5),
            "0 image placeholders for 1 images (the image token of config.json is 5)",
        ),
        (
            "/model_type",
            json!("bert"),
            "model_type \"bert\"; this zoo opens: llava",
        ),
        (
            "/model_type",
            json!(""),
            "model_type \"\"; this zoo opens: llava",
        ),
    ] {
        refuses_setting("config.json", &case);
    }
    // The vision tower's defaults are LLaVA-1.5's; the preprocessor of the fixture is not.
    let folder = Scratch::checkpoint();
    folder.set("config.json", "/vision_config", json!({"image_size": 336}));
    folder.set("config.json", "/image_seq_length", json!(100));
    refuses(
        &ask(&folder),
        &["makes 112×112 pixel images, the vision tower wants 336×336"],
    );
}

#[test]
fn preprocessor_numbers_that_are_impossible_or_contradict_the_tower() {
    for case in [
        (
            "/crop_size",
            json!({"height": 224, "width": 224}),
            "makes 224×224 pixel images, the vision tower wants 112×112",
        ),
        ("/crop_size", json!(0), "crop_size.height is 0, not 1 to"),
        (
            "/size",
            json!({"shortest_edge": 1_u64 << 40}),
            "size is 1099511627776, not 1 to",
        ),
        (
            "/size",
            json!({"shortest_edge": 112, "longest_edge": 224}),
            "size.longest_edge is not supported",
        ),
        ("/image_mean", json!([0.5]), "three numbers each"),
        (
            "/image_std",
            json!([0.5, 0, 0.5]),
            "image_std that is not 0",
        ),
        ("/resample", json!(1), "resample 1 is not 2"),
        ("/do_thumbnail", json!(true), "do_thumbnail is not known"),
        ("/do_normalize", json!(false), "do_normalize is off"),
        ("/rescale_factor", json!(1e308), "must make finite pixels"),
    ] {
        refuses_setting("preprocessor_config.json", &case);
    }
}

#[test]
fn config_that_contradicts_the_weights() {
    let wrong_shape = "tensors of the wrong shape (config.json and the weights disagree";
    for (pointer, value, expected) in [
        (
            "/text_config/hidden_size",
            json!(192),
            [
                wrong_shape,
                "embed_tokens.weight\" is [448, 96], not [448, 192]",
            ],
        ),
        (
            "/text_config/head_dim",
            json!(32),
            [wrong_shape, "is [96, 96], not [192, 96]"],
        ),
        (
            "/text_config/vocab_size",
            json!(449),
            [wrong_shape, "lm_head.weight\" is [448, 96], not [449, 96]"],
        ),
        (
            "/text_config/num_hidden_layers",
            json!(9),
            ["9 parameters without a tensor", "language_model.layers.8."],
        ),
        (
            "/text_config/num_hidden_layers",
            json!(7),
            ["9 tensors the model does not know", "layers.7."],
        ),
        (
            "/vision_config/hidden_size",
            json!(128),
            [wrong_shape, "is [64], not [128]"],
        ),
        (
            "/vision_config/patch_size",
            json!(13),
            [wrong_shape, "is [64, 3, 14, 14], not [64, 3, 13, 13]"],
        ),
        (
            "/vision_config/num_hidden_layers",
            json!(5),
            [
                "parameters without a tensor",
                "vision_tower.encoder.layers.4.",
            ],
        ),
        (
            "/multimodal_projector_bias",
            json!(false),
            ["tensors the model does not know", "linear_1.bias"],
        ),
        (
            "/vision_feature_layer",
            json!([-2, -3]),
            [wrong_shape, "linear_1.weight\" is [96, 64], not [96, 128]"],
        ),
    ] {
        let folder = Scratch::checkpoint();
        folder.set("config.json", pointer, value);
        refuses(&ask(&folder), &expected);
    }
}

/// Header and data of a safetensors file.
fn parts(file: &[u8]) -> (Value, Vec<u8>) {
    let length = u64::from_le_bytes(file[..8].try_into().unwrap()) as usize;
    (
        serde_json::from_slice(&file[8..8 + length]).unwrap(),
        file[8 + length..].to_vec(),
    )
}

fn with_header(header: &Value, data: &[u8]) -> Vec<u8> {
    let header = header.to_string().into_bytes();
    [&(header.len() as u64).to_le_bytes(), &header[..], data].concat()
}

#[test]
fn weights_that_are_cut_off_or_lie() {
    const NAME: &str = "language_model.model.norm.weight";
    let good = std::fs::read(fixture().join("model.safetensors")).unwrap();
    let (header, data) = parts(&good);
    let header_with = |change: &dyn Fn(&mut Value)| {
        let mut header = header.clone();
        change(&mut header);
        with_header(&header, &data)
    };
    let entry = |key: &'static str, value: Value| header_with(&|h| h[NAME][key] = value.clone());
    let huge_header = [&(1_u64 << 62).to_le_bytes(), &good[8..]].concat();
    let cut = "it is cut off: it announces a header of";
    let contradictory = "has a contradictory header";
    for (content, expected) in [
        (Vec::new(), cut),
        (good[..4].to_vec(), cut),
        (good[..5000].to_vec(), cut),
        (huge_header, cut),
        (
            b"version https://git-lfs.github.com/spec/v1\n".to_vec(),
            "git lfs pull",
        ),
        (
            good[..good.len() - 1].to_vec(),
            "bytes where its header needs",
        ),
        ([&good[..], b"x"].concat(), "bytes where its header needs"),
        (
            entry("data_offsets", json!([0, 1_u64 << 60])),
            contradictory,
        ),
        (entry("data_offsets", json!([9, 3])), contradictory),
        (entry("data_offsets", json!([0, 384])), contradictory),
        (
            entry("shape", json!([1_u64 << 40, 1_u64 << 40])),
            contradictory,
        ),
        (entry("shape", json!([95])), contradictory),
        (entry("shape", json!([96, -1])), "broken header"),
        (entry("dtype", json!("F64")), contradictory),
        (entry("dtype", json!("F7")), "unknown variant `F7`"),
        (entry("dtype", json!("I32")), "are not F32, F16 or BF16"),
        (
            header_with(&|h| h["__metadata__"] = json!([1])),
            "broken header",
        ),
        (with_header(&json!([1]), &data), "broken header"),
    ] {
        let folder = Scratch::checkpoint();
        folder.write("model.safetensors", content);
        refuses(&ask(&folder), &[expected]);
    }
    let folder = Scratch::checkpoint();
    let renamed = header_with(&|header| {
        let entry = header.as_object_mut().unwrap().remove(NAME).unwrap();
        header["norm_of_nobody"] = entry;
    });
    folder.write("model.safetensors", renamed);
    let both = [
        "does not know",
        "\"norm_of_nobody\"",
        "without a tensor",
        "language_model.norm.weight",
    ];
    refuses(&ask(&folder), &both);
}

#[test]
fn weights_that_are_not_numbers() {
    for (name, routing, expected) in [
        (
            "language_model.model.norm.weight",
            "dense",
            "logits of sample 0 contain NaN",
        ),
        (
            "language_model.model.layers.0.input_layernorm.weight",
            "reroute-fastv@64",
            "score of visual token 0 is NaN",
        ),
    ] {
        let folder = Scratch::checkpoint();
        let (header, mut data) = parts(&folder.read("model.safetensors"));
        let start = header[name]["data_offsets"][0].as_u64().unwrap() as usize;
        data[start..start + 4].copy_from_slice(&f32::NAN.to_le_bytes());
        folder.write("model.safetensors", with_header(&header, &data));
        let mut flags = ask(&folder);
        flags.extend(["--routing".into(), routing.into()]);
        refuses(&flags, &[expected]);
    }
}

#[test]
fn shards_that_are_missing_or_lead_out_of_the_folder() {
    let refused = "a shard must be a plain file name that ends in .safetensors: do not trust";
    for (shard, expected) in [
        ("../model.safetensors", refused),
        ("/etc/model.safetensors", refused),
        ("a/model.safetensors", refused),
        ("..\\model.safetensors", refused),
        ("C:model.safetensors", refused),
        ("..", refused),
        ("", refused),
        ("pytorch_model.bin", refused),
        (
            "model-2-of-2.safetensors",
            "lacks 1 of its shards, \"model-2-of-2.safetensors\"; finish the download",
        ),
        ("model.safetensors", "in the file, but not listed"),
    ] {
        let folder = Scratch::checkpoint();
        let index = json!({"weight_map": {"language_model.lm_head.weight": shard}});
        folder.write("model.safetensors.index.json", index.to_string());
        refuses(&ask(&folder), &[&folder.path(), expected]);
    }
}
