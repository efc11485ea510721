//! How much each key may ask still: a token bucket for its requests and one for its tokens.
//!
//! A bucket holds a minute's worth at most and fills evenly, so that within any minute no more than twice the limit goes through and on
//! average never more than the limit. What a request costs in tokens is known only as it is worked on: it is taken then, below zero
//! if need be, and the next request waits until the bucket is above it again.

use crate::keys::KeyEntry;
use std::collections::HashMap;
use std::time::{Duration, Instant};

const MINUTE: f64 = 60.0;

/// The buckets of all keys that asked and have a limit.
#[derive(Debug, Default)]
pub struct Buckets {
    by_tenant: HashMap<String, Pair>,
}

#[derive(Debug)]
struct Pair {
    requests: Option<Bucket>,
    tokens: Option<Bucket>,
}

#[derive(Debug)]
struct Bucket {
    /// In a minute, and at most at once.
    limit: f64,
    level: f64,
    filled: Instant,
}

/// What a key may ask still; for the headers of an answer. None: no limit.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Balance {
    /// Requests.
    pub requests: Option<Allowance>,
    /// Tokens.
    pub tokens: Option<Allowance>,
}

/// One bucket as a client sees it.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Allowance {
    /// In a minute.
    pub limit: u64,
    /// Now.
    pub remaining: u64,
    /// Until it is full again.
    pub reset: Duration,
}

/// A limit was reached.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
#[error("this API key may use {limit} {what} a minute on this node; try again in {} s", super::retry_seconds(*wait))]
pub struct Exhausted {
    /// "requests" or "tokens".
    pub what: &'static str,
    /// In a minute.
    pub limit: u64,
    /// Until the next request is let in.
    pub wait: Duration,
    /// All of it.
    pub balance: Balance,
}

impl Bucket {
    fn full(limit: u32, now: Instant) -> Self {
        let limit = f64::from(limit);
        Self { limit, level: limit, filled: now }
    }

    fn fill(&mut self, now: Instant) {
        let seconds = now.saturating_duration_since(self.filled).as_secs_f64();
        self.level = (self.level + seconds * self.limit / MINUTE).min(self.limit);
        self.filled = self.filled.max(now);
    }

    /// Until `level` is there. (A little more is no harm; a little less would make a client that waits exactly so long fail.)
    fn until(&self, level: f64) -> Duration {
        let seconds = (level - self.level).max(0.0) * MINUTE / self.limit;
        Duration::from_secs_f64(seconds) + Duration::from_nanos(1)
    }

    fn allowance(&self) -> Allowance {
        Allowance {
            limit: self.limit as u64,
            remaining: self.level.max(0.0) as u64,
            reset: if self.level >= self.limit { Duration::ZERO } else { self.until(self.limit) },
        }
    }
}

impl Pair {
    fn new(key: &KeyEntry, now: Instant) -> Self {
        let bucket = |limit: Option<u32>| limit.map(|limit| Bucket::full(limit, now));
        Self {
            requests: bucket(key.limits.requests_per_minute),
            tokens: bucket(key.limits.tokens_per_minute),
        }
    }

    fn balance(&self) -> Balance {
        Balance {
            requests: self.requests.as_ref().map(Bucket::allowance),
            tokens: self.tokens.as_ref().map(Bucket::allowance),
        }
    }
}

impl Buckets {
    /// Takes one request of this key, if there is one, and tells what is left. `keys` are all that are valid: others are forgotten.
    ///
    /// # Errors
    /// When no request is left, or the tokens are used up.
    pub fn admit(&mut self, key: &KeyEntry, keys: &[KeyEntry], now: Instant) -> Result<Balance, Exhausted> {
        let limits = key.limits;
        if limits.requests_per_minute.is_none() && limits.tokens_per_minute.is_none() {
            return Ok(Balance::default());
        }
        if self.by_tenant.len() > keys.len() {
            self.by_tenant.retain(|tenant, _| keys.iter().any(|key| key.tenant() == *tenant));
        }
        let pair = self.by_tenant.entry(key.tenant()).or_insert_with(|| Pair::new(key, now));
        let mut denied = None;
        if let Some(tokens) = &mut pair.tokens {
            tokens.fill(now);
            // One whole token, so that a client that waits is not let in for a splinter of one.
            if tokens.level < 1.0 {
                denied = Some(("tokens", tokens.limit as u64, tokens.until(1.0)));
            }
        }
        if let Some(requests) = &mut pair.requests {
            requests.fill(now);
            if requests.level < 1.0 {
                let wait = requests.until(1.0);
                let is_longest = denied.is_none_or(|(_, _, other)| wait > other);
                if is_longest {
                    denied = Some(("requests", requests.limit as u64, wait));
                }
            } else if denied.is_none() {
                requests.level -= 1.0;
            }
        }
        let balance = pair.balance();
        match denied {
            Some((what, limit, wait)) => Err(Exhausted { what, limit, wait, balance }),
            None => Ok(balance),
        }
    }

