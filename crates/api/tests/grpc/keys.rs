//! Every rpc times every state of a credential, the connection's and the call's.

use crate::descriptors::contract;
use crate::raw::{call, framed, start};
use anyhow::{Result, ensure};
use mlxnode_api::gate::Access;
use mlxnode_api::keys::{KeyEntry, KeyLimits, KeyRole, KeyText, KeysView};
use mlxnode_api::rpc::RPCS;
use mlxnode_cluster::Role;
use mlxnode_proto::v1::inference_client::InferenceClient;
use mlxnode_proto::v1::models_client::ModelsClient;
use mlxnode_proto::v1::{ListModelsRequest, TokenizeRequest};
use std::time::Duration;
use tonic::{Code, Request};
use tonic_types::StatusExt as _;

const UNAUTHENTICATED: i32 = 16;
const PERMISSION_DENIED: i32 = 7;

fn key(name: &str, byte: u8, role: KeyRole) -> (KeyText, KeyEntry) {
    let text = KeyText::new(&[byte; 32]);
    let (hash, models, limits) = (text.hash(), Vec::new(), KeyLimits::default());
    (text, KeyEntry { name: name.into(), hash, role, models, limits, created_unix: 0 })
}

fn known(keys: Vec<KeyEntry>) -> KeysView {
    KeysView { keys, is_known: true }
}

#[tokio::test]
async fn every_rpc_denies_every_credential_that_is_not_meant_for_it() -> Result<()> {
    let (user, user_entry) = key("user", 1, KeyRole::User);
    let (admin, admin_entry) = key("admin", 2, KeyRole::Admin);
    let (trainer, trainer_entry) = key("trainer", 5, KeyRole::Trainer);
    let (metrics, metrics_entry) = key("metrics", 3, KeyRole::Metrics);
    let (revoked, revoked_entry) = key("revoked", 4, KeyRole::Admin);
    let valid = vec![user_entry, trainer_entry, admin_entry, metrics_entry];
    let never = KeyText::new(&[99; 32]);
    let bearer = |key: &KeyText| format!("Bearer {}", key.reveal());
    let credentials = [
        ("none", String::new()),
        ("malformed", "Bearer sk-123".to_owned()),
        ("another scheme", format!("Basic {}", admin.reveal())),
        ("wrong", bearer(&never)),
        ("revoked", bearer(&revoked)),
        ("metrics", bearer(&metrics)),
        ("user", bearer(&user)),
        ("trainer", bearer(&trainer)),
        ("admin", bearer(&admin)),
    ];
    let (methods, _) = contract()?;
    let mut denied = 0;
    // As what the key of the connection was admitted. A worker's neighbour and a stranger call nothing.
    for (role, is_let_in) in
        [(None, false), (Some(Role::Neighbour), false), (Some(Role::Node), true), (Some(Role::Client), true)]
    {
        let before = known([valid.clone(), vec![revoked_entry.clone()]].concat());
        let rpcs = start(role, before).await?;
        if is_let_in {
            let header = [("authorization", &*bearer(&revoked))];
            let ended = call(&rpcs.channel, "/mlxnode.v1.Models/List", &header, framed(&[])).await?;
            ensure!(ended.code == Some(0), "{ended:?}");
        }
        rpcs.keys.send_replace(known(valid.clone()));
        for method in &methods {
            let access = RPCS.iter().find(|rpc| rpc.path == method.path).map(|rpc| rpc.access);
            for (name, credential) in &credentials {
                let may = match (access, *name) {
                    (None, _) => false,
                    (Some(Access::Open), _) | (_, "none" | "admin") => true,
                    (Some(access), "user" | "trainer") => access == Access::User,
                    _ => false,
                };
                let ended =
                    call(&rpcs.channel, &method.path, &[("authorization", credential)], framed(&[])).await?;
                let is_known = matches!(*name, "user" | "trainer" | "metrics");
                let denial = if is_known { PERMISSION_DENIED } else { UNAUTHENTICATED };
                let what = format!("{} as {role:?} with {name}: {ended:?}", method.path);
                match (is_let_in, may) {
                    (true, true) if ended.code == Some(PERMISSION_DENIED) => {
                        // Another node removes a member by `Forget`, not by `Leave`.
                        ensure!(role == Some(Role::Node) && method.path.ends_with("/Leave"), "{what}");
                    }
                    (true, true) => ensure!(ended.code != Some(UNAUTHENTICATED), "{what}"),
                    (true, false) => {
                        denied += 1;
                        ensure!(ended.code == Some(denial) && !ended.message.is_empty(), "{what}");
                    }
                    (false, _) => {
                        denied += 1;
                        let is_denied = matches!(ended.code, Some(PERMISSION_DENIED | UNAUTHENTICATED));
                        ensure!(is_denied && ended.bytes == 0, "{what}");
                    }
                }
            }
        }
        rpcs.stop().await?;
    }
    assert!(denied > methods.len() * 8, "{denied}");
    Ok(())
}

