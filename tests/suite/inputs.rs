//! Where images and videos may come from.

use std::fs;
use std::io::Cursor;

use reroute_cli::args::Args;
use reroute_cli::chat;

use crate::golden::fixture;
use crate::program::{Scratch, refuses, report, reroute, scene};

/// Base64, as data: URLs have it.
fn base64(bytes: &[u8]) -> String {
    const DIGITS: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let group = |group: &[u8]| {
        let mut three = [0; 3];
        three[..group.len()].copy_from_slice(group);
        let [a, b, c] = three.map(u32::from);
        let bits = a << 16 | b << 8 | c;
        let digit = move |at: usize| match at <= group.len() {
            true => char::from(DIGITS[(bits >> (18 - 6 * at)) as usize & 63]),
            false => '=',
        };
        [0, 1, 2, 3].map(digit)
    };
    bytes.chunks(3).flat_map(group).collect()
}

fn ask(image: &str) -> Vec<&str> {
    vec![
        "ask",
        "--image",
        image,
        "--prompt",
        "How many rings are there?",
    ]
}

#[test]
fn urls_that_hold_or_name_a_file_are_read() {
    let path = scene("063");
    let bytes = fs::read(&path).unwrap();
    let expected = report(&ask(&path));
    let percent: String = bytes.iter().map(|byte| format!("%{byte:02X}")).collect();
    let folder = Scratch::new();
    folder.write("a ü%.png", &bytes);
    let encoded = format!("{}/a%20%C3%BC%25.png", folder.path());
    for url in [
        format!("data:image/png;base64,{}", base64(&bytes)),
        format!(
            "DATA:image/png;charset=x;base64,{}",
            base64(&bytes).trim_end_matches('=')
        ),
        format!("data:,{percent}"),
        format!("file://{encoded}"),
        format!("FILE://localhost{encoded}"),
    ] {
        assert_eq!(
            report(&ask(&url)),
            expected,
            "{}",
            &url[..url.len().min(60)]
        );
    }
    // A file of that name goes before.
    let odd = folder.write("data:x", &bytes);
    assert_eq!(report(&ask(&odd)), expected);
}

#[test]
fn urls_that_cannot_be_read_are_refused_with_what_to_do() {
    for (url, expected) in [
        ("https://example.com/a.png", "download it"),
        ("HTTP://example.com/a.png", "download it"),
        ("s3://bucket/a.png", "s3: URLs"),
        ("file://server/a.png", "another machine"),
        ("file:///nowhere/a.png", "/nowhere/a.png"),
        ("data:image/png;base64", "no comma"),
        ("data:image/png;base64,%%%", "not base64"),
        ("data:,hello", "PNG, JPEG or WebP"),
    ] {
        refuses(&ask(url), &[expected]);
    }
    // Of a picture in a URL, a message shows the beginning.
    let long = format!("data:,{}", "x".repeat(10_000));
    assert!(reroute(&ask(&long)).unwrap_err().len() < 300);
    let twice = ["ask", "--image", "-", "-", "--prompt", "x"];
    refuses(&twice, &["standard input", "once"]);
}

/// Its questions come from there.
#[test]
fn chat_takes_no_image_from_the_standard_input() {
    let run = |flags: &[&str], input: &str| {
        let args = <Args as clap::Parser>::try_parse_from([&["reroute", "chat"], flags].concat());
        let reroute_cli::args::Command::Chat(args) = args.unwrap().command else {
            panic!("not chat");
        };
        let mut input = Cursor::new(input.to_owned());
        let said = chat::run_on(&args, &mut input, false, &mut Vec::new());
        said.unwrap_err().to_string()
    };
    for said in [run(&["--image", "-"], ""), run(&[], "/image -\n")] {
        assert!(said.contains("standard input"), "{said}");
    }
}

fn qwen() -> String {
    fixture("qwen25vl/ckpt").display().to_string()
}

