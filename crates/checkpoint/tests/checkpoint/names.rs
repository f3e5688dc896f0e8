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
