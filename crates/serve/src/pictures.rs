//! Where pictures of a request come from: the request itself, folders that are allowed, the network if it is.

use std::borrow::Cow;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use cap_std::ambient_authority;
use cap_std::fs::Dir;
use data_url::DataUrl;
use percent_encoding::percent_decode_str;
use reroute_zoo::{DecodeLimits, RgbImage, Video, Visual, decode, natural};

use crate::chat::full;
use crate::fetch::Fetch;
use crate::limits::{Budget, Held, Limits};
use crate::refusal::Refusal;
use crate::request::Picture;

/// Most files that a folder of frames may have, pictures or not.
const MAX_FILES: usize = 8192;

/// Where pictures may come from.
#[derive(Debug)]
pub(crate) struct Sources {
    pub(crate) fetch: Option<Fetch>,
    folders: Vec<Allowed>,
}

/// A folder below which files are read, and none outside: not by `..` and not by links.
#[derive(Debug)]
struct Allowed {
    /// As it was given and as it is without links.
    names: [PathBuf; 2],
    dir: Dir,
}

/// What the pictures of a request may still take.
pub(crate) struct Room<'a> {
    limits: &'a Limits,
    budget: &'a Arc<Budget>,
    pictures: usize,
    pixels: u64,
    /// What they take already.
    pub(crate) held: Vec<Held>,
}

/// Whether it must be fetched from the network.
pub(crate) fn is_remote(url: &str) -> bool {
    matches!(scheme(url).0, "http" | "https")
}

fn scheme(url: &str) -> (&str, &str) {
    let (scheme, rest) = url.split_once(':').unwrap_or(("", url));
    let known = ["data", "file", "http", "https"].into_iter();
    let scheme = { known }
        .find(|known| known.eq_ignore_ascii_case(scheme))
        .unwrap_or(scheme);
    (scheme, rest)
}

impl<'a> Room<'a> {
    pub(crate) fn new(limits: &'a Limits, budget: &'a Arc<Budget>) -> Self {
        Self {
            limits,
            budget,
            pictures: limits.pictures,
            pixels: limits.pixels,
            held: Vec::new(),
        }
    }

    /// Decodes a picture, if there is room for it.
    fn decode(&mut self, bytes: &[u8], place: &str) -> Result<RgbImage, Refusal> {
        self.pictures = self.pictures.checked_sub(1).ok_or_else(|| {
            let most = self.limits.pictures;
            let message =
                format!("a request has {most} pictures at most, frames of videos among them");
            Refusal::bad(place, message)
        })?;
        let limits = DecodeLimits {
            max_pixels: self.pixels,
            ..DecodeLimits::default()
        };
        let image = decode(bytes, &limits).map_err(|error| {
            let most = self.limits.pixels;
            let message = format!("{error} (all pictures of a request have {most} pixels at most)");
            match self.pixels < most {
                true => Refusal::bad(place, message),
                false => Refusal::bad(place, error),
            }
        })?;
        self.pixels -= (image.width() * image.height()) as u64;
        let held = self.budget.take(image.data().len() as u64);
        self.held.push(held.ok_or_else(full)?);
        Ok(image)
    }
}

impl Sources {
    /// # Errors
    /// A folder that is none.
    pub(crate) fn new(fetch: Option<Fetch>, folders: &[PathBuf]) -> std::io::Result<Self> {
        let allowed = |folder: &PathBuf| {
            let real = folder.canonicalize()?;
            Ok(Allowed {
                dir: Dir::open_ambient_dir(&real, ambient_authority())?,
                names: [folder.clone(), real],
            })
        };
        let folders = folders
            .iter()
            .map(allowed)
            .collect::<std::io::Result<_>>()?;
        Ok(Self { fetch, folders })
    }

    /// Why a picture on the network is not fetched here, if it is not.
    pub(crate) fn check(&self, picture: &Picture) -> Result<(), Refusal> {
        if !is_remote(&picture.url) {
            return Ok(());
        }
        let refuse = |message: &str| Err(Refusal::unsupported(&picture.place, message));
        match (&self.fetch, picture.fps) {
            (_, Some(_)) => {
                refuse("videos are not fetched: send frames (data:video/jpeg;base64,FRAME,FRAME,…)")
            }
            (None, _) => refuse(
                "nothing is fetched from the network here (--allow-fetch): send the picture itself, as a data: URL",
            ),
            (Some(_), None) => Ok(()),
        }
    }

    /// A picture of a request; `fetched` are the bytes of one that was on the network.
    pub(crate) fn open(
        &self,
        picture: &Picture,
        fetched: Option<Vec<u8>>,
        room: &mut Room,
    ) -> Result<Visual, Refusal> {
        let place = picture.place.as_str();
        let (scheme, rest) = scheme(&picture.url);
        match (scheme, picture.fps) {
            ("http" | "https", None) => {
                let bytes =
                    fetched.ok_or_else(|| Refusal::internal("a picture was not fetched"))?;
                Ok(Visual::Image(room.decode(&bytes, place)?))
            }
            ("data", None) => {
                let bytes = data(&picture.url).map_err(|error| Refusal::bad(place, error))?;
                Ok(Visual::Image(room.decode(&bytes, place)?))
            }
            ("data", Some(fps)) => video(frames(rest, place, room)?, fps, place),
            ("file", None) => {
                let (dir, path) = self.find(rest, place)?;
                let bytes = self.read(dir, &path, room.limits.body_bytes, place)?;
                Ok(Visual::Image(room.decode(&bytes, place)?))
            }
            ("file", Some(fps)) => video(self.folder(rest, place, room)?, fps, place),
            _ => Err(Refusal::bad(
                place,
                "a picture is a data:, http:, https: or file: URL",
            )),
        }
    }

