use reroute_checkpoint::{NameTable, Rule};
use vision_encoder::vit::{VitActivation, VitConfig, VitKind};

/// A rule for parameters of the vision tower, below any of the prefixes that libraries have written.
macro_rules! tower {
    ($module:literal: $($file:literal),+) => {
        Rule {
            module: concat!("vision_tower.", $module),
            file: &[$(
                concat!("vision_tower.vision_model.", $file),
                concat!("model.vision_tower.vision_model.", $file),
                concat!("model.vision_tower.", $file),
                concat!("vision_tower.", $file)
            ),+],
        }
    };
}

/// What checkpoints call the parameters of [`Llava`](crate::Llava), old spelling and new.
pub static NAMES: NameTable = NameTable {
    rules: &[
        Rule {
            module: "language_model.lm_head.*",
            file: &[
                "language_model.lm_head.*",
                "language_model.model.lm_head.*",
                "lm_head.*",
            ],
        },
        Rule {
            module: "language_model.*",
            file: &["language_model.model.*", "model.language_model.*"],
        },
        Rule {
            module: "multi_modal_projector.*",
            file: &["multi_modal_projector.*", "model.multi_modal_projector.*"],
        },
        // DINOv2; where it has one spelling of its own and another of CLIP's, both are there.
        tower!("embeddings.patch_embedding.*": "embeddings.patch_embeddings.projection.*"),
        tower!("encoder.layers.{}.self_attn.q_proj.*":
            "encoder.layer.{}.attention.attention.query.*", "encoder.layer.{}.attention.q_proj.*"),
        tower!("encoder.layers.{}.self_attn.k_proj.*":
            "encoder.layer.{}.attention.attention.key.*", "encoder.layer.{}.attention.k_proj.*"),
        tower!("encoder.layers.{}.self_attn.v_proj.*":
            "encoder.layer.{}.attention.attention.value.*", "encoder.layer.{}.attention.v_proj.*"),
        tower!("encoder.layers.{}.self_attn.out_proj.*":
            "encoder.layer.{}.attention.output.dense.*", "encoder.layer.{}.attention.o_proj.*"),
        tower!("encoder.layers.{}.layer_norm1.*": "encoder.layer.{}.norm1.*"),
        tower!("encoder.layers.{}.layer_norm2.*": "encoder.layer.{}.norm2.*"),
        tower!("encoder.layers.{}.mlp.fc1.*": "encoder.layer.{}.mlp.weights_in.*"),
        tower!("encoder.layers.{}.mlp.fc2.*": "encoder.layer.{}.mlp.weights_out.*"),
        tower!("encoder.layers.{}.*": "encoder.layer.{}.*"),
        tower!("*": "*"),
    ],
    // Buffers that old libraries saved, and what comes after the features: the last norm, SigLIP's
    // pooling head; DINOv2's stand-in for masked patches.
    ignore: &[
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
    ],
};

/// What the hub's checkpoints with this tower call the parameter at a path of
/// [`Llava`](crate::Llava): the other way round than [`NAMES`], for saving.
pub(crate) fn file_name(tower: &VitConfig, path: &str) -> Option<String> {
    let Some(rest) = path.strip_prefix("vision_tower.") else {
        return NAMES.file_name(path);
    };
    match tower.kind {
        VitKind::Dinov2 if tower.activation == VitActivation::SwiGlu => {
            SWIGLU.file_name(rest).or_else(|| DINOV2.file_name(rest))
        }
        VitKind::Dinov2 => DINOV2.file_name(rest),
        _ => Some(format!("vision_tower.vision_model.{rest}")),
    }
}

/// A rule of one spelling.
macro_rules! written {
    ($($module:literal: $file:literal,)+) => {
        NameTable {
            rules: &[$(Rule { module: $module, file: &[concat!("vision_tower.", $file)] }),+],
            ignore: &[],
        }
    };
}

static DINOV2: NameTable = written! {
    "embeddings.patch_embedding.*": "embeddings.patch_embeddings.projection.*",
    "encoder.layers.{}.self_attn.q_proj.*": "encoder.layer.{}.attention.attention.query.*",
    "encoder.layers.{}.self_attn.k_proj.*": "encoder.layer.{}.attention.attention.key.*",
    "encoder.layers.{}.self_attn.v_proj.*": "encoder.layer.{}.attention.attention.value.*",
    "encoder.layers.{}.self_attn.out_proj.*": "encoder.layer.{}.attention.output.dense.*",
    "encoder.layers.{}.layer_norm1.*": "encoder.layer.{}.norm1.*",
    "encoder.layers.{}.layer_norm2.*": "encoder.layer.{}.norm2.*",
    "encoder.layers.{}.*": "encoder.layer.{}.*",
    "*": "*",
};

/// Where a gated MLP differs.
static SWIGLU: NameTable = written! {
    "encoder.layers.{}.mlp.fc1.*": "encoder.layer.{}.mlp.weights_in.*",
    "encoder.layers.{}.mlp.fc2.*": "encoder.layer.{}.mlp.weights_out.*",
};

#[cfg(test)]
mod tests {
    use super::{NAMES, file_name};
    use vision_encoder::vit::{VitConfig, VitHfConfig};

    fn clip() -> VitConfig {
        let config = VitHfConfig::clip_large_patch14_336();
        config.resolve().expect("the published configuration")
    }

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
            assert_eq!(file_name(&clip(), path).as_deref(), Some(name));
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

    /// DINOv2's modules under the names of CLIP's, as saved by libraries before and since 5.24.
    #[test]
    fn dinov2_s_names_are_those_of_the_tower() {
        for (name, expected) in [
            ("embeddings.cls_token", "embeddings.cls_token"),
            (
                "embeddings.position_embeddings",
                "embeddings.position_embeddings",
            ),
            (
                "embeddings.patch_embeddings.projection.bias",
                "embeddings.patch_embedding.bias",
            ),
            (
                "encoder.layer.2.attention.attention.value.weight",
                "encoder.layers.2.self_attn.v_proj.weight",
            ),
            (
                "encoder.layer.2.attention.v_proj.weight",
                "encoder.layers.2.self_attn.v_proj.weight",
            ),
            (
                "encoder.layer.0.attention.output.dense.bias",
                "encoder.layers.0.self_attn.out_proj.bias",
            ),
            (
                "encoder.layer.0.norm2.weight",
                "encoder.layers.0.layer_norm2.weight",
            ),
            (
                "encoder.layer.0.layer_scale1.lambda1",
                "encoder.layers.0.layer_scale1.lambda1",
            ),
            (
                "encoder.layer.0.mlp.weights_in.weight",
                "encoder.layers.0.mlp.fc1.weight",
            ),
            (
                "encoder.layer.0.mlp.fc2.weight",
                "encoder.layers.0.mlp.fc2.weight",
            ),
        ] {
            for prefix in ["vision_tower.", "model.vision_tower."] {
                let path = NAMES.module_path(&format!("{prefix}{name}"));
                assert_eq!(path, Some(format!("vision_tower.{expected}")), "{name}");
            }
        }
        assert!(NAMES.ignores("vision_tower.layernorm.weight"));
        assert!(NAMES.ignores("model.vision_tower.head.attention.in_proj_weight"));
        assert!(!NAMES.ignores("vision_tower.encoder.layers.0.head.weight"));
    }
}
