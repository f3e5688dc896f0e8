//! Accuracy against what it costs: a colour for each method, filled where what is not kept comes back.

use std::collections::BTreeMap;

use plotters::coord::Shift;
use plotters::prelude::*;

use crate::summary::{DENSE, Summary};

const COLOURS: [RGBColor; 8] = [
    RGBColor(31, 119, 180),
    RGBColor(214, 39, 40),
    RGBColor(44, 160, 44),
    RGBColor(148, 103, 189),
    RGBColor(255, 127, 14),
    RGBColor(23, 190, 207),
    RGBColor(140, 86, 75),
    RGBColor(227, 119, 194),
];

/// Average tokens, percent, and bounds of it.
type Point = (f64, f64, [f64; 2]);

/// A method at several budgets.
struct Series {
    name: String,
    colour: RGBColor,
    comes_back: bool,
    points: Vec<Point>,
}

/// The plot as SVG.
pub(crate) fn accuracy(title: &str, summaries: &[Summary]) -> Result<String, String> {
    let (series, dense) = series(summaries);
    let all = series
        .iter()
        .flat_map(|series| &series.points)
        .chain(&dense);
    let ends = all.fold((1f64, 0f64, 100f64), |(right, top, bottom), point| {
        (
            right.max(point.0),
            top.max(point.2[1]),
            bottom.min(point.2[0]),
        )
    });
    let metric = summaries
        .first()
        .and_then(|summary| summary.metrics.first());
    let metric = metric.map_or("accuracy", |metric| metric.name.as_str());
    let mut text = String::new();
    {
        let area = SVGBackend::with_string(&mut text, (900, 560)).into_drawing_area();
        let names = (title, metric);
        draw(&area, names, &series, dense, ends).map_err(|error| error.to_string())?;
    }
    Ok(text)
}

fn series(summaries: &[Summary]) -> (Vec<Series>, Option<Point>) {
    let (mut series, mut dense): (BTreeMap<&str, Series>, _) = (BTreeMap::new(), None);
    let mut colours: BTreeMap<&str, RGBColor> = BTreeMap::new();
    for summary in summaries {
        let Some(metric) = summary.metrics.first() else {
            continue;
        };
        let bounds = metric.interval.unwrap_or([metric.value; 2]);
        let point = (
            summary.average_tokens,
            100.0 * metric.value,
            bounds.map(|bound| 100.0 * bound),
        );
        if summary.routing == DENSE {
            dense = Some(point);
            continue;
        }
        let method = summary.routing.split('@').next().unwrap_or_default();
        let family = method.strip_prefix("reroute-").unwrap_or(method);
        let next = COLOURS[colours.len() % COLOURS.len()];
        let colour = *colours.entry(family).or_insert(next);
        let entry = series.entry(method).or_insert_with(|| Series {
            name: method.into(),
            colour,
            comes_back: summary.action.as_deref() == Some("reroute"),
            points: Vec::new(),
        });
        entry.points.push(point);
    }
    let mut series: Vec<Series> = series.into_values().collect();
    for one in &mut series {
        one.points.sort_by(|a, b| a.0.total_cmp(&b.0));
    }
    (series, dense)
}

type Drawn<'a> = DrawingArea<SVGBackend<'a>, Shift>;
type Failed<'a> = DrawingAreaErrorKind<<SVGBackend<'a> as DrawingBackend>::ErrorType>;

fn draw<'a>(
    area: &Drawn<'a>,
    (title, metric): (&str, &str),
    series: &[Series],
    dense: Option<Point>,
    (right, top, bottom): (f64, f64, f64),
) -> Result<(), Failed<'a>> {
    area.fill(&WHITE)?;
    let room = ((top - bottom) * 0.08).max(1.0);
    let (right, low, high) = (
        right * 1.05,
        (bottom - room).max(0.0),
        (top + room).min(100.5),
    );
    let mut chart = ChartBuilder::on(area)
        .margin(16)
        .caption(title, ("sans-serif", 18))
        .x_label_area_size(40)
        .y_label_area_size(56)
        .build_cartesian_2d(0.0..right, low..high)?;
    chart
        .configure_mesh()
        .x_desc("visual tokens that a layer works on, on average")
        .y_desc(format!("{metric}, %"))
        .x_label_formatter(&|tokens| format!("{tokens:.0}"))
        .y_label_formatter(&|percent| format!("{percent:.0}"))
        .light_line_style(WHITE)
        .draw()?;
    if let Some((_, value, [from, to])) = dense {
        let band = Rectangle::new([(0.0, from), (right, to)], BLACK.mix(0.08).filled());
        chart.draw_series([band])?;
        chart
            .draw_series(LineSeries::new([(0.0, value), (right, value)], BLACK))?
            .label(DENSE)
            .legend(|(x, y)| PathElement::new(vec![(x, y), (x + 20, y)], BLACK));
    }
    for Series {
        name,
        colour,
        comes_back,
        points,
    } in series
    {
        let colour = *colour;
        let fill = match comes_back {
            true => colour.filled(),
            false => WHITE.filled(),
        };
        let bars = points
            .iter()
            .map(|&(x, _, [from, to])| PathElement::new(vec![(x, from), (x, to)], colour.mix(0.5)));
        chart.draw_series(bars)?;
        let line = points.iter().map(|&(x, y, _)| (x, y));
        chart.draw_series(LineSeries::new(line, colour))?;
        let circles = points.iter().map(|&(x, y, _)| Circle::new((x, y), 4, fill));
        chart.draw_series(circles)?;
        let rims = points
            .iter()
            .map(|&(x, y, _)| Circle::new((x, y), 4, colour));
        chart
            .draw_series(rims)?
            .label(name.as_str())
            .legend(move |(x, y)| {
                EmptyElement::at((x + 10, y))
                    + Circle::new((0, 0), 4, fill)
                    + Circle::new((0, 0), 4, colour)
            });
    }
    chart
        .configure_series_labels()
        .position(SeriesLabelPosition::LowerRight)
        .border_style(BLACK)
        .background_style(WHITE)
        .draw()?;
    area.present()
}
