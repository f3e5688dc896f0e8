use burn::tensor::backend::Backend;
use burn::tensor::{DType, Tensor, TensorData};
use serde::{Deserialize, Serialize};

use crate::device::indices;
use crate::encoder::cosines::{MOST, unit};
use crate::encoder::host::{read, require_share};
use crate::encoder::{BuiltIn, EncoderReducer, EncoderShape, Reduction, Seen, Tap, Tower, Weights};
use crate::{About, ReducerError, top_k};

/// Nüwa's first stage (arXiv 2602.02951): the most attended tokens of every 2 × 2 region, which
/// collect what is similar and near.
///
/// Of these *benchmark* tokens the most attended are *pillars* and stay as they are; the others
/// become weighted sums over the picture, weighted by cosine similarity of mid-layer hidden states
/// and by nearness. The released code differs from the paper, and behind CLIP (LLaVA-1.5) from
/// itself behind Qwen2.5-VL; the default is the code.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Nuwa {
    /// What a token's attention is multiplied by.
    pub salience: Salience,
    /// Which benchmark tokens are pillars.
    pub pillars: Pillars,
    /// Candidates of a region, 1 to 4. As released if absent: as few as suffice, behind Qwen-VL at
    /// least 3.
    pub candidates: Option<usize>,
    /// Squared distance beyond which tokens do not collect, as a share of the largest of the grid,
    /// above 0. As released if absent.
    pub near: Option<f64>,
    /// Quantile of the benchmark tokens' salience from which they are pillars. As released if absent:
    /// 0.55 behind CLIP and other towers, 0.10 behind Qwen-VL.
    pub quantile: Option<f64>,
    /// Qwen-VL: takes hidden states in the order of the tower's windows for hidden states in the order
    /// of the grid, as the release does by mistake.
    pub similarity_in_window_order: bool,
}

/// What makes a token salient.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Salience {
    /// Attention alone: the code.
    #[default]
    Attention,
    /// Attention times the length of the key: the paper.
    AttentionTimesKeyNorm,
}

/// What makes a benchmark token a pillar.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Pillars {
    /// Salience at or above a quantile of the benchmark tokens' ([`Nuwa::quantile`]): the code.
    #[default]
    Salience,
    /// A key among the longest quarter. The paper.
    KeyNorm,
}

/// What the released code does differently behind the two encoders.
struct Rule {
    /// Quantile of the salience from which a benchmark token is a pillar.
    quantile: f64,
    /// Squared distance beyond which tokens do not collect, as a share of the largest.
    near: f64,
    /// Whether a token that collects counts itself once, whatever it collects.
    keeps_itself: bool,
    /// Fewest candidates of a region.
    candidates: usize,
}

const CLIP: Rule = Rule {
    quantile: 0.55,
    // On 24 × 24.
    near: 280.0 / 1058.0,
    keeps_itself: true,
    candidates: 1,
};
const QWEN_VL: Rule = Rule {
    quantile: 0.10,
    // 0.8 of the largest distance.
    near: 0.8 * 0.8,
    keeps_itself: false,
    candidates: 3,
};

/// Guards a division by nothing.
const EPSILON: f32 = 1e-8;

impl BuiltIn for Nuwa {
    const ABOUT: About = About {
        description: "stage 1: regional top attention that collects what is similar and near; \
                      stage 2: one late decision",
        source: "arXiv 2602.02951 and its released code (LLaVA-1.5 and Qwen2.5-VL)",
        exact: "the code's rules for both families, budgets 64, 128, 192 (LLaVA-1.5) and 25, 50, \
                75 % (Qwen2.5-VL), the positions of the full prompt; the paper's salience and \
                pillars, and the release's window-order mistake, are settings",
        interpretation: "other budgets keep 7/4 of the budget in stage 1 and solve stage 2 for it; \
                         other depths and grids scale layers and distances; behind Qwen the \
                         release's decoder lets a row see later ones, ours does not",
        towers: &[Tower::Clip, Tower::QwenVl],
    };

    fn check(&self) -> Result<(), ReducerError> {
        let refuse = |reason| {
            Err(ReducerError::Unsupported {
                method: Self::NAME,
                reason,
            })
        };
        if let Some(quantile) = self.quantile {
            require_share(Self::NAME, "quantile", quantile)?;
        }
        match (self.candidates, self.near) {
            (Some(candidates), _) if !(1..=4).contains(&candidates) => refuse(format!(
                "candidates {candidates} are not those of a region of four tokens; use 1 to 4"
            )),
            // Written so that NaN is refused as well.
            (_, Some(near)) if !(near > 0.0 && near.is_finite()) => refuse(format!(
                "near {near} is no distance; use a number above 0 (1 is the whole grid)"
            )),
            _ => Ok(()),
        }
    }
}

