//! Prompt caches that mlx-lm 0.32.2 wrote, in both of its layouts, are continued here with the same tokens, and ours by mlx-lm;
//! damaged files end in an error that names the field.

#![allow(clippy::unwrap_used, clippy::panic)] // a failing test is supposed to stop

mod random_model;
mod support;

use mlxnode_checkpoint::{SafetensorsWriter, TensorDtype};
use mlxnode_compute::{CacheOptions, Penalty, Sampling};
use mlxnode_engine::{Generator, GeneratorOptions, PromptCache, PromptCacheError, PromptCacheNotes};
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::ops::ControlFlow;
use std::path::Path;
use support::{ask_oracle, folder, prompt, spec};

const NEW_TOKENS: usize = 24;
/// Greedy, but a small random model would say the same token for ever, and equal tokens would prove little.
const PENALTY: Penalty = Penalty { strength: 2.0, context: 32 };

struct Case {
    name: &'static str,
    config: Value,
    options: CacheOptions,
    /// mlx-lm up to 0.32.0 wrote what can be read again.
    old_layout: bool,
    /// mlx-lm has no class for this cache.
    only_here: bool,
}

fn cases() -> Vec<Case> {
    let plain = CacheOptions::default();
    let case = |name, config, options| Case { name, config, options, old_layout: true, only_here: false };
    let families: BTreeMap<_, _> = random_model::families().into_iter().collect();
    let latent = random_model::config(
        "deepseek_v32",
        json!({"num_attention_heads": 3, "num_key_value_heads": 3, "moe_intermediate_size": 32, "kv_lora_rank": 32,
            "q_lora_rank": 64, "qk_rope_head_dim": 16, "qk_nope_head_dim": 32, "v_head_dim": 64, "n_routed_experts": 8,
            "n_shared_experts": 2, "num_experts_per_tok": 3, "first_k_dense_replace": 1, "routed_scaling_factor": 1.5,
            "norm_topk_prob": true, "n_group": 1, "topk_group": 1, "index_head_dim": 32, "index_n_heads": 4,
            "index_topk": 12}),
    );
    let bits = CacheOptions { kv_bits: Some(8), kv_group_size: 32, ..plain };
    let qwen3 = || families["qwen3"].clone();
    vec![
        case("full", qwen3(), plain),
        case("limit", qwen3(), CacheOptions { max_kv_size: Some(20), ..plain }),
        case("limit-not-reached", qwen3(), CacheOptions { max_kv_size: Some(50), ..plain }),
        case("packed", qwen3(), bits),
        case("windows", families["gemma3_text"].clone(), plain),
        Case { only_here: true, ..case("packed-windows", families["gemma3_text"].clone(), bits) },
        Case { old_layout: false, ..case("lists", latent, plain) },
        case("recurrent", random_model::parity_config("mamba2"), plain),
        case("hybrid", random_model::parity_config("lfm2"), plain),
        case("layers-without", random_model::parity_config("nemotron_h"), plain),
        Case {
            old_layout: false,
            ..case("both-in-a-layer", random_model::parity_config("falcon_h1"), plain)
        },
        case("three-convolutions", random_model::parity_config("kimi_linear"), plain),
        case("three-convolutions-and-attention", random_model::parity_config("olmo_hybrid"), plain),
        case("three-convolutions-bounded", random_model::parity_config("bailing_moe_v3"), plain),
        case("three-convolutions-together", random_model::parity_config("kimi_k3"), plain),
        Case { old_layout: false, ..case("blocks", random_model::parity_config("minimax_m3_vl"), plain) },
        case("linear", random_model::parity_config("bailing_hybrid"), plain),
        case("recurrent-by-channel", random_model::parity_config("mamba"), plain),
        case("hybrid-by-channel", random_model::parity_config("jamba"), plain),
        case("hybrid-of-both-kinds", random_model::parity_config("plamo2"), plain),
        case("recurrent-and-windows", random_model::parity_config("recurrent_gemma"), plain),
        case("recurrent-matrices", random_model::parity_config("rwkv7"), plain),
        Case { old_layout: false, ..case("mixed-keys", random_model::parity_config("baichuan_m1"), plain) },
        Case {
            old_layout: false,
            ..case("groups-of-tokens", random_model::parity_config("longcat_flash_ngram"), plain)
        },
        case("shared-by-the-last", random_model::parity_config("afm7"), plain),
        case("sinks", random_model::parity_config("gpt_oss"), plain),
        case("shared", random_model::parity_config("gemma3n"), plain),
        case("chunks", random_model::parity_config("llama4_text"), plain),
    ]
}

