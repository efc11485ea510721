//! A training whose layers are divided among stages is the training of one process: losses, adapter, moments, bit by bit where nothing says
//! otherwise; and what goes wrong with one stage goes wrong with all, soon and without anything half-done.
#![allow(clippy::unwrap_used, clippy::panic)] // a failing test is supposed to stop

mod support;

use mlxnode_checkpoint::layout::Elements;
use mlxnode_checkpoint::{
    Checkpoint, Config, QuantMode, QuantSetting, SafetensorsWriter, TensorDtype, architectures,
};
use mlxnode_compute::{Advance, Job, JobError, LayerRange};
use mlxnode_mlx::{Device, TensorFile};
use mlxnode_training::{Dataset, FineTuning, Row, Sequence, Sets, StagedFineTuning};
use serde_json::{Value, json};
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use support::exchange::{Exchange, Member};
use support::line::{Ended, Fault, Made, Plan};
use support::*;

fn sequence(length: u64, seed: u64, offset: u32) -> Sequence {
    let tokens = row(length as usize, seed);
    let counted = std::iter::once(offset..tokens.len() as u32).collect();
    Sequence { tokens, counted }
}

fn dataset(count: u64, seed: u64) -> Arc<Dataset> {
    let mut dataset = Dataset::default();
    for index in 0..count {
        let length = 5 + (index * 7 + seed) % 23;
        let offset = if index % 3 == 0 { 3 } else { 0 };
        dataset.push(Row::Single(sequence(length, seed + index, offset)), 2, 2048);
    }
    Arc::new(dataset)
}

fn sets() -> Sets {
    Sets { train: dataset(14, 1), valid: dataset(4, 500), test: dataset(3, 900) }
}

fn pairs() -> Sets {
    let mut dataset = Dataset::default();
    for index in 0..6 {
        let of = |seed| {
            let tokens = [row(4, 50 + index), row(3 + index as usize % 4, seed)].concat();
            Sequence { counted: std::iter::once(4..tokens.len() as u32).collect(), tokens }
        };
        dataset.push(Row::Pair { chosen: of(100 + index), rejected: of(200 + index) }, 3, 2048);
    }
    Sets { train: Arc::new(dataset), ..Sets::default() }
}

/// What a run leaves: what it said, its saved state and its adapter.
#[derive(PartialEq)]
struct Left {
    losses: Vec<u64>,
    norms: Vec<Option<u64>>,
    measured: Vec<u64>,
    tokens: u64,
    state: Vec<u8>,
    cursor: String,
    adapter: Vec<u8>,
    config: Vec<u8>,
}

/// Runs to the end, or so many updates.
fn run(job: &mut dyn Job, most: usize) -> Result<Left, JobError> {
    let (mut losses, mut norms, mut measured, mut tokens) = (Vec::new(), Vec::new(), Vec::new(), 0);
    while losses.len() < most {
        match job.advance()? {
            Advance::Step(report) => {
                losses.push(report.loss.to_bits());
                norms.push(report.gradient_norm.map(f64::to_bits));
                tokens += report.tokens;
            }
            Advance::Validated { loss, .. } | Advance::Tested { loss } => measured.push(loss.to_bits()),
            Advance::Prepared(_) => {}
            Advance::Finished => break,
        }
    }
    let folder = tempfile::tempdir().unwrap();
    let (saved, published) = (folder.path().join("saved"), folder.path().join("published"));
    std::fs::create_dir_all(&saved).unwrap();
    std::fs::create_dir_all(&published).unwrap();
    job.save(&saved)?;
    job.publish(&published)?;
    let names = |folder: &Path| {
        let mut names: Vec<_> = folder.read_dir().unwrap().map(|entry| entry.unwrap().file_name()).collect();
        names.sort();
        names
    };
    assert_eq!(names(&saved), ["cursor.json", "state.safetensors"]);
    assert_eq!(names(&published), ["adapter_config.json", "adapters.safetensors"]);
    let read = |file: PathBuf| std::fs::read(file).unwrap();
    Ok(Left {
        losses,
        norms,
        measured,
        tokens,
        state: read(saved.join("state.safetensors")),
        cursor: String::from_utf8(read(saved.join("cursor.json"))).unwrap(),
        adapter: read(published.join("adapters.safetensors")),
        config: read(published.join("adapter_config.json")),
    })
}

