use burn::tensor::backend::Backend;
use serde::{Deserialize, Serialize};

use crate::encoder::cosines::Cosines;
use crate::encoder::host::{ranked, read_mean, require_class_token, require_share};
use crate::encoder::{BuiltIn, EncoderReducer, EncoderShape, Reduction, Seen, Tap, Tower};
use crate::{About, ReducerError};

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

impl BuiltIn for VisPruner {
    const ABOUT: About = About {
        description: "top class attention, and others without duplicates",
        source: "arXiv 2412.01818v2; github.com/Theia-4869/VisPruner",
        exact: "class attention of the layer that makes the features, similarity of the features, \
                rounds of eight, the order of what remains between rounds",
        interpretation: "an odd number of others, at which the release stops with an error, leaves one \
                         more at even places",
        towers: &[Tower::Clip],
    };

    fn check(&self) -> Result<(), ReducerError> {
        require_share(Self::NAME, "important", self.important)
    }

    fn works_behind(&self, encoder: &EncoderShape) -> Result<(), ReducerError> {
        require_class_token(Self::NAME, encoder)
    }
}

impl<B: Backend> EncoderReducer<B> for VisPruner {
    fn needs(&self, encoder: &EncoderShape) -> Result<Vec<Tap>, ReducerError> {
        self.works_behind(encoder)?;
        self.check()?;
        let attention = encoder.attention(encoder.last_layer());
        Ok(vec![attention, Tap::Features])
    }

    fn reduce(&self, seen: &Seen<B>, keep: usize) -> Result<Reduction<B>, ReducerError> {
        let attention = seen.encoder.attention(seen.encoder.last_layer());
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
        Ok(Reduction::selection(chosen))
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
