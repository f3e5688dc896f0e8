//! Every method against its formula in plain loops, in f64.

use std::collections::BTreeMap;

use reducers::encoder::{
    CdPruner, DivPrune, EncoderReducer, EncoderShape, FasterVlm, HiPrune, PruMerge, Tap, VScan,
    VisPruner, VisionZip,
};

use super::support::{CLIP, Flex, Kept, Matrix, Picture, QWEN, assert_same};

const GRIDS: [[usize; 2]; 8] = [
    [1, 1],
    [1, 2],
    [1, 7],
    [9, 1],
    [5, 6],
    [8, 8],
    [12, 13],
    [18, 12],
];

/// Compares what is made of random pictures.
fn check(
    method: &dyn EncoderReducer<Flex>,
    encoder: EncoderShape,
    oracle: impl Fn(&Picture, usize) -> Kept,
) {
    for (seed, grid) in (0..).zip(GRIDS) {
        let picture = Picture::random(grid, encoder, seed);
        let tokens = picture.tokens();
        for keep in [
            1,
            2,
            3,
            tokens / 7,
            tokens / 3,
            tokens / 2,
            tokens - 1,
            tokens,
        ] {
            if (1..=tokens).contains(&keep) {
                let what = format!("{keep} of {grid:?}");
                assert_same(&picture.kept(method, keep), &oracle(&picture, keep), &what);
            }
        }
    }
}

/// These cells, unchanged.
fn cells(picture: &Picture, cells: impl IntoIterator<Item = usize>) -> Kept {
    let features = picture.tap(Tap::Features);
    let token = |cell| (Some(cell), features.column(cell));
    cells.into_iter().map(token).collect()
}

fn mean_of_rows(matrix: Matrix) -> Vec<f64> {
    let columns = matrix.columns();
    let mean = |column: &Vec<f64>| column.iter().sum::<f64>() / column.len() as f64;
    columns.iter().map(mean).collect()
}

fn class_attention(picture: &Picture, layer: usize) -> Vec<f64> {
    mean_of_rows(picture.tap(Tap::ClassAttention { layer }))
}

fn received(picture: &Picture, layer: usize) -> Vec<f64> {
    mean_of_rows(picture.tap(Tap::ReceivedAttention { layer }))
}

/// Indices, highest score first.
fn ranked(scores: &[f64]) -> Vec<usize> {
    let mut order: Vec<usize> = (0..scores.len()).collect();
    order.sort_by(|&a, &b| scores[b].total_cmp(&scores[a]));
    order
}

/// The first of those with the highest score.
fn best(candidates: impl IntoIterator<Item = usize>, score: impl Fn(usize) -> f64) -> usize {
    let scored = candidates.into_iter().map(|at| (at, score(at)));
    let higher = |best: (usize, f64), next: (usize, f64)| if next.1 > best.1 { next } else { best };
    scored.reduce(higher).unwrap().0
}

fn dot(a: &[f64], b: &[f64]) -> f64 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

fn cosine(a: &[f64], b: &[f64]) -> f64 {
    dot(a, b) / (dot(a, a) * dot(b, b)).sqrt()
}

fn weighted_sum(parts: &[(f64, &[f64])]) -> Vec<f64> {
    let value = |at: usize| parts.iter().map(|(weight, part)| weight * part[at]).sum();
    (0..parts[0].1.len()).map(value).collect()
}

#[test]
fn vision_zip() {
    for encoder in [CLIP, QWEN] {
        check(&VisionZip::default(), encoder, vision_zip_by_definition);
    }
}

