//! Turns of the inputs of packed maps, read and checked.

use super::{LoadError, Source, size};
use crate::turn::Turn;
use mlxnode_checkpoint::layout::SIGNS;
use mlxnode_mlx::{Array, Dtype};
use std::rc::Rc;

/// A turn and what tells it from others: maps of the same input that are turned alike share one, and can be stacked.
pub(super) struct KnownTurn {
    /// Paths of the modules that have it.
    paths: Vec<String>,
    /// Which elements change their sign.
    negative: Vec<bool>,
    turn: Rc<Turn>,
}

impl Source<'_> {
    /// What the inputs of a module go through, or the vectors of a table come out of; None for most.
    pub(super) fn turn(&mut self, path: &str) -> Result<Option<Rc<Turn>>, LoadError> {
        let Some(block) = self.shard.turned(path) else { return Ok(None) };
        if let Some(known) = self.turns.iter().find(|known| known.paths.iter().any(|known| known == path)) {
            return Ok(Some(Rc::clone(&known.turn)));
        }
        let block = size(block);
        let name = format!("{path}.{SIGNS}");
        let signs = self.device.cast(&self.tensor(&name)?, Dtype::F32)?;
        self.device.eval([&signs])?;
        self.weights.check_reads()?;
        let values = signs.to_f32()?;
        if values.iter().any(|sign| sign.abs() != 1.0) {
            return Err(LoadError::Signs { file: self.file_of(&name), tensor: name });
        }
        let negative: Vec<bool> = values.iter().map(|sign| *sign < 0.0).collect();
        let same = |known: &&mut KnownTurn| known.turn.block == block && known.negative == negative;
        if let Some(known) = self.turns.iter_mut().find(same) {
            known.paths.push(path.to_owned());
            return Ok(Some(Rc::clone(&known.turn)));
        }
        let signs = Array::from_f32(&values, &[size(values.len())])?;
        let turn = Rc::new(Turn { signs, block });
        self.turns.push(KnownTurn { paths: vec![path.to_owned()], negative, turn: Rc::clone(&turn) });
        Ok(Some(turn))
    }

    fn file_of(&self, name: &str) -> String {
        let tensor = self.shard.tensors.get(name);
        tensor.map_or_else(|| "the checkpoint".to_owned(), |tensor| tensor.origin().file_name())
    }
}
