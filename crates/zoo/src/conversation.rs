use burn::tensor::backend::Backend;
use reducers::{Action, Plan};
use reroute::GenerationOptions;

use crate::messages::Role;
use crate::session::{Past, Request, Session, SessionOptions, Turn};
use crate::{Answer, Question, Vlm, ZooError};

/// Questions that follow one another, about the same images and videos or further ones.
///
/// Each question is asked as the whole conversation so far; the earlier turns' cache stands in for
/// what it still holds:
///
/// - Images and videos go through the vision tower once, as long as their tokens fit into
///   [`SessionOptions::cache_bytes`].
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
    session: Session<'a, B>,
    plan: Plan,
    options: GenerationOptions,
    stop: Vec<String>,
    turns: Vec<Turn>,
    past: Option<Past<B>>,
}

impl<'a, B: Backend> Conversation<'a, B> {
    /// A conversation in which nothing has been said.
    pub fn new(vlm: &'a Vlm<B>, plan: impl Into<Plan>, options: GenerationOptions) -> Self {
        Self {
            session: vlm.single(SessionOptions::default().cache_bytes),
            plan: plan.into(),
            options,
            stop: Vec::new(),
            turns: Vec::new(),
            past: None,
        }
    }

    /// The same after a system prompt.
    pub fn with_system(mut self, text: impl Into<String>) -> Self {
        self.turns = vec![Turn::text(Role::System, text)];
        self
    }

    /// The same where an answer ends before the first of these.
    pub fn with_stop(mut self, strings: impl Into<Vec<String>>) -> Self {
        self.stop = strings.into();
        self
    }

    /// Asks the next question. `on_text` receives the answer piece by piece as it is generated.
    ///
    /// A question that fails is not part of the conversation.
    pub fn ask(
        &mut self,
        question: &Question,
        on_text: impl FnMut(&str),
    ) -> Result<Answer, ZooError> {
        let mut turns = self.turns.clone();
        turns.push(question.into());
        // What earlier turns removed cannot be had again, so that a question that fails must not cost it.
        let schedule = &self.plan.schedule;
        let past = match schedule.action() == Action::Remove && !schedule.is_dense() {
            true => self.past.clone(),
            false => self.past.take(),
        };
        let request = Request {
            past,
            keep_past: true,
            stop: self.stop.clone(),
            ..Request::new(turns.clone(), self.plan.clone(), self.options.clone())
        };
        let (answer, past) = self.session.serve(request, on_text)?;
        turns.push(Turn::text(Role::Assistant, &answer.text));
        (self.turns, self.past) = (turns, past);
        Ok(answer)
    }
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
