//! Routers of mixtures of experts: which experts work on a token, and with what weights.
//!
//! Every variant of mlx-lm 0.32.2 in its order of operations and element types, so that half precision rounds and ties fall as there.

use crate::linear::Linear;
use mlxnode_checkpoint::{GroupScore, Groups, Normalization, Outside, Routing, Scores, WeightPrecision};
use mlxnode_mlx::{Array, Device, Dtype, Error, Function, Result};
use std::cell::OnceCell;

/// Most tokens whose choice is compiled: those of a batch's step. Prompts come in too many lengths, each of which would be kept.
const MOST_COMPILED: i32 = 64;

/// The router of one block.
pub(crate) struct Router {
    pub(crate) linear: Linear,
    /// Its input is made single precision first.
    pub(crate) single_precision: bool,
    pub(crate) choice: Choice,
    /// The choice as one operation, where the device fuses.
    pub(crate) compiled: OnceCell<Function>,
    /// `[experts]`, when the routing has one.
    pub(crate) correction: Option<Array>,
    /// How many there are; choices from there on are identities.
    pub(crate) experts: i32,
}

/// From logits to experts and their weights.
#[derive(Clone, Copy)]
pub(crate) struct Choice {
    pub(crate) routing: Routing,
    pub(crate) per_token: i32,
}

impl Router {
    /// The chosen experts and their weights, both `[1, tokens, per_token]`, of `[1, tokens, hidden]`.
    pub(crate) fn choose(&self, device: &Device, x: &Array) -> Result<(Array, Array)> {
        let logits = match self.single_precision {
            true => self.linear.forward(device, &device.cast(x, Dtype::F32)?)?,
            false => self.linear.forward(device, x)?,
        };
        let (chosen, weights) = match device.fuses() && x.dim(1) <= MOST_COMPILED && !device.is_tracing() {
            true => self.compiled(&logits)?,
            false => self.choice.of(device, &logits, self.correction.as_ref())?,
        };
        let weights = match self.choice.routing.precision {
            WeightPrecision::WeightsRounded => device.cast(&weights, x.dtype())?,
            WeightPrecision::SumInSingle => device.cast(&weights, Dtype::F32)?,
            WeightPrecision::SumRounded | WeightPrecision::SumAsIs => weights,
        };
        Ok((chosen, weights))
    }

    /// The same as [`Choice::of`] in one operation.
    fn compiled(&self, logits: &Array) -> Result<(Array, Array)> {
        let function = match self.compiled.get() {
            Some(function) => function,
            None => {
                let choice = self.choice;
                let function = Function::new(move |device, inputs| {
                    let (logits, correction) = match inputs {
                        [logits, correction] => (logits, Some(*correction)),
                        [logits] => (logits, None),
                        _ => return Err(Error::Mlx("a router has logits and a correction".to_owned())),
                    };
                    let (chosen, weights) = choice.of(device, logits, correction)?;
                    Ok(vec![chosen, weights])
                })?;
                self.compiled.get_or_init(|| function)
            }
        };
        let made = match &self.correction {
            Some(correction) => function.apply(&[logits, correction])?,
            None => function.apply(&[logits])?,
        };
        let parts = <[Array; 2]>::try_from(made);
        parts.map(<(Array, Array)>::from).map_err(|_| Error::Mlx("a choice has two parts".to_owned()))
    }
}

impl Choice {
    /// The chosen experts and their weights, both `[1, tokens, per_token]`, of `[1, tokens, experts]`.
    fn of(&self, device: &Device, logits: &Array, correction: Option<&Array>) -> Result<(Array, Array)> {
        let logits = match self.routing.single_precision {
            true => device.cast(logits, Dtype::F32)?,
            false => logits.clone(),
        };
        let logits = match self.routing.cap {
            Some(cap) => {
                let cap = Array::scalar(cap, logits.dtype())?;
                device.multiply(&device.tanh(&device.divide(&logits, &cap)?)?, &cap)?
            }
            None => logits,
        };
        let scores = match self.routing.scores {
            Scores::SparseMixer { reach } => return self.one_by_one(device, &logits, reach),
            Scores::Softmax => device.softmax(&logits, -1, true)?,
            Scores::RoundedSoftmax => device.softmax(&logits, -1, false)?,
            Scores::Sigmoid => device.sigmoid(&logits)?,
            Scores::RootOfSoftplus => device.sqrt(&device.softplus(&logits)?)?,
            Scores::SoftmaxOfChosen | Scores::SigmoidOfChosen => logits,
        };
        let chosen = self.largest(device, &self.for_choice(device, &scores, correction)?)?;
        let weights = self.weights(device, &device.take_along(&scores, &chosen, -1)?)?;
        Ok((chosen, weights))
    }

