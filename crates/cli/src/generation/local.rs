//! A model in this process, on the calling thread.

use super::conversation::{Conversation, common, to_repeat};
use super::{Finish, Input, Model, Outcome, Piece, Request, Shape};
use crate::adapter::AdapterFlag;
use crate::grammars::ModelGrammars;
use crate::guessing::Guesses;
use crate::hub;
use crate::interrupts::AnswerGuard;
use crate::loading::{self, Loaded};
use anyhow::{Context as _, Result, bail};
use mlxnode_compute::{CacheOptions, Grammar, SequenceEnd, SequenceSpec};
use mlxnode_engine::{Generator, GeneratorOptions, PromptCache, Speculation};
use mlxnode_text::grammar::{AnswerGrammarError, AnswerWish, answer_grammar};
use mlxnode_text::{AnswerFormat, ChatRequest, ChatTemplate, Message, StopStrings, TextError, Tokenizer};
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::time::Instant;

/// Stands for the user's words where the text before them is looked for. mlx-lm's.
const QUERY: &str = "<query>";

/// How a model runs here.
#[derive(Clone, Debug)]
pub struct LocalOptions {
    /// Prompt tokens that are processed at once.
    pub prefill_step: usize,
    /// What the caches keep.
    pub cache: CacheOptions,
    /// Who guesses tokens ahead.
    pub guesses: Guesses,
    /// What changes the model.
    pub adapter: AdapterFlag,
    /// What prompts come after.
    pub memory: MemoryOptions,
}

/// What prompts come after.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum MemoryOptions {
    /// Nothing.
    Nothing,
    /// What a prompt cache file remembers.
    File(PathBuf),
    /// What the last prompt and answer have in common with them.
    Conversation,
}

/// A loaded model with its tokenizer. MLX belongs to the thread that loaded it.
pub struct LocalModel {
    generator: Generator,
    tokenizer: Tokenizer,
    template: Option<ChatTemplate>,
    format: AnswerFormat,
    memory: Memory,
}

enum Memory {
    Nothing,
    File(PromptCache),
    Conversation {
        so_far: Option<Conversation>,
        /// The model cannot forget single tokens again. Not known before it has remembered some.
        is_final: Option<bool>,
    },
}

impl LocalModel {
    /// Loads the model of a folder.
    pub fn load(folder: &Path, options: LocalOptions, quiet: bool) -> Result<Self> {
        let unusable = || format!("cannot use the model in {}", folder.display());
        let Loaded { model, files, tokenizer, template } = loading::load(folder, &options.adapter, quiet)?;
        let format =
            AnswerFormat::from_files(&files, &tokenizer, template.as_ref()).with_context(unusable)?;
        let LocalOptions { prefill_step, cache, guesses, memory, .. } = options;
        let vocabulary = model.spec().vocabulary;
        let has_windows = model.spec().layers.iter().any(|layer| {
            let attention = layer.mixer.attention();
            attention.is_some_and(|attention| attention.window.is_some() || attention.chunk.is_some())
        });
        let generator =
            Generator::new(model, GeneratorOptions { prefill_step, cache }).with_context(unusable)?;
        let memory = match memory {
            // A draft model has to see the conversation too.
            MemoryOptions::Conversation if matches!(guesses, Guesses::Draft { .. }) => Memory::Nothing,
            MemoryOptions::Conversation => Memory::Conversation {
                so_far: None,
                is_final: (has_windows || cache.max_kv_size.is_some()).then_some(true),
            },
            MemoryOptions::Nothing => Memory::Nothing,
            MemoryOptions::File(path) => Memory::File(prompt_cache(&generator, cache, &path)?),
        };
        let generator = generator.with_grammars(Box::new(ModelGrammars::new(folder.to_owned(), vocabulary)));
        let generator = match speculation(guesses, &tokenizer, quiet)? {
            Some(speculation) => generator.with_speculation(speculation)?,
            None => generator,
        };
        Ok(Self { generator, tokenizer, template, format, memory })
    }

    fn prompt(&self, input: &Input) -> Result<Vec<u32>> {
        match input {
            Input::Text(text) => Ok(self.tokenizer.encode_prompt(text)?),
            Input::Chat(chat) => {
                let text = self.template()?.render(chat)?;
                let text = match &self.memory {
                    Memory::File(_) => self.after_opening(&text, chat)?,
                    _ => &text,
                };
                Ok(self.tokenizer.encode(text, false)?)
            }
        }
    }

