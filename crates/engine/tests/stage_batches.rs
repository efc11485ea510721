//! Sequences that go through a pipeline together get what each gets alone, whoever joins and leaves when.

#![allow(clippy::unwrap_used, clippy::panic)] // a failing test is supposed to stop

mod random_model;
mod support;

use mlxnode_checkpoint::Checkpoint;
use mlxnode_compute::{
    Grammar, GrammarError, Grammars, LayerRange, LogprobRequest, MicroBatch, Output, Penalty, Row, RowOutput,
    Sampled, Sampling, SequenceId, SequenceSpec, Stage, StageError, StepInput, TokenConstraint,
};
use mlxnode_engine::{EngineStage, GenerateError, Speculation, StageOptions};
use random_model::{VOCABULARY, families, recurrent_families};
use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use support::{prompt, spec};

/// Stages, and how many tokens they guessed.
struct Stages(Vec<EngineStage>, usize);

impl Stages {
    fn load(folder: &Path, count: usize) -> Self {
        let checkpoint = Checkpoint::open(folder).unwrap();
        let layers = checkpoint.spec().layer_count();
        let bounds: Vec<usize> = (0..=count).map(|stage| stage * layers / count).collect();
        let stage = |pair: &[usize]| {
            let range = LayerRange::new(pair[0], pair[1]);
            EngineStage::load(&checkpoint, range, StageOptions::default(), &mut |_, _| {}).unwrap()
        };
        Self(bounds.windows(2).map(stage).collect(), 0)
    }

    /// The first stage guesses.
    fn guessing(mut self, speculation: Speculation) -> Result<Self, GenerateError> {
        let first = self.0.remove(0).with_speculation(speculation)?;
        self.0.insert(0, first);
        Ok(self)
    }

    fn open(&mut self, id: SequenceId, spec: &SequenceSpec) {
        self.0.iter_mut().for_each(|stage| stage.open(id, spec.clone()).unwrap());
    }

    fn close(&mut self, id: SequenceId) {
        self.0.iter_mut().for_each(|stage| stage.close(id));
    }

    fn run(&mut self, rows: &[Row]) -> Vec<Result<RowOutput, StageError>> {
        let mut batch = MicroBatch { rows: rows.to_vec(), input: StepInput::Tokens };
        let mut outputs = Vec::new();
        self.0[0].guess(&mut batch).unwrap();
        self.1 += batch.rows.iter().map(|row| row.guesses.len()).sum::<usize>();
        for stage in &mut self.0 {
            let output = stage.run(&batch).unwrap();
            outputs = output.rows;
            if let Some(activation) = output.activation {
                batch.input = StepInput::Activation(activation);
            }
        }
        outputs
    }
}

/// What a client asks for.
#[derive(Clone)]
struct Request {
    prompt: Vec<u32>,
    spec: SequenceSpec,
    /// The step in which it comes, and that in which it is closed before its end.
    joins: usize,
    leaves: Option<usize>,
}

/// What a client gets.
#[derive(Clone, Debug, Default, PartialEq)]
struct Answer {
    tokens: Vec<Sampled>,
    scores: Vec<Sampled>,
    embedding: Option<Vec<f32>>,
}

