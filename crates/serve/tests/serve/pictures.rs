//! Where pictures may come from, and where not.

use std::fs;
use std::path::Path;

use serde_json::json;

use super::*;

fn asking(part: Value) -> Value {
    json!({"messages": [{"role": "user", "content": [part, {"type": "text", "text": "find the cross"}]}]})
}

fn with_folders(folders: &[&Path]) -> Running {
    Running::start(Settings {
        folders: folders.iter().map(|folder| folder.to_path_buf()).collect(),
        ..Settings::default()
    })
}

#[test]
fn files_below_the_folder_are_read_and_none_outside() {
    let root = tempfile::tempdir().expect("a folder");
    let (inside, outside) = (root.path().join("in side"), root.path().join("outside"));
    fs::create_dir_all(inside.join("deep")).expect("made");
    fs::create_dir_all(&outside).expect("made");
    for path in [
        inside.join("a.png"),
        inside.join("deep/b é.png"),
        outside.join("secret.png"),
    ] {
        fs::write(path, embedded::SCENE.image).expect("written");
    }
    let link = |to: &Path, at: &str| {
        std::os::unix::fs::symlink(to, inside.join(at)).expect("a link");
    };
    link(&outside.join("secret.png"), "link.png");
    link(&outside, "door");
    link(Path::new("../outside/secret.png"), "relative.png");
    link(&inside.join("a.png"), "absolute-inside.png");
    link(Path::new("a.png"), "alias.png");
    link(Path::new("loop.png"), "loop.png");
    let made = std::process::Command::new("mkfifo")
        .arg(inside.join("pipe.png"))
        .status();
    assert!(made.expect("mkfifo").success());
    let server = with_folders(&[&inside]);
    // A host, or a path from nowhere.
    for url in ["file://inside/a.png", "file:a.png"] {
        let (status, error) = server.refuse(&asking(image_part(url)));
        let message = error["message"].as_str().expect("a text");
        assert!(status == 400 && message.contains("absolute"), "{error}");
    }
    let expected = server.ask(&asking(image_part(&data_url(embedded::SCENE.image))));
    let at = |name: &str| {
        let root = root.path().display();
        asking(image_part(&format!("file://{root}/{name}")))
    };
    for name in [
        "in%20side/a.png",
        "in side/a.png",
        "in%20side/deep/b%20%C3%A9.png",
        "in side/alias.png",
        "in side/deep/../a.png",
    ] {
        assert_eq!(
            text_of(&server.ask(&at(name))),
            text_of(&expected),
            "{name}"
        );
    }
    let mut messages = Vec::new();
    for name in [
        "outside/secret.png",
        "in side/../outside/secret.png",
        "in%20side/%2e%2e/outside/secret.png",
        "in side/link.png",
        "in side/door/secret.png",
        "in side/relative.png",
        "in side/loop.png",
        "in side/pipe.png",
        "in side/deep",
        "in side",
        "in side/nothing.png",
        "in side/a.png%00.png",
    ] {
        let (status, error) = server.refuse(&at(name));
        assert_eq!(status, 400, "{name}: {error}");
        messages.push(error["message"].clone());
    }
    // Nobody learns what there is outside.
    messages.dedup();
    assert_eq!(messages.len(), 1, "{messages:?}");
    for url in [
        "file:///etc/passwd",
        "file://localhost/etc/passwd",
        "file://elsewhere/a.png",
        "file:a.png",
        "FILE:///etc/passwd",
    ] {
        assert_eq!(server.refuse(&asking(image_part(url))).0, 400, "{url}");
    }
}

#[test]
fn damaged_pictures_are_refused() {
    let server = Running::start(Settings::default());
    let mut cut = embedded::SCENE.image.to_vec();
    cut.truncate(cut.len() / 2);
    let mut flipped = embedded::SCENE.image.to_vec();
    flipped[200] ^= 0xff;
    for bytes in [&cut[..], &flipped, b"GIF89a", b"", b"<svg/>"] {
        let (status, error) = server.refuse(&asking(image_part(&data_url(bytes))));
        assert_eq!(status, 400, "{error}");
        assert_eq!(error["param"], "messages[0].content[0].image_url.url");
    }
    // Base64 with white space and percent signs is base64, too.
    let url = data_url(embedded::SCENE.image).replace('=', "%3D");
    server.ask(&asking(image_part(&url)));
}

#[test]
fn videos_are_frames_and_only_for_models_that_see_them() {
    let root = tempfile::tempdir().expect("a folder");
    for name in ["2.png", "10.png"] {
        fs::write(root.path().join(name), embedded::SCENE.image).expect("written");
    }
    let server = with_folders(&[root.path()]);
    let frame = STANDARD.encode(embedded::SCENE.image);
    let small = STANDARD.encode(png(&[0; 48], 4, 4));
    let video =
        |url: String| asking(json!({"type": "video_url", "video_url": {"url": url, "fps": 1.5}}));
    let folder = format!("file://{}", root.path().display());
    for url in [format!("data:video/png;base64,{frame},{frame}"), folder] {
        let (status, error) = server.refuse(&video(url));
        assert_eq!(status, 400);
        // It got as far as the model, which says so.
        let message = error["message"].as_str().expect("a text");
        assert!(
            message.contains("video") && error["param"] == "messages",
            "{error}"
        );
    }
    for url in [
        "data:video/png;base64".to_string(),
        "data:video/png;base64,".into(),
        format!("data:video/png;base64,{frame},{small}"),
        format!("data:video/mp4;base64,{frame}"),
        "file:///nowhere".into(),
    ] {
        let (_, error) = server.refuse(&video(url));
        assert_eq!(
            error["param"], "messages[0].content[0].video_url.url",
            "{error}"
        );
    }
}
