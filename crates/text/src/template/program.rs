//! A template that is compiled and can be carried out: text in, text out, in the process that calls.

use std::{io::Write, sync::Arc};

use minijinja::{Environment, Error, ErrorKind};

use super::{environment, json};
use crate::SandboxError;

/// The one template of an environment. Others are out of reach: transformers gives a template none either.
const NAME: &str = "chat template";
/// A template's own words in an error.
const LONGEST_REASON: usize = 4 << 10;

/// A compiled template. Cheap to clone.
#[derive(Clone, Debug)]
pub(crate) struct Program {
    source: Arc<str>,
    environment: Arc<Environment<'static>>,
}

impl Program {
    pub(crate) fn compile(source: &str) -> Result<Self, SandboxError> {
        let mut environment = environment::hugging_face();
        environment
            .add_template_owned(NAME, environment::without_generation_tags(source))
            .map_err(|error| sandbox_error(&error))?;
        Ok(Self { source: source.into(), environment: Arc::new(environment) })
    }

    /// The template's text.
    pub(crate) fn source(&self) -> &str {
        &self.source
    }

    /// Its text for these variables (a JSON object), of at most `most_bytes`.
    pub(crate) fn run(&self, variables: &str, most_bytes: usize) -> Result<String, SandboxError> {
        let variables = serde_json::from_str(variables).map_err(|error| SandboxError::Wrong {
            line: 0,
            reason: format!("the conversation cannot be read: {error}"),
        })?;
        let mut output = BoundedText { bytes: Vec::new(), limit: most_bytes };
        let rendered = self.environment.get_template(NAME).and_then(|template| {
            template.render_captured_to(json::to_template(&variables), &mut output).map(drop)
        });
        rendered.map_err(|error| sandbox_error(&error))?;
        Ok(String::from_utf8(output.bytes)
            .unwrap_or_else(|error| String::from_utf8_lossy(error.as_bytes()).into_owned()))
    }
}

/// An error of the template engine in our words.
fn sandbox_error(error: &Error) -> SandboxError {
    // A refusal may come out of a macro, wrapped once or more.
    let mut cause: Option<&dyn std::error::Error> = Some(error);
    while let Some(one) = cause {
        if let Some(refused) = one.downcast_ref::<environment::Refused>() {
            return SandboxError::Refused(shortened(&refused.0));
        }
        if one.downcast_ref::<std::io::Error>().is_some() {
            return SandboxError::Output;
        }
        if one.downcast_ref::<Error>().is_some_and(|inner| inner.kind() == ErrorKind::OutOfFuel) {
            return SandboxError::Work;
        }
        cause = one.source();
    }
    let reason = match error.detail() {
        Some(detail) => shortened(detail),
        None => error.kind().to_string(),
    };
    SandboxError::Wrong { line: error.line().unwrap_or(0) as u64, reason }
}

fn shortened(reason: &str) -> String {
    match reason.char_indices().map(|(at, _)| at).find(|at| *at >= LONGEST_REASON) {
        Some(end) => format!("{}…", &reason[..end]),
        None => reason.to_owned(),
    }
}

/// Collects output up to a limit.
struct BoundedText {
    bytes: Vec<u8>,
    limit: usize,
}

impl Write for BoundedText {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        if self.bytes.len() + bytes.len() > self.limit {
            return Err(std::io::Error::other("too much output"));
        }
        self.bytes.extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_template_cannot_reach_itself_or_another() {
        for source in ["{% include 'chat template' %}", "{% include 'default' %}", "{% extends 'x' %}"] {
            let rendered = Program::compile(source).and_then(|program| program.run("{}", 1 << 20));
            assert!(matches!(rendered, Err(SandboxError::Wrong { .. } | SandboxError::Work)), "{rendered:?}");
        }
    }

    #[test]
    fn a_long_refusal_is_cut() {
        let program = Program::compile("{{ raise_exception('é' * 10000) }}").unwrap();
        let Err(SandboxError::Refused(reason)) = program.run("{}", 1 << 20) else { panic!("not refused") };
        assert_eq!(reason.chars().count(), LONGEST_REASON / 2 + 1);
    }
}
