//! Text to token ids and back, by the model's tokenizer.json or, without one, by the vocabulary that it comes with.

use std::{
    collections::{BTreeSet, HashSet},
    panic::{AssertUnwindSafe, catch_unwind},
    sync::{Arc, OnceLock},
};

use tokenizers::{
    AddedToken, DecoderWrapper, ModelWrapper, NormalizerWrapper,
    decoders::{byte_fallback::ByteFallback, fuse::Fuse, sequence::Sequence, strip::Strip},
    normalizers::replace::Replace,
    pre_tokenizers::metaspace::{Metaspace, PrependScheme},
};

use crate::{
    Sandbox, SandboxError, StreamingDetokenizer, TextError, TextFiles, conversion,
    detokenizer::{self, DecoderKind, decoder_kind},
    limits::{self, MAX_VOCABULARY},
    special::{LlamaSpaces, SpecialTokens},
};

/// Text to token ids and back. Cheap to clone, usable from many threads.
#[derive(Clone)]
pub struct Tokenizer {
    shared: Arc<Shared>,
    eos: Arc<BTreeSet<u32>>,
}

struct Shared {
    backend: tokenizers::Tokenizer,
    special: SpecialTokens,
    bos: Option<(String, u32)>,
    decoder: DecoderKind,
    clean_up_spaces: bool,
    /// The same without added tokens; made when the first user writes one of them.
    words: OnceLock<tokenizers::Tokenizer>,
    /// Whether decoding drops the space of " ,": asked once, and only by the naive detokenizer.
    drops_spaces: OnceLock<bool>,
}

impl std::fmt::Debug for Tokenizer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Tokenizer")
            .field("vocabulary", &self.vocabulary_size())
            .field("eos", &self.eos)
            .finish()
    }
}

impl Tokenizer {
    /// Builds the tokenizer from tokenizer.json and what the files beside it say about special tokens; without a
    /// tokenizer.json from tokenizer.model (sentencepiece or tiktoken), tiktoken.model or qwen.tiktoken.
    pub fn from_files(files: &TextFiles) -> Result<Self, TextError> {
        let mut special = SpecialTokens::from_files(files)?;
        let (backend, file) = guarded(|| match files.get("tokenizer.json") {
            Some(json) => Ok((build(json, &special)?, "tokenizer.json")),
            None => conversion::build(files, &mut special),
        })?;
        let vocabulary = backend.get_vocab_size(true);
        if vocabulary == 0 || vocabulary > MAX_VOCABULARY {
            return Err(TextError::InvalidFile {
                file: file.to_owned(),
                reason: format!("it has {vocabulary} tokens, but must have 1 to {MAX_VOCABULARY}"),
            });
        }

        let id_of =
            |key| special.text(key).and_then(|text| Some((text.to_owned(), backend.token_to_id(text)?)));
        let bos = id_of("bos_token");
        let mut eos: BTreeSet<u32> = special.eos_ids.iter().copied().collect();
        eos.extend(id_of("eos_token").map(|(_, id)| id));

        // Hugging Face ignores the wish to tidy spaces for BPE, because it would eat real ones.
        let is_bpe = matches!(backend.get_model(), ModelWrapper::BPE(_));
        let clean_up_spaces = special.clean_up_spaces && (!is_bpe || special.clean_up_spaces_for_bpe);
        let decoder = match clean_up_spaces {
            true => DecoderKind::Naive, // only it tidies
            false => decoder_kind(backend.get_decoder()),
        };
        let shared = Shared {
            backend,
            special,
            bos,
            decoder,
            clean_up_spaces,
            drops_spaces: OnceLock::new(),
            words: OnceLock::new(),
        };
        Ok(Self { shared: Arc::new(shared), eos: Arc::new(eos) })
    }

    /// The same from files that may be hostile: they are tried in the sandbox first, which costs as much time again.
    ///
    /// # Errors
    /// As [`Tokenizer::from_files`], and [`TextError::TokenizerCost`] when the files ask for more than honest ones.
    pub fn from_untrusted_files(files: &TextFiles, sandbox: &dyn Sandbox) -> Result<Self, TextError> {
        let too_much = |limit: String| Err(TextError::TokenizerCost { limit });
        match sandbox.try_tokenizer(files) {
            Ok(()) => Self::from_files(files),
            Err(SandboxError::Memory { mebibytes }) => too_much(format!("{mebibytes} MiB of memory")),
            Err(SandboxError::Work) => too_much("the time that it may take".to_owned()),
            Err(SandboxError::Busy) => Err(TextError::SandboxBusy),
            Err(error) => Err(TextError::Sandbox { reason: error.to_string() }),
        }
    }

    /// Number of tokens, added ones included. The model's own vocabulary may be padded beyond it.
    pub fn vocabulary_size(&self) -> usize {
        self.shared.backend.get_vocab_size(true)
    }

