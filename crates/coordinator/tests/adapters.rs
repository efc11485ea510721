//! Adapters of deployments, step by step: what is asked of the nodes, what is recorded, and what happens when something goes wrong.

#![allow(
    clippy::unwrap_used,
    clippy::panic,
    clippy::expect_used,
    reason = "a failing test is supposed to stop"
)]

mod machine;

use machine::{ADAPTER, Machine, node};
use mlxnode_compute::ByteCount;
use mlxnode_coordinator::Error;
use mlxnode_coordinator::deployments::{
    AdapterWish, Deployments, Effect, Event, Loaded, MAX_ADAPTERS, Record, State,
};

fn adapter(name: &str) -> AdapterWish {
    AdapterWish::new(name, format!("/adapters/{name}"))
}

fn failed() -> Error {
    Error::Refused("it is for another model".into())
}

#[test]
fn an_adapter_is_recorded_once_every_node_has_it() {
    let mut machine = Machine::new(2);
    machine.load("a", Some(2));
    let attempt = machine.attempt("a");
    let (loaded, effects) = machine.deployments.load_adapter("a", adapter("poet")).unwrap();
    assert_eq!((loaded, effects.len()), (Loaded::UnderWay, 2));
    assert_eq!(machine.deployments.load_adapter("a", adapter("poet")).unwrap(), (Loaded::UnderWay, vec![]));
    let answer = |node, result| Event::AdapterLoaded {
        attempt: attempt.clone(),
        node,
        adapter: "poet".into(),
        result,
    };
    assert_eq!(machine.on(answer(node(0), Ok(ByteCount(7)))), []);
    assert_eq!(machine.on(answer(node(0), Ok(ByteCount(7)))), [], "an answer counts once");
    let effects = machine.on(answer(node(1), Ok(ByteCount(5))));
    assert!(matches!(&effects[..], [Effect::RecordAdapter { record: Record::AdapterAdded { .. }, .. }]));
    assert!(machine.view("a").adapters.is_empty(), "not before it is durable");
    machine.run(effects);
    assert_eq!(machine.view("a").adapters[0].name, "poet");
    assert_eq!(machine.settled(), [Ok(())]);
    assert_eq!(machine.deployments.load_adapter("a", adapter("poet")).unwrap().0, Loaded::Already);
}

#[test]
fn another_adapter_of_the_same_name_is_another_one_for_caches() {
    let mut machine = Machine::new(1);
    machine.load("a", None);
    machine.load_adapter("a", adapter("poet"));
    let first = machine.view("a").adapters[0].key.clone();
    machine.kill("a");
    assert_eq!(machine.view("a").adapters[0].key, first, "the same one again, read by a new attempt");
    let effects = machine.deployments.unload_adapter("a", "poet").unwrap();
    machine.run(effects);
    machine.load_adapter("a", AdapterWish::new("poet", "/adapters/another"));
    assert_ne!(machine.view("a").adapters[0].key, first);
    assert_eq!(machine.adapters.len(), 1, "{:?}", machine.adapters);
    let used = |record: &Record| match record {
        Record::AdapterAdded { adapter, .. } => adapter.load,
        Record::Wanted { epoch, .. } => *epoch,
        _ => 0,
    };
    let newest = machine.log.iter().map(used).max().unwrap();
    let mut restored = Deployments::restore(machine.log.clone());
    let next = restored.start().into_iter().find_map(|effect| match effect {
        Effect::Record { record: Record::Wanted { epoch, .. }, .. } => Some(epoch),
        _ => None,
    });
    assert!(next.unwrap() > newest, "a restart uses no number twice");
}

#[test]
fn what_one_node_cannot_read_no_node_keeps() {
    let mut machine = Machine::new(2);
    machine.load("a", Some(2));
    let (_, effects) = machine.deployments.load_adapter("a", adapter("poet")).unwrap();
    machine.fails = Some((node(1), failed()));
    machine.run(effects);
    assert_eq!(machine.settled(), [Err(failed())]);
    assert!(machine.view("a").adapters.is_empty() && machine.adapters.is_empty(), "{:?}", machine.adapters);
    assert_eq!(machine.view("a").state, State::Ready, "the model goes on");
    machine.fails = None;
    machine.load_adapter("a", adapter("poet"));
    assert_eq!(machine.adapters.len(), 2);
}

#[test]
fn an_adapter_that_is_gone_does_not_hold_up_the_model() {
    let mut machine = Machine::new(2);
    machine.load("a", Some(2));
    machine.load_adapter("a", adapter("poet"));
    machine.load_adapter("a", adapter("sage"));
    machine.settled();
    machine.fails = Some((node(1), failed()));
    machine.kill("a");
    let view = machine.view("a");
    assert_eq!((view.state, view.adapters.len()), (State::Ready, 2));
    assert!(view.adapters.iter().all(|adapter| adapter.problem.is_some()), "{:?}", view.adapters);
    // Once the cause is gone, loading it again is all that it takes.
    machine.fails = None;
    machine.load_adapter("a", adapter("poet"));
    let view = machine.view("a");
    assert_eq!(view.adapters.iter().filter(|adapter| adapter.problem.is_none()).count(), 1);
    assert_eq!(machine.settled(), [Ok(())]);
}

