//! Models that are here, and those that are damaged.

use super::{Damage, User, check_sentence, damaged, demo_folder, edit, stderr};
use serde_json::Value;

#[test]
fn damaged_models_are_named() {
    let user = User::new();
    let cases: [(&str, Damage); 8] = [
        ("config.json", |folder| std::fs::remove_file(folder.join("config.json")).unwrap()),
        ("safetensors", |folder| std::fs::remove_file(folder.join("model.safetensors")).unwrap()),
        ("safetensors", |folder| {
            let file = std::fs::File::options().write(true).open(folder.join("model.safetensors")).unwrap();
            file.set_len(file.metadata().unwrap().len() / 2).unwrap();
        }),
        ("safetensors", |folder| std::fs::write(folder.join("model.safetensors"), [0xFF; 64]).unwrap()),
        ("tokenizer.json", |folder| std::fs::remove_file(folder.join("tokenizer.json")).unwrap()),
        ("tokenizer.json", |folder| std::fs::write(folder.join("tokenizer.json"), "{\"version\": ").unwrap()),
        ("llama", |folder| edit(&folder.join("config.json"), |config| config["model_type"] = "gpt9".into())),
        ("line 1", |folder| std::fs::write(folder.join("chat_template.jinja"), "{% if %}").unwrap()),
    ];
    for (named, damage) in cases {
        let (_folder, model) = damaged(damage);
        check_sentence(&user.run(&["generate", "--model", &model]), &[named], named);
    }
    let (_folder, bare) = damaged(|folder| {
        edit(&folder.join("tokenizer_config.json"), |config| {
            config.as_object_mut().unwrap().remove("chat_template");
        });
        let _ = std::fs::remove_file(folder.join("chat_template.jinja"));
    });
    check_sentence(&user.run(&["generate", "--model", &bare]), &["no template"], "--ignore-chat-template");
    assert!(
        !user.says(&["generate", "--model", &bare, "--ignore-chat-template", "-p", "1 + 1 ="]).is_empty()
    );
}

#[test]
fn parts_for_images_are_noted_once_unless_only_the_answer_counts() {
    let (_folder, model) = damaged(|folder| {
        let mut writer = mlxnode_checkpoint::SafetensorsWriter::new();
        let dtype = mlxnode_checkpoint::TensorDtype::F32;
        writer.add("vision_tower.patch.weight", dtype, &[2], vec![0; 8]).unwrap();
        writer.write(&folder.join("model-vision.safetensors")).unwrap();
    });
    let user = User::new();
    let note = "note: vision weights are not used: this model answers text only\n";
    let asked = ["generate", "--model", &model, "--prompt", "What is 17 + 25?"];
    let output = user.run(&asked);
    assert_eq!(String::from_utf8_lossy(&output.stdout), "42\n");
    assert_eq!(stderr(&output).matches(note).count(), 1, "{}", stderr(&output));
    assert!(!stderr(&user.run(&[&asked[..], &["-q"]].concat())).contains("note:"));
}

#[test]
fn models_lists_what_is_here() {
    let user = User::new();
    let facts = user.json(&["models"]);
    assert_eq!(facts["models"], Value::Array(Vec::new()));
    for name in ["llama", "mistral", "qwen2", "qwen3"] {
        assert!(facts["architectures"].as_array().unwrap().contains(&name.into()), "{facts}");
    }
    // A model as huggingface_hub caches it.
    let repository = user.home.path().join("huggingface/hub/models--someone--demo");
    let snapshot = repository.join("snapshots/0123456789012345678901234567890123456789");
    std::fs::create_dir_all(&snapshot).unwrap();
    std::fs::create_dir_all(repository.join("refs")).unwrap();
    std::fs::write(repository.join("refs/main"), "0123456789012345678901234567890123456789").unwrap();
    for entry in std::fs::read_dir(demo_folder()).unwrap() {
        let entry = entry.unwrap();
        std::fs::copy(entry.path(), snapshot.join(entry.file_name())).unwrap();
    }
    let facts = user.json(&["models"]);
    let model = &facts["models"][0];
    assert_eq!(
        (&model["model"], &model["architecture"]),
        (&"someone/demo".into(), &"llama".into()),
        "{facts}"
    );
    assert_eq!(model["supported"], true);
    assert!(user.says(&["models"]).contains("someone/demo"));
    assert_eq!(user.json(&["generate", "--model", "someone/demo", "-p", "What is 17 + 25?"])["text"], "42");
}

#[test]
fn architectures_are_listed_with_what_they_support() {
    let user = User::new();
    let facts = user.json(&["models", "--architectures"]);
    let all = facts["architectures"].as_array().unwrap();
    let find = |name: &str| all.iter().find(|one| one["name"] == name).unwrap_or_else(|| panic!("no {name}"));
    let llama = find("llama");
    let fields: Vec<&str> = llama.as_object().unwrap().keys().map(String::as_str).collect();
    let promised =
        ["name", "aliases", "pipeline", "tensor", "lora", "quantized_kv", "speculative", "vision_unused"];
    assert_eq!(fields, promised);
    assert_eq!(
        (&llama["pipeline"], &llama["tensor"], &llama["lora"]),
        (&true.into(), &false.into(), &true.into())
    );
    assert!(llama["aliases"].as_array().unwrap().contains(&"xverse".into()));
    assert_eq!((&llama["vision_unused"], &find("gemma3")["vision_unused"]), (&false.into(), &true.into()));
    let table = user.says(&["models", "--architectures"]);
    assert!(
        table.starts_with("ARCHITECTURE") && table.contains("\ngemma3* ") && table.contains("QUANTIZED KV")
    );
    assert_eq!(table.lines().filter(|line| line.starts_with("* Made for images")).count(), 1);
    assert_eq!(table.lines().count(), all.len() + 3);
}
