use crate::server::{COMMIT, Fault, Served, Server, State, small_model};
use mlxnode_checkpoint::Checkpoint;
use mlxnode_compute::LayerRange;
use mlxnode_hub::{Hub, HubError, HubId, ModelSource, Options, Secret};
use std::cell::RefCell;
use std::fs;
use std::path::Path;

pub(crate) fn hub(server: &Server, cache: &Path) -> Hub {
    Hub::new(Options { cache: cache.into(), endpoint: server.endpoint(), token: None, offline: false })
}

fn offline(cache: &Path) -> Hub {
    let endpoint = "http://127.0.0.1:1".to_owned(); // nobody listens on port 1
    Hub::new(Options { cache: cache.into(), endpoint, token: None, offline: true })
}

pub(crate) fn source() -> ModelSource {
    ModelSource::parse("o/n").unwrap()
}

fn expect_complete(folder: &Path) {
    let model = small_model();
    for name in
        ["config.json", "tokenizer.json", "templates/chat template.jinja", "merges.txt", "model.safetensors"]
    {
        assert!(fs::read(folder.join(name)).unwrap() == model[name].content, "{name}");
    }
    for name in ["modeling.py", "README.md", "pytorch_model.bin"] {
        assert!(!folder.join(name).exists(), "{name}");
    }
}

#[test]
fn downloads_what_makes_a_model_and_then_has_it() {
    let (server, cache) = (Server::start(), tempfile::tempdir().unwrap());
    let hub = hub(&server, cache.path());
    let seen = RefCell::new(Vec::new());
    let folder = hub
        .resolve(&source(), &|progress| {
            seen.borrow_mut().push((progress.file.to_owned(), progress.done_bytes, progress.total_bytes));
        })
        .unwrap();
    expect_complete(&folder);
    assert_eq!(folder, cache.path().join("models--o--n/snapshots").join(COMMIT));
    let refs = cache.path().join("models--o--n/refs/main");
    assert_eq!(fs::read_to_string(refs).unwrap(), COMMIT);
    let link = fs::read_link(folder.join("model.safetensors")).unwrap();
    assert_eq!(link, Path::new("../../blobs").join(&small_model()["model.safetensors"].etag));
    // Progress never goes back, and ends with everything.
    let seen = seen.into_inner();
    assert!(seen.is_sorted_by_key(|(_, done, _)| *done));
    let (file, done, total) = seen.last().unwrap();
    assert_eq!((file.as_str(), done), ("model.safetensors", total));
    assert!(seen.iter().all(|(_, _, each)| each == total));
    // Again: one question, nothing downloaded.
    server.requests();
    assert_eq!(hub.resolve(&source(), &|_| panic!("nothing to download")).unwrap(), folder);
    assert_eq!(server.requests(), ["GET /api/models/o/n/revision/main"]);
}

#[test]
fn goes_on_where_the_connection_was_cut() {
    let (server, cache) = (Server::start(), tempfile::tempdir().unwrap());
    server.with(|state| state.faults.extend([Fault::CutAfter(400_000), Fault::CutAfter(100_000)]));
    let folder = hub(&server, cache.path()).resolve(&source(), &|_| {}).unwrap();
    expect_complete(&folder);
    let ranges: Vec<_> =
        server.requests().into_iter().filter(|request| request.starts_with("GET /elsewhere/")).collect();
    assert_eq!(
        ranges,
        [
            "GET /elsewhere/model.safetensors",
            "GET /elsewhere/model.safetensors range=400000",
            "GET /elsewhere/model.safetensors range=500000",
        ]
    );
}

#[test]
fn goes_on_from_an_earlier_run() {
    let (server, cache) = (Server::start(), tempfile::tempdir().unwrap());
    let weights = small_model()["model.safetensors"].clone();
    let blobs = cache.path().join("models--o--n/blobs");
    fs::create_dir_all(&blobs).unwrap();
    let incomplete = blobs.join(format!("{}.incomplete", weights.etag));
    fs::write(&incomplete, &weights.content[..700_000]).unwrap();
    expect_complete(&hub(&server, cache.path()).resolve(&source(), &|_| {}).unwrap());
    assert!(server.requests().contains(&"GET /elsewhere/model.safetensors range=700000".to_owned()));
    assert!(!incomplete.exists());
}

#[test]
fn a_server_without_ranges_starts_again() {
    let (server, cache) = (Server::start(), tempfile::tempdir().unwrap());
    server.with(|state| state.faults.extend([Fault::CutAfter(400_000), Fault::IgnoreRange]));
    expect_complete(&hub(&server, cache.path()).resolve(&source(), &|_| {}).unwrap());
}

#[test]
fn a_busy_server_is_asked_again() {
    let (server, cache) = (Server::start(), tempfile::tempdir().unwrap());
    server.with(|state| state.faults.extend([Fault::Status(503), Fault::Status(429)]));
    expect_complete(&hub(&server, cache.path()).resolve(&source(), &|_| {}).unwrap());
}

