use std::time::Instant;

use burn::tensor::backend::Backend;
use reducers::Plan;
use reroute::{GenerationOptions, KvCache, PrefillOptions};

use crate::answer::Prefilled;
use crate::messages::{Content, Message, Role};
use crate::{Answer, Question, Routing, Timings, View, VisualTokens, Vlm, ZooError};

/// Questions that follow one another, about the same images and videos or further ones.
///
/// Each question is asked as the whole conversation so far; the earlier turns' cache stands in for
/// what it still holds:
///
/// - Images and videos go through the vision tower once.
/// - Without routing, only new rows are computed.
/// - Under *reroute* the visual pool stays available: a question chooses among *all* visual tokens,
///   whatever earlier ones deferred, and its answer is the one that the whole conversation would get
///   as a single prompt. Layers below the first decision compute new rows only. From the first
///   decision on, the text rows after the first image and the tokens now selected are computed
///   again, because what they attend to has changed. Compared with starting from scratch, a turn
///   saves the vision tower and the old rows in the layers below the first decision, for
///   `hidden_size` numbers of memory per row. The rows in [`Answer::trace`] are those computed.
/// - Under *remove* only new rows are computed, and each layer sees what was kept there: a later
///   question cannot see what an earlier one removed.
pub struct Conversation<'a, B: Backend> {
    vlm: &'a Vlm<B>,
    plan: Plan,
    options: GenerationOptions,
    messages: Vec<Message>,
    views: Vec<View>,
    tokens: VisualTokens<B>,
    /// The cache, and the ids of the rows in it.
    past: Option<(KvCache<B>, Vec<u32>)>,
}

impl<'a, B: Backend> Conversation<'a, B> {
    /// A conversation in which nothing has been said.
    pub fn new(vlm: &'a Vlm<B>, plan: impl Into<Plan>, options: GenerationOptions) -> Self {
        Self {
            vlm,
            plan: plan.into(),
            options,
            messages: Vec::new(),
            views: Vec::new(),
            tokens: VisualTokens::default(),
            past: None,
        }
    }

    /// Asks the next question. `on_text` receives the answer piece by piece as it is generated.
    ///
    /// A question that fails is not part of the conversation.
    pub fn ask(
        &mut self,
        question: &Question,
        on_text: impl FnMut(&str),
    ) -> Result<Answer, ZooError> {
        let vlm = self.vlm;
        let mut timings = Timings::default();
        let started = Instant::now();
        let (views, pixels): (Vec<View>, Vec<_>) =
            vlm.prepare(&question.visuals)?.into_iter().unzip();
        let mut messages = self.messages.clone();
        messages.push(question.message(&views));
        let routing = Routing::from(&self.plan);
        let texts = vec![question.text.as_str(); views.len()];
        let seen = vlm.see(&views, pixels, &texts, routing.encoder.as_ref())?;
        let tokens = self.tokens.clone().followed_by(seen);
        let views = [&self.views[..], &views].concat();
        vlm.finish(started, &mut timings.vision);

        let started = Instant::now();
        let ids = vec![vlm.encode_messages(&messages, &views)?];
        let samples = vec![views.clone()];
        let (prompt, kept) = vlm.prompt(&ids, &samples, &tokens)?;
        let options = PrefillOptions {
            keep_pool: true,
            ..Default::default()
        };
        let decoder = vlm.model().decoder();
        // Before the cache is taken: a question that cannot be asked costs nothing.
        decoder.check(&prompt, routing.schedule)?;
        let prefill = match self.past.take() {
            Some((mut cache, known)) => {
                let same = known
                    .iter()
                    .zip(&kept[0])
                    .take_while(|(a, b)| a == b)
                    .count();
                cache.truncate(0, same)?;
                decoder.resume(cache, &prompt, routing.schedule, options)?
            }
            None => decoder.prefill(&prompt, routing.schedule, options)?,
        };
        vlm.finish(started, &mut timings.prefill);

        let mut known = kept[0].clone();
        // After a video the text goes on behind its longer side, but an answer behind its last
        // moment (as in transformers): such an answer is computed again where it stands in the text.
        let keeps_answer = views.iter().all(|view| view.time.is_none());
        let prefilled = Prefilled {
            ids,
            views: samples,
            reduction: tokens.reduction.clone(),
            prompt,
            prefill,
            timings,
        };
        let mut on_token = vlm.streaming(&self.options, on_text);
        let (mut answers, cache) = vlm.answer(prefilled, &self.options, &mut on_token)?;
        let answer = answers.remove(0);
        if keeps_answer {
            known.extend(&answer.tokens);
        }
        self.past = Some((cache, known));
        messages.push(Message {
            role: Role::Assistant,
            content: vec![Content::Text(answer.text.clone())],
        });
        (self.messages, self.views, self.tokens) = (messages, views, tokens);
        Ok(answer)
    }
}