/// Runs them together as a worker does: decoding rows first, chunks of at most `chunk` tokens behind them.
fn run(stages: &mut Stages, requests: &[Request], chunk: usize) -> Vec<Answer> {
    let mut answers = vec![Answer::default(); requests.len()];
    // What goes in next, and where.
    let mut open: BTreeMap<usize, (usize, Vec<u32>)> = BTreeMap::new();
    let mut decoding: Vec<usize> = Vec::new();
    for step in 0.. {
        for (number, request) in requests.iter().enumerate() {
            let id = SequenceId(number as u64);
            if request.joins == step {
                stages.open(id, &request.spec);
                open.insert(number, (0, request.prompt.clone()));
            }
            if request.leaves == Some(step) && open.remove(&number).is_some() {
                decoding.retain(|other| *other != number);
                stages.close(id);
            }
        }
        if open.is_empty() && requests.iter().all(|request| request.joins <= step) {
            return answers;
        }
        let loading = open.keys().copied().filter(|number| !decoding.contains(number));
        let order: Vec<usize> = decoding.iter().copied().chain(loading).collect();
        let mut rows = Vec::new();
        for number in &order {
            let (position, left) = &open[number];
            let tokens = left[..left.len().min(chunk)].to_vec();
            let sample = tokens.len() == left.len();
            rows.push(Row {
                sequence: SequenceId(*number as u64),
                position: *position,
                tokens,
                sample,
                guesses: vec![],
            });
        }
        if rows.is_empty() {
            continue;
        }
        for (number, (row, output)) in order.into_iter().zip(rows.iter().zip(stages.run(&rows))) {
            let output = output.unwrap();
            let answer = &mut answers[number];
            answer.scores.extend(output.scores);
            let state = open.get_mut(&number).unwrap();
            state.0 = row.end() + output.further.len();
            state.1.drain(..row.tokens.len());
            for sampled in output.sampled.into_iter().chain(output.further) {
                if !decoding.contains(&number) {
                    decoding.push(number);
                }
                state.1 = vec![sampled.token];
                answer.tokens.push(sampled);
            }
            answer.embedding = answer.embedding.take().or(output.embedding);
            let is_over = answer.tokens.len() == requests[number].spec.max_tokens || output.is_complete;
            if is_over || answer.embedding.is_some() {
                open.remove(&number);
                decoding.retain(|other| *other != number);
                stages.close(SequenceId(number as u64));
            }
        }
    }
    answers
}

fn requests() -> Vec<Request> {
    let greedy = Sampling::default;
    let seeded = |seed| Sampling {
        temperature: 1.2,
        seed,
        repetition: Some(Penalty { strength: 1.3, context: 8 }),
        logprobs: Some(LogprobRequest { top: 2 }),
        ..Sampling::default()
    };
    let request = |seed: u64, length: usize, max_tokens: usize, sampling: Sampling, joins: usize| {
        let prompt = prompt(length, VOCABULARY as u64, seed);
        Request { spec: spec(prompt.len(), max_tokens, sampling), prompt, joins, leaves: None }
    };
    let mut all = vec![
        request(1, 9, 14, greedy(), 0),
        request(2, 30, 12, greedy(), 0),
        request(3, 1, 20, seeded(5), 1),
        request(4, 17, 9, greedy(), 3),
        request(5, 25, 9, seeded(6), 6),
        request(6, 4, 30, greedy(), 7),
        request(7, 3, 5, greedy(), 25),
        request(8, 21, 4, greedy(), 2),
        request(9, 19, 1, greedy(), 4),
    ];
    all[5].leaves = Some(14);
    all[7].spec.prompt_logprobs = Some(LogprobRequest { top: 3 });
    all[8].spec.output = Output::Embedding;
    all
}

fn near(one: f32, other: f32) -> bool {
    (one - other).abs() <= 1e-4 * one.abs().max(1.0)
}

fn assert_alike(one: &[Sampled], other: &[Sampled], what: &str) {
    let tokens = |all: &[Sampled]| all.iter().map(|it| it.token).collect::<Vec<_>>();
    assert_eq!(tokens(one), tokens(other), "{what}");
    for (one, other) in one.iter().zip(other) {
        let pairs = one.logprob.iter().zip(&other.logprob);
        let tops = one.top.iter().zip(&other.top).map(|(one, other)| (&one.logprob, &other.logprob));
        assert_eq!((one.logprob.is_some(), one.top.len()), (other.logprob.is_some(), other.top.len()));
        assert!(pairs.chain(tops).all(|(one, other)| near(*one, *other)), "{what}: {one:?} and {other:?}");
    }
}

fn alike(one: &[Sampled], other: &[Sampled]) -> bool {
    let pairs = || one.iter().zip(other);
    let near_all = |one: &Sampled, other: &Sampled| {
        let own = one.logprob.iter().zip(&other.logprob);
        let tops = one.top.iter().zip(&other.top).map(|(one, other)| (&one.logprob, &other.logprob));
        one.token == other.token
            && (one.logprob.is_some(), one.top.len()) == (other.logprob.is_some(), other.top.len())
            && own.chain(tops).all(|(one, other)| near(*one, *other))
    };
    one.len() == other.len() && pairs().all(|(one, other)| near_all(one, other))
}

