//! Where results are kept, and what is said about their origin.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::Context;
use serde_json::{Value, json};

/// Adds date, commit and device.
pub fn describe(mut report: Value) -> Value {
    report["date"] = json!(output("date", &["-u", "+%F"]));
    report["commit"] = json!(output("git", &["rev-parse", "HEAD"]));
    let changes = output("git", &["status", "--porcelain", "--untracked-files=no"]);
    report["uncommitted_changes"] = json!(changes.map(|text| !text.is_empty()));
    let device = report["backends"]
        .as_array()
        .and_then(|backends| backends.first())
        .map_or(Value::Null, |backend| backend["device"].clone());
    report["device"] = device;
    report
}

/// Writes `DATE-DEVICE.json`, or `DATE-DEVICE-MODEL.json` for other models than the default one; with a
/// number if there is one of that name.
pub fn save(report: &Value, model: &str, folder: &Path) -> anyhow::Result<PathBuf> {
    let date = report["date"].as_str().unwrap_or("undated");
    let device = report["device"].as_str().unwrap_or("peers");
    let model = match model {
        "llava" => "",
        other => Path::new(other)
            .file_name()
            .and_then(|name| name.to_str())
            .unwrap_or(""),
    };
    let words = [date, device, model].map(slug);
    let words: Vec<&str> = words.iter().map(String::as_str).collect();
    let words: Vec<&str> = words.into_iter().filter(|word| !word.is_empty()).collect();
    let name = words.join("-");
    fs::create_dir_all(folder).with_context(|| format!("cannot make {}", folder.display()))?;
    let mut path = folder.join(format!("{name}.json"));
    for number in 2.. {
        if !path.exists() {
            break;
        }
        path = folder.join(format!("{name}-{number}.json"));
    }
    fs::write(&path, format!("{report:#}\n"))
        .with_context(|| format!("cannot write {}", path.display()))?;
    Ok(path)
}

/// Letters and digits, in words between hyphens.
fn slug(text: &str) -> String {
    let text = text.to_lowercase();
    let words = text.split(|c: char| !c.is_ascii_alphanumeric());
    let words: Vec<&str> = words.filter(|word| !word.is_empty()).collect();
    words.join("-")
}

/// What a program prints, if it runs and succeeds.
fn output(program: &str, arguments: &[&str]) -> Option<String> {
    let output = Command::new(program).args(arguments).output().ok()?;
    let text = String::from_utf8_lossy(&output.stdout).trim().to_string();
    output.status.success().then_some(text)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    #[test]
    fn a_result_is_named_after_day_device_and_other_models_and_replaces_none() {
        let folder = tempfile::tempdir().unwrap();
        let report = json!({"date": "2026-01-02", "device": "Fast(R) Processor @ 2 GHz"});
        for (model, name) in [
            ("llava", "2026-01-02-fast-r-processor-2-ghz.json"),
            ("llava", "2026-01-02-fast-r-processor-2-ghz-2.json"),
            ("qwen", "2026-01-02-fast-r-processor-2-ghz-qwen.json"),
            (
                "../a/My_Model",
                "2026-01-02-fast-r-processor-2-ghz-my-model.json",
            ),
        ] {
            let path = super::save(&report, model, folder.path()).unwrap();
            assert_eq!(path, folder.path().join(name));
            assert!(path.is_file());
        }
    }
}
