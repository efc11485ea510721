//! Which optimizer, with all its arguments: names and defaults are those of mlx.optimizers.

use super::ConfigError;
use super::settings::Section;
use serde_json::Value;

/// The names of all optimizers, as `optimizer` and `optimizer_config` have them.
pub(super) const NAMES: [(&str, Name); 5] = [
    ("adam", Name::Adam),
    ("adamw", Name::AdamW),
    ("muon", Name::Muon),
    ("sgd", Name::Sgd),
    ("adafactor", Name::Adafactor),
];

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Name {
    Adam,
    AdamW,
    Muon,
    Sgd,
    Adafactor,
}

/// An optimizer and its arguments.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum OptimizerConfig {
    /// Adam (Kingma and Ba 2015).
    Adam {
        /// Decay of the means of gradients and of their squares.
        betas: (f64, f64),
        /// Added to the root below the fraction.
        eps: f64,
        /// Whether the means are corrected for having begun at zero. Not by default, as in MLX.
        bias_correction: bool,
    },
    /// Adam with weight decay apart from the gradient (Loshchilov and Hutter 2019).
    AdamW {
        /// As in Adam.
        betas: (f64, f64),
        /// As in Adam.
        eps: f64,
        /// Share of the learning rate by which weights shrink.
        weight_decay: f64,
        /// As in Adam.
        bias_correction: bool,
    },
    /// Gradient descent.
    Sgd {
        /// Share of the last update that is kept.
        momentum: f64,
        /// Share of the weight that is added to its gradient.
        weight_decay: f64,
        /// Share of the gradient that the momentum does not take.
        dampening: f64,
        /// Nesterov's momentum.
        nesterov: bool,
    },
    /// Muon: momentum made orthogonal (Jordan et al. 2024).
    Muon {
        /// Share of the last update that is kept.
        momentum: f64,
        /// Share of the weight that is added to its gradient.
        weight_decay: f64,
        /// Nesterov's momentum.
        nesterov: bool,
        /// Steps of the Newton-Schulz iteration.
        ns_steps: u32,
    },
    /// Adafactor (Shazeer and Stern 2018).
    Adafactor {
        /// Added to squared gradients; the least size of a parameter.
        eps: (f64, f64),
        /// The most that an update's root mean square may be.
        clip_threshold: f64,
        /// Exponent of the decay of means.
        decay_rate: f64,
        /// Decay of the mean of gradients; None: it is not kept.
        beta_1: Option<f64>,
        /// Share of the learning rate by which weights shrink.
        weight_decay: f64,
        /// Scale steps by the size of the parameter.
        scale_parameter: bool,
        /// Let the step follow from the number of updates.
        relative_step: bool,
        /// Begin with small steps; with `relative_step`.
        warmup_init: bool,
    },
}

impl OptimizerConfig {
    /// Reads the chosen optimizer's arguments, and checks those of the others.
    pub(super) fn read(root: &Section<'_>, chosen: Name) -> Result<Self, ConfigError> {
        let all = root.section("optimizer_config")?;
        if let Some(all) = &all {
            all.only(&NAMES.map(|(name, _)| name))?;
        }
        let mut result = None;
        for (key, name) in NAMES {
            let given = match &all {
                Some(all) => all.section(key)?,
                None => None,
            };
            let read = Self::of(name, given.as_ref())?;
            if name == chosen {
                result = Some(read);
            }
        }
        result.map_or_else(|| Self::of(chosen, None), Ok)
    }

