//! What was measured, as a table for people and as JSON.

use super::statistics::Spread;
use anyhow::Result;
use serde::Serialize;
use std::fmt::Write as _;

/// The result of one benchmark.
#[derive(Debug, Serialize)]
pub(super) struct Report {
    /// Its name on the command line.
    pub(super) bench: &'static str,
    /// What the first column of figures is, and what it is compared with.
    pub(super) ours: &'static str,
    pub(super) base: &'static str,
    /// How it was measured: a sentence each.
    pub(super) notes: Vec<String>,
    pub(super) rows: Vec<Row>,
}

/// One measure of one subject.
#[derive(Debug, Serialize)]
pub(super) struct Row {
    /// Such as `t-f32`.
    pub(super) subject: String,
    /// Such as `decode`.
    pub(super) measure: String,
    pub(super) unit: Unit,
    pub(super) ours: Spread,
    /// What it is compared with; none when the figure stands for itself.
    pub(super) base: Option<Spread>,
    /// Ours divided by base.
    pub(super) ratio: Option<Spread>,
    pub(super) target: Option<Target>,
    pub(super) verdict: Option<&'static str>,
}

#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum Unit {
    TokensPerSecond,
    TokensPerCpuSecond,
    MegabytesPerSecond,
    Milliseconds,
    Microseconds,
    Mebibytes,
    Seconds,
    /// Of a whole.
    Percent,
    /// A plain factor.
    Times,
    /// A plain number.
    Count,
}

/// A limit for the median of the ratio, or of our figure where there is no ratio.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum Target {
    AtLeast(f64),
    AtMost(f64),
}

impl Row {
    /// Runs of ours and of what they are compared with, in the order they were measured.
    pub(super) fn compared(
        subject: &str,
        measure: &str,
        unit: Unit,
        (ours, base): (&[f64], &[f64]),
        target: Option<Target>,
    ) -> Result<Self> {
        let ratio = Spread::of_ratios(ours, base)?;
        Ok(Self {
            base: Some(Spread::of(base)?),
            ratio: Some(ratio),
            target,
            verdict: target.map(|target| target.verdict(ratio.median)),
            ..Self::alone(subject, measure, unit, ours, None)?
        })
    }

    /// Runs of a figure that stands for itself.
    pub(super) fn alone(
        subject: &str,
        measure: &str,
        unit: Unit,
        ours: &[f64],
        target: Option<Target>,
    ) -> Result<Self> {
        let ours = Spread::of(ours)?;
        let verdict = target.map(|target| target.verdict(ours.median));
        let (subject, measure) = (subject.to_owned(), measure.to_owned());
        Ok(Self { subject, measure, unit, ours, base: None, ratio: None, target, verdict })
    }
}

impl Target {
    fn verdict(self, value: f64) -> &'static str {
        let met = match self {
            Self::AtLeast(limit) => value >= limit,
            Self::AtMost(limit) => value <= limit,
        };
        if met { "met" } else { "missed" }
    }
}

impl Report {
    /// Columns of equal width, readable in a terminal and as Markdown.
    pub(super) fn table(&self) -> String {
        table((self.ours, self.base), &self.rows)
    }
}

/// Rows of a bench on their way: each group is said on stderr as soon as it is there, since whatever interrupts a bench of an hour should
/// leave what it measured before.
pub(super) struct Collected {
    sides: (&'static str, &'static str),
    rows: Vec<Row>,
}

impl Collected {
    /// None yet, of ours and of what it is compared with.
    pub(super) fn new(ours: &'static str, base: &'static str) -> Self {
        Self { sides: (ours, base), rows: Vec::new() }
    }

    pub(super) fn add(&mut self, mut rows: Vec<Row>) {
        eprint!("{}", table(self.sides, &rows));
        self.rows.append(&mut rows);
    }

    pub(super) fn into_report(self, bench: &'static str, notes: Vec<String>) -> Report {
        let (ours, base) = self.sides;
        Report { bench, ours, base, notes, rows: self.rows }
    }
}

