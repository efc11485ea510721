//! How long models stay: pinned, with a time, until another one needs the room; and replicas, which come and go together.

#![allow(
    clippy::unwrap_used,
    clippy::panic,
    clippy::expect_used,
    reason = "a failing test is supposed to stop"
)]

mod machine;

use machine::{Machine, node};
use mlxnode_coordinator::Error;
use mlxnode_coordinator::deployments::{
    AdapterWish, DeploymentWish, Deployments, Effect, Event, Loaded, MAX_REPLICAS, State, Usage,
};
use proptest::prelude::*;
use std::time::Duration;

const MINUTE: Duration = Duration::from_secs(60);

fn wish(name: &str) -> DeploymentWish {
    DeploymentWish { name: name.into(), source: format!("/models/{name}"), ..DeploymentWish::default() }
}

fn names(machine: &Machine) -> Vec<String> {
    machine.states().into_iter().map(|(name, _)| name).collect()
}

#[test]
fn what_nobody_asked_for_is_unloaded_after_its_time() {
    let mut machine = Machine::new(1);
    machine.load_wish(DeploymentWish { ttl: Some(10 * MINUTE), ..wish("a") });
    machine.load_wish(DeploymentWish { is_pinned: true, ..wish("pinned") });
    assert_eq!(machine.deployments.next_wake(), Some(machine.now + 10 * MINUTE));
    // Used four minutes ago, as the scheduler says when it is asked: it stays for six more.
    machine.usage.insert("a".into(), Usage { busy: 0, idle: 4 * MINUTE });
    machine.wait(10 * MINUTE);
    assert_eq!((machine.asked.len(), names(&machine)), (1, vec!["a".to_owned(), "pinned".into()]));
    assert_eq!(machine.deployments.next_wake(), Some(machine.now + 6 * MINUTE));
    // Busy: it has its whole time again.
    machine.usage.insert("a".into(), Usage { busy: 2, idle: Duration::ZERO });
    machine.wait(6 * MINUTE);
    assert_eq!(machine.deployments.next_wake(), Some(machine.now + 10 * MINUTE));
    machine.usage.insert("a".into(), Usage { busy: 0, idle: 11 * MINUTE });
    machine.wait(10 * MINUTE);
    assert_eq!((names(&machine), machine.drained.clone()), (vec!["pinned".to_owned()], vec!["a".to_owned()]));
    assert_eq!(machine.deployments.next_wake(), None);
    machine.load_wish(wish("a"));
    assert_eq!(names(&machine), ["a", "pinned"], "it can be loaded again");
}

#[test]
fn who_does_not_answer_stays() {
    let mut machine = Machine::new(1);
    machine.load_wish(DeploymentWish { ttl: Some(MINUTE), ..wish("a") });
    machine.now += MINUTE;
    let effects = machine.deployments.tick(machine.now);
    let [Effect::AskUsage { attempt, .. }] = &effects[..] else { panic!("{effects:?}") };
    assert_eq!(machine.deployments.tick(machine.now), [], "once is enough");
    let event = Event::Used { attempt: attempt.clone(), result: Err(Error::TimedOut("no word".into())) };
    assert_eq!(machine.on(event), []);
    assert_eq!(machine.deployments.next_wake(), Some(machine.now + MINUTE));
}

/// Three models of 400 MiB on a node of 1000 MiB: two fit (a worker needs 64 MiB besides).
fn crowded() -> Machine {
    let mut machine = Machine::new(1);
    for name in ["a", "b"] {
        machine.load_wish(wish(name));
    }
    machine
}

#[test]
fn what_was_not_used_for_longest_makes_room_once_its_requests_have_finished() {
    let mut machine = crowded();
    machine.usage.insert("a".into(), Usage { busy: 0, idle: MINUTE });
    machine.usage.insert("b".into(), Usage { busy: 0, idle: 2 * MINUTE });
    machine.load_wish(wish("c"));
    assert!(
        matches!(&machine.loads[..], [.., (name, Err(Error::DoesNotFit(_)))] if name == "c"),
        "without leave"
    );
    assert_eq!(names(&machine), ["a", "b"]);
    machine.load_wish(DeploymentWish { makes_room: true, ..wish("c") });
    assert_eq!(
        (names(&machine), machine.drained.clone()),
        (vec!["a".to_owned(), "c".into()], vec!["b".to_owned()])
    );
    assert_eq!(machine.view("c").state, State::Ready);
}