    /// A path below an allowed folder, of what follows `file:`.
    fn find(&self, rest: &str, place: &str) -> Result<(&Dir, PathBuf), Refusal> {
        if self.folders.is_empty() {
            let message =
                "no files are read here (--allow-dir): send the picture itself, as a data: URL";
            return Err(Refusal::unsupported(place, message));
        }
        let rest = rest.strip_prefix("//").unwrap_or(rest);
        let rest = rest.strip_prefix("localhost").unwrap_or(rest);
        if !rest.starts_with('/') {
            return Err(Refusal::bad(place, "a file URL is file:///absolute/path"));
        }
        let path: Cow<str> = percent_decode_str(rest).decode_utf8_lossy();
        let path = Path::new(path.as_ref());
        let below = self.folders.iter().find_map(|folder| {
            let mut names = folder.names.iter();
            let rest = names.find_map(|name| path.strip_prefix(name).ok())?;
            Some((&folder.dir, rest.to_owned()))
        });
        below.ok_or_else(|| unreadable(place))
    }

    fn read(&self, dir: &Dir, path: &Path, most: usize, place: &str) -> Result<Vec<u8>, Refusal> {
        // To open a pipe would be to wait for somebody who writes into it.
        let is_file = dir.metadata(path).is_ok_and(|file| file.is_file());
        let file = { is_file }.then(|| dir.open(path).ok()).flatten();
        let file = file.ok_or_else(|| unreadable(place))?;
        let mut bytes = Vec::new();
        let read = file.take(most as u64 + 1).read_to_end(&mut bytes);
        read.map_err(|_| unreadable(place))?;
        match bytes.len() > most {
            true => {
                let message = format!("the file is larger than {most} bytes: give a smaller one");
                Err(Refusal::bad(place, message))
            }
            false => Ok(bytes),
        }
    }

    /// The pictures of a folder in the order of their names.
    fn folder(&self, rest: &str, place: &str, room: &mut Room) -> Result<Vec<RgbImage>, Refusal> {
        let (dir, path) = self.find(rest, place)?;
        let path = match path.as_os_str().is_empty() {
            true => PathBuf::from("."),
            false => path,
        };
        let entries = dir.read_dir(&path).map_err(|_| {
            let message = "a video is a folder of frames below an allowed folder";
            Refusal::bad(place, message)
        })?;
        let names = entries.take(MAX_FILES).filter_map(|entry| {
            let name = PathBuf::from(entry.ok()?.file_name());
            let extension = name.extension()?.to_str()?.to_ascii_lowercase();
            let is_picture = ["jpeg", "jpg", "png", "webp"].contains(&extension.as_str());
            is_picture.then_some(name)
        });
        let mut names: Vec<PathBuf> = names.collect();
        names.sort_by_cached_key(|name| natural::key(name));
        let mut frames = Vec::new();
        for name in names {
            let bytes = self.read(dir, &path.join(name), room.limits.body_bytes, place)?;
            frames.push(room.decode(&bytes, place)?);
        }
        Ok(frames)
    }
}

/// The same for a file that is not there and for one that may not be read: nobody learns what is there.
fn unreadable(place: &str) -> Refusal {
    Refusal::bad(
        place,
        "there is no such file below the folders that are read",
    )
}

/// The content of a `data:` URL.
fn data(url: &str) -> Result<Vec<u8>, &'static str> {
    let parsed = DataUrl::process(url).map_err(|_| "the data: URL has no comma before its data")?;
    let decoded = parsed.decode_to_vec();
    Ok(decoded
        .map_err(|_| "the data of the data: URL is not base64")?
        .0)
}

/// Frames one behind the other, as vLLM takes them: `video/jpeg;base64,FRAME,FRAME`.
fn frames(rest: &str, place: &str, room: &mut Room) -> Result<Vec<RgbImage>, Refusal> {
    let mut parts = rest.split(',');
    let head = parts.next().unwrap_or_default().to_ascii_lowercase();
    let known = ["video/jpeg;base64", "video/png;base64", "video/webp;base64"];
    if !known.contains(&head.as_str()) {
        let message = "a video is its frames, data:video/jpeg;base64,FRAME,FRAME,…, each a JPEG, PNG or WebP in base64, \
                       or a folder of frames";
        return Err(Refusal::unsupported(place, message));
    }
    let mut frames = Vec::new();
    for part in parts {
        let bytes = STANDARD.decode(part.trim());
        let bytes = bytes.map_err(|_| Refusal::bad(place, "a frame of the video is not base64"))?;
        frames.push(room.decode(&bytes, place)?);
    }
    Ok(frames)
}

fn video(frames: Vec<RgbImage>, fps: f64, place: &str) -> Result<Visual, Refusal> {
    let size = |image: &RgbImage| (image.width(), image.height());
    let Some(first) = frames.first().map(size) else {
        return Err(Refusal::bad(place, "the video has no frames"));
    };
    if frames.iter().any(|frame| size(frame) != first) {
        return Err(Refusal::bad(place, "the frames of a video have one size"));
    }
    Ok(Visual::Video(Video { frames, fps }))
}