    /// Token ids of `text`; `add_special_tokens` lets the tokenizer add its own bos or eos.
    pub fn encode(&self, text: &str, add_special_tokens: bool) -> Result<Vec<u32>, TextError> {
        guarded(|| {
            let backend = &self.shared.backend;
            let encoding = match self.shared.special.newline_marks {
                true => backend.encode_fast(detokenizer::marked(text), add_special_tokens),
                false => backend.encode_fast(text, add_special_tokens),
            };
            Ok(encoding.map_err(failed)?.get_ids().to_vec())
        })
    }

    /// Token ids of a prompt whose origin is unknown: special tokens are added unless it starts with bos already.
    pub fn encode_prompt(&self, text: &str) -> Result<Vec<u32>, TextError> {
        let has_bos = self.bos_token().is_some_and(|bos| text.starts_with(bos));
        self.encode(text, !has_bos)
    }

    /// Text of `ids`; ids that no token has are left out.
    pub fn decode(&self, ids: &[u32], skip_special_tokens: bool) -> Result<String, TextError> {
        let text = self.decode_marked(ids, skip_special_tokens)?;
        Ok(if self.shared.special.newline_marks { detokenizer::unmarked(&text) } else { text })
    }

    /// The same, before marks become line breaks.
    pub(crate) fn decode_marked(&self, ids: &[u32], skip_special_tokens: bool) -> Result<String, TextError> {
        let text = guarded(|| self.shared.backend.decode(ids, skip_special_tokens).map_err(failed))?;
        Ok(if self.shared.clean_up_spaces { clean_up(&text) } else { text })
    }

    /// A fresh detokenizer for one sequence.
    pub fn detokenizer(&self) -> StreamingDetokenizer {
        StreamingDetokenizer::new(self.clone(), self.shared.decoder, self.shared.special.newline_marks)
    }

    /// Tokens that end a sequence: those of the configuration together with the tokenizer's own.
    pub fn eos_tokens(&self) -> &BTreeSet<u32> {
        &self.eos
    }

    /// The tokenizer's own token that ends a text, if it names one.
    pub fn eos_token_id(&self) -> Option<u32> {
        self.token_to_id(self.shared.special.text("eos_token")?)
    }

    /// The same tokenizer with more tokens that end a sequence, each a token id or the text of a token.
    pub fn with_extra_eos_tokens<S: AsRef<str>>(&self, tokens: &[S]) -> Result<Self, TextError> {
        let mut eos = BTreeSet::clone(&self.eos);
        for token in tokens {
            eos.insert(self.parse_token(token.as_ref())?);
        }
        Ok(Self { shared: self.shared.clone(), eos: Arc::new(eos) })
    }

    /// A token given by a person: its id as a number, or its text.
    pub fn parse_token(&self, token: &str) -> Result<u32, TextError> {
        let by_id = token.trim().parse::<u32>().ok();
        by_id
            .or_else(|| self.token_to_id(token))
            .ok_or_else(|| TextError::UnknownToken { token: token.to_owned() })
    }

    /// Id of the token with exactly this text.
    pub fn token_to_id(&self, token: &str) -> Option<u32> {
        self.shared.backend.token_to_id(token)
    }

    /// The token as it stands in the vocabulary (not decoded).
    pub fn id_to_token(&self, id: u32) -> Option<String> {
        self.shared.backend.id_to_token(id)
    }

    /// Text of the token that begins a sequence.
    pub fn bos_token(&self) -> Option<&str> {
        self.shared.bos.as_ref().map(|(text, _)| text.as_str())
    }

    /// Id of the token that begins a sequence.
    pub fn bos_token_id(&self) -> Option<u32> {
        self.shared.bos.as_ref().map(|(_, id)| *id)
    }

    /// Tokens that XTC must never drop: what a newline encodes to, and the ends of sequence (mlx-lm's rule).
    pub fn xtc_special_tokens(&self) -> Result<Vec<u32>, TextError> {
        let mut tokens = self.encode("\n", true)?;
        tokens.extend(self.eos.iter());
        Ok(tokens)
    }

    /// The model marks its reasoning with tokens of its vocabulary, so templates get `enable_thinking` by default.
    pub fn has_thinking(&self) -> bool {
        crate::reasoning::has_thinking(self)
    }

    /// Token ids of text in which nothing is an added token: a `<|im_end|>` in it is ten letters.
    pub(crate) fn encode_words(&self, text: &str) -> Result<Vec<u32>, TextError> {
        let words = self.shared.words.get_or_init(|| {
            let backend = &self.shared.backend;
            let mut words = tokenizers::Tokenizer::new(backend.get_model().clone());
            // The parts were accepted in this combination already.
            let _ = words.with_normalizer(backend.get_normalizer().cloned());
            words.with_pre_tokenizer(backend.get_pre_tokenizer().cloned());
            words
        });
        guarded(|| {
            let encoding = match self.shared.special.newline_marks {
                true => words.encode_fast(detokenizer::marked(text), false),
                false => words.encode_fast(text, false),
            };
            Ok(encoding.map_err(failed)?.get_ids().to_vec())
        })
    }

