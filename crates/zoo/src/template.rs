mod environment;
mod json;

use std::collections::BTreeMap;
use std::time::SystemTime;

use minijinja::{Environment, Value};
use reroute_checkpoint::Folder;
use serde::Deserialize;
use serde::de::IgnoredAny;

use crate::messages::{Content, Message, Placeholders, Role, expand};
use crate::{Dialect, Tokenizer, ZooError};

/// Instructions a template may execute, and bytes it may render: a template is untrusted input.
const FUEL: u64 = 2_000_000;
const MAX_OUTPUT: usize = 8 << 20;

/// What no template says of itself.
const PROBE: &str = "\u{2042}probe\u{2042}";

/// Longest template that is compiled, in bytes; published ones reach a third of it. Compiling a long
/// chain such as `x+x+x+…` takes time that grows with its square.
const MAX_SOURCE: usize = 64 << 10;

/// Stack that the compiler may need per byte of a template. It recurses into chains such as
/// `1+1+1+…` without a limit; a level takes two bytes and less than half of this, optimised.
const STACK_PER_BYTE: usize = 2 << 10;
const STACK: usize = 1 << 20;

/// A checkpoint's chat template: Jinja, in the dialect of Hugging Face.
pub struct ChatTemplate {
    environment: Environment<'static>,
    name: String,
    special_tokens: SpecialTokens,
    dialect: Dialect,
    /// Whether a message is a list of parts for it; a string otherwise.
    takes_parts: bool,
    numbers_media: bool,
}

/// What `tokenizer_config.json` calls `bos_token`, `eos_token`, `pad_token` and so on, which templates
/// refer to by these names.
#[derive(Debug, Clone, Default, Deserialize)]
struct SpecialTokens {
    #[serde(default)]
    bos_token: Option<TokenText>,
    #[serde(default)]
    eos_token: Option<TokenText>,
    /// All other settings.
    #[serde(flatten)]
    others: BTreeMap<String, Setting>,
}

impl SpecialTokens {
    fn iter(&self) -> impl Iterator<Item = (&str, &str)> {
        let others = self.others.iter().filter_map(|(name, value)| match value {
            Setting::Token(token) if name.ends_with("_token") => Some((name.as_str(), token)),
            _ => None,
        });
        let named = [
            ("bos_token", &self.bos_token),
            ("eos_token", &self.eos_token),
        ];
        let named = named.into_iter();
        let named = named.filter_map(|(name, token)| Some((name, token.as_ref()?)));
        named
            .chain(others)
            .map(|(name, token)| (name, token.text()))
    }
}

/// The value of any key.
#[derive(Debug, Clone, Deserialize)]
#[serde(untagged)]
enum Setting {
    Token(TokenText),
    Other(IgnoredAny),
}

/// A token, plain or as the object that older tokenizers write.
#[derive(Debug, Clone, Deserialize)]
#[serde(untagged)]
enum TokenText {
    Plain(String),
    Object { content: String },
}

impl TokenText {
    fn text(&self) -> &str {
        match self {
            Self::Plain(text) => text,
            Self::Object { content } => content,
        }
    }
}

#[derive(Deserialize)]
struct HasTemplate {
    #[serde(default)]
    chat_template: Option<TemplateText>,
}

/// A template, or several of which one is the default.
#[derive(Deserialize)]
#[serde(untagged)]
enum TemplateText {
    Only(String),
    Named(Vec<NamedTemplate>),
}

#[derive(Deserialize)]
struct NamedTemplate {
    name: String,
    template: String,
}

impl TemplateText {
    fn default_source(self) -> Option<String> {
        match self {
            Self::Only(source) => Some(source),
            Self::Named(templates) => {
                let mut templates = templates.into_iter();
                let default = templates.find(|named| named.name == "default");
                default.map(|named| named.template)
            }
        }
    }
}

