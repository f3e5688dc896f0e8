//! Intervals by the bootstrap (Efron 1979), drawn over pictures: what is asked about one picture is not independent.

use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};

/// Of a picture: the sum of what its samples score, and how many there are.
pub type Cell = (f64, f64);

/// Bounds between which the middle 95 % of resampled means lie (percentiles).
pub type Interval = [f64; 2];

/// The intervals of several means. All series see the same draws of pictures, `series[which][picture]`; the mean of a
/// draw is that of all samples of its pictures. `None` for a series without samples.
pub fn intervals(series: &[Vec<Cell>], resamples: usize, seed: u64) -> Vec<Option<Interval>> {
    let pictures = series.iter().map(Vec::len).max().unwrap_or(0);
    let mut random = StdRng::seed_from_u64(seed);
    let mut means: Vec<Vec<f64>> = vec![Vec::with_capacity(resamples); series.len()];
    let mut drawn = vec![0; pictures];
    for _ in 0..resamples {
        for at in &mut drawn {
            *at = random.random_range(0..pictures);
        }
        for (cells, means) in series.iter().zip(&mut means) {
            means.extend(mean(drawn.iter().filter_map(|&at| cells.get(at))));
        }
    }
    means.into_iter().map(middle).collect()
}

/// The mean over pictures.
pub(crate) fn mean<'a>(cells: impl Iterator<Item = &'a Cell>) -> Option<f64> {
    let (sum, count) = cells.fold((0.0, 0.0), |all, cell| (all.0 + cell.0, all.1 + cell.1));
    (count > 0.0).then(|| sum / count)
}

fn middle(mut means: Vec<f64>) -> Option<Interval> {
    means.sort_by(f64::total_cmp);
    let last = means.len().checked_sub(1)?;
    let at = |share: f64| means[(share * last as f64).round() as usize];
    Some([at(0.025), at(0.975)])
}

#[cfg(test)]
mod tests {
    use super::*;

    /// All draws of three pictures, each as likely as any other.
    #[test]
    fn intervals_are_those_of_all_draws() {
        let cells = [(2.0, 2.0), (1.0, 4.0), (0.0, 1.0)];
        let mut all = Vec::new();
        for a in 0..3 {
            for b in 0..3 {
                for c in 0..3 {
                    all.extend(mean([a, b, c].map(|at: usize| cells[at]).iter()));
                }
            }
        }
        // 27 means: the lowest (0, from one draw) has 3.7 % of the draws, and so has the highest.
        assert_eq!(all.len(), 27);
        let found = intervals(&[cells.to_vec()], 20_000, 7);
        assert_eq!(found, [Some([0.0, 1.0])]);
        // Of five pictures that are alike but one, the lowest and highest means are rarer than 2.5 %.
        let cells = [1.0, 0.0, 0.0, 0.0, 0.0].map(|score| (score, 1.0));
        // The one is drawn k of 5 times with probability C(5, k) 0.2^k 0.8^(5-k): 0.328, 0.410, 0.205, 0.051, 0.006.
        let found = intervals(&[cells.to_vec()], 20_000, 7);
        assert_eq!(found, [Some([0.0, 3.0 / 5.0])]);
    }

    #[test]
    fn pictures_are_drawn_and_not_samples() {
        // Ten samples of one picture are one observation: its mean never varies.
        let found = intervals(&[vec![(3.0, 10.0)], vec![(0.0, 0.0)]], 100, 0);
        assert_eq!(found, [Some([0.3, 0.3]), None]);
        // Both series see the same draws: equal series have no difference, whatever is drawn.
        let scores = vec![(1.0, 1.0), (0.0, 2.0), (5.0, 9.0)];
        let found = intervals(&[scores.clone(), scores, vec![(0.0, 1.0); 3]], 500, 1);
        assert_eq!(found[0], found[1]);
        assert_eq!(found[2], Some([0.0, 0.0]));
        assert_eq!(intervals(&[], 10, 0), []);
        assert_eq!(intervals(&[vec![]], 10, 0), [None]);
    }
}