    /// What the answer to `prompt` has to look like.
    fn grammar(
        &self,
        tokenizer: &Tokenizer,
        input: &Input,
        shape: &Shape,
        prompt: &[u32],
    ) -> Result<Option<Grammar>> {
        if shape.adapter.is_some() {
            bail!(
                "--adapter names an adapter of a loaded model, and no node runs here; use --adapter-path FOLDER"
            );
        }
        let Input::Chat(chat) = input else { return Ok(shape.format.clone()) };
        let tools = chat.tools.as_deref().unwrap_or_default();
        if !tools.is_empty() && self.format.tools().is_none() {
            return Err(AnswerGrammarError::NoToolCalls.into());
        }
        let wish = AnswerWish { format: shape.format.as_ref(), tools, choice: &shape.choice, parallel: true };
        Ok(answer_grammar(tokenizer, &self.format, &wish, prompt)?)
    }

    fn template(&self) -> Result<&ChatTemplate, TextError> {
        self.template.as_ref().ok_or(TextError::NoChatTemplate)
    }

    /// The prompt from the user's words on: what comes before is in the prompt cache. mlx-lm's rule.
    fn after_opening<'a>(&self, text: &'a str, chat: &ChatRequest) -> Result<&'a str> {
        let mut marked = chat.clone();
        if let Some(last) = marked.messages.last_mut() {
            *last = Message::new(last.role.clone(), QUERY);
        }
        let marked = self.template()?.render(&marked)?;
        let place = marked.find(QUERY).filter(|place| text.get(..*place) == marked.get(..*place));
        match place.and_then(|place| text.get(place..)) {
            Some(rest) => Ok(rest),
            None => bail!(
                "the chat template changes with the prompt, so that it cannot go on from a prompt cache; \
                 --ignore-chat-template sends the prompt as it is"
            ),
        }
    }

    /// What the prompt comes after: its beginning, as far as it went through before, or what a file remembers.
    fn recall(&mut self, prompt: &[u32], most: usize) -> Result<Option<Conversation>> {
        Ok(match &mut self.memory {
            Memory::Nothing => None,
            Memory::File(cache) => Some(Conversation::after(cache.clone())),
            Memory::Conversation { so_far, .. } => {
                let recalled = so_far.take().and_then(|so_far| so_far.back_to(prompt, most));
                match recalled {
                    None => Some(Conversation::after(self.generator.new_cache()?)),
                    recalled => recalled,
                }
            }
        })
    }

    /// Models that cannot forget single tokens get a place to return to: the end of the user's message. What the template puts
    /// behind it, and how it repeats an answer in the next prompt, may differ from turn to turn.
    fn keep_place(
        &mut self,
        conversation: &mut Conversation,
        input: &Input,
        prompt: &[u32],
        most: usize,
    ) -> Result<()> {
        let (Memory::Conversation { is_final, .. }, Input::Chat(chat)) = (&self.memory, input) else {
            return Ok(());
        };
        let is_final = *is_final;
        if is_final == Some(false) {
            return Ok(());
        }
        let asked = ChatRequest { add_generation_prompt: false, ..(**chat).clone() };
        let asked = self.template()?.render(&asked).and_then(|text| self.tokenizer.encode(&text, false));
        // A template may want an answer to be opened; then there is no such place.
        let Ok(asked) = asked else { return Ok(()) };
        let (known, end) = (conversation.known(), common(&asked, prompt).min(most));
        if end > known {
            self.generator.fill(&mut conversation.cache, &prompt[known..end], &mut |_, _| {})?;
            conversation.went_through(prompt[known..end].iter().copied());
            if is_final == Some(true) || !conversation.cache.can_truncate(1) {
                conversation.keep_place();
            }
        }
        Ok(())
    }

    /// Keeps what went through for the next prompt.
    fn remember(&mut self, conversation: Conversation) {
        if let Memory::Conversation { so_far, is_final } = &mut self.memory {
            is_final.get_or_insert(!conversation.cache.can_truncate(1));
            *so_far = Some(conversation);
        }
    }
}

