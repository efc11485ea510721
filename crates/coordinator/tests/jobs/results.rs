//! What jobs made: what is served, wanted, and where its copies are.

use crate::world::*;

fn published(id: &str, step: u64, adapter: &str, problem: Option<&str>) -> Record {
    let hash = state_after(id, step);
    let publication = Publication {
        hash,
        deployment: "demo".into(),
        adapter: adapter.into(),
        problem: problem.map(str::to_owned),
    };
    Record::Published { id: id.to_owned(), publication, at: 1 }
}

fn wants(jobs: &Jobs, id: &str, step: u64) -> bool {
    let wanted = jobs.wanted();
    let job = wanted.iter().find(|job| job.id == id);
    job.is_some_and(|job| job.checkpoints.iter().any(|it| it.hash == state_after(id, step)))
}

/// A job `a` that has saved after 3 and 6 steps, and keeps 2 checkpoints.
fn world_with_checkpoints() -> World {
    let mut world = World::new();
    world.submit("a");
    (0..8).for_each(|_| world.advance(0));
    assert!(wants(&world.jobs, "a", 3) && wants(&world.jobs, "a", 6));
    world
}

#[test]
fn what_is_served_stays_when_something_else_cannot_take_its_place() {
    let mut world = world_with_checkpoints();
    let _ = world.write(published("a", 3, "poet", None));
    let _ = world.write(published("a", 6, "poet", Some("the name is taken")));
    let view = world.jobs.view().remove(0);
    let told: Vec<bool> = view.publications.iter().map(|it| it.problem.is_none()).collect();
    assert_eq!(told, [true, false], "the one is served, the other is not");
    (0..7).for_each(|_| world.advance(0));
    assert!(wants(&world.jobs, "a", 3), "a node that starts again reads it");
    // Failures make room for each other, not what is served.
    for number in 0..40 {
        let _ = world.write(published("a", 6, &format!("poet-{number}"), Some("no")));
    }
    assert!(wants(&world.jobs, "a", 3));
    let _ = world.write(published("a", 9, "poet", None));
    let publications = &world.jobs.view()[0].publications;
    let of_poet: Vec<ContentHash> =
        publications.iter().filter(|it| it.adapter == "poet").map(|it| it.hash).collect();
    assert_eq!(of_poet, [state_after("a", 9)], "what is served in its place is all that counts");
}

#[test]
fn what_deployments_serve_is_wanted_though_the_job_forgot_it() {
    let mut world = world_with_checkpoints();
    // A call to serve it is under way while the job goes on.
    let source = artifact_source("a", state_after("a", 3));
    let unrelated = ["/adapters/poet".to_owned(), artifact_source("gone", state_after("a", 3))];
    world.jobs.pin(unrelated.iter().chain([&source]).map(String::as_str));
    (0..8).for_each(|_| world.advance(0));
    assert!(wants(&world.jobs, "a", 3), "it is about to be served");
    world.jobs.pin([]);
    assert!(!wants(&world.jobs, "a", 3), "and then it is not any more");
}

#[test]
fn a_job_whose_result_is_served_is_not_forgotten_to_make_room() {
    let mut jobs = Jobs::default();
    for number in 0..MAX_JOBS as u64 {
        jobs.apply(Record::Submitted { spec: Box::new(spec(&format!("job-{number}"))), at: number });
    }
    for id in ["job-3", "job-4"] {
        let cancelled = jobs.cancel(id, 1).unwrap().unwrap();
        jobs.apply(cancelled);
    }
    let source = artifact_source("job-3", state_after("job-3", 3));
    jobs.pin([source.as_str()]);
    let records = jobs.submit(spec("one-more"), 1).unwrap().unwrap();
    assert_eq!(records[0], Record::Removed { id: "job-4".into() });
    records.into_iter().for_each(|record| drop(jobs.apply(record)));
    let refused = jobs.submit(spec("another"), 1).unwrap_err().to_string();
    assert!(refused.contains("served"), "{refused}");
}

#[test]
fn an_emptied_disk_and_a_node_that_left_are_no_copies() {
    let holders = |world: &World| -> BTreeSet<NodeId> {
        let view = world.jobs.view().remove(0);
        view.checkpoints.last().expect("a checkpoint").holders.iter().copied().collect()
    };
    let mut world = World::new();
    world.submit("a");
    for _ in 0..40 {
        world.advance(0);
        world.finish_copy(true);
        world.hear_what_is_there();
    }
    let two = holders(&world);
    assert_eq!((two.len(), world.jobs.view()[0].state), (2, JobState::Finished));
    // A disk is replaced; its node comes back and says what it has.
    let emptied = *two.first().unwrap();
    world.disks.remove(&emptied);
    let number = (0..NODES).find(|number| node(*number) == emptied).unwrap();
    world.lose_node(number, false);
    world.revive_node(number);
    while !world.tidied.is_empty() {
        world.hear_what_is_there();
    }
    assert_eq!(holders(&world).len(), 1, "it is known to be gone");
    world.finish_copy(true);
    let two = holders(&world);
    assert_eq!(two.len(), 2, "and is copied again");
    // Another one leaves the cluster.
    let left = *two.last().unwrap();
    let asked = world.jobs.holders();
    let members = (0..NODES).map(node).filter(|node| *node != left).collect();
    world.alive.remove(&left);
    world.happen(Event::Tidied { asked, tidied: Tidied { members, ..Tidied::default() } });
    assert!(!holders(&world).contains(&left));
    world.finish_copy(true);
    assert_eq!(holders(&world).len(), 2);
    // An answer that is older than what is known by now takes nothing away.
    let stale = Tidied {
        held: (0..NODES).map(|number| (node(number), BTreeSet::new())).collect(),
        ..Tidied::default()
    };
    world.happen(Event::Tidied { asked: BTreeMap::new(), tidied: stale });
    assert_eq!(holders(&world).len(), 2);
}
