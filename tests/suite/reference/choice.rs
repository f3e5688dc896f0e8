//! What a decision of the slow decoder ranks by, and what it keeps.

use std::collections::HashMap;

use reducers::ScoreMemory;

use super::Decision;

/// What tokens are ranked by: their scores, or what they come to with what they scored before.
pub fn remembered(
    memory: ScoreMemory,
    scores: &HashMap<usize, f64>,
    visual: &[usize],
    shares: &mut [Vec<f64>],
) -> HashMap<usize, f64> {
    if memory == ScoreMemory::Off {
        return scores.clone();
    }
    let stands = |row: &&usize| scores.contains_key(row);
    let all: f64 = visual
        .iter()
        .filter(stands)
        .map(|row| scores[row].abs())
        .sum();
    let mut ranked = HashMap::new();
    for (row, shares) in visual.iter().zip(shares) {
        let Some(score) = scores.get(row) else {
            continue;
        };
        shares.push(if all > 0.0 { score / all } else { 0.0 });
        let count = shares.len();
        let faded = |rate: f32, at: usize| f64::from(rate).powi((count - 1 - at) as i32);
        let value = match memory {
            ScoreMemory::Max => shares.iter().copied().fold(f64::NEG_INFINITY, f64::max),
            ScoreMemory::Decay(rate) => {
                let all = shares.iter().enumerate();
                all.map(|(at, share)| faded(rate, at) * share).sum()
            }
            _ => shares.iter().sum(),
        };
        ranked.insert(*row, value);
    }
    ranked
}

/// The best `count` of the visual tokens that have a score, lower index first among equals, those
/// that a monotonic schedule has dismissed last.
pub fn choose(
    [scores, ranked]: [&HashMap<usize, f64>; 2],
    visual: &[usize],
    previous: Option<&Decision>,
    spread: &dyn Fn(usize) -> bool,
    count: usize,
) -> Decision {
    let stands = |token: &usize| scores.contains_key(&visual[*token]);
    let candidates: Vec<usize> = (0..visual.len()).filter(stands).collect();
    let rank = |token: usize| match previous {
        _ if spread(token) => f64::INFINITY,
        Some(previous) if !previous.selected.contains(&token) => f64::NEG_INFINITY,
        _ => ranked[&visual[token]],
    };
    let mut order = candidates.clone();
    order.sort_by(|&a, &b| rank(b).total_cmp(&rank(a)).then(a.cmp(&b)));
    let margin = match order[count.saturating_sub(1)..] {
        [worst, best, ..] if count > 0 && rank(best).is_finite() => rank(worst) - rank(best),
        _ => f64::INFINITY,
    };
    order.truncate(count);
    order.sort_unstable();
    Decision {
        scores: candidates.iter().map(|&t| scores[&visual[t]]).collect(),
        ranked: candidates.iter().map(|&t| ranked[&visual[t]]).collect(),
        selected: order,
        margin,
    }
}
