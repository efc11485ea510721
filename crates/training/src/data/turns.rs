//! Where the answers of a conversation are among its tokens.
//!
//! Templates are programs, so nobody says where in their output a message went. It is found by rendering beginnings of the conversation:
//! what the template writes when it opens an answer ends where the answer begins. Some templates write earlier turns in another way
//! than the last one (they drop its reasoning); there an answer's end is found by rendering it with a word more: everything behind that
//! word is in both.

use super::encoder::{Conversation, Encoder};
use mlxnode_text::{Message, TextError};
use serde_json::Value;
use std::ops::Range;

/// Why it cannot be told.
pub(super) enum Problem {
    Text(TextError),
    /// For people.
    Unclear(String),
}

impl From<TextError> for Problem {
    fn from(error: TextError) -> Self {
        Self::Text(error)
    }
}

/// The positions of all answers in `tokens`, which are those of `text`, the whole conversation: from behind what opens an answer to what
/// ends it.
pub(super) fn answers(
    encoder: &Encoder,
    conversation: &Conversation<'_>,
    text: &str,
    tokens: &[u32],
) -> Result<Vec<Range<u32>>, Problem> {
    let messages = conversation.messages;
    let mut found: Vec<Range<u32>> = Vec::new();
    for (index, message) in messages.iter().enumerate() {
        if message.role != "assistant" {
            continue;
        }
        // Answers in a row are one: the template opens only the first.
        let is_begun = index > 0 && messages[index - 1].role == "assistant";
        let start = match (is_begun, found.last()) {
            (true, Some(last)) => last.end,
            _ => {
                let opened = encoder.render(conversation, index, true)?;
                begin(encoder, text, tokens, &opened)?.ok_or_else(|| unclear(index))?
            }
        };
        let end = end(encoder, conversation, index, text, tokens)?.ok_or_else(|| unclear(index))?;
        if start < end {
            found.push(start.max(1)..end);
        }
    }
    match found.is_empty() {
        true => Err(Problem::Unclear(
            "no message of it is an answer (\"assistant\"): nothing to learn".to_owned(),
        )),
        false => Ok(found),
    }
}

fn unclear(index: usize) -> Problem {
    Problem::Unclear(format!(
        "where message {index} lies in what the chat template writes cannot be told; take mask_turns: last or none"
    ))
}

/// How many tokens `opened` is, if the text begins with it.
fn begin(encoder: &Encoder, text: &str, tokens: &[u32], opened: &str) -> Result<Option<u32>, TextError> {
    // The last answer's text may begin with other spaces than an opened one ends with.
    let opened = if text.starts_with(opened) { opened } else { opened.trim_end() };
    if !text.starts_with(opened) {
        return Ok(None);
    }
    place(encoder, tokens, opened)
}

/// How many of `tokens` make up `beginning`, which their text begins with. A token may cross the border: it counts as behind it.
fn place(encoder: &Encoder, tokens: &[u32], beginning: &str) -> Result<Option<u32>, TextError> {
    let alone = encoder.tokenizer.encode(beginning, false)?;
    let shared = alone.iter().zip(tokens).take_while(|(one, other)| one == other).count();
    let is_near = shared + 2 >= alone.len();
    Ok(is_near.then_some(u32::try_from(shared).unwrap_or(u32::MAX)))
}

/// The position behind the answer and what ends it.
fn end(
    encoder: &Encoder,
    conversation: &Conversation<'_>,
    index: usize,
    text: &str,
    tokens: &[u32],
) -> Result<Option<u32>, TextError> {
    if index + 1 == conversation.messages.len() {
        return Ok(u32::try_from(tokens.len()).ok());
    }
    let closed = encoder.render(conversation, index + 1, false)?;
    if text.starts_with(&closed) {
        return place(encoder, tokens, &closed);
    }
    let Some(longer) = with_a_word_more(conversation.messages, index) else { return Ok(None) };
    let conversation = Conversation { messages: &longer, tools: conversation.tools.clone() };
    let other = encoder.render(&conversation, longer.len(), false)?;
    let behind = text.bytes().rev().zip(other.bytes().rev()).take_while(|(one, other)| one == other).count();
    // Without a change in the output the word was dropped, and the place with it.
    let Some(before) = text.get(..text.len() - behind).filter(|_| behind < text.len() && other != text)
    else {
        return Ok(None);
    };
    let Some(place) = place(encoder, tokens, before)? else { return Ok(None) };
    let ends_there = tokens.get(place as usize).is_some_and(|token| encoder.tokenizer.is_special(*token));
    Ok(Some(place + u32::from(ends_there)))
}

/// The messages, with a word behind this one's content that it does not end with.
fn with_a_word_more(messages: &[Message], index: usize) -> Option<Vec<Message>> {
    const WORD: &str = "\u{203b}";
    let mut messages = messages.to_vec();
    let message = messages.get_mut(index)?;
    match &mut message.content {
        Some(Value::String(content)) if !content.contains(WORD) => content.push_str(WORD),
        _ => return None,
    }
    Some(messages)
}
