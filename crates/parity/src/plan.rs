//! The runs of a case: what the oracle is asked, and what the engine does too.

use crate::case::{Aspect, CacheSetting, Case, SeededRun};
use crate::sampler::{self, Choice, Processors};
use anyhow::Result;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use std::path::Path;

/// Tokens of a chunk when a prompt goes through in chunks: no divisor of prompt lengths or windows.
const CHUNK: usize = 7;
/// Single tokens after which caches are cut back.
const CUTS: usize = 6;
/// Prompt tokens at once before tokens are generated, on both sides: some ropes depend on where chunks begin.
const PREFILL_STEP: usize = 16;
/// Tokens of a seeded run.
const SEEDED_TOKENS: usize = 32;
/// Runs with a sampler or with other caches start from the longest prompt up to this.
const LONGEST_SHARED_PROMPT: usize = 64;
/// What a sample does less, and a full run more.
const SAMPLE_TOKENS: usize = 16;
const FULL_TOKENS: usize = 128;
const FULL_PROMPT: usize = 600;

/// How much is compared.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Depth {
    /// Few tokens, one pipeline: for every run of the tests.
    Sample,
    /// What the case file says.
    Normal,
    /// Also a long prompt, more tokens, and every pipeline of up to three stages.
    Full,
}

/// What both sides compute for one case.
#[derive(Clone, Debug)]
pub struct Plan {
    /// Logits of whole prompts, number by number.
    pub logits: Vec<LogitsRequest>,
    /// Generations, number by number.
    pub runs: Vec<RunRequest>,
}

/// The logits of every position of a prompt.
#[derive(Clone, Debug, Serialize, PartialEq)]
pub struct LogitsRequest {
    /// What they are compared for.
    pub aspect: Aspect,
    /// Token ids.
    pub prompt: Vec<u32>,
    /// How many tokens go through at once, from piece to piece; None: all of them.
    pub pieces: Option<Vec<usize>>,
}

impl LogitsRequest {
    fn whole(prompt: &[u32]) -> Self {
        Self { aspect: Aspect::Logits, prompt: prompt.to_vec(), pieces: None }
    }

    fn in_chunks(prompt: &[u32]) -> Self {
        let pieces = prompt.chunks(CHUNK).map(<[u32]>::len).collect();
        Self { aspect: Aspect::Chunks, prompt: prompt.to_vec(), pieces: Some(pieces) }
    }

    /// Half of the prompt, some single tokens, the rest; None for a prompt without that many. A stage that is the whole model works
    /// one token ahead after each single one, and cuts its caches back when another comes.
    fn for_cuts(prompt: &[u32]) -> Option<Self> {
        let start = prompt.len() / 2;
        let rest = prompt.len().checked_sub(start + CUTS).filter(|rest| start > 0 && *rest > 0)?;
        let pieces = [start].into_iter().chain([1; CUTS]).chain([rest]).collect();
        Some(Self { aspect: Aspect::Caches, prompt: prompt.to_vec(), pieces: Some(pieces) })
    }
}

/// One generation.
#[derive(Clone, Debug, Serialize, Deserialize, PartialEq)]
pub struct RunRequest {
    /// What it is compared for.
    pub aspect: Aspect,
    /// Token ids.
    pub prompt: Vec<u32>,
    /// How many tokens follow.
    pub max_tokens: usize,
    /// Prompt tokens at once.
    pub prefill_step: usize,
    /// Start of the random keys.
    pub seed: u64,
    /// Of `make_sampler`.
    pub sampler: Choice,
    /// Of `make_logits_processors`.
    pub processors: Processors,
    /// Other caches than the model's own.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cache: Option<CacheSetting>,
}

impl RunRequest {
    /// A greedy run.
    fn new(aspect: Aspect, prompt: &[u32], max_tokens: usize) -> Self {
        Self {
            aspect,
            prompt: prompt.to_vec(),
            max_tokens,
            prefill_step: PREFILL_STEP,
            seed: 0,
            sampler: Choice::default(),
            processors: Processors::against_repetition(),
            cache: None,
        }
    }

    /// Sampling parameters in the engine's terms.
    pub fn sampling(&self) -> mlxnode_compute::Sampling {
        sampler::sampling(&self.sampler, &self.processors, self.seed)
    }
}

