//! The course of the losses as a picture: SVG, or PNG with letters of its own.

use super::RecordError;
use super::canvas::Canvas;
use plotters::prelude::{
    ChartBuilder, DrawingBackend, IntoDrawingArea as _, IntoFont as _, LineSeries, PathElement, RGBColor,
    SVGBackend, SeriesLabelPosition, WHITE,
};
use plotters::style::{Color as _, TextStyle};
use serde_json::{Map, Value};
use std::fs::File;
use std::io::{self, BufRead as _, BufReader};
use std::path::Path;

const WIDTH: u32 = 960;
const HEIGHT: u32 = 540;
/// More points than this are more than the picture has columns.
const MOST_POINTS: usize = 2 * WIDTH as usize;
/// Told apart by those who see few colours, too (Okabe and Ito 2008).
const TRAIN: RGBColor = RGBColor(0, 114, 178);
const VALID: RGBColor = RGBColor(213, 94, 0);

/// Losses by step.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Curve {
    /// Of training, in the order of the steps.
    pub train: Vec<(u64, f64)>,
    /// On the validation set.
    pub valid: Vec<(u64, f64)>,
}

/// No picture.
#[derive(Debug, thiserror::Error)]
pub enum ChartError {
    /// There is nothing to draw.
    #[error("there are no losses yet")]
    Empty,
    /// The drawing itself failed.
    #[error("the picture cannot be drawn: {0}")]
    Drawing(String),
}

