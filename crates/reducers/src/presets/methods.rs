//! The methods. Nothing here decides anything: this is the table that `reroute presets` and the
//! README print.

use std::sync::LazyLock;

use crate::encoder::{BuiltIn, EncoderMethod, EncoderShape, InPresets, Nuwa, VScan};
use crate::{
    About, Action, Attention, Duplication, HeadReduce, Keep, Positions, Profile, Query, Random,
    Score, ScoreDtype, ScoreLayer, ScoreMemory, SoftmaxKeys,
};

use super::Method;
use super::recipe::{DecoderRecipe, ENTERING, LateRecipe, NuwaForm, Recipe};

/// Reroute's way in every respect that a method does not name.
const DECODER: DecoderRecipe = DecoderRecipe {
    action: Action::Remove,
    monotonic: false,
    memory: ScoreMemory::Off,
    positions: Positions::Gap,
    layers: &[],
    keep: Keep::Ratio,
    score: Score::Attention(ATTENTION),
    stride: None,
    profile: Profile::Uniform,
    released: &[],
    exact: &[192, 128, 64],
};

const ATTENTION: Attention = Attention {
    layer: ScoreLayer::This,
    query: Query::Last,
    heads: HeadReduce::Mean,
    dtype: ScoreDtype::F32,
    rope: true,
    keys: SoftmaxKeys::All,
};

/// Reroute's pyramid, as released.
const REROUTE_PDROP: DecoderRecipe = DecoderRecipe {
    action: Action::Reroute,
    layers: &[2, 7, 15, 23],
    profile: Profile::Pyramid,
    released: &[
        (192, &[0.4502, 0.4502, 0.2251, 0.1126]),
        (128, &[0.2655, 0.2655, 0.1328, 0.0664]),
        (64, &[0.1392, 0.1392, 0.0696, 0.0348]),
    ],
    ..DECODER
};

/// PyramidDrop's keep ratios as released with Reroute.
const PDROP: &[(usize, &[f64])] = &[
    (192, &[0.5965, 0.3558, 0.2123, 0.1266]),
    (128, &[0.4570, 0.2088, 0.0954, 0.0436]),
    (64, &[0.2789, 0.0937, 0.0315, 0.0106]),
];

/// SparseVLM's counts (version 1.5) as shares of 576.
const SPARSE_VLM: &[(usize, &[f64])] = &[
    (192, &[300.0 / 576.0, 200.0 / 576.0, 110.0 / 576.0]),
    (128, &[303.0 / 576.0, 110.0 / 576.0, 36.0 / 576.0]),
    (64, &[66.0 / 576.0, 30.0 / 576.0, 17.0 / 576.0]),
];

const RATERS: Score = Score::Attention(Attention {
    layer: ScoreLayer::Previous,
    query: Query::Raters,
    dtype: ScoreDtype::Model,
    ..ATTENTION
});

const RATERS_HERE: Score = Score::Attention(Attention {
    query: Query::Raters,
    ..ATTENTION
});

const WITHOUT_POSITIONS: Score = Score::Attention(Attention {
    layer: ScoreLayer::Previous,
    dtype: ScoreDtype::Model,
    rope: false,
    keys: SoftmaxKeys::Candidates,
    ..ATTENTION
});

const WITHOUT_POSITIONS_HERE: Score = Score::Attention(Attention {
    rope: false,
    keys: SoftmaxKeys::Candidates,
    ..ATTENTION
});

const DART: Score = Score::Duplication(Duplication {
    layer: ScoreLayer::Previous,
    visual_pivots: 4,
    text_pivots: 4,
});

const DART_HERE: Score = Score::Duplication(Duplication {
    layer: ScoreLayer::This,
    visual_pivots: 4,
    text_pivots: 4,
});

/// What VScan's stage 2 ranks by: behind Qwen the release leaves the positions out.
fn vscan_score(encoder: &EncoderShape) -> Score {
    Score::Attention(Attention {
        dtype: ScoreDtype::Model,
        rope: encoder.settings(true, false),
        ..ATTENTION
    })
}

/// All methods, in the order of tables.
pub(super) static METHODS: LazyLock<Vec<Method>> = LazyLock::new(|| {
    let of_encoder = || EncoderMethod::IN_PRESETS.iter().flatten();
    let removing = REMOVING.iter().cloned().chain(of_encoder().map(encoder));
    let rerouting = REROUTING.iter().cloned().chain(of_encoder().map(routed));
    removing.chain(rerouting).collect()
});

