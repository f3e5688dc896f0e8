use reroute_checkpoint::{NameTable, Rule};
use vision_encoder::vit::{VitActivation, VitConfig, VitKind};

/// The table of a model with this tower: those of DINOv2 are named in their own way.
pub(crate) fn names(tower: &VitConfig) -> &'static NameTable {
    match (tower.kind, tower.activation) {
        (VitKind::Dinov2, VitActivation::SwiGlu) => &DINOV2_SWIGLU,
        (VitKind::Dinov2, _) => &DINOV2,
        _ => &NAMES,
    }
}

/// A table with these rules for the vision tower.
macro_rules! table {
    ($($tower:expr),+ $(,)?) => {
        NameTable {
            rules: &[
                Rule {
                    module: "language_model.lm_head.*",
                    file: &[
                        "language_model.lm_head.*",
                        "language_model.model.lm_head.*",
                        "model.language_model.lm_head.*",
                        "lm_head.*",
                    ],
                },
                Rule {
                    module: "language_model.*",
                    file: &[
                        "language_model.model.*",
                        "model.language_model.model.*",
                        "model.language_model.*",
                    ],
                },
                Rule {
                    module: "multi_modal_projector.*",
                    file: &["multi_modal_projector.*", "model.multi_modal_projector.*"],
                },
                $($tower),+
            ],
            ignore: IGNORED,
        }
    };
}

/// A rule for parameters of DINOv2, whose modules CLIP's names stand for.
macro_rules! dinov2 {
    ($module:literal: $($file:literal),+) => {
        Rule {
            module: concat!("vision_tower.", $module),
            file: &[$(concat!("vision_tower.", $file), concat!("model.vision_tower.", $file)),+],
        }
    };
}

/// DINOv2's table; `mlp` are the rules for what its MLPs have names of their own for.
macro_rules! dinov2_table {
    ($($mlp:expr),* $(,)?) => {
        table![
            dinov2!("embeddings.patch_embedding.*": "embeddings.patch_embeddings.projection.*"),
            dinov2!("encoder.layers.{}.self_attn.q_proj.*":
                "encoder.layer.{}.attention.attention.query.*", "encoder.layer.{}.attention.q_proj.*"),
            dinov2!("encoder.layers.{}.self_attn.k_proj.*":
                "encoder.layer.{}.attention.attention.key.*", "encoder.layer.{}.attention.k_proj.*"),
            dinov2!("encoder.layers.{}.self_attn.v_proj.*":
                "encoder.layer.{}.attention.attention.value.*", "encoder.layer.{}.attention.v_proj.*"),
            dinov2!("encoder.layers.{}.self_attn.out_proj.*":
                "encoder.layer.{}.attention.output.dense.*", "encoder.layer.{}.attention.o_proj.*"),
            dinov2!("encoder.layers.{}.layer_norm1.*": "encoder.layer.{}.norm1.*"),
            dinov2!("encoder.layers.{}.layer_norm2.*": "encoder.layer.{}.norm2.*"),
            $($mlp,)*
            dinov2!("encoder.layers.{}.*": "encoder.layer.{}.*"),
            dinov2!("*": "*"),
        ]
    };
}

/// What checkpoints call the parameters of [`Llava`](crate::Llava) with a CLIP or SigLIP tower, old
/// spelling and new.
pub static NAMES: NameTable = table![Rule {
    module: "vision_tower.*",
    file: &[
        "vision_tower.vision_model.*",
        "model.vision_tower.vision_model.*",
        "model.vision_tower.*",
        "vision_tower.*",
    ],
}];

/// The same with DINOv2.
static DINOV2: NameTable = dinov2_table![];

/// The same with DINOv2 giant: gate and value of an MLP are one product.
static DINOV2_SWIGLU: NameTable = dinov2_table![
    dinov2!("encoder.layers.{}.mlp.fc1.*": "encoder.layer.{}.mlp.weights_in.*"),
    dinov2!("encoder.layers.{}.mlp.fc2.*": "encoder.layer.{}.mlp.weights_out.*"),
];

/// Buffers that old libraries saved, and what comes after the features: the last norm, SigLIP's
/// pooling head; DINOv2's stand-in for masked patches.
const IGNORED: &[&str] = &[
    "*.rotary_emb.inv_freq",
    "*.embeddings.position_ids",
    "*.embeddings.mask_token",
    "*.post_layernorm.weight",
    "*.post_layernorm.bias",
    "vision_tower.layernorm.*",
    "model.vision_tower.layernorm.*",
    "vision_tower.head.*",
    "vision_tower.vision_model.head.*",
    "model.vision_tower.head.*",
    "model.vision_tower.vision_model.head.*",
];

