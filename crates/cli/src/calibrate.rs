//! `reroute calibrate`: shortcuts for visual tokens that wait, fitted to pictures.

use std::io::Write;

use anyhow::{Context, ensure};
use reroute::Shortcuts;
use reroute_finetune::{Calibration, Fitted, calibrate};
use reroute_zoo::{Question, SHORTCUTS};
use serde_json::json;

use crate::args::CalibrateArgs;
use crate::known::{self, Known};
use crate::progress::Progress;
use crate::{open, output};

/// Runs the command.
pub fn run(args: &CalibrateArgs, out: &mut dyn Write) -> anyhow::Result<()> {
    let known = Known::of(&args.model)?;
    let plan = known.plan(&args.routing)?;
    let folder = args.model.folder()?;
    let to = match (&args.to, folder.root()) {
        (Some(to), _) => to.clone(),
        (None, Some(root)) => root.join(SHORTCUTS),
        (None, None) => anyhow::bail!("--to is missing: say where to write {SHORTCUTS}"),
    };
    known::check_file(&to, &args.image)?;
    ensure!(
        !args.image.is_empty(),
        "--image is missing: name a few dozen pictures"
    );
    let vlm = open::model(&args.model)?;
    let visuals = args.image.iter().map(|path| open::image(path));
    let mut failed = None;
    let readable = visuals.map_while(|picture| picture.map_err(|error| failed = Some(error)).ok());
    // Visual tokens stand before the words, and do not see them.
    let questions = readable.map(|picture| Question::about(vec![picture], "What is this?"));
    let calibration = Calibration {
        rank: args.rank,
        ridge: args.ridge,
    };
    let mut progress = Progress::new(args.image.len());
    let fitted = calibrate(&vlm, questions, &plan, calibration, |seen| {
        progress.show(seen, |_| "pictures".into());
    });
    progress.close();
    if let Some(error) = failed {
        return Err(error);
    }
    let fitted = fitted?;
    let known = vlm.model().decoder().shortcuts().iter().cloned();
    let shortcuts = fitted.iter().map(|fitted| fitted.shortcut.clone());
    let shortcuts = Shortcuts::new(known.chain(shortcuts));
    let text = serde_json::to_vec(&shortcuts).context("writing numbers")?;
    output::write_file(&to, &text)?;

    let shape = vlm.config().decoder().shape();
    let cost = |fitted: &Fitted| {
        let layers = fitted.shortcut.layers.len() as f64 * shape.layer_flops(1);
        fitted.shortcut.flops() / layers
    };
    if args.json {
        let stage = |fitted: &Fitted| {
            json!({
                "layers": [fitted.shortcut.layers.start, fitted.shortcut.layers.end],
                "rank": fitted.shortcut.rank(), "tokens": fitted.tokens,
                "explained": fitted.explained, "explained_by_mean": fitted.explained_by_mean,
                "share_of_flops": cost(fitted),
            })
        };
        let stages: Vec<_> = fitted.iter().map(stage).collect();
        return output::print_json(out, &json!({"file": output::path(&to), "stages": stages}));
    }
    for fitted in &fitted {
        let (layers, percent) = (&fitted.shortcut.layers, |share: f64| 100.0 * share);
        writeln!(
            out,
            "from layer {} to {}: a map of rank {} predicts {:.1} % of what they add (their mean {:.1} %), for {:.2} % of their \
             operations on a token; {} tokens",
            layers.start,
            layers.end,
            fitted.shortcut.rank(),
            percent(fitted.explained),
            percent(fitted.explained_by_mean),
            percent(cost(fitted)),
            fitted.tokens,
        )?;
    }
    writeln!(
        out,
        "written to {}: a schedule with \"waiting\": \"shortcut\" takes them",
        to.display()
    )?;
    Ok(())
}