/// The largest distance of an array of two states, against the largest of the array.
fn apart(one: &[u8], other: &[u8]) -> f32 {
    let folder = tempfile::tempdir().unwrap();
    let device = Device::open().unwrap();
    let open = |name: &str, bytes: &[u8]| {
        let file = folder.path().join(name);
        std::fs::write(&file, bytes).unwrap();
        TensorFile::open(&device, &file).unwrap()
    };
    let (mut one, mut other) = (open("one.safetensors", one), open("other.safetensors", other));
    let names: Vec<String> = one.names().map(str::to_owned).collect();
    assert_eq!(names.len(), other.names().count());
    let of = |name: &String| {
        let (one, other) = (one.take(name).unwrap(), other.take(name).unwrap());
        distance(&numbers(&device, &one), &numbers(&device, &other))
    };
    names.iter().map(of).fold(0.0, f32::max)
}

/// The stages that begin at these layers.
fn ranges(cuts: &[usize], count: usize) -> Vec<Range<usize>> {
    let starts = std::iter::once(0).chain(cuts.iter().copied());
    starts.zip(cuts.iter().copied().chain([count])).map(|(start, end)| start..end).collect()
}

fn staged(plan: &Plan<'_>, layers: &[Range<usize>]) -> Left {
    plan.line(layers, None, |_, _| {}, |job| run(job, usize::MAX)).lead()
}

fn llama(folder: &Path, extra: Value) -> PathBuf {
    let model = folder.join("model");
    write(&model, &config("llama", extra), 5);
    model
}

/// A model whose maps are packed in 4 bits.
fn write_packed(folder: &Path, config: &Value, seed: u64) {
    let mut config = config.clone();
    config["quantization"] = json!({"group_size": 32, "bits": 4});
    std::fs::create_dir_all(folder).unwrap();
    std::fs::write(folder.join("config.json"), config.to_string()).unwrap();
    let spec = architectures::spec(&Config::from_json(config.to_string().as_bytes()).unwrap()).unwrap();
    let setting = QuantSetting { mode: QuantMode::Affine, group_size: 32, bits: 4 };
    let mut writer = SafetensorsWriter::new();
    let mut state = seed;
    let mut next = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 32) as u32
    };
    for module in spec.modules(LayerRange::new(0, spec.layer_count())) {
        let is_packed = module.matrix().is_some();
        for tensor in module.tensors(is_packed.then_some(setting)).unwrap() {
            let count: usize = tensor.shape.iter().product();
            let mut bytes = Vec::with_capacity(4 * count);
            for _ in 0..count {
                let unit = f64::from(next()) / f64::from(u32::MAX);
                match (tensor.elements, is_packed) {
                    (Elements::Packed, _) => bytes.extend(next().to_le_bytes()),
                    (_, false) => bytes.extend(((0.9 + 0.2 * unit) as f32).to_le_bytes()),
                    (_, true) if tensor.name.ends_with(".scales") => bytes.extend((0.02_f32).to_le_bytes()),
                    (_, true) => bytes.extend((-0.15_f32).to_le_bytes()),
                }
            }
            let dtype = if tensor.elements == Elements::Packed { TensorDtype::U32 } else { TensorDtype::F32 };
            writer.add(&tensor.name, dtype, &tensor.shape, bytes).unwrap();
        }
    }
    writer.write(&folder.join("model.safetensors")).unwrap();
}

/// A case: the model, the run, where the stages begin, and how far apart what is left may be; None: not in a single bit.
/// What is compiled together decides how numbers are rounded.
struct Case {
    name: &'static str,
    config: Value,
    packed: bool,
    yaml: &'static str,
    cuts: &'static [&'static [usize]],
    sets: fn() -> Sets,
    compile: bool,
    tolerance: Option<f32>,
}

