//! Adapters that come and go on every stage while sequences run.
#![allow(clippy::unwrap_used, clippy::panic)] // a failing test is supposed to stop

mod replica;

use mlxnode_compute::simulated::SimulatedStage;
use mlxnode_compute::{SequenceId, SequenceSpec};
use mlxnode_proto::internal::v1 as proto;
use replica::{Heard, Model, Replica, VOCABULARY, prompt, spec};
use tonic::Code;

async fn load(replica: &mut Replica, name: &str) {
    for member in &mut replica.members {
        let request = proto::LoadShardAdapterRequest { name: name.into(), folder: "/".into() };
        member.client.load_adapter(request).await.unwrap();
    }
}

fn with(prompt: &[u32], adapter: Option<&str>) -> SequenceSpec {
    SequenceSpec { adapter: adapter.map(str::to_owned), ..spec(prompt, 200) }
}

#[tokio::test(flavor = "multi_thread")]
async fn sequences_of_several_adapters_go_through_together() {
    let mut replica = Replica::start(3, Model::default()).await;
    load(&mut replica, "one").await;
    let (client, mut events) = replica.drive().await;
    let adapters = [None, Some("one"), Some("two"), Some("nobody"), Some("one")];
    let prompts: Vec<_> = (0..5).map(|seed| prompt(seed, 40 * (1 + seed as usize))).collect();
    client.open(SequenceId(0), prompts[0].clone(), with(&prompts[0], adapters[0])).await.unwrap();
    load(&mut replica, "two").await; // while a sequence runs
    for (number, (prompt, adapter)) in prompts.iter().zip(adapters).enumerate().skip(1) {
        client.open(SequenceId(number as u64), prompt.clone(), with(prompt, adapter)).await.unwrap();
    }
    let mut heard = Heard::default();
    heard.until_closed(&mut events, 5).await;
    assert_eq!(heard.failures.len(), 1, "{:?}", heard.failures);
    assert!(heard.failures[&SequenceId(3)].contains("nobody"), "{:?}", heard.failures);
    for (number, (prompt, adapter)) in prompts.iter().zip(adapters).enumerate().filter(|(it, _)| *it != 3) {
        let expected = SimulatedStage::expected_tokens_with(adapter, prompt, 200, VOCABULARY);
        assert_eq!(heard.tokens[&SequenceId(number as u64)], expected, "{adapter:?}");
    }

    // Gone for new sequences.
    for member in &mut replica.members {
        let request = proto::UnloadShardAdapterRequest { name: "one".into() };
        member.client.unload_adapter(request.clone()).await.unwrap();
        member.client.unload_adapter(request).await.unwrap();
    }
    client.open(SequenceId(9), prompts[1].clone(), with(&prompts[1], Some("one"))).await.unwrap();
    let mut heard = Heard::default();
    heard.until_closed(&mut events, 1).await;
    assert!(heard.failures.contains_key(&SequenceId(9)));
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_no_adapter_is_refused_and_the_worker_goes_on() {
    let mut replica = Replica::start(1, Model::default()).await;
    let member = &mut replica.members[0];
    let wrong = [("poet", "/nowhere/at/all"), ("", "/"), ("poet", ""), (&"x".repeat(300), "/")];
    for (name, folder) in wrong {
        let request = proto::LoadShardAdapterRequest { name: name.into(), folder: folder.into() };
        let status = member.client.load_adapter(request).await.unwrap_err();
        assert!(matches!(status.code(), Code::InvalidArgument | Code::FailedPrecondition), "{status}");
    }
    load(&mut replica, "poet").await;
    let taken = proto::LoadShardAdapterRequest { name: "poet".into(), folder: "/".into() };
    let status = replica.members[0].client.load_adapter(taken).await.unwrap_err();
    assert_eq!(status.code(), Code::FailedPrecondition, "{status}");
    let (client, mut events) = replica.drive().await;
    let prompt = prompt(1, 5);
    client.open(SequenceId(1), prompt.clone(), with(&prompt, Some("poet"))).await.unwrap();
    let mut heard = Heard::default();
    heard.until_closed(&mut events, 1).await;
    assert_eq!(heard.tokens[&SequenceId(1)].len(), 200);
}
