//! `reroute ground`: a box around what an expression describes.

use std::io::{Write, stderr};
use std::path::{Path, PathBuf};

use anyhow::bail;
use serde_json::json;

use crate::args::GroundArgs;
use crate::{draw, open, output};
use reroute_zoo::embedded;

/// Where the box of the built-in scene is drawn.
const DEFAULT_OVERLAY: &str = "reroute-ground.png";

/// How much larger the built-in scene is drawn.
const SCENE_SCALE: usize = 4;

/// Runs the command.
pub fn run(args: &GroundArgs, out: &mut dyn Write) -> anyhow::Result<()> {
    let vlm = open::model(&args.model)?;
    let plan = open::plan(&args.routing.routing, vlm.config())?;
    let options = open::generation(&args.generation, vlm.generation_defaults())?;
    let (image, overlay) = match (&args.image, &args.model.model) {
        (Some(path), _) => (open::image(path)?, args.overlay.clone()),
        (None, None) => {
            let overlay = args.overlay.clone();
            (
                open::scene()?,
                overlay.or_else(|| Some(PathBuf::from(DEFAULT_OVERLAY))),
            )
        }
        (None, Some(_)) => bail!("--image is missing: say where to look"),
    };
    let expression = match (&args.expression, &args.image) {
        (Some(expression), _) => expression.as_str(),
        (None, None) => embedded::SCENE.expression,
        (None, Some(_)) => bail!("--expression is missing: say what to find"),
    };
    let found = vlm.ground(&image, expression, &plan, &options)?;
    if let Some(path) = &overlay {
        // The built-in scene is a thumbnail; nobody could see a box on it.
        let scale = if args.image.is_none() { SCENE_SCALE } else { 1 };
        let mut picture = draw::enlarge(&image, scale)?;
        let pixels = found.pixels.map(|at| at * scale as f64);
        draw::rectangle(&mut picture, &pixels, draw::FOUND);
        output::write_file(path, &draw::png(&picture)?)?;
    }
    let answer = &found.answer;
    output::print_notices(answer);
    if args.json {
        let mut report = output::answer_json(&vlm, &plan, answer);
        report["expression"] = json!(expression);
        report["box"] = json!({"pixels": found.pixels, "normalized": found.normalized});
        report["overlay"] = json!(overlay);
        return output::print_json(out, &report);
    }
    let [x1, y1, x2, y2] = found.pixels;
    writeln!(out, "{expression}")?;
    writeln!(
        out,
        "  pixels      [{x1:.1}, {y1:.1}, {x2:.1}, {y2:.1}] of {}×{}",
        image.width(),
        image.height()
    )?;
    let [x1, y1, x2, y2] = found.normalized;
    writeln!(out, "  normalized  [{x1:.4}, {y1:.4}, {x2:.4}, {y2:.4}]")?;
    if let Some(path) = &overlay {
        writeln!(out, "  drawn in    {}", shown(path))?;
    }
    let _ = writeln!(stderr(), "{}", output::summary(&vlm, &plan, answer));
    Ok(())
}

fn shown(path: &Path) -> String {
    path.display().to_string()
}
