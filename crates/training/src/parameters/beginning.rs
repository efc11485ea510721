//! What trained arrays begin with.

use super::ParameterError;
use mlxnode_engine::tuning::{Trained, Tuner};
use mlxnode_mlx::{Array, RandomKey, TensorFile};
use std::path::Path;

/// What training begins with.
pub struct Beginning {
    /// The arrays, in the tuner's order.
    pub arrays: Vec<Array>,
    /// Those with which the model does what it did before any training.
    pub reference: Vec<Array>,
}

/// The first values: of low-rank changes `A` uniform within one over the root of the inputs and `B` zero, drawn as mlx-lm draws them
/// for this seed; of all else the model's own.
///
/// # Errors
///
/// MLX's.
pub fn begin(tuner: &Tuner, seed: u64) -> Result<Beginning, ParameterError> {
    begin_part(tuner, seed, &(0..tuner.trained().len()).collect::<Vec<_>>())
}

/// The same of a part of a model, as the whole model's draws give it: `modules` says of each module with changes of low rank, in the tuner's order,
/// which of the whole model's it is. They come in the same order there.
pub(crate) fn begin_part(tuner: &Tuner, seed: u64, modules: &[usize]) -> Result<Beginning, ParameterError> {
    let device = tuner.device();
    let mut key = RandomKey::new(seed);
    let mut drawn = 0;
    let mut next = || {
        let (chain, used) = key.split();
        key = chain;
        drawn += 1;
        (drawn, used)
    };
    let mut modules = modules.iter();
    let mut arrays = Vec::with_capacity(tuner.trained().len());
    for (place, trained) in tuner.trained().iter().enumerate() {
        let shape = sizes(trained);
        arrays.push(match tuner.beginning(place) {
            Some(beginning) => beginning.clone(),
            None if trained.name.ends_with(".lora_a") => {
                // mlx-lm makes a map of its own beside each change, whose weight takes a draw.
                let number = 2 * (modules.next().copied().unwrap_or_default() + 1);
                let used = loop {
                    let (drawn, used) = next();
                    if drawn >= number {
                        break used;
                    }
                };
                let inputs = match trained.shape.as_slice() {
                    [inputs, _] | [_, _, inputs] => *inputs,
                    _ => 1,
                };
                let bound = (1.0 / (inputs as f64).sqrt()) as f32;
                device.uniform_between(-bound, bound, &shape, used)?
            }
            None => device.zeros(&shape, trained.dtype)?,
        });
    }
    device.eval(&arrays)?;
    Ok(Beginning { reference: arrays.clone(), arrays })
}

/// `arrays` with those replaced that a file of mlx-lm's or ours has.
///
/// # Errors
///
/// When the file has an array that is not trained, or one of another shape.
pub fn resume(tuner: &Tuner, beginning: Beginning, file: &Path) -> Result<Beginning, ParameterError> {
    let device = tuner.device();
    let problem = |problems: String| ParameterError::Resume { file: file.display().to_string(), problems };
    let mut tensors = TensorFile::open(device, file).map_err(|error| problem(error.to_string()))?;
    let names: Vec<String> = tensors.names().map(str::to_owned).collect();
    let known = |name: &String| tuner.trained().iter().any(|trained| trained.stored == *name);
    let foreign: Vec<&str> = names.iter().filter(|name| !known(name)).map(String::as_str).collect();
    if !foreign.is_empty() {
        return Err(problem(format!("{} is not trained here", listed(&foreign))));
    }
    let Beginning { mut arrays, reference } = beginning;
    for (array, trained) in arrays.iter_mut().zip(tuner.trained()) {
        if !names.contains(&trained.stored) {
            continue;
        }
        let stored = tensors.take(&trained.stored)?;
        if stored.shape() != array.shape() {
            let (found, needed) = (stored.shape(), array.shape());
            return Err(problem(format!("{} has shape {found:?}, but {needed:?} is needed", trained.stored)));
        }
        *array = device.cast(&stored, trained.dtype)?;
    }
    device.eval(&arrays)?;
    Ok(Beginning { arrays, reference })
}

fn listed(names: &[&str]) -> String {
    const MOST: usize = 5;
    let mut text = names.iter().take(MOST).copied().collect::<Vec<_>>().join(", ");
    if names.len() > MOST {
        text += &format!(" (and {} more)", names.len() - MOST);
    }
    text
}

fn sizes(trained: &Trained) -> Vec<i32> {
    trained.shape.iter().map(|size| i32::try_from(*size).unwrap_or(i32::MAX)).collect()
}