fn watch(model: &str, folder: &str, fps: &str) -> Vec<String> {
    let flags = ["ask", "--model", model, "--video", folder, "--fps", fps];
    let flags = flags
        .into_iter()
        .chain(["--prompt", "What happens?", "--max-new-tokens", "4"]);
    flags.map(str::to_owned).collect()
}

/// A picture of one colour, as PPM's bytes in PNG.
fn frame(level: u8) -> Vec<u8> {
    let picture = image::RgbImage::from_fn(56, 56, |x, y| {
        image::Rgb([level, (x * 4) as u8, (y as u8).wrapping_mul(level)])
    });
    let mut bytes = Cursor::new(Vec::new());
    picture
        .write_to(&mut bytes, image::ImageFormat::Png)
        .unwrap();
    bytes.into_inner()
}

/// Frame 2 comes before frame 10, and what is no picture is left out.
#[test]
fn frames_come_in_the_order_of_their_numbers() {
    let (plain, padded, lexical) = (Scratch::new(), Scratch::new(), Scratch::new());
    let mut names = Vec::new();
    for number in 1..=12_u8 {
        let bytes = frame(number * 20);
        names.push((format!("frame_{number}.png"), bytes.clone()));
        plain.write(&format!("frame_{number}.png"), &bytes);
        padded.write(&format!("frame_{number:03}.PNG"), &bytes);
    }
    names.sort();
    for (at, (_, bytes)) in names.iter().enumerate() {
        lexical.write(&format!("{at:03}.png"), bytes);
    }
    plain.write(".DS_Store", "\0\0\0\u{1}Bud1");
    plain.write("._frame_1.png", "\0\u{5}\u{16}\u{7}");
    plain.write("notes.txt", "recorded in May");
    fs::create_dir(plain.at("thumbnails")).unwrap();
    let model = qwen();
    let [plain, padded, lexical] =
        [plain, padded, lexical].map(|folder| report(&watch(&model, &folder.path(), "2")));
    assert_eq!(plain, padded);
    assert_ne!(plain["answer"], lexical["answer"], "the order matters");
}

#[test]
fn frames_that_cannot_be_seen_are_named() {
    let (model, folder) = (qwen(), Scratch::new());
    let flags = watch(&model, &folder.path(), "2");
    folder.write("b.txt", "no picture");
    refuses(
        &flags,
        &["has no frames in it", "b.txt", "PNG, JPEG or WebP"],
    );
    folder.write("frame_9.png", frame(1));
    folder.write("frame_10.png", frame(2));
    folder.write("frame_11.jpg", "no picture");
    refuses(&flags, &["frame_11.jpg", "PNG, JPEG or WebP"]);
    folder.write("frame_11.jpg", fs::read(scene("063")).unwrap());
    refuses(
        &flags,
        &["frame_11.jpg", "frame_9.png", "one size", "56×56"],
    );
    #[cfg(unix)]
    {
        std::os::unix::fs::symlink("nothing", folder.at("frame_12.png")).expect("a link");
        refuses(&flags, &["frame_12.png", "link to nothing"]);
        folder.remove("frame_12.png");
    }
    let file = folder.at("frame_9.png");
    refuses(
        &watch(&model, &file, "2"),
        &["frame_9.png is a file", "ffmpeg"],
    );
}

/// However slow: times are positions, which no backend counts beyond 32 bits.
#[test]
fn a_video_that_lasts_too_long_is_refused() {
    let folder = Scratch::new();
    for number in 0..12 {
        folder.write(&format!("{number}.png"), frame(number * 20));
    }
    for family in ["qwen2vl", "qwen25vl", "qwen3vl"] {
        let model = fixture(family).join("ckpt").display().to_string();
        for fps in [
            "1e-5", "1e-8", "1e-9", "1e-12", "1e-30", "1e-39", "1e-300", "5e-324",
        ] {
            let said = reroute(&watch(&model, &folder.path(), fps));
            let seen = match said {
                // Qwen2-VL counts frames, Qwen3-VL reads short times as text.
                Ok(_) => family != "qwen25vl",
                Err(error) => error.contains("positions") || error.contains("frame rate"),
            };
            assert!(seen, "{family} {fps}");
        }
    }
}
