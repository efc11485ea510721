//! From records to tokens: which shape the rows have, what the chat template makes of them, and what counts in the loss.
//!
//! Shapes and rules are mlx-lm's (`tuner/datasets.py`): a pair of prompt and completion is a conversation of two messages, a
//! conversation goes through the chat template, a text gets the token that ends a text behind it. Pairs of answers to prefer are ours.

use super::records::Record;
use super::{DataError, Row, Sequence, turns};
use crate::config::{Features, Mask, TrainingConfig};
use mlxnode_text::{ChatRequest, ChatTemplate, Message, TextError, Tokenizer};
use serde_json::{Map, Value};

/// Makes rows of records.
#[derive(Clone, Debug)]
pub struct Encoder {
    pub(super) tokenizer: Tokenizer,
    template: Option<ChatTemplate>,
    mask: Mask,
    thinking: Option<bool>,
    is_preference: bool,
    pub(super) max_seq_length: usize,
}

/// What the rows of a set are; the first one decides.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Shape {
    Completions,
    Conversations,
    Texts,
    Preferences,
}

impl Shape {
    /// What the rows are, by the first of them.
    pub(super) fn of(
        first: &Record,
        features: &Features,
        mask: Mask,
        is_preference: bool,
    ) -> Result<Self, DataError> {
        let has = |field: &str| first.fields.contains_key(field);
        let wrong = |problem: String| DataError::Row { place: first.place.clone(), problem };
        if is_preference {
            return match has("chosen") && has("rejected") {
                true => Ok(Self::Preferences),
                false => Err(wrong(
                    "preference training needs \"chosen\" and \"rejected\" in each row, and mostly \"prompt\"".to_owned(),
                )),
            };
        }
        if has(&features.prompt) && has(&features.completion) {
            Ok(Self::Completions)
        } else if has(&features.chat) {
            Ok(Self::Conversations)
        } else if has(&features.text) {
            match mask {
                Mask::None => Ok(Self::Texts),
                _ => Err(wrong(
                    "rows of plain text have no prompt that could be masked: take mask_prompt and mask_turns out".to_owned(),
                )),
            }
        } else {
            let Features { prompt, completion, chat, text } = features;
            let found: Vec<&str> = first.fields.keys().take(8).map(String::as_str).collect();
            Err(wrong(format!(
                "a row needs {prompt:?} and {completion:?}, or {chat:?}, or {text:?}, but has {found:?}; other names can be given \
                 (prompt_feature, completion_feature, chat_feature, text_feature)"
            )))
        }
    }
}

/// What a record says, before any tokenizer.
pub(super) enum Content<'a> {
    Text(&'a str),
    Conversation { messages: Vec<Message>, tools: Option<Vec<Value>>, opens_answer: bool },
    Pair { before: Vec<Message>, chosen: Vec<Message>, rejected: Vec<Message>, tools: Option<Vec<Value>> },
}

impl<'a> Content<'a> {
    /// Of a record of this shape.
    pub(super) fn of(record: &'a Record, shape: Shape, features: &Features) -> Result<Self, DataError> {
        let fields = Fields(record);
        Ok(match shape {
            Shape::Texts => Self::Text(fields.words(&features.text)?),
            Shape::Completions => {
                let messages = vec![
                    fields.message("user", &features.prompt)?,
                    fields.message("assistant", &features.completion)?,
                ];
                Self::Conversation { messages, tools: fields.tools()?, opens_answer: true }
            }
            Shape::Conversations => {
                let messages = fields.messages(&features.chat)?;
                let opens_answer = messages.last().is_some_and(|last| last.role == "assistant");
                Self::Conversation { messages, tools: fields.tools()?, opens_answer }
            }
            Shape::Preferences => Self::pair(record, &features.prompt)?,
        })
    }

