//! The environment that transformers gives to chat templates, rebuilt on minijinja.

use std::fmt;

use chrono::{
    Local,
    format::{Item, StrftimeItems},
};
use minijinja::{
    AutoEscape, Environment, Error, ErrorKind, UndefinedBehavior, Value, syntax::SyntaxConfig,
    value::ValueKind,
};

use super::{json, python};

/// A million instructions: the longest honest conversations need some ten thousand, and a loop without end stops after
/// about 30 ms.
const FUEL: u64 = 1_000_000;

/// What a template said with `raise_exception`.
#[derive(Debug)]
pub(super) struct Refused(pub(super) String);

impl fmt::Display for Refused {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for Refused {}

/// Block trimming, loop controls, Python's methods and printing, `tojson` without HTML escapes, `raise_exception`,
/// `strftime_now`. Not there, on purpose: `format` (a width of a billion costs a gigabyte), `debug`, other templates.
pub(super) fn hugging_face() -> Environment<'static> {
    let mut environment = Environment::new();
    let syntax = SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build();
    environment.set_syntax(syntax.expect("the usual delimiters are valid"));
    environment.set_fuel(Some(FUEL));
    environment.set_undefined_behavior(UndefinedBehavior::Lenient);
    environment.set_auto_escape_callback(|_| AutoEscape::None);
    environment.set_unknown_method_callback(python::method);

    environment.remove_filter("format");
    environment.remove_filter("pprint");
    environment.remove_global("debug");

    environment.add_filter("tojson", json::tojson);
    environment.add_test("sequence", |value: &Value| {
        // In Python whatever has a length and can be indexed.
        let kinds = [ValueKind::Seq, ValueKind::String, ValueKind::Map, ValueKind::Undefined];
        kinds.contains(&value.kind())
    });
    environment
        .add_test("iterable", |value: &Value| value.kind() == ValueKind::String || value.try_iter().is_ok());
    environment.add_test("callable", |value: &Value| value.kind() == ValueKind::Plain);
    environment.add_function("raise_exception", |message: String| -> Result<Value, Error> {
        Err(Error::new(ErrorKind::InvalidOperation, "raise_exception").with_source(Refused(message)))
    });
    environment.add_function("strftime_now", |format: &str| strftime_now(format));
    environment
}

/// The local time in the C library's notation; what it does not know stays as it is.
fn strftime_now(format: &str) -> Result<String, Error> {
    const LONGEST: usize = 256;
    if format.len() > LONGEST {
        return Err(Error::new(ErrorKind::InvalidOperation, "the format of strftime_now is too long"));
    }
    let items: Vec<Item<'_>> = StrftimeItems::new(format).collect();
    if items.contains(&Item::Error) {
        return Ok(format.to_owned());
    }
    Ok(Local::now().format_with_items(items.into_iter()).to_string())
}

/// Training frameworks mark the assistant's words with `{% generation %}`; for rendering it is a plain scope.
///
/// minijinja knows no custom tags, so the two words are replaced by `with` and `endwith`, which keep the trimming and
/// the line numbers as they are.
pub(super) fn without_generation_tags(source: &str) -> String {
    let mut result = String::with_capacity(source.len());
    let mut rest = source;
    while let Some(start) = rest.find("{%") {
        let (before, tag) = rest.split_at(start);
        result.push_str(before);
        let inner = tag[2..].trim_start_matches(['-', '+']);
        let word_at = tag.len() - inner.trim_start().len();
        let word = inner.trim_start();
        let name: String = word.chars().take_while(|c| c.is_alphanumeric() || *c == '_').collect();
        let closes = word[name.len()..].trim_start().trim_start_matches(['-', '+']).starts_with("%}");
        let replacement = match name.as_str() {
            "generation" if closes => "with",
            "endgeneration" if closes => "endwith",
            _ => {
                result.push_str("{%");
                rest = &tag[2..];
                continue;
            }
        };
        result.push_str(&tag[..word_at]);
        result.push_str(replacement);
        rest = &word[name.len()..];
    }
    result.push_str(rest);
    result
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn generation_tags_become_scopes() {
        assert_eq!(
            without_generation_tags("a{%- generation -%}b{% endgeneration %}{% if generation %}c{% endif %}"),
            "a{%- with -%}b{% endwith %}{% if generation %}c{% endif %}"
        );
        assert_eq!(without_generation_tags("{% generation"), "{% generation");
        assert_eq!(without_generation_tags("{%"), "{%");
        assert_eq!(without_generation_tags("{% set generation = 1 %}"), "{% set generation = 1 %}");
    }

    #[test]
    fn time_is_written_as_the_c_library_does() {
        let today = Local::now();
        assert_eq!(strftime_now("%Y").unwrap(), today.format("%Y").to_string());
        assert_eq!(strftime_now("100%!").unwrap(), "100%!");
        assert!(strftime_now(&"%Y".repeat(200)).is_err());
    }
}