fn cases() -> Vec<Case> {
    let case = |name, config: Value, yaml, cuts| Case {
        name,
        config,
        packed: false,
        yaml,
        cuts,
        sets: sets as fn() -> Sets,
        compile: false,
        tolerance: None,
    };
    let llama = || config("llama", json!({"num_hidden_layers": 4}));
    let moe = json!({"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "mlp_only_layers": [],
        "decoder_sparse_step": 1, "norm_topk_prob": true});
    const LORA: &str = "iters: 4\nbatch_size: 3\nlearning_rate: 1e-3\nnum_layers: -1\nsteps_per_eval: 2\ntest: true\n\
        lora_parameters: {rank: 4, scale: 10.0, dropout: 0.0}\n";
    const DESCENT: &str = "iters: 2\nbatch_size: 3\nlearning_rate: 1e-1\nnum_layers: -1\noptimizer: sgd\n\
        lora_parameters: {rank: 4, scale: 10.0, dropout: 0.0}\n";
    const ALL: &str = "iters: 7\nbatch_size: 2\ngrad_accumulation_steps: 4\nlearning_rate: 1e-3\nnum_layers: -1\n\
        clip_grad_norm: 0.05\ngrad_checkpoint: true\noptimizer: adamw\nval_batches: 2\n\
        lora_parameters: {rank: 4, scale: 10.0, dropout: 0.1}\n";
    vec![
        case("lora", llama(), LORA, &[&[2], &[1, 3], &[1, 2, 3]]),
        case("lora, clipped, dropout, checkpointed", llama(), ALL, &[&[1], &[1, 2]]),
        case(
            "dora",
            llama(),
            "iters: 4\nbatch_size: 2\ngrad_accumulation_steps: 2\nfine_tune_type: dora\nnum_layers: 3\nlearning_rate: 1e-3\n\
             optimizer: muon\nclip_grad_norm: 1.0\n",
            &[&[2], &[1, 3]],
        ),
        case(
            "full, with the tables",
            llama(),
            "iters: 4\nbatch_size: 2\ngrad_accumulation_steps: 2\nfine_tune_type: full\nnum_layers: -1\nlearning_rate: 1e-3\n\
             optimizer: adafactor\nlora_parameters: {rank: 1, scale: 1.0, keys: [model.embed_tokens, lm_head, model.norm]}\n",
            &[&[2], &[1, 3]],
        ),
        case(
            "full, checkpointed",
            llama(),
            "iters: 2\nbatch_size: 2\nfine_tune_type: full\nnum_layers: 2\nlearning_rate: 1e-3\noptimizer: sgd\ngrad_checkpoint: true\n",
            &[&[3], &[1, 2]],
        ),
        Case { compile: true, tolerance: Some(1e-3), ..case("compiled", llama(), ALL, &[&[2]]) },
        // More than hidden vectors travels: a second stream and each layer's own input, or what blocks of layers added.
        case("wide", parity_config("gemma3n"), LORA, &[&[2], &[1, 2]]),
        // Many layers see what blocks added, and the gradients of that add up in another order. Few steps, by plain descent: Adam makes whole
        // steps of gradients that are next to nothing, and later ones may choose other experts.
        Case { tolerance: Some(1e-3), ..case("blocks", parity_config("kimi_k3"), DESCENT, &[&[3], &[1, 2]]) },
        case("positions", parity_config("gpt2"), LORA, &[&[1], &[1, 2]]),
        Case { packed: true, ..case("packed", llama(), LORA, &[&[1], &[1, 2]]) },
        case("experts", config("qwen3_moe", moe), ALL, &[&[1], &[1, 2]]),
        // Nothing before the last stage is trained, so no gradient travels.
        case(
            "the last layer",
            llama(),
            "iters: 4\nbatch_size: 2\ngrad_accumulation_steps: 2\nnum_layers: 1\nlearning_rate: 1e-3\nclip_grad_norm: 0.1\n",
            &[&[2], &[1, 3]],
        ),
        // Nothing behind the first is.
        case(
            "the embedding",
            llama(),
            "iters: 4\nbatch_size: 2\ngrad_accumulation_steps: 2\nnum_layers: 1\nlearning_rate: 1e-2\n\
             lora_parameters: {rank: 2, scale: 5.0, dropout: 0.2, keys: [model.embed_tokens]}\n",
            &[&[2], &[1, 3]],
        ),
        case(
            "both tables",
            llama(),
            "iters: 3\nbatch_size: 2\nnum_layers: 1\nlearning_rate: 1e-3\npacking: true\nmax_seq_length: 64\n\
             lora_parameters: {rank: 2, scale: 5.0, dropout: 0.2, keys: [self_attn.v_proj, lm_head, model.embed_tokens]}\n",
            &[&[3], &[1, 2]],
        ),
        case(
            "a tied embedding that is not trained",
            config("qwen3", json!({"tie_word_embeddings": true})),
            LORA,
            &[&[1], &[1, 2]],
        ),
        // The last gradients are too few for an update and go nowhere.
        case(
            "as mlx-lm does",
            llama(),
            "parity: true\niters: 5\nbatch_size: 2\ngrad_accumulation_steps: 2\nnum_layers: 2\nlearning_rate: 1e-3\nsteps_per_eval: 2\nval_batches: 1\n",
            &[&[2], &[1, 3]],
        ),
        Case {
            sets: pairs,
            ..case(
                "orpo",
                llama(),
                "iters: 3\nbatch_size: 2\npreference: orpo\nnum_layers: -1\nlearning_rate: 1e-3\n",
                &[&[2], &[1, 3]],
            )
        },
        Case {
            sets: pairs,
            ..case(
                "dpo",
                llama(),
                "iters: 4\nbatch_size: 2\ngrad_accumulation_steps: 2\npreference: dpo\nnum_layers: -1\nlearning_rate: 1e-3\n\
                 lora_parameters: {rank: 4, scale: 10.0, dropout: 0.1}\n",
                &[&[2], &[1, 3]],
            )
        },
    ]
}

