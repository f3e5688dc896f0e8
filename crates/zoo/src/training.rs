//! What a model says of answers that are known: for training on them, and for measuring them.

mod lesson;
mod recomputed;
mod trained;

use burn::tensor::activation::log_softmax;
use burn::tensor::backend::Backend;
use burn::tensor::{DType, Int, Tensor};
use reroute::{KvCache, Prefill, PrefillOptions, Prompt};
use reroute_layers::indices;

pub use lesson::{Lesson, Tutor};
pub use trained::Trained;

use crate::{Question, Routing, View, VisualTokens, Vlm, ZooError};

/// What a model says before each token of known answers.
#[derive(Debug, Clone)]
pub struct AnswerLogits<B: Backend> {
    /// `[tokens, vocab_size]`
    pub logits: Tensor<B, 2>,
    /// The token that follows.
    pub tokens: Vec<u32>,
    /// The lesson that it belongs to.
    pub lessons: Vec<usize>,
}

impl<B: Backend> AnswerLogits<B> {
    /// The cross-entropy of each token in nats, in f32.
    ///
    /// # Shapes
    /// - returns `[tokens]`
    pub fn losses(self) -> Tensor<B, 1> {
        let device = self.logits.device();
        let tokens: Vec<i64> = self.tokens.iter().map(|&id| id.into()).collect();
        let tokens = Tensor::<B, 1, Int>::from_data(tokens.as_slice(), &device);
        let logits = log_softmax(self.logits.cast(DType::F32), 1);
        -logits.gather(1, tokens.unsqueeze_dim(1)).squeeze_dim(1)
    }
}

/// Lessons with their answers as one prompt.
struct AsPrompts<B: Backend> {
    prompt: Prompt<B>,
    /// Of each the last rows, from the first on that is asked for.
    rows: Vec<usize>,
    /// Which of all these are.
    asked: Vec<usize>,
    /// The token that follows each, and the lesson that it belongs to.
    tokens: Vec<u32>,
    lessons: Vec<usize>,
}

impl<B: Backend> AsPrompts<B> {
    /// What a model says of what the last layer has left of the rows.
    fn said(self, vlm: &Vlm<B>, left: Tensor<B, 2>) -> Result<AnswerLogits<B>, ZooError> {
        let asked = indices(&self.asked, vlm.device());
        Ok(AnswerLogits {
            logits: vlm.model().decoder().logits(left.select(1, asked))?,
            tokens: self.tokens,
            lessons: self.lessons,
        })
    }
}

