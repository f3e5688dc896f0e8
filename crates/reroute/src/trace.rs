/// What routing did during one prefill.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct RoutingTrace {
    /// Decisions in order of layer, then sample. Samples without visual tokens have none.
    pub decisions: Vec<Decision>,
    /// Rows that each layer made keys and values of: `[layers][samples]`.
    pub rows: Vec<Vec<usize>>,
    /// Those of them that went past keys and values: all, but in the last layer the last row of each
    /// sample, whose logits are asked for; `[layers][samples]`.
    pub queries: Vec<Vec<usize>>,
}

/// One sample's selection at one decision layer.
#[derive(Debug, Clone, PartialEq)]
pub struct Decision {
    /// The layer whose input was scored.
    pub layer: usize,
    /// Index of the sample in the batch.
    pub sample: usize,
    /// The visual tokens that were ranked, as indices in visual order, ascending: all of them under
    /// *reroute*, those that the previous decision kept under *remove*.
    pub candidates: Vec<usize>,
    /// Score of each candidate (mean attention of the last row, a probability).
    pub scores: Vec<f32>,
    /// What each was ranked by, if the schedule remembers earlier scores
    /// ([`ScoreMemory`](reducers::ScoreMemory)).
    pub remembered: Option<Vec<f32>>,
    /// The selected tokens, as indices in visual order, ascending.
    pub selected: Vec<usize>,
    /// Those of the selected that the previous decision had deferred.
    pub returned: Vec<usize>,
}

impl RoutingTrace {
    /// The decisions of one sample, in order of layer.
    pub fn of_sample(&self, sample: usize) -> impl Iterator<Item = &Decision> {
        self.decisions.iter().filter(move |d| d.sample == sample)
    }
}
