//! One picture of a run: speed-up against the budget beside its ceiling, and cost against the number of
//! visual tokens.

use std::path::Path;

use anyhow::anyhow;
use plotters::coord::Shift;
use plotters::prelude::*;
use serde_json::Value;

/// Pixels of one diagram.
const WIDTH: u32 = 640;
const HEIGHT: u32 = 460;

/// Told apart by people who see colours differently, too (Okabe and Ito 2008).
const COLOURS: [RGBColor; 7] = [
    RGBColor(213, 94, 0),
    RGBColor(230, 159, 0),
    RGBColor(0, 114, 178),
    RGBColor(0, 158, 115),
    RGBColor(204, 121, 167),
    RGBColor(86, 180, 233),
    RGBColor(0, 0, 0),
];

const FONT: (&str, i32) = ("sans-serif", 14);
const CAPTION: (&str, i32) = ("sans-serif", 17);

type Area<'a> = DrawingArea<SVGBackend<'a>, Shift>;

/// Draws a row of diagrams for every backend that has something to draw; says whether one has.
pub fn draw(report: &Value, path: &Path) -> anyhow::Result<bool> {
    let rows: Vec<Row> = list(&report["backends"]).filter_map(Row::of).collect();
    if rows.is_empty() {
        return Ok(false);
    }
    let size = (2 * WIDTH, HEIGHT * rows.len() as u32);
    let root = SVGBackend::new(path, size).into_drawing_area();
    let draw = || -> Result<(), Box<dyn std::error::Error>> {
        root.fill(&WHITE)?;
        for (area, row) in root.split_evenly((rows.len(), 1)).iter().zip(&rows) {
            let (left, right) = area.split_horizontally(WIDTH);
            row.draw_speedups(&left)?;
            row.draw_sizes(&right)?;
            row.draw_memory(if row.methods.is_empty() {
                &left
            } else {
                &right
            })?;
        }
        Ok(root.present()?)
    };
    draw().map_err(|error| anyhow!("cannot draw {}: {error}", path.display()))?;
    Ok(true)
}

/// What is drawn of one backend.
struct Row {
    /// What was measured on what.
    title: String,
    methods: Vec<Method>,
    curves: Vec<Curve>,
    memory: Vec<Memory>,
}

/// MiB against seconds while requests are served.
struct Memory {
    name: String,
    points: Vec<(f64, f64)>,
}

/// One method at several budgets.
struct Method {
    name: String,
    points: Vec<Speedup>,
}

struct Speedup {
    average_tokens: f64,
    least: f64,
    median: f64,
    most: f64,
    ceiling: f64,
}

/// Seconds against visual tokens.
struct Curve {
    name: String,
    exponent: f64,
    points: Vec<(f64, f64)>,
}

fn list(value: &Value) -> impl Iterator<Item = &Value> {
    value.as_array().into_iter().flatten()
}

fn number(value: &Value) -> f64 {
    value.as_f64().unwrap_or(f64::NAN)
}

fn text(value: &Value) -> String {
    value.as_str().unwrap_or("?").to_string()
}

/// Backend and device; model and type where they are not the usual ones.
fn title(backend: &Value) -> String {
    let known = ["backend", "device"].map(|name| Some(text(&backend[name])));
    let other = [("model", "llava"), ("dtype", "f32")].map(|(name, usual)| {
        let name = backend[name].as_str().filter(|name| *name != usual);
        name.map(str::to_string)
    });
    let parts: Vec<String> = known.into_iter().chain(other).flatten().collect();
    parts.join(", ")
}

/// Of the most requests at once, each routing.
fn memory(batches: &Value) -> Vec<Memory> {
    let requests = |batch: &Value| batch["requests"].as_u64();
    let most = list(batches).filter_map(requests).max();
    let largest = list(batches).filter(|batch| requests(batch) == most);
    let memory = |batch: &Value| Memory {
        name: format!("{} × {}", most.unwrap_or(0), text(&batch["routing"])),
        points: list(&batch["memory"])
            .map(|point| {
                let mebibytes = number(&point[1]) / f64::from(1 << 20);
                (number(&point[0]) / 1e3, mebibytes)
            })
            .collect(),
    };
    largest.map(memory).collect()
}

