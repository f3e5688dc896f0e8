//! An independent, slow decoder with routing, to compare the library with: plain loops in f64 on
//! the host, one sample, rows that always stand at full length.
//!
//! It shares nothing with the library but the weights: no feature-major activations, no packed
//! rows, no compacted stages, no lean scorer, no cache. It follows the *scatter* form of Reroute
//! (arXiv 2606.12412): every layer gathers its active rows out of the full-length hidden states,
//! works on them and writes them back, and a decision computes the whole attention matrix of its
//! pool to read one row of it. Decoding recomputes everything in the *mask* form: every row runs
//! through every layer, deferred rows are hidden as keys, and their outputs are overwritten by
//! their inputs.

mod choice;

use std::collections::HashMap;

use burn::tensor::backend::Backend as AnyBackend;
use reducers::{
    Action, Attention, Duplication, HeadReduce, Positions, Query, Schedule, Score, ScoreLayer,
    SoftmaxKeys, Stage, Waiting,
};
use reroute::{Decoder, DecoderConfig, RopeScaling, Shortcut, Shortcuts};

use crate::support::{Sample, weights};

use choice::{choose, remembered};

type Row = Vec<f64>;

/// The weights of a decoder, by path, as `[out][in]` or `[1][features]`.
pub struct Reference {
    config: DecoderConfig,
    weights: HashMap<String, Vec<Row>>,
    shortcuts: Shortcuts,
}

/// What rows that wait receive behind a layer.
enum Received {
    Nothing,
    /// All the same.
    Mean(Row),
    /// Each what a map makes of it.
    Mapped(Shortcut),
}

/// What a prefill of one sample comes to.
#[derive(Default)]
pub struct Outcome {
    /// Of the last row.
    pub logits: Row,
    pub decisions: Vec<Decision>,
    /// Rows each layer worked on, ascending.
    pub active: Vec<Vec<usize>>,
    /// Output of every layer, full length; deferred rows as they wait.
    pub hidden_states: Vec<Vec<Row>>,
    /// Positions of all rows in every layer.
    pub positions: Vec<Vec<Vec<i64>>>,
    /// What deferred rows received behind every layer.
    received: Vec<Received>,
}

/// One decision.
pub struct Decision {
    /// Of every visual token that stood for selection.
    pub scores: Row,
    /// What it was ranked by.
    pub ranked: Row,
    /// In visual order, ascending.
    pub selected: Vec<usize>,
    /// By how much the last token in beat the first one out.
    pub margin: f64,
}

impl Reference {
    pub fn of<B: AnyBackend>(decoder: &Decoder<B>) -> Self {
        Self {
            config: decoder.config().clone(),
            weights: weights(decoder),
            shortcuts: decoder.shortcuts().clone(),
        }
    }

