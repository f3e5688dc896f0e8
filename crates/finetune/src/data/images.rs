//! Where the images of an entry are: names of files, or content in base64.

use std::path::{Path, PathBuf};

use base64::Engine;
use base64::alphabet::STANDARD;
use base64::engine::{DecodePaddingMode, GeneralPurpose, GeneralPurposeConfig};
use serde_json::Value;

use super::entry::{Fields, field, is_off};
use super::{ImageSource, Problem};

/// Most bytes of an image in the data.
const IMAGE_MAX_BYTES: usize = 64 << 20;

/// Base64 with or without padding at the end.
const BASE64: GeneralPurpose = GeneralPurpose::new(
    &STANDARD,
    GeneralPurposeConfig::new().with_decode_padding_mode(DecodePaddingMode::Indifferent),
);

/// What an image should be.
const WANTED: &str = "the name of a file, or an object with path or bytes";

/// The images that an entry lists, under `images` or `image`.
pub(super) fn listed(fields: &Fields, below: &Path) -> Result<Vec<ImageSource>, Problem> {
    let set = |key| field(fields, key).filter(|value| !is_off(value));
    let (images, image) = (set("images"), set("image"));
    let (name, listed) = match (images, image) {
        (None, None) => return Ok(Vec::new()),
        (Some(listed), None) => ("images", listed),
        (None, Some(listed)) => ("image", listed),
        (Some(_), Some(_)) => {
            return Err(Problem::Shape {
                what: "image beside images".into(),
                wanted: "left out",
            });
        }
    };
    match listed {
        Value::Array(items) => items.iter().map(|item| source(name, item, below)).collect(),
        one => Ok(vec![source(name, one, below)?]),
    }
}

/// The image that an object brings along, if it brings one.
pub(super) fn brought(fields: &Fields, below: &Path) -> Result<Option<ImageSource>, Problem> {
    for name in ["bytes", "base64"] {
        let Some(bytes) = field(fields, name) else {
            continue;
        };
        let Value::String(bytes) = bytes else {
            return Err(misshapen(name, "base64 in a string"));
        };
        return decoded(bytes, IMAGE_MAX_BYTES).map(Some);
    }
    let names = ["image", "path", "url", "image_url"].into_iter();
    let mut found = names.filter_map(|name| Some((name, field(fields, name)?)));
    let found = found.next();
    found
        .map(|(name, value)| source(name, value, below))
        .transpose()
}

fn source(name: &str, value: &Value, below: &Path) -> Result<ImageSource, Problem> {
    match value {
        Value::String(text) => named(name, text, below),
        Value::Object(fields) => brought(fields, below)?.ok_or_else(|| misshapen(name, WANTED)),
        _ => Err(misshapen(name, WANTED)),
    }
}

fn misshapen(what: &str, wanted: &'static str) -> Problem {
    let what = what.to_owned();
    Problem::Shape { what, wanted }
}

/// An image by its path or URL.
fn named(name: &str, text: &str, below: &Path) -> Result<ImageSource, Problem> {
    if let (Some(scheme), Some(rest)) = (text.get(..5), text.get(5..))
        && scheme.eq_ignore_ascii_case("data:")
    {
        return match rest.split_once(',') {
            Some((about, content)) if about.to_ascii_lowercase().ends_with(";base64") => {
                decoded(content, IMAGE_MAX_BYTES)
            }
            _ => Err(Problem::Base64 {
                reason: "the data: URL has no ;base64, in front of its content".into(),
            }),
        };
    }
    let path = match text.split_once("://") {
        Some((scheme, rest)) if scheme.eq_ignore_ascii_case("file") => rest,
        Some((scheme, _)) if is_scheme(scheme) => {
            let url = text.to_owned();
            return Err(Problem::Url { url });
        }
        _ => text,
    };
    if path.is_empty() {
        return Err(misshapen(name, WANTED));
    }
    let image: PathBuf = below.join(path);
    match image.is_file() {
        true => Ok(ImageSource::File(image)),
        false => Err(Problem::Missing { image }),
    }
}

fn is_scheme(text: &str) -> bool {
    text.starts_with(|first: char| first.is_ascii_alphabetic()) && { text.bytes() }
        .all(|byte| byte.is_ascii_alphanumeric() || b"+-.".contains(&byte))
}

