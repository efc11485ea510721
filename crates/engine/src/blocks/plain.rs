//! A block as bytes: what a file holds of it, and what travels between the compute thread and the one that reads and writes.

use super::block::{Block, LayerBlock};
use crate::caches::{KvStretch, Planes};
use mlxnode_checkpoint::{SafetensorsWriter, TensorDtype, WriteError};
use mlxnode_mlx::{Array, Device, Dtype, QuantizationMode, QuantizedLayout, Result};
use safetensors::SafeTensors;
use std::collections::BTreeMap;
use std::path::Path;

/// The first note of each file. A file with another one is a miss.
const FORMAT: &str = "1";
const FORMAT_NOTE: &str = "mlxnode.block";
/// Whose block it is: the stage's fingerprint and the block's hash.
const NAME_NOTE: &str = "name";
/// BLAKE3 of names, types, shapes and bytes of all tensors and of all other notes.
const DIGEST_NOTE: &str = "digest";
const LAYERS_NOTE: &str = "layers";
const BORDER_NOTE: &str = "border";
const ADAPTER_NOTE: &str = "adapter";
const IDS: &str = "ids";
/// More than any model has, so that a file cannot ask for any number of empty layers.
const MOST_LAYERS: usize = 4096;

/// A block without arrays. May change threads.
#[derive(Default)]
pub(super) struct PlainBlock {
    notes: BTreeMap<String, String>,
    tensors: BTreeMap<String, PlainArray>,
}

struct PlainArray {
    dtype: TensorDtype,
    shape: Vec<usize>,
    bytes: Vec<u8>,
}

impl PlainBlock {
    /// Copies a block from the device. None when it has arrays of a type that files do not have.
    pub(super) fn of(device: &Device, block: &Block) -> Result<Option<Self>> {
        let mut plain = Self::default();
        plain.note(LAYERS_NOTE, block.layers.len().to_string());
        plain.note(BORDER_NOTE, block.is_border.to_string());
        if let Some(adapter) = block.adapter {
            plain.note(ADAPTER_NOTE, adapter.to_hex().to_string());
        }
        let ids = block.tokens.iter().flat_map(|id| id.to_le_bytes()).collect();
        let ids = PlainArray { dtype: TensorDtype::U32, shape: vec![block.tokens.len()], bytes: ids };
        plain.tensors.insert(IDS.to_owned(), ids);
        for (index, layer) in block.layers.iter().enumerate() {
            for (part, kv) in [("kv", &layer.kv), ("indexer", &layer.indexer)] {
                let Some(kv) = kv else { continue };
                let path = format!("{index}.{part}");
                plain.note(&path, kind(kv));
                if !plain.add(device, &path, &kv.planes.arrays)? {
                    return Ok(None);
                }
            }
            if !plain.add(device, &format!("{index}.states"), &layer.states)? {
                return Ok(None);
            }
        }
        Ok(Some(plain))
    }

    /// The block, on the device. None when the file is not one of blocks as they are now.
    pub(super) fn block(&self, device: &Device) -> Result<Option<Block>> {
        let note = |name: &str| self.notes.get(name).map(String::as_str);
        let count =
            note(LAYERS_NOTE).and_then(|count| count.parse().ok()).filter(|count| *count <= MOST_LAYERS);
        let ids = self.tensors.get(IDS).filter(|ids| ids.dtype == TensorDtype::U32);
        let (Some(count), Some(ids), Some(is_border)) =
            (count, ids, note(BORDER_NOTE).and_then(|border| border.parse().ok()))
        else {
            return Ok(None);
        };
        let adapter = match note(ADAPTER_NOTE).map(blake3::Hash::from_hex).transpose() {
            Ok(adapter) => adapter,
            Err(_) => return Ok(None),
        };
        let tokens = ids.bytes.as_chunks::<4>().0.iter().map(|id| u32::from_le_bytes(*id)).collect();
        let mut layers = Vec::with_capacity(count);
        for index in 0..count {
            let mut layer = LayerBlock::default();
            for (part, kept) in [("kv", &mut layer.kv), ("indexer", &mut layer.indexer)] {
                let path = format!("{index}.{part}");
                let Some(kind) = note(&path) else { continue };
                let Some((window, layout)) = parse_kind(kind) else { return Ok(None) };
                let Some(arrays) = self.arrays(device, &path)? else { return Ok(None) };
                *kept = Some(KvStretch { planes: Planes { arrays }, layout, window });
            }
            let Some(states) = self.arrays(device, &format!("{index}.states"))? else { return Ok(None) };
            layer.states = states;
            layers.push(layer);
        }
        Ok(Some(Block { tokens, adapter, layers, is_border }))
    }

    /// Writes a file. `name` says whose it is.
    pub(super) fn write(mut self, name: &str, path: &Path) -> std::result::Result<(), WriteError> {
        self.note(FORMAT_NOTE, FORMAT.to_owned());
        self.note(NAME_NOTE, name.to_owned());
        let digest = self.digest();
        self.note(DIGEST_NOTE, digest);
        let mut writer = SafetensorsWriter::with_notes(self.notes);
        for (name, PlainArray { dtype, shape, bytes }) in self.tensors {
            writer.add(&name, dtype, &shape, bytes)?;
        }
        writer.write(path)
    }

