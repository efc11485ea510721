//! Chooses tokens by mlx-lm's chain: top-p, min-p, XTC, top-k on normalised logits, then the temperature and one draw.
//!
//! Everything is lazy: nothing here waits for the device until [`Draw::read`]. The random keys are a function of the seed and
//! the index of the generated token alone; they equal those that mlx-lm's global generator hands out after `mx.random.seed`.

use crate::penalties::{Penalties, minus_infinity, no};
use mlxnode_compute::{Candidate, Sampled, Sampling, Xtc};
use mlxnode_mlx::{Array, Device, Dtype, RandomKey, Result};
use std::collections::VecDeque;

/// The sampler of one sequence.
pub(crate) struct Sampler {
    sampling: Sampling,
    penalties: Penalties,
    keys: KeyChain,
    /// XTC's protected tokens that exist, `[1, n]`.
    protected: Option<Array>,
}

/// What the host is told in place of a token when the logits are not numbers. No vocabulary is that large.
pub(super) const NO_TOKEN: u32 = u32::MAX;

/// A token that was chosen on the device.
pub(crate) struct Draw {
    /// `[1]`, `uint32`.
    pub(crate) token: Array,
    /// Normalised logits `[1, vocabulary]`, when somebody asked for them.
    logprobs: Option<Array>,
    /// The token, or [`NO_TOKEN`] where the logits are not numbers: the host learns both by one read. `[1, 1]`, `uint32`.
    told: Array,
    /// Ids `[n]` and log-probabilities `[n]` of the likeliest tokens.
    top: Option<(Array, Array)>,
}

impl Sampler {
    /// The parameters have been checked against the vocabulary.
    pub(crate) fn new(sampling: Sampling, vocabulary: usize) -> Result<Self> {
        let mut protected = Vec::new();
        if let Some(xtc) = &sampling.xtc {
            protected
                .extend(xtc.special_tokens.iter().copied().filter(|token| (*token as usize) < vocabulary));
        }
        let protected = match protected.is_empty() {
            true => None,
            false => Some(Array::from_u32(&protected, &[1, protected.len() as i32])?),
        };
        let uses_xtc = sampling.xtc.as_ref().is_some_and(|xtc| xtc.probability > 0.0);
        let keys = KeyChain::new(sampling.seed, if uses_xtc { 2 } else { 1 });
        Ok(Self { penalties: Penalties::new(&sampling)?, sampling, keys, protected })
    }

    pub(crate) fn penalties(&self) -> &Penalties {
        &self.penalties
    }

    /// Is the token just the likeliest one, whatever came before, and nothing else asked for?
    pub(crate) fn is_plainly_greedy(&self) -> bool {
        self.sampling.temperature == 0.0 && self.sampling.logprobs.is_none() && self.penalties.are_none()
    }

    /// Chooses the generated token number `index` (from 0) from logits `[1, vocabulary]`; `history` as for [`Penalties::apply`].
    pub(crate) fn draw(
        &mut self,
        device: &Device,
        logits: Array,
        history: Option<&Array>,
        index: u64,
    ) -> Result<Draw> {
        self.draw_among(device, logits, history, index, None)
    }

    /// The same among the tokens that `allowed` `[1, vocabulary]` says are possible; None for all. The others have no probability
    /// at all, whatever the penalties.
    pub(crate) fn draw_among(
        &mut self,
        device: &Device,
        logits: Array,
        history: Option<&Array>,
        index: u64,
        allowed: Option<&Array>,
    ) -> Result<Draw> {
        let logits = self.penalties.apply(device, logits, history)?;
        let logits = match allowed {
            Some(allowed) => device.select(allowed, &logits, &minus_infinity(&logits)?)?,
            None => logits,
        };
        let norm = device.logsumexp_all(&logits)?;
        let logprobs = device.subtract(&logits, &norm)?;
        let finite = device.is_finite(&norm)?;
        let token = if self.sampling.temperature == 0.0 {
            device.argmax(&logprobs, -1, false)?
        } else {
            self.random(device, logprobs.clone(), index)?
        };
        let told = told(device, &finite, &token)?;
        let wanted = self.sampling.logprobs;
        let top = match wanted {
            Some(request) if request.top > 0 => Some(likeliest(device, &logprobs, request.top)?),
            _ => None,
        };
        Ok(Draw { token, logprobs: wanted.map(|_| logprobs), told, top })
    }

