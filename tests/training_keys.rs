//! Who may submit jobs, over HTTP and gRPC: every state that a credential can be in, against a cluster as people start it. What a key
//! submitted is its own; those who administer the cluster see all.

use anyhow::{Context as _, Result, ensure};
use mlxnode_node::{DataDir, connect_to_local_node};
use mlxnode_proto::v1::jobs_client::JobsClient;
use mlxnode_proto::v1::{JobInput, SubmitJobRequest, UploadRequest, UploadedRequest};
use mlxnode_testkit::cluster::LocalCluster;
use mlxnode_testkit::eventually::eventually;
use mlxnode_testkit::node::NodeProcess;
use serde_json::{Value, json};
use std::time::Duration;
use tonic::{Code, Request};

const ROWS: &str = "{\"text\": \"What is 1 + 2? 3\"}\n{\"text\": \"What is 2 + 2? 4\"}\n";
const PATIENCE: Duration = Duration::from_secs(150);
/// How long a node may take to hear of a key.
const NEWS: Duration = Duration::from_secs(5);

/// The status and the body that a node answers with.
fn ask(
    node: &NodeProcess,
    (method, path): (&str, &str),
    key: Option<&str>,
    kind: &str,
    body: &str,
) -> Result<(u16, String)> {
    let url = node.ready.http.as_deref().context("the node serves HTTP")?;
    let agent: ureq::Agent = ureq::Agent::config_builder().http_status_as_error(false).build().into();
    let mut request = ureq::http::Request::builder().method(method).uri(format!("{url}{path}"));
    if let Some(key) = key {
        request = request.header("authorization", format!("Bearer {key}"));
    }
    let mut answer = match body {
        "" => agent.run(request.body(())?)?,
        body => agent.run(request.header("content-type", kind).body(body.to_owned())?)?,
    };
    Ok((answer.status().as_u16(), answer.body_mut().read_to_string()?))
}

fn get(node: &NodeProcess, path: &str, key: Option<&str>) -> Result<(u16, Value)> {
    let (status, body) = ask(node, ("GET", path), key, "application/json", "")?;
    Ok((status, serde_json::from_str(&body).unwrap_or(Value::String(body))))
}

fn upload(node: &NodeProcess, key: Option<&str>) -> Result<(u16, Value)> {
    let part =
        |head: &str, text: &str| format!("--XX\r\ncontent-disposition: form-data; {head}\r\n\r\n{text}\r\n");
    let form = part("name=\"purpose\"", "fine-tune")
        + &part("name=\"file\"; filename=\"rows.jsonl\"", ROWS)
        + "--XX--\r\n";
    let (status, body) = ask(node, ("POST", "/v1/files"), key, "multipart/form-data; boundary=XX", &form)?;
    Ok((status, serde_json::from_str(&body).with_context(|| body.clone())?))
}

fn submit(node: &NodeProcess, key: Option<&str>, wish: &Value) -> Result<(u16, Value)> {
    let (status, body) =
        ask(node, ("POST", "/v1/fine_tuning/jobs"), key, "application/json", &wish.to_string())?;
    Ok((status, serde_json::from_str(&body).with_context(|| body.clone())?))
}

/// A short job, which takes seconds.
fn wish(file: &Value, suffix: &str) -> Value {
    json!({"model": "demo", "training_file": file, "suffix": suffix, "hyperparameters": {"n_epochs": 1, "batch_size": 2},
           "configuration": {"num_layers": 1}})
}

/// A key of this role, once the node knows it.
fn create(cluster: &LocalCluster, name: &str, role: &str) -> Result<String> {
    let made = cluster.first().json(&["keys", "create", name, "--role", role])?;
    Ok(made["key"].as_str().context("key")?.to_owned())
}

struct Keys {
    ann: String,
    bob: String,
    user: String,
    metrics: String,
    admin: String,
    revoked: String,
}