/// Reads a prompt cache file. It says how its keys are packed; who asks for something else is told so.
fn prompt_cache(generator: &Generator, options: CacheOptions, path: &Path) -> Result<PromptCache> {
    let (cache, _) = PromptCache::load(generator.model(), options, path)?;
    if let (Some((bits, group)), Some(wanted)) = (cache.packed(), options.kv_bits)
        && (bits, group) != (wanted, options.kv_group_size)
    {
        bail!(
            "{} is packed with {bits} bits and groups of {group}, but --kv-bits is {wanted} and --kv-group-size {}; \
             leave both out",
            path.display(),
            options.kv_group_size
        );
    }
    Ok(cache)
}

/// What guesses tokens, loaded.
fn speculation(guesses: Guesses, tokenizer: &Tokenizer, quiet: bool) -> Result<Option<Speculation>> {
    Ok(match guesses {
        Guesses::Never => None,
        Guesses::Lookup { ngram, tokens } => Some(Speculation::PromptLookup { ngram, tokens }),
        Guesses::Draft { model: name, tokens } => {
            let draft = loading::load(&hub::folder(&name, quiet)?, &AdapterFlag::default(), quiet)?;
            let (own, other) = (tokenizer.vocabulary_size(), draft.tokenizer.vocabulary_size());
            if own != other {
                bail!(
                    "--draft-model {name} has a tokenizer of {other} tokens, but the model's has {own}; \
                     take a draft model with the same tokenizer"
                );
            }
            Some(Speculation::Draft { model: Box::new(draft.model), tokens })
        }
    })
}

