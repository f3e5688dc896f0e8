//! A conversation whose answers are known, as the model reads it.

use std::fmt;
use std::sync::Arc;

use reroute::RerouteError;

use crate::grounding::GroundingFormat;
use crate::messages::{Content, Message, Role};
use crate::vlm::{encode_messages, sample};
use crate::{
    ChatTemplate, ModelConfig, Prepared, Preprocessor, Question, Tokenizer, View, ZooError,
};

/// Makes lessons for a model, in any thread: all of it but its weights ([`Vlm::tutor`](crate::Vlm::tutor)).
#[derive(Clone)]
pub struct Tutor {
    pub(crate) config: ModelConfig,
    pub(crate) tokenizer: Arc<Tokenizer>,
    pub(crate) template: Arc<ChatTemplate>,
    pub(crate) preprocessor: Arc<dyn Preprocessor>,
    pub(crate) grounding: GroundingFormat,
    /// What ends an answer.
    pub(crate) end: Option<u32>,
}

/// A conversation whose answers are known: a sequence of token ids of which only the answers, and the tokens
/// that end them, are to be learnt.
#[derive(Debug, Clone)]
pub struct Lesson {
    pub(crate) turns: Vec<Known>,
    pub(crate) views: Vec<View>,
    pub(crate) prepared: Vec<Prepared>,
    end: Option<u32>,
}

/// A question with all that comes before it, and its answer.
#[derive(Debug, Clone)]
pub(crate) struct Known {
    /// Token ids of the conversation up to the answer, slots repeated; it begins with that of the question
    /// before and its answer.
    pub(crate) prompt: Vec<u32>,
    /// Without the token that ends it.
    pub(crate) answer: Vec<u32>,
    /// Images and videos up to here.
    pub(crate) shown: usize,
    /// What is said in the question.
    pub(crate) text: String,
}

impl Tutor {
    /// The preprocessing of images and videos.
    pub fn preprocessor(&self) -> &dyn Preprocessor {
        self.preprocessor.as_ref()
    }

    /// The tokenizer.
    pub fn tokenizer(&self) -> &Tokenizer {
        &self.tokenizer
    }

    /// How the model is asked for boxes.
    pub fn grounding(&self) -> &GroundingFormat {
        &self.grounding
    }

    /// The configuration of the model.
    pub fn config(&self) -> &ModelConfig {
        &self.config
    }

    /// A lesson of one question and the token ids of its answer, with what ends it if anything does.
    ///
    /// # Errors
    /// Those of [`Vlm::encode`](crate::Vlm::encode); [`RerouteError::NoTokens`] for no answer.
    pub fn question(&self, question: &Question, answer: &[u32]) -> Result<Lesson, ZooError> {
        if answer.is_empty() {
            return Err(RerouteError::NoTokens.into());
        }
        let prepare = |visual| self.preprocessor.prepare(visual);
        let shown = question.visuals.iter().map(prepare);
        let shown = shown.collect::<Result<Vec<_>, _>>()?;
        let (views, prepared): (Vec<View>, Vec<Prepared>) = shown.into_iter().unzip();
        let message = question.message(&views);
        let (tokenizer, template) = (&self.tokenizer, &self.template);
        let known = Known {
            prompt: encode_messages(&self.config, tokenizer, template, &[message], &views)?,
            answer: answer.to_vec(),
            shown: views.len(),
            text: question.text.clone(),
        };
        let lesson = Lesson {
            turns: vec![known],
            views,
            prepared,
            end: None,
        };
        self.check(&lesson)?;
        Ok(lesson)
    }

