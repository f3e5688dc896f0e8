//! Shortcuts for visual tokens that wait: low-rank maps from what a token is before the layers of a stage to what they
//! would have made of it, fitted by ridge regression (`docs/routing.md`, waiting).
//!
//! With states `x` and updates `t`, both without their means, and `G = Σ x xᵀ + λ`, `C = Σ x tᵀ`, ridge regression predicts
//! `Cᵀ G⁻¹ x`. The best map of rank r of it, by the penalised squared error, keeps the r first eigenvectors `V` of `Cᵀ G⁻¹ C`
//! (Mukherjee and Zhu, "Reduced rank ridge regression and its kernel extensions", 2011, section 2): `up = V`,
//! `down = Vᵀ Cᵀ G⁻¹`.

use std::ops::Range;

use burn::tensor::Tensor;
use burn::tensor::backend::Backend;
use nalgebra::{Cholesky, DMatrix, DVector, SymmetricEigen};
use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};
use reroute_zoo::reroute::{Shortcut, Waited};
use reroute_zoo::{Plan, Question, Vlm};

use crate::TuneError;
use crate::host::data;

/// Of so many pictures one is not fitted to, and says what a map is worth.
const HELD_OUT: usize = 5;
/// Directions that the search has beside those that are asked for, and its rounds.
const SPARE: usize = 8;
const ROUNDS: usize = 40;

/// How maps are fitted.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Calibration {
    /// Numbers that a state is mapped down to.
    pub rank: usize,
    /// λ, as a share of the mean eigenvalue of `Σ x xᵀ`.
    pub ridge: f64,
}

impl Default for Calibration {
    fn default() -> Self {
        Self {
            rank: 8,
            ridge: 0.01,
        }
    }
}

/// A map, and what it is worth.
#[derive(Debug, Clone, PartialEq)]
pub struct Fitted {
    /// The map.
    pub shortcut: Shortcut,
    /// Visual tokens that it was fitted to.
    pub tokens: usize,
    /// The share of the squared length of updates that it predicts, of pictures that it was not fitted to; of those that it
    /// was, if there are too few.
    pub explained: f64,
    /// The same of the mean update alone.
    pub explained_by_mean: f64,
}

/// Fits a shortcut for every stage of a routing whose tokens wait for a decision, to questions about pictures. Every fifth
/// picture is held out to measure by. `seen` is called behind each.
///
/// Memory for a stage is 16 bytes times `hidden_size` squared, twice with pictures held out.
///
/// # Errors
/// [`TuneError::Setting`]; those of [`Vlm::waits`].
pub fn calibrate<B: Backend>(
    vlm: &Vlm<B>,
    questions: impl IntoIterator<Item = Question>,
    plan: &Plan,
    calibration: Calibration,
    mut seen: impl FnMut(usize),
) -> Result<Vec<Fitted>, TuneError> {
    let Calibration { rank, ridge } = calibration;
    let hidden_size = vlm.config().decoder().hidden_size;
    let setting = |setting, reason| Err(TuneError::Setting { setting, reason });
    if rank == 0 || rank > hidden_size {
        return setting("--rank", "is from 1 to the model's hidden_size");
    }
    if !(ridge.is_finite() && ridge > 0.0) {
        return setting("--ridge", "is a number above 0");
    }
    let [mut fitting, mut held_out] = <[Fitting; 2]>::default();
    for (index, question) in questions.into_iter().enumerate() {
        let waits = vlm.waits(&question, plan)?;
        match index % HELD_OUT == HELD_OUT - 1 {
            true => held_out.add(&waits)?,
            false => fitting.add(&waits)?,
        }
        seen(index + 1);
    }
    let fitted = fitting.fit(calibration, &held_out)?;
    if fitted.is_empty() {
        return setting(
            "--routing",
            "has no stage whose visual tokens wait for a later decision, or no picture has any: take a routing that \
             decides twice, and pictures",
        );
    }
    Ok(fitted)
}

/// What maps are fitted to, for loops of one's own: sums over visual tokens, for each stage.
#[derive(Default)]
pub struct Fitting {
    stages: Vec<Moments>,
}