#[test]
fn whoever_goes_along_changes_nothing() {
    for (name, config) in families().into_iter().chain(recurrent_families()) {
        let folder = support::folder();
        random_model::write(folder.path(), &config, 3);
        let requests = requests();
        let mut whole = Stages::load(folder.path(), 1);
        let alone: Vec<Answer> = requests
            .iter()
            .map(|request| {
                let request = Request { joins: 0, leaves: None, ..request.clone() };
                run(&mut whole, &[request], 64).remove(0)
            })
            .collect();
        let layers = whole.0[0].info().layer_count;
        let splits = (1..=3).filter(|count| *count <= layers && can_split(&config, *count));
        for count in splits {
            let mut stages = Stages::load(folder.path(), count);
            for chunk in [7, 64] {
                let together = run(&mut stages, &requests, chunk);
                for (number, (alone, together)) in alone.iter().zip(&together).enumerate() {
                    let what = format!("{name}, {count} stages, chunks of {chunk}, request {number}");
                    let tokens = match requests[number].leaves {
                        Some(_) => &alone.tokens[..together.tokens.len()],
                        None => &alone.tokens,
                    };
                    assert_alike(tokens, &together.tokens, &what);
                    assert_alike(&alone.scores, &together.scores, &what);
                    let pairs = alone.embedding.iter().flatten().zip(together.embedding.iter().flatten());
                    assert!(pairs.into_iter().all(|(one, other)| near(*one, *other)), "{what}");
                    assert_eq!(alone.embedding.is_some(), together.embedding.is_some(), "{what}");
                }
                assert!(stages.0.iter().all(|stage| stage.memory().active.0 > 0));
            }
        }
        let (scored, embedded) = (&alone[7], &alone[8]);
        assert_eq!(scored.scores.len(), requests[7].prompt.len() - 1, "{name}");
        assert!(
            scored.scores.iter().zip(&requests[7].prompt[1..]).all(|(score, token)| score.token == *token)
        );
        assert!(embedded.embedding.as_ref().is_some_and(|values| values.iter().any(|value| *value != 0.0)));
    }
}

/// What guesses: a draft model that is always right, one that hardly ever is, the text.
fn speculations(folder: &Path, other: &Path) -> [Speculation; 3] {
    let draft = |folder, tokens| Speculation::Draft { model: Box::new(random_model::load(folder)), tokens };
    [draft(folder, 4), draft(other, 3), Speculation::PromptLookup { ngram: 2, tokens: 5 }]
}