fn sampling() -> Sampling {
    Sampling { repetition: Some(PENALTY), ..Sampling::default() }
}

fn generator(folder: &Path, cache: CacheOptions) -> Generator {
    Generator::new(random_model::load(folder), GeneratorOptions { cache, ..GeneratorOptions::default() })
        .unwrap()
}

/// Goes on from a cache.
fn go_on(generator: &mut Generator, cache: &mut PromptCache, input: &[u32]) -> Vec<u32> {
    let mut tokens = Vec::new();
    let spec = spec(input.len(), NEW_TOKENS, sampling());
    generator
        .generate_from(cache, input, &spec, &mut |event| {
            tokens.push(event.sampled.token);
            ControlFlow::Continue(())
        })
        .unwrap();
    tokens
}

fn run(input: &[u32], load: &Path) -> Value {
    json!({"prompt": input, "max_tokens": NEW_TOKENS, "load_cache": load,
        "processors": {"repetition_penalty": PENALTY.strength, "repetition_context_size": PENALTY.context}})
}

#[test]
fn files_go_both_ways() {
    let root = folder();
    let cases: Vec<Case> = cases();
    let beginning = prompt(37, random_model::VOCABULARY as u64, 11);
    let rest = prompt(9, random_model::VOCABULARY as u64, 12);
    let file = |case: &Case, kind: &str| root.path().join(format!("{}-{kind}.safetensors", case.name));
    let request: Vec<Value> = cases
        .iter()
        .map(|case| {
            let mut options = json!({"quantized_kv_start": 0, "kv_group_size": case.options.kv_group_size});
            if let Some(most) = case.options.max_kv_size {
                options["max_kv_size"] = most.into();
            }
            if let Some(bits) = case.options.kv_bits.filter(|_| !case.only_here) {
                options["kv_bits"] = bits.into();
            }
            let mut make = json!({"prompt": beginning, "max_tokens": 0, "cache": options, "save_cache": file(case, "theirs")});
            if case.old_layout {
                make["save_old_cache"] = json!(file(case, "old"));
            }
            json!({"folder": root.path().join(case.name), "config": case.config, "seed": 3, "dtype": "float32",
                "runs": [make, run(&rest, &file(case, "theirs"))]})
        })
        .collect();
    let expected = ask_oracle(root.path(), &request);
    let mut again = Vec::new();
    for (case, expected) in cases.iter().zip(&expected) {
        let folder = root.path().join(case.name);
        let mut generator = generator(&folder, case.options);
        let expected = &expected.runs[1].tokens;
        if !case.only_here {
            let (mut theirs, notes) =
                PromptCache::load(generator.model(), CacheOptions::default(), &file(case, "theirs")).unwrap();
            // Files of mlx-lm do not say how many tokens states have seen.
            let only_states = ["recurrent", "recurrent-by-channel", "recurrent-matrices"];
            let known = if only_states.contains(&case.name) { 1 } else { beginning.len() };
            assert_eq!(theirs.tokens(), known, "{}", case.name);
            assert_eq!(notes.model.as_deref(), folder.to_str());
            assert_eq!(notes.tokenizer_config.as_deref(), Some("{}"));
            assert_eq!(&go_on(&mut generator, &mut theirs, &rest), expected, "{} from theirs", case.name);
            assert_eq!(theirs.tokens(), known + rest.len() + NEW_TOKENS - 1);
        }
        if case.old_layout && !case.only_here {
            let (mut old, _) =
                PromptCache::load(generator.model(), CacheOptions::default(), &file(case, "old")).unwrap();
            assert_eq!(
                &go_on(&mut generator, &mut old, &rest),
                expected,
                "{} from the old layout",
                case.name
            );
        }
        let mut ours = generator.new_cache().unwrap();
        let mut progress = Vec::new();
        generator.fill(&mut ours, &beginning, &mut |done, of| progress.push((done, of))).unwrap();
        assert_eq!(progress, [(0, 37), (36, 37), (37, 37)]);
        let notes = PromptCacheNotes {
            model: Some("m".to_owned()),
            others: BTreeMap::from([("chat".to_owned(), "yes".to_owned())]),
            ..PromptCacheNotes::default()
        };
        ours.save(generator.model(), &notes, &file(case, "ours")).unwrap();
        assert_eq!(PromptCacheNotes::read(&file(case, "ours")).unwrap(), notes);
        let (mut read, _) =
            PromptCache::load(generator.model(), CacheOptions::default(), &file(case, "ours")).unwrap();
        let direct = go_on(&mut generator, &mut ours, &rest);
        assert_eq!(go_on(&mut generator, &mut read, &rest), direct, "{} from ours", case.name);
        if !case.only_here {
            assert_eq!(&direct, expected, "{} without a file", case.name);
            // Once more after everything: a ring that has turned.
            read.save(generator.model(), &notes, &file(case, "turned")).unwrap();
            let (mut turned, _) =
                PromptCache::load(generator.model(), CacheOptions::default(), &file(case, "turned")).unwrap();
            let next = go_on(&mut generator, &mut turned, &rest);
            again.push((
                case,
                json!({"folder": folder, "existing": true,
                "runs": [run(&rest, &file(case, "ours")), run(&rest, &file(case, "turned"))]}),
                [direct, next],
            ));
        }
    }
    let requests: Vec<Value> = again.iter().map(|(_, request, _)| request.clone()).collect();
    for ((case, _, ours), theirs) in again.iter().zip(ask_oracle(root.path(), &requests)) {
        for (ours, theirs) in ours.iter().zip(theirs.runs) {
            assert_eq!(ours, &theirs.tokens, "{}: mlx-lm goes on differently from our file", case.name);
        }
    }
}

