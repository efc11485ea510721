//! Jobs are for those who may change things: whoever has another key, a wrong one or none is refused on every way to submit, look at or change a
//! job, and nothing of what was sent stays.

use anyhow::{Context as _, Result, ensure};
use mlxnode_node::{DataDir, connect_to_local_node};
use mlxnode_proto::v1::SubmitJobRequest;
use mlxnode_proto::v1::jobs_client::JobsClient;
use mlxnode_testkit::cluster::LocalCluster;
use mlxnode_testkit::node::NodeProcess;
use prost::Message as _;
use prost_types::FileDescriptorSet;
use serde_json::{Value, json};
use std::path::Path;
use tonic::client::Grpc;
use tonic::codegen::http::uri::PathAndQuery;
use tonic::transport::Channel;
use tonic::{Code, Request, Status};

/// What somebody shows of themselves: the value of `authorization`, and how that is answered over gRPC and over HTTP.
struct Credential {
    what: &'static str,
    shown: Option<String>,
    grpc: Code,
    http: u16,
}

/// Of every kind that there is. Over gRPC a call without a key comes from this machine's own client, whose certificate the node knows.
fn credentials(node: &NodeProcess) -> Result<Vec<Credential>> {
    let made = |name: &str, role: &str| -> Result<String> {
        let made = node.json(&["keys", "create", name, "--role", role])?;
        Ok(made["key"].as_str().with_context(|| made.to_string())?.to_owned())
    };
    let (admin, user, metrics) = (made("ann", "admin")?, made("uwe", "user")?, made("mia", "metrics")?);
    let revoked = made("rob", "admin")?;
    node.json(&["keys", "revoke", "rob"])?;
    let wrong = format!("{}x", &admin[..admin.len() - 1]);
    let of = |what, shown: Option<String>, grpc, http| Credential { what, shown, grpc, http };
    let bearer = |key: &str| Some(format!("Bearer {key}"));
    Ok(vec![
        of("no key", None, Code::Ok, 401),
        of("an admin's key", bearer(&admin), Code::Ok, 200),
        of("a user's key", bearer(&user), Code::PermissionDenied, 403),
        of("a key for metrics", bearer(&metrics), Code::PermissionDenied, 403),
        of("a revoked key", bearer(&revoked), Code::Unauthenticated, 401),
        of("a wrong key", bearer(&wrong), Code::Unauthenticated, 401),
        of("something else than a key", Some(format!("Basic {admin}")), Code::Unauthenticated, 401),
    ])
}

fn with<T>(message: T, credential: &Credential) -> Result<Request<T>> {
    let mut request = Request::new(message);
    if let Some(shown) = &credential.shown {
        request.metadata_mut().insert("authorization", shown.parse()?);
    }
    Ok(request)
}

/// Paths of all methods of `Jobs`, as the contract has them.
fn methods() -> Result<Vec<String>> {
    let files = FileDescriptorSet::decode(mlxnode_proto::DESCRIPTORS)?.file;
    let services = files.iter().flat_map(|file| &file.service);
    let jobs = services.filter(|service| service.name() == "Jobs");
    Ok(jobs.flat_map(|jobs| &jobs.method).map(|it| format!("/mlxnode.v1.Jobs/{}", it.name())).collect())
}

/// How a call without anything in it ends, streaming or not.
async fn empty_call(channel: &Channel, path: &str, credential: &Credential) -> Result<Result<(), Status>> {
    let mut grpc = Grpc::new(channel.clone());
    grpc.ready().await?;
    let request = with(tokio_stream::iter(vec![()]), credential)?;
    let codec = tonic_prost::ProstCodec::<(), ()>::default();
    Ok(match grpc.streaming(request, PathAndQuery::try_from(path)?, codec).await {
        Err(status) => Err(status),
        Ok(answer) => answer.into_inner().message().await.map(drop),
    })
}