fn check(case: &Case, folder: &Path) {
    let model = folder.join(case.name.replace([' ', ','], "-"));
    match case.packed {
        true => write_packed(&model, &case.config, 3),
        false => write(&model, &case.config, 5),
    }
    let layers = Checkpoint::open(&model).unwrap().spec().layer_count();
    let plan = Plan { model: &model, yaml: case.yaml, sets: case.sets, compile: case.compile };
    let alone = run(&mut plan.alone(), usize::MAX).unwrap();
    assert!(alone.losses.len() > 1);
    for cuts in case.cuts {
        let name = format!("{} cut before {cuts:?}", case.name);
        let made = staged(&plan, &ranges(cuts, layers));
        assert_eq!(made.tokens, alone.tokens, "{name}");
        assert_eq!(made.config, alone.config, "{name}");
        let shown = |bits: &[u64]| bits.iter().map(|bits| f64::from_bits(*bits)).collect::<Vec<_>>();
        let Some(tolerance) = case.tolerance else {
            assert_eq!(shown(&made.losses), shown(&alone.losses), "{name}");
            assert_eq!(made.norms, alone.norms, "{name}");
            assert_eq!(shown(&made.measured), shown(&alone.measured), "{name}");
            let apart = apart(&made.state, &alone.state);
            assert!(made.state == alone.state, "{name}: the state is {apart} away");
            assert_eq!(made.cursor, alone.cursor, "{name}");
            assert!(made.adapter == alone.adapter, "{name}: the adapter");
            continue;
        };
        let norms = |left: &Left| left.norms.iter().copied().flatten().collect::<Vec<_>>();
        let norms = (norms(&made), norms(&alone));
        for (made, alone) in
            [(&made.losses, &alone.losses), (&made.measured, &alone.measured), (&norms.0, &norms.1)]
        {
            assert_eq!(made.len(), alone.len(), "{name}");
            for (made, alone) in shown(made).into_iter().zip(shown(alone)) {
                assert!(
                    (made - alone).abs() < f64::from(tolerance) * alone.abs(),
                    "{name}: {made} and {alone}"
                );
            }
        }
        let apart = apart(&made.adapter, &alone.adapter);
        assert!(apart < tolerance, "{name}: the adapter is {apart} away");
    }
}