/// A file of our own making, to be damaged.
struct Draft {
    notes: BTreeMap<String, String>,
    tensors: BTreeMap<&'static str, (TensorDtype, Vec<usize>, Vec<u8>)>,
}

impl Draft {
    /// One layer of qwen3 with 3 tokens.
    fn good() -> Self {
        let notes =
            [("1.0", "KVCache"), ("2.0", ""), ("2.1.0", "0.2"), ("2.1.1", "scalar"), ("0.model", "m")];
        let keys = || (TensorDtype::F32, vec![1, 2, 3, 32], vec![0; 4 * 2 * 3 * 32]);
        Self {
            notes: notes.into_iter().map(|(key, value)| (key.to_owned(), value.to_owned())).collect(),
            tensors: BTreeMap::from([("0.0", keys()), ("0.1", keys()), ("0.2", number(3))]),
        }
    }

    fn note(mut self, key: &str, value: &str) -> Self {
        self.notes.insert(key.to_owned(), value.to_owned());
        self
    }

    fn without_note(mut self, key: &str) -> Self {
        self.notes.remove(key);
        self
    }

    fn tensor(mut self, name: &'static str, tensor: (TensorDtype, Vec<usize>, Vec<u8>)) -> Self {
        self.tensors.insert(name, tensor);
        self
    }

    fn without(mut self, name: &str) -> Self {
        self.tensors.remove(name);
        self
    }

    fn scalar(self, number_of_note: usize, name: &'static str, value: i32) -> Self {
        self.tensor(name, number(value))
            .note(&format!("2.{number_of_note}.0"), name)
            .note(&format!("2.{number_of_note}.1"), "scalar")
    }

    fn ring(self, keep: i32, most: i32, next: i32) -> Self {
        self.note("1.0", "RotatingKVCache")
            .scalar(2, "0.3", keep)
            .scalar(3, "0.4", most)
            .scalar(4, "0.5", next)
    }
}

fn number(value: i32) -> (TensorDtype, Vec<usize>, Vec<u8>) {
    (TensorDtype::I32, vec![], value.to_le_bytes().to_vec())
}