fn vision_zip_by_definition(picture: &Picture, keep: usize) -> Kept {
    let tokens = picture.tokens();
    if keep == tokens {
        return cells(picture, 0..tokens);
    }
    let is_clip = picture.encoder.class_token;
    let (layer, scores, contextual) = match is_clip {
        true => (
            22,
            class_attention(picture, 22),
            (keep as f64 * 10.0 / 64.0) as usize,
        ),
        false => (
            31,
            received(picture, 31),
            ((0.05 * tokens as f64) as usize).max(1),
        ),
    };
    let contextual = contextual.min(keep - 1);
    let dominant = &ranked(&scores)[..keep - contextual - usize::from(is_clip)];
    let mut kept = cells(picture, dominant.iter().copied());
    if is_clip {
        kept.insert(None, picture.tap(Tap::ClassToken).column(0));
    }
    if contextual == 0 {
        return kept;
    }

    let mean_key = |token: usize| {
        let key = picture.tap(Tap::Keys { layer }).column(token);
        let heads: Vec<(f64, &[f64])> =
            key.chunks(key.len() / 4).map(|head| (0.25, head)).collect();
        weighted_sum(&heads)
    };
    let features = picture.tap(Tap::Features).columns();
    let rest: Vec<usize> = (0..tokens)
        .filter(|token| !dominant.contains(token))
        .collect();
    let step = (rest.len() / contextual).max(1);
    let is_target = |at: usize| at.is_multiple_of(step) && at / step < contextual;
    let mut clusters: BTreeMap<usize, Vec<usize>> = BTreeMap::new();
    for (at, &token) in rest.iter().enumerate() {
        if is_target(at) {
            clusters.entry(token).or_default();
            continue;
        }
        let targets = (0..rest.len())
            .filter(|&at| is_target(at))
            .map(|at| rest[at]);
        let best = best(targets, |target| {
            cosine(&mean_key(token), &mean_key(target))
        });
        clusters.entry(best).or_default().push(token);
    }
    for (target, members) in clusters {
        let mut parts = vec![(1.0, &features[target][..])];
        let share = 1.0 / members.len() as f64;
        parts.extend(members.iter().map(|&member| (share, &features[member][..])));
        kept.insert(Some(target), weighted_sum(&parts));
    }
    kept
}

#[test]
fn div_prune() {
    for encoder in [CLIP, QWEN] {
        check(&DivPrune::default(), encoder, div_prune_by_definition);
    }
}

fn div_prune_by_definition(picture: &Picture, keep: usize) -> Kept {
    let embeddings = picture.tap(Tap::Embeddings).columns();
    let mut chosen: Vec<usize> = Vec::new();
    for _ in 0..keep {
        let distance_to_set = |token: usize| {
            let set: Vec<usize> = match chosen.is_empty() {
                true => (0..embeddings.len())
                    .filter(|&other| other != token)
                    .collect(),
                false => chosen.clone(),
            };
            let distances = set
                .iter()
                .map(|&other| 1.0 - cosine(&embeddings[token], &embeddings[other]));
            distances.fold(f64::INFINITY, f64::min)
        };
        let kept = (0..embeddings.len()).filter(|token| !chosen.contains(token));
        let farthest = best(kept, distance_to_set);
        chosen.push(farthest);
    }
    cells(picture, chosen)
}

/// More tokens than a table of similarities holds.
#[test]
fn div_prune_of_many_tokens() {
    let picture = Picture::random([42, 100], QWEN, 0);
    let found = picture.kept(&DivPrune::default(), 2);
    assert_same(&found, &div_prune_by_definition(&picture, 2), "two of 4200");
}

#[test]
fn pru_merge() {
    let plus = |adaptive| PruMerge {
        adaptive,
        ..PruMerge::plus()
    };
    let fixed = PruMerge {
        adaptive: false,
        ..PruMerge::default()
    };
    for method in [PruMerge::default(), fixed, plus(false), plus(true)] {
        let oracle = |picture: &Picture, keep| pru_merge_by_definition(&method, picture, keep);
        check(&method, CLIP, oracle);
    }
}