/// With guesses the tokens, their log-probabilities and all else stay; where many come together nothing is guessed.
#[test]
fn guesses_change_nothing() {
    let mut refused = BTreeSet::new();
    let mut problems = Vec::new();
    for (name, config) in
        families().into_iter().chain(random_model::more_families()).chain(recurrent_families())
    {
        let (folder, other) = (support::folder(), support::folder());
        random_model::write(folder.path(), &config, 3);
        random_model::write(other.path(), &config, 4);
        let all = requests();
        // The text repeats itself, so that it can be looked up; three at a time, so that they are few enough.
        let again = |request: &Request| {
            let prompt = request.prompt.repeat(3);
            let spec = SequenceSpec { prompt_tokens: prompt.len(), ..request.spec.clone() };
            Request { prompt, spec, joins: request.joins % 3, leaves: request.leaves }
        };
        let few: Vec<Request> = [1, 2, 4].map(|number| again(&all[number])).into();
        let leaving: Vec<Request> = [0, 5, 7].map(|number| again(&all[number])).into();
        let counts = (1..=2).filter(|count| can_split(&config, *count));
        for count in counts {
            let groups = [few.clone(), leaving.clone(), all.clone()];
            let mut plain = Stages::load(folder.path(), count);
            let expected = groups.clone().map(|group| run(&mut plain, &group, 16));
            for (kind, speculation) in speculations(folder.path(), other.path()).into_iter().enumerate() {
                let mut stages = match Stages::load(folder.path(), count).guessing(speculation) {
                    Ok(stages) => stages,
                    Err(GenerateError::KeepsStates | GenerateError::DependsOnStep) => {
                        refused.insert(name);
                        break;
                    }
                    Err(error) => panic!("{name}: {error}"),
                };
                // All kinds do the first group, and each another one of the others.
                let others = |number: usize| number == 0 || number == kind + 1;
                for (number, (group, expected)) in
                    groups.iter().zip(&expected).enumerate().filter(|(number, _)| others(*number))
                {
                    let found = run(&mut stages, group, 16);
                    for (expected, found) in expected.iter().zip(&found) {
                        let what = format!("{name}, {count} stages, kind {kind}, group {number}");
                        // One that leaves early may have come further by then.
                        let common = expected.tokens.len().min(found.tokens.len());
                        let leaves = group.iter().any(|request| request.leaves.is_some());
                        assert!(leaves || expected.tokens.len() == found.tokens.len(), "{what}");
                        if !alike(&expected.tokens[..common], &found.tokens[..common])
                            || !alike(&expected.scores, &found.scores)
                        {
                            problems.push(what);
                        }
                    }
                    assert!(kind == 2 || stages.1 > 0, "{name}: nothing was guessed");
                }
            }
        }
    }
    assert!(problems.is_empty(), "{}", problems.join("\n"));
    let others = ["falcon_h1", "lfm2", "llama-dynamic", "nemotron_h", "qwen3_5", "qwen3_next"];
    assert_eq!(
        refused,
        BTreeSet::from(others),
        "those with recurrent layers, or positions that follow the length"
    );
}

/// Some families share keys and values between layers, so that only some cuts are allowed.
fn can_split(config: &serde_json::Value, count: usize) -> bool {
    count == 1 || config["use_cla"] != true
}

/// The scores are those of evaluation.
#[test]
fn scores_are_the_probabilities_of_the_tokens() {
    let folder = support::folder();
    random_model::write(folder.path(), &random_model::config("qwen3", serde_json::json!({})), 3);
    let tokens = prompt(40, VOCABULARY as u64, 3);
    let expected = random_model::load(folder.path()).token_logprobs(&[&tokens]).unwrap().remove(0);
    let mut spec = spec(tokens.len(), 1, Sampling::default());
    spec.prompt_logprobs = Some(LogprobRequest { top: 1 });
    let request = Request { prompt: tokens, spec, joins: 0, leaves: None };
    for chunk in [1, 6, 64] {
        let answer =
            run(&mut Stages::load(folder.path(), 2), std::slice::from_ref(&request), chunk).remove(0);
        let scores: Vec<f32> = answer.scores.iter().map(|score| score.logprob.unwrap()).collect();
        assert_eq!(scores.len(), expected.len());
        assert!(scores.iter().zip(&expected).all(|(one, other)| near(*one, *other)));
        let best = answer.scores.iter().all(|it| it.top[0].logprob >= it.logprob.unwrap() - 1e-5);
        assert!(best, "the likeliest is at least as likely");
    }
}

#[test]
fn a_row_that_cannot_be_done_spares_the_others() {
    let folder = support::folder();
    random_model::write(folder.path(), &random_model::config("qwen3", serde_json::json!({})), 3);
    let tokens = prompt(6, VOCABULARY as u64, 1);
    let request =
        Request { spec: spec(6, 3, Sampling::default()), prompt: tokens.clone(), joins: 0, leaves: None };
    for count in [1, 2] {
        let mut stages = Stages::load(folder.path(), count);
        let expected = run(&mut stages, std::slice::from_ref(&request), 64).remove(0).tokens[0].clone();
        for id in [1, 2] {
            stages.open(SequenceId(id), &request.spec);
        }
        let row = |sequence, position, tokens: &[u32]| Row {
            sequence: SequenceId(sequence),
            position,
            tokens: tokens.to_vec(),
            sample: true,
            guesses: vec![],
        };
        let bad = [
            row(9, 0, &[1]),
            row(2, 4, &[1]),
            row(2, 0, &[VOCABULARY as u32]),
            row(2, 0, &[]),
            row(1, 0, &[1]),
        ];
        for bad in bad {
            stages.open(SequenceId(3), &request.spec);
            // Only the first stage looks at a bad row: a worker takes it out before the others.
            let mut rows = vec![row(3, 0, &tokens), bad];
            if rows[1].sequence == SequenceId(1) {
                rows.insert(1, rows[1].clone());
                stages.close(SequenceId(1));
                stages.open(SequenceId(1), &request.spec);
            }
            let batch = MicroBatch { rows: rows.clone(), input: StepInput::Tokens };
            let output = stages.0[0].run(&batch).unwrap();
            assert!(output.rows.last().unwrap().is_err(), "{rows:?}");
            if count == 1 {
                assert_eq!(output.rows[0].as_ref().unwrap().sampled, Some(expected.clone()));
            } else {
                assert!(output.activation.unwrap().tokens() >= tokens.len());
            }
            stages.close(SequenceId(3));
        }
    }
}

