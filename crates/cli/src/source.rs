//! What a path on the command line may stand for: a file, the standard input, a `data:` or a
//! `file:` URL.

use std::borrow::Cow;
use std::fs::File;
use std::io::{Read, stdin};
use std::path::{Path, PathBuf};

use anyhow::{Context, anyhow, bail};
use data_url::DataUrl;
use percent_encoding::percent_decode_str;

/// Characters of a URL that messages show.
const SHOWN: usize = 60;

/// Whether a path stands for the standard input.
pub(crate) fn is_stdin(path: &Path) -> bool {
    path == Path::new("-")
}

/// A path for messages: of a URL that holds a picture, the beginning.
pub(crate) fn shown(path: &Path) -> String {
    let text = path.display().to_string();
    match text.char_indices().nth(SHOWN) {
        Some((end, _)) if scheme(path).is_some() => format!("{}…", &text[..end]),
        _ if is_stdin(path) => "from the standard input".into(),
        _ => text,
    }
}

/// Reads what a path stands for, at most `limit` bytes.
pub(crate) fn read(path: &Path, limit: u64) -> anyhow::Result<Vec<u8>> {
    let shown = || shown(path);
    if is_stdin(path) {
        return read_all(stdin(), limit).context("cannot read the standard input");
    }
    let path = match scheme(path) {
        None => Cow::Borrowed(path),
        Some(("file", rest)) => Cow::Owned(file_path(rest).with_context(shown)?),
        Some(("data", _)) => return data(path, limit).with_context(shown),
        Some((scheme, _)) => bail!(
            "{} is not read: nothing is fetched from a network, and of {scheme}: URLs nothing is \
             known; download it and give the file",
            shown()
        ),
    };
    let file = File::open(&path).with_context(|| format!("cannot open {}", path.display()))?;
    read_all(file, limit).with_context(|| format!("cannot read {}", path.display()))
}

/// Scheme and rest of a URL, unless there is a file of this name. Letters of drives are no schemes.
fn scheme(path: &Path) -> Option<(&str, &str)> {
    let (scheme, rest) = path.to_str()?.split_once(':')?;
    let is_scheme = scheme.len() > 1 && scheme.bytes().all(|byte| byte.is_ascii_alphanumeric());
    let is_url = is_scheme && (scheme.eq_ignore_ascii_case("data") || rest.starts_with("//"));
    let known = ["data", "file"].into_iter();
    let scheme = { known }
        .find(|known| known.eq_ignore_ascii_case(scheme))
        .unwrap_or(scheme);
    (is_url && !path.exists()).then_some((scheme, rest))
}

/// The path of a `file:` URL, of which this is what follows the scheme.
fn file_path(rest: &str) -> anyhow::Result<PathBuf> {
    let rest = rest.strip_prefix("//").unwrap_or(rest);
    let rest = rest.strip_prefix("localhost").unwrap_or(rest);
    if !rest.starts_with('/') {
        bail!("it names another machine; of this one, write file:///path/of/the/file");
    }
    let path = percent_decode_str(rest).decode_utf8();
    let path = path.context("its path is not UTF-8 text; give the path itself")?;
    // `/C:/picture.png`
    let drive = path.as_bytes().get(2) == Some(&b':') && cfg!(windows);
    Ok(PathBuf::from(if drive { &path[1..] } else { &path }))
}

/// The content of a `data:` URL.
fn data(url: &Path, limit: u64) -> anyhow::Result<Vec<u8>> {
    let url = url.to_str().unwrap_or_default();
    let parsed = DataUrl::process(url);
    let parsed = parsed.map_err(|_| anyhow!("it has no comma before its data"))?;
    let decoded = parsed.decode_to_vec();
    let (bytes, _fragment) = decoded.map_err(|_| anyhow!("its data is not base64"))?;
    check(bytes, limit)
}

fn read_all(reader: impl Read, limit: u64) -> anyhow::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    reader.take(limit + 1).read_to_end(&mut bytes)?;
    check(bytes, limit)
}

fn check(bytes: Vec<u8>, limit: u64) -> anyhow::Result<Vec<u8>> {
    if bytes.len() as u64 > limit {
        bail!("it is larger than {} MiB; give a smaller one", limit >> 20);
    }
    Ok(bytes)
}