#[test]
fn stages_train_what_one_process_trains() {
    let folder = tempfile::tempdir().unwrap();
    cases().iter().for_each(|case| check(case, folder.path()));
}

#[test]
fn what_two_stages_saved_one_process_and_three_stages_go_on_from() {
    let folder = tempfile::tempdir().unwrap();
    let model = llama(folder.path(), json!({"num_hidden_layers": 4}));
    let yaml = "iters: 6\nbatch_size: 2\ngrad_accumulation_steps: 2\nlearning_rate: 1e-3\nnum_layers: -1\nsteps_per_eval: 4\n\
        optimizer: adamw\nlora_parameters: {rank: 4, scale: 10.0, dropout: 0.1}\n";
    let plan = Plan { model: &model, yaml, sets, compile: false };
    let whole = run(&mut plan.alone(), usize::MAX).unwrap();
    let halfway = plan.line(&ranges(&[2], 4), None, |_, _| {}, |job| run(job, 1)).left();
    let saved = folder.path().join("saved");
    std::fs::create_dir_all(&saved).unwrap();
    std::fs::write(saved.join("state.safetensors"), &halfway.state).unwrap();
    std::fs::write(saved.join("cursor.json"), &halfway.cursor).unwrap();
    let rest = |left: &Left| {
        assert!(left.state == whole.state && left.cursor == whole.cursor && left.losses == whole.losses[1..])
    };
    let mut alone: FineTuning = plan.alone();
    alone.resume(&saved).unwrap();
    rest(&run(&mut alone, usize::MAX).unwrap());
    for cuts in [&[1, 3][..], &[3], &[1, 2, 3]] {
        let place = saved.clone();
        let resumed = move |job: &mut StagedFineTuning| {
            job.resume(&place).map_err(|error| JobError::Failed(error.to_string()))?;
            assert_eq!(job.iteration(), 2);
            run(job, usize::MAX)
        };
        rest(&plan.line(&ranges(cuts, 4), None, |_, _| {}, resumed).lead());
    }
    // One process's state is gone on from by stages, too; and damage is noticed before anything is given to the others.
    let mut first = plan.alone();
    let one = run(&mut first, 1).unwrap();
    assert!(one.state == halfway.state && one.cursor == halfway.cursor);
    std::fs::write(saved.join("state.safetensors"), &halfway.state[..halfway.state.len() - 1]).unwrap();
    let damaged = move |job: &mut StagedFineTuning| {
        job.resume(&saved).map_err(|error| JobError::Failed(error.to_string()))?;
        run(job, usize::MAX)
    };
    let words = plan.line(&ranges(&[2], 4), None, |_, _| {}, damaged).words();
    assert!(words[0].contains("is not whole"), "{words:?}");
}

#[test]
fn numbers_that_are_not_finite_stop_all_stages_in_the_same_step() {
    let folder = tempfile::tempdir().unwrap();
    let model = llama(folder.path(), json!({}));
    let yaml = "iters: 6\nbatch_size: 2\ngrad_accumulation_steps: 2\nlearning_rate: 1e30\nnum_layers: -1\noptimizer: sgd\nfine_tune_type: full\n";
    let plan = Plan { model: &model, yaml, sets, compile: false };
    let alone = run(&mut plan.alone(), usize::MAX).err().unwrap();
    let JobError::NotFinite { step, .. } = &alone else { panic!("{alone}") };
    assert_eq!(*step, 3);
    let line = plan.line(&ranges(&[1, 2], 3), None, |_, _| {}, |job| run(job, usize::MAX).map(|_| ()));
    for ended in line.ended {
        let Err(Ended::Failed(error)) = ended else { panic!("a stage did not stop") };
        assert_eq!(error, alone);
    }
}

