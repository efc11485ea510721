//! Nobody adds an architecture without its proof: the registry and the case files name the same ones.

#![allow(clippy::unwrap_used, clippy::panic)] // a failing test is supposed to stop

use mlxnode_checkpoint::{Config, architectures};
use mlxnode_parity::{CASES, Case, load, select};
use std::path::Path;

fn config(case: &Case, model_type: Option<&str>) -> Config {
    let mut config = case.config.clone();
    if let Some(model_type) = model_type {
        config.insert("model_type".to_owned(), model_type.into());
    }
    Config::from_json(serde_json::to_string(&config).unwrap().as_bytes()).unwrap()
}

#[test]
fn every_architecture_has_a_case_file_and_every_file_an_architecture() {
    let mut registered: Vec<&str> = architectures::known().iter().map(|known| known.name).collect();
    registered.sort_unstable();
    let files = select(Path::new(CASES), &[]).unwrap();
    let without: Vec<_> = registered.iter().filter(|name| !files.iter().any(|file| file == *name)).collect();
    assert!(without.is_empty(), "no crates/parity/cases/<name>.json (see the README there) for {without:?}");
    let unknown: Vec<_> = files.iter().filter(|file| !registered.contains(&file.as_str())).collect();
    assert!(unknown.is_empty(), "no architecture is registered for the case files of {unknown:?}");
}

#[test]
fn every_case_is_a_config_of_its_architecture() {
    for name in select(Path::new(CASES), &[]).unwrap() {
        for case in load(Path::new(CASES), &name).unwrap() {
            let config = config(&case, None);
            assert_eq!(architectures::find(&config).unwrap().name, name, "{}", case.path());
            let spec =
                architectures::spec(&config).unwrap_or_else(|error| panic!("{}: {error}", case.path()));
            assert_eq!(spec.vocabulary, case.vocabulary().unwrap(), "{}", case.path());
            assert!(spec.layer_count() >= 2, "{} cannot be a pipeline", case.path());
        }
    }
}

/// Names that say what otherwise a field says.
const SAID_BY_NAME: [(&str, &str); 1] = [("falcon_mamba", "use_bcdt_rms")];

#[test]
fn an_alias_means_the_same_model() {
    for known in architectures::known() {
        let first = load(Path::new(CASES), known.name).unwrap().remove(0);
        for alias in known.aliases {
            let mut case = first.clone();
            for (_, field) in SAID_BY_NAME.iter().filter(|(name, _)| name == alias) {
                case.config.insert((*field).to_owned(), true.into());
            }
            let spec = architectures::spec(&config(&case, None)).unwrap();
            let aliased = config(&case, Some(alias));
            assert_eq!(architectures::find(&aliased).unwrap().name, known.name, "{alias}");
            assert_eq!(architectures::spec(&aliased).unwrap(), spec, "{alias}");
            assert_eq!(select(Path::new(CASES), &[(*alias).to_owned()]).unwrap(), [known.name]);
        }
    }
}
