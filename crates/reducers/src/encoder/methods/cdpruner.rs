use std::cmp::Ordering;
use std::collections::BinaryHeap;
use std::mem;

use burn::tensor::backend::Backend;
use rayon::prelude::*;
use serde::{Deserialize, Serialize};

use crate::encoder::cosines::{Cosines, Pairs};
use crate::encoder::{BuiltIn, EncoderReducer, EncoderShape, Reduction, Seen, Tap};
use crate::{About, ReducerError};

/// A token that adds less volume than this adds rounding errors.
const NO_VOLUME: f64 = 1e-14;

/// Most tokens that are brought up to date at once.
const BLOCK: usize = 256;

/// CDPruner (arXiv 2506.10967): tokens unlike each other, those that matter to the question first.
///
/// A determinantal point process prefers sets whose kernel, cosine similarity weighted by relevance
/// on both sides, has a large determinant; the greedy choice adds the token that enlarges it most
/// (fast MAP inference, arXiv 1709.05135).
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct CdPruner {
    /// Whether those tokens are relevant that are *un*like the question, as released.
    pub negative: bool,
}

impl Default for CdPruner {
    fn default() -> Self {
        Self { negative: true }
    }
}

impl BuiltIn for CdPruner {
    const ABOUT: About = About {
        description: "greedy determinant of similarity weighted by relevance to the question",
        source: "arXiv 2506.10967; github.com/Theia-4869/CDPruner (LLaVA)",
        exact: "similarity after the projector, relevance scaled to the range 0 to 1, the kernel, the \
                greedy choice",
        interpretation: "relevance compares what the decoder would see with the embeddings of the \
                         question's tokens, since checkpoints lack the text tower of CLIP that the \
                         release loads beside LLaVA (OpenVINO's version for Qwen does the same); \
                         its minus sign is kept; equal relevance counts as 1; pictures are reduced \
                         one by one",
        towers: &[],
    };
}

impl CdPruner {
    /// How much each token matters, from 0 (nearly) to 1, by its mean cosine to the text tokens.
    fn relevance<B: Backend>(
        &self,
        cosines: &Cosines<B>,
        seen: &Seen<B>,
    ) -> Result<Vec<f64>, ReducerError> {
        let question = seen.get(Tap::Question)?;
        if question.dims()[1] == 0 {
            return Ok(vec![1.0; seen.tokens()]);
        }
        let cosines = cosines.mean_to(question)?;
        let sign = if self.negative { -1.0 } else { 1.0 };
        let mut relevance: Vec<f64> = cosines.iter().map(|&c| sign * f64::from(c)).collect();
        let low = relevance.iter().copied().fold(f64::INFINITY, f64::min);
        let high = relevance.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        for value in &mut relevance {
            *value = if high > low {
                (*value - low + 1e-6) / (high - low)
            } else {
                1.0
            };
        }
        Ok(relevance)
    }
}

impl<B: Backend> EncoderReducer<B> for CdPruner {
    fn needs(&self, _encoder: &EncoderShape) -> Result<Vec<Tap>, ReducerError> {
        Ok(vec![Tap::Embeddings, Tap::Question])
    }

    fn reduce(&self, seen: &Seen<B>, keep: usize) -> Result<Reduction<B>, ReducerError> {
        let cosines = Cosines::new(seen.get(Tap::Embeddings)?)?;
        let relevance = self.relevance(&cosines, seen)?;
        let mut pairs = Pairs::new(&cosines);
        let mut greedy = Greedy::new(relevance, |tokens, others| pairs.between(tokens, others));
        Ok(Reduction::selection(greedy.choose(keep)?))
    }
}

/// Greedy choice by determinant, by an incremental Cholesky factor (arXiv 1709.05135) that is only
/// computed as far as it is asked for.
///
/// The volume that a token would add never grows. So a volume that was right some choices ago is a
/// bound now, and only the tokens with the highest bounds are brought up to date, a block at a time on
/// all threads. The choice is that of the eager algorithm. Of `n` tokens with `d` features, `k` of them
/// chosen, it takes at most `n·k²/2` multiply-adds and `4·n·k` bytes, and for cosines `n·k·d` and
/// `4·n·d`; all of this only if every token comes near being chosen.
struct Greedy<C> {
    /// How much each token matters.
    relevance: Vec<f64>,
    /// Cosines of some tokens to others, token by token.
    cosines: C,
    /// Squared volume that each token would add, as of the part of its row that is known.
    volumes: Vec<f64>,
    /// Of each token its row of the Cholesky factor, as far as it is known.
    rows: Vec<Vec<f32>>,
    /// The chosen tokens that span the volume, with the square root of what each added.
    basis: Vec<(usize, f64)>,
    /// Those not chosen, by volume.
    queue: BinaryHeap<Candidate>,
}

