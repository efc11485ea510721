//! What stands behind the `?` of a request, taken out word by word: what is left at the end is unknown, and that is an error too.

use crate::fields::shortened;
use crate::http::{ApiError, ErrorKind};
use axum::extract::FromRequestParts;
use axum::http::request::Parts;
use serde_json::{Value, json};
use std::collections::BTreeMap;

/// Most words of a query.
const MAX_WORDS: usize = 32;

/// The words of a query.
#[derive(Debug)]
pub(super) struct Query {
    words: BTreeMap<String, String>,
}

impl<S: Sync> FromRequestParts<S> for Query {
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut Parts, _state: &S) -> Result<Self, ApiError> {
        Self::parse(parts.uri.query().unwrap_or_default())
    }
}

impl Query {
    fn parse(text: &str) -> Result<Self, ApiError> {
        let mut words = BTreeMap::new();
        for (name, value) in form_urlencoded::parse(text.as_bytes()) {
            let name = shortened(&name);
            if words.len() == MAX_WORDS {
                let message = format!("the query has more than {MAX_WORDS} words");
                return Err(ApiError::new(ErrorKind::Invalid, message));
            }
            if words.insert(name.clone(), value.into_owned()).is_some() {
                return Err(ApiError::field(name.clone(), format!("{name} stands twice in the query")));
            }
        }
        Ok(Self { words })
    }

    pub(super) fn take(&mut self, name: &str) -> Option<String> {
        self.words.remove(name)
    }

    /// Nothing may be left.
    pub(super) fn finish(self) -> Result<(), ApiError> {
        match self.words.into_keys().next() {
            None => Ok(()),
            Some(name) => {
                let message = format!("{name} is not served in this query; docs/http.md lists what is");
                Err(ApiError::field(name, message))
            }
        }
    }
}

/// Which part of a list is wanted.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Page {
    after: Option<String>,
    limit: usize,
}

impl Page {
    /// `after` and `limit` of a query.
    pub(super) fn of(query: &mut Query, usual: usize, most: usize) -> Result<Self, ApiError> {
        let limit = match query.take("limit").map(|limit| limit.parse::<usize>()) {
            None => usual,
            Some(Ok(limit)) if (1..=most).contains(&limit) => limit,
            Some(_) => return Err(ApiError::field("limit", format!("limit must be 1 to {most}"))),
        };
        Ok(Self { after: query.take("after"), limit })
    }

    /// The entries of the page, and whether more follow.
    pub(super) fn cut<T>(&self, all: Vec<T>, id: impl Fn(&T) -> &str) -> Result<(Vec<T>, bool), ApiError> {
        let begin = match &self.after {
            None => 0,
            Some(after) => {
                let place = all.iter().position(|entry| id(entry) == after.as_str());
                let unknown = || {
                    let shown = shortened(after);
                    ApiError::field(
                        "after",
                        format!("after is {shown:?}, but nothing in the list is called so"),
                    )
                };
                place.ok_or_else(unknown)? + 1
            }
        };
        let more = all.len() - begin > self.limit;
        Ok((all.into_iter().skip(begin).take(self.limit).collect(), more))
    }
}

/// A list as OpenAI writes it.
pub(super) fn listing(data: Vec<Value>, has_more: bool) -> Value {
    let id = |entry: Option<&Value>| entry.map_or(Value::Null, |entry| entry["id"].clone());
    let (first, last) = (id(data.first()), id(data.last()));
    json!({"object": "list", "data": data, "first_id": first, "last_id": last, "has_more": has_more})
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_query_is_read_to_its_end() {
        let mut query = Query::parse("limit=2&after=a%20b").unwrap();
        let page = Page::of(&mut query, 20, 100).unwrap();
        assert_eq!(page, Page { after: Some("a b".into()), limit: 2 });
        query.finish().unwrap();
        for (text, words) in [
            ("limit=0", "limit must be 1 to 100"),
            ("limit=x", "limit must be"),
            ("limit=1&limit=2", "limit stands twice"),
            ("typo=1", "typo is not served"),
        ] {
            let read = Query::parse(text).and_then(|mut query| {
                Page::of(&mut query, 20, 100)?;
                query.finish()
            });
            assert!(read.unwrap_err().message.starts_with(words), "{text}");
        }
        let many: String = (0..40).map(|number| format!("{number}=&")).collect();
        assert!(Query::parse(&many).is_err());
    }

    #[test]
    fn pages_go_on_after_the_last() {
        let all = || ["a", "b", "c", "d", "e"].map(str::to_owned).to_vec();
        let cut = |after: Option<&str>, limit| {
            let page = Page { after: after.map(str::to_owned), limit };
            page.cut(all(), |entry| entry)
                .map(|(data, more)| (data.concat(), more))
                .map_err(|error| error.message)
        };
        assert_eq!(cut(None, 2), Ok(("ab".into(), true)));
        assert_eq!(cut(Some("b"), 3), Ok(("cde".into(), false)));
        assert_eq!(cut(Some("e"), 3), Ok((String::new(), false)));
        assert!(cut(Some("x"), 3).is_err());
    }
}
