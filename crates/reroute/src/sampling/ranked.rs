use std::cmp::Ordering;

/// Tokens by their logits, the largest first and the lower id first among equals. Sorted only as far
/// as somebody looks: most draws fall among the first few.
pub(super) struct Ranked<'a> {
    logits: &'a [f32],
    /// Those that are kept.
    pub(super) tokens: Vec<u32>,
    /// How many of the tokens are in their places.
    sorted: usize,
}

/// Tokens that are sorted first; then as many again as are sorted already, three times over.
const FIRST_SORTED: usize = 64;

impl<'a> Ranked<'a> {
    pub(super) fn new(logits: &'a [f32]) -> Self {
        Self {
            logits,
            tokens: (0..logits.len() as u32).collect(),
            sorted: 0,
        }
    }

    fn by_logit(&self) -> impl Fn(&u32, &u32) -> Ordering + use<'a> {
        let logits = self.logits;
        move |a, b| {
            logits[*b as usize]
                .total_cmp(&logits[*a as usize])
                .then(a.cmp(b))
        }
    }

    /// Drops all but the first `count`.
    pub(super) fn keep(&mut self, count: usize) {
        let by_logit = self.by_logit();
        if self.sorted < count && count < self.tokens.len() {
            self.tokens[self.sorted..].select_nth_unstable_by(count - self.sorted, by_logit);
        }
        self.tokens.truncate(count);
        self.sorted = self.sorted.min(count);
    }

    /// The token of a rank, counted from 0.
    pub(super) fn get(&mut self, rank: usize) -> Option<u32> {
        while rank >= self.sorted && self.sorted < self.tokens.len() {
            let by_logit = self.by_logit();
            let more = FIRST_SORTED.max(3 * self.sorted);
            let rest = &mut self.tokens[self.sorted..];
            let first = more.min(rest.len());
            if first < rest.len() {
                rest.select_nth_unstable_by(first, &by_logit);
            }
            rest[..first].sort_unstable_by(&by_logit);
            self.sorted += first;
        }
        self.tokens.get(rank).copied()
    }
}
