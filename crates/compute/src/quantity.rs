//! Quantities with their unit in the type.

use serde::{Deserialize, Serialize};
use std::fmt;
use std::ops::{Add, AddAssign, Sub};

/// A contiguous range of a model's layers, `start` included, `end` not.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct LayerRange {
    /// First layer.
    pub start: usize,
    /// One past the last layer.
    pub end: usize,
}

impl LayerRange {
    /// Layers `start..end`.
    pub fn new(start: usize, end: usize) -> Self {
        Self { start, end }
    }

    /// How many layers.
    pub fn len(self) -> usize {
        self.end.saturating_sub(self.start)
    }

    /// No layer at all.
    pub fn is_empty(self) -> bool {
        self.len() == 0
    }

    /// Is `layer` one of these?
    pub fn contains(self, layer: usize) -> bool {
        (self.start..self.end).contains(&layer)
    }

    /// Does the range begin the model, so that it owns the embedding?
    pub fn is_first(self) -> bool {
        self.start == 0
    }

    /// Does the range end a model of `layers` layers, so that it owns the final norm and the head?
    pub fn is_last(self, layers: usize) -> bool {
        self.end == layers
    }
}

impl fmt::Display for LayerRange {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(out, "{}..{}", self.start, self.end)
    }
}

/// A number of bytes. Displays with a decimal unit, as Macs show memory and files ("1.5 GB").
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct ByteCount(pub u64);

impl ByteCount {
    /// `self - other`, or zero.
    pub fn saturating_sub(self, other: Self) -> Self {
        Self(self.0.saturating_sub(other.0))
    }
}

impl Add for ByteCount {
    type Output = Self;
    fn add(self, other: Self) -> Self {
        Self(self.0.saturating_add(other.0))
    }
}

impl Sub for ByteCount {
    type Output = Self;
    fn sub(self, other: Self) -> Self {
        self.saturating_sub(other)
    }
}

impl AddAssign for ByteCount {
    fn add_assign(&mut self, other: Self) {
        *self = *self + other;
    }
}

impl std::iter::Sum for ByteCount {
    fn sum<I: Iterator<Item = Self>>(counts: I) -> Self {
        counts.fold(Self(0), |sum, count| sum + count)
    }
}

impl fmt::Display for ByteCount {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        const UNITS: [&str; 5] = ["B", "kB", "MB", "GB", "TB"];
        let mut value = self.0 as f64;
        let mut unit = 0;
        while value >= 999.5 && unit + 1 < UNITS.len() {
            value /= 1000.0;
            unit += 1;
        }
        if unit == 0 || value >= 99.95 {
            write!(out, "{value:.0} {}", UNITS[unit])
        } else {
            write!(out, "{value:.1} {}", UNITS[unit])
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_read_like_a_person_writes_them() {
        let cases =
            [(0, "0 B"), (999, "999 B"), (1_500, "1.5 kB"), (64_000_000_000, "64.0 GB"), (999_999, "1.0 MB")];
        for (bytes, text) in cases {
            assert_eq!(ByteCount(bytes).to_string(), text);
        }
    }
}
