//! Orders to stop that come before the attempt they are for.
//!
//! The order to run and the order to stop travel on their own, and an attempt waits for an older one to end before it is known as running:
//! an order to stop that finds nothing is kept for it.

use std::collections::BTreeMap;

/// Jobs whose last order is remembered; of more, those of the oldest attempts are forgotten.
const MOST: usize = 1024;

/// What a run is told.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Will {
    Run,
    /// Save a checkpoint and end.
    SaveAndEnd,
    End,
}

/// The last order to stop of each job.
#[derive(Debug, Default)]
pub(super) struct Stops {
    told: BTreeMap<String, (u64, Will)>,
}

impl Stops {
    /// Attempts up to this epoch are to end so.
    pub(super) fn tell(&mut self, id: &str, epoch: u64, will: Will) {
        match self.told.get_mut(id) {
            Some(told) if told.0 > epoch => {}
            Some(told) => *told = (epoch, will),
            None => {
                if self.told.len() >= MOST {
                    let oldest = self.told.iter().min_by_key(|(_, (epoch, _))| *epoch);
                    if let Some(oldest) = oldest.map(|(id, _)| id.clone()) {
                        self.told.remove(&oldest);
                    }
                }
                self.told.insert(id.to_owned(), (epoch, will));
            }
        }
    }

    /// What an attempt that begins was told already.
    pub(super) fn told(&self, id: &str, epoch: u64) -> Will {
        let told = self.told.get(id).filter(|(until, _)| *until >= epoch);
        told.map_or(Will::Run, |(_, will)| *will)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_stop_that_comes_first_is_heard_by_its_attempt_and_not_by_the_next() {
        let mut stops = Stops::default();
        assert_eq!(stops.told("a", 1), Will::Run);
        stops.tell("a", 2, Will::SaveAndEnd);
        assert_eq!((stops.told("a", 1), stops.told("a", 2)), (Will::SaveAndEnd, Will::SaveAndEnd));
        assert_eq!((stops.told("a", 3), stops.told("b", 2)), (Will::Run, Will::Run));
        stops.tell("a", 2, Will::End);
        assert_eq!(stops.told("a", 2), Will::End, "the last word counts");
        stops.tell("a", 1, Will::SaveAndEnd);
        assert_eq!(stops.told("a", 2), Will::End, "of an older attempt");
    }

    #[test]
    fn no_more_than_so_many_are_remembered() {
        let mut stops = Stops::default();
        for number in 0..2 * MOST as u64 {
            stops.tell(&format!("job-{number}"), number, Will::End);
        }
        assert_eq!(stops.told.len(), MOST);
        let newest = 2 * MOST as u64 - 1;
        assert_eq!(stops.told(&format!("job-{newest}"), newest), Will::End);
        assert_eq!(stops.told("job-0", 0), Will::Run);
    }
}
