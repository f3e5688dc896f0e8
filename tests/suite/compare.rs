//! `reroute compare`, and what `explain` shows of plans that begin before the decoder.

use serde_json::Value;

use crate::program::{Scratch, read_image, refuses, report, reroute, scene};

#[test]
fn compare_shows_every_routing_as_asking_it_alone_would() {
    let folder = Scratch::new();
    let (image, out) = (scene("063"), folder.at("sheet.png"));
    let routings = [
        "dense",
        "reroute-pdrop@192",
        "nuwa@128",
        "reroute-visionzip@192",
    ];
    let flags = [
        "compare",
        "--image",
        &image,
        "--rounds",
        "1",
        "--out",
        &out,
        "--routing",
    ];
    let flags = [&flags[..], &routings[..]].concat();
    let compared = report(&flags);
    let rows = compared["routings"].as_array().expect("a list");
    assert_eq!(rows.len(), routings.len());
    for (row, routing) in rows.iter().zip(routings) {
        assert_eq!(row["routing"], routing);
        let alone = report(&["ask", "--image", &image, "--routing", routing]);
        for same in [
            "answer",
            "tokens",
            "decisions",
            "flops",
            "kv_bytes",
            "rows_per_layer",
        ] {
            assert_eq!(row[same], alone[same], "{routing}: {same}");
        }
        // Before every decision but the first, the tokens that waited; removal has none.
        let decisions = row["decisions"].as_array().expect("a list");
        let drifts = row["drift"].as_array().expect("a list");
        let waits = row["schedule"]["action"] == "reroute";
        assert_eq!(
            drifts.len(),
            if waits { decisions.len() - 1 } else { 0 },
            "{routing}"
        );
        for (drift, (before, at)) in drifts
            .iter()
            .zip(decisions.iter().zip(decisions.iter().skip(1)))
        {
            assert_eq!(drift["layer"], at["layer"]);
            let waited = drift["waited"].as_array().expect("a list").len();
            let selected = before["selected"].as_array().expect("a list").len();
            assert_eq!(
                waited + selected,
                row["visual_tokens"].as_u64().unwrap() as usize
            );
            assert!(drift["mean"].as_f64().expect("a number") > 0.0);
        }
    }
    assert_eq!(rows[0]["iou_with_first"], 1.0);
    // A row per routing, a column per stage: the widest has an answer and four decisions.
    let sheet = read_image(&out);
    assert_eq!(
        [sheet.width(), sheet.height()],
        [60 + 6 * 348, 12 + 4 * 348]
    );

    let table = reroute(&flags).unwrap();
    for routing in routings {
        assert!(
            table
                .lines()
                .any(|line| line.contains(&format!("  {routing} "))),
            "{table}"
        );
    }
}

#[test]
fn explain_draws_what_enters_the_decoder() {
    let folder = Scratch::new();
    let image = scene("063");
    let out = folder.at("pictures");
    let flags = [
        "explain",
        "--image",
        &image,
        "--routing",
        "uniform-grid@64",
        "--out",
        &out,
    ];
    let explained = report(&flags);
    let pictures = explained["pictures"].as_array().expect("a list");
    let [only] = &pictures[..] else {
        panic!("one picture: {pictures:?}");
    };
    let path = only.as_str().expect("a path");
    assert!(path.ends_with("encoder.png"), "{path}");
    let picture = read_image(path);
    let is_grey = |token: usize| {
        let (x, y) = (token % 8 * 56, token / 8 * 56);
        (0..56 * 56).all(|at| {
            let at = ((y + at / 56) * 448 + x + at % 56) * 3;
            let pixel = &picture.data()[at..at + 3];
            pixel[0] == pixel[1] && pixel[1] == pixel[2]
        })
    };
    let shown = (0..64).filter(|&token| !is_grey(token)).count();
    assert_eq!(explained["visual_tokens"].as_u64(), Some(shown as u64));
    assert_eq!(explained["drift"], Value::Array(Vec::new()));
}

#[test]
fn comparisons_that_cannot_be_made_are_refused() {
    let image = scene("063");
    let with = |flags: &[&str]| {
        let line = ["compare", "--image", &image, "--out", "/dev/null"];
        [&line[..], flags]
            .concat()
            .iter()
            .map(ToString::to_string)
            .collect::<Vec<_>>()
    };
    refuses(&with(&["--rounds", "0"]), &["at least once"]);
    refuses(
        &with(&["--routing", "magic@64"]),
        &["magic@64", "did you mean"],
    );
}
