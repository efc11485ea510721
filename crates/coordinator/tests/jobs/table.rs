//! What the table takes, refuses, forgets and does not believe.

use crate::world::*;
use mlxnode_coordinator::jobs::TrainingDemand;

#[test]
fn the_same_id_is_the_same_job_or_an_error() {
    let mut world = World::new();
    world.submit("a");
    assert_eq!(world.jobs.submit(spec("a"), 5), Ok(None));
    let again = JobSpec { owner: "ann".into(), ..spec("a") };
    assert_eq!(world.jobs.submit(again, 5), Ok(None), "whoever asks");
    let demand = Some(TrainingDemand { rows: 2, ..TrainingDemand::default() });
    let records = world.jobs.submit(JobSpec { demand, ..spec("b") }, 5).unwrap().unwrap();
    records.into_iter().for_each(|record| drop(world.jobs.apply(record)));
    assert_eq!(world.jobs.submit(spec("b"), 5), Ok(None), "what it takes is not said by everybody");
    let other = JobSpec { configuration: "iters: 2".into(), ..spec("a") };
    assert!(matches!(world.jobs.submit(other, 5), Err(Error::NameTaken { .. })));
    assert!(matches!(world.jobs.cancel("c", 5), Err(Error::NotFound(_))));
}

#[test]
fn an_attempt_that_is_over_changes_nothing() {
    let mut world = World::new();
    world.submit("a");
    let old = world.runners[0].clone();
    world.kill_worker(0);
    world.now += Duration::from_secs(60);
    world.carry_out(Vec::new());
    assert_eq!(world.runners.len(), 1, "it runs again");
    let before = world.jobs.records();
    let wrong = Checkpoint { step: STEPS, hash: ContentHash::of(b"wrong"), bytes: 1 };
    for event in [
        Event::Reported { id: "a".into(), epoch: old.epoch, report: Report::Checkpointed(wrong.clone()) },
        Event::RunEnded { id: "a".into(), epoch: old.epoch, result: Ok(RunEnd::Finished(wrong.clone())) },
        Event::RunEnded { id: "a".into(), epoch: old.epoch, result: Ok(RunEnd::Failed("no".into())) },
    ] {
        world.happen(event);
        assert_eq!(world.jobs.records(), before);
    }
    // Even as a record, from a coordinator that slept.
    let (node, points) = (old.node, Vec::new());
    let stale = Record::Finished { id: "a".into(), epoch: old.epoch, checkpoint: wrong, node, points, at: 9 };
    world.jobs.apply(stale);
    assert_eq!(world.jobs.records(), before);
}

#[test]
fn a_full_table_forgets_the_oldest_that_is_over_and_refuses_when_none_is() {
    let mut jobs = Jobs::default();
    for number in 0..MAX_JOBS as u64 {
        jobs.apply(Record::Submitted { spec: Box::new(spec(&format!("job-{number}"))), at: number });
    }
    assert!(matches!(jobs.submit(spec("one-more"), 1), Err(Error::TooMany(_))));
    let cancelled = jobs.cancel("job-7", 1).unwrap().unwrap();
    jobs.apply(cancelled);
    let records = jobs.submit(spec("one-more"), 1).unwrap().unwrap();
    assert_eq!(records[0], Record::Removed { id: "job-7".into() });
    records.into_iter().for_each(|record| drop(jobs.apply(record)));
    let wanted: Vec<Wanted> = jobs.wanted();
    assert_eq!(wanted.len(), MAX_JOBS);
    assert!(!wanted.iter().any(|job| job.id == "job-7"));
}

#[test]
fn one_key_leaves_room_for_the_jobs_of_others() {
    let mut jobs = Jobs::default();
    let owned = |id: String, owner: &str| JobSpec { owner: owner.into(), ..spec(&id) };
    let most = MAX_JOBS * 3 / 4;
    for number in 0..most {
        let records = jobs.submit(owned(format!("job-{number}"), "ann"), 1).unwrap().unwrap();
        records.into_iter().for_each(|record| drop(jobs.apply(record)));
    }
    let refused = jobs.submit(owned("one-more".into(), "ann"), 1).unwrap_err();
    assert!(matches!(&refused, Error::TooMany(text) if text.contains("ann")), "{refused}");
    assert!(jobs.submit(owned("another".into(), "bob"), 1).is_ok(), "others have room");
    assert!(jobs.submit(owned("another".into(), ""), 1).is_ok());
    assert_eq!(jobs.submit(owned("job-0".into(), "ann"), 1), Ok(None), "what is there is no further one");
    let cancelled = jobs.cancel("job-3", 2).unwrap().unwrap();
    jobs.apply(cancelled);
    assert!(jobs.submit(owned("one-more".into(), "ann"), 3).is_ok(), "what is over does not count");
}