/// The status of a request.
fn asked(url: &str, content: &str, body: &[u8], credential: &Credential) -> Result<(u16, Value)> {
    let agent: ureq::Agent = ureq::Agent::config_builder().http_status_as_error(false).build().into();
    let mut request = agent.post(url).header("content-type", content);
    if let Some(shown) = &credential.shown {
        request = request.header("authorization", shown);
    }
    let answer = request.send(body)?;
    let status = answer.status().as_u16();
    Ok((status, serde_json::from_str(&answer.into_body().read_to_string()?)?))
}

/// Files below a folder.
fn files(folder: &Path) -> usize {
    let Ok(entries) = std::fs::read_dir(folder) else { return 0 };
    entries.flatten().map(|it| if it.path().is_dir() { files(&it.path()) } else { 1 }).sum()
}

#[tokio::test(flavor = "multi_thread")]
async fn jobs_are_submitted_only_by_those_who_may() -> Result<()> {
    let cluster = LocalCluster::start(2)?;
    // Every node answers for itself, also the one that does not coordinate.
    let credentials = credentials(cluster.first())?;
    let methods = methods()?;
    ensure!(methods.len() >= 12, "the methods are looked up in the contract: {methods:?}");
    let mut accepted = Vec::new();
    for (number, node) in cluster.nodes.iter().enumerate() {
        let channel =
            connect_to_local_node(&DataDir::new(node.data_dir())).await?.context("the node runs")?;
        let url = node.ready.http.as_deref().context("http")?;
        for (kind, credential) in credentials.iter().enumerate() {
            let Credential { what, grpc, http, .. } = credential;
            if *grpc != Code::Ok {
                for path in &methods {
                    let ended = empty_call(&channel, path, credential).await?;
                    let code = ended.err().map_or(Code::Ok, |status| status.code());
                    ensure!(code == *grpc, "{path} with {what} ended with {code:?}");
                }
            }
            let id = format!("grpc-{number}-{kind}");
            let job = SubmitJobRequest {
                id: id.clone(),
                kind: "rehearsal".into(),
                configuration: "steps: 1\n".into(),
                ..SubmitJobRequest::default()
            };
            let submitted = JobsClient::new(channel.clone()).submit(with(job, credential)?).await;
            let code = submitted.as_ref().map_or_else(Status::code, |_| Code::Ok);
            ensure!(code == *grpc, "submitting with {what} ended with {submitted:?}");
            if code == Code::Ok {
                accepted.push(id);
            }

            if *http != 200 {
                let rows = "--x\r\ncontent-disposition: form-data; name=\"purpose\"\r\n\r\nfine-tune\r\n--x\r\n\
                    content-disposition: form-data; name=\"file\"; filename=\"rows.jsonl\"\r\n\r\n{\"text\": \"a row\"}\r\n--x--\r\n";
                let form = "multipart/form-data; boundary=x";
                let (status, answer) = asked(&format!("{url}/v1/files"), form, rows.as_bytes(), credential)?;
                ensure!(
                    status == *http && answer["error"]["message"].is_string(),
                    "{what}: {status} {answer}"
                );
                let job =
                    json!({"model": "demo", "training_file": "file-aaaaaaaaaaaaaaaaaaaaaaaa"}).to_string();
                let job_url = format!("{url}/v1/fine_tuning/jobs");
                let (status, answer) = asked(&job_url, "application/json", job.as_bytes(), credential)?;
                ensure!(
                    status == *http && answer["error"]["message"].is_string(),
                    "{what}: {status} {answer}"
                );
            } else {
                // Whoever may is told what is wrong with the job.
                let (status, answer) =
                    asked(&format!("{url}/v1/fine_tuning/jobs"), "application/json", b"{}", credential)?;
                ensure!(status == 400, "{what}: {status} {answer}");
            }
        }
        ensure!(files(&node.data_dir().join("jobs/files")) == 0, "something of what was refused stays");
        ensure!(files(&node.data_dir().join("jobs/named")) == 0, "a file is kept that was refused");
    }
    let listed = cluster.first().json(&["jobs", "list"])?;
    let mut ids: Vec<&str> =
        listed["jobs"].as_array().context("jobs")?.iter().filter_map(|job| job["id"].as_str()).collect();
    ids.sort_unstable();
    ensure!(ids == accepted, "{ids:?} and {accepted:?}");
    Ok(())
}
