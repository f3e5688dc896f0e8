//! From config.json to a resolved configuration.

use serde_json::{Value, json};
use vision_encoder::qwen::QwenGeneration;

use crate::fixture::{FAMILIES, json, resolve};

/// A published configuration.
fn hub(name: &str) -> Value {
    let text = match name {
        "Qwen2-VL-2B" => include_str!("hub/Qwen2-VL-2B.json"),
        "Qwen2-VL-7B" => include_str!("hub/Qwen2-VL-7B.json"),
        "Qwen2.5-VL-3B" => include_str!("hub/Qwen2.5-VL-3B.json"),
        "Qwen2.5-VL-7B" => include_str!("hub/Qwen2.5-VL-7B.json"),
        "Qwen2.5-VL-72B" => include_str!("hub/Qwen2.5-VL-72B.json"),
        "Qwen3-VL-2B" => include_str!("hub/Qwen3-VL-2B.json"),
        "Qwen3-VL-4B" => include_str!("hub/Qwen3-VL-4B.json"),
        "Qwen3-VL-8B" => include_str!("hub/Qwen3-VL-8B.json"),
        _ => panic!("{name}"),
    };
    serde_json::from_str(text).unwrap()
}

#[test]
fn flat_and_nested_layouts_say_the_same() {
    for family in FAMILIES {
        let [old, new] =
            ["config.json", "config.v5.json"].map(|file| json(&format!("{family}/ckpt/{file}")));
        assert_eq!(resolve(old).unwrap(), resolve(new).unwrap(), "{family}");
    }
}

#[test]
fn published_configurations_resolve() {
    use QwenGeneration::{Qwen2, Qwen2_5, Qwen3};
    // Generation; decoder layers, width, heads, key/value heads; tied; tower width; channels per position axis.
    for (name, generation, decoder, tied, tower, sections) in [
        (
            "Qwen2-VL-2B",
            Qwen2,
            [28, 1536, 12, 2],
            true,
            1280,
            [16, 24, 24],
        ),
        (
            "Qwen2-VL-7B",
            Qwen2,
            [28, 3584, 28, 4],
            false,
            1280,
            [16, 24, 24],
        ),
        (
            "Qwen2.5-VL-3B",
            Qwen2_5,
            [36, 2048, 16, 2],
            true,
            1280,
            [16, 24, 24],
        ),
        (
            "Qwen2.5-VL-7B",
            Qwen2_5,
            [28, 3584, 28, 4],
            false,
            1280,
            [16, 24, 24],
        ),
        (
            "Qwen2.5-VL-72B",
            Qwen2_5,
            [80, 8192, 64, 8],
            false,
            1280,
            [16, 24, 24],
        ),
        (
            "Qwen3-VL-2B",
            Qwen3,
            [28, 2048, 16, 8],
            true,
            1024,
            [24, 20, 20],
        ),
        (
            "Qwen3-VL-4B",
            Qwen3,
            [36, 2560, 32, 8],
            true,
            1024,
            [24, 20, 20],
        ),
        (
            "Qwen3-VL-8B",
            Qwen3,
            [36, 4096, 32, 8],
            false,
            1152,
            [24, 20, 20],
        ),
    ] {
        let config = resolve(hub(name)).unwrap();
        let (vision, text) = (&config.vision, &config.text);
        assert_eq!(vision.generation, generation, "{name}");
        let found = [
            text.num_layers,
            text.hidden_size,
            text.num_attention_heads,
            text.num_key_value_heads,
        ];
        assert_eq!(found, decoder, "{name}");
        assert_eq!(text.head_dim, 128, "{name}");
        assert_eq!(text.tie_word_embeddings, tied, "{name}");
        assert_eq!(
            (text.qkv_bias, text.qk_norm),
            (generation != Qwen3, generation == Qwen3)
        );
        assert_eq!(text.rope.theta, if generation == Qwen3 { 5e6 } else { 1e6 });
        assert_eq!(
            (vision.hidden_size, vision.output_size),
            (tower, text.hidden_size)
        );
        assert_eq!(
            vision.deepstack_layers.len(),
            if generation == Qwen3 { 3 } else { 0 }
        );
        let axes = &text.rope.axis_of_frequency;
        let counted = [0, 1, 2].map(|axis| axes.iter().filter(|&&other| other == axis).count());
        assert_eq!(counted, sections, "{name}");
        assert_eq!((config.image_token, config.video_token), (151_655, 151_656));
    }
}

#[test]
fn older_generations_have_sections_and_qwen3_interleaves() {
    let axes = |family: &str| {
        let config = resolve(json(&format!("{family}/ckpt/config.json"))).unwrap();
        config.text.rope.axis_of_frequency
    };
    assert_eq!(axes("qwen2vl"), [0, 0, 1, 1, 1, 2, 2, 2]);
    assert_eq!(axes("qwen25vl"), [0, 0, 1, 1, 1, 2, 2, 2]);
    assert_eq!(
        axes("qwen3vl"),
        [0, 1, 2, 0, 1, 2, 0, 1, 2, 0, 1, 2, 0, 1, 2, 0]
    );
}