    /// Routed prefill.
    pub fn prefill(&self, sample: &Sample, schedule: &Schedule) -> Outcome {
        let mut hidden = to_f64(&sample.embeddings);
        let mut positions = sample.positions.clone();
        let visual = &sample.layout.visual;
        let mut active: Vec<usize> = (0..hidden.len()).collect();
        let mut outcome = Outcome::default();
        // What the layer before worked on.
        let mut before = (hidden.clone(), active.clone());
        // What earlier decisions gave each visual token.
        let mut shares: Vec<Vec<f64>> = vec![Vec::new(); visual.len()];
        // What the layers since then have added to an active visual row, on average.
        let mut ride = vec![0.0; self.config.hidden_size];
        for layer in 0..self.config.num_layers {
            let stage = schedule.stages().iter().position(|s| s.layer == layer);
            if let (Some(stage), false) = (stage, visual.is_empty()) {
                let pool = match schedule.action() {
                    Action::Remove => active,
                    Action::Reroute => (0..hidden.len()).collect(),
                };
                let Stage { score, stride, .. } = schedule.stages()[stage];
                let place = |score_layer| match score_layer {
                    ScoreLayer::This => (layer, &hidden, &pool),
                    ScoreLayer::Previous => (layer - 1, &before.0, &before.1),
                };
                let count = schedule.keep_counts(visual.len())[stage];
                let mut margin = f64::INFINITY;
                let scores = match score {
                    Score::Attention(rule) => {
                        let (layer, hidden, pool) = place(rule.layer);
                        self.scores(&rule, layer, hidden, &positions, pool, sample)
                    }
                    Score::Duplication(rule) => {
                        let (scores, close) = self.least_repeated(
                            &rule,
                            place(rule.layer),
                            &hidden,
                            (&positions, &pool),
                            visual,
                            count,
                        );
                        margin = close;
                        scores
                    }
                    Score::Encoder => {
                        let salience = sample.layout.salience.iter().flatten();
                        let salience = salience.map(|&x| f64::from(x));
                        let scores = visual.iter().copied().zip(salience);
                        scores.filter(|(row, _)| pool.contains(row)).collect()
                    }
                    Score::Random(_) => panic!("chance has no second opinion"),
                };
                let previous = outcome.decisions.last().filter(|_| schedule.monotonic());
                let spread = |token: usize| match stride {
                    Some(n) => sample.layout.cells[token].iter().all(|side| side % n == 0),
                    None => false,
                };
                let ranked = remembered(schedule.memory(), &scores, visual, &mut shares);
                let mut decision = choose([&scores, &ranked], visual, previous, &spread, count);
                decision.margin = decision.margin.min(margin);
                active = sample.text();
                active.extend(gather(visual, &decision.selected));
                active.sort_unstable();
                outcome.decisions.push(decision);
                ride.fill(0.0);
                if schedule.positions() == Positions::Renumber {
                    for (position, &row) in active.iter().enumerate() {
                        positions[row] = vec![position as i64];
                    }
                }
            }
            before = (hidden.clone(), active.clone());
            let of_active = gather(&positions, &active);
            let output = self.layer(layer, &gather(&hidden, &active), &of_active, &|_| true);
            let (on, off): (Vec<usize>, Vec<usize>) =
                visual.iter().copied().partition(|row| active.contains(row));
            for (&row, output) in active.iter().zip(output) {
                if on.contains(&row) {
                    for (ride, (after, before)) in
                        ride.iter_mut().zip(output.iter().zip(&hidden[row]))
                    {
                        *ride += (after - before) / on.len() as f64;
                    }
                }
                hidden[row] = output;
            }
            let next = schedule.decision_at(layer + 1);
            let received = match (schedule.waiting(), next) {
                (Waiting::Untouched, _) | (_, None | Some(0)) => Received::Nothing,
                (Waiting::RideAlong, _) => Received::Mean(ride.clone()),
                (Waiting::Shortcut, Some(next)) => {
                    let layers = schedule.stages()[next - 1].layer..layer + 1;
                    let shortcut = self.shortcuts.iter().find(|one| one.layers == layers);
                    Received::Mapped(shortcut.expect("it was given").clone())
                }
            };
            receive(&mut hidden, &off, &received);
            outcome.received.push(received);
            outcome.active.push(active.clone());
            outcome.positions.push(positions.clone());
            outcome.hidden_states.push(hidden.clone());
            add_deepstack(&mut hidden, sample, layer);
        }
        outcome.logits = self.logits(&hidden[hidden.len() - 1]);
        outcome
    }

    /// Logits behind each of `tokens` after a routed prefill: everything once more, with the
    /// prefill's active rows as masks. A generated token stands where the plain model would have it,
    /// or, where rows were numbered anew, behind the last of them.
    pub fn decode(&self, sample: &Sample, prefilled: &Outcome, tokens: &[u32]) -> Vec<Row> {
        let mut hidden = to_f64(&sample.embeddings);
        let prompt = hidden.len();
        for &token in tokens {
            hidden.push(self.weights["embed_tokens.weight"][token as usize].clone());
        }
        for (layer, active) in prefilled.active.iter().enumerate() {
            let mut positions = prefilled.positions[layer].clone();
            let next = match positions == sample.positions {
                true => sample.layout.next_position,
                false => active.len() as i64,
            };
            let next = (next..).take(tokens.len());
            positions.extend(next.map(|position| vec![position; self.config.rope.axes()]));
            let seen = |row: usize| row >= prompt || active.contains(&row);
            let output = self.layer(layer, &hidden, &positions, &seen);
            for (row, output) in output.into_iter().enumerate().filter(|(row, _)| seen(*row)) {
                hidden[row] = output;
            }
            let off = gather_if(&sample.layout.visual, |row| !active.contains(row));
            receive(&mut hidden, &off, &prefilled.received[layer]);
            add_deepstack(&mut hidden, sample, layer);
        }
        let generated = hidden[prompt..].iter();
        generated.map(|row| self.logits(row)).collect()
    }