    fn random(&mut self, device: &Device, mut logprobs: Array, index: u64) -> Result<Array> {
        let (first, second) = self.keys.of_token(index);
        let sampling = &self.sampling;
        if sampling.top_p > 0.0 && sampling.top_p < 1.0 {
            logprobs = top_p(device, logprobs, sampling.top_p)?;
        }
        if sampling.min_p != 0.0 {
            logprobs = min_p(device, logprobs, sampling.min_p, sampling.min_tokens_to_keep)?;
        }
        let mut key = first;
        if let Some(xtc) = sampling.xtc.as_ref().filter(|xtc| xtc.probability > 0.0) {
            logprobs = exclude_top_choices(device, logprobs, xtc, self.protected.as_ref(), first)?;
            key = second;
        }
        if sampling.top_k > 0 {
            logprobs = top_k(device, logprobs, sampling.top_k)?;
        }
        let inverse = Array::scalar((1.0 / as_written(sampling.temperature)) as f32, logprobs.dtype())?;
        device.categorical(&device.multiply(&logprobs, &inverse)?, key)
    }
}

impl Draw {
    /// What must be evaluated before [`Self::read`] returns at once.
    pub(crate) fn arrays(&self) -> impl Iterator<Item = &Array> {
        let top = self.top.iter().flat_map(|(tokens, logprobs)| [tokens, logprobs]);
        [&self.token, &self.told].into_iter().chain(self.logprobs.iter()).chain(top)
    }

    /// What the host is told: [`Self::read_told`] takes it.
    pub(super) fn told(&self) -> &Array {
        &self.told
    }

    /// Waits for the token. None when the logits were not finite numbers.
    pub(crate) fn read(&self, device: &Device) -> Result<Option<Sampled>> {
        self.read_told(device, self.told.item_u32()?)
    }

    /// The same when what the host is told was read already, with that of other draws.
    pub(super) fn read_told(&self, device: &Device, token: u32) -> Result<Option<Sampled>> {
        if token == NO_TOKEN {
            return Ok(None);
        }
        let logprob = match &self.logprobs {
            Some(logprobs) => {
                let column = token as i32;
                let chosen = device.slice(logprobs, &[0, column], &[1, column + 1])?;
                device.contiguous(&chosen)?.to_f32()?.first().copied()
            }
            None => None,
        };
        let mut top = Vec::new();
        if let Some((tokens, logprobs)) = &self.top {
            let pairs = tokens.to_u32()?.into_iter().zip(logprobs.to_f32()?);
            top.extend(pairs.map(|(token, logprob)| Candidate { token, logprob }));
            top.sort_by(|a, b| b.logprob.total_cmp(&a.logprob).then(a.token.cmp(&b.token)));
        }
        Ok(Some(Sampled { token, logprob, top }))
    }
}

/// The tokens where the logits are numbers, else [`NO_TOKEN`]. Only for the host: it is no token to look a vector up for.
pub(super) fn told(device: &Device, finite: &Array, tokens: &Array) -> Result<Array> {
    device.select(finite, tokens, &Array::from_u32(&[NO_TOKEN], &[])?)
}

/// Ids and log-probabilities of the `count` likeliest of `[1, vocabulary]`, in any order.
fn likeliest(device: &Device, logprobs: &Array, count: usize) -> Result<(Array, Array)> {
    let count = count as i32;
    let order = device.argpartition(&device.negative(logprobs)?, count - 1, -1)?;
    let tokens = device.slice(&order, &[0, 0], &[1, count])?;
    let values = device.take_along(logprobs, &tokens, -1)?;
    let flat = |array: &Array| device.contiguous(&device.reshape(array, &[-1])?);
    Ok((flat(&tokens)?, flat(&values)?))
}