impl<B: Backend> Vlm<B> {
    /// Logits behind the question and behind each token of `answer`, as when the model gives that
    /// answer itself: the question alone decides what is routed, and the answer sees what is left.
    ///
    /// On `Autodiff<B>` gradients reach every parameter, the vision tower's too; a selection is a
    /// constant.
    ///
    /// # Shapes
    /// - returns `[1 + answer, vocab_size]`
    pub fn logits<'a>(
        &self,
        question: &Question,
        answer: &[u32],
        routing: impl Into<Routing<'a, B>>,
    ) -> Result<Tensor<B, 2>, ZooError> {
        let Routing {
            schedule,
            scorer,
            encoder,
        } = routing.into();
        let prompt = self.prompt_of(question, encoder.as_ref())?;
        let decoder = self.model().decoder();
        let cache = KvCache::new(decoder.layers().len(), 1)?;
        let options = PrefillOptions::default();
        let Prefill {
            logits, mut cache, ..
        } = decoder.resume_by(scorer.as_deref(), cache, &prompt, &schedule, options)?;
        if answer.is_empty() {
            return Ok(logits);
        }
        let answer: Vec<(usize, u32)> = answer.iter().map(|&id| (0, id)).collect();
        let behind = decoder.decode(&answer, &mut cache)?;
        Ok(Tensor::cat(vec![logits, behind], 0))
    }

    /// Logits before each token of the answers of lessons, as when the model gives these answers itself: each
    /// question decides anew what is routed, and its answer sees what is left. `seen` are the visual tokens of
    /// each lesson if they are known ([`seen`](Self::seen)), for routings without a reduction before the decoder.
    ///
    /// Without routing, lessons with all their turns are rows of one prompt, and nothing is padded; of routed ones
    /// those of one question are, and others are computed one by one.
    ///
    /// On `Autodiff<B>` gradients reach every parameter, the vision tower's too; a selection is a constant.
    pub fn answer_logits<'a>(
        &self,
        lessons: &[&Lesson],
        seen: Option<&[VisualTokens<B>]>,
        routing: impl Into<Routing<'a, B>>,
    ) -> Result<AnswerLogits<B>, ZooError> {
        let routing = routing.into();
        let is_dense = routing.schedule.is_dense() && routing.scorer.is_none();
        let in_rows = |lesson: &Lesson| lesson.turns.len() == 1 || is_dense && lesson.shows_first();
        // Several: of what each goes on with from a cache, every gradient would be as wide as all rows. A single one is read up to
        // its answer, as when it is asked: there nothing is won, and whole models, chaotic after a few steps, learn as they did.
        let are_prompts = is_dense && routing.encoder.is_none() && lessons.len() > 1;
        let at_once = |lesson: &Lesson| are_prompts && self.is_prompt(lesson);
        let seen = seen.filter(|_| routing.encoder.is_none());
        let (mut prompts, mut rows, mut parts) = (Vec::new(), Vec::new(), Vec::new());
        for (index, lesson) in lessons.iter().enumerate() {
            if at_once(lesson) {
                prompts.push(index);
            } else if in_rows(lesson) {
                rows.push(index);
            } else {
                let seen = seen.map(|seen| &seen[index]);
                parts.push(self.turn_by_turn(lesson, index, seen, &routing)?);
            }
        }
        if !rows.is_empty() {
            parts.push(self.side_by_side(lessons, &rows, seen, &routing)?);
        }
        if !prompts.is_empty() {
            parts.push(self.at_once(lessons, &prompts, seen, &routing)?);
        }
        let mut joined = parts.pop().ok_or(reroute::RerouteError::NoTokens)?;
        for part in parts {
            joined.logits = Tensor::cat(vec![joined.logits, part.logits], 0);
            joined.tokens.extend(part.tokens);
            joined.lessons.extend(part.lessons);
        }
        Ok(joined)
    }

    /// The visual tokens of a lesson, without gradients: where tower and projector are not trained they are
    /// the same in every step.
    pub fn seen(&self, lesson: &Lesson) -> Result<VisualTokens<B>, ZooError> {
        let mut seen = self.see(&lesson.views, lesson.prepared.clone(), &[], None)?;
        for output in [&mut seen.images, &mut seen.videos].into_iter().flatten() {
            output.tokens = output.tokens.clone().detach();
            for layer in &mut output.deepstack {
                *layer = layer.clone().detach();
            }
        }
        seen.features = None;
        Ok(seen)
    }

    /// Visual tokens of what a lesson shows from the first `known` on, up to a turn.
    fn see_more(
        &self,
        lesson: &Lesson,
        turn: usize,
        known: usize,
        routing: &Routing<'_, B>,
    ) -> Result<VisualTokens<B>, ZooError> {
        let turn = &lesson.turns[turn];
        let (views, prepared) = (&lesson.views, &lesson.prepared);
        let shown = known..turn.shown;
        let texts = vec![turn.text.as_str(); shown.len()];
        let (views, prepared) = (&views[shown.clone()], prepared[shown].to_vec());
        self.see(views, prepared, &texts, routing.encoder.as_ref())
    }

    /// Visual tokens of what lessons show up to a turn of each, one lesson behind the other.
    fn shown(
        &self,
        lessons: &[&Lesson],
        chosen: &[usize],
        turn: impl Fn(&Lesson) -> usize,
        seen: Option<&[VisualTokens<B>]>,
        routing: &Routing<'_, B>,
    ) -> Result<VisualTokens<B>, ZooError> {
        let mut shown = VisualTokens::default();
        for &index in chosen {
            let lesson = lessons[index];
            let more = match seen.filter(|_| lesson.shows_first()) {
                Some(seen) => seen[index].clone(),
                None => self.see_more(lesson, turn(lesson), 0, routing)?,
            };
            shown = shown.followed_by(more)?;
        }
        Ok(shown)
    }

    /// Whether a lesson with its last answer is a prompt, too: answers may have slots that nothing is shown in.
    fn is_prompt(&self, lesson: &Lesson) -> bool {
        let slots = self.model().config().slots().all();
        let last = lesson.turns.last();
        last.is_some_and(|turn| !turn.answer.iter().any(|id| slots.contains(id)))
    }

    /// Lessons that the plain model reads as prompts, answers and all.
    fn at_once(
        &self,
        lessons: &[&Lesson],
        chosen: &[usize],
        seen: Option<&[VisualTokens<B>]>,
        routing: &Routing<'_, B>,
    ) -> Result<AnswerLogits<B>, ZooError> {
        let read = self.as_prompts(lessons, chosen, seen, routing)?;
        let left = self.model().decoder().forward(&read.prompt, &read.rows)?;
        read.said(self, left)
    }

    /// Lessons, answers and all, as the rows of a prompt.
    fn as_prompts(
        &self,
        lessons: &[&Lesson],
        chosen: &[usize],
        seen: Option<&[VisualTokens<B>]>,
        routing: &Routing<'_, B>,
    ) -> Result<AsPrompts<B>, ZooError> {
        let last = |lesson: &Lesson| lesson.turns.len() - 1;
        let visuals = self.shown(lessons, chosen, last, seen, routing)?;
        let (mut ids, mut views) = (Vec::new(), Vec::new());
        let (mut rows, mut asked) = (Vec::new(), Vec::new());
        let (mut tokens, mut of, mut base) = (Vec::new(), Vec::new(), 0);
        for &index in chosen {
            let lesson = lessons[index];
            let start = lesson.turns[0].prompt.len() - 1;
            for turn in &lesson.turns {
                for (behind, target) in lesson.targets(turn).enumerate() {
                    // The row before it.
                    asked.push(base + turn.prompt.len() + behind - 1 - start);
                    tokens.push(target);
                    of.push(index);
                }
            }
            let all = lesson.turns.last().into_iter();
            let all = all.flat_map(|turn| turn.prompt.iter().chain(&turn.answer));
            ids.push(all.copied().collect());
            views.push(lesson.views.clone());
            rows.push(lesson.rows() - start);
            base += lesson.rows() - start;
        }
        Ok(AsPrompts {
            prompt: self.prompt(&ids, &views, &visuals)?.0,
            rows,
            asked,
            tokens,
            lessons: of,
        })
    }

    /// Lessons whose prompts are rows of one; everything behind the first questions is fed at once.
    fn side_by_side(
        &self,
        lessons: &[&Lesson],
        chosen: &[usize],
        seen: Option<&[VisualTokens<B>]>,
        routing: &Routing<'_, B>,
    ) -> Result<AnswerLogits<B>, ZooError> {
        let tokens = self.shown(lessons, chosen, |_| 0, seen, routing)?;
        let (mut ids, mut views) = (Vec::new(), Vec::new());
        for &index in chosen {
            let lesson = lessons[index];
            ids.push(lesson.turns[0].prompt.clone());
            views.push(lesson.views.clone());
        }
        let (prompt, _) = self.prompt(&ids, &views, &tokens)?;
        let decoder = self.model().decoder();
        let cache = KvCache::new(decoder.layers().len(), chosen.len())?;
        let (scorer, options) = (routing.scorer.as_deref(), PrefillOptions::default());
        let mut prefill = decoder.resume_by(scorer, cache, &prompt, &routing.schedule, options)?;
        // Rows that are fed, and of which of them the logits are asked for.
        let (mut fed, mut asked) = (Vec::new(), Vec::new());
        let (mut first, mut later) = (Vec::new(), Vec::new());
        for (sample, &index) in chosen.iter().enumerate() {
            let lesson = lessons[index];
            let start = lesson.turns[0].prompt.len();
            let base = fed.len();
            if let Some(last) = lesson.turns.last() {
                let rest = last.prompt[start..].iter().chain(&last.answer);
                fed.extend(rest.map(|&id| (sample, id)));
            }
            for turn in &lesson.turns {
                for (behind, target) in lesson.targets(turn).enumerate() {
                    // The row before it: of the prompt, or of what follows.
                    match (turn.prompt.len() + behind - start).checked_sub(1) {
                        None => first.push((target, index)),
                        Some(row) => {
                            asked.push((base + row) as i64);
                            later.push((target, index));
                        }
                    }
                }
            }
        }
        let mut logits = prefill.logits;
        if !asked.is_empty() {
            let rows = decoder.feed(&fed, &mut prefill.cache)?;
            let asked = Tensor::<B, 1, Int>::from_data(asked.as_slice(), self.device());
            let behind = decoder.logits(rows.select(1, asked))?;
            logits = Tensor::cat(vec![logits, behind], 0);
        }
        let (tokens, lessons) = first.into_iter().chain(later).unzip();
        Ok(AnswerLogits {
            logits,
            tokens,
            lessons,
        })
    }

    /// A lesson of which each question is asked as it is in a conversation.
    fn turn_by_turn(
        &self,
        lesson: &Lesson,
        index: usize,
        seen: Option<&VisualTokens<B>>,
        routing: &Routing<'_, B>,
    ) -> Result<AnswerLogits<B>, ZooError> {
        let decoder = self.model().decoder();
        let mut cache = KvCache::new(decoder.layers().len(), 1)?;
        let (mut visuals, mut known) = match seen.filter(|_| lesson.shows_first()) {
            Some(seen) => (seen.clone(), lesson.views.len()),
            None => (VisualTokens::default(), 0),
        };
        let (mut parts, mut tokens) = (Vec::new(), Vec::new());
        for (at, turn) in lesson.turns.iter().enumerate() {
            if turn.shown > known {
                let more = self.see_more(lesson, at, known, routing)?;
                (visuals, known) = (visuals.followed_by(more)?, turn.shown);
            }
            let views: Vec<View> = lesson.views[..turn.shown].to_vec();
            let ids = std::slice::from_ref(&turn.prompt);
            let (prompt, _) = self.prompt(ids, &[views], &visuals)?;
            let options = PrefillOptions {
                keep_pool: at + 1 < lesson.turns.len(),
                ..PrefillOptions::default()
            };
            let scorer = routing.scorer.as_deref();
            let prefill = decoder.resume_by(scorer, cache, &prompt, &routing.schedule, options)?;
            cache = prefill.cache;
            parts.push(prefill.logits);
            if !turn.answer.is_empty() {
                let answer: Vec<(usize, u32)> = turn.answer.iter().map(|&id| (0, id)).collect();
                parts.push(decoder.decode(&answer, &mut cache)?);
            }
            let targets: Vec<u32> = lesson.targets(turn).collect();
            // Without a token that ends answers nothing follows the last row.
            if targets.len() == turn.answer.len()
                && let Some(last) = parts.pop()
            {
                let rows = last.dims()[0];
                parts.extend((rows > 1).then(|| last.narrow(0, 0, rows - 1)));
            }
            tokens.extend(targets);
        }
        Ok(AnswerLogits {
            logits: Tensor::cat(parts, 0),
            lessons: vec![index; tokens.len()],
            tokens,
        })
    }
}