    /// What `rule` reads off the attention matrix of the pool.
    fn scores(
        &self,
        rule: &Attention,
        layer: usize,
        hidden: &[Row],
        positions: &[Vec<i64>],
        pool: &[usize],
        sample: &Sample,
    ) -> HashMap<usize, f64> {
        let mut positions = gather(positions, pool);
        if !rule.rope {
            // A rotation by nothing.
            positions.iter_mut().flatten().for_each(|axis| *axis = 0);
        }
        let normed = self.norms(layer, &gather(hidden, pool));
        let counts = |at: usize| match rule.keys {
            SoftmaxKeys::All => true,
            SoftmaxKeys::Candidates => sample.layout.visual.contains(&pool[at]),
        };
        let heads = self.attention_matrix(layer, &normed, &positions, &counts);
        let last = pool.len();
        let asking: Vec<usize> = match rule.query {
            Query::Last => vec![last - 1],
            Query::LastMean(count) => (last.saturating_sub(count)..last).collect(),
            Query::Raters => {
                let raters = raters(sample);
                (0..last).filter(|&at| raters.contains(&pool[at])).collect()
            }
        };
        let of_head = |head: &Vec<Row>, at: usize| {
            let rows = asking.iter().map(|&row| head[row][at]);
            rows.sum::<f64>() / asking.len() as f64
        };
        let score = |(at, &row): (usize, &usize)| {
            let of_heads = heads.iter().map(|head| of_head(head, at));
            let score = match rule.heads {
                HeadReduce::Mean => of_heads.sum::<f64>() / heads.len() as f64,
                HeadReduce::Max => of_heads.fold(0.0, f64::max),
                HeadReduce::Only(only) => {
                    let of_heads: Vec<f64> = of_heads.collect();
                    let only: Vec<f64> = only.iter().map(|head| of_heads[head]).collect();
                    only.iter().sum::<f64>() / only.len() as f64
                }
            };
            (row, score)
        };
        pool.iter().enumerate().map(score).collect()
    }

    /// Scores by DART's quotas, and how close the closest of its choices was.
    fn least_repeated(
        &self,
        rule: &Duplication,
        (layer, key_rows, key_pool): (usize, &Vec<Row>, &Vec<usize>),
        hidden: &[Row],
        (positions, pool): (&[Vec<i64>], &[usize]),
        visual: &[usize],
        count: usize,
    ) -> (HashMap<usize, f64>, f64) {
        let normed = self.norms(layer, &gather(key_rows, key_pool));
        let keys = self.rotated("k", layer, &normed, &gather(positions, key_pool));
        let long: HashMap<usize, f64> = key_pool
            .iter()
            .zip(&keys)
            .map(|(&row, heads)| (row, heads.iter().flatten().map(|x| x.abs()).sum()))
            .collect();
        let mut margin = f64::INFINITY;
        let mut best = |of: &dyn Fn(usize) -> f64, rows: &[usize], count: usize| -> Vec<usize> {
            let mut order = rows.to_vec();
            order.sort_by(|&a, &b| of(b).total_cmp(&of(a)).then(a.cmp(&b)));
            let gaps = order.windows(2).map(|pair| of(pair[0]) - of(pair[1]));
            margin = gaps.fold(margin, f64::min);
            order.truncate(count);
            order
        };
        let candidates: Vec<usize> = gather_if(visual, |row| pool.contains(row));
        let end = candidates.last().map_or(0, |last| last + 1);
        let text: Vec<usize> = gather_if(pool, |&row| row >= end);
        let count = count.min(candidates.len());
        let mut taken = best(
            &|row| long[&row],
            &candidates,
            rule.visual_pivots.min(count),
        );
        let of_text = best(&|row| long[&row], &text, rule.text_pivots);
        let pivots = [taken.clone(), of_text].concat();
        let output = |row: usize| self.norm("norm", &hidden[row]);
        let cosine = |a: usize, b: usize| {
            let (a, b) = (output(a), output(b));
            dot(&a, &b) / (dot(&a, &a).sqrt() * dot(&b, &b).sqrt())
        };
        let rest = count - taken.len();
        for (index, &pivot) in pivots.iter().enumerate() {
            let quota = rest / pivots.len() + usize::from(index < rest % pivots.len());
            let left: Vec<usize> = gather_if(&candidates, |row| !taken.contains(row));
            let mut unlike = best(&|row| -cosine(pivot, row), &left, quota);
            unlike.sort_unstable();
            taken.extend(unlike);
        }
        let score = |row: &usize| {
            let order = taken.iter().position(|other| other == row);
            let score = order.map_or(0.0, |order| 1.0 - order as f64 / (2 * taken.len()) as f64);
            (*row, score)
        };
        (candidates.iter().map(score).collect(), margin)
    }

