//! Whole runs: mlx-lm's losses and adapters, adapters that both sides load, and runs that are taken up again bit by bit the same.
#![allow(clippy::unwrap_used, clippy::panic)] // a failing test is supposed to stop

mod support;

use mlxnode_checkpoint::{Adapter, Checkpoint};
use mlxnode_compute::{Advance, Job, JobError, Sampling, SequenceSpec, StepReport};
use mlxnode_engine::{Generator, GeneratorOptions, Model};
use mlxnode_mlx::{Device, TensorFile};
use mlxnode_training::{ADAPTER_FILE, Dataset, FineTuning, PrepareError, Row, Sequence, Sets};
use serde_json::{Value, json};
use std::ops::ControlFlow;
use std::path::Path;
use std::sync::Arc;
use support::exchange::{Exchange, Member};
use support::*;

/// Rows of different lengths; every third has a prompt that does not count.
fn rows(count: u64, seed: u64) -> Vec<(Vec<u32>, u32)> {
    (0..count)
        .map(|index| {
            let length = 5 + (index * 7 + seed) % 23;
            (row(length as usize, seed + index), if index % 3 == 0 { 3 } else { 0 })
        })
        .collect()
}

fn dataset(rows: &[(Vec<u32>, u32)]) -> Arc<Dataset> {
    let mut dataset = Dataset::default();
    for (tokens, offset) in rows {
        let counted = std::iter::once(*offset..tokens.len() as u32).collect();
        dataset.push(Row::Single(Sequence { tokens: tokens.clone(), counted }), 2, 2048);
    }
    Arc::new(dataset)
}

fn sets() -> Sets {
    Sets { train: dataset(&rows(14, 1)), valid: dataset(&rows(6, 500)), test: Arc::default() }
}

fn job(model: &Path, yaml: &str, compile: bool) -> Result<FineTuning, PrepareError> {
    FineTuning::new(tuning(model), training(yaml), sets(), [7; 32], compile)
}

fn run(job: &mut FineTuning, most: usize) -> (Vec<StepReport>, Vec<f64>) {
    let (mut steps, mut valid) = (Vec::new(), Vec::new());
    while steps.len() < most {
        match job.advance().unwrap() {
            Advance::Step(report) => steps.push(report),
            Advance::Validated { loss, .. } => valid.push(loss),
            Advance::Finished => break,
            Advance::Prepared(_) | Advance::Tested { .. } => {}
        }
    }
    (steps, valid)
}

fn llama(folder: &Path) -> std::path::PathBuf {
    let model = folder.join("model");
    write(&model, &config("llama", json!({})), 5);
    model
}

#[test]
fn fifty_steps_in_parity_are_mlx_lms_and_both_sides_load_the_adapter() {
    let folder = tempfile::tempdir().unwrap();
    let model = llama(folder.path());
    let (theirs, ours) = (folder.path().join("theirs"), folder.path().join("ours"));
    let parameters = json!({"rank": 4, "scale": 10.0, "dropout": 0.0});
    let raw = |rows: Vec<(Vec<u32>, u32)>| -> Vec<Value> {
        rows.into_iter().map(|(ids, offset)| json!({"ids": ids, "offset": offset})).collect()
    };
    let arguments = json!({"num_layers": 2, "iters": 50, "batch_size": 3, "learning_rate": 1e-3, "steps_per_report": 1,
        "steps_per_eval": 20, "save_every": 25, "val_batches": 2, "seed": 7, "optimizer": "adam", "lora_parameters": parameters,
        "grad_accumulation_steps": 1});
    let asked = ask(
        folder.path(),
        &[json!({"kind": "run", "model": model, "arguments": arguments, "adapter": theirs,
            "rows": raw(rows(14, 1)), "valid": raw(rows(6, 500))})],
    );
    let yaml = "parity: true\nnum_layers: 2\niters: 50\nbatch_size: 3\nlearning_rate: 1e-3\nsteps_per_eval: 20\n\
        val_batches: 2\nseed: 7\nlora_parameters: {rank: 4, scale: 10.0, dropout: 0.0}\n";
    let mut job = job(&model, yaml, false).unwrap();
    let (steps, valid) = run(&mut job, usize::MAX);
    let losses: Vec<f64> = steps.iter().map(|step| step.loss).collect();
    let close = |what: &str, ours: &[f64], theirs: &Value| {
        let theirs: Vec<f64> =
            theirs.as_array().unwrap().iter().map(|value| value.as_f64().unwrap()).collect();
        assert_eq!(ours.len(), theirs.len(), "{what}: {ours:?} {theirs:?}");
        for (place, (ours, theirs)) in ours.iter().zip(&theirs).enumerate() {
            assert!((ours - theirs).abs() < 2e-3, "{what} {place}: {ours} and {theirs}");
        }
    };
    close("loss", &losses, &asked[0]["train"]);
    close("validation", &valid, &asked[0]["valid"]);
    assert!(losses[49] < losses[0], "nothing was learned: {losses:?}");

    std::fs::create_dir(&ours).unwrap();
    job.publish(&ours).unwrap();
    let device = Device::open().unwrap();
    let mut expected = TensorFile::open(&device, &theirs.join(ADAPTER_FILE)).unwrap();
    let mut made = TensorFile::open(&device, &ours.join(ADAPTER_FILE)).unwrap();
    let names: Vec<String> = expected.names().map(str::to_owned).collect();
    assert_eq!(names.len(), made.names().count());
    for name in names {
        let (expected, made) = (expected.take(&name).unwrap(), made.take(&name).unwrap());
        let apart = distance(&numbers(&device, &made), &numbers(&device, &expected));
        assert!(apart < 2e-2, "{name} is {apart} away");
    }

    // Both sides say the same with either adapter.
    let prompt = row(8, 99);
    let asked: Vec<Value> = [&ours, &theirs]
        .iter()
        .map(|adapter| json!({"kind": "generate", "model": model, "adapter": adapter, "prompt": prompt, "tokens": 12}))
        .collect();
    let asked = ask(folder.path(), &asked);
    for (adapter, answer) in [&ours, &theirs].into_iter().zip(asked) {
        let expected: Vec<u64> =
            answer["tokens"].as_array().unwrap().iter().map(|id| id.as_u64().unwrap()).collect();
        assert_eq!(generated(&model, adapter, &prompt), expected, "{}", adapter.display());
    }
}

