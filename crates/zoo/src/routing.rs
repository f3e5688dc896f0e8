use burn::tensor::backend::Backend;
use reducers::encoder::EncoderReducer;
use reducers::{Plan, Schedule, Scorer};
use reroute_family::EncoderStep;

/// How visual tokens are reduced: the data of a [`Plan`] or [`Schedule`] (both convert), or rules of
/// one's own in place of the built-in ones.
#[derive(Clone, Copy)]
pub struct Routing<'a, B: Backend> {
    /// Before the decoder.
    pub encoder: Option<EncoderStep<'a, B>>,
    /// In the decoder.
    pub schedule: &'a Schedule,
    /// Ranks instead of the schedule's own scores.
    pub scorer: Option<&'a dyn Scorer<B>>,
}

impl<'a, B: Backend> From<&'a Schedule> for Routing<'a, B> {
    fn from(schedule: &'a Schedule) -> Self {
        Self {
            encoder: None,
            schedule,
            scorer: None,
        }
    }
}

impl<'a, B: Backend> From<&'a Plan> for Routing<'a, B> {
    fn from(plan: &'a Plan) -> Self {
        let encoder = plan.encoder.as_ref().map(|encoder| EncoderStep {
            reducer: &encoder.method as &dyn EncoderReducer<B>,
            keep: encoder.keep,
            rest: encoder.rest,
            positions: encoder.positions,
        });
        Self {
            encoder,
            schedule: &plan.schedule,
            scorer: None,
        }
    }
}