#[test]
fn stages_that_do_not_fit_together_are_refused_on_all_of_them() {
    let folder = tempfile::tempdir().unwrap();
    let model = llama(folder.path(), json!({}));
    let tied = folder.path().join("tied");
    write(&tied, &config("qwen3", json!({"tie_word_embeddings": true})), 5);
    let words = |model: &Path, yaml: &str, differs: fn(usize, &mut support::line::Made)| {
        let plan = Plan { model, yaml, sets, compile: false };
        let line = plan.line(&ranges(&[1], 3), None, differs, |job| run(job, usize::MAX).map(|_| ()));
        assert!(
            line.ended.iter().all(|ended| matches!(ended, Err(Ended::NotBegun(_)))),
            "{:?}",
            line.words()
        );
        line.words()
    };
    let plain = "iters: 2\nbatch_size: 2\nnum_layers: 2\n";
    let first = |words: Vec<String>, expected: &str| assert!(words[0].contains(expected), "{words:?}");
    let both = |words: Vec<String>, expected: &str| {
        assert!(words.iter().all(|words| words.contains(expected)), "{words:?}");
    };
    both(words(&model, plain, |stage, made| made.fingerprint[0] = stage as u8), "stage 1 has another model");
    both(
        words(&model, plain, |stage, made| {
            if stage == 1 {
                made.yaml.push_str("seed: 5\n");
            }
        }),
        "stage 1 has another model, configuration or data set",
    );
    both(
        words(&model, plain, |stage, made| {
            if stage == 1 {
                made.layers.start = 2;
            }
        }),
        "have layers 0..1, 2..3",
    );
    let keyed = |keys: &str| format!("{plain}lora_parameters: {{rank: 2, scale: 1.0, keys: [{keys}]}}\n");
    both(words(&tied, &keyed("model.embed_tokens"), |_, _| {}), "more than one stage has it");
    let full = format!("{}fine_tune_type: full\n", keyed("model.embed_tokens"));
    both(words(&tied, &full, |_, _| {}), "more than one stage has it");
    both(words(&model, &keyed("self_attn.nothing"), |_, _| {}), "self_attn.nothing");
    both(
        words(&model, &format!("{plain}resume_adapter_file: a.safetensors\n"), |_, _| {}),
        "resume_adapter_file",
    );
    both(
        words(
            &model,
            &format!("{plain}batch_size: 100000\nmax_seq_length: 100000\n").replace("batch_size: 2\n", ""),
            |_, _| {},
        ),
        "smaller batch_size",
    );
    // What only one of them notices, the first one says.
    fn nothing() -> Sets {
        Sets::default()
    }
    first(
        words(&model, plain, |stage, made| {
            if stage == 1 {
                made.sets = nothing;
            }
        }),
        "stage 1: the training set has no rows",
    );
}

#[test]
fn a_line_that_is_lost_at_any_call_ends_soon_and_publishes_nothing_wrong() {
    let folder = tempfile::tempdir().unwrap();
    let model = llama(folder.path(), json!({}));
    let yaml = "iters: 4\nbatch_size: 2\ngrad_accumulation_steps: 2\nlearning_rate: 1e-3\nnum_layers: -1\nsteps_per_eval: 3\nval_batches: 1\n\
        lora_parameters: {rank: 2, scale: 10.0, dropout: 0.1}\n";
    let plan = Plan { model: &model, yaml, sets, compile: false };
    let layers = ranges(&[1, 2], 3);
    let calm = plan.line(&layers, None, |_, _| {}, |job| run(job, usize::MAX));
    let calls = calm.calls.clone();
    let whole = calm.lead();
    assert!(calls.iter().all(|calls| *calls > 20), "{calls:?}");
    let faults = (0..3).flat_map(|stage| (0..calls[stage]).map(move |call| Fault { stage, call }));
    for fault in faults {
        let line = plan.line(&layers, Some(fault), |_, _| {}, |job| run(job, usize::MAX));
        match &line.ended[0] {
            // The last calls are for nothing but an orderly end.
            Ok(left) => assert!(left.as_ref().is_some_and(|left| *left == whole), "{fault:?}"),
            // Nobody's fault: the job goes on from its last checkpoint.
            Err(Ended::Failed(JobError::Lost(_)) | Ended::NotBegun(_)) => {}
            Err(other) => panic!("{fault:?}: {other:?}"),
        }
    }
}

