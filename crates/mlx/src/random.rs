//! Random numbers from explicit keys.
//!
//! MLX's generator is counter-based: a key is two 32-bit words, and splitting a key is a hash of it (Threefry-2x32 with 20 rounds,
//! as in JAX). The hash is done here on the host, so that the chain of keys costs the device nothing and needs no waiting.

use crate::{Array, Device, Dtype, Result};
use mlx_sys as sys;

/// A key: equal keys give equal draws.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct RandomKey([u32; 2]);

impl RandomKey {
    /// The key that `mx.random.seed(seed)` starts from.
    pub fn new(seed: u64) -> Self {
        Self([(seed >> 32) as u32, seed as u32])
    }

    /// The two words of it.
    pub fn words(self) -> [u32; 2] {
        self.0
    }

    /// The key of these words.
    pub fn from_words(words: [u32; 2]) -> Self {
        Self(words)
    }

    /// Two independent keys: by MLX's convention the first carries the chain on, the second is used up.
    pub fn split(self) -> (Self, Self) {
        // MLX draws four words as the hashes of the counters (0, 2) and (1, 3); each key is two neighbouring words.
        let [first, third] = threefry(self.0, [0, 2]);
        let [second, fourth] = threefry(self.0, [1, 3]);
        (Self([first, second]), Self([third, fourth]))
    }

    /// As MLX takes it: `[2]` of `uint32`.
    pub fn array(self) -> Result<Array> {
        Array::from_u32(&self.0, &[2])
    }
}

/// Threefry-2x32, 20 rounds (Salmon et al., "Parallel Random Numbers: As Easy as 1, 2, 3").
fn threefry(key: [u32; 2], counter: [u32; 2]) -> [u32; 2] {
    const ROTATIONS: [[u32; 4]; 2] = [[13, 15, 26, 6], [17, 29, 16, 24]];
    let schedule = [key[0], key[1], key[0] ^ key[1] ^ 0x1BD1_1BDA];
    let [mut a, mut b] = [counter[0].wrapping_add(schedule[0]), counter[1].wrapping_add(schedule[1])];
    for block in 0..5 {
        for rotation in ROTATIONS[block % 2] {
            a = a.wrapping_add(b);
            b = b.rotate_left(rotation) ^ a;
        }
        a = a.wrapping_add(schedule[(block + 1) % 3]);
        b = b.wrapping_add(schedule[(block + 2) % 3]).wrapping_add(block as u32 + 1);
    }
    [a, b]
}

impl Device {
    /// Draws an index along the last axis, with probabilities proportional to `exp(logits)`.
    pub fn categorical(&self, logits: &Array, key: RandomKey) -> Result<Array> {
        let key = key.array()?;
        self.through(|| mlx_rs::random::categorical(logits.native(), -1, None, key.native()))
    }

    /// Single-precision numbers of `shape`, uniform in `[low, high)`.
    pub fn uniform_between(&self, low: f32, high: f32, shape: &[i32], key: RandomKey) -> Result<Array> {
        let (low, high) = (Array::scalar(low, Dtype::F32)?, Array::scalar(high, Dtype::F32)?);
        let key = key.array()?;
        // SAFETY: valid handles and a slice with its length.
        self.run(|result, stream| unsafe {
            sys::mlx_random_uniform(
                result,
                low.handle(),
                high.handle(),
                shape.as_ptr(),
                shape.len(),
                Dtype::F32.raw(),
                key.handle(),
                stream,
            )
        })
    }

    /// True with probability `probability` in each place of `shape`. `key` is a key as [`RandomKey::array`] gives it.
    pub fn bernoulli(&self, probability: f32, shape: &[i32], key: &Array) -> Result<Array> {
        let probability = Array::scalar(probability, Dtype::F32)?;
        // SAFETY: valid handles and a slice with its length.
        self.run(|result, stream| unsafe {
            sys::mlx_random_bernoulli(
                result,
                probability.handle(),
                shape.as_ptr(),
                shape.len(),
                key.handle(),
                stream,
            )
        })
    }

    /// A number without dimensions, uniform in `[0, 1)`.
    pub fn uniform(&self, key: RandomKey) -> Result<Array> {
        let key = key.array()?;
        self.through(|| mlx_rs::random::uniform::<f32, f32>(0.0, 1.0, None, key.native()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_split_as_mlx_splits_them() {
        let _device = Device::open().unwrap();
        let mut key = RandomKey::new(0x0123_4567_89AB_CDEF);
        for _ in 0..5 {
            let array = key.array().unwrap();
            let (first, second) = mlx_rs::random::split(array.native(), 2).unwrap();
            let (first, second) = (Array::wrap(first), Array::wrap(second));
            let (chain, used) = key.split();
            assert_eq!(first.to_u32().unwrap(), chain.0);
            assert_eq!(second.to_u32().unwrap(), used.0);
            key = chain;
        }
    }

    #[test]
    fn draws_depend_on_the_key_alone() {
        let device = Device::open().unwrap();
        let draw = |seed| device.uniform(RandomKey::new(seed)).unwrap().to_f32().unwrap()[0];
        assert_eq!(draw(1), draw(1));
        assert_ne!(draw(1), draw(2));
        assert!((0.0..1.0).contains(&draw(3)));
    }
}