/// The content of an image; line breaks and blanks in between mean nothing.
fn decoded(base64: &str, most: usize) -> Result<ImageSource, Problem> {
    let is_blank = |byte: &u8| byte.is_ascii_whitespace();
    let signs = base64.bytes().filter(|byte| !is_blank(byte)).count();
    // Four signs are three bytes, or fewer at the end.
    if signs / 4 * 3 > most.saturating_add(2) {
        return Err(Problem::ImageTooLarge { most });
    }
    let bytes = match signs == base64.len() {
        true => BASE64.decode(base64),
        false => {
            let dense: Vec<u8> = base64.bytes().filter(|byte| !is_blank(byte)).collect();
            BASE64.decode(dense)
        }
    };
    let reason = match bytes {
        Ok(bytes) if bytes.len() > most => return Err(Problem::ImageTooLarge { most }),
        Ok(bytes) if !bytes.is_empty() => return Ok(ImageSource::Bytes(bytes)),
        Ok(_) => "it is empty".into(),
        Err(error) => error.to_string(),
    };
    Err(Problem::Base64 { reason })
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::super::testing::{Folder, words};
    use super::*;

    fn listed_in(folder: &Folder, images: &Value) -> Result<Vec<ImageSource>, Problem> {
        let entry = json!({ "images": images });
        listed(entry.as_object().expect("an object"), &folder.path(""))
    }

    #[test]
    fn files_are_named_in_many_ways() {
        let folder = Folder::new();
        let absolute = folder.path("b.png");
        let url = format!("file://{}", absolute.display());
        let images = json!([
            "a.png", absolute, url, {"path": "ü/ö c.png"}, {"url": "a.png", "bytes": null},
            {"image": {"path": "a.png"}},
        ]);
        let files = ["a.png", "b.png", "b.png", "ü/ö c.png", "a.png", "a.png"];
        let files = files.map(|name| folder.file(name));
        assert_eq!(listed_in(&folder, &images), Ok(files.to_vec()));
        assert_eq!(
            listed_in(&folder, &json!("a.png")),
            Ok(vec![folder.file("a.png")])
        );
        for none in [json!([]), json!(""), json!(null)] {
            assert_eq!(listed_in(&folder, &none), Ok(vec![]));
        }
    }

    #[test]
    fn content_is_decoded() {
        let folder = Folder::new();
        let images = json!([
            "data:image/png;base64,iVBORw0=", "DATA:;charset=x;BASE64,iVBO\r\nRw0", {"bytes": "iVBORw0="},
            {"base64": "iVBORw0=", "path": "unused.png"}, {"url": "data:image/png;base64,iVBORw0="},
        ]);
        let image = ImageSource::Bytes(b"\x89PNG\r".to_vec());
        assert_eq!(format!("{image:?}"), "Bytes(5 bytes)");
        assert_eq!(listed_in(&folder, &images), Ok(vec![image; 5]));
    }

    #[test]
    fn wrong_content_is_refused() {
        let folder = Folder::new();
        for image in [
            "data:image/png,%89PNG",
            "data:image/png;base64,i*",
            "data:;base64,",
            "data:",
        ] {
            let problem = listed_in(&folder, &json!(image));
            assert!(
                matches!(problem, Err(Problem::Base64 { .. })),
                "{problem:?}"
            );
        }
        for (most, fits) in [(3, false), (4, false), (5, true), (6, true)] {
            let decoded = decoded("iVBORw0=", most);
            assert_eq!(decoded.is_ok(), fits);
            assert!(fits || decoded == Err(Problem::ImageTooLarge { most }));
        }
    }

    #[test]
    fn nothing_is_fetched() {
        let folder = Folder::new();
        for url in ["http://x.y/a.png", "HTTPS://x.y/a.png", "s3://bucket/a.png"] {
            let problem = listed_in(&folder, &json!([{ "url": url }])).expect_err("a URL");
            assert_eq!(problem, Problem::Url { url: url.into() });
            assert!(problem.to_string().contains("download it"));
        }
    }

    #[test]
    fn images_are_there_and_well_formed() {
        let turns = [
            json!({"from": "human", "value": "?"}),
            json!({"from": "gpt", "value": "!"}),
        ];
        let with = |image: Value| words(&json!({"conversations": turns, "image": image}));
        assert!(with(json!("none.png")).contains("--images DIR"));
        assert!(with(json!("none\u{1b}[2J.png")).contains("none\\u{1b}[2J.png"));
        assert!(with(json!("ü")).contains("is not there"));
        assert!(with(json!("x".repeat(5_000))).len() < 400);
        for wrong in [
            json!(7),
            json!([["a.png"]]),
            json!({"size": 3}),
            json!({"bytes": [1]}),
            json!([""]),
        ] {
            assert!(with(wrong).contains(" should be "));
        }
        let both = json!({"conversations": turns, "image": "a.png", "images": ["a.png"]});
        assert!(words(&both).contains("image beside images should be left out"));
    }
}