#[test]
fn silent_configurations_have_the_defaults_of_the_library() {
    let config =
        resolve(json!({"model_type": "qwen2_vl", "vision_config": {"hidden_size": 8192}})).unwrap();
    let text = config.text;
    assert_eq!(
        (text.vocab_size, text.hidden_size, text.num_layers),
        (152_064, 8192, 80)
    );
    assert_eq!(
        (text.num_key_value_heads, text.head_dim, text.rms_norm_eps),
        (8, 128, 1e-5)
    );
    let config = json!({"model_type": "qwen3_vl", "vision_config": {"out_hidden_size": 4096}, "text_config": {}});
    let text = resolve(config).unwrap().text;
    assert_eq!(
        (text.vocab_size, text.hidden_size, text.num_layers),
        (151_936, 4096, 32)
    );
    assert_eq!(
        (text.num_key_value_heads, text.head_dim, text.rope.theta),
        (32, 128, 5e5)
    );
}

/// The first that is set decides, as in the library.
#[test]
fn theta_stands_in_the_rope_parameters_or_beside_them() {
    let theta = |path: &str| {
        let mut config = json("qwen3vl/ckpt/config.json");
        config["text_config"]
            .as_object_mut()
            .unwrap()
            .remove("rope_theta");
        set(&mut config, path, json!(1234.0));
        resolve(config).unwrap().text.rope.theta
    };
    assert_eq!(theta("/text_config/rope_theta"), 1234.0);
    assert_eq!(theta("/text_config/rope_scaling/rope_theta"), 1234.0);
}

/// Sets the value at a JSON pointer whose parent exists.
fn set(config: &mut Value, pointer: &str, value: Value) {
    let (parent, key) = pointer.rsplit_once('/').unwrap();
    config.pointer_mut(parent).unwrap()[key] = value;
}

#[test]
fn what_these_models_do_not_do_is_refused() {
    for (family, pointer, value, message) in [
        (
            "qwen3vl",
            "/model_type",
            json!("qwen3_vl_moe"),
            "\"qwen3_vl_moe\" is not supported",
        ),
        (
            "qwen25vl",
            "/rope_scaling/type",
            json!("yarn"),
            "rope type \"yarn\" is not supported",
        ),
        (
            "qwen3vl",
            "/text_config/rope_scaling/rope_type",
            json!("yarn"),
            "remove the scaling",
        ),
        (
            "qwen2vl",
            "/rope_scaling/mrope_section",
            json!([2, 3, 4]),
            "[2, 3, 4] does not add up",
        ),
        (
            "qwen2vl",
            "/rope_scaling/mrope_section",
            json!([u64::MAX, 3, 4]),
            "does not add up",
        ),
        (
            "qwen2vl",
            "/rope_scaling/mrope_interleaved",
            json!(true),
            "must be false",
        ),
        (
            "qwen3vl",
            "/text_config/rope_scaling/mrope_interleaved",
            json!(false),
            "must be true",
        ),
        (
            "qwen2vl",
            "/use_sliding_window",
            json!(true),
            "set use_sliding_window to false",
        ),
        (
            "qwen2vl",
            "/layer_types",
            json!(["sliding_attention"]),
            "set use_sliding_window to false",
        ),
        (
            "qwen2vl",
            "/hidden_act",
            json!("gelu"),
            "hidden_act \"gelu\"",
        ),
        (
            "qwen3vl",
            "/text_config/attention_bias",
            json!(true),
            "attention_bias",
        ),
        (
            "qwen2vl",
            "/num_attention_heads",
            json!(5),
            "not a multiple of num_attention_heads 5",
        ),
        (
            "qwen2vl",
            "/num_attention_heads",
            json!(0),
            "not a multiple of num_attention_heads 0",
        ),
        (
            "qwen3vl",
            "/vision_config/out_hidden_size",
            json!(97),
            "hidden_size of the text model is 96",
        ),
        (
            "qwen3vl",
            "/text_config/num_hidden_layers",
            json!(2),
            "deepstack_visual_indexes has 3 entries",
        ),
        ("qwen3vl", "/video_token_id", json!(349), "are both 349"),
    ] {
        let mut config = json(&format!("{family}/ckpt/config.json"));
        if pointer == "/use_sliding_window" {
            set(&mut config, "/max_window_layers", json!(4));
        }
        set(&mut config, pointer, value);
        let error = resolve(config).unwrap_err().to_string();
        assert!(error.contains(message), "{error}");
    }
}

/// `max_window_layers` counts the layers without windows.
#[test]
fn sliding_windows_of_no_layer_do_no_harm() {
    let mut config = json("qwen2vl/ckpt/config.json");
    set(&mut config, "/use_sliding_window", json!(true));
    set(&mut config, "/max_window_layers", json!(8));
    assert!(resolve(config).is_ok());
}

#[test]
fn absurd_numbers_are_errors() {
    for family in FAMILIES {
        let whole = json(&format!("{family}/ckpt/config.json"));
        for level in ["", "/text_config", "/vision_config"] {
            let Some(Value::Object(fields)) = whole.pointer(level) else {
                continue;
            };
            for (name, old) in fields.iter().filter(|(_, value)| value.is_u64()) {
                for value in [0, 1 << 31, 1 << 62, u64::MAX] {
                    let mut config = whole.clone();
                    set(&mut config, &format!("{level}/{name}"), json!(value));
                    // Ids of tokens and what the model does not ask for may be anything.
                    let parsed = serde_json::from_value::<qwen_vl::QwenVlHfConfig>(config);
                    let resolved = parsed.map(|config| config.resolve());
                    let free = name.ends_with("_id") || IGNORED.contains(&name.as_str());
                    let refused = !matches!(resolved, Ok(Ok(_)));
                    assert!(free || refused, "{family}{level}/{name}: {value} for {old}");
                }
            }
        }
    }
}

/// Numbers that no supported model depends on.
const IGNORED: [&str; 4] = [
    "max_window_layers",
    "sliding_window",
    "in_chans",
    "spatial_patch_size",
];