fn pru_merge_by_definition(method: &PruMerge, picture: &Picture, keep: usize) -> Kept {
    let tokens = picture.tokens();
    if keep == tokens && !method.adaptive {
        return cells(picture, 0..tokens);
    }
    let query = picture.tap(Tap::ClassQuery { layer: 23 }).column(0);
    let keys = picture.tap(Tap::Keys { layer: 23 }).columns();
    let class_key = picture.tap(Tap::ClassKey { layer: 23 }).column(0);
    let weight = |key: &Vec<f64>| (dot(&query, key) / (query.len() as f64).sqrt()).exp();
    let total = keys.iter().map(weight).sum::<f64>() + weight(&class_key);
    let attention: Vec<f64> = keys.iter().map(|key| weight(key) / total).collect();

    let outliers = outliers_by_definition(&attention);
    let room = keep - 1;
    let by_attention = match (method.adaptive, method.spatial) {
        (true, _) => outliers.min(room),
        (false, true) => room - room / 2,
        (false, false) => room,
    };
    let mut chosen = ranked(&attention)[..by_attention].to_vec();
    if method.spatial {
        let apart = match outliers {
            _ if !method.adaptive => 1,
            0 => usize::MAX,
            some => (tokens / some / 3).max(1),
        };
        let end = if method.adaptive { tokens - 1 } else { tokens };
        let samples: Vec<usize> = (0..end)
            .filter(|token| token % apart == 0 && !chosen.contains(token))
            .collect();
        let wanted = (room - by_attention).min(samples.len());
        for part in 0..wanted {
            let middle = (part as f64 + 0.5) * samples.len() as f64 / wanted as f64;
            chosen.push(samples[(middle + 1e-9) as usize]);
        }
    }

    let features = picture.tap(Tap::Features).columns();
    let part = |&token: &usize| (attention[token], &features[token][..]);
    let mut kept = Kept::new();
    for &token in &chosen {
        let similarity: Vec<f64> = keys.iter().map(|key| cosine(key, &keys[token])).collect();
        let others = ranked(&similarity)
            .into_iter()
            .filter(|&other| other != token);
        let others: Vec<usize> = others.take(32).collect();
        let mut parts = vec![(1.0, &features[token][..])];
        parts.extend(others.iter().map(part));
        kept.insert(Some(token), weighted_sum(&parts));
    }
    let rest: Vec<usize> = (0..tokens)
        .filter(|token| !chosen.contains(token))
        .collect();
    let rest: Vec<(f64, &[f64])> = rest.iter().map(part).collect();
    kept.insert(None, weighted_sum(&rest));
    kept
}

/// Values beyond the third quartile by more than 1.5 times the distance of the quartiles, which are
/// read off the line through the sorted values.
fn outliers_by_definition(values: &[f64]) -> usize {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    let quartile = |quarters: usize| {
        let (whole, quarter) = (
            quarters * (sorted.len() - 1) / 4,
            quarters * (sorted.len() - 1) % 4,
        );
        match quarter {
            0 => sorted[whole],
            part => sorted[whole] + (sorted[whole + 1] - sorted[whole]) * part as f64 / 4.0,
        }
    };
    let bound = quartile(3) + 1.5 * (quartile(3) - quartile(1));
    values.iter().filter(|&&value| value > bound).count()
}

#[test]
fn hi_prune() {
    for (encoder, middle, last) in [(CLIP, 8, 22), (QWEN, 15, 31)] {
        for alpha in [0.1, 0.6, 1.0] {
            let method = HiPrune {
                alpha,
                ..HiPrune::default()
            };
            check(&method, encoder, |picture, keep| {
                let [rows, columns] = picture.grid;
                // Formatting rounds halves to even, too.
                let anchors: usize = format!("{:.0}", keep as f64 * alpha / 5.0).parse().unwrap();
                let anchors = &ranked(&received(picture, middle))[..anchors];
                let mut chosen: Vec<usize> = Vec::new();
                for step in [0, -1, 1, -(columns as i64), columns as i64] {
                    for &anchor in anchors {
                        let near = (anchor as i64 + step).clamp(0, (rows * columns) as i64 - 1);
                        chosen.push(near as usize);
                    }
                }
                chosen.extend(ranked(&received(picture, last)));
                let mut kept = std::collections::BTreeSet::new();
                for token in chosen {
                    if kept.len() < keep {
                        kept.insert(token);
                    }
                }
                cells(picture, kept)
            });
        }
    }
}