impl Nuwa {
    fn needs_keys(&self) -> bool {
        self.salience == Salience::AttentionTimesKeyNorm || self.pillars == Pillars::KeyNorm
    }

    fn similarity(&self, encoder: &EncoderShape) -> Tap {
        let layers = encoder.num_layers;
        if encoder.tower != Tower::QwenVl {
            // Behind CLIP hidden states 16 to 24 of 24 layers, with the last.
            return Tap::MeanHidden {
                first: layers.saturating_mul(2).div_ceil(3),
                last: layers,
            };
        }
        // Outputs of blocks 7 to 23.
        let (first, last) = (8.min(layers), 24.min(layers));
        match self.similarity_in_window_order {
            true => Tap::MeanHiddenInWindows { first, last },
            false => Tap::MeanHidden { first, last },
        }
    }
}

impl<B: Backend> EncoderReducer<B> for Nuwa {
    fn needs(&self, encoder: &EncoderShape) -> Result<Vec<Tap>, ReducerError> {
        let layer = encoder.last_layer();
        self.check()?;
        let mut taps = vec![encoder.attention(layer), self.similarity(encoder)];
        if self.needs_keys() {
            taps.push(Tap::Keys { layer });
        }
        Ok(taps)
    }

    fn reduce(&self, seen: &Seen<B>, keep: usize) -> Result<Reduction<B>, ReducerError> {
        self.check()?;
        let encoder = &seen.encoder;
        let rule = encoder.settings(&CLIP, &QWEN_VL);
        let layer = encoder.last_layer();
        let mut salience = read(seen.get(encoder.attention(layer))?.sum_dim(0))?;
        let key_norms = match self.needs_keys() {
            true => Some(read(norms(seen.get(Tap::Keys { layer })?))?),
            false => None,
        };
        if let (Salience::AttentionTimesKeyNorm, Some(norms)) = (self.salience, &key_norms) {
            salience
                .iter_mut()
                .zip(norms)
                .for_each(|(s, norm)| *s *= norm);
        }
        let grid = Grid::around(seen.grid);
        let benchmark = grid.benchmark(&salience, keep, self.candidates, rule.candidates)?;
        let pillars = match (self.pillars, &key_norms) {
            (Pillars::KeyNorm, Some(norms)) => at_least(norms, &grid, &benchmark, 0.75),
            _ => {
                let quantile = self.quantile.unwrap_or(rule.quantile);
                at_least(&salience, &grid, &benchmark, quantile)
            }
        };
        // A place beyond the picture may win its region; only then is it left out.
        let inside: Vec<(usize, bool)> = benchmark
            .into_iter()
            .zip(pillars)
            .filter_map(|(cell, pillar)| Some((grid.token(cell)?, pillar)))
            .collect();
        let near = self.near.unwrap_or(rule.near);
        let similarity = unit(seen.get(self.similarity(encoder))?)?;
        // A block of columns at a time: what is on the way to the weights is several times their size.
        let blocks = inside
            .chunks((MOST / seen.tokens()).max(1))
            .map(|block| weights(similarity.clone(), block, &grid, near, rule.keeps_itself));
        let weights = Tensor::cat(blocks.collect(), 1);
        Ok(Reduction {
            places: inside.iter().map(|&(token, _)| Some(token)).collect(),
            weights: Weights::Dense(weights),
        })
    }
}

/// Lengths of the columns, `[features, tokens]` → `[1, tokens]`.
fn norms<B: Backend>(x: Tensor<B, 2>) -> Tensor<B, 2> {
    let x = x.cast(DType::F32);
    (x.clone() * x).sum_dim(0).sqrt()
}

/// A picture's tokens, padded to even sides.
struct Grid {
    rows: usize,
    columns: usize,
    padded: [usize; 2],
}

impl Grid {
    fn around([rows, columns]: [usize; 2]) -> Self {
        Self {
            rows,
            columns,
            padded: [rows.next_multiple_of(2), columns.next_multiple_of(2)],
        }
    }

    /// The token at a cell of the padded grid.
    fn token(&self, cell: usize) -> Option<usize> {
        let (row, column) = (cell / self.padded[1], cell % self.padded[1]);
        (row < self.rows && column < self.columns).then_some(row * self.columns + column)
    }