    /// One decoder layer over all `rows`, of which the `seen` ones are keys.
    fn layer(
        &self,
        layer: usize,
        rows: &[Row],
        positions: &[Vec<i64>],
        seen: &dyn Fn(usize) -> bool,
    ) -> Vec<Row> {
        let name = |part: &str| format!("layers.{layer}.{part}");
        let normed = self.norms(layer, rows);
        let heads = self.attention_matrix(layer, &normed, positions, seen);
        let value = |row: &Row| self.linear(&name("self_attn.v_proj"), row);
        let values: Vec<Row> = normed.iter().map(value).collect();
        let (head_dim, group) = (self.config.head_dim, self.group());
        let output = |(at, row): (usize, &Row)| {
            let mut context = Row::new();
            for (head, weights) in heads.iter().enumerate() {
                for channel in 0..head_dim {
                    let channel = head / group * head_dim + channel;
                    let weighed = |(key, weight): (usize, &f64)| weight * values[key][channel];
                    context.push(weights[at].iter().enumerate().map(weighed).sum());
                }
            }
            let row = add(row, &self.linear(&name("self_attn.o_proj"), &context));
            let normed = self.norm(&name("post_attention_layernorm"), &row);
            let gate = self.linear(&name("mlp.gate_proj"), &normed);
            let up = self.linear(&name("mlp.up_proj"), &normed);
            let silu = |x: f64| x / (1.0 + (-x).exp());
            let inner: Row = gate.iter().zip(up).map(|(&g, up)| silu(g) * up).collect();
            add(&row, &self.linear(&name("mlp.down_proj"), &inner))
        };
        rows.iter().enumerate().map(output).collect()
    }

    /// `[heads][queries][keys]`, causal, keys that are not `seen` hidden.
    fn attention_matrix(
        &self,
        layer: usize,
        normed: &[Row],
        positions: &[Vec<i64>],
        seen: &dyn Fn(usize) -> bool,
    ) -> Vec<Vec<Row>> {
        let queries = self.rotated("q", layer, normed, positions);
        let keys = self.rotated("k", layer, normed, positions);
        let scale = 1.0 / (self.config.head_dim as f64).sqrt();
        let row = |head: usize, query: usize| {
            let logit = |key: usize| match key <= query && seen(key) {
                true => dot(&queries[query][head], &keys[key][head / self.group()]) * scale,
                false => f64::NEG_INFINITY,
            };
            softmax((0..keys.len()).map(logit).collect())
        };
        let matrix = |head: usize| (0..queries.len()).map(|query| row(head, query)).collect();
        (0..self.config.num_attention_heads).map(matrix).collect()
    }

    /// Queries or keys, `[rows][heads][head_dim]`.
    fn rotated(
        &self,
        what: &str,
        layer: usize,
        normed: &[Row],
        positions: &[Vec<i64>],
    ) -> Vec<Vec<Row>> {
        let name = |part: &str| format!("layers.{layer}.self_attn.{what}_{part}");
        let one = |(row, position): (&Row, &Vec<i64>)| {
            let flat = self.linear(&name("proj"), row);
            let rotate = |head: &[f64]| match self.config.qk_norm {
                true => self.rotate(&self.norm(&name("norm"), head), position),
                false => self.rotate(head, position),
            };
            flat.chunks(self.config.head_dim).map(rotate).collect()
        };
        normed.iter().zip(positions).map(one).collect()
    }

    fn norms(&self, layer: usize, rows: &[Row]) -> Vec<Row> {
        let name = format!("layers.{layer}.input_layernorm");
        rows.iter().map(|row| self.norm(&name, row)).collect()
    }

    /// Query heads per key/value head.
    fn group(&self) -> usize {
        self.config.num_attention_heads / self.config.num_key_value_heads
    }

    fn rotate(&self, head: &[f64], position: &[i64]) -> Row {
        let half = head.len() / 2;
        let mut turned = head.to_vec();
        for (i, &axis) in self.config.rope.axis_of_frequency.iter().enumerate() {
            let frequency = self.config.rope.theta.powf(-(i as f64) / half as f64);
            let frequency = scaled(frequency, &self.config.rope.scaling);
            let (sin, cos) = (position[axis] as f64 * frequency).sin_cos();
            turned[i] = head[i] * cos - head[i + half] * sin;
            turned[i + half] = head[i + half] * cos + head[i] * sin;
        }
        turned
    }

    fn norm(&self, name: &str, row: &[f64]) -> Row {
        let mean_square = dot(row, row) / row.len() as f64;
        let scale = 1.0 / (mean_square + self.config.rms_norm_eps).sqrt();
        let weight = &self.weights[&format!("{name}.weight")][0];
        row.iter().zip(weight).map(|(x, w)| x * scale * w).collect()
    }