impl Row {
    fn of(backend: &Value) -> Option<Self> {
        let mut methods: Vec<Method> = Vec::new();
        for preset in list(&backend["prefill"]["presets"]) {
            let name = text(&preset["method"]);
            let speedup = &preset["speedup"];
            let point = Speedup {
                average_tokens: number(&preset["average_tokens"]),
                least: number(&speedup["least"]),
                median: number(&speedup["median"]),
                most: number(&speedup["most"]),
                ceiling: number(&preset["ceiling"]),
            };
            match methods.iter_mut().find(|method| method.name == name) {
                Some(method) => method.points.push(point),
                None => methods.push(Method {
                    name,
                    points: vec![point],
                }),
            }
        }
        let curves = list(&backend["sizes"]["curves"]).map(|curve| Curve {
            name: text(&curve["routing"]),
            exponent: number(&curve["time_exponent"]),
            points: list(&curve["points"])
                .map(|point| {
                    let seconds = number(&point["ms"]["median"]) / 1e3;
                    (number(&point["visual_tokens"]), seconds)
                })
                .collect(),
        });
        let row = Self {
            title: title(backend),
            methods,
            curves: curves.collect(),
            memory: memory(&backend["sessions"]["batches"]),
        };
        let is_empty = row.methods.is_empty() && row.curves.is_empty() && row.memory.is_empty();
        (!is_empty).then_some(row)
    }

    /// Speed-up of the prefill over the dense one against the budget.
    fn draw_speedups(&self, area: &Area) -> Result<(), Box<dyn std::error::Error>> {
        let points = || self.methods.iter().flat_map(|method| &method.points);
        let widest = points()
            .map(|point| point.average_tokens)
            .fold(1.0, f64::max);
        let highest = points().map(|point| point.most.max(point.ceiling));
        let highest = highest.fold(1.0, f64::max);
        if self.methods.is_empty() {
            return Ok(());
        }
        let mut chart = ChartBuilder::on(area)
            .caption(format!("Prefill speed-up: {}", self.title), CAPTION)
            .margin(12)
            .margin_right(24)
            .x_label_area_size(44)
            .y_label_area_size(56)
            .build_cartesian_2d(0.0..widest * 1.1, 0.0..highest * 1.1)?;
        chart
            .configure_mesh()
            .light_line_style(WHITE)
            .x_desc("visual tokens a layer works on, on average")
            .y_desc("times faster than dense")
            .x_label_formatter(&|tokens| format!("{tokens:.0}"))
            .label_style(FONT)
            .draw()?;
        for (method, colour) in self.methods.iter().zip(COLOURS.iter().cycle()) {
            let colour = *colour;
            let line = |of: fn(&Speedup) -> f64| {
                let point = move |point: &Speedup| (point.average_tokens, of(point));
                method.points.iter().map(point).collect::<Vec<_>>()
            };
            chart.draw_series(DashedLineSeries::new(
                line(|point| point.ceiling),
                5,
                4,
                colour.stroke_width(1),
            ))?;
            chart
                .draw_series(LineSeries::new(
                    line(|point| point.median),
                    colour.stroke_width(2),
                ))?
                .label(&method.name)
                .legend(move |(x, y)| {
                    PathElement::new([(x, y), (x + 22, y)], colour.stroke_width(2))
                });
            let dots = line(|point| point.median).into_iter();
            chart.draw_series(dots.map(|at| Circle::new(at, 3, colour.filled())))?;
            chart.draw_series(method.points.iter().map(|point| {
                let ends = [point.least, point.most].map(|end| (point.average_tokens, end));
                PathElement::new(ends, colour.stroke_width(1))
            }))?;
        }
        // Once for all: what the dashes are.
        chart
            .draw_series(std::iter::empty::<Circle<(f64, f64), i32>>())?
            .label("dashed: ceiling (ratio of FLOPs)")
            .legend(|(x, y)| PathElement::new([(x, y), (x + 8, y)], BLACK.stroke_width(1)));
        chart
            .configure_series_labels()
            // Speed-ups fall as the budget grows.
            .position(SeriesLabelPosition::LowerLeft)
            .background_style(WHITE.mix(0.85))
            .border_style(BLACK.mix(0.3))
            .label_font(FONT)
            .draw()?;
        Ok(())
    }

    /// Memory of a running batch over time.
    fn draw_memory(&self, area: &Area) -> Result<(), Box<dyn std::error::Error>> {
        let points = || self.memory.iter().flat_map(|memory| &memory.points);
        let most = |of: fn(&(f64, f64)) -> f64| points().map(of).fold(0.0, f64::max) * 1.1;
        if self.memory.is_empty() || !self.curves.is_empty() {
            return Ok(());
        }
        let mut chart = ChartBuilder::on(area)
            .caption(format!("Keys and values in use: {}", self.title), CAPTION)
            .margin(12)
            .margin_right(24)
            .x_label_area_size(44)
            .y_label_area_size(56)
            .build_cartesian_2d(0.0..most(|at| at.0), 0.0..most(|at| at.1))?;
        chart
            .configure_mesh()
            .light_line_style(WHITE)
            .x_desc("seconds since the requests came")
            .y_desc("MiB")
            .label_style(FONT)
            .draw()?;
        for (memory, colour) in self.memory.iter().zip(COLOURS.iter().cycle()) {
            let colour = *colour;
            let line = LineSeries::new(memory.points.iter().copied(), colour.stroke_width(2));
            chart
                .draw_series(line)?
                .label(&memory.name)
                .legend(move |(x, y)| {
                    PathElement::new([(x, y), (x + 22, y)], colour.stroke_width(2))
                });
        }
        chart
            .configure_series_labels()
            .position(SeriesLabelPosition::UpperRight)
            .background_style(WHITE.mix(0.85))
            .border_style(BLACK.mix(0.3))
            .label_font(FONT)
            .draw()?;
        Ok(())
    }