#[test]
fn faster_vlm() {
    check(&FasterVlm::default(), CLIP, |picture, keep| {
        let order = ranked(&class_attention(picture, 22));
        cells(picture, order[..keep].iter().copied())
    });
}

#[test]
fn vis_pruner() {
    for important in [0.0, 0.5, 0.75, 1.0] {
        check(&VisPruner { important }, CLIP, |picture, keep| {
            let features = picture.tap(Tap::Features).columns();
            let mut order = ranked(&class_attention(picture, 22));
            let mut rest = order.split_off((keep as f64 * important) as usize);
            let diverse = keep - order.len();
            while diverse > 0 && rest.len() > diverse {
                let (mut even, mut odd) = (Vec::new(), Vec::new());
                for (at, token) in rest.iter().enumerate() {
                    if at % 2 == 0 {
                        even.push(*token)
                    } else {
                        odd.push(*token)
                    }
                }
                let closest = |token: &usize| {
                    let to = |other: &usize| cosine(&features[*token], &features[*other]);
                    odd.iter().map(to).fold(f64::NEG_INFINITY, f64::max)
                };
                let scores: Vec<f64> = even.iter().map(closest).collect();
                let gone = 8.min(order.len() + rest.len() - keep).min(even.len());
                let stay = ranked(&scores).split_off(gone);
                rest = stay.into_iter().map(|at| even[at]).chain(odd).collect();
            }
            order.extend(rest.into_iter().take(diverse));
            cells(picture, order)
        });
    }
}

#[test]
fn vscan() {
    check(&VScan::default(), CLIP, |picture, keep| {
        let early = class_attention(picture, 5);
        let windows = windows(picture.grid, 6);
        let each = keep / 2 / windows.len();
        let best = windows.iter().flat_map(|window| {
            let scores: Vec<f64> = window.iter().map(|&token| early[token]).collect();
            ranked(&scores).into_iter().take(each).map(|at| window[at])
        });
        let late = class_attention(picture, 22);
        merge_rest(picture, filled_up(best.collect(), &late, keep))
    });
    check(&VScan::default(), QWEN, |picture, keep| {
        let windows = windows(picture.grid, 4);
        let limit = (keep as f64 / 2.0).floor() / windows.len() as f64;
        let mut taken = vec![0.0; windows.len()];
        let mut best = Vec::new();
        for token in ranked(&received(picture, 7)) {
            let window = windows
                .iter()
                .position(|window| window.contains(&token))
                .unwrap();
            if best.len() < keep / 2 && taken[window] < limit.ceil() {
                taken[window] += 1.0;
                best.push(token);
            }
        }
        merge_rest(picture, filled_up(best, &received(picture, 31), keep))
    });
}

/// Tokens of every window; the last of a row or column reaches to the edge.
fn windows([rows, columns]: [usize; 2], size: usize) -> Vec<Vec<usize>> {
    let spans = |length: usize| -> Vec<std::ops::Range<usize>> {
        let count = (length / size).max(1);
        let end = |at| {
            if at + 1 == count {
                length
            } else {
                (at + 1) * size
            }
        };
        (0..count).map(|at| at * size..end(at)).collect()
    };
    let mut windows = Vec::new();
    for down in spans(rows) {
        for across in spans(columns) {
            let row = |row: usize| across.clone().map(move |column| row * columns + column);
            windows.push(down.clone().flat_map(row).collect());
        }
    }
    windows
}

