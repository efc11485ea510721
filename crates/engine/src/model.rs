//! A layer range of a model, loaded.

use crate::adapters::{AdapterLoadError, Registry, UnknownAdapter};
use crate::caches::SequenceCache;
use crate::decoder::Decoder;
use crate::loader::{self, LoadError};
use mlxnode_checkpoint::{Adapter, Checkpoint, ModelSpec};
use mlxnode_compute::{ByteCount, CacheOptions, CacheOptionsError, LayerRange, StageInfo};
use mlxnode_mlx::Device;

/// A layer range of a model in the device's memory, bound to the thread that loaded it.
pub struct Model {
    pub(crate) device: Device,
    pub(crate) decoder: Decoder,
    /// Adapters that are loaded, and which of them the running batch uses.
    pub(crate) adapters: Registry,
    info: StageInfo,
    spec: ModelSpec,
    fingerprint: [u8; 32],
}

impl Model {
    /// Loads `layers` of the checkpoint: exactly their tensors are read. `progress` gets the bytes read so far and in all.
    pub fn load(
        checkpoint: &Checkpoint,
        layers: LayerRange,
        progress: &mut dyn FnMut(u64, u64),
    ) -> Result<Self, LoadError> {
        let device = Device::open()?;
        let (decoder, adapters) = loader::load(&device, checkpoint, layers, progress)?;
        let spec = checkpoint.spec().clone();
        let info = StageInfo {
            layers,
            layer_count: spec.layer_count(),
            hidden: spec.activation_width(),
            dtype: spec.dtype,
            vocabulary: spec.vocabulary,
            weights: ByteCount(checkpoint.shard_tensors(layers)?.bytes().0),
        };
        wire(&device, info.weights);
        tracing::debug!(%layers, weights = %info.weights, "layers loaded");
        Ok(Self { device, decoder, adapters, info, spec, fingerprint: checkpoint.fingerprint() })
    }

    /// Loads all layers.
    pub fn load_whole(
        checkpoint: &Checkpoint,
        progress: &mut dyn FnMut(u64, u64),
    ) -> Result<Self, LoadError> {
        Self::load(checkpoint, LayerRange::new(0, checkpoint.spec().layer_count()), progress)
    }

    /// Facts about the layer range.
    pub fn info(&self) -> &StageInfo {
        &self.info
    }

    /// The whole model as data.
    pub fn spec(&self) -> &ModelSpec {
        &self.spec
    }

    /// Names the checkpoint, see [`Checkpoint::fingerprint`].
    pub fn fingerprint(&self) -> [u8; 32] {
        self.fingerprint
    }

    /// Loads what an adapter changes in these layers, for sequences that ask for it by `name`. The weights stay as they are, and
    /// other sequences do not see it.
    pub fn add_adapter(
        &mut self,
        checkpoint: &Checkpoint,
        name: &str,
        adapter: &Adapter,
    ) -> Result<(), AdapterLoadError> {
        let changes = adapter.within(checkpoint, self.info.layers);
        self.adapters.add(&self.device, name, adapter, &changes)
    }

    /// Frees an adapter. No sequence may use it any more. One that is not there is fine.
    pub fn remove_adapter(&mut self, name: &str) -> Result<(), AdapterLoadError> {
        Ok(self.adapters.remove(&self.device, name)?)
    }

    /// Sequences that ask for no adapter get this one from now on, or none; whatever else is computed too.
    pub fn use_adapter(&mut self, name: Option<&str>) -> Result<(), UnknownAdapter> {
        self.adapters.set_default(name)
    }

    /// The names of the loaded adapters.
    pub fn adapters(&self) -> impl Iterator<Item = &str> {
        self.adapters.names()
    }

    /// Do these options fit the layers?
    pub fn check_cache(&self, options: &CacheOptions) -> Result<(), CacheOptionsError> {
        options.check()?;
        let layers = self.info.layers.start..self.info.layers.end.min(self.spec.layers.len());
        for layer in layers {
            for width in self.spec.layers[layer].mixer.kept_widths() {
                options.check_width(layer, width)?;
            }
        }
        Ok(())
    }

    /// Empty caches for one sequence.
    pub(crate) fn new_cache(&self, options: &CacheOptions) -> Result<SequenceCache, CacheOptionsError> {
        self.check_cache(options)?;
        Ok(self.decoder.new_cache(options))
    }

    /// The device that holds the weights.
    pub fn device(&self) -> &Device {
        &self.device
    }
}

/// Room beside the weights that stays resident too: caches and activations.
const WIRED_MARGIN: usize = 4 << 30;

/// Keeps the weights resident on a GPU, within what the system recommends; wiring more has frozen Macs. Only a matter of speed,
/// so that a system that refuses is no reason to stop.
fn wire(device: &Device, weights: ByteCount) {
    let wired =
        device.synchronize().and_then(|()| device.recommended_working_set()).and_then(|recommended| {
            let Some(recommended) = recommended else { return Ok(()) };
            let wanted = usize::try_from(weights.0).unwrap_or(usize::MAX).saturating_add(WIRED_MARGIN);
            device.set_wired_limit(wanted.min(recommended)).map(drop)
        });
    if let Err(error) = wired {
        tracing::debug!(%error, "weights are not wired");
    }
}