/// Only multiples of three, and the end after the fifth token.
struct Threes {
    mask: Vec<u32>,
    accepted: usize,
}

impl TokenConstraint for Threes {
    fn mask(&mut self) -> Result<&[u32], GrammarError> {
        Ok(&self.mask)
    }
    fn accept(&mut self, token: u32) -> Result<bool, GrammarError> {
        if !token.is_multiple_of(3) {
            return Err(GrammarError(format!("{token} is no multiple of three")));
        }
        self.accepted += 1;
        Ok(self.accepted == 5)
    }
}

struct MakesThrees;

impl Grammars for MakesThrees {
    fn constraint(&mut self, grammar: &Grammar) -> Result<Box<dyn TokenConstraint>, GrammarError> {
        let Grammar::Regex(_) = grammar else { return Err(GrammarError("no regex".to_owned())) };
        let mut mask = vec![0_u32; VOCABULARY.div_ceil(32)];
        for token in (0..VOCABULARY).step_by(3) {
            mask[token / 32] |= 1 << (token % 32);
        }
        Ok(Box::new(Threes { mask, accepted: 0 }))
    }
}

#[test]
fn a_grammar_decides_which_tokens_come_and_when_it_ends() {
    let folder = support::folder();
    random_model::write(folder.path(), &random_model::config("qwen3", serde_json::json!({})), 3);
    let mut requests = requests();
    requests[1].spec.grammar = Some(Grammar::Regex("threes".to_owned()));
    requests[4].spec.grammar = Some(Grammar::Regex("threes".to_owned()));
    let mut plain = Stages::load(folder.path(), 1);
    let mut without = requests.clone();
    without.iter_mut().for_each(|request| request.spec.grammar = None);
    let free = run(&mut plain, &without, 64);
    assert!(
        matches!(plain.0[0].open(SequenceId(99), requests[1].spec.clone()), Err(StageError::Grammar(_))),
        "there are no grammars without a tokenizer"
    );
    let mut bound = Vec::new();
    for count in [1, 2] {
        let mut stages = Stages::load(folder.path(), count);
        let last = stages.0.pop().unwrap().with_grammars(Box::new(MakesThrees));
        stages.0.push(last);
        let refused = SequenceSpec { grammar: Some(Grammar::JsonObject), ..requests[1].spec.clone() };
        assert!(matches!(stages.0[count - 1].open(SequenceId(99), refused), Err(StageError::Grammar(_))));
        bound.push(run(&mut stages, &requests, 16));
    }
    for answers in &bound {
        for (number, (answer, free)) in answers.iter().zip(&free).enumerate() {
            let tokens: Vec<u32> = answer.tokens.iter().map(|sampled| sampled.token).collect();
            if requests[number].spec.grammar.is_some() {
                assert_eq!(tokens.len(), 5);
                assert!(tokens.iter().all(|token| token % 3 == 0), "{tokens:?}");
            } else {
                assert_alike(&answer.tokens, &free.tokens[..tokens.len()], "one without a grammar");
            }
        }
    }
    assert_alike(&bound[0][1].tokens, &bound[1][1].tokens, "the number of stages");
    assert_alike(&bound[0][4].tokens, &bound[1][4].tokens, "the number of stages");
}
