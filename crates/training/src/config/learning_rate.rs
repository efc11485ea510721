//! The course of the learning rate, as mlx-lm's `lr_schedule` describes it.

use super::ConfigError;
use super::defaults::Values;
use super::settings;
use crate::schedule::{Schedule, Shape};
use serde_json::Value;

/// `lr_schedule`, or else `learning_rate` for all of the run.
pub(super) fn schedule(values: Values<'_>) -> Result<Schedule, ConfigError> {
    let rate =
        values.get("learning_rate", |section, key| section.number(key, "0 or more", |rate| rate >= 0.0))?;
    let Some(section) = values.given.section("lr_schedule")? else { return Ok(Schedule::constant(rate)) };
    section.only(&["name", "arguments", "warmup", "warmup_init"])?;
    let Some(name) = section.text("name")? else {
        return Err(section
            .wrong("name", "is missing: exponential_decay, step_decay, cosine_decay or linear_schedule"));
    };
    let arguments: Option<Vec<f64>> = match section.list("arguments")? {
        None => {
            return Err(
                section.wrong("arguments", "is missing: a list that begins with the first learning rate")
            );
        }
        Some(list) => list.iter().map(Value::as_f64).collect(),
    };
    let arguments = arguments.ok_or_else(|| section.wrong("arguments", "must be a list of numbers"))?;
    let whole = |number: f64| {
        let is_count = number >= 1.0 && number.fract() == 0.0 && number < 1e12;
        let wrong = || {
            section.wrong("arguments", format!("has {number}, but a number of steps is whole and 1 or more"))
        };
        if is_count { Ok(number as u64) } else { Err(wrong()) }
    };
    let shape = match (name, arguments[..].as_ref()) {
        ("exponential_decay", &[init, decay_rate]) => Shape::ExponentialDecay { init, decay_rate },
        ("step_decay", &[init, decay_rate, step_size]) => {
            Shape::StepDecay { init, decay_rate, step_size: whole(step_size)? }
        }
        ("cosine_decay", &[init, steps]) => Shape::CosineDecay { init, decay_steps: whole(steps)?, end: 0.0 },
        ("cosine_decay", &[init, steps, end]) => Shape::CosineDecay { init, decay_steps: whole(steps)?, end },
        ("linear_schedule", &[init, end, steps]) => Shape::Linear { init, end, steps: whole(steps)? },
        (known @ ("exponential_decay" | "step_decay" | "cosine_decay" | "linear_schedule"), given) => {
            let needed = match known {
                "exponential_decay" => "init, decay_rate",
                "step_decay" => "init, decay_rate, step_size",
                "cosine_decay" => "init, decay_steps and perhaps end",
                _ => "init, end, steps",
            };
            let problem = format!("has {} numbers, but {known} takes {needed}", given.len());
            return Err(section.wrong("arguments", problem));
        }
        (other, _) => {
            let names = ["exponential_decay", "step_decay", "cosine_decay", "linear_schedule"];
            let near = settings::nearest(other, &names);
            let near = near.map_or_else(String::new, |near| format!("; did you mean {near:?}?"));
            let problem = format!("is {other:?}, but must be one of {}{near}", names.join(", "));
            return Err(section.wrong("name", problem));
        }
    };
    let warmup = section.count("warmup", 0)?.unwrap_or(0);
    let init = section.number("warmup_init", "0 or more", |init| init >= 0.0)?.unwrap_or(0.0);
    Ok(Schedule::new(shape, warmup, init))
}