    /// One expert after the other, each with its part in the softmax over those close to it.
    fn one_by_one(&self, device: &Device, logits: &Array, reach: f32) -> Result<(Array, Array)> {
        let number = |value: f32| Array::scalar(value, logits.dtype());
        let (nothing, reach) = (number(f32::NEG_INFINITY)?, number(reach)?);
        let sizes = device.abs(logits)?;
        let mut left = logits.clone();
        let (mut chosen, mut weights) = (Vec::new(), Vec::new());
        for choice in 1..=self.per_token {
            let top = device.max(&left, -1, true)?;
            let index = device.argmax(&left, -1, true)?;
            let distance = device.divide(&device.subtract(&top, logits)?, &device.maximum(&sizes, &top)?)?;
            let close = device.select(&device.greater(&distance, &reach)?, &nothing, &left)?;
            let parts = device.softmax(&close, -1, true)?;
            weights.push(device.take_along(&parts, &index, -1)?);
            if choice < self.per_token {
                left = device.put_along(&left, &index, &nothing, -1)?;
            }
            chosen.push(index);
        }
        Ok((device.concatenate(&chosen, -1)?, device.concatenate(&weights, -1)?))
    }

    /// The scores by which experts are chosen, `[1, tokens, experts]`.
    fn for_choice(&self, device: &Device, scores: &Array, correction: Option<&Array>) -> Result<Array> {
        let scores = match (correction, self.routing.correction) {
            (Some(correction), Some(how)) if how.in_type_of_scores => {
                device.add(scores, &device.cast(correction, scores.dtype())?)?
            }
            (Some(correction), _) => device.add(&device.cast(scores, Dtype::F32)?, correction)?,
            (None, _) => scores.clone(),
        };
        match self.routing.groups {
            // Nothing to rule out when all groups stay.
            Some(groups) if groups.kept < groups.count => within_best_groups(device, &scores, groups),
            _ => Ok(scores),
        }
    }

    /// The experts with the largest scores, in no particular order.
    fn largest(&self, device: &Device, scores: &Array) -> Result<Array> {
        let (tokens, experts, chosen) = (scores.dim(1), scores.dim(2), self.per_token);
        if self.routing.from_end {
            let order = device.argpartition(scores, experts - chosen, -1)?;
            return device.slice(&order, &[0, 0, experts - chosen], &[1, tokens, experts]);
        }
        let order = device.argpartition(&device.negative(scores)?, chosen - 1, -1)?;
        device.slice(&order, &[0, 0, 0], &[1, tokens, chosen])
    }

    /// From the chosen experts' scores to their weights.
    fn weights(&self, device: &Device, scores: &Array) -> Result<Array> {
        if self.routing.scores == Scores::SoftmaxOfChosen {
            return device.softmax(scores, -1, true);
        }
        if self.routing.scores == Scores::SigmoidOfChosen {
            return device.sigmoid(&device.cast(scores, Dtype::F32)?);
        }
        let number = |value: f32| Array::scalar(value, scores.dtype());
        let sum = || device.sum(scores, -1, true);
        let weights = match self.routing.normalization {
            Normalization::None => scores.clone(),
            Normalization::Sum => device.divide(scores, &sum()?)?,
            Normalization::SumPlus(more) => device.divide(scores, &device.add(&sum()?, &number(more)?)?)?,
            Normalization::SumAtLeast(least) => {
                device.divide(scores, &device.maximum(&sum()?, &number(least)?)?)?
            }
        };
        match self.routing.scale {
            Some(scale) => device.multiply(&weights, &number(scale)?),
            None => Ok(weights),
        }
    }
}

