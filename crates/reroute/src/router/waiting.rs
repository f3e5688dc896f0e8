//! What deferred rows receive for the layers that they wait through: nothing, the mean update of the active visual rows
//! of their sample, or what a shortcut makes of them.

use burn::tensor::backend::Backend;
use burn::tensor::{FloatDType, Tensor};
use reducers::{Action, Waiting};
use reroute_layers::indices;

use super::{Deferred, Router, split};

/// The active visual rows as a stage found them.
pub(super) struct Riding<B: Backend> {
    /// Their mean in each sample, and what else than the layers has been added to them since:
    /// `[hidden_size, samples]` in f32, for what is looked for is a small difference.
    from: Tensor<B, 2>,
}

impl<B: Backend> Router<'_, B> {
    /// Takes down where the rows that are active from here on begin, if some wait for a decision to come.
    ///
    /// # Shapes
    /// - `hidden_states`: `[hidden_size, active rows]`
    pub(super) fn mount(&mut self, hidden_states: &Tensor<B, 2>) {
        let rides = self.schedule.waiting() == Waiting::RideAlong
            && self.schedule.action() == Action::Reroute
            && self.deferred.is_some();
        self.riding = rides.then(|| Riding {
            from: self.mean_of_active_visual(hidden_states),
        });
    }

    /// Something else than a layer's update has been added to the active rows.
    ///
    /// # Shapes
    /// - `added`: `[hidden_size, active rows]`
    pub(super) fn discount(&mut self, added: &Tensor<B, 2>) {
        if let Some(Riding { from }) = self.riding.take() {
            let from = from + self.mean_of_active_visual(added);
            self.riding = Some(Riding { from });
        }
    }

    /// The deferred rows as a decision behind layer `index` finds them, if there is one and they have received something.
    ///
    /// # Shapes
    /// - `hidden_states`: `[hidden_size, active rows]`, of that layer
    pub(super) fn arrived(
        &self,
        index: usize,
        hidden_states: &Tensor<B, 2>,
    ) -> Option<Deferred<B>> {
        let next = self.schedule.decision_at(index + 1)?;
        let deferred = self.deferred.as_ref()?;
        let dtype: FloatDType = deferred.hidden_states.dtype().into();
        let waiting = deferred.hidden_states.clone().cast(FloatDType::F32);
        let update = match self.schedule.waiting() {
            Waiting::Untouched => return None,
            Waiting::RideAlong => self.mean_update(hidden_states, &deferred.rows)?,
            Waiting::Shortcut => {
                // Rows that an earlier turn has deferred wait for the first decision as that turn found them.
                let decided = self.schedule.stages()[next.checked_sub(1)?].layer;
                let shortcut = self.decoder.shortcuts().find(&(decided..index + 1))?;
                shortcut.update(waiting.clone())
            }
        };
        Some(Deferred {
            hidden_states: (waiting + update).cast(dtype),
            rows: deferred.rows.clone(),
        })
    }

    /// What rows that ride along receive, if they do.
    fn mean_update(&self, hidden_states: &Tensor<B, 2>, rows: &[usize]) -> Option<Tensor<B, 2>> {
        let Riding { from } = self.riding.as_ref()?;
        let update = self.mean_of_active_visual(hidden_states) - from.clone();
        let ranges = split(rows, &self.samples).into_iter().enumerate();
        let samples: Vec<usize> = ranges
            .flat_map(|(sample, rows)| rows.map(move |_| sample))
            .collect();
        let samples = indices(&samples, &update.device());
        Some(update.select(1, samples))
    }

    /// The mean over each sample's active visual rows, by itself: `[hidden_size, samples]` in f32. Zero
    /// without such rows: then none are deferred.
    ///
    /// # Shapes
    /// - `x`: `[features, active rows]`
    fn mean_of_active_visual(&self, x: &Tensor<B, 2>) -> Tensor<B, 2> {
        let ranges = self.ranges().into_iter().zip(&self.visual);
        let means = ranges.map(|(range, visual)| {
            let is_visual = |&at: &usize| visual.binary_search(&self.active[at]).is_ok();
            let rows: Vec<usize> = range.filter(is_visual).collect();
            let rows_of = |rows: &[usize]| x.clone().select(1, indices(rows, &x.device()));
            match rows.is_empty() {
                true => rows_of(&[0]).zeros_like().cast(FloatDType::F32),
                false => rows_of(&rows).cast(FloatDType::F32).mean_dim(1),
            }
        });
        Tensor::cat(means.collect(), 1)
    }
}
