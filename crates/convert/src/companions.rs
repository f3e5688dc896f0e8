//! The small files beside the weights, without which nothing opens a checkpoint.

use std::collections::BTreeMap;
use std::path::PathBuf;

use reroute_checkpoint::{CONFIG, Folder, TOKENIZER_MAX_BYTES};

use crate::ConvertError;

/// Files that go into the target folder as they are.
#[derive(Debug, Default)]
pub(crate) struct Companions {
    /// Name → the folder it is copied from.
    copied: BTreeMap<String, Folder>,
    /// Name → content.
    made: BTreeMap<String, Vec<u8>>,
    /// Files that are longer than anything that opens a checkpoint reads.
    pub(crate) left_out: Vec<PathBuf>,
}

impl Companions {
    /// Takes over the small files of a folder that are wanted, but not its config; files of earlier
    /// folders stay.
    pub(crate) fn add(
        &mut self,
        folder: &Folder,
        wanted: impl Fn(&str) -> bool,
    ) -> Result<(), ConvertError> {
        let found = folder.companions()?;
        let path = folder.root().unwrap_or("".as_ref());
        let wanted = |name: &String| wanted(name);
        let too_large = found.too_large.into_iter().filter(wanted);
        self.left_out.extend(too_large.map(|name| path.join(name)));
        for name in found.names.into_iter().filter(wanted) {
            self.copied.entry(name).or_insert_with(|| folder.clone());
        }
        Ok(())
    }

    /// Puts a file in the place of what would be copied under its name.
    pub(crate) fn make(&mut self, name: impl Into<String>, content: Vec<u8>) {
        let name = name.into();
        self.copied.remove(&name);
        self.made.insert(name, content);
    }

    pub(crate) fn names(&self) -> impl Iterator<Item = &str> {
        self.copied
            .keys()
            .chain(self.made.keys())
            .map(String::as_str)
    }

    /// Paths of the files that are copied; those that were made of others have none.
    pub(crate) fn sources(&self) -> impl Iterator<Item = PathBuf> {
        let copied = self.copied.iter();
        copied.filter_map(|(name, folder)| Some(folder.root()?.join(name)))
    }

    /// Name and content of every file, the config last: a folder with a config is complete.
    pub(crate) fn contents(&self) -> impl Iterator<Item = Result<(&str, Vec<u8>), ConvertError>> {
        let copied = self.copied.iter().map(|(name, folder)| {
            let content = folder.read(name, TOKENIZER_MAX_BYTES)?;
            Ok((name.as_str(), content))
        });
        let made = self
            .made
            .iter()
            .map(|(name, content)| Ok((name.as_str(), content.clone())));
        let (config, made): (Vec<_>, Vec<_>) =
            made.partition(|file: &Result<(&str, _), _>| matches!(file, Ok((CONFIG, _))));
        copied.chain(made).chain(config)
    }
}
