//! The losses of a job in a bounded number of points.

use serde::{Deserialize, Serialize};

/// Most points that are kept. Beyond, every other one goes: the shape stays.
pub const MAX_POINTS: usize = 512;

/// What the loss was after a step.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct LossPoint {
    /// After so many steps.
    pub step: u64,
    /// Mean loss over the tokens that were learned from, in nats.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub training: Option<f64>,
    /// Mean loss over the rows that are held back, in nats.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub validation: Option<f64>,
}

/// Points in the order of steps, at most [`MAX_POINTS`].
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Curve {
    points: Vec<LossPoint>,
}

impl Curve {
    /// Adds a point. What is not a finite number, or is not after the last step, is left out; a validation joins its step's point.
    pub fn push(&mut self, point: LossPoint) {
        let finite = |loss: Option<f64>| loss.filter(|loss| loss.is_finite());
        let point =
            LossPoint { training: finite(point.training), validation: finite(point.validation), ..point };
        if point.training.is_none() && point.validation.is_none() {
            return;
        }
        match self.points.last_mut() {
            Some(last) if last.step == point.step => {
                last.training = point.training.or(last.training);
                last.validation = point.validation.or(last.validation);
            }
            Some(last) if last.step > point.step => {}
            _ => self.points.push(point),
        }
        if self.points.len() > MAX_POINTS {
            self.thin();
        }
    }

    /// Forgets what came after this step: it is done again.
    pub fn cut_after(&mut self, step: u64) {
        self.points.retain(|point| point.step <= step);
    }

    /// All points.
    pub fn points(&self) -> &[LossPoint] {
        &self.points
    }

    /// Validations are few and mean most: they go only when there would be too many points all the same.
    fn thin(&mut self) {
        let last = self.points.len() - 1;
        let halve = |points: &mut Vec<LossPoint>, keeps_validations: bool| {
            let mut place = 0;
            points.retain(|point| {
                place += 1;
                let kept = keeps_validations && point.validation.is_some();
                kept || (place - 1) % 2 == 0 || place - 1 == last
            });
        };
        halve(&mut self.points, true);
        if self.points.len() > MAX_POINTS * 3 / 4 {
            let mut place = 0;
            self.points.retain(|_| {
                place += 1;
                (place - 1) % 2 == 0
            });
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(step: u64, training: f64) -> LossPoint {
        LossPoint { step, training: Some(training), validation: None }
    }

    #[test]
    fn a_long_curve_is_thinned_and_keeps_its_order_its_ends_and_its_validations() {
        let mut curve = Curve::default();
        for step in 1..=10_000 {
            curve.push(at(step, 1.0 / step as f64));
            if step % 1000 == 0 {
                curve.push(LossPoint { step, training: None, validation: Some(0.5) });
            }
            assert!(curve.points().len() <= MAX_POINTS);
        }
        let points = curve.points();
        assert!(points.windows(2).all(|pair| pair[0].step < pair[1].step));
        assert!(points.len() >= MAX_POINTS / 4);
        assert_eq!((points[0].step, points[points.len() - 1].step), (1, 10_000));
        assert_eq!(points.iter().filter(|point| point.validation.is_some()).count(), 10);
    }

    #[test]
    fn only_validations_are_bounded_too() {
        let mut curve = Curve::default();
        for step in 0..5000 {
            curve.push(LossPoint { step, training: None, validation: Some(1.0) });
            assert!(curve.points().len() <= MAX_POINTS);
        }
    }

    #[test]
    fn what_is_done_again_is_forgotten_and_what_is_no_number_left_out() {
        let mut curve = Curve::default();
        for step in 1..=10 {
            curve.push(at(step, 1.0));
        }
        curve.push(at(11, f64::NAN));
        curve.push(at(3, 9.0));
        curve.cut_after(5);
        assert_eq!(curve.points().len(), 5);
        curve.push(at(6, 2.0));
        assert_eq!(curve.points()[5].training, Some(2.0));
    }
}
