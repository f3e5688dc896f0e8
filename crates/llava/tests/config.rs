//! What is said under `model_type: "llava"`, and what is refused.

use llava::{LlavaConfig, LlavaHfConfig};
use reroute::RopeScaling;
use reroute_family::{FamilyConfig, FamilyError, Modality, Sample};
use serde_json::{Value, json};
use vision_encoder::vit::VitKind;

fn config(change: Value) -> Value {
    let mut config = json!({
        "vision_config": {
            "model_type": "clip_vision_model", "hidden_size": 32, "intermediate_size": 40,
            "num_hidden_layers": 3, "num_attention_heads": 4, "image_size": 28, "patch_size": 7,
        },
        "text_config": {
            "model_type": "llama", "hidden_size": 32, "intermediate_size": 40,
            "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2,
            "vocab_size": 64,
        },
        "image_token_index": 3,
    });
    merge(&mut config, change);
    config
}

/// Puts `change` over `config`, object by object.
fn merge(config: &mut Value, change: Value) {
    match (config, change) {
        (Value::Object(config), Value::Object(change)) => {
            for (key, change) in change {
                merge(config.entry(key).or_insert(Value::Null), change);
            }
        }
        (config, change) => *config = change,
    }
}

fn resolve(change: Value) -> Result<LlavaConfig, FamilyError> {
    let parsed: LlavaHfConfig = serde_json::from_value(config(change)).expect("parses");
    parsed.resolve()
}

fn resolved(change: Value) -> LlavaConfig {
    resolve(change.clone()).unwrap_or_else(|error| panic!("{change}: {error}"))
}

#[track_caller]
fn refused(change: Value, expected: &[&str]) {
    let text = match resolve(change.clone()) {
        Ok(config) => panic!("{change} became {config:?}"),
        Err(error) => error.to_string(),
    };
    for expected in expected {
        assert!(text.contains(expected), "{change}: {text}");
    }
}

fn tower(kind: &str) -> Value {
    json!({"model_type": kind, "mlp_ratio": 2})
}

/// `"default"` drops the first row whatever the tower, as transformers does.
#[test]
fn visual_tokens_are_the_rows_that_are_selected() {
    for (kind, strategy, tokens, grid) in [
        ("clip_vision_model", "default", 16, [4, 4]),
        ("clip_vision_model", "full", 17, [1, 17]),
        ("siglip_vision_model", "full", 16, [4, 4]),
        ("siglip_vision_model", "default", 15, [1, 15]),
        ("dinov2", "default", 16, [4, 4]),
        ("dinov2", "full", 17, [1, 17]),
    ] {
        let found = resolved(json!({
            "vision_config": tower(kind), "vision_feature_select_strategy": strategy,
        }));
        assert_eq!(found.visual_tokens(), tokens, "{kind} {strategy}");
        assert_eq!(found.token_grid(), grid, "{kind} {strategy}");
        assert_eq!(
            found.encoder().class_token,
            found.vision.kind != VitKind::Siglip
        );
        let cells = found.cells(&Sample::from(vec![1, 3, 3, 3]), Modality::Image);
        let is_grid = grid == [4, 4];
        assert_eq!(
            cells.len(),
            if is_grid { 3 } else { 0 },
            "{kind} {strategy}"
        );
        let reducible = found.check_reducible().map_err(|error| error.to_string());
        assert_eq!(reducible.is_ok(), is_grid, "{reducible:?}");
        if let Err(text) = reducible {
            assert!(
                text.contains(strategy) && text.contains("no grid"),
                "{text}"
            );
        }
    }
    let one_patch = json!({"model_type": "siglip_vision_model", "patch_size": 28});
    refused(json!({"vision_config": one_patch}), &["only patch"]);
    refused(
        json!({"vision_feature_select_strategy": "cls"}),
        &["cls", "default", "full"],
    );
}

#[test]
fn one_layer_or_several_make_the_features() {
    for (layers, expected) in [
        (json!(-2), vec![2]),
        (json!(0), vec![0]),
        (json!([-2]), vec![2]),
        (json!([-2, 0, -1, -2]), vec![2, 0, 3, 2]),
    ] {
        let found = resolved(json!({"vision_feature_layer": layers}));
        assert_eq!(found.vision_layers, expected);
        assert_eq!(found.feature_size(), 32 * expected.len());
    }
    refused(json!({"vision_feature_layer": []}), &["lists 0 layers"]);
    refused(
        json!({"vision_feature_layer": [0, 1, 2, 3, 0]}),
        &["lists 5"],
    );
    refused(
        json!({"vision_feature_layer": [-2, 4]}),
        &["layer 4", "3 layers"],
    );
    refused(
        json!({"vision_feature_layer": i64::MIN}),
        &["does not exist"],
    );
}

/// The library writes 576 whatever the tower gives.
#[test]
fn a_length_that_is_the_default_says_nothing() {
    for (length, accepted) in [(json!(16), true), (json!(576), true), (json!(64), false)] {
        let found = resolve(json!({"image_seq_length": length}));
        assert_eq!(found.is_ok(), accepted, "{length}");
    }
    refused(
        json!({"image_seq_length": 16, "vision_feature_select_strategy": "full"}),
        &["image_seq_length is 16", "give 17", "\"full\""],
    );
}

