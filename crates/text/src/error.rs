//! What can be wrong with a model's text files or with a request for text.

use std::path::PathBuf;

/// Why text could not become tokens, or tokens text. Each says which file or which input, and what would help.
#[derive(Debug, thiserror::Error)]
pub enum TextError {
    /// A file that cannot be done without is not there.
    #[error("the model has no {file}; convert the model to a folder with a {file}, or choose another one")]
    MissingFile {
        /// Its name.
        file: &'static str,
    },
    /// The model's author reads a vocabulary with Python of their own, which is not run.
    #[error(
        "{file} is read by the model author's own code ({class}), which is not run; convert it to a tokenizer.json or \
         choose a conversion of the model that has one"
    )]
    OwnTokenizerCode {
        /// The vocabulary.
        file: String,
        /// The Python class.
        class: String,
    },
    /// A file is larger than any honest one.
    #[error("{file} has {bytes} bytes, more than the {limit} that are accepted")]
    FileTooLarge {
        /// Its name.
        file: String,
        /// Its size.
        bytes: u64,
        /// The most that is read.
        limit: u64,
    },
    /// A name that is none of a model's text files.
    #[error("{file:?} is not one of a model's text files")]
    UnknownFile {
        /// The name.
        file: String,
    },
    /// The system could not read a file.
    #[error("cannot read {}", path.display())]
    Read {
        /// Which.
        path: PathBuf,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// A file is not the JSON it should be.
    #[error("{file} is not valid: {reason}; download it again")]
    InvalidFile {
        /// Its name.
        file: String,
        /// What is wrong, with line and column where known.
        reason: String,
    },
    /// The tokenizer's own rules cannot be built or carried out.
    #[error("the tokenizer failed: {reason}")]
    Tokenizer {
        /// What it said.
        reason: String,
    },
    /// A token that the vocabulary does not have.
    #[error("{token:?} is neither a token of this model nor a token id")]
    UnknownToken {
        /// As it was given.
        token: String,
    },
    /// The model comes without a chat template.
    #[error("the model has no chat template; use --ignore-chat-template to send the prompt as it is")]
    NoChatTemplate,
    /// Several templates, none of them for this use.
    #[error("the model has several chat templates ({}) but none named \"default\"", names.join(", "))]
    NoDefaultTemplate {
        /// What it has.
        names: Vec<String>,
    },
    /// A template that cannot be compiled or carried out.
    #[error("{file}, line {line}: {reason}")]
    Template {
        /// Where the template was found.
        file: String,
        /// Line within the template, from 1; 0 where unknown.
        line: usize,
        /// What is wrong.
        reason: String,
    },
    /// The template itself says that it does not want this conversation.
    #[error("the model's chat template refuses the conversation: {reason}")]
    Refused {
        /// The template's words.
        reason: String,
    },
    /// A template ran too long.
    #[error(
        "{file} does more work than a chat template may; it loops without end or the conversation is too long"
    )]
    TemplateTooSlow {
        /// Where the template was found.
        file: String,
    },
    /// A template wrote too much.
    #[error("{file} wrote more than the {limit} bytes that this conversation allows")]
    TemplateOutput {
        /// Where the template was found.
        file: String,
        /// The most it may write.
        limit: usize,
    },
    /// A template asked for more memory than it may have.
    #[error(
        "the model's chat template ({file}) asked for more than {mebibytes} MiB of memory; no honest one does: choose another \
         conversion of the model"
    )]
    TemplateMemory {
        /// Where the template was found.
        file: String,
        /// What it may have.
        mebibytes: u64,
    },
    /// As much work waits for the sandbox as may.
    #[error("too many conversations wait for their chat template; try again in a moment")]
    SandboxBusy,
    /// The process in which strangers' files are tried and templates carried out does not work.
    #[error("there is no sandbox for the model's chat template and tokenizer: {reason}")]
    Sandbox {
        /// Why.
        reason: String,
    },
    /// A tokenizer's files asked for more than any honest ones.
    #[error(
        "loading the model's tokenizer takes more than {limit}; no honest one does: choose another conversion of the model"
    )]
    TokenizerCost {
        /// The memory or the time that it may have.
        limit: String,
    },
    /// A template argument with the name of something that the request sets by itself.
    #[error("the template argument {name:?} is set by the request itself; leave it out")]
    ReservedArgument {
        /// Its name.
        name: String,
    },
    /// Lists and objects of a conversation stand in each other too many times.
    #[error("the conversation is nested more than {limit} levels deep; flatten its arguments or tools")]
    TooNested {
        /// The most levels.
        limit: usize,
    },
    /// An answer cannot be continued under this template.
    #[error("the chat template does not let an answer be continued: {reason}")]
    Continuation {
        /// Why.
        reason: &'static str,
    },
    /// A stop string that cannot work.
    #[error("{reason}")]
    StopString {
        /// What is wrong and what would do.
        reason: String,
    },
}
