//! What nodes say to each other is for nodes: every method of every internal service refuses a client's key, with any API key besides or none.

use anyhow::{Context as _, Result, bail, ensure};
use mlxnode_node::{DataDir, connect_to_local_node};
use mlxnode_testkit::cluster::LocalCluster;
use prost::Message as _;
use prost_types::FileDescriptorSet;
use std::collections::BTreeSet;
use tonic::client::Grpc;
use tonic::codegen::http::uri::PathAndQuery;
use tonic::transport::Channel;
use tonic::{Code, Request};

/// Paths of all methods of the internal services, and whether a node serves them (workers serve the others, at addresses of their own).
fn methods() -> Result<Vec<(String, bool)>> {
    let files = FileDescriptorSet::decode(mlxnode_proto::DESCRIPTORS)?.file;
    let mut all = Vec::new();
    for file in files.iter().filter(|file| file.package().starts_with("mlxnode.internal.")) {
        for service in &file.service {
            let is_node = !["Worker", "Stage", "Collective", "StageLine"].contains(&service.name());
            let path = |method: &str| format!("/{}.{}/{method}", file.package(), service.name());
            all.extend(service.method.iter().map(|method| (path(method.name()), is_node)));
        }
    }
    Ok(all)
}

/// How a call without anything in it ends, streaming or not.
async fn call(channel: &Channel, path: &str, key: Option<&str>) -> Result<Code> {
    let mut grpc = Grpc::new(channel.clone());
    grpc.ready().await?;
    let mut request = Request::new(tokio_stream::iter(vec![()]));
    if let Some(key) = key {
        request.metadata_mut().insert("authorization", format!("Bearer {key}").parse()?);
    }
    let codec = tonic_prost::ProstCodec::<(), ()>::default();
    let path = PathAndQuery::try_from(path)?;
    match grpc.streaming(request, path, codec).await {
        Err(status) => Ok(status.code()),
        Ok(answer) => match answer.into_inner().message().await {
            Err(status) => Ok(status.code()),
            Ok(_) => Ok(Code::Ok),
        },
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn story_internal_services_refuse_every_client_key() -> Result<()> {
    let cluster = LocalCluster::start(2)?;
    let node = cluster.first();
    node.json(&["load", "demo", "--stages", "2"])?; // so that there would be something to harm
    let made = |name: &str, role: &str| -> Result<String> {
        let made = node.json(&["keys", "create", name, "--role", role])?;
        Ok(made["key"].as_str().with_context(|| made.to_string())?.to_owned())
    };
    let (admin, user, metrics) = (made("ann", "admin")?, made("uwe", "user")?, made("mia", "metrics")?);
    let revoked = made("rob", "admin")?;
    node.json(&["keys", "revoke", "rob"])?;
    let wrong = format!("{}x", &admin[..admin.len() - 1]);
    let keys = [
        ("no key", None),
        ("an admin's key", Some(admin)),
        ("a user's key", Some(user)),
        ("a key for metrics", Some(metrics)),
        ("a revoked key", Some(revoked)),
        ("a wrong key", Some(wrong)),
    ];
    let methods = methods()?;
    let services: BTreeSet<&str> = methods.iter().filter_map(|(path, _)| path.split('/').nth(1)).collect();
    ensure!(services.len() >= 5, "internal services are looked up in the contract: {services:?}");
    for node in &cluster.nodes {
        let channel =
            connect_to_local_node(&DataDir::new(node.data_dir())).await?.context("the node runs")?;
        for (path, is_node) in &methods {
            for (what, key) in &keys {
                let code = call(&channel, path, key.as_deref()).await?;
                let is_refused = match is_node {
                    true => [Code::PermissionDenied, Code::Unauthenticated].contains(&code),
                    false => {
                        [Code::PermissionDenied, Code::Unauthenticated, Code::Unimplemented].contains(&code)
                    }
                };
                if !is_refused {
                    bail!("{path} with {what} ended with {code:?}");
                }
            }
        }
    }
    let answer = node.json(&["generate", "--prompt", "What is 17 + 25?"])?;
    ensure!(answer["text"].as_str().is_some_and(|text| text.contains("42")), "nothing was harmed: {answer}");
    Ok(())
}