    /// A lesson of questions and their answers. An answer is what [`Tokenizer::encode`] takes: special tokens
    /// in it are themselves, unless [`Tokenizer::disarm`] has made them harmless. `shown` are the images and
    /// videos in the order in which the questions show them.
    ///
    /// # Errors
    /// Those of [`Vlm::encode_messages`](crate::Vlm::encode_messages); [`ZooError::TemplateOutput`] if the
    /// template does not go on where an earlier answer ended; [`RerouteError::NoTokens`] without answers.
    pub fn lesson(
        &self,
        system: Option<&str>,
        exchanges: &[(Message, String)],
        shown: Vec<(View, Prepared)>,
    ) -> Result<Lesson, ZooError> {
        let (views, prepared): (Vec<View>, Vec<Prepared>) = shown.into_iter().unzip();
        let mut messages: Vec<Message> = system
            .map(|text| Message::text(Role::System, text))
            .into_iter()
            .collect();
        let mut turns: Vec<Known> = Vec::new();
        // What the template writes up to the end of the last answer.
        let mut written = Vec::new();
        let mut shown = 0;
        for (question, answer) in exchanges {
            messages.push(question.clone());
            let visuals = question.content.iter();
            shown += visuals
                .filter(|part| !matches!(part, Content::Text(_)))
                .count();
            let views = &views[..shown.min(views.len())];
            let (tokenizer, template) = (&self.tokenizer, &self.template);
            let ids = encode_messages(&self.config, tokenizer, template, &messages, views)?;
            let prompt = match turns.last() {
                None => ids.clone(),
                Some(last) => {
                    let more = ids.strip_prefix(&written[..]).ok_or_else(|| {
                        template.unusable(
                            "writes an earlier answer otherwise than it is given: make an example of each of \
                             its answers",
                        )
                    })?;
                    [&last.prompt, &last.answer, more].concat()
                }
            };
            let harmless = tokenizer.encode(&tokenizer.disarm(answer), false)?;
            written = [ids, harmless].concat();
            messages.push(Message::text(Role::Assistant, answer));
            turns.push(Known {
                prompt,
                answer: tokenizer.encode(answer, false)?,
                shown,
                text: said(question),
            });
        }
        let lesson = Lesson {
            turns,
            views,
            prepared,
            end: self.end,
        };
        let says = |turn: &Known| lesson.targets(turn).next().is_some();
        if lesson.turns.is_empty() || !lesson.turns.iter().all(says) {
            return Err(RerouteError::NoTokens.into());
        }
        self.check(&lesson)?;
        Ok(lesson)
    }
}

impl Tutor {
    /// Whether a lesson is no longer than the model reads.
    fn check(&self, lesson: &Lesson) -> Result<(), ZooError> {
        let Some(last) = lesson.turns.last() else {
            return Ok(());
        };
        let positions = self
            .config
            .positions(&sample(&last.prompt, &lesson.views))?;
        let next = usize::try_from(positions.next).unwrap_or(usize::MAX);
        let needed = next.saturating_add(last.answer.len());
        let (available, limit) = self.config.decoder().context();
        match needed > available {
            true => Err(ZooError::Reroute(RerouteError::ContextLength {
                needed,
                available,
                limit,
            })),
            false => Ok(()),
        }
    }
}

impl fmt::Debug for Tutor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut tutor = f.debug_struct("Tutor");
        tutor.field("config", &self.config).finish_non_exhaustive()
    }
}

fn said(question: &Message) -> String {
    let text = question.content.iter().filter_map(|part| match part {
        Content::Text(text) => Some(text.as_str()),
        Content::Image | Content::Video { .. } => None,
    });
    text.collect()
}

impl Lesson {
    /// How its images and videos are seen.
    pub fn views(&self) -> &[View] {
        &self.views
    }

    /// The same without pixels, for where its visual tokens are known ([`Vlm::seen`](crate::Vlm::seen)).
    pub fn without_pixels(mut self) -> Self {
        self.prepared = Vec::new();
        self
    }

    /// Tokens to be learnt.
    pub fn answer_tokens(&self) -> usize {
        let answers = self.turns.iter();
        answers.map(|turn| self.targets(turn).count()).sum()
    }

    /// Rows that the decoder reads.
    pub fn rows(&self) -> usize {
        let last = self.turns.last();
        last.map_or(0, |turn| turn.prompt.len() + turn.answer.len())
    }

    /// The tokens of an answer, and the one that ends it.
    pub(crate) fn targets<'t>(&self, turn: &'t Known) -> impl Iterator<Item = u32> + use<'t> {
        turn.answer.iter().copied().chain(self.end)
    }

    /// Whether all is shown with the first question: only then its visual tokens can be known before.
    pub fn shows_first(&self) -> bool {
        let first = self.turns.first();
        first.is_none_or(|turn| turn.shown == self.views.len())
    }
}
