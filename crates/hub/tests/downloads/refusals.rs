use crate::server::{Fault, Served, Server, State};
use crate::stories::{hub, source};
use std::fs;
use std::os::unix::fs::PermissionsExt;

/// What a spoiled server leads to: the message of the error, and the cache after it.
fn message_of(spoil: impl FnOnce(&mut State)) -> (String, tempfile::TempDir) {
    let (server, cache) = (Server::start(), tempfile::tempdir().unwrap());
    server.with(spoil);
    let error = hub(&server, cache.path()).resolve(&source(), &|_| {}).unwrap_err();
    (error.to_string(), cache)
}

#[test]
fn refusals_say_what_to_do() {
    let cases: [((u16, &str), &[&str]); 8] = [
        ((404, "RepoNotFound"), &["no model o/n", "spelling", "HF_TOKEN"]),
        ((401, "RepoNotFound"), &["no model o/n", "spelling", "HF_TOKEN"]),
        ((404, ""), &["no model o/n"]),
        ((404, "RevisionNotFound"), &["o/n has no revision main"]),
        ((403, "GatedRepo"), &["o/n is gated", "accept its terms", "HF_TOKEN"]),
        ((401, ""), &["refuses access to o/n", "401", "HF_TOKEN"]),
        ((403, ""), &["refuses access to o/n", "403"]),
        ((500, ""), &["/api/models/o/n/revision/main", "status 500"]),
    ];
    for (refuse, parts) in cases {
        let (message, _) = message_of(|state| state.refuse = Some(refuse));
        for part in parts {
            assert!(message.contains(part), "{refuse:?}: no {part:?} in {message}");
        }
    }
}

#[test]
fn hostile_names_do_not_become_paths() {
    let served =
        |etag: &str| Served { content: b"x".to_vec(), etag: etag.into(), elsewhere: false, claimed: None };
    for file in ["../../evil.json", "/tmp/evil.json", "a/../../../evil.json"] {
        let (message, cache) = message_of(|state| {
            state.files.insert(file.into(), served("abc"));
        });
        assert!(message.contains("does not answer as a Hugging Face hub"), "{message}");
        assert_eq!(fs::read_dir(cache.path()).unwrap().count(), 0);
    }
    let (message, _) = message_of(|state| {
        state.files.insert("config.json".into(), served("../../../evil"));
    });
    assert!(message.contains("ETag"), "{message}");
    let (message, _) = message_of(|state| state.commit = Some("../../evil".into()));
    assert!(message.contains("commit"), "{message}");
}

#[test]
fn damaged_contents_are_noticed_and_removed() {
    let (message, cache) = message_of(|state| {
        state.files.get_mut("model.safetensors").unwrap().content[5] ^= 1;
    });
    assert!(message.contains("model.safetensors arrived damaged"), "{message}");
    let blobs: Vec<_> = fs::read_dir(cache.path().join("models--o--n/blobs"))
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    assert!(blobs.iter().all(|blob| !blob.ends_with(".incomplete") && blob.len() == 40), "{blobs:?}");
    assert!(!cache.path().join("models--o--n/refs/main").exists());
}

#[test]
fn a_wrong_range_is_not_appended() {
    let (message, _) = message_of(|state| state.faults.extend([Fault::CutAfter(400_000), Fault::WrongRange]));
    assert!(message.contains("another range"), "{message}");
}

#[test]
fn a_connection_that_always_breaks_is_given_up_and_its_bytes_kept() {
    let (message, cache) = message_of(|state| {
        state.faults.push_back(Fault::CutAfter(300_000));
        state.faults.extend(vec![Fault::CutAfter(0); 20]);
    });
    assert!(message.contains("model.safetensors broke off after 300000 of 1000000 bytes"), "{message}");
    let kept = fs::read_dir(cache.path().join("models--o--n/blobs"))
        .unwrap()
        .map(|entry| entry.unwrap())
        .find(|entry| entry.file_name().to_string_lossy().ends_with(".incomplete"))
        .unwrap();
    assert_eq!(kept.metadata().unwrap().len(), 300_000);
}

#[test]
fn repositories_without_weights_are_refused_before_anything_comes() {
    let (message, cache) = message_of(|state| {
        state.files.remove("model.safetensors");
    });
    assert!(message.contains("o/n has no model*.safetensors"), "{message}");
    assert_eq!(fs::read_dir(cache.path()).unwrap().count(), 0);
}

#[test]
fn a_cache_that_cannot_be_written_is_named() {
    let (server, parent) = (Server::start(), tempfile::tempdir().unwrap());
    let file = parent.path().join("file");
    fs::write(&file, "").unwrap();
    fs::set_permissions(&file, fs::Permissions::from_mode(0o400)).unwrap();
    let message = hub(&server, &file).resolve(&source(), &|_| {}).unwrap_err().to_string();
    assert!(message.contains("cannot be written") && message.contains("models--o--n"), "{message}");
}

#[test]
fn a_model_larger_than_the_disk_is_refused_before_anything_comes() {
    let (message, cache) = message_of(|state| {
        state.files.get_mut("model.safetensors").unwrap().claimed = Some(1 << 60);
    });
    assert!(message.contains("needs 1152921504") && message.contains(" free"), "{message}");
    assert_eq!(fs::read_dir(cache.path()).unwrap().count(), 0);
}

#[test]
fn more_bytes_than_announced_are_refused() {
    let (message, _) = message_of(|state| {
        state.files.get_mut("model.safetensors").unwrap().claimed = Some(900_000);
    });
    assert!(message.contains("more bytes than it announced"), "{message}");
}