impl ChatTemplate {
    /// Takes the first of `chat_template.jinja`, `chat_template.json`, `processor_config.json` and
    /// `tokenizer_config.json` that has a template; the dialect's own otherwise.
    pub fn open(folder: &Folder, dialect: Dialect) -> Result<Self, ZooError> {
        let tokens = "tokenizer_config.json";
        let special_tokens: SpecialTokens = match folder.has(tokens) {
            true => folder.read_json(tokens, reroute_checkpoint::CONFIG_MAX_BYTES)?,
            false => SpecialTokens::default(),
        };
        if folder.has("chat_template.jinja") {
            let bytes = folder.read(
                "chat_template.jinja",
                reroute_checkpoint::TEMPLATE_MAX_BYTES,
            )?;
            let source = String::from_utf8(bytes).map_err(|_| ZooError::TemplateOutput {
                name: "chat_template.jinja".into(),
                reason: "is not UTF-8".into(),
            })?;
            return Self::new("chat_template.jinja", source, special_tokens, dialect);
        }
        for name in [
            "chat_template.json",
            "processor_config.json",
            "tokenizer_config.json",
        ] {
            if folder.has(name) {
                let file: HasTemplate =
                    folder.read_json(name, reroute_checkpoint::CONFIG_MAX_BYTES)?;
                let source = file.chat_template.and_then(TemplateText::default_source);
                if let Some(source) = source {
                    return Self::new(name, source, special_tokens, dialect);
                }
            }
        }
        let source = dialect.template.to_string();
        Self::new("(built in)", source, special_tokens, dialect)
    }

    /// Compiles a template.
    fn new(
        name: &str,
        source: String,
        special_tokens: SpecialTokens,
        dialect: Dialect,
    ) -> Result<Self, ZooError> {
        let failed = |source| ZooError::Template {
            name: name.into(),
            source,
        };
        let refused = |reason: String| ZooError::TemplateOutput {
            name: name.into(),
            reason: format!("{reason}; replace it by the one published with the model"),
        };
        if source.len() > MAX_SOURCE {
            return Err(refused(format!(
                "has {} bytes, {MAX_SOURCE} are allowed",
                source.len()
            )));
        }
        let mut environment = environment::environment().map_err(failed)?;
        let source = without_generation_marks(&source);
        let stack = STACK + source.len() * STACK_PER_BYTE;
        let compiled = std::thread::scope(|scope| {
            let compile = || environment.add_template_owned("chat", source);
            let thread = std::thread::Builder::new().stack_size(stack);
            thread.spawn_scoped(scope, compile).ok()?.join().ok()
        });
        let no_stack = || refused(format!("needs a stack of {stack} bytes to be compiled"));
        compiled.ok_or_else(no_stack)?.map_err(failed)?;
        let mut template = Self {
            environment,
            name: name.into(),
            special_tokens,
            dialect,
            takes_parts: true,
            numbers_media: false,
        };
        let takes_parts = template.shows_text();
        template.takes_parts = false;
        template.takes_parts = takes_parts || !template.shows_text();
        Ok(template)
    }

    /// Writes "Picture 1: ", "Video 1: " and so on before each image and video, if the template can.
    pub fn with_numbered_media(mut self, numbers_media: bool) -> Self {
        self.numbers_media = numbers_media;
        self
    }

    /// Stops the clock of `strftime_now` at a time, shown as UTC. Without this, templates see the
    /// local time at which they are rendered.
    pub fn with_now(mut self, now: SystemTime) -> Self {
        environment::set_now(&mut self.environment, now);
        self
    }

    /// How prompts of this family are written.
    pub fn dialect(&self) -> &Dialect {
        &self.dialect
    }

    /// Renders a conversation, and the cue for an answer if `add_generation_prompt`. Texts stand in
    /// it as they are: [`Message::disarmed`] makes those harmless that come from outside.
    pub fn render_conversation(
        &self,
        messages: &[Message],
        add_generation_prompt: bool,
    ) -> Result<String, ZooError> {
        let rendered = self.run(messages, add_generation_prompt)?;
        match self.dialect.time {
            Some(_) => self.write_times(&rendered, messages),
            None => Ok(rendered),
        }
    }

    /// Token ids of a conversation, one per placeholder, special tokens in its texts made harmless.
    pub fn encode(
        &self,
        tokenizer: &Tokenizer,
        messages: &[Message],
        add_generation_prompt: bool,
    ) -> Result<Vec<u32>, ZooError> {
        let messages: Vec<Message> = messages.iter().map(|m| m.disarmed(tokenizer)).collect();
        let rendered = self.render_conversation(&messages, add_generation_prompt)?;
        let has_bos = self
            .bos_token()
            .is_some_and(|bos| rendered.starts_with(bos));
        tokenizer.encode(&rendered, !has_bos)
    }

    /// Makes as many slots of each placeholder as it has visual tokens.
    pub fn expand(&self, ids: &[u32], placeholders: &[Placeholders]) -> Result<Vec<u32>, ZooError> {
        expand(ids, placeholders).map_err(|reason| self.unusable(reason))
    }