/// Keeps the smallest set of likeliest tokens that holds `mass` of the probability, ties included.
fn top_p(device: &Device, logprobs: Array, mass: f32) -> Result<Array> {
    let sorted = device.sort(&logprobs, -1)?;
    let probabilities = device.exp(&device.cast(&sorted, Dtype::F32)?)?;
    let above = device.suffix_sum(&probabilities, -1)?;
    let first = |array: &Array| device.slice(array, &[0, 0], &[1, 1]);
    let total = device.add(&first(&above)?, &first(&probabilities)?)?;
    let limit = device.multiply(&Array::scalar(mass, Dtype::F32)?, &total)?;
    let dropped = device.sum(&device.greater_equal(&above, &limit)?, -1, true)?;
    let threshold = device.take_along(&sorted, &dropped, -1)?;
    device.select(&device.less(&logprobs, &threshold)?, &minus_infinity(&logprobs)?, &logprobs)
}

/// Drops tokens below `floor` times the probability of the likeliest, but leaves `keep`.
fn min_p(device: &Device, logprobs: Array, floor: f32, keep: usize) -> Result<Array> {
    let best = device.max(&logprobs, -1, true)?;
    let limit = device.add(&best, &Array::scalar(as_written(floor).ln() as f32, logprobs.dtype())?)?;
    let mut dropped = device.less(&logprobs, &limit)?;
    let vocabulary = logprobs.dim(-1);
    let keep = i32::try_from(keep).unwrap_or(i32::MAX);
    if keep >= vocabulary {
        return Ok(logprobs);
    }
    if keep > 1 {
        let order = device.argpartition(&logprobs, -keep, -1)?;
        let best = device.slice(&order, &[0, vocabulary - keep], &[1, vocabulary])?;
        dropped = device.put_along(&dropped, &best, &no()?, -1)?;
    }
    device.select(&dropped, &minus_infinity(&logprobs)?, &logprobs)
}

/// With the probability of `xtc`, drops all tokens above its threshold but the least likely of them.
fn exclude_top_choices(
    device: &Device,
    logprobs: Array,
    xtc: &Xtc,
    protected: Option<&Array>,
    key: RandomKey,
) -> Result<Array> {
    let probabilities = device.softmax(&logprobs, -1, false)?;
    let dtype = probabilities.dtype();
    let is_top = device.greater(&probabilities, &Array::scalar(xtc.threshold, dtype)?)?;
    let tops = device.select(&is_top, &probabilities, &Array::scalar(f32::INFINITY, dtype)?)?;
    let mut dropped = device.greater(&probabilities, &device.min(&tops, -1, true)?)?;
    if let Some(protected) = protected {
        dropped = device.put_along(&dropped, protected, &no()?, -1)?;
    }
    let without = device.select(&dropped, &minus_infinity(&logprobs)?, &logprobs)?;
    let spared = device.greater(&device.uniform(key)?, &Array::scalar(xtc.probability, Dtype::F32)?)?;
    device.select(&spared, &logprobs, &without)
}

/// Keeps the `count` likeliest.
fn top_k(device: &Device, logprobs: Array, count: usize) -> Result<Array> {
    let vocabulary = logprobs.dim(-1);
    let count = i32::try_from(count).unwrap_or(i32::MAX);
    if count >= vocabulary {
        return Ok(logprobs);
    }
    let order = device.argpartition(&device.negative(&logprobs)?, count - 1, -1)?;
    let rest = device.slice(&order, &[0, count], &[1, vocabulary])?;
    device.put_along(&logprobs, &rest, &minus_infinity(&logprobs)?, -1)
}

/// The double-precision number with the same shortest decimal notation: what Python makes of the "0.7" that a person wrote. Without
/// it, arithmetic in double precision would start from 0.699999988.
fn as_written(value: f32) -> f64 {
    value.to_string().parse().unwrap_or(f64::from(value))
}

/// The chain of keys that a seeded global generator hands out, `draws` for each token. Remembers where it stood lately, so that
/// going on and going back a few tokens costs little; going back further starts over.
struct KeyChain {
    draws: u32,
    /// Tokens and the key before theirs, ascending; the first is the seed's or the oldest that is remembered.
    stations: VecDeque<(u64, RandomKey)>,
    start: RandomKey,
}

/// How many tokens back a chain can go at once: more than a draft has.
const STATIONS: usize = 64;

impl KeyChain {
    fn new(seed: u64, draws: u32) -> Self {
        let start = RandomKey::new(seed);
        Self { draws, stations: VecDeque::from([(0, start)]), start }
    }