    /// Understands the bytes of a file; None when it is damaged, of another format, or not the one of this name.
    pub(super) fn read(bytes: &[u8], name: &str) -> Option<Self> {
        let (_, metadata) = SafeTensors::read_metadata(bytes).ok()?;
        let file = SafeTensors::deserialize(bytes).ok()?;
        let mut plain = Self::default();
        let notes = metadata.metadata().as_ref()?.iter();
        plain.notes.extend(notes.map(|(key, value)| (key.clone(), value.clone())));
        for (name, view) in file.iter() {
            let dtype = TensorDtype::parse(&view.dtype().to_string())?;
            let (shape, bytes) = (view.shape().to_vec(), view.data().to_vec());
            plain.tensors.insert(name.to_owned(), PlainArray { dtype, shape, bytes });
        }
        let digest = plain.notes.remove(DIGEST_NOTE)?;
        let is_ours = plain.notes.get(FORMAT_NOTE).is_some_and(|format| format == FORMAT)
            && plain.notes.get(NAME_NOTE).is_some_and(|found| found == name)
            && plain.digest() == digest;
        is_ours.then_some(plain)
    }

    fn note(&mut self, name: &str, value: String) {
        self.notes.insert(name.to_owned(), value);
    }

    fn add(&mut self, device: &Device, path: &str, arrays: &[Array]) -> Result<bool> {
        for (place, array) in arrays.iter().enumerate() {
            let dtype = match array.dtype() {
                Dtype::F32 => TensorDtype::F32,
                Dtype::F16 => TensorDtype::F16,
                Dtype::BF16 => TensorDtype::BF16,
                Dtype::U32 => TensorDtype::U32,
                Dtype::I32 => TensorDtype::I32,
                Dtype::U8 => TensorDtype::U8,
                Dtype::Bool => TensorDtype::Bool,
                Dtype::I64 | Dtype::Other => return Ok(false),
            };
            let shape = array.shape().iter().map(|size| usize::try_from(*size).unwrap_or(0)).collect();
            let bytes = device.contiguous(array)?.to_bytes()?;
            self.tensors.insert(format!("{path}.{place}"), PlainArray { dtype, shape, bytes });
        }
        Ok(true)
    }

    /// The arrays `path.0`, `path.1` and so on; None when one has a type that the device does not have.
    fn arrays(&self, device: &Device, path: &str) -> Result<Option<Vec<Array>>> {
        let mut arrays = Vec::new();
        while let Some(plain) = self.tensors.get(&format!("{path}.{}", arrays.len())) {
            let dtype = match plain.dtype {
                TensorDtype::F32 => Dtype::F32,
                TensorDtype::F16 => Dtype::F16,
                TensorDtype::BF16 => Dtype::BF16,
                TensorDtype::U32 => Dtype::U32,
                TensorDtype::I32 => Dtype::I32,
                TensorDtype::U8 => Dtype::U8,
                TensorDtype::Bool => Dtype::Bool,
                _ => return Ok(None),
            };
            let shape: Option<Vec<i32>> = plain.shape.iter().map(|size| i32::try_from(*size).ok()).collect();
            let Some(shape) = shape else { return Ok(None) };
            arrays.push(match plain.bytes.is_empty() {
                true => device.zeros(&shape, dtype)?,
                false => Array::from_bytes(&plain.bytes, &shape, dtype)?,
            });
        }
        Ok(Some(arrays))
    }

    fn digest(&self) -> String {
        let mut hasher = blake3::Hasher::new_derive_key("mlxnode block file v1");
        let mut field = |bytes: &[u8]| {
            hasher.update(&(bytes.len() as u64).to_le_bytes());
            hasher.update(bytes);
        };
        for (name, value) in &self.notes {
            field(name.as_bytes());
            field(value.as_bytes());
        }
        for (name, array) in &self.tensors {
            field(name.as_bytes());
            field(array.dtype.name().as_bytes());
            let shape: Vec<u8> = array.shape.iter().flat_map(|size| (*size as u64).to_le_bytes()).collect();
            field(&shape);
            field(&array.bytes);
        }
        hasher.finalize().to_hex().to_string()
    }
}

/// "WINDOW BITS GROUP", each "-" when there is none.
fn kind(kv: &KvStretch) -> String {
    let text = |number: Option<i32>| number.map_or_else(|| "-".to_owned(), |number| number.to_string());
    let (bits, group) = (kv.layout.map(|layout| layout.bits), kv.layout.map(|layout| layout.group_size));
    format!("{} {} {}", text(kv.window), text(bits), text(group))
}

fn parse_kind(kind: &str) -> Option<(Option<i32>, Option<QuantizedLayout>)> {
    let mut numbers = kind.split(' ').map(|text| match text {
        "-" => Some(None),
        number => number.parse::<i32>().ok().filter(|number| *number > 0).map(Some),
    });
    let (window, bits, group_size) = (numbers.next()??, numbers.next()??, numbers.next()??);
    let layout = match (bits, group_size) {
        (Some(bits), Some(group_size)) => {
            Some(QuantizedLayout { mode: QuantizationMode::Affine, bits, group_size })
        }
        (None, None) => None,
        _ => return None,
    };
    numbers.next().is_none().then_some((window, layout))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kinds_of_keys_and_values_are_written_and_read() {
        let layout = QuantizedLayout { mode: QuantizationMode::Affine, bits: 4, group_size: 32 };
        for (window, layout) in
            [(None, None), (Some(128), None), (Some(7), Some(layout)), (None, Some(layout))]
        {
            let stretch = KvStretch { planes: Planes::default(), layout, window };
            assert_eq!(parse_kind(&kind(&stretch)), Some((window, layout)));
        }
        for wrong in ["", "- -", "- - - -", "- 4 -", "x - -", "-1 - -", "0 - -", "- 4 99999999999"] {
            assert_eq!(parse_kind(wrong), None, "{wrong}");
        }
    }
}
