//! Which tensor goes to which parameter, decided before anything is loaded.

use std::collections::BTreeMap;

use safetensors::Dtype;

use crate::mismatch::{Duplicate, Misshapen, ModuleMismatch, Unreadable};
use crate::names::matches;
use crate::{Layout, NameTable, TensorInfo};

/// A parameter of the module.
#[derive(Debug)]
pub(crate) struct Expected {
    /// Shape in the file.
    pub(crate) shape: Vec<usize>,
    pub(crate) layout: Layout,
}

/// A tensor to be loaded.
#[derive(Debug)]
pub(crate) struct Assignment {
    /// Name in the file.
    pub(crate) name: String,
    pub(crate) layout: Layout,
    /// Size in the file.
    pub(crate) bytes: u64,
    /// Size of one element in the file, in bytes.
    pub(crate) element_bytes: u64,
    /// Rows that blocks of the tensor have taken so far.
    pub(crate) rows_taken: usize,
}

impl Assignment {
    /// Of a tensor to a parameter; what does not fit is noted.
    pub(crate) fn new(
        name: &str,
        info: &TensorInfo,
        parameter: &Expected,
        mismatch: &mut ModuleMismatch,
    ) -> Self {
        check(name, info, parameter, mismatch);
        Self {
            name: name.to_owned(),
            layout: parameter.layout,
            bytes: info.bytes,
            element_bytes: info.dtype.bitsize() as u64 / 8,
            rows_taken: 0,
        }
    }
}

/// Finds the one tensor of every parameter; keys are module paths.
pub(crate) fn plan(
    expected: &BTreeMap<String, Expected>,
    tensors: &BTreeMap<String, TensorInfo>,
    table: &NameTable,
    unused: &[String],
) -> Result<BTreeMap<String, Assignment>, ModuleMismatch> {
    let mut mismatch = ModuleMismatch::default();
    let mut found: BTreeMap<&str, Vec<&str>> = BTreeMap::new();
    for name in tensors.keys().map(String::as_str) {
        let path = table.module_path(name);
        let path = path.as_deref();
        let needed = path.and_then(|path| expected.get_key_value(path));
        if let Some((path, _)) = needed {
            found.entry(path).or_default().push(name);
            continue;
        }
        let is_unused = |path| unused.iter().any(|pattern| matches(pattern, path));
        if !path.is_some_and(is_unused) && !table.ignores(name) {
            mismatch.unknown.push(name.to_owned());
        }
    }

    let mut assignments = BTreeMap::new();
    for (path, parameter) in expected {
        match found.get(path.as_str()).map_or(&[][..], Vec::as_slice) {
            [] => mismatch.missing.push(path.clone()),
            &[name] => {
                let Some(info) = tensors.get(name) else {
                    continue;
                };
                let assignment = Assignment::new(name, info, parameter, &mut mismatch);
                assignments.insert(path.clone(), assignment);
            }
            names => mismatch.duplicate.push(Duplicate {
                path: path.clone(),
                names: names.iter().map(|name| (*name).to_owned()).collect(),
            }),
        }
    }
    if mismatch.is_empty() {
        Ok(assignments)
    } else {
        Err(mismatch)
    }
}

fn check(name: &str, info: &TensorInfo, parameter: &Expected, mismatch: &mut ModuleMismatch) {
    if info.shape != parameter.shape {
        mismatch.misshapen.push(Misshapen {
            name: name.to_owned(),
            found: info.shape.clone(),
            expected: parameter.shape.clone(),
        });
    }
    if !matches!(info.dtype, Dtype::F32 | Dtype::F16 | Dtype::BF16) {
        mismatch.unreadable.push(Unreadable {
            name: name.to_owned(),
            dtype: info.dtype,
        });
    }
}
