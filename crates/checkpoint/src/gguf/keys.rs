//! What a file says of itself, as the kind of value that is wanted.

use std::collections::BTreeMap;

use super::GgufValue;

/// Metadata, with the architecture that names of many keys begin with.
#[derive(Clone, Copy)]
pub(super) struct Keys<'a> {
    metadata: &'a BTreeMap<String, GgufValue>,
    pub(super) architecture: &'a str,
}

/// What a value has to be.
#[derive(Clone, Copy)]
pub(super) enum Kind {
    Text,
    /// An integer that is 0 or 1.
    Flag,
    /// A number that is finite.
    Number,
    /// A count, or one for each layer.
    Count,
    Integers,
    /// Numbers that are finite.
    Numbers,
    Texts,
}

impl Kind {
    fn fits(self, value: &GgufValue) -> bool {
        match (self, value) {
            (Self::Text, GgufValue::Text(_))
            | (Self::Texts, GgufValue::Texts(_))
            | (Self::Integers, GgufValue::Integers(_)) => true,
            (Self::Flag, GgufValue::Integer(flag)) => matches!(flag, 0 | 1),
            (Self::Number | Self::Count, GgufValue::Integer(number)) => *number >= 0,
            (Self::Count, GgufValue::Integers(numbers)) => numbers.iter().all(|n| *n >= 0),
            (Self::Number, GgufValue::Float(number)) => number.is_finite(),
            (Self::Numbers, GgufValue::Floats(numbers)) => numbers.iter().all(|n| n.is_finite()),
            // A list of nothing is of any kind.
            (Self::Texts | Self::Numbers, GgufValue::Integers(list)) => list.is_empty(),
            _ => false,
        }
    }

    fn name(self) -> &'static str {
        match self {
            Self::Text => "a text",
            Self::Flag => "a flag",
            Self::Number => "a finite number",
            Self::Count => "a count",
            Self::Integers => "a list of integers",
            Self::Numbers => "a list of finite numbers",
            Self::Texts => "a list of texts",
        }
    }
}

impl<'a> Keys<'a> {
    /// Refuses keys that are there and are not what they have to be: no default may take their place.
    pub(super) fn check(&self, kinds: &[(&str, Kind)]) -> Result<(), String> {
        for (key, kind) in kinds {
            if self.get(key).is_some_and(|value| !kind.fits(value)) {
                return Err(format!("its {} is not {}", self.name(key), kind.name()));
            }
        }
        Ok(())
    }

    pub(super) fn new(metadata: &'a BTreeMap<String, GgufValue>) -> Self {
        let mut keys = Self {
            metadata,
            architecture: "",
        };
        keys.architecture = keys.text("general.architecture").unwrap_or("");
        keys
    }

    fn get(&self, key: &str) -> Option<&'a GgufValue> {
        match key.strip_prefix('.') {
            Some(key) => self.metadata.get(&format!("{}.{key}", self.architecture)),
            None => self.metadata.get(key),
        }
    }

    /// The name of a key, for messages.
    fn name(&self, key: &str) -> String {
        match key.starts_with('.') {
            true => format!("{}{key}", self.architecture),
            false => key.to_owned(),
        }
    }

    pub(super) fn text(&self, key: &str) -> Option<&'a str> {
        match self.get(key) {
            Some(GgufValue::Text(text)) => Some(text),
            _ => None,
        }
    }

    pub(super) fn texts(&self, key: &str) -> Option<&'a [String]> {
        match self.get(key) {
            Some(GgufValue::Texts(texts)) => Some(texts),
            _ => None,
        }
    }

    pub(super) fn integers(&self, key: &str) -> Option<&'a [i64]> {
        match self.get(key) {
            Some(GgufValue::Integers(integers)) => Some(integers),
            _ => None,
        }
    }

    pub(super) fn floats(&self, key: &str) -> Option<&'a [f64]> {
        match self.get(key) {
            Some(GgufValue::Floats(floats)) => Some(floats),
            _ => None,
        }
    }

    pub(super) fn flag(&self, key: &str) -> Option<bool> {
        match self.get(key) {
            Some(GgufValue::Integer(integer)) => Some(*integer != 0),
            _ => None,
        }
    }

    /// A fraction, as it was written in decimal.
    pub(super) fn number(&self, key: &str) -> Option<f64> {
        match self.get(key)? {
            GgufValue::Float(number) => Some(decimal(*number)),
            GgufValue::Integer(number) => Some(*number as f64),
            _ => None,
        }
    }

    /// A count: one number, or a list of one for each layer in which all are equal.
    pub(super) fn count(&self, key: &str) -> Result<Option<usize>, String> {
        let whole = |number: i128| usize::try_from(number).ok();
        let count = match self.get(key) {
            None => return Ok(None),
            Some(GgufValue::Integer(number)) => whole(*number),
            Some(GgufValue::Integers(numbers)) => match numbers.split_first() {
                Some((first, rest)) if rest.iter().all(|number| number == first) => {
                    whole(i128::from(*first))
                }
                _ => None,
            },
            Some(_) => None,
        };
        count.map(Some).ok_or_else(|| {
            format!(
                "{} is not one count for all layers, which is not supported",
                self.name(key)
            )
        })
    }

    /// The same where there must be one.
    pub(super) fn needed(&self, key: &str) -> Result<usize, String> {
        let missing = || format!("it does not say {}", self.name(key));
        self.count(key)?.ok_or_else(missing)
    }
}

/// What was written before it became f32: 0.000001 and not 0.0000009999999974752427.
pub(super) fn decimal(number: f64) -> f64 {
    let narrow = number as f32;
    match f64::from(narrow) == number {
        true => narrow.to_string().parse().unwrap_or(number),
        false => number,
    }
}
