//! Fuses an adapter into its base: a model that needs no adapter any more.
//!
//! LoRA and DoRA changes are added to the matrices, whose packed ones are unpacked for it and packed again with their own settings; a full
//! fine-tune's tensors take the place of the model's. Everything else is copied as it is. The same tensors come out as from mlx-lm's
//! `fuse`.

mod arithmetic;
mod error;
mod output;
mod plan;

pub use error::FuseError;

use mlxnode_checkpoint::{Checkpoint, PerPath};
use mlxnode_mlx::{Array, Device, Quantized, TensorFile};
use output::Folder;
use plan::{Matrix, Plan, Source, Step};
use std::collections::HashMap;
use std::path::{Path, PathBuf};

/// What became of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Fused {
    /// Matrices and tensors that the adapter changed.
    pub changed: usize,
    /// Changed matrices that were packed again: rounding may take a small change away.
    pub packed_again: usize,
}

/// Writes the model in `checkpoint` with the adapter of a folder in it to `target`, which must not be there or be empty. With
/// `dequantize` no matrix is packed afterwards. `progress` gets tensors done and all of them.
///
/// # Errors
/// [`FuseError`]; then nothing is left of the target.
pub fn fuse(
    checkpoint: &Checkpoint,
    adapter: &Path,
    target: &Path,
    dequantize: bool,
    progress: &dyn Fn(u64, u64),
) -> Result<Fused, FuseError> {
    let plan = plan::plan(checkpoint, adapter, dequantize)?;
    carry_out(checkpoint, plan, Folder::begin(target)?, dequantize, progress)
}

fn carry_out(
    checkpoint: &Checkpoint,
    plan: Plan,
    mut folder: Folder,
    dequantize: bool,
    progress: &dyn Fn(u64, u64),
) -> Result<Fused, FuseError> {
    let device = Device::open()?;
    let mut files =
        Files { device: &device, base: HashMap::new(), adapter: TensorFile::open(&device, &plan.file)? };
    let mut fused = Fused { changed: 0, packed_again: 0 };
    let packed = packed_parameters(checkpoint);
    let total = plan.steps.len() as u64;
    for (done, step) in (0..).zip(&plan.steps) {
        progress(done, total);
        match step {
            Step::Copy(entry) => {
                let bytes = checkpoint.read_tensor(entry)?;
                let elements = entry.shape.iter().map(|size| *size as u64).product();
                let parameters = packed.get(entry.stored_name.as_str()).copied().unwrap_or(elements);
                folder.add(&entry.stored_name, entry.dtype, &entry.shape, bytes, parameters)?;
            }
            Step::Replace { name } => {
                fused.changed += 1;
                let array = files.adapter.take(name)?;
                let parameters = packed.get(name.as_str()).copied().unwrap_or(array.len() as u64);
                put(&mut folder, name, &array, parameters)?;
            }
            Step::Matrix(matrix) => {
                fused.changed += usize::from(matrix.change.is_some());
                let is_packed = matrix.packed.is_some() && !dequantize;
                fused.packed_again += usize::from(is_packed);
                write_matrix(&device, &mut files, matrix, plan.scale, is_packed, &mut folder)?;
            }
        }
    }
    progress(total, total);
    folder.finish(checkpoint, dequantize)?;
    Ok(fused)
}

/// Open files; tensors are read when they are evaluated.
struct Files<'a> {
    device: &'a Device,
    base: HashMap<PathBuf, TensorFile>,
    adapter: TensorFile,
}

impl Files<'_> {
    fn take(&mut self, source: &Source) -> Result<Array, mlxnode_mlx::Error> {
        let entry = match source {
            Source::Adapter(name) => return self.adapter.take(name),
            Source::Base(entry) => entry,
        };
        if !self.base.contains_key(&*entry.file) {
            self.base.insert(entry.file.to_path_buf(), TensorFile::open(self.device, &entry.file)?);
        }
        match self.base.get_mut(&*entry.file) {
            Some(file) => file.take(&entry.stored_name),
            None => Err(mlxnode_mlx::Error::Mlx("a file that was opened is not there".to_owned())),
        }
    }
}

fn write_matrix(
    device: &Device,
    files: &mut Files<'_>,
    matrix: &Matrix,
    scale: f32,
    is_packed: bool,
    folder: &mut Folder,
) -> Result<(), FuseError> {
    let mut weight = files.take(&matrix.weight)?;
    if let Some(packed) = &matrix.packed {
        let scales = files.take(&packed.scales)?;
        let biases = packed.biases.as_ref().map(|biases| files.take(biases)).transpose()?;
        let layout = arithmetic::layout(packed.setting);
        weight = device.dequantize(&Quantized { weight, scales, biases, layout })?;
    }
    if let Some(change) = &matrix.change {
        weight = arithmetic::changed(device, &weight, change, scale, &mut files.adapter)?;
    }
    let parameters = weight.len() as u64;
    let name = |part: &str| format!("{}.{part}", matrix.path);
    match matrix.packed.as_ref().filter(|_| is_packed) {
        None => put(folder, &name("weight"), &weight, parameters),
        Some(packed) => {
            let packed = device.quantize(&weight, arithmetic::layout(packed.setting))?;
            put(folder, &name("weight"), &packed.weight, parameters)?;
            put(folder, &name("scales"), &packed.scales, 0)?;
            match &packed.biases {
                Some(biases) => put(folder, &name("biases"), biases, 0),
                None => Ok(()),
            }
        }
    }
}

fn put(folder: &mut Folder, name: &str, array: &Array, parameters: u64) -> Result<(), FuseError> {
    let dtype = arithmetic::stored(array.dtype())
        .ok_or_else(|| mlxnode_mlx::Error::Mlx(format!("{name} has {}", array.dtype().name())))?;
    let shape: Vec<usize> = array.shape().iter().map(|size| size.unsigned_abs() as usize).collect();
    array.eval()?;
    folder.add(name, dtype, &shape, array.to_bytes()?, parameters)
}

/// How many parameters each stored tensor of a packed matrix stands for, by its name in the files: packed ones more than they have
/// elements, scales and biases none.
fn packed_parameters(checkpoint: &Checkpoint) -> HashMap<&str, u64> {
    let mut parameters = HashMap::new();
    let quantization = &checkpoint.spec().quantization;
    for (canonical, scales) in checkpoint.tensors() {
        let Some(path) = canonical.strip_suffix(".scales") else { continue };
        let Some(weight) = checkpoint.tensor(&format!("{path}.weight")) else { continue };
        let setting = match quantization.per_path.get(path) {
            Some(PerPath::Setting(setting)) => Some(*setting),
            _ => quantization.default,
        };
        let groups: u64 = scales.shape.iter().map(|size| *size as u64).product();
        let elements = groups * setting.map_or(0, |setting| setting.group_size as u64);
        parameters.insert(weight.stored_name.as_str(), elements);
        parameters.insert(scales.stored_name.as_str(), 0);
        if let Some(biases) = checkpoint.tensor(&format!("{path}.biases")) {
            parameters.insert(biases.stored_name.as_str(), 0);
        }
    }
    parameters
}