/// A token and what it adds, or did once; the largest comes first, and of equal ones the first token.
#[derive(PartialEq)]
struct Candidate {
    volume: f64,
    token: usize,
}

impl Eq for Candidate {}

impl Ord for Candidate {
    fn cmp(&self, other: &Self) -> Ordering {
        let by_volume = self.volume.partial_cmp(&other.volume);
        by_volume
            .unwrap_or(Ordering::Equal)
            .then(other.token.cmp(&self.token))
    }
}

impl PartialOrd for Candidate {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl<C: FnMut(&[usize], &[usize]) -> Result<Vec<f32>, ReducerError>> Greedy<C> {
    /// `relevance` has no NaN.
    fn new(relevance: Vec<f64>, cosines: C) -> Self {
        let volumes: Vec<f64> = relevance.iter().map(|r| r.powi(2)).collect();
        let candidates = volumes.iter().enumerate();
        Self {
            queue: candidates
                .map(|(token, &volume)| Candidate { volume, token })
                .collect(),
            rows: vec![Vec::new(); relevance.len()],
            basis: Vec::new(),
            relevance,
            cosines,
            volumes,
        }
    }

    /// The first `keep` tokens, in the order in which they are chosen.
    fn choose(&mut self, keep: usize) -> Result<Vec<usize>, ReducerError> {
        let mut chosen = Vec::with_capacity(keep);
        while chosen.len() < keep {
            let Some(best) = self.queue.pop() else {
                break;
            };
            if self.is_known(best.token) {
                chosen.push(best.token);
                if best.volume > NO_VOLUME {
                    self.basis.push((best.token, best.volume.sqrt()));
                }
                continue;
            }
            let mut outdated = vec![best.token];
            while outdated.len() < BLOCK
                && let Some(next) = self.queue.peek()
                && !self.is_known(next.token)
            {
                outdated.extend(self.queue.pop().map(|next| next.token));
            }
            self.bring_up_to_date(outdated)?;
        }
        Ok(chosen)
    }

    fn is_known(&self, token: usize) -> bool {
        self.rows[token].len() == self.basis.len()
    }

    fn bring_up_to_date(&mut self, tokens: Vec<usize>) -> Result<(), ReducerError> {
        let mut outdated: Vec<(usize, Vec<f32>)> = tokens
            .into_iter()
            .map(|token| (token, mem::take(&mut self.rows[token])))
            .collect();
        outdated.sort_by_key(|(_, row)| row.len());
        for rows in outdated.chunk_by_mut(|(_, a), (_, b)| a.len() == b.len()) {
            let missing = &self.basis[rows[0].1.len()..];
            let tokens: Vec<usize> = rows.iter().map(|&(token, _)| token).collect();
            let others: Vec<usize> = missing.iter().map(|&(token, _)| token).collect();
            let cosines = (self.cosines)(&tokens, &others)?;
            let (relevance, known) = (&self.relevance, &self.rows);
            let volumes = rows.par_iter_mut().zip(cosines.par_chunks(others.len()));
            let volumes = volumes.map(|((token, row), cosines)| {
                let mut volume = self.volumes[*token];
                for (&(other, length), &cosine) in missing.iter().zip(cosines) {
                    let kernel = relevance[other] * f64::from(cosine) * relevance[*token];
                    let part = (kernel - dot(row, &known[other])) / length;
                    row.push(part as f32);
                    volume -= part * part;
                }
                volume
            });
            let volumes: Vec<f64> = volumes.collect();
            for (token, volume) in tokens.into_iter().zip(volumes) {
                self.volumes[token] = volume;
                self.queue.push(Candidate { volume, token });
            }
        }
        for (token, row) in outdated {
            self.rows[token] = row;
        }
        Ok(())
    }
}

/// The product of two rows, as long as the shorter, in double precision.
fn dot(a: &[f32], b: &[f32]) -> f64 {
    const LANES: usize = 8;
    let length = a.len().min(b.len());
    let (a, b) = (&a[..length], &b[..length]);
    let mut sums = [0.0; LANES];
    let (blocks, others) = (a.chunks_exact(LANES), b.chunks_exact(LANES));
    let rest = blocks.remainder().iter().zip(others.remainder());
    let rest: f64 = rest.map(|(&a, &b)| f64::from(a) * f64::from(b)).sum();
    for (a, b) in blocks.zip(others) {
        for lane in 0..LANES {
            sums[lane] += f64::from(a[lane]) * f64::from(b[lane]);
        }
    }
    sums.iter().sum::<f64>() + rest
}

#[cfg(test)]
mod tests {
    use super::{Greedy, NO_VOLUME};
    use crate::encoder::host::argmax;

