//! Several runs of one measure, summed up: the median, and the range around it.

use anyhow::{Context as _, Result};
use serde::Serialize;

/// The middle and both ends of some values.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub(super) struct Spread {
    pub(super) median: f64,
    pub(super) min: f64,
    pub(super) max: f64,
    pub(super) runs: usize,
}

impl Spread {
    /// Of at least one value.
    pub(super) fn of(values: &[f64]) -> Result<Self> {
        let mut sorted = values.to_vec();
        sorted.sort_by(f64::total_cmp);
        let (min, max) = (*sorted.first().context("nothing was measured")?, sorted[sorted.len() - 1]);
        let upper = sorted[sorted.len() / 2];
        let lower = sorted[(sorted.len() - 1) / 2];
        Ok(Self { median: (lower + upper) / 2.0, min, max, runs: sorted.len() })
    }

    /// Of the ratios of runs that followed each other: what disturbs the machine for a while disturbs both of a pair.
    pub(super) fn of_ratios(ours: &[f64], theirs: &[f64]) -> Result<Self> {
        let ratios: Vec<f64> = ours.iter().zip(theirs).map(|(ours, theirs)| ours / theirs).collect();
        Self::of(&ratios)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_median_is_the_middle_whatever_the_order() {
        let odd = Spread::of(&[9.0, 1.0, 2.0]).unwrap();
        assert_eq!((odd.median, odd.min, odd.max, odd.runs), (2.0, 1.0, 9.0, 3));
        assert_eq!(Spread::of(&[4.0, 1.0, 2.0, 3.0]).unwrap().median, 2.5);
        assert!(Spread::of(&[]).is_err());
    }

    #[test]
    fn ratios_are_taken_pair_by_pair() {
        // The second pair ran on a machine half as fast: its ratio is the same.
        let ratio = Spread::of_ratios(&[200.0, 100.0, 220.0], &[100.0, 50.0, 100.0]).unwrap();
        assert_eq!((ratio.median, ratio.max), (2.0, 2.2));
    }
}
