//! `reroute ground`: boxes around what an expression describes.

use std::io::{Write, stderr};
use std::path::{Path, PathBuf};

use anyhow::bail;
use reroute_zoo::Visual;
use reroute_zoo::grounding::{Found, Place};
use serde_json::{Value, json};
use vision_encoder::RgbImage;

use crate::args::GroundArgs;
use crate::known::{self, Known};
use crate::{draw, open, output};
use reroute_zoo::embedded;

/// Where the box of the built-in scene is drawn.
const DEFAULT_OVERLAY: &str = "reroute-ground.png";

/// How much larger the built-in scene is drawn.
const SCENE_SCALE: usize = 4;

/// Runs the command.
pub fn run(args: &GroundArgs, out: &mut dyn Write) -> anyhow::Result<()> {
    let known = Known::of(&args.model)?;
    let plan = known.plan(&args.routing.routing)?;
    known::check_generation(&args.generation)?;
    let (image, overlay) = match (&args.image, &args.model.model) {
        (Some(path), _) => (open::image(path)?, args.overlay.clone()),
        (None, None) => {
            let default = || Some(PathBuf::from(DEFAULT_OVERLAY));
            (open::scene()?, args.overlay.clone().or_else(default))
        }
        (None, Some(_)) => bail!("--image is missing: say where to look"),
    };
    let expression = match (&args.expression, &args.image) {
        (Some(expression), _) => expression.as_str(),
        (None, None) => embedded::SCENE.expression,
        (None, Some(_)) => bail!("--expression is missing: say what to find"),
    };
    let read = args.image.iter().chain(&args.model.model);
    overlay
        .as_deref()
        .map_or(Ok(()), |path| known::check_picture(path, read))?;
    known.outline().check(&Visual::Image(image.clone()))?;
    let vlm = open::model(&args.model)?;
    let options = open::generation(&args.generation, vlm.generation_defaults())?;
    let found = vlm.ground(&image, expression, &plan, &options)?;
    let answer = &found.answer;
    output::print_notices(answer);
    // The built-in scene is a thumbnail; nobody could see a box on it.
    let scale = if args.image.is_none() { SCENE_SCALE } else { 1 };
    // What was found is told whatever becomes of the picture.
    let drawn = overlay
        .as_deref()
        .map(|path| draw_found(path, &image, scale, &found.found));
    let drawn = drawn.transpose();
    if args.json {
        let mut report = output::answer_json(&vlm, &plan, answer);
        report["expression"] = json!(expression);
        report["box"] = found.first_box().map_or(Value::Null, found_json);
        report["boxes"] = found.found.iter().map(found_json).collect();
        let written = overlay.as_deref().filter(|_| drawn.is_ok());
        report["overlay"] = written.map_or(Value::Null, output::path);
        output::print_json(out, &report)?;
        return drawn.map(drop);
    }
    let (width, height) = (image.width(), image.height());
    for (index, one) in found.found.iter().enumerate() {
        let title = match (&one.label, found.found.len()) {
            (None, 1) => expression.to_string(),
            (Some(label), 1) => format!("{expression}: {label}"),
            (label, _) => format!("{}. {}", index + 1, label.as_deref().unwrap_or(expression)),
        };
        writeln!(out, "{title}")?;
        let pixels = numbers(one.pixels, 1);
        writeln!(out, "  pixels      {pixels} of {width}×{height}")?;
        writeln!(out, "  normalized  {}", numbers(one.normalized, 4))?;
        if one.outside {
            writeln!(out, "  lies wholly outside of the image")?;
        }
    }
    drawn?;
    if let Some(path) = &overlay {
        writeln!(out, "  drawn in    {}", path.display())?;
    }
    let _ = writeln!(stderr(), "{}", output::summary(&vlm, &plan, answer));
    Ok(())
}

/// A place as people read it.
fn numbers(place: Place, digits: usize) -> String {
    let numbers: Vec<String> = coordinates(&place)
        .iter()
        .map(|number| format!("{number:.digits$}"))
        .collect();
    match place {
        Place::Box(_) => format!("[{}]", numbers.join(", ")),
        Place::Point(_) => format!("({})", numbers.join(", ")),
    }
}

fn coordinates(place: &Place) -> &[f64] {
    match place {
        Place::Box(corners) => corners,
        Place::Point(at) => at,
    }
}

/// A box or a point: the first has four numbers, the other two.
fn found_json(found: &Found) -> Value {
    json!({
        "kind": match found.pixels {
            Place::Box(_) => "box",
            Place::Point(_) => "point",
        },
        "label": found.label,
        "pixels": coordinates(&found.pixels),
        "normalized": coordinates(&found.normalized),
        "outside": found.outside,
    })
}

/// Draws all that was found within the image.
fn draw_found(path: &Path, image: &RgbImage, scale: usize, found: &[Found]) -> anyhow::Result<()> {
    let mut picture = draw::enlarge(image, scale)?;
    for (index, one) in found.iter().enumerate().filter(|(_, one)| !one.outside) {
        let number = (found.len() > 1).then(|| (index + 1).to_string());
        let tag = one.label.clone().or(number);
        draw::found(&mut picture, one.pixels, scale as f64, tag.as_deref());
    }
    output::write_file(path, &draw::Format::of(path)?.encode(&picture)?)
}