#[test]
fn the_image_token_has_two_spellings() {
    for (change, token) in [
        (json!({"image_token_id": 3}), 3),
        (json!({"image_token_index": null, "image_token_id": 5}), 5),
        (json!({"image_token_index": null}), 32000),
    ] {
        assert_eq!(resolved(change).image_token, token);
    }
    refused(
        json!({"image_token_id": 4}),
        &["image_token_index is 3", "image_token_id beside it is 4"],
    );
}

/// As `LlamaConfig()`, `MistralConfig()` and `Qwen2Config()` of transformers 5.24.
#[test]
fn every_text_model_has_the_defaults_of_its_class() {
    for (name, sizes, bias) in [
        ("llama", [32_000, 11_008, 32, 2048], false),
        ("mistral", [32_000, 14_336, 8, 131_072], false),
        ("qwen2", [151_936, 22_016, 32, 32_768], true),
    ] {
        let parsed = json!({"text_config": {"model_type": name}});
        let parsed: LlavaHfConfig = serde_json::from_value(parsed).expect("parses");
        let text = parsed.resolve().expect("resolves").text;
        let found = [
            text.vocab_size,
            text.intermediate_size,
            text.num_key_value_heads,
            text.max_position_embeddings,
        ];
        assert_eq!(found, sizes, "{name}");
        assert_eq!(
            (text.qkv_bias, text.hidden_size, text.num_layers),
            (bias, 4096, 32)
        );
        assert_eq!((text.head_dim, text.rms_norm_eps), (128, 1e-6));
        assert_eq!(text.rope.theta, 1e4);
    }
    refused(
        json!({"text_config": {"model_type": "gemma"}}),
        &["\"gemma\"", "llama, mistral and qwen2"],
    );
}

#[test]
fn a_window_limits_the_context_where_layers_use_it() {
    let window = |text: Value| resolved(json!({"text_config": text})).text.context();
    let mistral = |window: Value| json!({"model_type": "mistral", "sliding_window": window});
    assert_eq!(
        window(json!({"model_type": "mistral"})),
        (4096, "sliding_window")
    );
    assert_eq!(window(mistral(json!(100))), (100, "sliding_window"));
    let whole = (131_072, "max_position_embeddings");
    assert_eq!(window(mistral(json!(null))), whole);
    assert_eq!(window(mistral(json!(1 << 20))), whole);
    refused(
        json!({"text_config": mistral(json!(0))}),
        &["sliding_window is 0"],
    );

    let qwen2 = |mut change: Value| {
        merge(
            &mut change,
            json!({"model_type": "qwen2", "sliding_window": 100}),
        );
        change
    };
    let whole = (32_768, "max_position_embeddings");
    assert_eq!(window(qwen2(json!({}))), whole);
    assert_eq!(window(qwen2(json!({"use_sliding_window": true}))), whole);
    let some = json!({"use_sliding_window": true, "max_window_layers": 2});
    assert_eq!(window(qwen2(some)), (100, "sliding_window"));
    let named =
        json!({"use_sliding_window": true, "layer_types": ["full_attention", "sliding_attention"]});
    assert_eq!(window(qwen2(named)), (100, "sliding_window"));
    assert_eq!(
        window(json!({"sliding_window": 100})).1,
        "max_position_embeddings"
    );
}

#[test]
fn rope_is_read_in_both_spellings() {
    let rope = |text: Value| resolved(json!({"text_config": text})).text.rope;
    let linear =
        rope(json!({"rope_theta": 5e5, "rope_scaling": {"type": "linear", "factor": 4.0}}));
    assert_eq!(linear.scaling, RopeScaling::Linear { factor: 4.0 });
    assert_eq!(linear.theta, 5e5);
    let llama3 = rope(json!({"rope_parameters": {
        "rope_type": "llama3", "rope_theta": 500.0, "factor": 8.0, "low_freq_factor": 1.0,
        "high_freq_factor": 4.0, "original_max_position_embeddings": 48,
    }}));
    assert!(matches!(llama3.scaling, RopeScaling::Llama3 { .. }));
    assert_eq!(llama3.theta, 500.0);
    refused(
        json!({"text_config": {"rope_scaling": {"rope_type": "yarn", "factor": 2.0}}}),
        &["text_config", "\"yarn\""],
    );
}

#[test]
fn what_is_not_supported_is_refused_by_name() {
    refused(
        json!({"vision_config": {"model_type": "pixtral"}}),
        &["Pixtral", "Nearest", "siglip_vision_model"],
    );
    for name in [
        "siglip2_vision_model",
        "dinov2_with_registers",
        "intern_vit_6b",
    ] {
        refused(
            json!({"vision_config": {"model_type": name}}),
            &[name, "clip_vision_model, siglip_vision_model, dinov2"],
        );
    }
    refused(json!({"projector_hidden_act": "relu"}), &["relu"]);
    refused(
        json!({"text_config": {"attention_bias": true}}),
        &["biases"],
    );
}