impl Fitting {
    /// Adds the visual tokens of prompts ([`Vlm::waits`]).
    ///
    /// # Errors
    /// [`TuneError::Device`]
    pub fn add<B: Backend>(&mut self, waits: &[Waited<B>]) -> Result<(), TuneError> {
        for waited in waits {
            let known = self
                .stages
                .iter_mut()
                .find(|sums| sums.layers == waited.layers);
            match known {
                Some(sums) => sums.add(waited)?,
                None => self.stages.push(Moments::of(waited)?),
            }
        }
        Ok(())
    }

    /// A map for each stage, measured on other tokens; on the same where there are no others.
    ///
    /// # Errors
    /// [`TuneError::Device`] for numbers that are not finite.
    pub fn fit(&self, calibration: Calibration, held_out: &Self) -> Result<Vec<Fitted>, TuneError> {
        let fit = |sums: &Moments| {
            let shortcut = sums.fit(calibration)?;
            let others = { held_out.stages.iter() }.find(|other| other.layers == sums.layers);
            let measured = others.unwrap_or(sums);
            let mean = Shortcut {
                up: vec![0.0; shortcut.up.len()],
                shift: sums.mean_update(),
                ..shortcut.clone()
            };
            Ok(Fitted {
                explained: measured.explained_by(&shortcut),
                explained_by_mean: measured.explained_by(&mean),
                tokens: sums.count,
                shortcut,
            })
        };
        self.stages.iter().map(fit).collect()
    }
}

/// Sums over tokens of products of states and updates; states less `origin`, so that large means cost no digits.
struct Moments {
    layers: Range<usize>,
    count: usize,
    /// `[hidden_size]`
    origin: DVector<f64>,
    /// Σ x and Σ t.
    states: DVector<f64>,
    updates: DVector<f64>,
    /// Σ x xᵀ and Σ x tᵀ.
    states_states: DMatrix<f64>,
    states_updates: DMatrix<f64>,
    /// Σ |t|².
    squares: f64,
}

impl Moments {
    fn of<B: Backend>(waited: &Waited<B>) -> Result<Self, TuneError> {
        let size = waited.before.dims()[0];
        let mut moments = Self {
            layers: waited.layers.clone(),
            count: 0,
            origin: vector(waited.before.clone().mean_dim(1))?,
            states: DVector::zeros(size),
            updates: DVector::zeros(size),
            states_states: DMatrix::zeros(size, size),
            states_updates: DMatrix::zeros(size, size),
            squares: 0.0,
        };
        moments.add(waited)?;
        Ok(moments)
    }

    fn add<B: Backend>(&mut self, waited: &Waited<B>) -> Result<(), TuneError> {
        let Waited { before, after, .. } = waited;
        let [size, tokens] = before.dims();
        let origin: Vec<f32> = self.origin.iter().map(|&x| x as f32).collect();
        let origin = Tensor::<B, 1>::from_data(origin.as_slice(), &before.device());
        let updates = after.clone() - before.clone();
        let states = before.clone() - origin.reshape([size, 1]);
        self.count += tokens;
        self.states += vector(states.clone().sum_dim(1))?;
        self.updates += vector(updates.clone().sum_dim(1))?;
        self.squares += vector(updates.clone().square().sum_dim(1))?.sum();
        let transposed = states.clone().transpose();
        // Symmetric, and the transposed of what is summed: rows of the one are columns of the other.
        self.states_states += matrix(states.matmul(transposed.clone()))?;
        self.states_updates += matrix(updates.matmul(transposed))?;
        Ok(())
    }

    /// `Σ x xᵀ` and `Σ x tᵀ` about the means.
    fn centred(&self) -> [DMatrix<f64>; 2] {
        let per = -1.0 / self.count as f64;
        let [mut states, mut updates] =
            [&self.states_states, &self.states_updates].map(Clone::clone);
        states.ger(per, &self.states, &self.states, 1.0);
        updates.ger(per, &self.states, &self.updates, 1.0);
        [states, updates]
    }