/// Runs a plan in several lines that share the work: what the leading stage of each leaves.
fn in_lines(plan: &Plan<'_>, layers: &[Range<usize>], lines: u32, micro_batches: u32) -> Vec<Left> {
    // The same stage of all lines.
    let groups: Vec<_> = layers.iter().map(|_| Arc::new(Exchange::new(lines, micro_batches))).collect();
    let left = std::thread::scope(|scope| {
        let threads: Vec<_> = (0..lines)
            .map(|number| {
                let groups = groups.clone();
                scope.spawn(move || {
                    let joins = move |stage: usize, made: &mut Made| {
                        let exchange = Arc::clone(&groups[stage]);
                        made.group = Some(Box::new(Member { exchange, number }));
                    };
                    plan.line(layers, None, joins, |job| run(job, usize::MAX)).lead()
                })
            })
            .collect();
        threads.into_iter().map(|thread| thread.join().unwrap()).collect()
    });
    for group in &groups {
        let told = group.told.lock().unwrap();
        let hashes = &told[&1];
        assert_eq!((told.len(), hashes.len()), (1, lines as usize), "after the first update");
        assert!(hashes.iter().all(|hash| *hash == hashes[0]));
    }
    left
}

#[test]
fn lines_that_share_the_work_leave_what_one_process_leaves() {
    // Clipping, dropout, a last update of fewer micro-batches; an update's micro-batches in halves, and in parts that are no halves.
    const ALL: &str = "iters: 7\nbatch_size: 2\ngrad_accumulation_steps: 4\nlearning_rate: 1e-3\nnum_layers: -1\n\
        clip_grad_norm: 0.05\ngrad_checkpoint: true\noptimizer: adamw\nval_batches: 2\ntest: true\n\
        lora_parameters: {rank: 4, scale: 10.0, dropout: 0.1}\n";
    // The first stage trains nothing, and of three lines one has nothing to do.
    const LAST: &str = "iters: 4\nbatch_size: 2\ngrad_accumulation_steps: 2\nlearning_rate: 1e-3\nnum_layers: 2\n\
        lora_parameters: {rank: 4, scale: 10.0, dropout: 0.0}\n";
    // As mlx-lm, whose last gradients go nowhere: nothing is shared of them.
    const PARITY: &str = "iters: 5\nbatch_size: 2\ngrad_accumulation_steps: 2\nlearning_rate: 1e-3\nnum_layers: -1\nparity: mlx-lm\n\
        lora_parameters: {rank: 4, scale: 10.0, dropout: 0.0}\n";
    let folder = tempfile::tempdir().unwrap();
    let model = folder.path().join("model");
    write(&model, &config("llama", json!({"num_hidden_layers": 4})), 5);
    for (yaml, cuts, lines, micro_batches) in
        [(ALL, &[2_usize][..], 2, 4), (ALL, &[1, 3], 3, 4), (LAST, &[1], 3, 2), (PARITY, &[2], 2, 2)]
    {
        let plan = Plan { model: &model, yaml, sets, compile: false };
        let expected = run(&mut plan.alone(), usize::MAX).unwrap();
        for left in in_lines(&plan, &ranges(cuts, 4), lines, micro_batches) {
            assert_eq!(left.losses, expected.losses, "{lines} lines: {yaml}");
            assert_eq!(left.norms, expected.norms, "{lines} lines: {yaml}");
            assert!(left == expected, "{lines} lines end elsewhere: {yaml}");
        }
    }
}