/// A picture that is not written.
#[derive(Debug, thiserror::Error)]
pub enum PictureError {
    /// It cannot be drawn.
    #[error(transparent)]
    Chart(#[from] ChartError),
    /// It cannot be written.
    #[error(transparent)]
    Write(#[from] RecordError),
}

impl Curve {
    /// The losses in a file of JSON lines that [`Recorder`](super::Recorder) wrote.
    ///
    /// # Errors
    /// When the file cannot be read. Lines that are no records are left out.
    pub fn read(path: &Path) -> io::Result<Self> {
        let mut curve = Self::default();
        for line in BufReader::new(File::open(path)?).lines() {
            let Ok(record) = serde_json::from_str::<Map<String, Value>>(&line?) else { continue };
            let Some(step) = record.get("step").and_then(Value::as_u64) else { continue };
            let loss = |name: &str| record.get(name).and_then(Value::as_f64);
            curve.train.extend(loss("train_loss").map(|loss| (step, loss)));
            curve.valid.extend(loss("valid_loss").map(|loss| (step, loss)));
        }
        Ok(curve)
    }

    /// As SVG, 960 by 540.
    ///
    /// # Errors
    /// [`ChartError`]
    pub fn svg(&self, title: &str) -> Result<String, ChartError> {
        let mut text = String::new();
        self.draw(SVGBackend::with_string(&mut text, (WIDTH, HEIGHT)), title)?;
        Ok(text)
    }

    /// As PNG, 960 by 540.
    ///
    /// # Errors
    /// [`ChartError`]
    pub fn png(&self, title: &str) -> Result<Vec<u8>, ChartError> {
        let mut pixels = vec![255; 3 * (WIDTH * HEIGHT) as usize];
        self.draw(Canvas { pixels: &mut pixels, width: WIDTH, height: HEIGHT }, title)?;
        let mut bytes = Vec::new();
        let mut encoder = png::Encoder::new(&mut bytes, WIDTH, HEIGHT);
        encoder.set_color(png::ColorType::Rgb);
        encoder.set_depth(png::BitDepth::Eight);
        let written = encoder.write_header().and_then(|mut writer| {
            writer.write_image_data(&pixels)?;
            writer.finish()
        });
        written.map_err(|error| ChartError::Drawing(error.to_string()))?;
        Ok(bytes)
    }

    /// Writes both pictures into a folder: `loss.svg`, `loss.png`.
    ///
    /// # Errors
    /// [`PictureError`]
    pub fn write(&self, folder: &Path, title: &str) -> Result<(), PictureError> {
        for (name, picture) in [("loss.svg", self.svg(title)?.into_bytes()), ("loss.png", self.png(title)?)] {
            let path = folder.join(name);
            std::fs::write(&path, picture).map_err(|source| RecordError { path, source })?;
        }
        Ok(())
    }

    fn draw<B: DrawingBackend>(&self, backend: B, title: &str) -> Result<(), ChartError> {
        fn failed(error: impl std::fmt::Display) -> ChartError {
            ChartError::Drawing(error.to_string())
        }
        let (train, valid) = (drawn(&self.train), drawn(&self.valid));
        let all = || train.iter().chain(&valid);
        let last = all().map(|(step, _)| *step).max().ok_or(ChartError::Empty)?;
        let first = all().map(|(step, _)| *step).min().unwrap_or(0);
        let least = all().map(|(_, loss)| *loss).fold(f64::INFINITY, f64::min);
        let most = all().map(|(_, loss)| *loss).fold(f64::NEG_INFINITY, f64::max);
        let margin = ((most - least) * 0.05).max(1e-3 * most.abs()).max(1e-9);
        let area = backend.into_drawing_area();
        area.fill(&WHITE).map_err(failed)?;
        let title: String = title.chars().filter(|letter| !letter.is_control()).take(90).collect();
        let letters = |size: i32| TextStyle::from(("sans-serif", size).into_font());
        let mut chart = ChartBuilder::on(&area)
            .caption(format!("{title}: loss by step"), letters(18))
            .margin(12)
            .margin_right(28)
            .x_label_area_size(32)
            .y_label_area_size(64)
            .build_cartesian_2d(first..last.max(first + 1), least - margin..most + margin)
            .map_err(failed)?;
        chart.configure_mesh().label_style(letters(13)).light_line_style(WHITE).draw().map_err(failed)?;
        for (name, points, color) in [("training", &train, TRAIN), ("validation", &valid, VALID)] {
            if points.is_empty() {
                continue;
            }
            let line = LineSeries::new(points.iter().copied(), color.stroke_width(2))
                .point_size(if points.len() < 40 { 3 } else { 0 });
            let series = chart.draw_series(line).map_err(failed)?;
            series
                .label(name)
                .legend(move |(x, y)| PathElement::new([(x, y), (x + 18, y)], color.stroke_width(2)));
        }
        let labels = chart
            .configure_series_labels()
            .position(SeriesLabelPosition::UpperRight)
            .background_style(WHITE)
            .border_style(RGBColor(200, 200, 200))
            .label_font(letters(13))
            .draw();
        labels.map_err(failed)?;
        drop(chart);
        area.present().map_err(failed)
    }
}

/// Finite points, and of very many each so-many-th and the last.
fn drawn(points: &[(u64, f64)]) -> Vec<(u64, f64)> {
    let finite: Vec<(u64, f64)> = points.iter().copied().filter(|(_, loss)| loss.is_finite()).collect();
    let stride = finite.len().div_ceil(MOST_POINTS).max(1);
    let mut drawn: Vec<(u64, f64)> = finite.iter().copied().step_by(stride).collect();
    if let Some(last) = finite.last().filter(|last| drawn.last() != Some(last)) {
        drawn.push(*last);
    }
    drawn
}

#[cfg(test)]
mod tests {
    use super::*;

    fn curve() -> Curve {
        Curve {
            train: (1..=5000).map(|step| (step, 4.0 / (1.0 + step as f64 / 500.0))).collect(),
            valid: vec![(0, 4.2), (2500, 1.0), (5000, f64::NAN)],
        }
    }

    #[test]
    fn both_pictures_show_the_curve() {
        let svg = curve().svg("a <b>").unwrap();
        assert!(svg.starts_with("<svg") && svg.trim_end().ends_with("</svg>"));
        for part in ["a &lt;b&gt;: loss by step", "training", "validation", "#0072B2", "5000"] {
            assert!(svg.contains(part), "{part}");
        }
        assert!(!svg.contains("NaN"));
        let png = curve().png("a run").unwrap();
        let mut reader = png::Decoder::new(io::Cursor::new(&png)).read_info().unwrap();
        let mut pixels = vec![0; reader.output_buffer_size().unwrap()];
        let info = reader.next_frame(&mut pixels).unwrap();
        assert_eq!((info.width, info.height), (WIDTH, HEIGHT));
        let has =
            |color: RGBColor| pixels.chunks(3).filter(|pixel| **pixel == [color.0, color.1, color.2]).count();
        assert!(has(TRAIN) > 1000 && has(VALID) > 500, "{} {}", has(TRAIN), has(VALID));
        assert!(has(RGBColor(0, 0, 0)) > 100, "letters and axes are black");
    }

    #[test]
    fn one_point_is_enough_and_none_is_not() {
        assert!(matches!(Curve::default().svg("x"), Err(ChartError::Empty)));
        let one = Curve { train: vec![(3, 0.0)], valid: Vec::new() };
        assert!(one.svg("x").unwrap().contains("training"));
        assert!(!one.png("\u{1}é x").unwrap().is_empty());
    }

    #[test]
    fn long_runs_are_thinned_but_keep_their_end() {
        let points: Vec<_> = (0..100_000).map(|step| (step, 1.0)).collect();
        let thin = drawn(&points);
        assert!(thin.len() <= MOST_POINTS + 1);
        assert_eq!(thin.last(), Some(&(99_999, 1.0)));
    }
}
