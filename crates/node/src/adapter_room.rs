//! What adapters take of this node's memory beside the layers of a model, promised before they are read: several may come at once.

use mlxnode_compute::ByteCount;
use std::collections::BTreeMap;

/// An adapter for which there is no memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "it takes {needed} here, but {left} of the node's memory is left; unload another adapter or a model, or give the node more \
     (`mlxnode join --memory-budget`)"
)]
pub(crate) struct NoRoom {
    /// What it would take.
    pub(crate) needed: ByteCount,
    /// What is left.
    pub(crate) left: ByteCount,
}

/// The adapters of one deployment on this node, by what the workers call them: those that are there and those that are being read.
#[derive(Debug, Default)]
pub(crate) struct AdapterRoom {
    taken: BTreeMap<String, ByteCount>,
}

impl AdapterRoom {
    /// Promises memory to an adapter. `room`: what all of them together may take.
    pub(crate) fn take(&mut self, key: &str, needed: ByteCount, room: ByteCount) -> Result<(), NoRoom> {
        let others = self.taken.iter().filter(|(other, _)| *other != key).map(|(_, bytes)| *bytes);
        let left = room.saturating_sub(others.sum());
        if needed > left {
            return Err(NoRoom { needed, left });
        }
        self.taken.insert(key.to_owned(), needed);
        Ok(())
    }

    /// The adapter is not there any more, or never was.
    pub(crate) fn give_back(&mut self, key: &str) {
        self.taken.remove(key);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn adapters_that_come_at_once_share_the_room() {
        let mut room = AdapterRoom::default();
        let all = ByteCount(100);
        assert_eq!(room.take("a#1", ByteCount(60), all), Ok(()));
        let refused = room.take("b#2", ByteCount(50), all).unwrap_err();
        assert_eq!(refused, NoRoom { needed: ByteCount(50), left: ByteCount(40) });
        assert!(refused.to_string().contains("--memory-budget"), "{refused}");
        assert_eq!(room.take("a#1", ByteCount(60), all), Ok(()), "asked for again it is the same one");
        room.give_back("a#1");
        assert_eq!(room.take("b#2", ByteCount(50), all), Ok(()));
        assert_eq!(room.take("c#3", ByteCount(51), all).unwrap_err().left, ByteCount(50));
        assert_eq!(room.take("c#3", ByteCount(1), ByteCount(0)).unwrap_err().left, ByteCount(0));
    }
}
