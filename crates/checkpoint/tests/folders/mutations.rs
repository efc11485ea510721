use crate::tiny::{Tensor, config, open_all, write_weights};
use mlxnode_checkpoint::{Checkpoint, TensorDtype};
use proptest::prelude::*;
use std::fs;
use std::sync::OnceLock;

/// A valid file whose header is as long as its data, so that mutations hit both.
fn valid_weights() -> &'static [u8] {
    static BYTES: OnceLock<Vec<u8>> = OnceLock::new();
    BYTES.get_or_init(|| {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("model.safetensors");
        let tensors = [
            Tensor { name: "model.norm.weight".into(), dtype: TensorDtype::BF16, shape: vec![64] },
            Tensor { name: "lm_head.weight".into(), dtype: TensorDtype::U32, shape: vec![2, 3, 4] },
        ];
        write_weights(&path, &tensors);
        fs::read(path).unwrap()
    })
}

/// Opens a folder with these files and reads every tensor that it accepts: errors are fine, panics are not.
fn open_and_read(config: &[u8], weights: &[u8]) {
    let folder = tempfile::tempdir().unwrap();
    fs::write(folder.path().join("config.json"), config).unwrap();
    fs::write(folder.path().join("model.safetensors"), weights).unwrap();
    let _ = open_all(folder.path());
    let Ok(checkpoint) = Checkpoint::open(folder.path()) else { return };
    for (name, entry) in checkpoint.tensors() {
        let elements: usize = entry.shape.iter().product();
        let bytes = checkpoint.read_tensor(entry).unwrap();
        assert_eq!(bytes.len(), elements * entry.dtype.size(), "{name}");
    }
}

/// Overwrites single bytes, then cuts or extends.
fn mutate(mut bytes: Vec<u8>, edits: &[(usize, u8)], length: Option<usize>) -> Vec<u8> {
    for (at, value) in edits {
        let at = at % bytes.len();
        bytes[at] = *value;
    }
    if let Some(length) = length {
        bytes.resize(length % (bytes.len() * 2), b' ');
    }
    bytes
}

/// Digits and punctuation keep more of the JSON alive than arbitrary bytes do.
fn byte() -> impl Strategy<Value = u8> {
    prop_oneof![any::<u8>(), prop::sample::select(b"0123456789-.eE[]{}\":, ".to_vec())]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 400, ..ProptestConfig::default() })]

    #[test]
    fn damaged_weights_never_panic(
        edits in prop::collection::vec((any::<usize>(), byte()), 0..6),
        length in prop::option::weighted(0.3, any::<usize>()),
    ) {
        open_and_read(config("llama").to_string().as_bytes(), &mutate(valid_weights().to_vec(), &edits, length));
    }

    #[test]
    fn damaged_configs_never_panic(edits in prop::collection::vec((any::<usize>(), byte()), 1..6)) {
        let config = mutate(config("qwen3").to_string().into_bytes(), &edits, None);
        open_and_read(&config, valid_weights());
    }
}