    fn mean_update(&self) -> Vec<f32> {
        let mean = self.updates.iter().map(|sum| sum / self.count as f64);
        mean.map(|x| x as f32).collect()
    }

    fn fit(&self, Calibration { rank, ridge }: Calibration) -> Result<Shortcut, TuneError> {
        let size = self.states.len();
        let [mut states, updates] = self.centred();
        let added = (ridge * states.trace() / size as f64).max(f64::MIN_POSITIVE);
        (0..size).for_each(|at| states[(at, at)] += added);
        let Some(states) = Cholesky::new(states) else {
            return Err(TuneError::Device {
                reason: "hidden states are not finite, so no map of them can be fitted".into(),
            });
        };
        // The first eigenvectors of Cᵀ G⁻¹ C, by orthogonal iteration.
        let width = (rank + SPARE).min(size);
        let mut random = StdRng::seed_from_u64(0);
        let drawn = DMatrix::from_fn(size, width, |_, _| random.random_range(-1.0..1.0));
        let mut vectors = drawn.qr().q();
        for _ in 0..ROUNDS {
            let solved = states.solve(&(&updates * &vectors));
            vectors = updates.tr_mul(&solved).qr().q();
        }
        let solved = states.solve(&(&updates * &vectors));
        let inner = vectors.tr_mul(&updates.tr_mul(&solved));
        let eigen = SymmetricEigen::new((&inner + inner.transpose()) * 0.5);
        let mut order: Vec<usize> = (0..width).collect();
        order.sort_by(|&a, &b| eigen.eigenvalues[b].total_cmp(&eigen.eigenvalues[a]));
        let chosen = eigen.eigenvectors.select_columns(&order[..rank]);
        let up = &vectors * &chosen;
        let down = (solved * chosen).transpose();

        let count = self.count as f64;
        let centre = &self.origin + &self.states / count;
        let shift = &self.updates / count - &up * (&down * centre);
        Ok(Shortcut {
            layers: self.layers.clone(),
            down: by_rows(&down),
            up: by_rows(&up),
            shift: shift.iter().map(|&x| x as f32).collect(),
        })
    }

    /// The share of the squared length of updates that a map predicts.
    fn explained_by(&self, shortcut: &Shortcut) -> f64 {
        let (size, rank, count) = (self.states.len(), shortcut.rank(), self.count as f64);
        let numbers = |values: &[f32]| values.iter().map(|&x| f64::from(x)).collect::<Vec<_>>();
        let down = DMatrix::from_row_slice(rank, size, &numbers(&shortcut.down));
        let up = DMatrix::from_row_slice(size, rank, &numbers(&shortcut.up));
        // What a token at the origin receives.
        let constant = DVector::from_vec(numbers(&shortcut.shift)) + &up * (&down * &self.origin);
        // Σ |t - c - U D x|², term by term.
        let mapped = &up * (&down * &self.states);
        let squared = up.tr_mul(&up) * &down * &self.states_states * down.transpose();
        let left = self.squares + count * constant.norm_squared() + squared.trace()
            - 2.0 * self.updates.dot(&constant)
            - 2.0 * (&down * &self.states_updates * &up).trace()
            + 2.0 * constant.dot(&mapped);
        1.0 - left / self.squares.max(f64::MIN_POSITIVE)
    }
}

fn by_rows(matrix: &DMatrix<f64>) -> Vec<f32> {
    // In memory by columns.
    matrix.transpose().iter().map(|&x| x as f32).collect()
}

fn vector<B: Backend>(tensor: Tensor<B, 2>) -> Result<DVector<f64>, TuneError> {
    Ok(DVector::from_iterator(
        tensor.dims().iter().product(),
        data(tensor)?.iter::<f64>(),
    ))
}

/// A square matrix by its rows, as a matrix of these columns: transposed.
fn matrix<B: Backend>(tensor: Tensor<B, 2>) -> Result<DMatrix<f64>, TuneError> {
    let [rows, columns] = tensor.dims();
    Ok(DMatrix::from_iterator(
        columns,
        rows,
        data(tensor)?.iter::<f64>(),
    ))
}
