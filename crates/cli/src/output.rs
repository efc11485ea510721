//! The only place that writes to stdout.

use anyhow::{Context as _, Result};
use serde::Serialize;
use std::io::{self, Write as _};

/// What `mlxnode --version` prints after the name: our release and the libmlx it runs on.
pub fn version() -> &'static str {
    concat!(env!("CARGO_PKG_VERSION"), " (libmlx 0.32.2)")
}

/// Prints one JSON value on one line, at once.
pub fn json(value: &impl Serialize) -> Result<()> {
    let mut line = serde_json::to_vec(value).context("cannot write the answer as JSON")?;
    line.push(b'\n');
    bytes(&line)
}

/// Prints a line of text.
pub fn line(text: &str) -> Result<()> {
    bytes(format!("{text}\n").as_bytes())
}

/// Prints text as it is, at once: for answers that appear word by word.
pub fn text(text: &str) -> Result<()> {
    bytes(text.as_bytes())
}

fn bytes(bytes: &[u8]) -> Result<()> {
    if bytes.is_empty() {
        return Ok(());
    }
    let mut stdout = io::stdout().lock();
    match stdout.write_all(bytes).and_then(|()| stdout.flush()) {
        // The reader has seen enough (`mlxnode … | head`): that is no failure of ours.
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => std::process::exit(0),
        result => result.context("cannot write to stdout"),
    }
}

/// Prints a table: columns as wide as their widest cell, two spaces between them, the head in capitals.
pub fn table(head: &[&str], rows: &[Vec<String>]) -> Result<()> {
    let head: Vec<String> = head.iter().map(|cell| cell.to_uppercase()).collect();
    let all: Vec<&Vec<String>> = std::iter::once(&head).chain(rows).collect();
    let widths: Vec<usize> = (0..head.len())
        .map(|column| {
            all.iter().filter_map(|row| row.get(column)).map(|cell| cell.chars().count()).max().unwrap_or(0)
        })
        .collect();
    let mut lines = String::new();
    for row in all {
        let cells: Vec<String> = row
            .iter()
            .zip(&widths)
            .map(|(cell, width)| format!("{cell}{}", " ".repeat(width - cell.chars().count())))
            .collect();
        lines.push_str(cells.join("  ").trim_end());
        lines.push('\n');
    }
    text(&lines)
}
