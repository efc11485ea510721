//! Room on the disk for what is on its way: what was announced counts before it has come.
//!
//! Without that, many files that begin at the same time would each find room, and all of them together none.

use mlxnode_compute::ByteCount;
use std::collections::BTreeMap;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// Room on the disk that files of jobs leave free.
const RESERVE: ByteCount = ByteCount(1 << 30);
/// Between two looks while something comes: others write on this disk too.
const LOOK_BYTES: u64 = 64 << 20;

/// The disk of one store.
#[derive(Debug)]
pub(super) struct Room {
    /// Bytes that are free on the disk of a folder.
    free: fn(&Path) -> io::Result<ByteCount>,
    on_their_way: Mutex<OnTheirWay>,
}

#[derive(Debug, Default)]
struct OnTheirWay {
    next: u64,
    /// Bytes that are announced and have not come.
    bytes: BTreeMap<u64, u64>,
}

/// Bytes that there is room for, as long as this lives.
#[derive(Debug)]
pub(super) struct Promise {
    room: Arc<Room>,
    folder: PathBuf,
    number: u64,
    since_look: u64,
}

fn on_disk(folder: &Path) -> io::Result<ByteCount> {
    let free = nix::sys::statvfs::statvfs(folder).map_err(io::Error::from)?;
    Ok(ByteCount((free.blocks_available() as u64).saturating_mul(free.fragment_size() as u64)))
}

/// There is none.
pub(super) fn full(text: String) -> io::Error {
    io::Error::new(io::ErrorKind::StorageFull, text)
}

impl Default for Room {
    fn default() -> Self {
        Self { free: on_disk, on_their_way: Mutex::default() }
    }
}

impl Room {
    fn on_their_way(&self) -> MutexGuard<'_, OnTheirWay> {
        self.on_their_way.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Keeps room for `bytes` more in `folder`. `quota`: what is used of how much may be; what is on its way counts there too.
    ///
    /// # Errors
    /// [`io::ErrorKind::StorageFull`] when there is not as much.
    pub(super) fn promise(
        self: &Arc<Self>,
        folder: &Path,
        bytes: u64,
        quota: Option<(ByteCount, ByteCount)>,
    ) -> io::Result<Promise> {
        let mut on_their_way = self.on_their_way();
        let others = on_their_way.bytes.values().fold(0_u64, |sum, left| sum.saturating_add(*left));
        self.look(folder, others.saturating_add(bytes), bytes)?;
        if let Some((used, quota)) = quota
            && used.0.saturating_add(others).saturating_add(bytes) > quota.0
        {
            let others = ByteCount(others);
            return Err(full(format!(
                "the files of jobs take {used} of {quota} on this node, and {others} are on their way"
            )));
        }
        let number = on_their_way.next;
        on_their_way.next += 1;
        on_their_way.bytes.insert(number, bytes);
        Ok(Promise { room: self.clone(), folder: folder.to_owned(), number, since_look: 0 })
    }

    fn look(&self, folder: &Path, needed: u64, asked: u64) -> io::Result<()> {
        let free = (self.free)(folder)?;
        if free.0 < needed.saturating_add(RESERVE.0) {
            let on_their_way = ByteCount(needed - asked);
            return Err(full(format!(
                "the disk has {free} free, of which {RESERVE} stay free and {on_their_way} are promised: {} more do not fit",
                ByteCount(asked)
            )));
        }
        Ok(())
    }
}

impl Promise {
    /// So many bytes have come.
    ///
    /// # Errors
    /// [`io::ErrorKind::StorageFull`] when there is no room for the rest any more.
    pub(super) fn came(&mut self, bytes: u64) -> io::Result<()> {
        let mut on_their_way = self.room.on_their_way();
        if let Some(left) = on_their_way.bytes.get_mut(&self.number) {
            *left = left.saturating_sub(bytes);
        }
        self.since_look += bytes;
        if self.since_look < LOOK_BYTES {
            return Ok(());
        }
        self.since_look = 0;
        let own = on_their_way.bytes.get(&self.number).copied().unwrap_or_default();
        let all = on_their_way.bytes.values().fold(0_u64, |sum, left| sum.saturating_add(*left));
        self.room.look(&self.folder, all, own)
    }
}

impl Drop for Promise {
    fn drop(&mut self) {
        self.room.on_their_way().bytes.remove(&self.number);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const GB: u64 = 1 << 30;

    fn room() -> Arc<Room> {
        let free = |folder: &Path| Ok(ByteCount(if folder == Path::new("/full") { GB / 2 } else { 11 * GB }));
        Arc::new(Room { free, on_their_way: Mutex::default() })
    }

    #[test]
    fn what_is_promised_is_not_promised_again() {
        let (room, folder) = (room(), Path::new("/disk"));
        let first = room.promise(folder, 6 * GB, None).unwrap();
        let error = room.promise(folder, 5 * GB, None).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::StorageFull);
        let second = room.promise(folder, 4 * GB, None).unwrap();
        drop(first);
        assert!(room.promise(folder, 6 * GB, None).is_ok());
        drop(second);
        assert!(room.promise(folder, u64::MAX, None).is_err());
        assert!(room.promise(folder, 10 * GB, None).is_ok(), "what was refused is promised to nobody");
    }

    #[test]
    fn a_quota_counts_what_is_on_its_way() {
        let (room, folder) = (room(), Path::new("/disk"));
        let quota = |used| Some((ByteCount(used), ByteCount(8 * GB)));
        let _first = room.promise(folder, 3 * GB, quota(2 * GB)).unwrap();
        let error = room.promise(folder, 4 * GB, quota(2 * GB)).unwrap_err().to_string();
        assert!(error.contains("on their way"), "{error}");
        assert!(room.promise(folder, 3 * GB, quota(2 * GB)).is_ok());
    }

    #[test]
    fn a_disk_that_fills_up_meanwhile_is_noticed() {
        let room = room();
        let mut promise = room.promise(Path::new("/disk"), GB, None).unwrap();
        promise.folder = "/full".into();
        promise.came(LOOK_BYTES - 1).unwrap();
        let error = promise.came(1).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::StorageFull);
    }
}