    /// The first and the second key of a token; equal when a token needs only one.
    fn of_token(&mut self, index: u64) -> (RandomKey, RandomKey) {
        while self.stations.back().is_some_and(|(token, _)| *token > index) {
            self.stations.pop_back();
        }
        let (mut token, mut key) = self.stations.back().copied().unwrap_or((0, self.start));
        loop {
            let (mut chain, first) = key.split();
            let mut second = first;
            if self.draws == 2 {
                (chain, second) = chain.split();
            }
            if token == index {
                self.remember(token, key);
                self.remember(token + 1, chain);
                return (first, second);
            }
            (token, key) = (token + 1, chain);
        }
    }

    fn remember(&mut self, token: u64, key: RandomKey) {
        if self.stations.back().is_none_or(|(last, _)| *last < token) {
            self.stations.push_back((token, key));
        }
        if self.stations.len() > STATIONS {
            self.stations.pop_front();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_are_a_function_of_seed_and_index() {
        for draws in [1, 2] {
            let mut straight = KeyChain::new(7, draws);
            let keys: Vec<_> = (0..5).map(|index| straight.of_token(index)).collect();
            let mut jumping = KeyChain::new(7, draws);
            assert_eq!(jumping.of_token(4), keys[4]);
            assert_eq!(jumping.of_token(1), keys[1]);
            assert_eq!(jumping.of_token(1), keys[1]);
            assert_ne!(keys[0], keys[1]);
            let far = straight.of_token(300);
            assert_eq!(straight.of_token(2), keys[2]);
            assert_eq!(jumping.of_token(300), far);
            assert_eq!(jumping.of_token(299), straight.of_token(299));
        }
    }

    fn kept(filter: impl FnOnce(&Device, Array) -> Result<Array>) -> Vec<bool> {
        let device = Device::open().unwrap();
        let probabilities = [0.1_f32, 0.5, 0.05, 0.25, 0.1];
        let logprobs: Vec<f32> = probabilities.iter().map(|probability| probability.ln()).collect();
        let logprobs = Array::from_f32(&logprobs, &[1, 5]).unwrap();
        filter(&device, logprobs).unwrap().to_f32().unwrap().iter().map(|value| value.is_finite()).collect()
    }

    #[test]
    fn filters_keep_what_their_rules_say() {
        let (x, o) = (true, false);
        assert_eq!(kept(|device, logprobs| top_p(device, logprobs, 0.7)), [o, x, o, x, o]);
        assert_eq!(kept(|device, logprobs| top_p(device, logprobs, 0.76)), [x, x, o, x, x], "ties are kept");
        assert_eq!(kept(|device, logprobs| min_p(device, logprobs, 0.3, 1)), [o, x, o, x, o]);
        assert_eq!(kept(|device, logprobs| min_p(device, logprobs, 1.0, 2)), [o, x, o, x, o]);
        assert_eq!(kept(|device, logprobs| min_p(device, logprobs, 1.0, 99)), [x, x, x, x, x]);
        assert_eq!(kept(|device, logprobs| top_k(device, logprobs, 2)), [o, x, o, x, o]);
        let xtc = Xtc { probability: 1.0, threshold: 0.2, special_tokens: vec![] };
        let key = RandomKey::new(1);
        assert_eq!(
            kept(|device, logprobs| exclude_top_choices(device, logprobs, &xtc, None, key)),
            [x, o, x, x, x]
        );
        let protected = Array::from_u32(&[1], &[1, 1]).unwrap();
        let spare =
            |device: &Device, logprobs| exclude_top_choices(device, logprobs, &xtc, Some(&protected), key);
        assert_eq!(kept(spare), [x, x, x, x, x]);
    }

    #[test]
    fn not_a_number_is_noticed() {
        let device = Device::open().unwrap();
        let mut sampler = Sampler::new(Sampling::default(), 3).unwrap();
        let logits = Array::from_f32(&[1.0, f32::NAN, 2.0], &[1, 3]).unwrap();
        assert_eq!(sampler.draw(&device, logits, None, 0).unwrap().read(&device).unwrap(), None);
        let logits = Array::from_f32(&[1.0, 3.0, 2.0], &[1, 3]).unwrap();
        assert_eq!(sampler.draw(&device, logits, None, 0).unwrap().read(&device).unwrap().unwrap().token, 1);
    }
}
