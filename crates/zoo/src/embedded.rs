//! The model and scenes that are part of the program, for a first look without downloads.

use crate::Folder;

macro_rules! files {
    ($($name:literal),* $(,)?) => {
        &[$(($name, include_bytes!(concat!("../assets/narrow-llava/", $name)))),*]
    };
}

static CHECKPOINT: &[(&str, &[u8])] = files![
    "chat_template.jinja",
    "config.json",
    "generation_config.json",
    "grounding.json",
    "model.safetensors",
    "preprocessor_config.json",
    "processor_config.json",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer_config.json",
];

/// A scene that the built-in model has not seen in training.
#[derive(Debug, Clone, Copy)]
pub struct Scene {
    /// PNG file.
    pub image: &'static [u8],
    /// What to find.
    pub expression: &'static str,
}

/// The scene that commands show without `--image`.
pub static SCENE: Scene = Scene {
    image: include_bytes!("../assets/scenes/063.png"),
    expression: "the large cyan square",
};

/// The built-in checkpoint.
pub fn checkpoint() -> Folder {
    Folder::embedded(CHECKPOINT)
}
