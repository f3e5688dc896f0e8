//! Everything that can be wrong with a schedule, a preset name, a budget or a score.

/// What went wrong, and what to do about it. Stages are counted from 0, layers too.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ReducerError {
    /// The text is not JSON, or not the JSON of a schedule.
    #[error(
        "this is not the JSON of a schedule; write \
         {{\"action\": \"remove\" or \"reroute\", \"monotonic\": false, \
         \"stages\": [{{\"layer\": 2, \"keep_ratio\": 0.45}}]}}"
    )]
    Json {
        /// Where and why the parser stopped.
        source: serde_json::Error,
    },

    /// A stage says both how large a share and how many tokens to keep, or neither.
    #[error(
        "stage {stage}: give exactly one of \"keep_ratio\" (a share, such as 0.45) \
         and \"keep_count\" (tokens, such as 64)"
    )]
    KeepChoice {
        /// The stage.
        stage: usize,
    },

    /// A keep ratio is outside (0, 1] or not a number.
    #[error(
        "stage {stage}: keep ratio {ratio} is not a share; \
         use a number above 0 and at most 1 (1 keeps every visual token)"
    )]
    KeepRatio {
        /// The stage.
        stage: usize,
        /// The offending ratio.
        ratio: f64,
    },

    /// A keep count is zero, negative, fractional or absurdly large.
    #[error(
        "stage {stage}: keep count {count} is not a number of tokens; \
         use a whole number of at least 1"
    )]
    KeepCount {
        /// The stage.
        stage: usize,
        /// The offending count, as written.
        count: String,
    },

    /// A layer number is negative, fractional or absurdly large.
    #[error(
        "stage {stage}: layer {layer} is not a layer number; \
         use a whole number, counting the decoder layers from 0"
    )]
    Layer {
        /// The stage.
        stage: usize,
        /// The offending layer, as written.
        layer: String,
    },

    /// Two stages decide at the same layer, or out of order.
    #[error(
        "stage {stage}: layer {layer} does not come after layer {previous} of the stage before it; \
         list the stages by strictly increasing layer"
    )]
    LayerOrder {
        /// The stage.
        stage: usize,
        /// Its layer.
        layer: usize,
        /// The layer of the stage before it.
        previous: usize,
    },

    /// A stage decides at a layer the model does not have.
    #[error(
        "stage {stage}: layer {layer} is beyond this model, \
         whose {num_layers} decoder layers are counted from 0; \
         use a smaller layer number or drop the stage"
    )]
    LayerDepth {
        /// The stage.
        stage: usize,
        /// Its layer.
        layer: usize,
        /// Decoder layers of the model.
        num_layers: usize,
    },

    /// A score is not a number, so there is no order to select by.
    #[error(
        "the score of visual token {index} is NaN; \
         look for an overflow in the layers before (f16 weights? try f32)"
    )]
    NanScore {
        /// Index of the first such token, in visual order.
        index: usize,
    },

    /// A score asks a head that the layer does not have.
    #[error(
        "head {head} is beyond this model, whose {num_heads} query heads are counted from 0; \
         leave it out of \"only\""
    )]
    Head {
        /// The head.
        head: usize,
        /// Query heads of the layer.
        num_heads: usize,
    },

    /// The target of the budget solver is not a share.
    #[error(
        "the target {share} is not a share of the visual tokens; use a number above 0 and at most 1"
    )]
    TargetShare {
        /// The offending target.
        share: f64,
    },

    /// The budget solver was asked to solve for no decision at all.
    #[error("a budget needs at least one decision layer; give one, or use the dense schedule")]
    NoDecisionLayer,

    /// No keep ratios in (0, 1] reach the target.
    #[error(
        "an average of {target:.4} of the visual tokens per layer is out of reach \
         with decisions at layers {layers:?} of {num_layers}: this profile reaches averages \
         above {smallest:.4} and up to {largest:.4}; \
         choose a target in between, or move the first decision"
    )]
    Infeasible {
        /// The target average, as a share of the visual tokens.
        target: f64,
        /// The decision layers.
        layers: Vec<usize>,
        /// Decoder layers of the model.
        num_layers: usize,
        /// The bound from below (not reached): the dense layers alone.
        smallest: f64,
        /// The largest average this profile reaches.
        largest: f64,
    },

    /// No preset has this name.
    #[error(
        "there is no preset {name:?}; did you mean {nearest:?}? A preset is a method, most of \
         them with a budget of visual tokens (reroute-pdrop@192); the methods are: {methods}"
    )]
    UnknownPreset {
        /// The name asked for.
        name: String,
        /// The preset whose name is spelt most alike.
        nearest: String,
        /// All methods, separated by commas.
        methods: String,
    },

    /// A preset's decision layers, rescaled to a shallow model, fall together or off its end.
    #[error(
        "preset {name:?} has no place for its decisions in {num_layers} decoder layers \
         (they would be at {layers:?}); write a schedule file with layers of your own"
    )]
    TooShallow {
        /// Name of the preset.
        name: String,
        /// Decoder layers of the model.
        num_layers: usize,
        /// Where the decisions would have been.
        layers: Vec<usize>,
    },

    /// A method asked for something that its needs do not name.
    #[error("the method reads {tap:?}, which its needs do not name; name it there")]
    NotSeen {
        /// What it asked for.
        tap: crate::encoder::Tap,
    },

    /// A method cannot work with this model.
    #[error("{method} does not work here: {reason}")]
    Unsupported {
        /// Name of the method.
        method: &'static str,
        /// Why not, and what to use instead.
        reason: String,
    },

    /// What a method is shown is not that of a picture.
    #[error("a picture cannot be reduced: {reason}; every tap has one column a token of the grid")]
    Picture {
        /// What is wrong with it.
        reason: String,
    },

    /// What a method returned is no reduction.
    #[error("the method's result cannot be used: {reason}")]
    Reduction {
        /// What is wrong with it.
        reason: String,
    },

    /// A schedule asks for things that exclude each other.
    #[error("stage {stage}: {reason}")]
    Combination {
        /// The stage.
        stage: usize,
        /// What excludes what, and what to use instead.
        reason: String,
    },

    /// A scorer asks for a row that is not at the decision.
    #[error("there is no row {row} at this decision: it has {rows}, counted from 0")]
    Row {
        /// The row.
        row: usize,
        /// Rows of the decision.
        rows: usize,
    },

    /// A decision ranks by the reduction before the decoder, and there was none.
    #[error(
        "a decision ranks by what the encoder-side reduction kept, but the prompt was not reduced \
         with the rest deferred; add an encoder method with \"rest\": \"defer\", or score by attention"
    )]
    NoSalience,

    /// How many tokens a reduction before the decoder keeps is not said, or not possible.
    #[error(
        "the encoder method needs exactly one of keep_ratio, above 0 and at most 1, \
         and keep_count, at least 1"
    )]
    EncoderKeep,

    /// Numbers could not be read back from the device.
    #[error("a rule's numbers could not be read back from the device: {reason}")]
    Readback {
        /// The backend's explanation.
        reason: String,
    },
}