#[test]
fn a_loss_meanwhile_ends_what_was_asked() {
    let mut machine = Machine::new(1);
    machine.load("a", None);
    let attempt = machine.attempt("a");
    let (_, _) = machine.deployments.load_adapter("a", adapter("poet")).unwrap();
    machine.kill("a");
    assert!(matches!(&machine.settled()[..], [Err(Error::Unavailable(_))]));
    let late =
        Event::AdapterLoaded { attempt, node: node(0), adapter: "poet".into(), result: Ok(ByteCount(7)) };
    assert_eq!(machine.on(late), [], "it is of an attempt of the past");
    assert!(machine.view("a").adapters.is_empty());
}

#[test]
fn a_decision_that_is_not_durable_is_taken_back() {
    let mut machine = Machine::new(1);
    machine.load("a", None);
    machine.records_fail = true;
    machine.load_adapter("a", adapter("poet"));
    assert!(matches!(&machine.settled()[..], [Err(Error::Failed(_))]));
    assert!(machine.adapters.is_empty() && machine.view("a").adapters.is_empty());
    machine.records_fail = false;
    machine.load_adapter("a", adapter("poet"));
    machine.records_fail = true;
    let effects = machine.deployments.unload_adapter("a", "poet").unwrap();
    machine.run(effects);
    assert!(matches!(&machine.settled()[..], [Ok(()), Err(Error::Failed(_))]));
    assert_eq!((machine.adapters.len(), machine.view("a").adapters.len()), (1, 1), "it stays");
}

#[test]
fn mistakes_are_told() {
    let mut machine = Machine::new(1);
    machine.load("a", None);
    let mut refused = |name: &str, adapter| machine.deployments.load_adapter(name, adapter).unwrap_err();
    assert!(matches!(refused("b", adapter("poet")), Error::NotFound(text) if text.contains("loaded are: a")));
    assert!(matches!(refused("a", adapter("a:b")), Error::Invalid(_)));
    let nowhere = AdapterWish::new("poet", "");
    assert!(matches!(refused("a", nowhere), Error::Invalid(_)));
    for number in 0..MAX_ADAPTERS {
        machine.load_adapter("a", adapter(&format!("n{number}")));
    }
    let refused = machine.deployments.load_adapter("a", adapter("one-more")).unwrap_err();
    assert!(matches!(refused, Error::TooMany(_)));
    let unknown = machine.deployments.unload_adapter("a", "poet").unwrap_err();
    assert!(matches!(unknown, Error::NotFound(text) if text.contains("n1")));
}

#[test]
fn records_say_the_same_after_a_fold() {
    let mut machine = Machine::new(1);
    machine.load("a", None);
    for name in ["x", "poet", "sage"] {
        machine.load_adapter("a", adapter(name));
    }
    let effects = machine.deployments.unload_adapter("a", "x").unwrap();
    machine.run(effects);
    let names = |deployments: &Deployments| {
        let view = deployments.find("a").unwrap();
        view.adapters.into_iter().map(|adapter| adapter.name).collect::<Vec<_>>()
    };
    assert_eq!(names(&machine.deployments), ["poet", "sage"]);
    assert_eq!(names(&Deployments::restore(machine.log.clone())), ["poet", "sage"]);
    assert_eq!(names(&Deployments::restore(machine.deployments.records())), ["poet", "sage"]);
}

#[test]
fn what_adapters_take_is_not_promised_to_others() {
    let mut machine = Machine::new(2);
    machine.load("a", Some(2));
    let plain = [0, 1].map(|number| machine.deployments.reserved(node(number)).0);
    let reserved = |machine: &Machine| {
        [0, 1].map(|number| machine.deployments.reserved(node(number)).0 - plain[number as usize])
    };
    machine.load_adapter("a", adapter("poet"));
    machine.load_adapter("a", adapter("clerk"));
    assert_eq!(reserved(&machine), [2 * ADAPTER; 2]);
    machine.kill("a"); // the next attempt reads them again
    assert_eq!(reserved(&machine), [2 * ADAPTER; 2]);
    let effects = machine.deployments.unload_adapter("a", "poet").unwrap();
    machine.run(effects);
    assert_eq!(reserved(&machine), [ADAPTER; 2]);
    machine.fails = Some((node(1), Error::Refused("it is for another model".into())));
    machine.load_adapter("a", adapter("third"));
    assert_eq!(reserved(&machine), [ADAPTER; 2], "one that a node refused is taken out of the others");
}
