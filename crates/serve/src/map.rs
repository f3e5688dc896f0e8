//! The extension `"trace": true`: what routing did with every visual token, and what it cost.

use burn::tensor::backend::Backend;
use reroute_zoo::grounding::Place;
use reroute_zoo::reducers::Plan;
use reroute_zoo::{Answer, TokenState, View, Vlm};
use serde_json::{Value, json};

/// The object `reroute` of a response.
pub(crate) fn trace<B: Backend>(
    vlm: &Vlm<B>,
    (routing, plan): (&str, &Plan),
    answer: &Answer,
) -> Value {
    let layers = vlm.config().decoder().num_layers;
    let (cost, dense) = vlm.costs(&plan.schedule, answer);
    let milliseconds = |time: std::time::Duration| time.as_secs_f64() * 1e3;
    let images = answer.views.iter().map(|view| image(vlm, view));
    let stages = answer.stages(layers, plan.schedule.action());
    let stages = stages.iter().map(|stage| {
        let [first, last] = stage.layers;
        json!({
            "first_layer": first,
            "last_layer": last,
            "states": letters(&answer.views, &stage.states),
        })
    });
    json!({
        "routing": routing,
        "layers": layers,
        "flops": {
            "decoder": cost.total_flops(),
            "dense": dense.total_flops(),
            "share": cost.total_flops() / dense.total_flops(),
        },
        "kv_bytes": answer.kv_bytes.iter().sum::<u64>(),
        "kv_bytes_dense": dense.total_kv_bytes(),
        "timings_ms": {
            "vision": milliseconds(answer.timings.vision),
            "prefill": milliseconds(answer.timings.prefill),
            "decode": milliseconds(answer.timings.decode),
        },
        "average_visual_tokens": cost.average_tokens(),
        "visual_tokens": answer.visual_tokens,
        "images": images.collect::<Vec<_>>(),
        "stages": stages.collect::<Vec<_>>(),
        "boxes": boxes(vlm, answer),
    })
}

/// How a picture was seen. Where visual tokens are not its patches, they cover no area.
fn image<B: Backend>(vlm: &Vlm<B>, view: &View) -> Value {
    let ([width, height], [steps, rows, columns]) = (view.original, view.tokens);
    let geometry = vlm.preprocessor().geometry(view);
    let ([left, top], [wide, high]) = (geometry.offset, geometry.extent);
    let area = view
        .is_grid()
        .then_some([left, top, left + wide, top + high]);
    json!({
        "kind": if view.time.is_some() { "video" } else { "image" },
        "width": width,
        "height": height,
        "steps": steps,
        "rows": rows,
        "columns": columns,
        "area": area,
        "tokens": view.token_count(),
    })
}

/// One text for each view, a letter for each visual token.
fn letters(views: &[View], states: &[TokenState]) -> Vec<String> {
    let mut states = states.iter().map(|state| match state {
        TokenState::Active => 'a',
        TokenState::Returned => 'b',
        TokenState::Deferred => 'd',
        TokenState::Removed => 'r',
        TokenState::Absent => 'n',
    });
    let of_view = |view: &View| states.by_ref().take(view.token_count()).collect();
    views.iter().map(of_view).collect()
}

/// The boxes of an answer, in pixels of the first picture as given. What the answer calls one is its text, or the
/// answer as a whole.
fn boxes<B: Backend>(vlm: &Vlm<B>, answer: &Answer) -> Vec<Value> {
    let found = vlm.answered(answer).into_iter();
    let boxes = found.filter_map(|found| {
        let text = found.label.as_deref().unwrap_or(&answer.text);
        match found.pixels {
            Place::Box(corners) => Some(json!({
                "box": corners,
                "text": text,
                "outside": found.outside,
            })),
            Place::Point(_) => None,
        }
    });
    boxes.collect()
}
