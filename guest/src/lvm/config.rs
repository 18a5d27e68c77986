//! The text of LVM2 metadata: sections in braces, with numbers, strings and lists of them.

use std::collections::BTreeMap;

use crate::error::{Error, Result};

/// Sections inside sections.
const NESTING_MAX: usize = 8;
/// Names, values and braces of one text.
const TOKENS_MAX: usize = 2_000_000;

/// A value.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Value {
    /// A number.
    Number(i64),
    /// A string.
    Text(String),
    /// A list of numbers and strings.
    List(Vec<Value>),
    /// A section.
    Section(Section),
}

/// A section: values by name.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Section(pub(super) BTreeMap<String, Value>);

impl Section {
    pub(super) fn section(&self, name: &str) -> Option<&Section> {
        match self.0.get(name) {
            Some(Value::Section(section)) => Some(section),
            _ => None,
        }
    }

    /// The sections in a section of that name; none where it is missing.
    pub(super) fn sections(&self, name: &str) -> impl Iterator<Item = (&String, &Section)> {
        let within = self.section(name).into_iter().flat_map(|section| &section.0);
        within.filter_map(|(name, value)| match value {
            Value::Section(section) => Some((name, section)),
            _ => None,
        })
    }

    pub(super) fn text(&self, name: &str) -> Option<&str> {
        match self.0.get(name) {
            Some(Value::Text(text)) => Some(text),
            _ => None,
        }
    }

    pub(super) fn number(&self, name: &str) -> Option<u64> {
        match self.0.get(name) {
            Some(Value::Number(number)) => u64::try_from(*number).ok(),
            _ => None,
        }
    }

    pub(super) fn list(&self, name: &str) -> &[Value] {
        match self.0.get(name) {
            Some(Value::List(list)) => list,
            _ => &[],
        }
    }
}

#[derive(Debug, PartialEq, Eq)]
enum Token<'a> {
    Name(&'a str),
    Text(String),
    Sign(u8),
}

struct Tokens<'a> {
    text: &'a str,
    at: usize,
    count: usize,
}

impl<'a> Tokens<'a> {
    fn bad(&self, what: &str) -> Error {
        Error::corrupt(format!("LVM metadata, byte {}: {what}", self.at))
    }

    fn peek_byte(&self) -> Option<u8> {
        self.text.as_bytes().get(self.at).copied()
    }

    fn skip_blanks(&mut self) {
        while let Some(byte) = self.peek_byte() {
            if byte == b'#' {
                while self.peek_byte().is_some_and(|byte| byte != b'\n') {
                    self.at += 1;
                }
            } else if byte.is_ascii_whitespace() || byte == 0 {
                self.at += 1;
            } else {
                break;
            }
        }
    }

    fn next(&mut self) -> Result<Option<Token<'a>>> {
        self.skip_blanks();
        self.count += 1;
        if self.count > TOKENS_MAX {
            return Err(Error::limit(format!("LVM metadata of more than {TOKENS_MAX} words")));
        }
        let Some(byte) = self.peek_byte() else { return Ok(None) };
        if b"{}[]=,".contains(&byte) {
            self.at += 1;
            return Ok(Some(Token::Sign(byte)));
        }
        if byte == b'"' {
            return self.string().map(Some);
        }
        let start = self.at;
        let of_name = |b: u8| b.is_ascii_alphanumeric() || b"_-+.@/".contains(&b);
        while self.peek_byte().is_some_and(of_name) {
            self.at += 1;
        }
        match self.text.get(start..self.at) {
            Some(name) if !name.is_empty() => Ok(Some(Token::Name(name))),
            _ => Err(self.bad("a word was expected")),
        }
    }

    fn string(&mut self) -> Result<Token<'a>> {
        let mut bytes = Vec::new();
        self.at += 1;
        loop {
            let byte = self.peek_byte().ok_or_else(|| self.bad("a string without an end"))?;
            self.at += 1;
            match byte {
                b'"' => break,
                b'\\' => {
                    bytes.extend(self.peek_byte());
                    self.at += 1;
                }
                _ => bytes.push(byte),
            }
        }
        Ok(Token::Text(String::from_utf8_lossy(&bytes).into_owned()))
    }
}

/// Parses a text.
///
/// # Errors
/// `Corrupt` with the byte; `Limit`.
pub(super) fn parse(text: &str) -> Result<Section> {
    let mut tokens = Tokens { text, at: 0, count: 0 };
    let mut open = vec![(String::new(), Section::default())];
    loop {
        let token = tokens.next()?;
        let (name, into) = match token {
            Some(Token::Sign(b'}')) if open.len() > 1 => {
                let (name, section) = open.pop().unwrap_or_default();
                if let Some((_, parent)) = open.last_mut() {
                    parent.0.insert(name, Value::Section(section));
                }
                continue;
            }
            Some(Token::Name(name)) => (name, open.last_mut()),
            None if open.len() == 1 => return Ok(open.pop().unwrap_or_default().1),
            _ => return Err(tokens.bad("a name was expected")),
        };
        match tokens.next()? {
            Some(Token::Sign(b'{')) => {
                if open.len() > NESTING_MAX {
                    return Err(tokens.bad(&format!("more than {NESTING_MAX} sections deep")));
                }
                open.push((name.to_owned(), Section::default()));
            }
            Some(Token::Sign(b'=')) => {
                let value = value(&mut tokens)?;
                if let Some((_, section)) = into {
                    section.0.insert(name.to_owned(), value);
                }
            }
            _ => return Err(tokens.bad("`=` or `{` was expected")),
        }
    }
}

fn value(tokens: &mut Tokens<'_>) -> Result<Value> {
    let token = tokens.next()?;
    if token != Some(Token::Sign(b'[')) {
        return simple(tokens, token);
    }
    let mut list = Vec::new();
    loop {
        match tokens.next()? {
            Some(Token::Sign(b']')) => return Ok(Value::List(list)),
            Some(Token::Sign(b',')) => {}
            token => list.push(simple(tokens, token)?),
        }
    }
}

fn simple(tokens: &Tokens<'_>, token: Option<Token<'_>>) -> Result<Value> {
    match token {
        Some(Token::Text(text)) => Ok(Value::Text(text)),
        // Numbers with a point are nothing that is looked at.
        Some(Token::Name(word)) => {
            Ok(word.parse().map_or_else(|_| Value::Text(word.to_owned()), Value::Number))
        }
        _ => Err(tokens.bad("a value was expected")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sections_lists_strings_and_comments_are_read() {
        let text = "# a comment\nvg {\nid = \"a\\\"b\" # why\nseqno=7\nstatus = [\"READ\", \"WRITE\"]\n\
                    empty = []\nsub { n = -1 x=1.5 }\n}\ncreation_host = \"h\"\n\0";
        let root = parse(text).unwrap();
        let vg = root.section("vg").unwrap();
        assert_eq!((vg.text("id"), vg.number("seqno")), (Some("a\"b"), Some(7)));
        assert_eq!(vg.list("status")[1], Value::Text("WRITE".into()));
        assert_eq!(vg.section("sub").unwrap().number("n"), None);
        assert_eq!(root.text("creation_host"), Some("h"));
    }

    #[test]
    fn what_is_no_such_text_is_an_error() {
        for text in ["vg {", "}", "a = ", "a = [1", "a b", "= 1", "a = \"x", "\u{e4} = 1", "a = {}"]
        {
            assert_eq!(parse(text).unwrap_err().kind, crate::ErrorKind::Corrupt, "{text}");
        }
        assert!(parse(&"a {".repeat(100_000)).is_err());
    }
}
