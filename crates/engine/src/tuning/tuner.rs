//! The function of what is trained.

use super::{Plan, Trained, TuneError, Tuning};
use crate::adapters::{Dropout, Matrices, Registry};
use crate::batch::{Batch, Row};
use crate::caches::SequenceCache;
use crate::decoder::{Decoder, Layer};
use crate::loader;
use crate::widening::Widened;
use mlxnode_compute::{CacheOptions, LayerRange};
use mlxnode_mlx::{Array, Device, Dtype, Error, Function, Result};
use std::collections::{BTreeMap, HashMap};
use std::rc::Rc;

/// A layer range as a function of the arrays that are trained. Clones share the model.
#[derive(Clone)]
pub struct Tuner {
    shared: Rc<Shared>,
    /// The results within each layer are computed again for the gradient.
    checkpointing: bool,
}

struct Shared {
    tuning: Tuning,
    plan: Plan,
    trained: Vec<Trained>,
    /// The modules, unless they are made of what is trained.
    modules: Option<(Decoder, Registry)>,
    /// For each layer of the range which trained arrays are its own.
    of_layers: Vec<Vec<usize>>,
    /// Values that training begins with, where they are the model's: tensors, and lengths of rows.
    beginnings: Vec<Option<Array>>,
    layers: LayerRange,
}

impl Tuner {
    pub(super) fn new(mut tuning: Tuning, plan: Plan) -> std::result::Result<Self, TuneError> {
        let trained = plan.arrays(&tuning)?;
        let device = tuning.device.clone();
        let (decoder, registry) =
            loader::assemble(&device, &tuning.spec, &tuning.shard, tuning.tensors.clone())?;
        let mut beginnings = vec![None; trained.len()];
        let layers = tuning.shard.layers;
        let mut modules = None;
        match &plan {
            Plan::LowRank { modules: changes, .. } => {
                if let Some(change) = changes.iter().find(|change| !registry.has(&change.path)) {
                    return Err(TuneError::Fixed { path: change.path.clone() });
                }
                let lengths = changes.iter().filter(|change| change.magnitudes);
                let places = (0..trained.len()).filter(|place| trained[*place].name.ends_with(".m"));
                for (place, change) in places.zip(lengths) {
                    let Some(lengths) = registry.row_lengths(&device, &change.path)? else {
                        return Err(TuneError::Fixed { path: change.path.clone() });
                    };
                    beginnings[place] = Some(lengths);
                }
                device.eval(beginnings.iter().flatten())?;
                modules = Some((decoder, registry));
            }
            // As good as changes of low rank, without any.
            Plan::Weights(names) if names.is_empty() => modules = Some((decoder, registry)),
            Plan::Weights(names) => {
                // They live on as what is trained only.
                for (place, name) in names.iter().enumerate() {
                    beginnings[place] = tuning.tensors.remove(name);
                }
            }
        }
        let stored = |index: usize| format!("model.layers.{}.", tuning.spec.stored_layer(index));
        let of_layers = (layers.start..layers.end.min(tuning.spec.layers.len()))
            .map(|index| {
                let prefix = stored(index);
                (0..trained.len()).filter(|place| trained[*place].name.starts_with(&prefix)).collect()
            })
            .collect();
        let shared = Shared { tuning, plan, trained, modules, of_layers, beginnings, layers };
        Ok(Self { shared: Rc::new(shared), checkpointing: false })
    }

    /// The arrays that are trained, in the order in which [`Self::forward`] takes them.
    pub fn trained(&self) -> &[Trained] {
        &self.shared.trained
    }

    /// What training begins with where that is the model's own: tensors of the model, and magnitudes. None for low-rank matrices.
    pub fn beginning(&self, place: usize) -> Option<&Array> {
        self.shared.beginnings.get(place)?.as_ref()
    }

    /// How many random keys [`Self::forward`] takes: one for each module that has dropout.
    pub fn keys(&self) -> usize {
        match &self.shared.plan {
            Plan::LowRank { modules, dropout } if *dropout > 0.0 => modules.len(),
            _ => 0,
        }
    }

    /// The device of the model.
    pub fn device(&self) -> &Device {
        &self.shared.tuning.device
    }

    /// Which layers it has.
    pub fn layers(&self) -> LayerRange {
        self.shared.layers
    }

