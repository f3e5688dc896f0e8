use burn::tensor::backend::Backend;
use serde::{Deserialize, Serialize};

use super::cosines::Cosines;
use super::host::{attention, feature_layer, ranked, read_mean, require_class_token};
use super::{EncoderReducer, EncoderShape, Reduced, Seen, Tap};
use crate::{About, ReducerError, Support};

/// Duplicates removed in one round.
const PER_ROUND: usize = 8;

/// VisPruner (arXiv 2412.01818v2): *important* tokens by class attention, and of the others *diverse*
/// ones, found by removing duplicates round by round.
///
/// A round splits the others, ordered, into those at even and those at odd places, and drops the
/// eight of the first that are most like one of the second.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct VisPruner {
    /// Share of the budget for important tokens, from 0 to 1.
    pub important: f64,
}

impl Default for VisPruner {
    fn default() -> Self {
        Self { important: 0.5 }
    }
}

impl VisPruner {
    /// What to know before comparing.
    pub const ABOUT: About = About {
        description: "top class attention, and others without duplicates",
        source: "arXiv 2412.01818v2; github.com/Theia-4869/VisPruner",
        exact: "class attention of the layer that makes the features, similarity of the features, \
                rounds of eight, the order of what is left between rounds",
        interpretation: "an odd number of others, at which the release stops with an error, leaves one \
                         more at even places",
        llava: Support::Yes,
        qwen: Support::No("it ranks by the class token's attention, and there is no class token"),
    };
}

impl<B: Backend> EncoderReducer<B> for VisPruner {
    fn needs(&self, encoder: &EncoderShape) -> Result<Vec<Tap>, ReducerError> {
        require_class_token("vis-pruner", encoder)?;
        if !(0.0..=1.0).contains(&self.important) {
            return Err(ReducerError::Unsupported {
                method: "vis-pruner",
                reason: format!(
                    "important {} is no share of the budget; use a number from 0 to 1",
                    self.important
                ),
            });
        }
        Ok(vec![
            attention(encoder, feature_layer(encoder)),
            Tap::Features,
        ])
    }

    fn reduce(&self, seen: &Seen<B>, keep: usize) -> Result<Reduced<B>, ReducerError> {
        let attention = attention(&seen.encoder, feature_layer(&seen.encoder));
        let scores = read_mean(seen.get(attention)?)?;
        let important = ((keep as f64 * self.important) as usize).min(keep);
        let mut chosen = ranked(&scores);
        let mut rest = chosen.split_off(important);

        let diverse = keep - important;
        if diverse > 0 {
            let cosines = Cosines::new(seen.get(Tap::Features)?)?;
            while rest.len() > diverse {
                let surplus = rest.len() - diverse;
                rest = without_duplicates(&rest, surplus.min(PER_ROUND), &cosines)?;
            }
            chosen.extend(rest);
        }
        Ok(Reduced::selection(chosen))
    }
}

/// One round: `surplus` tokens fewer, or half of them if they are fewer than twice that.
fn without_duplicates<B: Backend>(
    tokens: &[usize],
    surplus: usize,
    cosines: &Cosines<B>,
) -> Result<Vec<usize>, ReducerError> {
    let odd: Vec<usize> = tokens.iter().copied().skip(1).step_by(2).collect();
    let even: Vec<usize> = tokens.iter().copied().step_by(2).collect();
    let mut similarity = Vec::with_capacity(even.len());
    for &token in &even {
        let row = cosines.row(token)?;
        let to_odd = odd.iter().map(|&other| row[other]);
        similarity.push(to_odd.fold(f32::NEG_INFINITY, f32::max));
    }
    let kept = ranked(&similarity).into_iter().skip(surplus);
    Ok(kept.map(|at| even[at]).chain(odd).collect())
}
