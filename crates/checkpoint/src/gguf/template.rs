//! Chat templates of language models that know nothing of pictures.

/// Makes one text of a message's parts, a picture being `<image>` and a new line.
const FLATTEN: &str = concat!(
    "{%- set flat = namespace(messages=[]) -%}",
    "{%- for message in messages -%}",
    "{%- if message['content'] is string -%}",
    "{%- set flat.messages = flat.messages + [message] -%}",
    "{%- else -%}",
    "{%- set text = namespace(of='') -%}",
    "{%- for part in message['content'] -%}",
    "{%- if part['type'] == 'image' -%}",
    "{%- set text.of = text.of + '<image>\\n' -%}",
    "{%- elif part['type'] == 'text' -%}",
    "{%- set text.of = text.of + part['text'] -%}",
    "{%- endif -%}",
    "{%- endfor -%}",
    "{%- set flat.messages = flat.messages + [{'role': message['role'], 'content': text.of}] -%}",
    "{%- endif -%}",
    "{%- endfor -%}",
    "{%- set messages = flat.messages %}",
);

/// The template of a language model as one that takes pictures, too, each of which is `<image>` and a new line
/// in front of the text; unchanged where it mentions them.
pub fn template_with_images(template: &str) -> String {
    match template.contains("image") {
        true => template.to_owned(),
        false => format!("{FLATTEN}{template}"),
    }
}