/// Nothing dismissed comes back; beside them the methods that `encoder` makes.
const REMOVING: &[Method] = &[
    Method {
        name: "dense",
        about: About {
            description: "the plain model: every layer works on every token",
            source: "no reduction",
            ..About::NOTHING
        },
        recipe: Recipe::Dense,
    },
    Method {
        name: "fastv",
        about: About {
            description: "one early decision, the rest is removed",
            source: "FastV, arXiv 2403.06764; ratios: Reroute, arXiv 2606.12412",
            exact: "as in Reroute's release: the decision layer's own attention, f32, truncated counts",
            ..About::NOTHING
        },
        recipe: Recipe::Decoder(DecoderRecipe {
            layers: &[3],
            released: &[(192, &[0.2644]), (128, &[0.1418]), (64, &[0.01916])],
            ..DECODER
        }),
    },
    Method {
        name: "fastv-original",
        about: About {
            description: "FastV as first released: K = 2, R = 50 %, the attention of layer K - 1",
            source: "FastV, arXiv 2403.06764, github.com/pkunlp-icler/FastV (Hugging Face variant)",
            exact: "executed attention of the layer before, the model's type, half-even counts, \
                    original positions, no decision after the prefill",
            interpretation: "not copied: every sample of a batch is ranked by itself, not by the \
                             first; pictures are found by their ids, not at fixed rows",
            ..About::NOTHING
        },
        recipe: Recipe::Decoder(DecoderRecipe {
            layers: &[2],
            keep: Keep::Rounded,
            score: Score::Attention(Attention {
                layer: ScoreLayer::Previous,
                dtype: ScoreDtype::Model,
                ..ATTENTION
            }),
            released: &[(306, &[0.5])],
            ..DECODER
        }),
    },
    Method {
        name: "pdrop",
        about: About {
            description: "four decisions, each removes more of those kept",
            source: "PyramidDrop, arXiv 2410.17247; layers and ratios: Reroute, arXiv 2606.12412",
            exact: "as in Reroute's release: f32, original positions, at least one token",
            ..About::NOTHING
        },
        recipe: Recipe::Decoder(DecoderRecipe {
            monotonic: true,
            layers: &[2, 7, 15, 23],
            profile: Profile::Geometric,
            released: PDROP,
            ..DECODER
        }),
    },
    Method {
        name: "pdrop-original",
        about: About {
            description: "PyramidDrop as first released: layers 8, 16, 24, half each time",
            source: "PyramidDrop, arXiv 2410.17247, github.com/Cooperx521/PyramidDrop",
            exact: "layers, ratios, truncation (possibly to none), the model's type, positions \
                    numbered anew from each decision on, generated tokens behind them",
            interpretation: "not copied: right padding, truncation to the tokenizer's length, the \
                             first picture of a sample only",
            ..About::NOTHING
        },
        recipe: Recipe::Decoder(DecoderRecipe {
            positions: Positions::Renumber,
            layers: &[8, 16, 24],
            keep: Keep::Truncated,
            score: Score::Attention(Attention {
                dtype: ScoreDtype::Model,
                ..ATTENTION
            }),
            profile: Profile::Geometric,
            released: &[(270, &[0.5, 0.25, 0.125])],
            exact: &[],
            ..DECODER
        }),
    },
    Method {
        name: "random",
        about: About {
            description: "one early decision by chance, the rest is removed: a baseline",
            source: "baseline",
            ..About::NOTHING
        },
        recipe: Recipe::Decoder(DecoderRecipe {
            layers: &[3],
            score: Score::Random(Random { seed: 0 }),
            ..DECODER
        }),
    },
    Method {
        name: "nuwa",
        about: Nuwa::ABOUT,
        recipe: Recipe::Nuwa(NuwaForm::Released),
    },
    Method {
        name: "vscan",
        about: VScan::ABOUT,
        recipe: Recipe::Late(LateRecipe {
            method: || EncoderMethod::VScan(VScan::default()),
            entering: 1.5,
            action: Action::Remove,
            score: vscan_score,
        }),
    },
    Method {
        name: "sparsevlm",
        about: About {
            description: "three decisions by the attention of text that is alike to the picture",
            source: "SparseVLM, arXiv 2410.04417, github.com/Gumpest/SparseVLMs",
            exact: "raters, executed attention of layers 2, 6 and 15, counts of version 1.5",
            interpretation: "nothing is recycled and positions keep their gaps, as in version 2; \
                             version 2's correction of probabilities is left out; the label is the \
                             release's, which counts later layers than it reduces",
            ..About::NOTHING
        },
        recipe: Recipe::Decoder(DecoderRecipe {
            layers: &[3, 7, 16],
            keep: Keep::Rounded,
            score: RATERS,
            profile: Profile::Geometric,
            released: SPARSE_VLM,
            ..DECODER
        }),
    },
    Method {
        name: "feather",
        about: About {
            description: "two decisions by attention without positions, evenly spread tokens first",
            source: "FEATHER, arXiv 2412.13180, github.com/markendo/FEATHER (Prismatic models only)",
            exact: "layers 8 and 16, the layer before, last row, softmax over visual rows, every \
                    third row and column at the first decision",
            interpretation: "evenly spread tokens count towards the budget, which the release \
                             exceeds by as many as attention did not pick; the layer before is read \
                             as executed, rotated back; models it was not released for",
            ..About::NOTHING
        },
        recipe: Recipe::Decoder(DecoderRecipe {
            layers: &[8, 16],
            score: WITHOUT_POSITIONS,
            stride: Some(3),
            profile: Profile::Geometric,
            // The layers before the first decision exceed the smaller budgets.
            exact: &[192],
            ..DECODER
        }),
    },
    Method {
        name: "dart",
        about: About {
            description: "one early decision: tokens that repeat a few pivots least",
            source: "DART, arXiv 2502.11494 (read: a copy of the authors' LLaVA file, the llmc port)",
            exact: "layer 2, four visual and four text pivots by key length, cosine under the last \
                    norm, equal quotas; 196, 132 and 68 tokens as the released labels keep",
            interpretation: "pivots take turns by key length, visual ones first; the release's order \
                             is that of a Python set; whose models beyond LLaVA is ours",
            ..About::NOTHING
        },
        recipe: Recipe::Decoder(DecoderRecipe {
            layers: &[2],
            keep: Keep::Rounded,
            score: DART,
            released: &[
                (192, &[196.0 / 576.0]),
                (128, &[132.0 / 576.0]),
                (64, &[68.0 / 576.0]),
            ],
            ..DECODER
        }),
    },
];