/// DoRA, full, packed bases and experts: as above, the losses of every step and what is left after fifty.
#[test]
fn fifty_steps_of_every_kind_are_mlx_lms() {
    let folder = tempfile::tempdir().unwrap();
    let moe = json!({"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "mlp_only_layers": [],
        "decoder_sparse_step": 1, "norm_topk_prob": true});
    let bits = |bits: u32| json!({"group_size": 32, "bits": bits});
    let cases = [
        ("dora", config("llama", json!({})), Value::Null, "dora"),
        ("full", config("llama", json!({})), Value::Null, "full"),
        ("packed", config("llama", json!({})), bits(4), "lora"),
        ("packed-6", config("llama", json!({})), bits(6), "lora"),
        ("packed-dora", config("llama", json!({})), bits(4), "dora"),
        ("experts", config("qwen3_moe", moe.clone()), Value::Null, "lora"),
        ("packed-experts", config("qwen3_moe", moe), bits(4), "lora"),
    ];
    let raw = |rows: Vec<(Vec<u32>, u32)>| -> Vec<Value> {
        rows.into_iter().map(|(ids, offset)| json!({"ids": ids, "offset": offset})).collect()
    };
    let place = |name: &str, part: &str| folder.path().join(name).join(part);
    let requests: Vec<Value> = cases
        .iter()
        .map(|(name, config, quantize, kind)| {
            let arguments = json!({"num_layers": 2, "iters": 50, "batch_size": 3, "learning_rate": 1e-4, "steps_per_report": 1,
                "steps_per_eval": 1000, "val_batches": 0, "seed": 7, "optimizer": "adam", "grad_accumulation_steps": 1,
                "fine_tune_type": kind, "lora_parameters": {"rank": 4, "scale": 10.0, "dropout": 0.0}});
            json!({"kind": "run", "make": config, "model": place(name, "model"), "quantize": quantize,
                "quantized": place(name, "packed"), "arguments": arguments, "adapter": place(name, "theirs"),
                "rows": raw(rows(14, 1)), "valid": []})
        })
        .collect();
    let answers = ask(folder.path(), &requests);
    let device = Device::open().unwrap();
    for ((name, _, quantize, kind), answer) in cases.iter().zip(answers) {
        let model = place(name, if quantize.is_null() { "model" } else { "packed" });
        let yaml = format!(
            "parity: true\nfine_tune_type: {kind}\nnum_layers: 2\niters: 50\nbatch_size: 3\nlearning_rate: 1e-4\nval_batches: 0\n\
             seed: 7\nlora_parameters: {{rank: 4, scale: 10.0, dropout: 0.0}}\n"
        );
        let mut job = job(&model, &yaml, false).unwrap();
        let (steps, _) = run(&mut job, usize::MAX);
        let theirs: Vec<f64> =
            answer["train"].as_array().unwrap().iter().map(|value| value.as_f64().unwrap()).collect();
        assert_eq!((steps.len(), theirs.len()), (50, 50), "{name}");
        for (step, theirs) in steps.iter().zip(&theirs) {
            assert!((step.loss - theirs).abs() < 2e-3, "{name} {}: {} and {theirs}", step.step, step.loss);
        }
        let ours = place(name, "ours");
        std::fs::create_dir_all(&ours).unwrap();
        job.publish(&ours).unwrap();
        let mut expected = TensorFile::open(&device, &place(name, "theirs").join(ADAPTER_FILE)).unwrap();
        let mut made = TensorFile::open(&device, &ours.join(ADAPTER_FILE)).unwrap();
        let names: Vec<String> = expected.names().map(str::to_owned).collect();
        assert_eq!(names.len(), made.names().count(), "{name}");
        for tensor in names {
            let (expected, made) = (expected.take(&tensor).unwrap(), made.take(&tensor).unwrap());
            let apart = distance(&numbers(&device, &made), &numbers(&device, &expected));
            assert!(apart < 2e-2, "{name}: {tensor} is {apart} away");
        }
    }
}