#[cfg(test)]
mod tests {
    use super::{DINOV2, DINOV2_SWIGLU, NAMES};

    /// What is written reads back, as the hub spells it.
    #[test]
    fn every_parameter_has_a_name_to_be_written_by() {
        for (path, name) in [
            (
                "language_model.lm_head.weight",
                "language_model.lm_head.weight",
            ),
            (
                "language_model.norm.gamma",
                "language_model.model.norm.gamma",
            ),
            (
                "multi_modal_projector.linear_1.bias",
                "multi_modal_projector.linear_1.bias",
            ),
            (
                "vision_tower.encoder.layers.3.mlp.fc1.weight",
                "vision_tower.vision_model.encoder.layers.3.mlp.fc1.weight",
            ),
        ] {
            assert_eq!(NAMES.file_name(path).as_deref(), Some(name));
            assert_eq!(NAMES.module_path(name).as_deref(), Some(path));
        }
    }

    /// Libraries have written the tower with and without `model`, with and without `vision_model`.
    #[test]
    fn the_tower_is_found_in_every_spelling() {
        for prefix in ["", "model."] {
            for inner in ["", "vision_model."] {
                let name = format!("{prefix}vision_tower.{inner}encoder.layers.3.mlp.fc1.weight");
                let path = NAMES.module_path(&name);
                let expected = "vision_tower.encoder.layers.3.mlp.fc1.weight";
                assert_eq!(path.as_deref(), Some(expected), "{name}");
            }
        }
    }

    /// DINOv2's modules under the names of CLIP's, in the library's words and, where they differ, in
    /// those of its modules since 5.24; written as the library saves them.
    #[test]
    fn dinov2_s_names_are_those_of_the_tower() {
        for (table, spellings, expected) in [
            (
                &DINOV2,
                &["embeddings.cls_token"][..],
                "embeddings.cls_token",
            ),
            (
                &DINOV2,
                &["embeddings.position_embeddings"],
                "embeddings.position_embeddings",
            ),
            (
                &DINOV2,
                &["embeddings.patch_embeddings.projection.bias"],
                "embeddings.patch_embedding.bias",
            ),
            (
                &DINOV2,
                &[
                    "encoder.layer.2.attention.attention.value.weight",
                    "encoder.layer.2.attention.v_proj.weight",
                ],
                "encoder.layers.2.self_attn.v_proj.weight",
            ),
            (
                &DINOV2,
                &[
                    "encoder.layer.0.attention.output.dense.bias",
                    "encoder.layer.0.attention.o_proj.bias",
                ],
                "encoder.layers.0.self_attn.out_proj.bias",
            ),
            (
                &DINOV2,
                &["encoder.layer.0.norm2.weight"],
                "encoder.layers.0.layer_norm2.weight",
            ),
            (
                &DINOV2,
                &["encoder.layer.0.layer_scale1.lambda1"],
                "encoder.layers.0.layer_scale1.lambda1",
            ),
            (
                &DINOV2,
                &["encoder.layer.0.mlp.fc1.weight"],
                "encoder.layers.0.mlp.fc1.weight",
            ),
            (
                &DINOV2_SWIGLU,
                &["encoder.layer.0.mlp.weights_in.weight"],
                "encoder.layers.0.mlp.fc1.weight",
            ),
            (
                &DINOV2_SWIGLU,
                &["encoder.layer.0.mlp.weights_out.bias"],
                "encoder.layers.0.mlp.fc2.bias",
            ),
        ] {
            let expected = format!("vision_tower.{expected}");
            for name in spellings {
                for prefix in ["vision_tower.", "model.vision_tower."] {
                    let path = table.module_path(&format!("{prefix}{name}"));
                    assert_eq!(path.as_deref(), Some(expected.as_str()), "{name}");
                }
            }
            let written = format!("vision_tower.{}", spellings[0]);
            assert_eq!(table.file_name(&expected), Some(written));
        }
        assert!(DINOV2.ignores("vision_tower.layernorm.weight"));
        assert!(NAMES.ignores("model.vision_tower.head.attention.in_proj_weight"));
        assert!(!NAMES.ignores("vision_tower.encoder.layers.0.head.weight"));
    }
}
