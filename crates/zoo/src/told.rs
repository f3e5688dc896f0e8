//! What an answer tells of its routing: the state of every visual token, and what it cost.

use burn::tensor::backend::Backend;
use reducers::{Action, Cost, Schedule};

use crate::{Answer, View, Vlm};

/// What a stage does with a visual token of a picture.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum TokenState {
    /// The layers of the stage work on it.
    Active,
    /// Active, after the stage before had deferred it.
    Returned,
    /// It bypasses the stage.
    Deferred,
    /// It is gone.
    Removed,
    /// It never entered the decoder.
    Absent,
}

/// The layers from one decision up to the next.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StageStates {
    /// Its first and its last layer.
    pub layers: [usize; 2],
    /// The state of every visual token of the views, view by view, in row-major order (of a video, time step by
    /// time step).
    pub states: Vec<TokenState>,
}

impl Answer {
    /// The state of every visual token of the views, when these of the prompt are selected and those of
    /// them have returned; `action` says what becomes of the others.
    pub fn states(
        &self,
        selected: &[usize],
        returned: &[usize],
        action: Action,
    ) -> Vec<TokenState> {
        let counts = self.views.iter().map(View::token_count);
        let mut starts = vec![0];
        starts.extend(counts.scan(0, |end, count| {
            *end += count;
            Some(*end)
        }));
        let mut states = vec![TokenState::Absent; starts.pop().unwrap_or(0)];
        let left = match action {
            Action::Reroute => TokenState::Deferred,
            Action::Remove => TokenState::Removed,
        };
        let mut mark = |tokens: &mut dyn Iterator<Item = usize>, state| {
            for token in tokens {
                if let Some(&(view, Some(cell))) = self.cells.get(token) {
                    states[starts[view] + cell] = state;
                }
            }
        };
        mark(&mut (0..self.cells.len()), left);
        mark(&mut selected.iter().copied(), TokenState::Active);
        mark(&mut returned.iter().copied(), TokenState::Returned);
        states
    }

    /// The stages of a decoder of so many layers, in order. Before the first decision all that entered is
    /// active.
    pub fn stages(&self, num_layers: usize, action: Action) -> Vec<StageStates> {
        let decisions = &self.trace.decisions;
        let mut starts: Vec<usize> = decisions.iter().map(|decision| decision.layer).collect();
        let mut states: Vec<Vec<TokenState>> = { decisions.iter() }
            .map(|decision| self.states(&decision.selected, &decision.returned, action))
            .collect();
        if starts.first() != Some(&0) {
            let all: Vec<usize> = (0..self.cells.len()).collect();
            starts.insert(0, 0);
            states.insert(0, self.states(&all, &[], action));
        }
        let ends = starts.iter().skip(1).copied().chain([num_layers]);
        let ends: Vec<usize> = ends.map(|end| end.saturating_sub(1)).collect();
        let layers = starts.into_iter().zip(ends);
        { layers.zip(states) }
            .map(|((first, last), states)| StageStates {
                layers: [first, last],
                states,
            })
            .collect()
    }
}

impl<B: Backend> Vlm<B> {
    /// Predicted cost of a schedule for an answered prompt, and of the dense model with all that was seen.
    pub fn costs(&self, schedule: &Schedule, answer: &Answer) -> (Cost, Cost) {
        let shape = self.config().decoder().shape();
        let text = answer.prompt_rows.saturating_sub(answer.visual_tokens);
        let kv = self.kv_type();
        let cost = |schedule, visual| Cost::of(&shape, schedule, visual, text, kv);
        let seen = answer.views.iter().map(View::token_count).sum();
        (
            cost(schedule, answer.visual_tokens),
            cost(&Schedule::dense(), seen),
        )
    }
}