fn filled_up(mut chosen: Vec<usize>, scores: &[f64], keep: usize) -> Vec<usize> {
    let others = ranked(scores)
        .into_iter()
        .filter(|token| !chosen.contains(token));
    let others: Vec<usize> = others.take(keep - chosen.len()).collect();
    chosen.extend(others);
    chosen
}

fn merge_rest(picture: &Picture, chosen: Vec<usize>) -> Kept {
    let embeddings = picture.tap(Tap::Embeddings).columns();
    let features = picture.tap(Tap::Features).columns();
    let like_most = |token: usize| {
        if chosen.contains(&token) {
            return token;
        }
        let kept = chosen.iter().copied();
        best(kept, |other| cosine(&embeddings[token], &embeddings[other]))
    };
    let home: Vec<usize> = (0..picture.tokens()).map(like_most).collect();
    let mean = |&token: &usize| {
        let members: Vec<usize> = (0..home.len()).filter(|&at| home[at] == token).collect();
        let share = 1.0 / members.len() as f64;
        let parts: Vec<(f64, &[f64])> = members
            .iter()
            .map(|&at| (share, &features[at][..]))
            .collect();
        (Some(token), weighted_sum(&parts))
    };
    chosen.iter().map(mean).collect()
}

#[test]
fn cd_pruner() {
    for (encoder, negative) in [(CLIP, true), (QWEN, true), (QWEN, false)] {
        for (seed, grid) in (0..).zip([[1, 1], [1, 4], [4, 6], [7, 5]]) {
            let picture = Picture::random(grid, encoder, seed);
            for keep in 1..=picture.tokens().min(9) {
                let found = picture.kept(&CdPruner { negative }, keep);
                let expected = cd_pruner_by_definition(&picture, keep, negative);
                assert_same(&found, &expected, &format!("{keep} of {grid:?}"));
            }
        }
    }
}

/// Greedy, by the determinants themselves.
fn cd_pruner_by_definition(picture: &Picture, keep: usize, negative: bool) -> Kept {
    let embeddings = picture.tap(Tap::Embeddings).columns();
    let question = picture.tap(Tap::Question).columns();
    let relevance = |embedding: &Vec<f64>| {
        let sum: f64 = question.iter().map(|word| cosine(embedding, word)).sum();
        sum / question.len() as f64 * if negative { -1.0 } else { 1.0 }
    };
    let relevance: Vec<f64> = embeddings.iter().map(relevance).collect();
    let low = relevance.iter().copied().fold(f64::INFINITY, f64::min);
    let high = relevance.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let scaled = |token: usize| match high > low {
        true => (relevance[token] - low + 1e-6) / (high - low),
        false => 1.0,
    };
    let kernel =
        |a: usize, b: usize| scaled(a) * cosine(&embeddings[a], &embeddings[b]) * scaled(b);
    let mut chosen: Vec<usize> = Vec::new();
    for _ in 0..keep {
        let with = |token: usize| {
            let set: Vec<usize> = chosen.iter().copied().chain([token]).collect();
            let row = |&a: &usize| set.iter().map(|&b| kernel(a, b)).collect();
            determinant(set.iter().map(row).collect())
        };
        let kept = (0..embeddings.len()).filter(|token| !chosen.contains(token));
        let largest = best(kept, with);
        chosen.push(largest);
    }
    cells(picture, chosen)
}

/// By elimination; the matrix is positive definite.
fn determinant(mut matrix: Vec<Vec<f64>>) -> f64 {
    let mut product = 1.0;
    for pivot in 0..matrix.len() {
        let row = matrix[pivot].clone();
        product *= row[pivot];
        for below in &mut matrix[pivot + 1..] {
            let factor = below[pivot] / row[pivot];
            for (value, above) in below.iter_mut().zip(&row) {
                *value -= factor * above;
            }
        }
    }
    product
}
