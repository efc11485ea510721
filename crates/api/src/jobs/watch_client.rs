//! The jobs as somebody who watches them knows them.

use super::view::JobView;
use super::wire::shown;
use mlxnode_proto::v1::ListJobsResponse;

/// Collects what `Jobs.Watch` tells of all jobs. Begin with an empty one for each call.
#[derive(Clone, Debug, Default)]
pub struct WatchedJobs {
    /// The newest first.
    jobs: Vec<JobView>,
    /// What came of the look that is under way.
    coming: Vec<JobView>,
}

impl WatchedJobs {
    /// Takes a message in; all jobs as they are now, the newest first, when a look is whole.
    pub fn take(&mut self, message: ListJobsResponse) -> Option<&[JobView]> {
        self.coming.extend(message.jobs.into_iter().map(shown));
        self.jobs.retain(|job| !message.removed.contains(&job.id));
        if message.more {
            return None;
        }
        let mut new = Vec::new();
        for job in self.coming.drain(..) {
            match self.jobs.iter_mut().find(|known| known.id == job.id) {
                Some(known) => *known = job,
                None => new.push(job),
            }
        }
        self.jobs.splice(0..0, new);
        Some(&self.jobs)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use mlxnode_proto::v1::{Job, SubmitJobRequest};

    fn message(jobs: &str, removed: &[&str], more: bool) -> ListJobsResponse {
        let job = |id: char| Job {
            wish: Some(SubmitJobRequest { id: id.to_string(), ..Default::default() }),
            ..Default::default()
        };
        let removed = removed.iter().map(|id| (*id).to_owned()).collect();
        ListJobsResponse { jobs: jobs.chars().map(job).collect(), removed, more }
    }

    #[test]
    fn what_is_new_comes_first_and_what_is_known_keeps_its_place() {
        let mut watched = WatchedJobs::default();
        let ids = |jobs: Option<&[JobView]>| {
            jobs.map(|jobs| jobs.iter().map(|job| job.id.as_str()).collect::<String>())
        };
        assert_eq!(ids(watched.take(message("dc", &[], true))), None);
        assert_eq!(ids(watched.take(message("ba", &[], false))).as_deref(), Some("dcba"));
        assert_eq!(ids(watched.take(message("ec", &["b"], false))).as_deref(), Some("edca"));
        assert_eq!(ids(watched.take(message("", &["e", "d"], false))).as_deref(), Some("ca"));
    }
}
