//! JSON as Python's `json.dumps` writes it and `json.loads` reads it, for templates.

use minijinja::value::{Kwargs, Rest, ValueKind};
use minijinja::{Error, ErrorKind, Value};

use super::MAX_OUTPUT;

/// Levels of lists and objects that are written.
const MAX_DEPTH: usize = 128;

/// `value|tojson(ensure_ascii, indent, separators, sort_keys)`, as `transformers` defines it.
pub(super) fn dumps(value: &Value, args: Rest<Value>, named: Kwargs) -> Result<String, Error> {
    let option = |at: usize, name: &str| match args.get(at) {
        Some(value) => Ok(value.clone()),
        None => Ok::<_, Error>(named.get::<Option<Value>>(name)?.unwrap_or(Value::from(()))),
    };
    let (ascii, indent) = (option(0, "ensure_ascii")?, option(1, "indent")?);
    let (separators, sorted) = (option(2, "separators")?, option(3, "sort_keys")?);
    named.assert_all_used()?;
    if args.len() > 4 {
        return Err(Error::from(ErrorKind::TooManyArguments));
    }
    let indent = match indent.kind() {
        ValueKind::None => None,
        ValueKind::String => indent.as_str().map(str::to_owned),
        ValueKind::Bool => Some(" ".repeat(usize::from(indent.is_true()))),
        _ => {
            let spaces = i64::try_from(indent)?.clamp(0, 1 << 10);
            Some(" ".repeat(spaces as usize))
        }
    };
    let [item, key] = match separators.is_none() {
        true if indent.is_some() => [",".to_owned(), ": ".to_owned()],
        true => [", ".to_owned(), ": ".to_owned()],
        false => {
            let texts = separators.try_iter()?.map(|text| text.to_string());
            let texts: Vec<String> = texts.collect();
            texts.try_into().map_err(|_| {
                let message = "separators are two texts, behind items and behind keys";
                Error::new(ErrorKind::InvalidOperation, message)
            })?
        }
    };
    let mut writer = Writer {
        out: String::new(),
        ascii: ascii.is_true(),
        sorted: sorted.is_true(),
        indent,
        item,
        key,
        depth: 0,
    };
    writer.value(value)?;
    Ok(writer.out)
}

/// `text|fromjson`.
pub(super) fn loads(text: &str) -> Result<Value, Error> {
    let failed = |error| Error::new(ErrorKind::BadSerialization, "no JSON").with_source(error);
    serde_json::from_str(text).map_err(failed)
}

struct Writer {
    out: String,
    ascii: bool,
    sorted: bool,
    /// Of one level; all in one line if `None`.
    indent: Option<String>,
    /// Behind an item, and behind a key.
    item: String,
    key: String,
    depth: usize,
}

impl Writer {
    fn value(&mut self, value: &Value) -> Result<(), Error> {
        match value.kind() {
            ValueKind::Seq | ValueKind::Iterable => {
                let items: Vec<Value> = value.try_iter()?.collect();
                self.items(['[', ']'], &items, |writer, item| writer.value(item))
            }
            ValueKind::Map => {
                let mut keys: Vec<Value> = value.try_iter()?.collect();
                if self.sorted {
                    keys.sort();
                }
                self.items(['{', '}'], &keys, |writer, key| {
                    writer.key(key)?;
                    writer.value(&value.get_item(key)?)
                })
            }
            ValueKind::String => self.text(value.as_str().unwrap_or_default()),
            _ => {
                let scalar = scalar(value)?;
                self.push(&scalar)
            }
        }
    }

    /// Keys are texts, whatever they were.
    fn key(&mut self, key: &Value) -> Result<(), Error> {
        match key.as_str() {
            Some(text) => self.text(text)?,
            None => {
                let scalar = scalar(key)?;
                self.text(&scalar)?;
            }
        }
        let separator = self.key.clone();
        self.push(&separator)
    }

    fn items(
        &mut self,
        [open, close]: [char; 2],
        items: &[Value],
        mut write: impl FnMut(&mut Self, &Value) -> Result<(), Error>,
    ) -> Result<(), Error> {
        self.depth += 1;
        if self.depth > MAX_DEPTH {
            let message = "it is nested too deeply for JSON";
            return Err(Error::new(ErrorKind::InvalidOperation, message));
        }
        self.out.push(open);
        for (at, item) in items.iter().enumerate() {
            if at > 0 {
                let separator = self.item.clone();
                self.push(&separator)?;
            }
            self.line()?;
            write(self, item)?;
        }
        self.depth -= 1;
        if !items.is_empty() {
            self.line()?;
        }
        self.out.push(close);
        Ok(())
    }

    fn line(&mut self) -> Result<(), Error> {
        match &self.indent {
            Some(indent) => {
                let line = format!("\n{}", indent.repeat(self.depth));
                self.push(&line)
            }
            None => Ok(()),
        }
    }

    fn text(&mut self, text: &str) -> Result<(), Error> {
        let mut quoted = String::with_capacity(text.len() + 2);
        quoted.push('"');
        for c in text.chars() {
            match c {
                '"' => quoted.push_str("\\\""),
                '\\' => quoted.push_str("\\\\"),
                '\n' => quoted.push_str("\\n"),
                '\r' => quoted.push_str("\\r"),
                '\t' => quoted.push_str("\\t"),
                '\u{8}' => quoted.push_str("\\b"),
                '\u{c}' => quoted.push_str("\\f"),
                c if c < ' ' || (self.ascii && !(' '..='~').contains(&c)) => {
                    let mut units = [0; 2];
                    let units = c.encode_utf16(&mut units);
                    quoted.extend(units.iter().map(|unit| format!("\\u{unit:04x}")));
                }
                c => quoted.push(c),
            }
        }
        quoted.push('"');
        self.push(&quoted)
    }

    fn push(&mut self, text: &str) -> Result<(), Error> {
        if self.out.len() + text.len() > MAX_OUTPUT {
            let message = "the JSON is too long";
            return Err(Error::new(ErrorKind::InvalidOperation, message));
        }
        self.out.push_str(text);
        Ok(())
    }
}

/// What is neither text nor made of others.
fn scalar(value: &Value) -> Result<String, Error> {
    match value.kind() {
        ValueKind::None => Ok("null".to_owned()),
        ValueKind::Bool => Ok(value.is_true().to_string()),
        ValueKind::Number if value.is_integer() => Ok(value.to_string()),
        ValueKind::Number => Ok(float(f64::try_from(value.clone())?)),
        kind => {
            let message = format!("{kind} is not JSON serializable");
            Err(Error::new(ErrorKind::InvalidOperation, message))
        }
    }
}

/// Python's shortest notation: exponents have a sign and two digits.
fn float(value: f64) -> String {
    if value.is_nan() {
        return "NaN".to_owned();
    }
    if value.is_infinite() {
        return format!("{}Infinity", if value < 0.0 { "-" } else { "" });
    }
    let text = format!("{value:?}");
    match text.split_once('e') {
        Some((digits, exponent)) => {
            let (sign, exponent) = match exponent.strip_prefix('-') {
                Some(exponent) => ('-', exponent),
                None => ('+', exponent),
            };
            format!("{digits}e{sign}{exponent:0>2}")
        }
        None => text,
    }
}