#[test]
fn who_is_busy_was_used_last_and_who_is_pinned_never_goes() {
    let mut machine = crowded();
    machine.usage.insert("a".into(), Usage { busy: 1, idle: Duration::ZERO });
    machine.usage.insert("b".into(), Usage { busy: 0, idle: Duration::from_millis(1) });
    machine.load_wish(DeploymentWish { makes_room: true, is_pinned: true, ..wish("c") });
    assert_eq!(names(&machine), ["a", "c"]);
    machine.load_wish(DeploymentWish { makes_room: true, is_pinned: true, ..wish("d") });
    assert_eq!(names(&machine), ["c", "d"]);
    machine.load_wish(DeploymentWish { makes_room: true, ..wish("e") });
    assert_eq!(names(&machine), ["c", "d"]);
    assert!(matches!(&machine.loads[..], [.., (name, Err(Error::DoesNotFit(_)))] if name == "e"));
}

#[test]
fn nobody_goes_in_vain() {
    let mut machine = crowded();
    machine.load_wish(DeploymentWish { makes_room: true, ..wish("huge") });
    assert!(matches!(&machine.loads[..], [.., (name, Err(Error::DoesNotFit(_)))] if name == "huge"));
    assert_eq!((names(&machine), machine.drained.len()), (vec!["a".to_owned(), "b".into()], 0));
}

#[test]
fn a_load_that_is_taken_back_while_it_waits_for_room_takes_nothing() {
    let mut machine = crowded();
    let (_, effects) = machine.deployments.load(DeploymentWish { makes_room: true, ..wish("c") }).unwrap();
    // Everything but the answers to the questions.
    let mut waiting = Vec::new();
    let mut effects = std::collections::VecDeque::from(effects);
    while let Some(effect) = effects.pop_front() {
        match effect {
            Effect::AskUsage { .. } => waiting.push(effect),
            effect => effects.extend(machine.step(effect)),
        }
    }
    assert_eq!((waiting.len(), machine.view("c").detail.as_str()), (2, "making room"));
    let effects = machine.deployments.cancel_load("c", machine.now);
    machine.run(effects);
    machine.run(waiting);
    assert_eq!((names(&machine), machine.drained.len()), (vec!["a".to_owned(), "b".into()], 0));
}

#[test]
fn an_explicit_unload_does_not_wait_for_requests_that_finish() {
    let mut machine = Machine::new(1);
    machine.load_wish(DeploymentWish { ttl: Some(MINUTE), ..wish("a") });
    machine.usage.insert("a".into(), Usage { busy: 0, idle: MINUTE });
    machine.now += MINUTE;
    let mut effects = std::collections::VecDeque::from(machine.deployments.tick(machine.now));
    while let Some(effect) = effects.pop_front() {
        if !matches!(effect, Effect::Drain { .. }) {
            effects.extend(machine.step(effect));
        }
    }
    assert_eq!(machine.states(), [("a".to_owned(), State::Unloading)]);
    let effects = machine.deployments.unload("a", machine.now).unwrap();
    machine.run(effects);
    assert!(machine.states().is_empty());
}

#[test]
fn replicas_run_on_different_nodes_and_live_apart() {
    let mut machine = Machine::new(3);
    machine.load_wish(DeploymentWish { replicas: 3, ..wish("a") });
    assert_eq!(names(&machine), ["a", "a#2", "a#3"]);
    let mut nodes: Vec<_> = machine.deployments.view().iter().map(|view| view.stages[0].node).collect();
    nodes.sort();
    assert_eq!(nodes, [node(0), node(1), node(2)]);
    assert!(machine.deployments.is_whole("a"));
    let views = machine.deployments.replicas("a");
    assert!(views.iter().all(|view| view.name == "a" && view.replicas == 3), "{views:?}");
    // One dies and is formed again; the others keep their attempts.
    let epochs =
        |machine: &Machine| machine.deployments.view().iter().map(|view| view.epoch).collect::<Vec<_>>();
    let before = epochs(&machine);
    machine.kill("a#2");
    let after = epochs(&machine);
    assert!((before[0], before[2]) == (after[0], after[2]) && before[1] < after[1], "{before:?} {after:?}");
    // What is asked again is there; fewer are no wish to unload.
    let (loaded, _) = machine.deployments.load(DeploymentWish { replicas: 2, ..wish("a") }).unwrap();
    assert_eq!((loaded, names(&machine).len()), (Loaded::Already, 3));
    let adapter = AdapterWish::new("poet", "/adapters/poet");
    machine.load_adapter("a", adapter);
    assert_eq!(machine.adapters.len(), 3);
    let restored = Deployments::restore(machine.log.clone());
    assert_eq!(restored.replicas("a").iter().filter(|view| view.adapters.len() == 1).count(), 3);
    let effects = machine.deployments.unload("a", machine.now).unwrap();
    machine.run(effects);
    assert!(machine.states().is_empty());
}