    /// Elements that travel between layer ranges for each token: hidden vectors, and what a family has besides.
    pub fn width(&self) -> usize {
        self.shared.tuning.spec.activation_width()
    }

    /// Does the range end the model?
    pub fn is_last(&self) -> bool {
        self.shared.layers.is_last(self.shared.tuning.spec.layer_count())
    }

    /// Which tokens there are.
    pub fn vocabulary(&self) -> usize {
        self.shared.tuning.spec.vocabulary
    }

    /// The same function, of which only the hidden vectors between layers are kept for the gradient; the rest is computed again.
    ///
    /// # Errors
    ///
    /// When layers hand on more than hidden vectors.
    pub fn with_checkpointing(mut self) -> std::result::Result<Self, TuneError> {
        let is_chain = match &self.shared.modules {
            Some((decoder, _)) => decoder.is_chain(),
            None => self.assembled(&self.beginnings()?)?.0.is_chain(),
        };
        if !is_chain || self.shared.tuning.spec.passes > 1 {
            return Err(TuneError::NoChain);
        }
        self.checkpointing = true;
        Ok(self)
    }

    /// Of `input` through the layers: the hidden vectors `[1, tokens, width]` behind them. `input` are ids `[1, tokens]` where the range
    /// begins with the first layer, else hidden vectors. The tokens are those of whole sequences of these lengths, one behind the
    /// other. `keys` `[`[`Self::keys`]`, 2]` are random keys; without them nothing is dropped.
    ///
    /// # Errors
    ///
    /// MLX's.
    pub fn forward(
        &self,
        trained: &[&Array],
        input: &Array,
        lengths: &[i32],
        keys: Option<&Array>,
    ) -> Result<Array> {
        self.with_modules(trained, keys, |decoder, _| self.hidden(decoder, trained, input, lengths, keys))
    }

    /// The same to logits `[tokens, vocabulary]`, where the range ends with the last layer; with `places` those of these tokens only.
    ///
    /// # Errors
    ///
    /// MLX's.
    pub fn logits(
        &self,
        trained: &[&Array],
        input: &Array,
        lengths: &[i32],
        keys: Option<&Array>,
        places: Option<&Array>,
    ) -> Result<Array> {
        self.with_modules(trained, keys, |decoder, device| {
            let mut hidden = self.hidden(decoder, trained, input, lengths, keys)?;
            if let Some(places) = places {
                let places = device.reshape(places, &[-1])?;
                hidden = device.take(&hidden, &places, 1)?;
            }
            decoder.logits(device, &hidden)
        })
    }

    /// For a range that does not end the model: what comes out of [`Self::forward`], the gradients of what is trained, and with `of_input`
    /// that of hidden vectors that went in (None for ids), where `cotangent` is the gradient of what came out. Everything is computed again.
    ///
    /// # Errors
    ///
    /// MLX's.
    pub fn backward(
        &self,
        trained: &[&Array],
        input: &Array,
        lengths: &[i32],
        keys: Option<&Array>,
        cotangent: &Array,
        of_input: bool,
    ) -> Result<Backward> {
        let (tuner, lengths, keys) = (self.clone(), lengths.to_vec(), keys.cloned());
        let count = trained.len();
        let constant = (self.shared.layers.is_first() || !of_input).then(|| input.clone());
        let mut inputs = trained.to_vec();
        if constant.is_none() {
            inputs.push(input);
        }
        let body = move |_: &Device, inputs: &[&Array]| {
            let (trained, input) = inputs.split_at(count.min(inputs.len()));
            let input = match (&constant, input) {
                (Some(constant), _) => constant,
                (None, [hidden]) => *hidden,
                (None, _) => return Err(Error::Mlx("hidden vectors are missing".to_owned())),
            };
            Ok(vec![tuner.forward(trained, input, &lengths, keys.as_ref())?])
        };
        let (mut values, mut gradients) = self.device().pull_back(body, &inputs, &[cotangent])?;
        let missing = || Error::Mlx("a layer range gave nothing".to_owned());
        let hidden = values.pop().ok_or_else(missing)?;
        let of_input = if gradients.len() > count { gradients.pop() } else { None };
        Ok(Backward { hidden, trained: gradients, input: of_input })
    }