    /// A prompt with a better and a worse answer: texts, or messages; the prompt may also be what both conversations begin with.
    fn pair(record: &'a Record, prompt: &str) -> Result<Self, DataError> {
        let fields = Fields(record);
        let tools = fields.tools()?;
        let mut before = match record.fields.get(prompt) {
            None | Some(Value::Null) => Vec::new(),
            Some(Value::String(_)) => vec![fields.message("user", prompt)?],
            Some(_) => fields.messages(prompt)?,
        };
        let answer = |name: &str| match record.fields.get(name) {
            Some(Value::String(_)) => Ok(vec![fields.message("assistant", name)?]),
            _ => fields.messages(name),
        };
        let (mut chosen, mut rejected) = (answer("chosen")?, answer("rejected")?);
        if before.is_empty() {
            let shared = chosen.iter().zip(&rejected).take_while(|(one, other)| one == other).count();
            before.extend(chosen.drain(..shared));
            rejected.drain(..shared);
        }
        if before.is_empty() || chosen.is_empty() || rejected.is_empty() {
            return Err(fields.wrong(
                "there is no prompt: name one, or let \"chosen\" and \"rejected\" begin with the same messages and end with others"
                    .to_owned(),
            ));
        }
        Ok(Self::Pair { before, chosen, rejected, tools })
    }
}

/// A conversation and what its template is given beside it.
pub(super) struct Conversation<'a> {
    pub(super) messages: &'a [Message],
    pub(super) tools: Option<Vec<Value>>,
}

impl Encoder {
    /// With the base model's tokenizer and, if it has one, its chat template.
    pub fn new(tokenizer: Tokenizer, template: Option<ChatTemplate>, config: &TrainingConfig) -> Self {
        Self {
            tokenizer,
            template,
            mask: config.mask,
            thinking: config.thinking,
            is_preference: config.preference.is_some(),
            max_seq_length: config.max_seq_length,
        }
    }

    /// What the rows are, by the first of them.
    pub(super) fn shape(&self, first: &Record, features: &Features) -> Result<Shape, DataError> {
        Shape::of(first, features, self.mask, self.is_preference)
    }

    /// A record's tokens.
    pub(super) fn row(&self, record: &Record, shape: Shape, features: &Features) -> Result<Row, DataError> {
        Ok(match Content::of(record, shape, features)? {
            Content::Text(text) => Row::Single(self.text(record, text, &features.text)?),
            Content::Conversation { messages, tools, opens_answer } => {
                let conversation = Conversation { messages: &messages, tools };
                Row::Single(self.conversation(record, &conversation, opens_answer)?)
            }
            Content::Pair { before, chosen, rejected, tools } => {
                let sequence = |answer| self.answer(record, &before, answer, &tools);
                Row::Pair { chosen: sequence(chosen)?, rejected: sequence(rejected)? }
            }
        })
    }

    fn text(&self, record: &Record, text: &str, name: &str) -> Result<Sequence, DataError> {
        let fields = Fields(record);
        let encoded = self.tokenizer.encode(text, true);
        let mut tokens = encoded.map_err(|source| fields.unencoded(source))?;
        if tokens.is_empty() {
            return Err(fields.wrong(format!("{name:?} has no tokens")));
        }
        if let Some(end) = self.tokenizer.eos_token_id()
            && tokens.last() != Some(&end)
        {
            tokens.push(end);
        }
        Ok(counted_from(tokens, 0))
    }

    fn conversation(
        &self,
        record: &Record,
        conversation: &Conversation<'_>,
        opens_answer: bool,
    ) -> Result<Sequence, DataError> {
        let unencoded = |source| DataError::Encode { place: record.place.clone(), source };
        let text = self.render(conversation, conversation.messages.len(), false).map_err(unencoded)?;
        let tokens = self.tokenizer.encode(&text, false).map_err(unencoded)?;
        if tokens.is_empty() {
            let problem = "the chat template makes nothing of it".to_owned();
            return Err(DataError::Row { place: record.place.clone(), problem });
        }
        match self.mask {
            Mask::None => Ok(counted_from(tokens, 0)),
            Mask::LastTurn => {
                let before = conversation.messages.len() - 1;
                let prompt = self.render(conversation, before, opens_answer).map_err(unencoded)?;
                let offset = self.tokenizer.encode(&prompt, false).map_err(unencoded)?.len();
                Ok(counted_from(tokens, offset))
            }
            Mask::EveryTurn => {
                let counted = turns::answers(self, conversation, &text, &tokens);
                let counted = counted.map_err(|problem| match problem {
                    turns::Problem::Text(source) => unencoded(source),
                    turns::Problem::Unclear(problem) => {
                        DataError::Row { place: record.place.clone(), problem }
                    }
                })?;
                Ok(Sequence { tokens, counted })
            }
        }
    }