/// What is dismissed may come back; beside them the methods that `routed` makes.
const REROUTING: &[Method] = &[
    Method {
        name: "reroute-fastv",
        about: About {
            description: "four decisions at FastV's ratio, the rest bypasses and may come back",
            source: "Reroute, arXiv 2606.12412",
            exact: "as released; its cost per layer is that of fastv",
            ..About::NOTHING
        },
        recipe: Recipe::Decoder(DecoderRecipe {
            action: Action::Reroute,
            layers: &[3, 7, 15, 23],
            released: &[
                (192, &[0.2644; 4]),
                (128, &[0.1418; 4]),
                (64, &[0.01916; 4]),
            ],
            ..DECODER
        }),
    },
    Method {
        name: "reroute-pdrop",
        about: About {
            description: "four decisions in a pyramid, the rest bypasses and may come back",
            source: "Reroute, arXiv 2606.12412",
            exact: "as released",
            ..About::NOTHING
        },
        recipe: Recipe::Decoder(REROUTE_PDROP),
    },
    Method {
        name: "reroute-pdrop-memory",
        about: About {
            description: "the same decisions, each ranking by the sum of what tokens have scored so far",
            source: "ours, on the schedule of reroute-pdrop (docs/routing.md, memory)",
            interpretation: "published decisions forget what earlier ones scored",
            ..About::NOTHING
        },
        recipe: Recipe::Decoder(DecoderRecipe {
            memory: ScoreMemory::Sum,
            ..REROUTE_PDROP
        }),
    },
    Method {
        name: "reroute-pdrop-twin",
        about: About {
            description: "PDrop's own layers and counts, rerouted: equal cost in every layer",
            source: "Reroute, arXiv 2606.12412, on the schedule of pdrop",
            interpretation: "the release reroutes a pyramid of its own (reroute-pdrop)",
            ..About::NOTHING
        },
        recipe: Recipe::Decoder(DecoderRecipe {
            action: Action::Reroute,
            layers: &[2, 7, 15, 23],
            profile: Profile::Geometric,
            released: PDROP,
            ..DECODER
        }),
    },
    Method {
        name: "reroute-random",
        about: About {
            description: "four decisions by chance, each drawn anew: a baseline",
            source: "baseline",
            ..About::NOTHING
        },
        recipe: Recipe::Decoder(DecoderRecipe {
            action: Action::Reroute,
            layers: &[3, 7, 15, 23],
            score: Score::Random(Random { seed: 0 }),
            ..DECODER
        }),
    },
    Method {
        name: "reroute-nuwa",
        about: About {
            description: "Nüwa's stage 1, then four decisions that keep as many as its stage 2",
            source: "Reroute, arXiv 2606.12412, names the combination; its release has none",
            interpretation: "decisions at layers 16, 20, 24, 28 of 32 (Qwen: 15, 18, 21, 24 of 28), \
                             ranked as Reroute ranks: deferred tokens have no executed attention",
            towers: Nuwa::ABOUT.towers,
            ..About::NOTHING
        },
        recipe: Recipe::Nuwa(NuwaForm::Reroute),
    },
    Method {
        name: "reroute-nuwa-pyramid",
        about: About {
            description: "Nüwa's stage 1, then four early decisions in a pyramid of equal average",
            source: "Reroute, arXiv 2606.12412, names the combination; its release has none",
            interpretation: "decisions at layers 2, 7, 15, 23 of 32 over the tokens of stage 1",
            towers: Nuwa::ABOUT.towers,
            ..About::NOTHING
        },
        recipe: Recipe::Nuwa(NuwaForm::Pyramid),
    },
    Method {
        name: "reroute-nuwa-full",
        about: About {
            description: "reroute-nuwa, whose decisions may also call what stage 1 does not keep",
            source: "an experiment of this project; nobody claims it",
            interpretation: "what stage 1 does not keep enters as the encoder made it, and waits; \
                             costs the memory of those rows",
            towers: Nuwa::ABOUT.towers,
            ..About::NOTHING
        },
        recipe: Recipe::Nuwa(NuwaForm::FullPool),
    },
    Method {
        name: "reroute-vscan",
        about: About {
            interpretation: "stage 2 of VScan as four decisions at layers 16, 20, 24, 28 of 32",
            ..VScan::ABOUT
        },
        recipe: Recipe::Late(LateRecipe {
            method: || EncoderMethod::VScan(VScan::default()),
            entering: 1.5,
            action: Action::Reroute,
            score: vscan_score,
        }),
    },
    Method {
        name: "reroute-sparsevlm",
        about: About {
            description: "SparseVLM's raters and counts, rerouted",
            source: "Reroute, arXiv 2606.12412, on the schedule of sparsevlm",
            interpretation: "raters ask with the decision layer's own projections: deferred tokens \
                             have no executed attention",
            ..About::NOTHING
        },
        recipe: Recipe::Decoder(DecoderRecipe {
            action: Action::Reroute,
            layers: &[3, 7, 16],
            keep: Keep::Rounded,
            score: RATERS_HERE,
            profile: Profile::Geometric,
            released: SPARSE_VLM,
            ..DECODER
        }),
    },
    Method {
        name: "reroute-feather",
        about: About {
            description: "FEATHER's rule and counts, rerouted",
            source: "Reroute, arXiv 2606.12412, on the schedule of feather",
            interpretation: "the decision layer's own projections",
            ..About::NOTHING
        },
        recipe: Recipe::Decoder(DecoderRecipe {
            action: Action::Reroute,
            layers: &[8, 16],
            score: WITHOUT_POSITIONS_HERE,
            stride: Some(3),
            profile: Profile::Geometric,
            exact: &[192],
            ..DECODER
        }),
    },
    Method {
        name: "reroute-dart",
        about: About {
            description: "DART's count at four decisions, pivots chosen anew each time",
            source: "Reroute, arXiv 2606.12412, on the rule of dart",
            interpretation: "the decision layer's own keys: deferred tokens have no executed ones",
            ..About::NOTHING
        },
        recipe: Recipe::Decoder(DecoderRecipe {
            action: Action::Reroute,
            layers: &[2, 7, 15, 23],
            keep: Keep::Rounded,
            score: DART_HERE,
            released: &[
                (192, &[196.0 / 576.0; 4]),
                (128, &[132.0 / 576.0; 4]),
                (64, &[68.0 / 576.0; 4]),
            ],
            ..DECODER
        }),
    },
];

/// A method that does all before the decoder.
fn encoder(entry: &InPresets) -> Method {
    Method {
        name: entry.name,
        about: entry.about,
        recipe: Recipe::Encoder(entry.method),
    }
}

/// Its recoverable twin: more tokens enter, and the decoder's second half routes over them.
fn routed(entry: &InPresets) -> Method {
    Method {
        name: entry.rerouted,
        about: About {
            interpretation: "7/4 of the budget enter the decoder; decisions at layers 16, 20, 24, \
                             28 of 32 then keep 1/4 of it, as Nüwa's stages do",
            ..entry.about
        },
        recipe: Recipe::Late(LateRecipe {
            method: entry.method,
            entering: ENTERING,
            action: Action::Reroute,
            score: |_| Score::Attention(ATTENTION),
        }),
    }
}