    /// Replaces each video's placeholder by one per temporal patch, after the time of the patch. The
    /// time must be there before tokenisation: it may share tokens with the text before it.
    fn write_times(&self, rendered: &str, messages: &[Message]) -> Result<String, ZooError> {
        let placeholder = self.dialect.video;
        let parts = messages.iter().flat_map(|message| &message.content);
        let videos: Vec<&[f64]> = parts
            .filter_map(|part| match part {
                Content::Video { seconds } => Some(seconds.as_slice()),
                _ => None,
            })
            .collect();
        let mut texts = rendered.split(placeholder);
        let mut timed = texts.next().unwrap_or_default().to_string();
        let texts: Vec<&str> = texts.collect();
        if texts.len() != videos.len() {
            let [made, wanted] = [texts.len(), videos.len()];
            return Err(self.unusable(format!(
                "makes {made} placeholders {placeholder} for {wanted} videos"
            )));
        }
        for (seconds, text) in videos.into_iter().zip(texts) {
            let times = seconds
                .iter()
                .map(|&seconds| self.dialect.time_text(seconds));
            timed.extend(times.map(|time| time + placeholder));
            timed.push_str(text);
        }
        Ok(timed)
    }

    /// Whether the text of a message arrives in the prompt, and not the list that it came in.
    fn shows_text(&self) -> bool {
        let rendered = self.run(&[Message::text(Role::User, PROBE)], true);
        rendered.is_ok_and(|prompt| prompt.contains(PROBE) && !prompt.contains("\"text\""))
    }

    fn run(&self, messages: &[Message], add_generation_prompt: bool) -> Result<String, ZooError> {
        let value = |message: &Message| match self.takes_parts {
            true => message.with_parts(),
            false => message.with_string(&self.dialect),
        };
        let messages: Value = messages.iter().map(value).collect();
        let tokens = self.special_tokens.iter();
        let tokens = tokens.map(|(name, text)| (name, Value::from(text)));
        let values = [
            ("messages", messages),
            ("tools", Value::from(())),
            ("documents", Value::from(())),
            ("add_generation_prompt", add_generation_prompt.into()),
            ("add_vision_id", self.numbers_media.into()),
        ];
        let values = Value::from_pairs(tokens.chain(values));
        let mut output = Bounded(Vec::new());
        let template = self.environment.get_template("chat");
        let rendered =
            template.and_then(|template| template.render_captured_to(values, &mut output));
        rendered.map_err(|source| match source.kind() {
            minijinja::ErrorKind::OutOfFuel => self.unusable(
                "ran out of fuel: it takes too many steps for these messages; shorten them, or replace \
                 it by the one published with the model if short ones do not help",
            ),
            _ => ZooError::Template {
                name: self.name.clone(),
                source,
            },
        })?;
        String::from_utf8(output.0).map_err(|_| self.unusable("renders text that is not UTF-8"))
    }

    pub(crate) fn unusable(&self, reason: impl Into<String>) -> ZooError {
        ZooError::TemplateOutput {
            name: self.name.clone(),
            reason: reason.into(),
        }
    }

    fn bos_token(&self) -> Option<&str> {
        self.special_tokens.bos_token.as_ref().map(TokenText::text)
    }

    /// The token that ends an answer, according to `tokenizer_config.json`.
    pub fn eos_token(&self) -> Option<&str> {
        self.special_tokens.eos_token.as_ref().map(TokenText::text)
    }
}

/// Turns `{% generation %}` blocks, with which Hugging Face marks what a model is trained on, into
/// blocks that render the same: `{% with %}` without variables.
fn without_generation_marks(source: &str) -> String {
    let mut tags = source.split("{%");
    let mut plain = tags.next().unwrap_or_default().to_string();
    for tag in tags {
        let (inside, after) = tag.split_once("%}").unwrap_or((tag, ""));
        let replacement = match inside.trim_matches(['-', '+']).trim() {
            "generation" => inside.replace("generation", "with"),
            "endgeneration" => inside.replace("endgeneration", "endwith"),
            _ => {
                plain.extend(["{%", tag]);
                continue;
            }
        };
        plain.extend(["{%", &replacement, "%}", after]);
    }
    plain
}

/// A buffer that refuses to grow past [`MAX_OUTPUT`].
struct Bounded(Vec<u8>);

impl std::io::Write for Bounded {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        if self.0.len() + bytes.len() > MAX_OUTPUT {
            return Err(std::io::Error::other("the rendered prompt is too long"));
        }
        self.0.extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}
