//! Chat templates of language models that know nothing of pictures.

/// Makes one text of a message's parts.
const TEXT_OF_PARTS: &str = include_str!("text_of_parts.jinja");

/// The template of a language model as one that takes pictures, too: each is `<image>` and a new line in the text of
/// its message.
pub fn template_with_images(template: &str) -> String {
    format!("{TEXT_OF_PARTS}{template}")
}
