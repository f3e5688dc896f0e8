//! Names of tensors, as data: what a checkpoint may call a parameter, and where the module has it.

/// One row of a name table: spellings in checkpoints, and the module path they all stand for.
///
/// Patterns are dotted names in which
/// - `{}` stands for one index: a whole segment, decimal, without leading zeros;
/// - `*`, at most once, stands for one or more whole segments.
///
/// The first spelling is the one that is written ([`NameTable::file_name`]).
///
/// What a spelling's wildcards stand for takes the place of the module path's wildcards, from left
/// to right, so every spelling needs the same wildcards in the same order as the module path.
///
/// ```
/// use reroute_checkpoint::{NameTable, Rule};
///
/// const TABLE: NameTable = NameTable {
///     rules: &[
///         Rule {
///             module: "tower.layers.{}.norm.weight",
///             file: &["tower.encoder.layers.{}.layer_norm.weight"],
///         },
///         Rule {
///             module: "decoder.*",
///             file: &["language_model.model.*", "model.language_model.*"],
///         },
///     ],
///     ignore: &["*.rotary_emb.inv_freq"],
/// };
/// assert_eq!(
///     TABLE.module_path("model.language_model.layers.3.mlp.up_proj.weight").as_deref(),
///     Some("decoder.layers.3.mlp.up_proj.weight"),
/// );
/// ```
#[derive(Debug, Clone, Copy)]
pub struct Rule {
    /// Path of the parameter in the module.
    pub module: &'static str,
    /// Names it goes by in checkpoints; the first is the one that is written.
    pub file: &'static [&'static str],
}

/// The names of one model family.
#[derive(Debug, Clone, Copy)]
pub struct NameTable {
    /// The first rule that matches a name decides, as in a `match`: exceptions come first.
    pub rules: &'static [Rule],
    /// Patterns of names that checkpoints are known to hold and no model needs.
    pub ignore: &'static [&'static str],
}

impl NameTable {
    /// Path of the parameter that a tensor's name stands for.
    pub fn module_path(&self, name: &str) -> Option<String> {
        self.rules.iter().find_map(|rule| {
            let wildcards = rule.file.iter().find_map(|file| wildcards(file, name))?;
            fill(rule.module, &wildcards)
        })
    }

    /// What checkpoints call a parameter: the first spelling that [`module_path`](Self::module_path)
    /// leads back to it.
    ///
    /// ```
    /// # use reroute_checkpoint::{NameTable, Rule};
    /// # const TABLE: NameTable = NameTable {
    /// #     rules: &[Rule { module: "decoder.*", file: &["language_model.model.*", "model.*"] }],
    /// #     ignore: &[],
    /// # };
    /// let name = TABLE.file_name("decoder.norm.weight");
    /// assert_eq!(name.as_deref(), Some("language_model.model.norm.weight"));
    /// ```
    pub fn file_name(&self, path: &str) -> Option<String> {
        self.file_names(path).next()
    }

    /// Every spelling that [`module_path`](Self::module_path) leads back to a parameter, the one that is
    /// written first.
    pub fn file_names(&self, path: &str) -> impl Iterator<Item = String> {
        self.rules.iter().flat_map(move |rule| {
            let wildcards = wildcards(rule.module, path);
            let names = rule.file.iter();
            let names = names.filter_map(move |file| fill(file, wildcards.as_deref()?));
            // An exception further up may take a name for itself.
            names.filter(move |name| self.module_path(name).as_deref() == Some(path))
        })
    }

    /// Whether a tensor may be left out, should no parameter want it.
    pub fn ignores(&self, name: &str) -> bool {
        self.ignore.iter().any(|pattern| matches(pattern, name))
    }
}

/// Whether a name fits a pattern.
pub(crate) fn matches(pattern: &str, name: &str) -> bool {
    wildcards(pattern, name).is_some()
}

/// What the wildcards of a pattern stand for in a name, from left to right.
fn wildcards<'n>(pattern: &str, name: &'n str) -> Option<Vec<&'n str>> {
    let Some((head, tail)) = pattern.split_once('*') else {
        return indices(pattern, name);
    };
    // Segments before and after the `*` are counted; it takes what lies between.
    let (name_head, rest) = split_after(name, head.matches('.').count())?;
    let (middle, name_tail) = split_before(rest, tail.matches('.').count())?;
    if middle.is_empty() {
        return None;
    }
    let mut found = indices(head, name_head)?;
    found.push(middle);
    found.extend(indices(tail, name_tail)?);
    Some(found)
}

/// Matches a pattern without `*`.
fn indices<'n>(pattern: &str, name: &'n str) -> Option<Vec<&'n str>> {
    let mut found = Vec::new();
    let mut segments = name.split('.');
    for wanted in pattern.split('.') {
        let segment = segments.next()?;
        if wanted == "{}" && is_index(segment) {
            found.push(segment);
        } else if wanted != segment {
            return None;
        }
    }
    segments.next().is_none().then_some(found)
}

fn is_index(segment: &str) -> bool {
    let digits = !segment.is_empty() && segment.bytes().all(|byte| byte.is_ascii_digit());
    digits && (segment == "0" || !segment.starts_with('0'))
}

/// Splits behind the `dots`-th dot.
fn split_after(name: &str, dots: usize) -> Option<(&str, &str)> {
    let Some(last) = dots.checked_sub(1) else {
        return Some(("", name));
    };
    let (at, _) = name.match_indices('.').nth(last)?;
    name.split_at_checked(at + 1)
}

/// Splits before the `dots`-th dot from the end.
fn split_before(name: &str, dots: usize) -> Option<(&str, &str)> {
    let Some(first) = dots.checked_sub(1) else {
        return Some((name, ""));
    };
    let (at, _) = name.rmatch_indices('.').nth(first)?;
    name.split_at_checked(at)
}

/// Puts `wildcards` in the places of a pattern's wildcards.
fn fill(pattern: &str, wildcards: &[&str]) -> Option<String> {
    let mut wildcards = wildcards.iter();
    let segments = pattern.split('.').map(|segment| match segment {
        "{}" | "*" => wildcards.next().copied(),
        literal => Some(literal),
    });
    let path: Option<Vec<&str>> = segments.collect();
    Some(path?.join("."))
}