#[test]
fn damaged_files_are_refused_by_field() {
    let root = folder();
    let mut config = random_model::families()[0].1.clone();
    config["num_hidden_layers"] = 1.into();
    random_model::write(root.path(), &config, 5);
    let model = random_model::load(root.path());
    let good = Draft::good;
    let floats = |shape: Vec<usize>| {
        let bytes = 4 * shape.iter().product::<usize>();
        (TensorDtype::F32, shape, vec![0; bytes])
    };
    let cases: Vec<(Draft, &str)> = vec![
        (good().without_note("2.0"), "note 2.0 is missing"),
        (good().without_note("1.0"), "note 1.0 is missing"),
        (good().note("1.0", "BatchKVCache"), "the class of cache 0 is \"BatchKVCache\""),
        (good().note("1.1", "KVCache"), "it has 2 caches, but 1 layers"),
        (good().note("2.1.1", "complex"), "note 2.1.1 is none of"),
        (good().note("2.1.0", "0.9"), "note 2.1.0 names a tensor that is not there"),
        (good().note("2.1.0", "0.0"), "tensor 0.0 has shape"),
        (good().without_note("2.1.0"), "tensor 0.2 is missing or not a number"),
        (good().tensor("0.2", number(-1)), "tensor 0.2 is -1"),
        (good().tensor("0.2", number(i32::MAX)), "tensor 0.2 is 2147483647"),
        (good().tensor("0.2", number(0)), "cache 0 has 3 slots for 0 tokens"),
        (good().tensor("0.2", number(4)), "cache 0 has 3 slots for 4 tokens"),
        (good().without("0.1"), "tensor 0.0 has keys without values"),
        (good().tensor("0.1", floats(vec![1, 2, 4, 32])), "cache 0 has keys and values that are not"),
        (good().tensor("0.1", floats(vec![2, 3, 32])), "cache 0 has keys and values that are not"),
        (good().tensor("0.0", floats(vec![2, 2, 3, 32])), "cache 0 has keys and values that are not"),
        (
            good().tensor("0.0", (TensorDtype::U32, vec![1, 2, 3, 32], vec![0; 768])),
            "cache 0 has arrays of other types",
        ),
        (
            good().tensor("0.0", floats(vec![1, 4, 3, 32])).tensor("0.1", floats(vec![1, 4, 3, 32])),
            "cache 0 has 4 heads of width 32, but the layer has 2 of width 32",
        ),
        (good().tensor("keys", floats(vec![1])), "tensor keys has a name that is no path"),
        (good().tensor("0.0.0", floats(vec![1])), "lies inside another tensor"),
        (good().tensor("0.7.0.0.0.0.0.0.0.0", floats(vec![1])), "lies deeper than any cache"),
        (good().tensor("7.0", floats(vec![1])), "tensor 7.* belongs to no cache"),
        (good().ring(4, 4, 3), "cache 0 keeps 4 of at most 4"),
        (good().ring(0, 9, 1), "cache 0 keeps 0 of at most 9 tokens and goes on at slot 1 of 3"),
        (good().note("1.0", "RotatingKVCache"), "tensor 0.4 is missing"),
        (good().note("1.0", "QuantizedKVCache"), "tensor 0.0 is one value where a cache should be"),
        (good().note("1.0", "ArraysCache"), "tensor 0.1 says that it holds several sequences"),
        (good().note("2.0", "KVCache").note("0.0.0", "x"), "note 0.0 is not a list of numbers"),
        (good().note("2.0", "RotatingKVCache").note("0.0.0", "7"), "note 0.0 has 1 numbers"),
        (good().note("2.0", "CacheList"), "note 2.0 is CacheList"),
    ];
    let path = root.path().join("cache.safetensors");
    let write = |draft: Draft| {
        let mut writer = SafetensorsWriter::with_notes(draft.notes);
        for (name, (dtype, shape, bytes)) in draft.tensors {
            writer.add(name, dtype, &shape, bytes).unwrap();
        }
        writer.write(&path).unwrap();
        PromptCache::load(&model, CacheOptions::default(), &path)
    };
    assert_eq!(write(good()).unwrap().0.tokens(), 3);
    for (draft, message) in cases {
        let error = write(draft).err().unwrap_or_else(|| panic!("accepted: {message}")).to_string();
        assert!(error.contains(message) && error.contains("cache.safetensors"), "{error}, not {message}");
    }
    std::fs::write(&path, b"nothing of the kind").unwrap();
    assert!(matches!(
        PromptCache::load(&model, CacheOptions::default(), &path),
        Err(PromptCacheError::File(_))
    ));
    let empty = PromptCache::new(&model, CacheOptions::default()).unwrap();
    let error = empty.save(&model, &PromptCacheNotes::default(), &path).unwrap_err();
    assert!(matches!(error, PromptCacheError::Empty));
}
