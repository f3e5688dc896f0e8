use proptest::prelude::*;
use reroute_checkpoint::{NameTable, Rule};

/// The spellings in which LLaVA-1.5 checkpoints exist.
const LLAVA: NameTable = NameTable {
    rules: &[
        Rule {
            module: "vision_tower.*",
            file: &[
                "vision_tower.vision_model.*",
                "model.vision_tower.vision_model.*",
            ],
        },
        Rule {
            module: "projector.*",
            file: &["multi_modal_projector.*", "model.multi_modal_projector.*"],
        },
        Rule {
            module: "decoder.lm_head.weight",
            file: &["language_model.lm_head.weight", "lm_head.weight"],
        },
        Rule {
            module: "decoder.*",
            file: &["language_model.model.*", "model.language_model.*"],
        },
    ],
    ignore: &["*.rotary_emb.inv_freq", "*.embeddings.position_ids"],
};

#[test]
fn every_spelling_leads_to_the_same_parameter() {
    for (name, path) in [
        ("language_model.lm_head.weight", "decoder.lm_head.weight"),
        (
            "language_model.model.lm_head.weight",
            "decoder.lm_head.weight",
        ),
        ("lm_head.weight", "decoder.lm_head.weight"),
        (
            "language_model.model.layers.10.self_attn.q_proj.weight",
            "decoder.layers.10.self_attn.q_proj.weight",
        ),
        (
            "model.language_model.layers.10.self_attn.q_proj.weight",
            "decoder.layers.10.self_attn.q_proj.weight",
        ),
        (
            "model.vision_tower.vision_model.pre_layrnorm.bias",
            "vision_tower.pre_layrnorm.bias",
        ),
        (
            "model.multi_modal_projector.linear_1.bias",
            "projector.linear_1.bias",
        ),
    ] {
        assert_eq!(LLAVA.module_path(name).as_deref(), Some(path), "{name}");
    }
}

#[test]
fn a_star_takes_whole_segments_and_at_least_one() {
    for name in [
        "",
        ".",
        "language_model.model",
        "language_model.model.",
        "language_model.models.norm.weight",
        "xmulti_modal_projector.linear_1.bias",
        "lm_head.weight.x",
    ] {
        assert_eq!(LLAVA.module_path(name), None, "{name}");
    }
    assert!(LLAVA.ignores("a.b.rotary_emb.inv_freq"));
    assert!(!LLAVA.ignores("rotary_emb.inv_freq"));
    assert!(!LLAVA.ignores("a.xrotary_emb.inv_freq"));
}

#[test]
fn an_index_is_decimal_without_leading_zeros() {
    const TABLE: NameTable = NameTable {
        rules: &[Rule {
            module: "blocks.{}.parts.{}.gamma",
            file: &["h.{}.{}.weight"],
        }],
        ignore: &[],
    };
    let path = |name| TABLE.module_path(name);
    assert_eq!(
        path("h.0.12.weight").as_deref(),
        Some("blocks.0.parts.12.gamma")
    );
    for name in [
        "h.00.1.weight",
        "h.01.1.weight",
        "h.-1.1.weight",
        "h.+1.1.weight",
        "h.1_0.1.weight",
        "h..1.weight",
        "h.a.1.weight",
        "h.٣.1.weight",
        "h.1.weight",
    ] {
        assert_eq!(path(name), None, "{name}");
    }
}

#[test]
fn exceptions_come_first() {
    const TABLE: NameTable = NameTable {
        rules: &[
            Rule {
                module: "*.norm.gamma",
                file: &["model.*.norm.weight"],
            },
            Rule {
                module: "*",
                file: &["model.*"],
            },
        ],
        ignore: &[],
    };
    let path = |name| TABLE.module_path(name);
    assert_eq!(
        path("model.layers.0.norm.weight").as_deref(),
        Some("layers.0.norm.gamma")
    );
    assert_eq!(
        path("model.layers.0.mlp.weight").as_deref(),
        Some("layers.0.mlp.weight")
    );
}

#[test]
fn the_first_spelling_that_leads_back_is_written() {
    const TABLE: NameTable = NameTable {
        rules: &[
            Rule {
                module: "*.norm.gamma",
                file: &["model.*.norm.weight"],
            },
            Rule {
                module: "blocks.{}.parts.{}.gamma",
                // The first is taken for something else when it is read.
                file: &["model.{}.{}.norm.weight", "h.{}.{}.weight"],
            },
            Rule {
                module: "*",
                file: &["model.*"],
            },
        ],
        ignore: &[],
    };
    let name = |path| TABLE.file_name(path);
    assert_eq!(
        name("layers.0.norm.gamma").as_deref(),
        Some("model.layers.0.norm.weight")
    );
    assert_eq!(
        name("blocks.1.parts.20.gamma").as_deref(),
        Some("h.1.20.weight")
    );
    // No name leads to it.
    assert_eq!(name("layers.0.norm.weight"), None);
    assert_eq!(LLAVA.file_name("tower.0.weight"), None);
}

proptest! {
    #[test]
    fn names_and_paths_lead_to_each_other(
        start in prop::sample::select(vec![
            "vision_tower", "projector", "decoder", "decoder.lm_head", "language_model.model",
            "model.language_model", "language_model", "lm_head", "model.vision_tower",
            "vision_tower.vision_model", "multi_modal_projector", "",
        ]),
        rest in prop::collection::vec("[a-z_]{1,6}|[0-9]{1,3}|weight|vision_model|lm_head", 0..5),
    ) {
        let text = [&[start.to_owned()], &rest[..]].concat().join(".");
        if let Some(name) = LLAVA.file_name(&text) {
            prop_assert_eq!(LLAVA.module_path(&name), Some(text.clone()));
        }
        if let Some(path) = LLAVA.module_path(&text) {
            let name = LLAVA.file_name(&path);
            prop_assert_eq!(name.and_then(|name| LLAVA.module_path(&name)), Some(path));
        }
    }
}