fn table((ours, base): (&str, &str), rows: &[Row]) -> String {
    let mut lines = vec![["", "measure", ours, base, "ratio [min–max]", "target", ""].map(str::to_owned)];
    lines.push(lines[0].clone().map(|_| "---".to_owned()));
    for row in rows {
        let number = |spread: &Spread| row.unit.show(spread.median);
        let ratio = row.ratio.map(|ratio| format!("{:.2} [{:.2}–{:.2}]", ratio.median, ratio.min, ratio.max));
        let range = || format!("[{}–{}]", row.unit.figure(row.ours.min), row.unit.figure(row.ours.max));
        let factor = if row.ratio.is_some() { Unit::Times } else { row.unit };
        let target = row.target.map(|target| match target {
            Target::AtLeast(limit) => format!("≥ {}", factor.show(limit)),
            Target::AtMost(limit) => format!("≤ {}", factor.show(limit)),
        });
        lines.push([
            row.subject.clone(),
            row.measure.clone(),
            number(&row.ours),
            row.base.as_ref().map(number).unwrap_or_default(),
            ratio.unwrap_or_else(range),
            target.unwrap_or_default(),
            row.verdict.unwrap_or_default().to_owned(),
        ]);
    }
    let mut widths = [0; 7];
    for line in &lines {
        for (width, cell) in widths.iter_mut().zip(line) {
            *width = (*width).max(cell.chars().count());
        }
    }
    let mut text = String::new();
    for line in &lines {
        for (width, cell) in widths.iter().zip(line) {
            let filler = if cell == "---" { "-" } else { " " };
            let padding = filler.repeat(width.saturating_sub(cell.chars().count()));
            let _ = write!(text, "| {cell}{padding} "); // writing to a String does not fail
        }
        text.push_str("|\n");
    }
    text
}

impl Unit {
    fn show(self, value: f64) -> String {
        let figure = self.figure(value);
        match self {
            Self::TokensPerSecond => format!("{figure} tok/s"),
            Self::TokensPerCpuSecond => format!("{figure} tok/CPU-s"),
            Self::MegabytesPerSecond => format!("{figure} MB/s"),
            Self::Milliseconds => format!("{figure} ms"),
            Self::Microseconds => format!("{figure} µs"),
            Self::Mebibytes => format!("{figure} MiB"),
            Self::Seconds => format!("{figure} s"),
            Self::Percent => format!("{figure}%"),
            Self::Times => format!("{value:.2}x"),
            Self::Count => figure,
        }
    }

    /// Three digits that count.
    fn figure(self, value: f64) -> String {
        match value.abs() {
            large if large >= 100.0 => format!("{value:.0}"),
            middle if middle >= 10.0 => format!("{value:.1}"),
            _ => format!("{value:.2}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn judges_the_median_of_the_ratio() {
        let target = Some(Target::AtLeast(1.2));
        let row =
            |ours: &[f64]| Row::compared("t", "decode", Unit::TokensPerSecond, (ours, &[100.0; 3]), target);
        assert_eq!(row(&[90.0, 125.0, 130.0]).unwrap().verdict, Some("met"));
        assert_eq!(row(&[90.0, 110.0, 130.0]).unwrap().verdict, Some("missed"));
        let start =
            Row::alone("node", "start", Unit::Milliseconds, &[400.0], Some(Target::AtMost(1000.0))).unwrap();
        assert_eq!(start.verdict, Some("met"));
    }

    #[test]
    fn the_table_is_aligned_and_names_what_is_compared() {
        let rows = vec![
            Row::compared(
                "t-f32",
                "decode",
                Unit::TokensPerSecond,
                (&[1500.0], &[1000.0]),
                Some(Target::AtLeast(1.2)),
            )
            .unwrap(),
            Row::alone("node", "start", Unit::Milliseconds, &[0.25], None).unwrap(),
        ];
        let table = Report { bench: "engine", ours: "mlxnode", base: "mlx-lm", notes: vec![], rows }.table();
        let lines: Vec<&str> = table.lines().collect();
        assert!(lines[0].contains("mlxnode") && lines[0].contains("mlx-lm"));
        assert!(lines[2].contains("1500 tok/s") && lines[2].contains("1.50 [1.50–1.50]"), "{table}");
        assert!(lines[2].contains("≥ 1.20x") && lines[2].contains("met"), "{table}");
        assert!(lines[3].contains("0.25 ms") && !lines[3].contains("met"), "{table}");
        let width = lines[0].chars().count();
        assert!(lines.iter().all(|line| line.chars().count() == width), "{table}");
    }
}