    /// Texts of the added tokens, and whether each is special.
    pub(crate) fn added_tokens(&self) -> impl Iterator<Item = (String, bool)> {
        self.shared
            .backend
            .get_added_tokens_decoder()
            .into_values()
            .map(|token| (token.content, token.special))
    }

    pub(crate) fn special(&self) -> &SpecialTokens {
        &self.shared.special
    }

    /// Whether decoding "a ,b" loses the space.
    pub(crate) fn drops_spaces(&self) -> bool {
        *self.shared.drops_spaces.get_or_init(|| {
            let probe = self.encode("a ,b", false).and_then(|ids| self.decode(&ids, false));
            probe.is_ok_and(|text| !text.contains(" ,"))
        })
    }
}

fn build(json: &[u8], special: &SpecialTokens) -> Result<tokenizers::Tokenizer, TextError> {
    limits::check_json(json)?;
    let mut backend = tokenizers::Tokenizer::from_bytes(json).map_err(|error| TextError::InvalidFile {
        file: "tokenizer.json".to_owned(),
        reason: error.to_string(),
    })?;
    // A prompt is never cut or filled up in silence, whatever the file says.
    backend.with_truncation(None).map_err(failed)?;
    backend.with_padding(None);

    add_declared_tokens(&mut backend, special)?;

    if let Some(spaces) = special.llama
        && !is_byte_level(&backend)
        && matches!(backend.get_model(), ModelWrapper::BPE(_))
    {
        rebuild_as_llama(&mut backend, spaces)?;
    }
    Ok(backend)
}

/// What transformers does with a LlamaTokenizer; see [`LlamaSpaces`].
fn rebuild_as_llama(backend: &mut tokenizers::Tokenizer, spaces: LlamaSpaces) -> Result<(), TextError> {
    let scheme = match spaces {
        LlamaSpaces::First => PrependScheme::First,
        LlamaSpaces::Always => PrependScheme::Always,
        LlamaSpaces::Never => PrependScheme::Never,
    };
    backend.with_normalizer(None::<NormalizerWrapper>).map_err(failed)?;
    backend.with_pre_tokenizer(Some(Metaspace::new('▁', scheme, false)));
    let mut steps: Vec<DecoderWrapper> =
        vec![Replace::new("▁", " ").map_err(failed)?.into(), ByteFallback::new().into(), Fuse::new().into()];
    if spaces != LlamaSpaces::Never {
        steps.push(Strip::new(' ', 1, 0).into());
    }
    backend.with_decoder(Some(Sequence::new(steps)));
    Ok(())
}

/// A part anywhere in tokenizer.json that works on bytes, as Llama 3 has it.
fn is_byte_level(backend: &tokenizers::Tokenizer) -> bool {
    let named =
        |part: Option<serde_json::Value>| part.is_some_and(|part| part.to_string().contains("\"ByteLevel\""));
    named(backend.get_pre_tokenizer().and_then(|part| serde_json::to_value(part).ok()))
        || named(backend.get_decoder().and_then(|part| serde_json::to_value(part).ok()))
}

/// Tokens that only tokenizer_config.json lists, and special tokens that tokenizer.json has as plain ones.
fn add_declared_tokens(
    backend: &mut tokenizers::Tokenizer,
    special: &SpecialTokens,
) -> Result<(), TextError> {
    let known: HashSet<String> =
        backend.get_added_tokens_decoder().into_values().map(|token| token.content).collect();
    let mut tokens: Vec<AddedToken> = special
        .added
        .values()
        .filter(|token| !known.contains(&token.content) && !token.content.is_empty())
        .map(crate::special::AddedToken::to_library)
        .collect();
    for text in special.named.values().filter_map(|text| text.as_str()) {
        let listed = known.contains(text) || tokens.iter().any(|token| token.content == text);
        if !listed && backend.token_to_id(text).is_some() {
            tokens.push(AddedToken::from(text, true));
        }
    }
    if !tokens.is_empty() {
        backend.add_tokens(tokens).map_err(failed)?;
    }
    Ok(())
}

/// Runs the tokenizers library at the edge: it asserts where we want an error, on files that nobody honest writes.
fn guarded<T>(work: impl FnOnce() -> Result<T, TextError>) -> Result<T, TextError> {
    catch_unwind(AssertUnwindSafe(work)).unwrap_or_else(|_| {
        Err(TextError::Tokenizer { reason: "its files contradict themselves".to_owned() })
    })
}

pub(crate) fn failed(error: tokenizers::Error) -> TextError {
    TextError::Tokenizer { reason: error.to_string() }
}

/// Hugging Face's `clean_up_tokenization`: undoes the spaces that word tokenizers put around punctuation.
fn clean_up(text: &str) -> String {
    let replacements = [
        (" .", "."),
        (" ?", "?"),
        (" !", "!"),
        (" ,", ","),
        (" ' ", "'"),
        (" n't", "n't"),
        (" 'm", "'m"),
        (" 's", "'s"),
        (" 've", "'ve"),
        (" 're", "'re"),
    ];
    replacements.iter().fold(text.to_owned(), |text, (from, to)| text.replace(from, to))
}
