//! Waiting for something that must come true soon, without guessing how long it takes.

use anyhow::{Result, bail};
use std::time::{Duration, Instant};

/// Calls `probe` until it gives a value; fails after `bound` with the last reason.
pub fn eventually<T>(bound: Duration, mut probe: impl FnMut() -> Result<T>) -> Result<T> {
    let end = Instant::now() + bound;
    loop {
        match probe() {
            Ok(value) => return Ok(value),
            Err(reason) if Instant::now() >= end => bail!("not within {bound:?}: {reason:#}"),
            Err(_) => std::thread::sleep(Duration::from_millis(25)),
        }
    }
}