    /// Time of the prefill against the number of visual tokens, both on logarithmic axes.
    fn draw_sizes(&self, area: &Area) -> Result<(), Box<dyn std::error::Error>> {
        let points = || self.curves.iter().flat_map(|curve| &curve.points);
        let range = |of: fn(&(f64, f64)) -> f64, margin: f64| {
            let (least, most) = points()
                .map(of)
                .fold((f64::INFINITY, 0f64), |(a, b), value| {
                    (a.min(value), b.max(value))
                });
            least / margin..most * margin
        };
        if points().next().is_none() {
            return Ok(());
        }
        let mut sizes: Vec<f64> = points().map(|point| point.0).collect();
        sizes.sort_by(f64::total_cmp);
        sizes.dedup();
        let times = range(|point| point.1, 1.5);
        let steps: Vec<f64> = (-10..20)
            .map(|power| 2f64.powi(power))
            .filter(|seconds| times.contains(seconds))
            .collect();
        let mut chart = ChartBuilder::on(area)
            .caption(format!("Prefill time: {}", self.title), CAPTION)
            .margin(12)
            .margin_right(24)
            .x_label_area_size(44)
            .y_label_area_size(56)
            .build_cartesian_2d(
                range(|point| point.0, 1.2)
                    .log_scale()
                    .with_key_points(sizes),
                times.log_scale().with_key_points(steps),
            )?;
        chart
            .configure_mesh()
            .light_line_style(WHITE)
            .x_desc("visual tokens of the prompt")
            .y_desc("seconds")
            .x_label_formatter(&|tokens| format!("{tokens:.0}"))
            .y_label_formatter(&|seconds| format!("{seconds}"))
            .label_style(FONT)
            .draw()?;
        let colours = [COLOURS[0], COLOURS[2]];
        for (curve, colour) in self.curves.iter().zip(colours.into_iter().cycle()) {
            let points = || curve.points.iter().copied();
            chart
                .draw_series(LineSeries::new(points(), colour.stroke_width(2)))?
                .label(format!(
                    "{}: tokens to the power of {:.2}",
                    curve.name, curve.exponent
                ))
                .legend(move |(x, y)| {
                    PathElement::new([(x, y), (x + 22, y)], colour.stroke_width(2))
                });
            chart.draw_series(points().map(|at| Circle::new(at, 3, colour.filled())))?;
        }
        chart
            .configure_series_labels()
            .position(SeriesLabelPosition::UpperLeft)
            .background_style(WHITE.mix(0.85))
            .border_style(BLACK.mix(0.3))
            .label_font(FONT)
            .draw()?;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    #[test]
    fn a_picture_names_methods_sizes_and_exponents() {
        let spread =
            |median: f64| json!({"median": median, "least": median * 0.9, "most": median * 1.1});
        let preset = |method: &str, tokens: f64, speedup: f64| json!({"method": method, "average_tokens": tokens, "speedup": spread(speedup), "ceiling": speedup * 1.05});
        let report = json!({"backends": [{
            "backend": "flex",
            "device": "a processor",
            "prefill": {"presets": [
                preset("pdrop", 191.5, 2.5), preset("reroute-pdrop", 191.6, 2.3),
                preset("pdrop", 63.8, 4.9), preset("reroute-pdrop", 63.8, 4.4),
            ]},
            "sizes": {"curves": [
                {"routing": "dense", "time_exponent": 1.043, "points": [
                    {"visual_tokens": 576, "ms": spread(8000.0)},
                    {"visual_tokens": 4608, "ms": spread(70000.0)},
                ]},
            ]},
        }]});
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("picture.svg");
        assert!(super::draw(&report, &path).unwrap());
        let picture = std::fs::read_to_string(&path).unwrap();
        for words in [
            "reroute-pdrop",
            "flex, a processor",
            "4608",
            "power of 1.04",
            "ceiling",
        ] {
            assert!(picture.contains(words), "{words}");
        }
    }

    #[test]
    fn nothing_measured_is_nothing_drawn() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("picture.svg");
        assert!(!super::draw(&json!({"backends": []}), &path).unwrap());
        assert!(!path.exists());
    }
}
