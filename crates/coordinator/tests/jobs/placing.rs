//! Which node runs what, when an attempt is tried again, and what that takes of memory.

use crate::world::*;

#[test]
fn a_worker_that_dies_again_and_again_fails_the_job_until_it_is_resumed() {
    let mut world = World::new();
    world.submit("a");
    for _ in 0..MAX_FAILURES {
        world.kill_worker(0);
        world.now += Duration::from_secs(120);
        world.carry_out(Vec::new());
    }
    let view = world.jobs.view().remove(0);
    assert_eq!(view.state, JobState::Failed);
    assert!(view.detail.contains("signal 9"), "{}", view.detail);
    world.settle();
}

#[test]
fn what_cannot_run_anywhere_says_what_is_missing() {
    let mut jobs = Jobs::default();
    let large = JobSpec { memory: Some(ByteCount(8_000_000_000)), ..spec("a") };
    let records = jobs.submit(large, 1).unwrap().unwrap();
    records.into_iter().for_each(|record| drop(jobs.apply(record)));
    let offer = JobOffer { node: node(0), name: "desk".into(), free: ByteCount(2_000_000_000) };
    assert!(jobs.schedule(&[offer], 1, Instant::now()).is_empty());
    let view = jobs.view().remove(0);
    assert_eq!(view.state, JobState::WaitingForNodes);
    for words in ["8.0 GB", "2.0 GB", "desk"] {
        assert!(view.detail.contains(words), "{}", view.detail);
    }
}

#[test]
fn a_job_on_two_nodes_waits_for_both_and_begins_again_when_either_is_lost() {
    let mut world = World::new();
    for number in 1..NODES {
        world.lose_node(number, false);
    }
    let divided = |world: &World| {
        let views = world.jobs.view();
        views.into_iter().find(|view| view.spec.id == "job-3").expect("the job")
    };
    world.submit("job-3");
    let view = divided(&world);
    assert_eq!(view.state, JobState::WaitingForNodes);
    assert!(view.detail.contains("waiting for 1 more node"), "{}", view.detail);
    world.revive_node(1);
    for attempt in 1..=3 {
        let view = divided(&world);
        let nodes: BTreeSet<NodeId> = view.stages.iter().map(|stage| stage.node).collect();
        assert_eq!((nodes.len(), view.attempts, view.node), (2, attempt, Some(view.stages[0].node)));
        for node in &nodes {
            assert_eq!(world.jobs.reserved(*node), ByteCount(10));
        }
        // Another job finds no node.
        world.submit("job-1");
        assert_eq!(world.runners.len(), 1);
        // First the one that leads is lost, then the other one.
        let lost = view.stages[usize::from(attempt % 2 == 0)].node;
        let number = (0..NODES).find(|number| node(*number) == lost).unwrap();
        world.lose_node(number, false);
        if attempt % 2 == 0 {
            assert_eq!(world.runners[0].saves_and_ends, Some(false), "it is told that the line is over");
            world.advance(0);
        }
        // The other job, which has the node that is left now, ends.
        let cancelled = world.jobs.cancel("job-1", 1);
        world.change(cancelled);
        world.cancelled.insert("job-1".into());
        if let Some(place) = world.runners.iter().position(|runner| runner.id == "job-1") {
            world.advance(place);
        }
        world.revive_node(number);
        world.now += Duration::from_secs(60);
        world.carry_out(Vec::new());
    }
    assert_eq!(divided(&world).attempts, 4);
    let restored: Vec<Record> = world.log.clone();
    assert!(restored.iter().any(|it| matches!(it, Record::Started { stages, .. } if stages.len() == 2)));
}

#[test]
fn what_is_due_and_cannot_be_done_does_not_wake_the_coordinator_at_once() {
    let mut world = World::new();
    world.lose_node(2, false);
    world.submit("a");
    (0..4).for_each(|_| world.advance(0));
    assert_eq!(world.copies.len(), 1, "to the other node");
    let running = world.runners[0].node;
    let other = (0..2).find(|number| node(*number) != running).unwrap();
    world.lose_node(other, false);
    world.finish_copy(false);
    // The pause after a copy that failed is over, and no node is there to copy to.
    world.now += Duration::from_secs(60);
    world.carry_out(Vec::new());
    // A node that could not be asked, and then none is there.
    let (id, epoch) = ("a".to_owned(), world.runners[0].epoch);
    let result = Err(Error::Unavailable("the hub does not answer".into()));
    world.runners.clear();
    world.happen(Event::RunEnded { id, epoch, result });
    world.alive.clear();
    world.now += Duration::from_secs(60);
    world.carry_out(Vec::new());
    assert!(world.jobs.next_wake(world.now).is_some(), "it is looked at again, later");
    world.settle();
}