#[test]
fn text_files_come_without_weights() {
    let (server, cache) = (Server::start(), tempfile::tempdir().unwrap());
    let folder = hub(&server, cache.path()).resolve_text_files(&source(), &|_| {}).unwrap();
    assert!(folder.join("tokenizer.json").exists() && !folder.join("model.safetensors").exists());
    assert!(!server.requests().iter().any(|request| request.contains("safetensors")));
    // Enough for text offline, not for the model.
    assert_eq!(offline(cache.path()).resolve_text_files(&source(), &|_| {}).unwrap(), folder);
    let message = offline(cache.path()).resolve(&source(), &|_| {}).unwrap_err().to_string();
    assert!(message.contains("o/n") && message.contains("it lacks model.safetensors;"), "{message}");
    expect_complete(&hub(&server, cache.path()).resolve(&source(), &|_| {}).unwrap());
}

#[test]
fn offline_uses_the_cache_or_says_what_is_missing() {
    let (server, cache) = (Server::start(), tempfile::tempdir().unwrap());
    let message = offline(cache.path()).resolve(&source(), &|_| {}).unwrap_err().to_string();
    assert!(message.contains("lacks everything") && message.contains("HF_HUB_OFFLINE"), "{message}");
    let folder = hub(&server, cache.path()).resolve(&source(), &|_| {}).unwrap();
    assert_eq!(offline(cache.path()).resolve(&source(), &|_| {}).unwrap(), folder);
    let by_commit = ModelSource::parse(&format!("o/n@{COMMIT}")).unwrap();
    assert_eq!(offline(cache.path()).resolve(&by_commit, &|_| {}).unwrap(), folder);
    let index = r#"{"weight_map": {"a": "model.safetensors", "b": "model-00002.safetensors"}}"#;
    fs::write(folder.join("model.safetensors.index.json"), index).unwrap();
    fs::remove_file(folder.join("tokenizer.json")).unwrap();
    let error = offline(cache.path()).resolve(&source(), &|_| {}).unwrap_err();
    let HubError::Offline { missing, .. } = error else { panic!("{error}") };
    assert_eq!(missing, ["model-00002.safetensors", "tokenizer.json"]);
    // huggingface_hub may have left the list of the commit's files.
    let trees = cache.path().join("models--o--n/trees");
    fs::create_dir(&trees).unwrap();
    let tree =
        r#"{"format_version": 1, "files": {"config.json": {"size": 9}, "special.json": {}, "code.py": {}}}"#;
    fs::write(trees.join(format!("{COMMIT}.json")), tree).unwrap();
    let error = offline(cache.path()).resolve(&source(), &|_| {}).unwrap_err();
    let HubError::Offline { missing, .. } = error else { panic!("{error}") };
    assert_eq!(missing, ["model-00002.safetensors", "special.json", "tokenizer.json"]);
}

#[test]
fn a_cached_copy_is_used_when_the_hub_is_out_of_reach() {
    let (server, cache) = (Server::start(), tempfile::tempdir().unwrap());
    let folder = hub(&server, cache.path()).resolve(&source(), &|_| {}).unwrap();
    server.with(|state| state.refuse = Some((503, "")));
    assert_eq!(hub(&server, cache.path()).resolve(&source(), &|_| {}).unwrap(), folder);
    let hub = hub(&server, cache.path());
    drop(server);
    assert_eq!(hub.resolve(&source(), &|_| {}).unwrap(), folder);
    let other = ModelSource::parse("o/other").unwrap();
    assert!(matches!(hub.resolve(&other, &|_| {}), Err(HubError::Network { .. })));
}

#[test]
fn the_token_opens_gates_and_stays_with_the_hub() {
    let (server, cache) = (Server::start(), tempfile::tempdir().unwrap());
    server.with(|state| state.token = Some("hf_secret".into()));
    let message = hub(&server, cache.path()).resolve(&source(), &|_| {}).unwrap_err().to_string();
    assert!(message.contains("o/n is gated") && message.contains("HF_TOKEN"), "{message}");
    let token = Some(Secret::new("hf_secret".into()));
    let options = Options { cache: cache.path().into(), endpoint: server.endpoint(), token, offline: false };
    expect_complete(&Hub::new(options).resolve(&source(), &|_| {}).unwrap());
    assert_eq!(server.with(|state| state.tokens_elsewhere.clone()), Vec::<String>::new());
}

#[test]
fn renamed_repositories_and_servers_without_head_work() {
    for change in [|state: &mut State| state.renamed = true, |state: &mut State| state.no_head = true] {
        let (server, cache) = (Server::start(), tempfile::tempdir().unwrap());
        server.with(change);
        expect_complete(&hub(&server, cache.path()).resolve(&source(), &|_| {}).unwrap());
    }
}