fn generated(model: &Path, adapter: &Path, prompt: &[u32]) -> Vec<u64> {
    let checkpoint = Checkpoint::open(model).unwrap();
    let adapter = Adapter::open(adapter, &checkpoint).unwrap();
    let mut loaded = Model::load_whole(&checkpoint, &mut |_, _| {}).unwrap();
    loaded.add_adapter(&checkpoint, "made", &adapter).unwrap();
    loaded.use_adapter(Some("made")).unwrap();
    let mut generator = Generator::new(loaded, GeneratorOptions::default()).unwrap();
    let spec = SequenceSpec::new(prompt.len(), 12, Sampling::default());
    let mut tokens = Vec::new();
    generator
        .generate(prompt, &spec, &mut |event| {
            tokens.push(u64::from(event.sampled.token));
            ControlFlow::Continue(())
        })
        .unwrap();
    tokens
}

/// The bytes of everything that is saved.
fn saved(job: &mut FineTuning, folder: &Path) -> Vec<u8> {
    std::fs::create_dir_all(folder).unwrap();
    job.save(folder).unwrap();
    let mut all = std::fs::read(folder.join("state.safetensors")).unwrap();
    all.extend(std::fs::read(folder.join("cursor.json")).unwrap());
    all
}

#[test]
fn a_run_that_is_taken_up_again_ends_bit_by_bit_the_same() {
    let folder = tempfile::tempdir().unwrap();
    let model = llama(folder.path());
    let place = |name: String| folder.path().join(name);
    for (number, yaml) in [
        "iters: 8\nbatch_size: 3\ngrad_accumulation_steps: 2\noptimizer: adamw\nlearning_rate: 1e-3\nnum_layers: 2\n\
         lora_parameters: {rank: 4, scale: 10.0, dropout: 0.1}\nclip_grad_norm: 1.0\n",
        "iters: 6\nbatch_size: 2\nfine_tune_type: dora\nnum_layers: 1\noptimizer: muon\npacking: true\nmax_seq_length: 64\n",
        "iters: 5\nbatch_size: 4\nfine_tune_type: full\nnum_layers: -1\noptimizer: adafactor\nlearning_rate: 1e-3\n\
         lr_schedule: {name: cosine_decay, arguments: [1e-3, 5], warmup: 2}\ngrad_checkpoint: true\n",
    ]
    .into_iter()
    .enumerate()
    {
        let mut whole = job(&model, yaml, false).unwrap();
        let (steps, _) = run(&mut whole, usize::MAX);
        let expected = saved(&mut whole, &place(format!("whole-{number}")));
        for stop in [1, 2] {
            let mut first = job(&model, yaml, false).unwrap();
            run(&mut first, stop);
            let halfway = place(format!("halfway-{number}-{stop}"));
            saved(&mut first, &halfway);
            drop(first);
            let mut second = job(&model, yaml, false).unwrap();
            second.resume(&halfway).unwrap();
            let (rest, _) = run(&mut second, usize::MAX);
            let values = |steps: &[StepReport]| steps.iter().map(|step| step.loss.to_bits()).collect::<Vec<_>>();
            assert_eq!(values(&rest), values(&steps[stop..]), "losses of {number} after {stop}");
            assert!(saved(&mut second, &place(format!("second-{number}-{stop}"))) == expected, "{number} after {stop}");
        }
    }
}