#[test]
fn an_attempt_that_did_not_hear_that_it_is_to_stop_is_told_again() {
    let mut world = World::new();
    for (id, is_cancelled) in [("a", true), ("b", false)] {
        world.submit(id);
        let place = world.runners.iter().position(|runner| runner.id == id).unwrap();
        world.stops_are_lost = true;
        let decided = match is_cancelled {
            true => world.jobs.cancel(id, 1),
            false => world.jobs.pause(id, "ann", 1),
        };
        assert!(world.change(decided));
        world.stops_are_lost = false;
        world.carry_out(Vec::new());
        assert_eq!(world.runners[place].saves_and_ends, None, "not at once again");
        let wake = world.jobs.next_wake(world.now).expect("it looks again");
        world.now = wake;
        world.carry_out(Vec::new());
        assert_eq!(world.runners[place].saves_and_ends, Some(!is_cancelled));
    }
}

#[test]
fn what_a_node_cannot_fetch_another_one_may_and_it_is_tried_without_an_end() {
    let mut world = World::new();
    world.submit("a");
    let mut nodes = BTreeSet::new();
    let mut pauses = Vec::new();
    for _ in 0..20 {
        let runner = world.runners.pop().expect("it is tried again");
        nodes.insert(runner.node);
        let result = Err(Error::Unavailable("the hub does not answer".into()));
        world.happen(Event::RunEnded { id: runner.id, epoch: runner.epoch, result });
        assert!(world.runners.is_empty(), "after a pause");
        assert!(world.jobs.view()[0].detail.contains("the hub"), "{:?}", world.jobs.view()[0].detail);
        let wake = world.jobs.next_wake(world.now).expect("it is tried again");
        pauses.push(wake - world.now);
        world.now = wake;
        world.carry_out(Vec::new());
    }
    assert!(nodes.len() > 1, "another node is asked");
    assert!(pauses.is_sorted() && pauses[19] > pauses[0] && pauses[19] <= Duration::from_secs(60));
    world.settle();
}

#[test]
fn a_job_goes_on_where_its_newest_checkpoint_is_unless_its_worker_dies_there_again() {
    let mut world = World::new();
    world.submit("a");
    (0..4).for_each(|_| world.advance(0));
    let first = world.runners[0].node;
    let mut nodes = Vec::new();
    for _ in 0..3 {
        world.kill_worker(0);
        world.now += Duration::from_secs(60);
        world.carry_out(Vec::new());
        nodes.push(world.runners[0].node);
    }
    assert_eq!(nodes[0], first);
    assert!(nodes[1] != first, "{nodes:?}");
    world.settle();
}

#[test]
fn what_a_job_takes_of_the_nodes_that_help_is_reserved() {
    let mut jobs = Jobs::default();
    let wish = JobSpec { workers: 2, kind: JobKind::FineTuning, model: "demo".into(), ..spec("a") };
    let records = jobs.submit(wish, 1).unwrap().unwrap();
    records.into_iter().for_each(|record| drop(jobs.apply(record)));
    let (id, epoch) = ("a".to_owned(), 1);
    let offer = JobOffer { node: node(0), name: String::new(), free: ByteCount(100) };
    for effect in jobs.schedule(&[offer], 1, Instant::now()) {
        let Effect::Record(record) = effect else { panic!("{effect:?}") };
        let effects = jobs.apply(record);
        let Some(Effect::Run { order, .. }) = effects.first() else { panic!("{effects:?}") };
        assert_eq!(order.memory, ByteCount(10), "whoever helps knows what it takes");
    }
    let reserved = |jobs: &Jobs| [0, 1, 2].map(|number| jobs.reserved(node(number)).0);
    assert_eq!(reserved(&jobs), [10, 0, 0]);
    let tell = |jobs: &mut Jobs, nodes: Vec<NodeId>| {
        let report = Report::Helped(nodes);
        jobs.on(Event::Reported { id: id.clone(), epoch, report }, 1, Instant::now());
    };
    tell(&mut jobs, vec![node(2)]);
    assert_eq!(reserved(&jobs), [10, 0, 10]);
    tell(&mut jobs, Vec::new());
    assert_eq!(reserved(&jobs), [10, 0, 0]);
    tell(&mut jobs, vec![node(1)]);
    jobs.on(Event::RunEnded { id: id.clone(), epoch, result: Ok(RunEnd::Yielded) }, 1, Instant::now());
    assert_eq!(reserved(&jobs), [0, 0, 0], "and no longer than it runs");
}

#[test]
fn a_node_runs_one_job_at_a_time_and_the_oldest_goes_first() {
    let mut world = World::new();
    for number in 0..5 {
        world.submit(&format!("job-{number}"));
    }
    let running: BTreeSet<NodeId> = world.runners.iter().map(|runner| runner.node).collect();
    assert_eq!((world.runners.len(), running.len()), (3, 3));
    let ids: Vec<&str> = world.runners.iter().map(|runner| runner.id.as_str()).collect();
    assert_eq!(ids, ["job-0", "job-1", "job-2"]);
    world.settle();
}