impl Keys {
    fn create(cluster: &LocalCluster) -> Result<Self> {
        let keys = Self {
            ann: create(cluster, "ann", "trainer")?,
            bob: create(cluster, "bob", "trainer")?,
            user: create(cluster, "user", "user")?,
            metrics: create(cluster, "metrics", "metrics")?,
            revoked: create(cluster, "revoked", "admin")?,
            admin: create(cluster, "admin", "admin")?,
        };
        cluster.first().json(&["keys", "revoke", "revoked"])?;
        for node in &cluster.nodes {
            eventually(NEWS, || {
                let of = |key: &str| Ok::<_, anyhow::Error>(get(node, "/v1/files", Some(key))?.0);
                let statuses = (of(&keys.ann)?, of(&keys.admin)?, of(&keys.revoked)?);
                ensure!(statuses == (200, 200, 401), "{statuses:?}");
                Ok(())
            })?;
        }
        Ok(keys)
    }

    /// Every state of a credential that may not submit jobs, and what it hears.
    fn denied(&self) -> [(&'static str, Option<&str>, u16); 6] {
        [
            ("none", None, 401),
            ("malformed", Some("sk-123"), 401),
            ("wrong", Some("mlx-0000000000000000000000000000000000000000000"), 401),
            ("revoked", Some(&self.revoked), 401),
            ("user", Some(&self.user), 403),
            ("metrics", Some(&self.metrics), 403),
        ]
    }
}

/// Through a node that does not coordinate.
#[tokio::test(flavor = "multi_thread")]
async fn story_only_those_who_may_submit_jobs_and_each_sees_its_own() -> Result<()> {
    let cluster = LocalCluster::start(2)?;
    cluster.first().json(&["load", "demo"])?;
    let keys = Keys::create(&cluster)?;
    let node = &cluster.nodes[1];
    nobody_else_submits(node, &keys)?;
    nor_over_grpc(node, &keys).await?;
    ensure!(node.json(&["jobs", "list"])?["jobs"] == json!([]), "nothing was submitted");
    let (_, files) = get(node, "/v1/files", Some(&keys.admin))?;
    ensure!(files["data"] == json!([]), "nothing was taken in: {files}");
    each_sees_its_own(node, &keys)
}

fn nobody_else_submits(node: &NodeProcess, keys: &Keys) -> Result<()> {
    let file = json!("file-0123456789abcdefghijklmn");
    for (name, key, expected) in keys.denied() {
        let (status, told) = upload(node, key)?;
        ensure!(status == expected, "a file, {name}: {status} {told}");
        let (status, told) = submit(node, key, &wish(&file, "poet"))?;
        ensure!(status == expected, "a job, {name}: {status} {told}");
        ensure!(told["error"]["message"].as_str().is_some_and(|text| !text.is_empty()), "{name}: {told}");
        for change in ["cancel", "pause", "resume"] {
            let path = format!("/v1/fine_tuning/jobs/ftjob-1/{change}");
            let (status, _) = ask(node, ("POST", &path), key, "application/json", "")?;
            ensure!(status == expected, "{change}, {name}: {status}");
        }
    }
    Ok(())
}

/// A call over gRPC that carries a key may do no more than it; without one, the connection's key administers the cluster.
async fn nor_over_grpc(node: &NodeProcess, keys: &Keys) -> Result<()> {
    let channel = connect_to_local_node(&DataDir::new(node.data_dir())).await?.context("the node runs")?;
    let hash = blake3::hash(ROWS.as_bytes());
    let named = UploadedRequest { hash: hash.as_bytes().to_vec().into(), bytes: ROWS.len() as u64 };
    let job = SubmitJobRequest {
        id: "denied".into(),
        model: "demo".into(),
        inputs: vec![JobInput { name: "train.jsonl".into(), hash: named.hash.clone(), bytes: named.bytes }],
        ..SubmitJobRequest::default()
    };
    let denied = keys.denied();
    let more = [("trainer", Some(keys.ann.as_str()), 403)];
    for (name, key, expected) in denied.into_iter().chain(more) {
        let Some(key) = key else { continue };
        let code = if expected == 403 { Code::PermissionDenied } else { Code::Unauthenticated };
        let bearer: tonic::metadata::MetadataValue<_> = format!("Bearer {key}").parse()?;
        let mut client = JobsClient::new(channel.clone());
        let mut request = Request::new(job.clone());
        request.metadata_mut().insert("authorization", bearer.clone());
        let refused = client.submit(request).await.err().context("it was submitted")?;
        ensure!(refused.code() == code, "a job, {name}: {refused}");
        let piece = UploadRequest { file: Some(named.clone()), offset: 0, data: ROWS.into() };
        let mut request = Request::new(tokio_stream::iter([piece]));
        request.metadata_mut().insert("authorization", bearer);
        let refused = client.upload(request).await.err().context("it was taken in")?;
        ensure!(refused.code() == code, "a file, {name}: {refused}");
    }
    let received = JobsClient::new(channel).uploaded(named).await?.into_inner();
    ensure!(received.received == 0, "{received:?}");
    Ok(())
}

fn each_sees_its_own(node: &NodeProcess, keys: &Keys) -> Result<()> {
    let (ann, bob, admin) = (Some(keys.ann.as_str()), Some(keys.bob.as_str()), Some(keys.admin.as_str()));
    let (status, file) = upload(node, ann)?;
    ensure!(status == 200, "{file}");
    let file = file["id"].clone();
    let path = |of: &str, id: &Value| format!("/v1/{of}/{}", id.as_str().unwrap_or_default());
    // Another key's file is none.
    ensure!(get(node, &path("files", &file), bob)?.0 == 404);
    ensure!(get(node, &(path("files", &file) + "/content"), bob)?.0 == 404);
    ensure!(ask(node, ("DELETE", &path("files", &file)), bob, "application/json", "")?.0 == 404);
    ensure!(get(node, "/v1/files", bob)?.1["data"] == json!([]));
    let (status, told) = submit(node, bob, &wish(&file, "poet"))?;
    ensure!((status, &told["error"]["param"]) == (400, &json!("training_file")), "{told}");
    // What takes a key of the role admin.
    let elsewhere = json!({"model": "some/other", "training_file": file});
    let (status, told) = submit(node, ann, &elsewhere)?;
    ensure!((status, &told["error"]["code"]) == (404, &json!("model_not_found")), "{told}");
    let mut greedy = wish(&file, "poet");
    greedy["share_percent"] = json!(50);
    let (status, told) = submit(node, ann, &greedy)?;
    ensure!((status, &told["error"]["param"]) == (403, &json!("share_percent")), "{told}");

    let (status, job) = submit(node, ann, &wish(&file, "poet"))?;
    ensure!(status == 200, "{job}");
    let job = job["id"].clone();
    let own = path("fine_tuning/jobs", &job);
    for (key, sees) in [(ann, true), (bob, false), (admin, true)] {
        let expected = if sees { 200 } else { 404 };
        for path in [own.clone(), format!("{own}/events"), format!("{own}/checkpoints")] {
            let (status, told) = get(node, &path, key)?;
            ensure!(status == expected, "{path}: {status} {told}");
        }
        for list in ["/v1/fine_tuning/jobs", "/api/v1/jobs"] {
            let text = get(node, list, key)?.1.to_string();
            ensure!(text.contains(job.as_str().unwrap_or_default()) == sees, "{list}: {text}");
        }
    }
    for change in ["cancel", "pause", "resume"] {
        let (status, _) = ask(node, ("POST", &format!("{own}/{change}")), bob, "application/json", "")?;
        ensure!(status == 404, "{change}: {status}");
    }
    let publish = format!("/api/v1/jobs/{}/publish", job.as_str().unwrap_or_default());
    let (status, _) = ask(node, ("POST", &publish), bob, "application/json", "{\"model\": \"demo\"}")?;
    ensure!(status == 404, "publish: {status}");
    let mut done = Value::Null;
    eventually(PATIENCE, || {
        done = get(node, &own, ann)?.1;
        ensure!(done["status"] == "succeeded", "{done}");
        Ok(())
    })?;
    let results = done["result_files"].as_array().context("result files")?;
    ensure!(results.len() == 3, "{done}");
    for result in results {
        let path = path("files", result) + "/content";
        ensure!(get(node, &path, bob)?.0 == 404, "{path}");
    }
    let (status, figures) = get(node, &(path("files", &results[0]) + "/content"), ann)?;
    ensure!(status == 200 && figures.to_string().contains("step,train_loss"), "{figures}");
    // Its owner, or who administers the cluster, takes it away.
    ensure!(ask(node, ("DELETE", &path("files", &file)), ann, "application/json", "")?.0 == 200);
    ensure!(get(node, &path("files", &file), ann)?.0 == 404, "what was deleted is not there any more");
    Ok(())
}
