use std::borrow::Cow;
use std::sync::Arc;

use burn::tensor::backend::Backend;
use reducers::{Plan, Schedule, Scorer};
use reroute_family::EncoderStep;

/// How visual tokens are reduced: the data of a [`Plan`] or [`Schedule`] (both convert, borrowed or
/// owned), or rules of one's own in place of the built-in ones.
#[derive(Clone)]
pub struct Routing<'a, B: Backend> {
    /// Before the decoder.
    pub encoder: Option<EncoderStep<'a, B>>,
    /// In the decoder.
    pub schedule: Cow<'a, Schedule>,
    /// Ranks instead of the schedule's own scores.
    pub scorer: Option<Arc<dyn Scorer<B> + 'a>>,
}

impl<'a, B: Backend> From<&'a Schedule> for Routing<'a, B> {
    fn from(schedule: &'a Schedule) -> Self {
        Self {
            encoder: None,
            schedule: Cow::Borrowed(schedule),
            scorer: None,
        }
    }
}

impl<B: Backend> From<Schedule> for Routing<'_, B> {
    fn from(schedule: Schedule) -> Self {
        Self {
            encoder: None,
            schedule: Cow::Owned(schedule),
            scorer: None,
        }
    }
}

impl<'a, B: Backend> From<&'a Plan> for Routing<'a, B> {
    fn from(plan: &'a Plan) -> Self {
        Self {
            encoder: step(plan),
            ..Self::from(&plan.schedule)
        }
    }
}

impl<B: Backend> From<Plan> for Routing<'_, B> {
    fn from(plan: Plan) -> Self {
        Self {
            encoder: step(&plan),
            ..Self::from(plan.schedule)
        }
    }
}

/// The reduction before the decoder, if the plan has one.
fn step<'a, B: Backend>(plan: &Plan) -> Option<EncoderStep<'a, B>> {
    let encoder = plan.encoder.as_ref()?;
    Some(EncoderStep {
        reducer: Arc::new(encoder.method.clone()),
        keep: encoder.keep,
        rest: encoder.rest,
        positions: encoder.positions,
    })
}
