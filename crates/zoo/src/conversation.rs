use std::ops::ControlFlow;
use std::time::Instant;

use burn::tensor::backend::Backend;
use reducers::{Action, Plan, Schedule};
use reroute::{GenerationOptions, KvCache, Prefill, PrefillOptions, Prompt};

use crate::answer::Prefilled;
use crate::messages::{Content, Message, Role};
use crate::tokenizer::trimmed;
use crate::vlm::sample;
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
        let tokens = self.tokens.clone().followed_by(seen)?;
        let views = [&self.views[..], &views].concat();
        vlm.finish(started, &mut timings.vision);

        let started = Instant::now();
        let ids = vec![vlm.encode_messages(&messages, &views)?];
        let samples = vec![views.clone()];
        let (prompt, kept) = vlm.prompt(&ids, &samples, &tokens)?;
        let prefill = prefill(vlm, &mut self.past, &prompt, routing.schedule, &kept[0])?;
        vlm.finish(started, &mut timings.prefill);

        let mut known = kept[0].clone();
        // Or it is computed again where it stands in the text.
        let keeps_answer = vlm.config().keeps_answer(&sample(&[], &views));
        let prefilled = Prefilled {
            ids,
            views: samples,
            reduction: tokens.kept.clone(),
            prompt,
            prefill,
            timings,
        };
        let mut stream = vlm.tokenizer().stream(trimmed(on_text));
        let mut on_token = |_, id| {
            stream.push(id);
            ControlFlow::Continue(())
        };
        let (mut answers, cache) = vlm.answer(prefilled, &self.options, &mut on_token)?;
        stream.finish();
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

/// Runs the prompt of a whole conversation, whose ids are `ids`, on what earlier turns have cached.
fn prefill<B: Backend>(
    vlm: &Vlm<B>,
    past: &mut Option<(KvCache<B>, Vec<u32>)>,
    prompt: &Prompt<B>,
    schedule: &Schedule,
    ids: &[u32],
) -> Result<Prefill<B>, ZooError> {
    let options = PrefillOptions {
        keep_pool: true,
        ..Default::default()
    };
    let decoder = vlm.model().decoder();
    // Before the cache is taken: a question that cannot be asked costs nothing.
    decoder.check(prompt, schedule)?;
    // What earlier turns removed cannot be had again, so that a question that fails must not cost it.
    let removes = schedule.action() == Action::Remove && !schedule.stages().is_empty();
    let past = match removes {
        true => past.clone(),
        false => past.take(),
    };
    let Some((mut cache, known)) = past else {
        return Ok(decoder.prefill(prompt, schedule, options)?);
    };
    let pairs = known.iter().zip(ids);
    cache.truncate(0, pairs.take_while(|(a, b)| a == b).count())?;
    Ok(decoder.resume(cache, prompt, schedule, options)?)
}

#[cfg(test)]
#[cfg(feature = "embedded")]
mod tests {
    use burn_flex::Flex;
    use reducers::presets;
    use vision_encoder::{DecodeLimits, decode};

    use super::*;
    use crate::{OpenOptions, embedded};

    /// What a removing routing kept for earlier turns cannot be computed again.
    #[test]
    fn a_question_that_fails_after_its_prefill_leaves_what_earlier_turns_kept() {
        let vlm = Vlm::<Flex>::open(
            &embedded::checkpoint(),
            &OpenOptions::default(),
            &Default::default(),
        );
        let vlm = vlm.expect("it is built in");
        let (layers, encoder) = (vlm.config().decoder().num_layers, vlm.config().encoder());
        let options = GenerationOptions {
            max_new_tokens: 4,
            ..vlm.generation_defaults()
        };
        let image = decode(embedded::SCENE.image, &DecodeLimits::default()).expect("a picture");
        let first = Question::about(vec![image], "find the cross");
        let [next, broken] =
            ["find the square", "find the red cross"].map(|text| Question::about(Vec::new(), text));
        for routing in ["dense", "fastv@64", "reroute-fastv@64"] {
            let plan = presets::find(routing).and_then(|preset| preset.plan(layers, &encoder));
            let plan = plan.expect("a preset");
            let kept = |fails: bool| {
                let mut conversation = Conversation::new(&vlm, plan.clone(), options.clone());
                conversation.ask(&first, |_| {}).expect("an answer");
                if fails {
                    conversation.options.sampling.temperature = -1.0;
                    assert!(conversation.ask(&broken, |_| {}).is_err());
                    conversation.options.sampling.temperature = 0.0;
                }
                let answer = conversation.ask(&next, |_| {}).expect("an answer");
                (answer.tokens, answer.trace.rows)
            };
            let [(found, computed), (expected, rows)] = [true, false].map(kept);
            assert_eq!(found, expected, "{routing}");
            if routing == "fastv@64" {
                assert_eq!(computed, rows, "only what is new");
            }
        }
    }
}