    fn of(name: Name, given: Option<&Section<'_>>) -> Result<Self, ConfigError> {
        let known: &[&str] = match name {
            Name::Adam => &["betas", "eps", "bias_correction"],
            Name::AdamW => &["betas", "eps", "weight_decay", "bias_correction"],
            Name::Sgd => &["momentum", "weight_decay", "dampening", "nesterov"],
            Name::Muon => &["momentum", "weight_decay", "nesterov", "ns_steps"],
            Name::Adafactor => &[
                "eps",
                "clip_threshold",
                "decay_rate",
                "beta_1",
                "weight_decay",
                "scale_parameter",
                "relative_step",
                "warmup_init",
            ],
        };
        let arguments = Arguments(given);
        if let Some(given) = given {
            if given.has("learning_rate") {
                return Err(given.wrong("learning_rate", "is a key of its own at the top; take it out here"));
            }
            given.only(known)?;
        }
        let share = |number: f64| (0.0..1.0).contains(&number);
        let positive = |number: f64| number >= 0.0;
        Ok(match name {
            Name::Adam | Name::AdamW => {
                let betas = arguments.pair("betas", (0.9, 0.999), "in [0, 1)", share)?;
                let eps = arguments.number("eps", 1e-8, "0 or more", positive)?;
                let bias_correction = arguments.flag("bias_correction", false)?;
                match name {
                    Name::AdamW => {
                        let weight_decay = arguments.number("weight_decay", 0.01, "0 or more", positive)?;
                        Self::AdamW { betas, eps, weight_decay, bias_correction }
                    }
                    _ => Self::Adam { betas, eps, bias_correction },
                }
            }
            Name::Sgd => {
                let momentum = arguments.number("momentum", 0.0, "0 or more", positive)?;
                let weight_decay = arguments.number("weight_decay", 0.0, "0 or more", positive)?;
                let dampening = arguments.number("dampening", 0.0, "a number", |_| true)?;
                let nesterov = arguments.flag("nesterov", false)?;
                if let Some(given) = given.filter(|_| nesterov && (momentum <= 0.0 || dampening != 0.0)) {
                    return Err(given.wrong("nesterov", "needs a momentum and no dampening"));
                }
                Self::Sgd { momentum, weight_decay, dampening, nesterov }
            }
            Name::Muon => Self::Muon {
                momentum: arguments.number("momentum", 0.95, "0 or more", positive)?,
                weight_decay: arguments.number("weight_decay", 0.01, "0 or more", positive)?,
                nesterov: arguments.flag("nesterov", true)?,
                ns_steps: arguments.steps("ns_steps", 5)?,
            },
            Name::Adafactor => Self::Adafactor {
                eps: arguments.pair("eps", (1e-30, 1e-3), "0 or more", positive)?,
                clip_threshold: arguments.number("clip_threshold", 1.0, "above 0", |number| number > 0.0)?,
                decay_rate: arguments.number("decay_rate", -0.8, "a number", |_| true)?,
                beta_1: match given {
                    Some(given) => given.number("beta_1", "in [0, 1)", share)?,
                    None => None,
                },
                weight_decay: arguments.number("weight_decay", 0.0, "0 or more", positive)?,
                scale_parameter: arguments.flag("scale_parameter", true)?,
                relative_step: arguments.flag("relative_step", true)?,
                warmup_init: arguments.flag("warmup_init", false)?,
            },
        })
    }
}

/// Arguments that may be left out, all of them too.
struct Arguments<'a, 'b>(Option<&'b Section<'a>>);

impl Arguments<'_, '_> {
    fn number(
        &self,
        key: &str,
        default: f64,
        range: &str,
        fits: impl Fn(f64) -> bool,
    ) -> Result<f64, ConfigError> {
        let Some(given) = self.0 else { return Ok(default) };
        Ok(given.number(key, range, fits)?.unwrap_or(default))
    }

    fn flag(&self, key: &str, default: bool) -> Result<bool, ConfigError> {
        let Some(given) = self.0 else { return Ok(default) };
        Ok(given.flag(key)?.unwrap_or(default))
    }

    fn steps(&self, key: &str, default: u32) -> Result<u32, ConfigError> {
        let Some(given) = self.0 else { return Ok(default) };
        let steps = given.whole(key, 1, 100)?;
        Ok(steps.and_then(|steps| u32::try_from(steps).ok()).unwrap_or(default))
    }

    fn pair(
        &self,
        key: &str,
        default: (f64, f64),
        range: &str,
        fits: impl Fn(f64) -> bool,
    ) -> Result<(f64, f64), ConfigError> {
        let Some((given, list)) = self.0.and_then(|given| Some((given, given.list(key).transpose()?))) else {
            return Ok(default);
        };
        let numbers: Vec<f64> = list?.iter().filter_map(Value::as_f64).collect();
        match numbers[..] {
            [one, other] if fits(one) && fits(other) => Ok((one, other)),
            _ => Err(given.wrong(key, format!("must be two numbers, each {range}"))),
        }
    }
}