    /// Numbers from 0 to 1 (Numerical Recipes' generator).
    fn numbers(mut state: u64) -> impl FnMut() -> f64 {
        move || {
            state = state
                .wrapping_mul(6_364_136_223_846_793_005)
                .wrapping_add(1);
            (state >> 40) as f64 / (1_u64 << 24) as f64
        }
    }

    fn unit_vectors(count: usize, size: usize, seed: u64) -> Vec<Vec<f32>> {
        let mut number = numbers(seed);
        let vector = |_| {
            let values: Vec<f64> = (0..size).map(|_| 2.0 * number() - 1.0).collect();
            let length = values.iter().map(|v| v * v).sum::<f64>().sqrt();
            values.iter().map(|v| (v / length) as f32).collect()
        };
        (0..count).map(vector).collect()
    }

    fn cosine(a: &[f32], b: &[f32]) -> f32 {
        a.iter().zip(b).map(|(a, b)| a * b).sum()
    }

    /// The algorithm as published: every row of the factor, at once.
    fn eager(relevance: &[f64], vectors: &[Vec<f32>], keep: usize) -> Vec<usize> {
        let mut volumes: Vec<f64> = relevance.iter().map(|r| r * r).collect();
        let mut factor: Vec<Vec<f64>> = Vec::new();
        let mut chosen = Vec::new();
        while chosen.len() < keep {
            let best = argmax(volumes.iter().copied());
            chosen.push(best);
            let volume = volumes[best];
            if volume > NO_VOLUME {
                let entry = |token: usize| {
                    let kernel = relevance[best]
                        * f64::from(cosine(&vectors[best], &vectors[token]))
                        * relevance[token];
                    let shared = factor.iter().map(|row| row[best] * row[token]);
                    (kernel - shared.sum::<f64>()) / volume.sqrt()
                };
                let row: Vec<f64> = (0..vectors.len()).map(entry).collect();
                volumes.iter_mut().zip(&row).for_each(|(v, x)| *v -= x * x);
                factor.push(row);
            }
            volumes[best] = f64::NEG_INFINITY;
        }
        chosen
    }

    #[test]
    fn lazily_chosen_is_eagerly_chosen() {
        for (count, size, keep, seed) in [(40, 64, 20, 1), (300, 96, 80, 2), (700, 128, 100, 3)] {
            let vectors = unit_vectors(count, size, seed);
            let mut number = numbers(seed + 9);
            let relevance: Vec<f64> = (0..count).map(|_| number()).collect();
            let cosines = |tokens: &[usize], others: &[usize]| {
                let row = |&token: &usize| {
                    let cosine = |&other: &usize| cosine(&vectors[token], &vectors[other]);
                    others.iter().map(cosine).collect::<Vec<f32>>()
                };
                Ok(tokens.iter().flat_map(row).collect())
            };
            let mut greedy = Greedy::new(relevance.clone(), cosines);
            let found = greedy.choose(keep).unwrap();
            assert_eq!(found, eager(&relevance, &vectors, keep));
        }
    }

    /// Equal tokens: the first of them, and its copies last.
    #[test]
    fn ties_go_to_the_lower_index() {
        let cosines = |tokens: &[usize], others: &[usize]| {
            let alike = |&token: &usize| {
                let same = move |&other: &usize| f32::from(u8::from(token % 3 == other % 3));
                others.iter().map(same).collect::<Vec<f32>>()
            };
            Ok(tokens.iter().flat_map(alike).collect())
        };
        let mut greedy = Greedy::new(vec![1.0; 12], cosines);
        assert_eq!(greedy.choose(12).unwrap()[..4], [0, 1, 2, 3]);
    }

    /// A picture of 16384 tokens: the factor holds 4 bytes for a token and each chosen one at most,
    /// and far fewer where relevance tells tokens apart, since most are never asked for.
    #[test]
    fn large_pictures_stay_within_the_bound() {
        const TOKENS: usize = 16384;
        let vectors = unit_vectors(TOKENS, 32, 5);
        let mut number = numbers(6);
        let relevance: Vec<f64> = (0..TOKENS).map(|_| number()).collect();
        let cosines = |tokens: &[usize], others: &[usize]| {
            let row = |&token: &usize| {
                let cosine = |&other: &usize| cosine(&vectors[token], &vectors[other]);
                others.iter().map(cosine).collect::<Vec<f32>>()
            };
            Ok(tokens.iter().flat_map(row).collect())
        };
        for keep in [16, 256] {
            let mut greedy = Greedy::new(relevance.clone(), cosines);
            let chosen = greedy.choose(keep).unwrap();
            let mut unique = chosen.clone();
            unique.sort_unstable();
            unique.dedup();
            assert_eq!(unique.len(), keep);
            let held: usize = greedy.rows.iter().map(Vec::len).sum();
            assert!(held <= TOKENS * keep);
            assert!(
                keep > 32 || held <= TOKENS * keep / 4,
                "{held} parts are held"
            );
        }
    }
}