    fn beginnings(&self) -> Result<Vec<&Array>> {
        let missing = || Error::Mlx("a tensor of the model is not there".to_owned());
        self.shared.beginnings.iter().map(|array| array.as_ref().ok_or_else(missing)).collect()
    }

    /// The modules made of tensors that are trained.
    fn assembled(&self, trained: &[&Array]) -> Result<(Decoder, Registry)> {
        let Tuning { device, spec, shard, .. } = &self.shared.tuning;
        loader::assemble(device, spec, shard, self.tensors(trained)).map_err(refused)
    }

    fn tensors(&self, trained: &[&Array]) -> HashMap<String, Array> {
        let mut tensors = self.shared.tuning.tensors.clone();
        let names = self.shared.trained.iter().map(|trained| trained.name.clone());
        tensors.extend(names.zip(trained.iter().map(|array| (*array).clone())));
        tensors
    }

    /// Runs `body` on the modules as what is trained makes them: all, or with layers that are computed again all but those.
    fn with_modules(
        &self,
        trained: &[&Array],
        keys: Option<&Array>,
        body: impl FnOnce(&Decoder, &Device) -> Result<Array>,
    ) -> Result<Array> {
        let device = self.device();
        if trained.len() != self.shared.trained.len() {
            let (found, needed) = (trained.len(), self.shared.trained.len());
            return Err(Error::Mlx(format!("{found} arrays are given, but {needed} are trained")));
        }
        let Some((decoder, registry)) = &self.shared.modules else {
            let (decoder, _registry) = self.assembled(trained)?;
            return body(&decoder, device);
        };
        let in_layers: Vec<usize> = match self.checkpointing {
            true => self.shared.of_layers.concat(),
            false => Vec::new(),
        };
        let places: Vec<usize> = (0..trained.len()).filter(|place| !in_layers.contains(place)).collect();
        let arrays: Vec<&Array> = places.iter().map(|place| trained[*place]).collect();
        self.changed(registry, &places, &arrays, keys, || body(decoder, device))
    }

    /// Runs `body` while the modules of these trained arrays are changed by them.
    fn changed<T>(
        &self,
        registry: &Registry,
        places: &[usize],
        arrays: &[&Array],
        keys: Option<&Array>,
        body: impl FnOnce() -> Result<T>,
    ) -> Result<T> {
        let device = self.device();
        let changes = self.matrices(places, arrays, keys)?;
        let done = registry.train(device, &changes).and_then(|()| body());
        registry.end_training(changes.keys().copied());
        done
    }

    /// The changes that these arrays, which are those at `places`, make up.
    fn matrices(
        &self,
        places: &[usize],
        arrays: &[&Array],
        keys: Option<&Array>,
    ) -> Result<BTreeMap<&str, Matrices>> {
        let Plan::LowRank { modules, dropout } = &self.shared.plan else { return Ok(BTreeMap::new()) };
        let device = self.device();
        let by_place: HashMap<usize, &Array> = places.iter().copied().zip(arrays.iter().copied()).collect();
        let mut changes = BTreeMap::new();
        let mut place = 0;
        for (index, module) in modules.iter().enumerate() {
            let own = if module.magnitudes { 3 } else { 2 };
            if let (Some(a), Some(b)) = (by_place.get(&place), by_place.get(&(place + 1))) {
                let magnitudes = if own == 3 { by_place.get(&(place + 2)) } else { None };
                let dropout = match keys {
                    Some(keys) if *dropout > 0.0 => {
                        let row = index as i32;
                        let key = device.reshape(&device.slice(keys, &[row, 0], &[row + 1, 2])?, &[2])?;
                        Some(Dropout { kept: 1.0 - dropout, key })
                    }
                    _ => None,
                };
                let b = device.multiply(b, &Array::scalar(module.scale, Dtype::F32)?)?;
                let magnitudes = magnitudes.map(|array| (*array).clone());
                changes.insert(module.path.as_str(), Matrices { a: (*a).clone(), b, magnitudes, dropout });
            }
            place += own;
        }
        Ok(changes)
    }