impl Plan {
    /// What there is to compute for a case.
    pub fn new(case: &Case, depth: Depth) -> Result<Self> {
        let mut lengths = case.prompts.clone();
        if depth == Depth::Sample && lengths.iter().any(|length| *length <= LONGEST_SHARED_PROMPT) {
            lengths.retain(|length| *length <= LONGEST_SHARED_PROMPT);
        }
        if depth == Depth::Full && !lengths.contains(&FULL_PROMPT) {
            lengths.push(FULL_PROMPT);
        }
        let count = |usual: usize| match depth {
            Depth::Sample => usual.min(SAMPLE_TOKENS),
            Depth::Normal => usual,
            Depth::Full => usual.max(FULL_TOKENS),
        };
        let (mut logits, mut runs) = (Vec::new(), Vec::new());
        for length in &lengths {
            let prompt = case.prompt(*length)?;
            if case.covers(Aspect::Logits) {
                logits.push(LogitsRequest::whole(&prompt));
            }
            if case.covers(Aspect::Chunks) && *length > CHUNK {
                logits.push(LogitsRequest::in_chunks(&prompt));
            }
            if case.covers(Aspect::Greedy) {
                runs.push(RunRequest::new(Aspect::Greedy, &prompt, count(case.new_tokens)));
            }
        }
        let shared = shared_prompt(&lengths);
        let prompt = case.prompt(shared)?;
        if case.covers(Aspect::Seeded) {
            for seeded in &case.samplers {
                let SeededRun { seed, sampler, processors } = seeded.clone();
                let run = RunRequest::new(Aspect::Seeded, &prompt, count(SEEDED_TOKENS));
                runs.push(RunRequest { seed, sampler, processors, ..run });
            }
        }
        if case.covers(Aspect::Caches) {
            logits.extend(LogitsRequest::for_cuts(&prompt));
            for setting in &case.caches {
                let run = RunRequest::new(Aspect::Caches, &prompt, count(case.new_tokens));
                runs.push(RunRequest { cache: Some(*setting), ..run });
            }
        }
        Ok(Self { logits, runs })
    }

    /// The request to the oracle, which makes the model in `folder`.
    pub fn request(&self, case: &Case, folder: &Path) -> Value {
        json!({
            "folder": folder,
            "config": case.config,
            "seed": case.seed(),
            "dtype": case.dtype,
            "quantize": case.quantize,
            "without": case.without,
            "raw": case.raw,
            "logits": self.logits,
            "runs": self.runs,
        })
    }
}

/// The prompt of all runs besides the greedy ones.
fn shared_prompt(lengths: &[usize]) -> usize {
    let short = lengths.iter().copied().filter(|length| *length <= LONGEST_SHARED_PROMPT).max();
    short.or_else(|| lengths.iter().copied().min()).unwrap_or(1)
}

/// The pipelines of a model, each by the layers at which it is cut.
pub(crate) fn splits(case: &Case, allowed: &[usize], depth: Depth) -> Vec<Vec<usize>> {
    let mut splits = match &case.splits {
        Some(splits) => splits.clone(),
        None => {
            let mut splits: Vec<Vec<usize>> = allowed.iter().map(|cut| vec![*cut]).collect();
            match depth {
                Depth::Full => splits.extend(pairs(allowed)),
                Depth::Sample | Depth::Normal => splits.extend(middle_pair(allowed)),
            }
            splits
        }
    };
    if depth == Depth::Sample {
        // The one with most stages says most.
        splits.sort_by_key(Vec::len);
        splits.drain(..splits.len().saturating_sub(1));
    }
    splits
}

fn pairs(cuts: &[usize]) -> Vec<Vec<usize>> {
    let after = |(number, first): (usize, &usize)| {
        let first = *first;
        cuts[number + 1..].iter().map(move |second| vec![first, *second]).collect::<Vec<_>>()
    };
    cuts.iter().enumerate().flat_map(after).collect()
}

fn middle_pair(cuts: &[usize]) -> Option<Vec<usize>> {
    let (first, second) = (cuts.len() / 3, cuts.len() * 2 / 3);
    (first < second).then(|| vec![cuts[first], cuts[second]])
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::case::CaseFile;

    fn case(more: &Value) -> Case {
        let mut case = json!({"name": "a", "samplers": [{}, {"seed": 3}], "caches": [{"max_kv_size": 16}]});
        for (key, value) in more.as_object().unwrap() {
            case[key] = value.clone();
        }
        let file = json!({"base": {"model_type": "x", "vocab_size": 9}, "cases": [case]});
        CaseFile::parse("x", &file.to_string()).unwrap().cases.remove(0)
    }

    #[test]
    fn a_plan_has_every_aspect_but_the_excepted() {
        let counts = |more, depth| {
            let plan = Plan::new(&case(&more), depth).unwrap();
            (plan.logits.len(), plan.runs.len())
        };
        // Two prompts, of which one has chunks, and one with cuts; two samplers; one kind of cache.
        assert_eq!(counts(json!({}), Depth::Normal), (4, 5));
        assert_eq!(counts(json!({"prompts": [5, 40, 100]}), Depth::Normal), (6, 6));
        assert_eq!(counts(json!({"prompts": [5, 40, 100]}), Depth::Sample), (4, 5));
        assert_eq!(counts(json!({}), Depth::Full), (6, 6));
        assert_eq!(counts(json!({"except": {"chunks": "why", "caches": "why"}}), Depth::Normal), (2, 4));
    }

    #[test]
    fn pipelines_are_all_single_cuts_and_one_into_three() {
        let plain = case(&json!({}));
        assert_eq!(splits(&plain, &[1, 2], Depth::Normal), [vec![1], vec![2], vec![1, 2]]);
        assert_eq!(splits(&plain, &[1, 2], Depth::Sample), [vec![1, 2]]);
        assert_eq!(splits(&plain, &[2], Depth::Normal), [vec![2]]);
        assert_eq!(splits(&plain, &[], Depth::Normal), Vec::<Vec<usize>>::new());
        assert_eq!(splits(&plain, &[1, 2, 3], Depth::Full).len(), 6);
        let named = case(&json!({"splits": [[2]]}));
        assert_eq!(splits(&named, &[1, 2], Depth::Full), [vec![2]]);
    }
}