#[test]
fn one_worker_two_and_three_end_in_the_same_bits() {
    let folder = tempfile::tempdir().unwrap();
    let model = llama(folder.path());
    // The last update has fewer micro-batches.
    let yaml = "iters: 8\nbatch_size: 2\ngrad_accumulation_steps: 3\nlearning_rate: 1e-3\nnum_layers: 2\n\
        lora_parameters: {rank: 4, scale: 10.0, dropout: 0.1}\n";
    let mut alone = job(&model, yaml, false).unwrap();
    let (steps, _) = run(&mut alone, usize::MAX);
    let expected = saved(&mut alone, &folder.path().join("alone"));
    let losses = |steps: &[StepReport]| steps.iter().map(|step| step.loss.to_bits()).collect::<Vec<_>>();
    for workers in [1_u32, 2, 3] {
        let exchange = Arc::new(Exchange::new(workers, 3));
        let threads: Vec<_> = (0..workers)
            .map(|number| {
                let (exchange, model) = (Arc::clone(&exchange), model.clone());
                let place = folder.path().join(format!("{workers}-{number}"));
                std::thread::spawn(move || {
                    let group = Member { exchange, number };
                    let mut job = job(&model, yaml, false).unwrap().with_group(Box::new(group)).unwrap();
                    let (steps, _) = run(&mut job, usize::MAX);
                    (losses(&steps), saved(&mut job, &place))
                })
            })
            .collect();
        for thread in threads {
            let (found, bytes) = thread.join().unwrap();
            assert_eq!(found, losses(&steps), "{workers} workers");
            assert!(bytes == expected, "{workers} workers end elsewhere");
        }
        let told = exchange.told.lock().unwrap();
        let hashes = &told[&1];
        assert_eq!((told.len(), hashes.len()), (1, workers as usize), "after the first update");
        assert!(hashes.iter().all(|hash| *hash == hashes[0]));
    }
}

#[test]
fn what_is_not_the_same_run_is_not_taken_up() {
    let folder = tempfile::tempdir().unwrap();
    let model = llama(folder.path());
    let mut one = job(&model, "iters: 4\nnum_layers: 1\n", false).unwrap();
    run(&mut one, 1);
    let place = folder.path().join("saved");
    saved(&mut one, &place);
    let resumed =
        |yaml: &str| job(&model, yaml, false).unwrap().resume(&place).map_err(|error| error.to_string());
    assert_eq!(resumed("iters: 4\nnum_layers: 1\nsave_every: 7\n"), Ok(()));
    let error = resumed("iters: 4\nnum_layers: 1\nseed: 2\n").unwrap_err();
    assert!(error.contains("another configuration"), "{error}");
    let state = place.join("state.safetensors");
    let mut bytes = std::fs::read(&state).unwrap();
    *bytes.last_mut().unwrap() ^= 1;
    std::fs::write(&state, bytes).unwrap();
    let error = resumed("iters: 4\nnum_layers: 1\n").unwrap_err();
    assert!(error.contains("state.safetensors") && error.contains("digest"), "{error}");
}

#[test]
fn a_loss_that_is_not_finite_leaves_the_parameters_as_they_were() {
    let folder = tempfile::tempdir().unwrap();
    let model = llama(folder.path());
    let yaml = "iters: 6\nnum_layers: 1\noptimizer: sgd\nlearning_rate: 1e38\nbatch_size: 2\n";
    let mut job = job(&model, yaml, false).unwrap();
    let error = loop {
        let before = job.trainer().parameters().to_vec();
        match job.advance() {
            Ok(Advance::Finished) => panic!("no step failed"),
            Ok(_) => {}
            Err(error) => {
                let device = Device::open().unwrap();
                for (one, other) in before.iter().zip(job.trainer().parameters()) {
                    assert_eq!(numbers(&device, one), numbers(&device, other));
                }
                break error;
            }
        }
    };
    let JobError::NotFinite { step, detail } = error else { panic!("{error:?}") };
    assert!(step >= 1 && detail.contains("rows"), "{step} {detail}");
}

#[test]
fn what_cannot_be_trained_is_said_before_the_start() {
    let folder = tempfile::tempdir().unwrap();
    let model = llama(folder.path());
    let refused = |yaml: &str| job(&model, yaml, false).err().unwrap().to_string();
    for (yaml, words) in [
        ("num_layers: 9\n", "num_layers is 9, but the model has 3 layers"),
        (
            "num_layers: 1\nlora_parameters: {rank: 2, scale: 1.0, keys: [self_attn.w_proj]}\n",
            "self_attn.w_proj",
        ),
        (
            "num_layers: 1\nfine_tune_type: dora\nlora_parameters: {rank: 2, scale: 1.0, keys: [model.embed_tokens]}\n",
            "DoRA",
        ),
        ("num_layers: 1\nresume_adapter_file: /nowhere/a.safetensors\n", "/nowhere/a.safetensors"),
    ] {
        let error = refused(yaml);
        assert!(error.contains(words), "{yaml}: {error}");
    }
}
