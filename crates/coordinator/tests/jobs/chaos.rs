//! Everything dies everywhere, between any two events: no acknowledged job is lost, none is finished with anything but what it computes.

use crate::world::*;
use proptest::prelude::*;

#[derive(Clone, Debug)]
enum Step {
    Submit(u8),
    Advance(usize),
    FinishCopy(bool),
    FinishPublication(bool),
    HearWhatIsThere,
    KillWorker(usize),
    LoseNode(u8, bool),
    ReviveNode(u8),
    RestartCoordinator(bool),
    RestartAll,
    Cancel(u8),
    Pause(u8),
    Resume(u8),
    LogFails(bool),
    TimePasses(u64),
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        3 => (0..4u8).prop_map(Step::Submit),
        30 => any::<usize>().prop_map(Step::Advance),
        4 => any::<bool>().prop_map(Step::FinishCopy),
        2 => any::<bool>().prop_map(Step::FinishPublication),
        4 => Just(Step::HearWhatIsThere),
        3 => any::<usize>().prop_map(Step::KillWorker),
        2 => (0..NODES, any::<bool>()).prop_map(|(node, cut_off)| Step::LoseNode(node, cut_off)),
        3 => (0..NODES).prop_map(Step::ReviveNode),
        2 => any::<bool>().prop_map(Step::RestartCoordinator),
        1 => Just(Step::RestartAll),
        1 => (0..4u8).prop_map(Step::Cancel),
        1 => (0..4u8).prop_map(Step::Pause),
        2 => (0..4u8).prop_map(Step::Resume),
        1 => any::<bool>().prop_map(Step::LogFails),
        5 => (0..90u64).prop_map(Step::TimePasses),
    ]
}

fn play(steps: &[Step]) {
    let mut world = World::new();
    for step in steps {
        let id = |number: u8| format!("job-{number}");
        match step.clone() {
            Step::Submit(number) => world.submit(&id(number)),
            Step::Advance(which) => world.advance(which),
            Step::FinishCopy(works) => world.finish_copy(works),
            Step::FinishPublication(works) => world.finish_publication(works),
            Step::HearWhatIsThere => world.hear_what_is_there(),
            Step::KillWorker(which) => world.kill_worker(which),
            Step::LoseNode(number, cut_off) => world.lose_node(number, cut_off),
            Step::ReviveNode(number) => world.revive_node(number),
            Step::RestartCoordinator(folded) => world.restart_coordinator(folded),
            Step::RestartAll => {
                world.runners.clear();
                world.restart_coordinator(false);
            }
            Step::Cancel(number) => {
                let decided = world.jobs.cancel(&id(number), world.at);
                if world.change(decided) {
                    world.cancelled.insert(id(number));
                }
            }
            Step::Pause(number) => {
                let decided = world.jobs.pause(&id(number), "ann", world.at);
                world.change(decided);
            }
            Step::Resume(number) => {
                let decided = world.jobs.resume(&id(number), world.at);
                world.change(decided);
            }
            Step::LogFails(fails) => world.log_fails = fails,
            Step::TimePasses(seconds) => {
                world.now += Duration::from_secs(seconds);
                world.at += seconds;
                world.carry_out(Vec::new());
            }
        }
    }
    world.settle();
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, ..ProptestConfig::default() })]

    #[test]
    fn no_acknowledged_job_is_lost_and_none_ends_with_a_wrong_result(steps in prop::collection::vec(step(), 1..150)) {
        play(&steps);
    }
}