    fn at(&self, values: &[f32], cell: usize) -> f32 {
        self.token(cell).map_or(0.0, |token| values[token])
    }

    /// The `keep` most salient of every region's best, as ascending cells of the padded grid.
    fn benchmark(
        &self,
        salience: &[f32],
        keep: usize,
        candidates: Option<usize>,
        fewest: usize,
    ) -> Result<Vec<usize>, ReducerError> {
        let [rows, columns] = self.padded;
        let regions = rows / 2 * (columns / 2);
        let suffice = (4 * keep).div_ceil(self.rows * self.columns).max(fewest);
        let candidates = candidates.unwrap_or(suffice).min(4);
        let mut best = Vec::new();
        for region in 0..regions {
            let corner = region / (columns / 2) * 2 * columns + region % (columns / 2) * 2;
            let cells = [corner, corner + 1, corner + columns, corner + columns + 1];
            let scores = cells.map(|cell| self.at(salience, cell));
            best.extend(top_k(&scores, candidates)?.into_iter().map(|at| cells[at]));
        }
        best.sort_unstable();
        let scores: Vec<f32> = best.iter().map(|&cell| self.at(salience, cell)).collect();
        Ok(top_k(&scores, keep)?
            .into_iter()
            .map(|at| best[at])
            .collect())
    }

    /// Squared distance between two tokens.
    fn distance_squared(&self, a: usize, b: usize) -> f64 {
        let place = |token: usize| [token / self.columns, token % self.columns];
        let ([ar, ac], [br, bc]) = (place(a), place(b));
        (ar.abs_diff(br).pow(2) + ac.abs_diff(bc).pow(2)) as f64
    }

    /// The largest squared distance on the padded grid.
    fn largest_distance_squared(&self) -> f64 {
        let [rows, columns] = self.padded.map(|side| side.saturating_sub(1).pow(2));
        (rows + columns) as f64
    }
}

/// Which of these cells reach the quantile of all of them, interpolated linearly.
fn at_least(values: &[f32], grid: &Grid, cells: &[usize], quantile: f64) -> Vec<bool> {
    let of_cells: Vec<f32> = cells.iter().map(|&cell| grid.at(values, cell)).collect();
    let mut sorted = of_cells.clone();
    sorted.sort_by(f32::total_cmp);
    let rank = quantile * (sorted.len() - 1) as f64;
    let (below, share) = (rank as usize, rank.fract() as f32);
    let above = (below + 1).min(sorted.len() - 1);
    let threshold = sorted[below] + (sorted[above] - sorted[below]) * share;
    of_cells.iter().map(|&value| value >= threshold).collect()
}

/// What each benchmark token is made of.
///
/// # Shapes
/// - `similarity`: `[features, tokens]`, columns of length 1
/// - returns `[tokens, kept]`
fn weights<B: Backend>(
    similarity: Tensor<B, 2>,
    benchmark: &[(usize, bool)],
    grid: &Grid,
    near: f64,
    keeps_itself: bool,
) -> Tensor<B, 2> {
    let (device, tokens) = (similarity.device(), grid.rows * grid.columns);
    let shape = [tokens, benchmark.len()];
    let matrix = |of: &dyn Fn(usize, usize, bool) -> f32| {
        let of_token = |token| {
            benchmark
                .iter()
                .map(move |&(own, pillar)| of(token, own, pillar))
        };
        let values: Vec<f32> = (0..tokens).flat_map(of_token).collect();
        Tensor::<B, 2>::from_data(TensorData::new(values, shape), (&device, DType::F32))
    };
    let threshold = (near * grid.largest_distance_squared()).sqrt();
    let nearness = matrix(&|token, own, pillar| match pillar {
        true => f32::from(token == own),
        // On a grid of one token nothing is far.
        false if threshold == 0.0 => 1.0,
        false => (1.0 - grid.distance_squared(token, own).sqrt() / threshold).max(0.0) as f32,
    });
    let own = indices(benchmark.iter().map(|&(token, _)| token), &device);
    let cosines = similarity
        .clone()
        .transpose()
        .matmul(similarity.select(1, own));
    let weights = cosines.clamp_min(0.0) * nearness;
    let weights = weights.clone() / (weights.sum_dim(0) + EPSILON);
    if !keeps_itself {
        return weights;
    }
    let others = matrix(&|token, own, _| f32::from(token != own));
    let itself = matrix(&|token, own, _| f32::from(token == own));
    weights * others + itself
}
