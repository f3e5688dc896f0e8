use checkpoint::Folder;
use minijinja::syntax::SyntaxConfig;
use minijinja::value::Serde;
use minijinja::{Environment, Error, ErrorKind, context};
use serde::Deserialize;
use serde_json::json;

use crate::ZooError;

/// What LLaVA-1.5 was trained on, for folders that bring no template.
const LLAVA_DEFAULT: &str = "{% for message in messages %}\
    {{ message['role'].upper() + ': ' }}\
    {% for part in message['content'] %}\
    {% if part['type'] == 'image' %}{{ '<image>\n' }}{% else %}{{ part['text'] + ' ' }}{% endif %}\
    {% endfor %}{% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}";

/// Instructions a template may execute, and bytes it may render: a template is untrusted input.
const FUEL: u64 = 2_000_000;
const MAX_OUTPUT: usize = 8 << 20;

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
}

/// Texts that templates refer to.
#[derive(Debug, Clone, Default, Deserialize)]
pub(crate) struct SpecialTokens {
    #[serde(default)]
    pub bos_token: Option<TokenText>,
    #[serde(default)]
    pub eos_token: Option<TokenText>,
}

/// A token, plain or as the object that older tokenizers write.
#[derive(Debug, Clone, Deserialize)]
#[serde(untagged)]
pub(crate) enum TokenText {
    Plain(String),
    Object { content: String },
}

impl TokenText {
    pub fn text(&self) -> &str {
        match self {
            Self::Plain(text) => text,
            Self::Object { content } => content,
        }
    }
}

#[derive(Deserialize)]
struct HasTemplate {
    #[serde(default)]
    chat_template: Option<String>,
}

impl ChatTemplate {
    /// Takes the first of `chat_template.jinja`, `chat_template.json`, `processor_config.json` and
    /// `tokenizer_config.json` that has a template; LLaVA-1.5's own otherwise.
    pub(crate) fn open(folder: &Folder, special_tokens: SpecialTokens) -> Result<Self, ZooError> {
        if folder.has("chat_template.jinja") {
            let bytes = folder.read("chat_template.jinja", checkpoint::TEMPLATE_MAX_BYTES)?;
            let source = String::from_utf8_lossy(&bytes).into_owned();
            return Self::new("chat_template.jinja", source, special_tokens);
        }
        for name in [
            "chat_template.json",
            "processor_config.json",
            "tokenizer_config.json",
        ] {
            if folder.has(name) {
                let file: HasTemplate = folder.read_json(name, checkpoint::CONFIG_MAX_BYTES)?;
                if let Some(source) = file.chat_template {
                    return Self::new(name, source, special_tokens);
                }
            }
        }
        Self::new("(built in)", LLAVA_DEFAULT.into(), special_tokens)
    }

    /// Compiles a template.
    pub(crate) fn new(
        name: &str,
        source: String,
        special_tokens: SpecialTokens,
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
        let mut environment = Environment::new();
        environment.set_syntax(syntax().map_err(failed)?);
        environment.set_fuel(Some(FUEL));
        environment
            .set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
        environment.add_function(
            "raise_exception",
            |message: String| -> Result<String, Error> {
                Err(Error::new(ErrorKind::InvalidOperation, message))
            },
        );
        let stack = STACK + source.len() * STACK_PER_BYTE;
        let compiled = std::thread::scope(|scope| {
            let compile = || environment.add_template_owned("chat", source);
            let thread = std::thread::Builder::new().stack_size(stack);
            thread.spawn_scoped(scope, compile).ok()?.join().ok()
        });
        let no_stack = || refused(format!("needs a stack of {stack} bytes to be compiled"));
        compiled.ok_or_else(no_stack)?.map_err(failed)?;
        Ok(Self {
            environment,
            name: name.into(),
            special_tokens,
        })
    }

    /// Renders one user turn: the images, then the text, then the cue for the answer.
    pub fn render(&self, images: usize, text: &str) -> Result<String, ZooError> {
        let mut content = vec![json!({"type": "image"}); images];
        content.push(json!({"type": "text", "text": text}));
        let messages = json!([{"role": "user", "content": content}]);
        let token = |token: &Option<TokenText>| token.as_ref().map(|t| t.text().to_string());
        let values = context! {
            messages => minijinja::Value::from(Serde(&messages)),
            add_generation_prompt => true,
            bos_token => token(&self.special_tokens.bos_token),
            eos_token => token(&self.special_tokens.eos_token),
        };
        let mut output = Bounded(Vec::new());
        let template = self.environment.get_template("chat");
        let rendered =
            template.and_then(|template| template.render_captured_to(values, &mut output));
        rendered.map_err(|source| ZooError::Template {
            name: self.name.clone(),
            source,
        })?;
        String::from_utf8(output.0).map_err(|_| self.unusable("renders text that is not UTF-8"))
    }

    pub(crate) fn unusable(&self, reason: impl Into<String>) -> ZooError {
        ZooError::TemplateOutput {
            name: self.name.clone(),
            reason: reason.into(),
        }
    }

    pub(crate) fn bos_token(&self) -> Option<&str> {
        self.special_tokens.bos_token.as_ref().map(TokenText::text)
    }
}

/// White space around blocks is dropped, as Hugging Face configures Jinja.
fn syntax() -> Result<SyntaxConfig, Error> {
    SyntaxConfig::builder()
        .trim_blocks(true)
        .lstrip_blocks(true)
        .build()
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