    fn hidden(
        &self,
        decoder: &Decoder,
        trained: &[&Array],
        input: &Array,
        lengths: &[i32],
        keys: Option<&Array>,
    ) -> Result<Array> {
        let device = self.device();
        let mut caches = caches(decoder.layers.len(), lengths);
        let mut batch = Batch::whole(rows(&mut caches, lengths));
        let vectors = match self.shared.layers.is_first() {
            true => decoder.embed(device, input, &mut batch)?,
            false => input.clone(),
        };
        if !self.checkpointing {
            return decoder.forward(device, vectors, &mut batch);
        }
        let mut hidden = decoder.positioned(device, vectors, &batch)?;
        for (index, places) in self.shared.of_layers.iter().enumerate() {
            let function = self.layer(index, lengths, keys.is_some())?;
            let mut inputs = vec![&hidden];
            inputs.extend(places.iter().map(|place| trained[*place]));
            inputs.extend(keys);
            let made = function.apply(&inputs)?.pop();
            hidden = made.ok_or_else(|| Error::Mlx("a layer made nothing".to_owned()))?;
        }
        Ok(hidden)
    }

    /// Layer `index` of the range as a function of hidden vectors, the trained arrays that are its own, and the keys.
    fn layer(&self, index: usize, lengths: &[i32], with_keys: bool) -> Result<Function> {
        let (tuner, lengths) = (self.clone(), lengths.to_vec());
        Function::checkpointed(move |device, inputs| {
            let Some((hidden, rest)) = inputs.split_first() else {
                return Err(Error::Mlx("a layer needs hidden vectors".to_owned()));
            };
            let (arrays, keys) = match rest.split_last() {
                // MLX differentiates by all inputs, but random bits have no derivative.
                Some((keys, arrays)) if with_keys => (arrays, Some(device.stop_gradient(keys)?)),
                _ => (rest, None),
            };
            let keys = keys.as_ref();
            let shared = &tuner.shared;
            let places = &shared.of_layers[index];
            let hidden = match &shared.modules {
                Some((decoder, registry)) => tuner.changed(registry, places, arrays, keys, || {
                    let Some(layer) = decoder.layers.get(index) else {
                        return Err(Error::Mlx(format!("the layer range has no layer {index}")));
                    };
                    tuner.through(layer, index, hidden, decoder.widened, &lengths)
                })?,
                None => tuner.made_layer(index, places, arrays, hidden, &lengths)?,
            };
            Ok(vec![hidden])
        })
    }

    /// The hidden vectors behind a layer that is made of tensors that are trained.
    fn made_layer(
        &self,
        index: usize,
        places: &[usize],
        arrays: &[&Array],
        hidden: &Array,
        lengths: &[i32],
    ) -> Result<Array> {
        let Tuning { device, spec, shard, tensors, .. } = &self.shared.tuning;
        let mut given = tensors.clone();
        for (place, array) in places.iter().zip(arrays) {
            given.insert(self.shared.trained[*place].name.clone(), (*array).clone());
        }
        let first = shard.layers.start;
        let layer = loader::assemble_layer(device, spec, shard, given, first + index).map_err(refused)?;
        self.through(&layer, index, hidden, loader::widened(spec, shard.layers), lengths)
    }

    /// Hidden vectors through one layer, the range's number `index`.
    fn through(
        &self,
        layer: &Layer,
        index: usize,
        hidden: &Array,
        widened: Widened,
        lengths: &[i32],
    ) -> Result<Array> {
        let mut caches = caches(self.shared.of_layers.len(), lengths);
        let mut batch = Batch::whole(rows(&mut caches, lengths));
        layer.alone(self.device(), hidden.clone(), index, widened, &mut batch)
    }
}

/// What [`Tuner::backward`] gives.
pub struct Backward {
    /// What came out.
    pub hidden: Array,
    /// The gradients of what is trained.
    pub trained: Vec<Array>,
    /// The gradient of the hidden vectors that went in.
    pub input: Option<Array>,
}

/// Empty ones for as many sequences, which do not outlive a call.
fn caches(layers: usize, lengths: &[i32]) -> Vec<SequenceCache> {
    lengths.iter().map(|_| SequenceCache::new(layers, &CacheOptions::default())).collect()
}

fn rows<'a>(caches: &'a mut [SequenceCache], lengths: &[i32]) -> Vec<Row<'a>> {
    caches.iter_mut().zip(lengths).map(|(cache, tokens)| Row { tokens: *tokens, cache }).collect()
}

fn refused(error: loader::LoadError) -> Error {
    match error {
        loader::LoadError::Device(error) => error,
        other => Error::Mlx(other.to_string()),
    }
}