    /// Takes tokens, also those that are not there.
    pub fn spend(&mut self, tenant: &str, tokens: u64, now: Instant) {
        let Some(Pair { tokens: Some(bucket), .. }) = self.by_tenant.get_mut(tenant) else { return };
        bucket.fill(now);
        // A debt of more than a minute would be a ban: a long answer is not a crime.
        bucket.level = (bucket.level - tokens as f64).max(-bucket.limit);
    }

    #[cfg(test)]
    pub(super) fn len(&self) -> usize {
        self.by_tenant.len()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::keys::{KeyHash, KeyLimits, KeyRole};

    fn key(byte: u8, requests: Option<u32>, tokens: Option<u32>) -> KeyEntry {
        KeyEntry {
            name: format!("key{byte}"),
            hash: KeyHash::from_bytes([byte; 32]),
            role: KeyRole::User,
            models: Vec::new(),
            limits: KeyLimits { requests_per_minute: requests, tokens_per_minute: tokens },
            created_unix: 0,
        }
    }

    fn seconds(seconds: f64) -> Duration {
        Duration::from_secs_f64(seconds)
    }

    #[test]
    fn requests_come_back_evenly_and_the_told_wait_is_enough() {
        let key = key(1, Some(6), None);
        let keys = [key.clone()];
        let mut buckets = Buckets::default();
        let start = Instant::now();
        for left in (0..6).rev() {
            let balance = buckets.admit(&key, &keys, start).unwrap();
            assert_eq!(balance.requests.map(|it| (it.limit, it.remaining)), Some((6, left)));
        }
        let denied = buckets.admit(&key, &keys, start).unwrap_err();
        assert_eq!((denied.what, denied.limit), ("requests", 6));
        assert!(denied.wait > seconds(9.9) && denied.wait < seconds(10.1), "{denied:?}");
        assert!(buckets.admit(&key, &keys, start + denied.wait - seconds(0.1)).is_err());
        assert!(buckets.admit(&key, &keys, start + denied.wait).is_ok());
        assert!(buckets.admit(&key, &keys, start + denied.wait).is_err());
        // After a long pause a minute's worth, not an hour's.
        let later = start + seconds(3600.0);
        assert_eq!((0..100).filter(|_| buckets.admit(&key, &keys, later).is_ok()).count(), 6);
    }

    #[test]
    fn tokens_are_taken_afterwards_and_a_debt_has_to_be_paid() {
        let key = key(1, None, Some(600));
        let keys = [key.clone()];
        let mut buckets = Buckets::default();
        let start = Instant::now();
        buckets.admit(&key, &keys, start).unwrap();
        buckets.spend(&key.tenant(), 700, start);
        let denied = buckets.admit(&key, &keys, start).unwrap_err();
        assert_eq!(denied.what, "tokens");
        assert!(denied.wait > seconds(10.0) && denied.wait < seconds(10.3), "{denied:?}");
        assert!(denied.to_string().contains("600 tokens a minute"), "{denied}");
        assert!(buckets.admit(&key, &keys, start + denied.wait).is_ok());
        // An enormous answer is paid for within two minutes.
        buckets.spend(&key.tenant(), 1_000_000, start);
        assert!(buckets.admit(&key, &keys, start + seconds(120.0)).is_ok());
    }

    #[test]
    fn a_denied_request_costs_nothing_and_a_clock_that_goes_back_does_no_harm() {
        let key = key(1, Some(2), Some(60));
        let keys = [key.clone()];
        let mut buckets = Buckets::default();
        let start = Instant::now() + seconds(100.0);
        buckets.admit(&key, &keys, start).unwrap();
        buckets.spend(&key.tenant(), 60, start);
        for _ in 0..5 {
            let denied = buckets.admit(&key, &keys, start - seconds(50.0)).unwrap_err();
            assert_eq!(denied.balance.requests.map(|it| it.remaining), Some(1));
        }
        assert!(buckets.admit(&key, &keys, start + seconds(2.0)).is_ok());
    }

    #[test]
    fn keys_do_not_share_and_those_without_limits_cost_no_memory() {
        let (first, second, free) = (key(1, Some(1), None), key(2, Some(1), None), key(3, None, None));
        let keys = [first.clone(), second.clone(), free.clone()];
        let mut buckets = Buckets::default();
        let now = Instant::now();
        assert!(buckets.admit(&first, &keys, now).is_ok());
        assert!(buckets.admit(&first, &keys, now).is_err());
        assert!(buckets.admit(&second, &keys, now).is_ok());
        for _ in 0..100 {
            assert_eq!(buckets.admit(&free, &keys, now), Ok(Balance::default()));
        }
        assert_eq!(buckets.len(), 2);
        // Revoked keys are forgotten.
        let left = [second.clone()];
        let _ = buckets.admit(&second, &left, now);
        assert_eq!(buckets.len(), 1);
    }
}
