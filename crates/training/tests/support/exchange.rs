//! A group of workers within a process.

use mlxnode_compute::{Deal, Partial, Reduce, ReduceError, Reduced, Sum, TreeSum, Turn};
use std::collections::BTreeMap;
use std::sync::{Arc, Condvar, Mutex};

/// Sums along the tree between threads.
pub struct Exchange {
    workers: u32,
    micro_batches: u32,
    given: Mutex<BTreeMap<u64, (u32, Vec<Partial>)>>,
    changed: Condvar,
    /// Hashes of the workers' parameters, by updates.
    pub told: Mutex<BTreeMap<u64, Vec<[u8; 32]>>>,
}

/// One of them.
pub struct Member {
    pub exchange: Arc<Exchange>,
    pub number: u32,
}

impl Exchange {
    pub fn new(workers: u32, micro_batches: u32) -> Self {
        Self {
            workers,
            micro_batches,
            given: Mutex::default(),
            changed: Condvar::new(),
            told: Mutex::default(),
        }
    }
}

impl Reduce for Member {
    fn begin(&mut self, applied: u64) -> Result<Turn, ReduceError> {
        let (all, workers) = (self.exchange.micro_batches, self.exchange.workers);
        let run = self.number * all / workers..(self.number + 1) * all / workers;
        Ok(Turn::Deal(Deal { epoch: 1, step: applied, micro_batches: all, run }))
    }

    fn is_over(&self, _: &Deal) -> bool {
        false
    }

    fn reduce(&mut self, deal: &Deal, partials: Vec<Partial>) -> Result<Reduced, ReduceError> {
        let mut given = self.exchange.given.lock().unwrap();
        let entry = given.entry(deal.step).or_default();
        entry.0 += 1;
        entry.1.extend(partials);
        self.exchange.changed.notify_all();
        while given[&deal.step].0 < self.exchange.workers {
            given = self.exchange.changed.wait(given).unwrap();
        }
        let mut sum = TreeSum::new(deal.micro_batches);
        for part in &given[&deal.step].1 {
            sum.insert(part.node, part.clone(), |left: Partial, right: Partial| {
                let floats = |bytes: &[u8]| -> Vec<f32> {
                    bytes.chunks_exact(4).map(|four| f32::from_le_bytes(four.try_into().unwrap())).collect()
                };
                let values = floats(&left.values).into_iter().zip(floats(&right.values));
                let values: Vec<u8> = values.flat_map(|(one, other)| (one + other).to_le_bytes()).collect();
                let node = left.node;
                Ok::<_, ReduceError>(Partial {
                    node,
                    values: values.into(),
                    tally: left.tally.plus(right.tally),
                })
            })?;
        }
        let (_, whole) = sum.parts().next().unwrap();
        Ok(Reduced::Sum(Sum { step: deal.step, values: whole.values.clone(), tally: whole.tally }))
    }

    fn applied(&mut self, updates: u64, parameters: [u8; 32]) {
        self.exchange.told.lock().unwrap().entry(updates).or_default().push(parameters);
    }
}