    /// One of two answers to what was before.
    fn answer(
        &self,
        record: &Record,
        before: &[Message],
        answer: Vec<Message>,
        tools: &Option<Vec<Value>>,
    ) -> Result<Sequence, DataError> {
        let messages: Vec<Message> = before.iter().cloned().chain(answer).collect();
        let conversation = Conversation { messages: &messages, tools: tools.clone() };
        let encoded = |count: usize, opens: bool| {
            let text = self.render(&conversation, count, opens)?;
            self.tokenizer.encode(&text, false)
        };
        let unencoded = |source| Fields(record).unencoded(source);
        let tokens = encoded(messages.len(), false).map_err(unencoded)?;
        let offset = encoded(before.len(), true).map_err(unencoded)?.len();
        Ok(counted_from(tokens, offset))
    }

    /// What the template makes of the first `count` messages.
    pub(super) fn render(
        &self,
        conversation: &Conversation<'_>,
        count: usize,
        opens_answer: bool,
    ) -> Result<String, TextError> {
        let template = self.template.as_ref().ok_or(TextError::NoChatTemplate)?;
        template.render(&ChatRequest {
            messages: conversation.messages.iter().take(count).cloned().collect(),
            tools: conversation.tools.clone(),
            add_generation_prompt: opens_answer,
            thinking: self.thinking,
            ..ChatRequest::default()
        })
    }
}

/// All tokens from a place on.
fn counted_from(tokens: Vec<u32>, offset: usize) -> Sequence {
    let length = u32::try_from(tokens.len()).unwrap_or(u32::MAX);
    let start = u32::try_from(offset).unwrap_or(u32::MAX).max(1);
    let counted = (start < length).then_some(start..length).into_iter().collect();
    Sequence { tokens, counted }
}

/// Reading a record's fields.
struct Fields<'a>(&'a Record);

impl<'a> Fields<'a> {
    fn wrong(&self, problem: String) -> DataError {
        DataError::Row { place: self.0.place.clone(), problem }
    }

    fn unencoded(&self, source: TextError) -> DataError {
        DataError::Encode { place: self.0.place.clone(), source }
    }

    fn get(&self, name: &str) -> Result<&'a Value, DataError> {
        let value = self.0.fields.get(name).filter(|value| !value.is_null());
        value.ok_or_else(|| self.wrong(format!("there is no {name:?}")))
    }

    fn words(&self, name: &str) -> Result<&'a str, DataError> {
        let text = self.get(name)?.as_str();
        let text = text.ok_or_else(|| self.wrong(format!("{name:?} is not a text")))?;
        match text.is_empty() {
            true => Err(self.wrong(format!("{name:?} is empty"))),
            false => Ok(text),
        }
    }

    /// A field's text as a message.
    fn message(&self, role: &str, name: &str) -> Result<Message, DataError> {
        Ok(Message::new(role, self.words(name)?))
    }

    /// A field's list of messages.
    fn messages(&self, name: &str) -> Result<Vec<Message>, DataError> {
        let value = self.get(name)?;
        let list =
            value.as_array().ok_or_else(|| self.wrong(format!("{name:?} is not a list of messages")))?;
        if list.is_empty() {
            return Err(self.wrong(format!("{name:?} is empty")));
        }
        let mut messages = Vec::with_capacity(list.len());
        for (index, message) in list.iter().enumerate() {
            let has_role = message.get("role").is_some_and(Value::is_string);
            let read = if has_role { serde_json::from_value(message.clone()).ok() } else { None };
            messages.push(read.ok_or_else(|| {
                self.wrong(format!(
                    "message {index} of {name:?} is not an object with a \"role\" and a \"content\""
                ))
            })?);
        }
        Ok(messages)
    }

    /// Descriptions of functions: a list, or the JSON of one, as tables have it that know no objects.
    fn tools(&self) -> Result<Option<Vec<Value>>, DataError> {
        let wrong = || self.wrong("\"tools\" is not a list of objects".to_owned());
        let list = match self.0.fields.get("tools") {
            None | Some(Value::Null) => return Ok(None),
            Some(Value::Array(list)) => list.clone(),
            Some(Value::String(text)) => serde_json::from_str(text).map_err(|_| wrong())?,
            Some(_) => return Err(wrong()),
        };
        if list.iter().all(Value::is_object) { Ok(Some(list)) } else { Err(wrong()) }
    }
}

/// How many fields a row has: what mlx-lm takes for its length.
pub(super) fn field_count(fields: &Map<String, Value>) -> usize {
    fields.len()
}