impl Model for LocalModel {
    fn generate(
        &mut self,
        request: &Request,
        guard: &AnswerGuard,
        on_piece: &mut dyn FnMut(Piece) -> Result<()>,
    ) -> Result<Outcome> {
        let tokenizer = self.tokenizer.with_extra_eos_tokens(&request.extra_eos)?;
        let prompt = self.prompt(&request.input)?;
        let mut sampling = request.sampling.clone();
        if let Some(xtc) = &mut sampling.xtc {
            xtc.special_tokens = tokenizer.xtc_special_tokens()?;
        }
        let tools = match &request.input {
            Input::Chat(chat) => chat.tools.as_deref().unwrap_or_default(),
            Input::Text(_) => &[],
        };
        let mut parser = self.format.parser(tools, &prompt)?;
        let grammar = self.grammar(&tokenizer, &request.input, &request.shape, &prompt)?;
        let mut detokenizer = tokenizer.detokenizer();
        let mut stops = StopStrings::new(request.stop.clone())?;

        let started = Instant::now();
        let most = prompt.len() - to_repeat(&sampling, prompt.len()).min(prompt.len());
        let mut conversation = self.recall(&prompt, most)?;
        let cached_tokens = conversation.as_ref().map_or(0, |conversation| conversation.cache.tokens());
        let known = conversation.as_ref().map_or(0, Conversation::known);
        if let Some(conversation) = &mut conversation {
            self.keep_place(conversation, &request.input, &prompt, most)?;
        }
        let rest = &prompt[conversation.as_ref().map_or(0, Conversation::known)..];
        let prepared = started.elapsed();

        let spec = SequenceSpec {
            stop_tokens: tokenizer.eos_tokens().iter().copied().collect(),
            grammar,
            ..SequenceSpec::new(rest.len(), request.max_tokens.unwrap_or(usize::MAX), sampling)
        };
        let mut generated = Vec::new();
        let mut stopped_by_text = false;
        let mut failed = None;
        let mut on_token = |event: mlxnode_engine::TokenEvent| {
            let mut text = String::new();
            if event.end != Some(SequenceEnd::Stop) {
                // A token that ends the sequence has no text.
                let step = stops.push(&detokenizer.push(event.sampled.token));
                text.push_str(&step.text);
                stopped_by_text = step.stopped;
            }
            if event.end.is_some() && !stopped_by_text {
                let step = stops.push(&detokenizer.finish());
                text.push_str(&step.text);
                stopped_by_text = step.stopped;
                if !stopped_by_text {
                    text.push_str(&stops.finish());
                }
            }
            generated.push(event.sampled.token);
            let deltas = parser.push(&text);
            if let Err(error) = on_piece(Piece { text, tokens: vec![event.sampled], deltas }) {
                failed = Some(error);
                return ControlFlow::Break(());
            }
            if stopped_by_text || guard.pressed() {
                ControlFlow::Break(())
            } else {
                ControlFlow::Continue(())
            }
        };
        let summary = match &mut conversation {
            Some(conversation) => {
                self.generator.generate_from(&mut conversation.cache, rest, &spec, &mut on_token)
            }
            None => self.generator.generate(rest, &spec, &mut on_token),
        }?;
        if let Some(error) = failed {
            return Err(error);
        }
        let finish = match summary.end {
            _ if stopped_by_text => Finish::Stop,
            Some(SequenceEnd::Stop | SequenceEnd::Complete) => Finish::Stop,
            Some(SequenceEnd::Length) => Finish::Length,
            None => Finish::Cancelled,
        };
        // What was held back for a stop string is part of an answer that was cut off after all.
        let text = match finish {
            Finish::Cancelled => stops.push(&detokenizer.finish()).text + &stops.finish(),
            Finish::Stop | Finish::Length => String::new(),
        };
        let mut deltas = parser.push(&text);
        deltas.extend(parser.finish());
        if !text.is_empty() || !deltas.is_empty() {
            on_piece(Piece { text, tokens: Vec::new(), deltas })?;
        }
        if let Some(mut conversation) = conversation {
            conversation.went_through(rest.iter().copied().chain(generated));
            self.remember(conversation);
        }
        Ok(Outcome {
            finish,
            prompt_tokens: cached_tokens + prompt.len() - known,
            cached_tokens,
            generation_tokens: summary.generation_tokens,
            guessed: (summary.drafted_tokens > 0)
                .then_some((summary.accepted_tokens, summary.drafted_tokens)),
            prompt_time: prepared + summary.prompt_time,
            generation_time: summary.generation_time,
            peak_memory_bytes: summary.peak_memory.0,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::interrupts::Interrupts;
    use mlxnode_checkpoint::{Config, SafetensorsWriter, TensorDtype, architectures};
    use mlxnode_compute::{LayerRange, Penalty, Sampling};

    fn demo() -> PathBuf {
        Path::new(env!("CARGO_MANIFEST_DIR")).join("../hub/demo-model/model")
    }

    fn open(folder: &Path, cache: CacheOptions, memory: MemoryOptions) -> LocalModel {
        // Small steps, so that prompts are cut at many places.
        let options = LocalOptions {
            prefill_step: 8,
            cache,
            guesses: Guesses::Never,
            adapter: AdapterFlag::default(),
            memory,
        };
        LocalModel::load(folder, options, true).unwrap()
    }

    /// A family's small model with weights that look random and the demo model's tokenizer.
    fn random(family: &str) -> tempfile::TempDir {
        let folder = tempfile::tempdir().unwrap();
        for file in ["tokenizer.json", "tokenizer_config.json"] {
            std::fs::copy(demo().join(file), folder.path().join(file)).unwrap();
        }
        let cases = format!("{}/../parity/cases/{family}.json", env!("CARGO_MANIFEST_DIR"));
        let cases: serde_json::Value = serde_json::from_slice(&std::fs::read(cases).unwrap()).unwrap();
        let mut config = cases["base"].clone();
        config["vocab_size"] = 512.into();
        let config = config.to_string();
        std::fs::write(folder.path().join("config.json"), &config).unwrap();
        let spec = architectures::spec(&Config::from_json(config.as_bytes()).unwrap()).unwrap();
        let mut state = 1_u64;
        let mut writer = SafetensorsWriter::new();
        for module in spec.modules(LayerRange::new(0, spec.layer_count())) {
            for tensor in module.tensors(None).unwrap() {
                let width = *tensor.shape.last().unwrap_or(&1) as f32;
                let (scale, offset) =
                    if tensor.shape.len() == 1 { (0.2, 1.0) } else { (2.5 / width.sqrt(), 0.0) };
                let mut bytes = Vec::new();
                for _ in 0..tensor.shape.iter().product::<usize>() {
                    state =
                        state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
                    let unit = (state >> 40) as f32 / (1_u64 << 23) as f32 - 1.0;
                    bytes.extend((offset + scale * unit).to_le_bytes());
                }
                writer.add(&tensor.name, TensorDtype::F32, &tensor.shape, bytes).unwrap();
            }
        }
        writer.write(&folder.path().join("model.safetensors")).unwrap();
        folder
    }

    /// The tokens of every answer of a conversation, and how many tokens of each prompt were remembered.
    fn talk(model: &mut LocalModel, sampling: &Sampling, interrupts: &Interrupts) -> Vec<(Vec<u32>, usize)> {
        let mut messages = Vec::new();
        let mut answers = Vec::new();
        // The last turn is a new conversation with the same beginning.
        for (turn, words) in
            ["What is 2 + 3?", "And 17 + 25?", "Sort 31, 4, 15", "What is 2 + 9?"].into_iter().enumerate()
        {
            if turn == 3 {
                messages.clear();
            }
            messages.push(Message::new("user", words));
            let chat = ChatRequest {
                messages: messages.clone(),
                add_generation_prompt: true,
                ..ChatRequest::default()
            };
            let request = Request {
                input: Input::Chat(Box::new(chat)),
                sampling: sampling.clone(),
                max_tokens: Some(12),
                stop: Vec::new(),
                extra_eos: Vec::new(),
                shape: Shape::default(),
            };
            let (mut text, mut tokens) = (String::new(), Vec::new());
            let outcome = model
                .generate(&request, &interrupts.answer(), &mut |piece| {
                    text.push_str(&piece.text);
                    tokens.extend(piece.tokens.iter().map(|sampled| sampled.token));
                    Ok(())
                })
                .unwrap();
            messages.push(Message::new("assistant", text));
            answers.push((tokens, outcome.cached_tokens));
        }
        answers
    }

    #[test]
    fn a_conversation_is_processed_once_and_answered_the_same() {
        let interrupts = Interrupts::listen().unwrap();
        let plain = CacheOptions::default();
        let penalty = |context| Some(Penalty { strength: 1.3, context });
        let drawn = Sampling { temperature: 1.0, seed: 7, top_p: 1.0, ..Sampling::default() };
        for (name, cache, sampling, remembers) in [
            ("greedy", plain, Sampling::default(), true),
            ("drawn", plain, drawn.clone(), true),
            ("penalties", plain, Sampling { repetition: penalty(6), ..drawn.clone() }, true),
            ("penalties of all", plain, Sampling { presence: penalty(0), ..drawn }, false),
            ("limited", CacheOptions { max_kv_size: Some(400), ..plain }, Sampling::default(), true),
        ] {
            let fresh = talk(&mut open(&demo(), cache, MemoryOptions::Nothing), &sampling, &interrupts);
            let again = talk(&mut open(&demo(), cache, MemoryOptions::Conversation), &sampling, &interrupts);
            for (turn, ((expected, none), (found, cached))) in fresh.iter().zip(&again).enumerate() {
                assert_eq!((found, *none), (expected, 0), "{name}, turn {turn}");
                let is_known = remembers && (1..3).contains(&turn);
                assert!(*cached > 5 || !is_known, "{name}, turn {turn}: {cached}");
            }
        }
    }

    /// Recurrent states and windows cannot be cut back: such a model returns to the end of the last message.
    #[test]
    fn models_that_cannot_forget_return_to_the_last_message() {
        let interrupts = Interrupts::listen().unwrap();
        let drawn = Sampling { temperature: 1.0, seed: 7, top_p: 1.0, ..Sampling::default() };
        for family in ["lfm2", "mamba2", "gemma3_text"] {
            let folder = random(family);
            let cache = CacheOptions::default();
            let fresh = talk(&mut open(folder.path(), cache, MemoryOptions::Nothing), &drawn, &interrupts);
            let again =
                talk(&mut open(folder.path(), cache, MemoryOptions::Conversation), &drawn, &interrupts);
            for (turn, ((expected, _), (found, cached))) in fresh.iter().zip(&again).enumerate() {
                assert_eq!(found, expected, "{family}, turn {turn}");
                assert!(*cached > 5 || !(1..3).contains(&turn), "{family}, turn {turn}: {cached}");
            }
        }
    }
}