#[test]
fn many_processes_download_a_file_once() {
    let (server, cache) = (Server::start(), tempfile::tempdir().unwrap());
    std::thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| expect_complete(&hub(&server, cache.path()).resolve(&source(), &|_| {}).unwrap()));
        }
    });
    let bodies = |request: &&String| request.starts_with("GET /elsewhere/");
    assert_eq!(server.requests().iter().filter(bodies).count(), 1);
}

#[test]
fn local_models_are_those_with_all_files() {
    let (server, cache) = (Server::start(), tempfile::tempdir().unwrap());
    let hub = hub(&server, cache.path());
    assert_eq!(hub.local_models(), []);
    let folder = hub.resolve(&source(), &|_| {}).unwrap();
    let partial = cache.path().join("models--o--partial/snapshots/abc");
    fs::create_dir_all(&partial).unwrap();
    fs::write(partial.join("config.json"), "{}").unwrap();
    fs::write(cache.path().join("version.txt"), "1").unwrap();
    let models = hub.local_models();
    assert_eq!(models.len(), 1);
    assert_eq!((&models[0].source, &models[0].folder), (&source(), &folder));
    assert!(models[0].bytes > 1_000_000);
    // A commit that no branch points to is a model of its own.
    fs::remove_file(cache.path().join("models--o--n/refs/main")).unwrap();
    assert_eq!(hub.local_models()[0].source.to_string(), format!("o/n@{COMMIT}"));
    assert_eq!(hub.resolve(&hub.local_models()[0].source, &|_| {}).unwrap(), folder);
}

#[test]
fn data_sets_come_with_their_rows_and_nothing_else() {
    let (server, cache) = (Server::start(), tempfile::tempdir().unwrap());
    let id = HubId::dataset("o/n", None).unwrap();
    let hub_here = hub(&server, cache.path());
    server.with(|state| {
        let served = state.files["README.md"].clone();
        for name in ["data/train-00000-of-00001.parquet", "valid.jsonl", "data/script.py"] {
            let file = Served { etag: format!("{:040x}", name.len()), ..served.clone() };
            state.files.insert(name.to_owned(), file);
        }
        state.files.retain(|name, _| !name.ends_with(".json"));
    });
    let folder = hub_here.resolve_dataset(&id, &|_| {}).unwrap();
    assert_eq!(folder, cache.path().join("datasets--o--n/snapshots").join(COMMIT));
    for name in ["data/train-00000-of-00001.parquet", "valid.jsonl", "README.md"] {
        assert!(folder.join(name).is_file(), "{name}");
    }
    for name in ["data/script.py", "merges.txt", "model.safetensors"] {
        assert!(!folder.join(name).exists(), "{name}");
    }
    assert!(server.requests().contains(&format!("GET /datasets/o/n/resolve/{COMMIT}/valid.jsonl")));
    assert_eq!(offline(cache.path()).resolve_dataset(&id, &|_| {}).unwrap(), folder);
    // A model of the same name is another thing.
    assert!(offline(cache.path()).resolve(&source(), &|_| {}).is_err());
    server.with(|state| state.files.retain(|name, _| name == "README.md"));
    server.with(|state| state.commit = Some("89abcdef".to_owned()));
    let error = hub_here.resolve_dataset(&id, &|_| {}).unwrap_err().to_string();
    assert!(error.starts_with("datasets/o/n has no .jsonl or .parquet file"), "{error}");
    server.with(|state| state.refuse = Some((404, "RepoNotFound")));
    let other = HubId::dataset("o/other", None).unwrap();
    let error = hub_here.resolve_dataset(&other, &|_| {}).unwrap_err().to_string();
    assert!(error.contains(" has no data set o/other; check the spelling"), "{error}");
}

#[test]
fn the_demo_and_folders_need_no_network() {
    let cache = tempfile::tempdir().unwrap();
    let hub = offline(cache.path());
    let demo = hub.resolve(&ModelSource::Demo, &|_| {}).unwrap();
    for file in ["config.json", "model.safetensors", "tokenizer.json"] {
        assert!(demo.join(file).is_file(), "{file}");
    }
    let checkpoint = Checkpoint::open(&demo).unwrap();
    let layers = LayerRange::new(0, checkpoint.spec().layer_count());
    assert_eq!(checkpoint.shard_tensors(layers).unwrap().tensors.len(), checkpoint.tensors().len());
    let folder = ModelSource::parse(demo.to_str().unwrap()).unwrap();
    assert_eq!(hub.resolve(&folder, &|_| {}).unwrap(), demo);
    fs::remove_dir_all(&demo).unwrap();
    assert!(matches!(hub.resolve(&folder, &|_| {}), Err(HubError::NoFolder(_))));
}