#[test]
fn a_replica_too_many_is_refused_and_one_more_can_be_added() {
    let mut machine = Machine::new(2);
    machine.load_wish(wish("a"));
    machine.load_wish(DeploymentWish { replicas: 2, ..wish("a") });
    assert_eq!(names(&machine), ["a", "a#2"]);
    machine.load_wish(DeploymentWish { replicas: 3, ..wish("a") });
    let (name, result) = machine.loads.last().cloned().unwrap();
    assert_eq!(name, "a#3");
    let error = result.unwrap_err().to_string();
    assert!(error.contains("further replica"), "{error}");
    assert_eq!(names(&machine), ["a", "a#2"], "the others stay");
    let most = DeploymentWish { replicas: MAX_REPLICAS + 1, ..wish("b") };
    assert!(matches!(machine.deployments.load(most), Err(Error::Invalid(_))));
    let both = DeploymentWish { is_pinned: true, ttl: Some(MINUTE), ..wish("b") };
    assert!(matches!(machine.deployments.load(both), Err(Error::Invalid(_))));
    let hash = DeploymentWish { name: "a#2".into(), ..wish("a") };
    assert!(matches!(machine.deployments.load(hash), Err(Error::Invalid(_))));
}

#[test]
fn a_replica_that_is_used_keeps_the_others() {
    let mut machine = Machine::new(2);
    machine.load_wish(DeploymentWish { replicas: 2, ttl: Some(MINUTE), ..wish("a") });
    machine.usage.insert("a".into(), Usage { busy: 0, idle: MINUTE });
    machine.usage.insert("a#2".into(), Usage { busy: 0, idle: MINUTE / 2 });
    machine.wait(MINUTE);
    assert_eq!(names(&machine), ["a", "a#2"]);
    machine.usage.insert("a#2".into(), Usage { busy: 0, idle: MINUTE });
    machine.wait(MINUTE / 2);
    assert!(machine.states().is_empty(), "{:?}", machine.states());
    assert_eq!(machine.drained.len(), 2);
}

proptest! {
    /// Whatever is loaded, used and left alone in whatever order: pinned models stay, the memory is never promised twice, nothing
    /// goes without having been drained, and all comes to rest.
    #[test]
    fn models_come_and_go(steps in prop::collection::vec((0u8..6, 0u8..4, 0u64..200), 1..40)) {
        let mut machine = Machine::new(2);
        let mut pinned = std::collections::BTreeSet::new();
        for (model, kind, seconds) in steps {
            let name = format!("m{model}");
            let time = Duration::from_secs(seconds);
            machine.usage.insert(name.clone(), Usage { busy: usize::from(seconds % 3 == 0), idle: time });
            match kind {
                0 => machine.load_wish(DeploymentWish { makes_room: true, ttl: Some(MINUTE), ..wish(&name) }),
                1 => {
                    let pin = DeploymentWish { makes_room: true, is_pinned: true, ..wish(&name) };
                    if let Ok((_, effects)) = machine.deployments.load(pin) {
                        machine.run(effects);
                    }
                    let view = machine.deployments.find(&name);
                    if view.is_ok_and(|view| view.is_pinned && view.state == State::Ready) {
                        pinned.insert(name);
                    }
                }
                2 => machine.wait(time),
                _ => {
                    if let Ok(effects) = machine.deployments.unload(&name, machine.now) {
                        machine.run(effects);
                        pinned.remove(&name);
                    }
                }
            }
            for number in 0..2 {
                prop_assert!(machine.deployments.reserved(node(number)) <= machine.budget());
            }
            let states = machine.states();
            prop_assert!(states.iter().all(|(_, state)| *state == State::Ready), "{states:?}");
            for name in &pinned {
                prop_assert!(states.iter().any(|(other, _)| other == name), "{name} is gone");
            }
        }
    }
}