fn with_key<T>(message: T, key: &KeyText) -> Result<Request<T>> {
    let mut request = Request::new(message);
    request.metadata_mut().insert("authorization", format!("Bearer {}", key.reveal()).parse()?);
    Ok(request)
}

fn tokenize(model: &str) -> TokenizeRequest {
    TokenizeRequest { model: model.into(), text: "hi".into(), no_special_tokens: false }
}

#[tokio::test]
async fn a_key_that_is_held_to_models_sees_no_others() -> Result<()> {
    let (text, mut entry) = key("user", 1, KeyRole::User);
    entry.models = vec!["later".into()];
    let rpcs = start(Some(Role::Client), known(vec![entry])).await?;
    let mut models = ModelsClient::new(rpcs.channel.clone());
    let listed = models.list(with_key(ListModelsRequest {}, &text)?).await?.into_inner();
    let names: Vec<&str> = listed.deployments.iter().map(|deployment| deployment.name.as_str()).collect();
    assert_eq!(names, ["later"]);
    assert_eq!(models.list(ListModelsRequest {}).await?.into_inner().deployments.len(), 2);
    let mut client = InferenceClient::new(rpcs.channel.clone());
    let mut told = Vec::new();
    for (model, code) in [("demo", Code::NotFound), ("nothing", Code::NotFound), ("", Code::InvalidArgument)]
    {
        let status = client.tokenize(with_key(tokenize(model), &text)?).await.unwrap_err();
        assert_eq!(status.code(), code, "{status}");
        assert!(!status.message().contains("demo"), "{status}");
        told.push(status.message().to_owned());
    }
    assert_eq!(told[0], told[1], "what is forbidden and what is not there look the same");
    client.tokenize(tokenize("demo")).await?;
    rpcs.stop().await
}

#[tokio::test]
async fn limits_are_told_and_kept() -> Result<()> {
    let (text, mut entry) = key("user", 1, KeyRole::User);
    entry.limits = KeyLimits { requests_per_minute: Some(2), tokens_per_minute: None };
    let rpcs = start(Some(Role::Client), known(vec![entry])).await?;
    let mut client = InferenceClient::new(rpcs.channel.clone());
    for _ in 0..2 {
        client.tokenize(with_key(tokenize("demo"), &text)?).await?;
    }
    let status = client.tokenize(with_key(tokenize("demo"), &text)?).await.unwrap_err();
    assert_eq!(status.code(), Code::ResourceExhausted);
    let details = status.get_error_details();
    let wait = details.retry_info().and_then(|info| info.retry_delay).unwrap_or_default();
    assert!((Duration::from_secs(1)..=Duration::from_secs(30)).contains(&wait), "{wait:?}");
    assert_eq!(details.error_info().map(|info| info.reason.as_str()), Some("RATE_LIMIT_EXCEEDED"));
    // The connection's own calls are not the key's.
    client.tokenize(tokenize("demo")).await?;
    rpcs.stop().await
}

#[tokio::test]
async fn until_the_keys_are_known_no_key_is_let_in() -> Result<()> {
    let (text, entry) = key("user", 1, KeyRole::User);
    let rpcs = start(Some(Role::Client), KeysView::default()).await?;
    let mut client = InferenceClient::new(rpcs.channel.clone());
    let status = client.tokenize(with_key(tokenize("demo"), &text)?).await.unwrap_err();
    assert_eq!(status.code(), Code::Unavailable);
    rpcs.keys.send_replace(known(vec![entry]));
    client.tokenize(with_key(tokenize("demo"), &text)?).await?;
    rpcs.stop().await
}