    fn linear(&self, name: &str, row: &[f64]) -> Row {
        let product = self.weights[&format!("{name}.weight")]
            .iter()
            .map(|w| dot(w, row));
        match self.weights.get(&format!("{name}.bias")) {
            Some(bias) => product.zip(&bias[0]).map(|(y, b)| y + b).collect(),
            None => product.collect(),
        }
    }

    fn logits(&self, row: &[f64]) -> Row {
        let normed = self.norm("norm", row);
        match self.config.tie_word_embeddings {
            true => self.linear("embed_tokens", &normed),
            false => self.linear("lm_head", &normed),
        }
    }
}

/// Frequencies for longer contexts; Llama 3's in terms of turns within the context of the training.
fn scaled(frequency: f64, scaling: &RopeScaling) -> f64 {
    match *scaling {
        RopeScaling::None => frequency,
        RopeScaling::Linear { factor } => frequency / factor,
        RopeScaling::Llama3 {
            factor,
            low_freq_factor: low,
            high_freq_factor: high,
            original_max_position_embeddings: trained,
        } => {
            let turns = trained as f64 * frequency / std::f64::consts::TAU;
            let kept = ((turns - low) / (high - low)).clamp(0.0, 1.0);
            frequency * (kept + (1.0 - kept) / factor)
        }
        ref other => panic!("{other:?} is not restated"),
    }
}

/// What rows that wait receive at the end of a stage.
fn receive(hidden: &mut [Row], off: &[usize], received: &Received) {
    for &row in off {
        let update = match received {
            Received::Nothing => continue,
            Received::Mean(mean) => mean.clone(),
            Received::Mapped(Shortcut {
                down, up, shift, ..
            }) => {
                let numbers =
                    |of: &[f32]| -> Row { of.iter().map(|&number| f64::from(number)).collect() };
                let inner = down.chunks(shift.len());
                let inner: Row = inner
                    .map(|row_of| dot(&numbers(row_of), &hidden[row]))
                    .collect();
                let outer = up
                    .chunks(inner.len())
                    .map(|row_of| dot(&numbers(row_of), &inner));
                add(&outer.collect::<Row>(), &numbers(shift))
            }
        };
        hidden[row] = add(&hidden[row], &update);
    }
}

/// Every visual row receives its DeepStack features, also while it waits.
fn add_deepstack(hidden: &mut [Row], sample: &Sample, layer: usize) {
    let features = sample.deepstack.get(layer).into_iter().flatten();
    for (&row, features) in sample.layout.visual.iter().zip(features) {
        hidden[row] = add(&hidden[row], &to_f64(std::slice::from_ref(features))[0]);
    }
}

/// SparseVLM's raters, as rows of the prompt.
fn raters(sample: &Sample) -> Vec<usize> {
    let embeddings = to_f64(&sample.embeddings);
    let first = sample.layout.visual.last().map_or(0, |last| last + 1);
    let text: Vec<usize> = (first..embeddings.len()).collect();
    let mut shares = vec![0.0; text.len()];
    for &visual in &sample.layout.visual {
        let product = |&row: &usize| dot(&embeddings[visual], &embeddings[row]);
        let row = softmax(text.iter().map(product).collect());
        shares
            .iter_mut()
            .zip(row)
            .for_each(|(share, x)| *share += x);
    }
    let equal = sample.layout.visual.len() as f64 / text.len() as f64;
    let above = text
        .iter()
        .zip(&shares)
        .filter(|(_, share)| **share > equal * (1.0 + 1e-9));
    let above: Vec<usize> = above.map(|(&row, _)| row).collect();
    if above.is_empty() { text } else { above }
}

fn gather_if<T: Clone>(of: &[T], keep: impl Fn(&T) -> bool) -> Vec<T> {
    of.iter().filter(|x| keep(x)).cloned().collect()
}

fn gather<T: Clone>(of: &[T], at: &[usize]) -> Vec<T> {
    at.iter().map(|&i| of[i].clone()).collect()
}

/// Probabilities; all 0 if nothing is visible.
fn softmax(logits: Row) -> Row {
    let highest = logits.iter().copied().fold(f64::MIN, f64::max);
    let exponentials: Row = logits.iter().map(|logit| (logit - highest).exp()).collect();
    let total = exponentials.iter().sum::<f64>().max(f64::MIN_POSITIVE);
    exponentials.iter().map(|e| e / total).collect()
}

fn dot(a: &[f64], b: &[f64]) -> f64 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

fn add(a: &[f64], b: &[f64]) -> Row {
    a.iter().zip(b).map(|(a, b)| a + b).collect()
}

fn to_f64(rows: &[Vec<f32>]) -> Vec<Row> {
    rows.iter()
        .map(|row| row.iter().map(|&x| f64::from(x)).collect())
        .collect()
}