/// The scores with another one for the experts outside of the best groups.
fn within_best_groups(device: &Device, scores: &Array, groups: Groups) -> Result<Array> {
    let (tokens, experts) = (scores.dim(1), scores.dim(2));
    let (count, ruled_out) = (groups.count as i32, (groups.count - groups.kept) as i32);
    let size = experts / count;
    let grouped = device.reshape(scores, &[1, tokens, count, size])?;
    let of_group = match groups.score {
        GroupScore::Largest => device.max(&grouped, -1, true)?,
        GroupScore::TwoLargest => {
            let best = device.partition(&grouped, size - 2, -1)?;
            let best = device.slice(&best, &[0, 0, 0, size - 2], &[1, tokens, count, size])?;
            device.sum(&best, -1, true)?
        }
    };
    let worst = device.argpartition(&of_group, ruled_out - 1, -2)?;
    let worst = device.slice(&worst, &[0; 4], &[1, tokens, ruled_out, 1])?;
    let nothing = match groups.outside {
        Outside::Zero => 0.0,
        Outside::Never => f32::NEG_INFINITY,
    };
    let nothing = Array::scalar(nothing, scores.dtype())?;
    let kept = device.put_along(&grouped, &worst, &nothing, -2)?;
    device.reshape(&kept, &[1, tokens, experts])
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::linear::Weight;
    use mlxnode_checkpoint::Correction;

    /// The experts in order of their weights, and those, for a router that passes its input on.
    fn chosen(routing: Routing, correction: Option<&[f32]>, logits: &[f32]) -> (Vec<u32>, Vec<f32>) {
        let device = Device::open().unwrap();
        let experts = logits.len() as i32;
        let identity: Vec<f32> = (0..experts * experts).map(|i| f32::from(i % (experts + 1) == 0)).collect();
        let weight = Array::from_f32(&identity, &[experts, experts]).unwrap();
        let router = Router {
            linear: Linear {
                weight: Weight::dense(&device, &weight).unwrap(),
                bias: None,
                changes: crate::adapters::Slot::new(std::rc::Rc::default()),
            },
            single_precision: false,
            choice: Choice { routing, per_token: 2 },
            compiled: OnceCell::new(),
            correction: correction.map(|values| Array::from_f32(values, &[experts]).unwrap()),
            experts,
        };
        let x = Array::from_f32(logits, &[1, 1, experts]).unwrap();
        let numbers = |(chosen, weights): (Array, Array)| {
            let chosen = device.contiguous(&chosen).unwrap().to_u32().unwrap();
            (chosen, device.contiguous(&weights).unwrap().to_f32().unwrap())
        };
        let (chosen, weights) = numbers(router.choose(&device, &x).unwrap());
        device.set_fusing(true);
        let before = device.counts();
        let compiled = router.choose(&device, &x).unwrap();
        assert_eq!((device.counts() - before).operations, 2, "the map and the choice");
        device.set_fusing(false);
        assert_eq!(numbers(compiled), (chosen.clone(), weights.clone()));
        let mut pairs: Vec<_> = chosen.into_iter().zip(weights).collect();
        pairs.sort_by(|left, right| right.1.total_cmp(&left.1));
        pairs.into_iter().unzip()
    }

    #[test]
    fn a_correction_chooses_but_does_not_weigh() {
        let routing = Routing {
            normalization: Normalization::Sum,
            scale: Some(3.0),
            correction: Some(Correction::named("bias")),
            ..Routing::CORRECTED
        };
        let (experts, weights) = chosen(routing, Some(&[0.0, 0.0, 0.9, 0.0]), &[2.0, 0.0, -2.0, 1.0]);
        assert_eq!(experts, [0, 2]);
        let sigmoid = |x: f32| 1.0 / (1.0 + (-x).exp());
        let sum = sigmoid(2.0) + sigmoid(-2.0);
        for (weight, logit) in weights.into_iter().zip([2.0, -2.0]) {
            assert!((weight - 3.0 * sigmoid(logit) / sum).abs() < 1e-5);
        }
    }

    #[test]
    fn a_sparse_mixer_weighs_each_choice_against_those_close_below_it() {
        let routing = |reach| Routing { scores: Scores::SparseMixer { reach }, ..Routing::ALL };
        let logits = [1.0, 4.0, 3.0, -2.0];
        let exp = f32::exp;
        // From 4, 3 is a quarter away and 1 three quarters; from 3, 1 is two thirds away; -2 is further from both.
        for (reach, first, second) in [
            (0.1, 1.0, 1.0),
            (0.3, exp(4.0) / (exp(4.0) + exp(3.0)), 1.0),
            (0.7, exp(4.0) / (exp(4.0) + exp(3.0)), exp(3.0) / (exp(3.0) + exp(1.0))),
        ] {
            let (experts, weights) = chosen(routing(reach), None, &logits);
            let mut expected = [(1, first), (2, second)];
            expected.sort_by(|left, right| right.1.total_cmp(&left.1));
            for ((expert, weight), (of, expected)) in experts.into_iter().zip(weights).zip(expected) {
                assert_eq!(expert, of, "{reach}");
                assert!((weight - expected).abs() < 1e-6, "{reach}: {weight} and {expected}");
            }
        }
    }

    #[test]
    fn experts_outside_of_the_best_groups_are_not_chosen() {
        // By the sum of two the first group wins, by the largest the second.
        let logits = [1.0, 1.2, 2.0, -9.0];
        let by = |score| Routing {
            groups: Some(Groups { count: 2, kept: 1, score, outside: Outside::Zero }),
            correction: None,
            ..Routing::CORRECTED
        };
        assert_eq!(chosen(by(GroupScore::TwoLargest), None, &logits).0, [1, 0]);
        assert_eq!(chosen(by(GroupScore::Largest), None, &logits).0, [2, 3]);
        let all = Routing {
            groups: Some(Groups { count: 2, kept: 2, score: GroupScore::Largest, outside: Outside::Zero }),
            ..by(GroupScore::Largest)
        };
        assert_eq!(chosen(all, None, &logits).0, [2, 1]);
    }
}
